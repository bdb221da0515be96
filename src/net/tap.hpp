// A tap: the guest's card is an interface of the host's network.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "net/backend.hpp"

namespace lodge::net {

inline constexpr unsigned max_tap_queues = 16;

struct TapConfig {
  std::string name;      // of the interface; made if there is none, and gone with the back end then
  std::vector<int> fds;  // or descriptors of an open tap, one for each queue; duplicated
  unsigned queues = 1;
  bool operator==(const TapConfig&) const = default;
};

// Throws UsageError, which names the option and the remedy, when the host refuses.
std::unique_ptr<Backend> open_tap(const TapConfig& config);

}  // namespace lodge::net
