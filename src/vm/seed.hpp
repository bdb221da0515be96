// What cloud-init in the guest is told: its NoCloud data source, a small volume labelled CIDATA with the
// files user-data and meta-data (cloud-init's documentation, "Data sources", "NoCloud"), as a read-only disk.
//
// The instance ID is derived from all the rest: cloud-init applies its settings once for each instance, and
// so again when they have changed.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "block/image.hpp"

namespace lodge::vm {

// What a user wants to be told, as text.
struct SeedWishes {
  std::string user_data;              // the contents of --user-data's file; empty: made of the others
  std::vector<std::string> ssh_keys;  // each one line as in authorized_keys
  std::string hostname;
  std::vector<std::string> commands;  // of the shell, once, as root, when the system is up
  bool empty() const noexcept {
    return user_data.empty() && ssh_keys.empty() && hostname.empty() && commands.empty();
  }
};

struct Seed {
  std::string user_data, meta_data;
  bool operator==(const Seed&) const = default;
};

inline constexpr size_t max_user_data = 1 << 20;  // bytes

// Throws UsageError naming the option.
Seed make_seed(const SeedWishes& wishes);

// The file= of the disk in the configuration; VirtualMachine puts seed_image() there.
inline constexpr const char* seed_file = "(cloud-init seed)";
// The volume, in memory. Throws std::system_error.
std::shared_ptr<block::Image> seed_image(const Seed& seed);

}  // namespace lodge::vm
