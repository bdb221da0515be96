#include "vm/seed.hpp"

#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "block/raw.hpp"
#include "guestfs/iso9660.hpp"

namespace lodge::vm {
namespace {

constexpr size_t max_hostname = 64;  // HOST_NAME_MAX of Linux

// FNV-1a: nothing depends on it but that changed settings are seen as changed.
uint64_t hash(std::string_view text, uint64_t value = 0xcbf2'9ce4'8422'2325) {
  for (const char c : text) value = (value ^ static_cast<uint8_t>(c)) * 0x100'0000'01b3;
  return value;
}

// YAML's double-quoted strings hold JSON's, apart from pairs of \u surrogates, which dump() does not make.
std::string quoted(const std::string& option, const std::string& text) {
  try {
    return nlohmann::json(text).dump();
  } catch (const nlohmann::json::exception&) {
    usage_error("{}: it is not UTF-8", option);
  }
}

void check(const SeedWishes& wishes) {
  const std::string& name = wishes.hostname;
  const bool sound = std::ranges::all_of(
      name, [](char c) { return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-' || c == '.'; });
  if (!name.empty() && (!sound || name.size() > max_hostname || name[0] == '-' || name[0] == '.'))
    usage_error("--hostname: '{}' is not a name of lower-case letters, digits, '-' and '.', at most {}", name,
                max_hostname);
  if (wishes.user_data.size() > max_user_data)
    usage_error("--user-data: the file is larger than {} KiB; let it fetch the rest", max_user_data >> 10);
  if (!wishes.user_data.empty() && !wishes.commands.empty())
    usage_error("--run: cannot be added to --user-data; write the command into that file (runcmd)");
  for (const auto& key : wishes.ssh_keys)
    if (key.empty() || key.find('\n') != std::string::npos)
      usage_error("--ssh-key: give one public key, a file like ~/.ssh/id_ed25519.pub or its text");
  for (const auto& command : wishes.commands)
    if (command.empty()) usage_error("--run: the command is empty");
}

// Cloud-init would give the key to the distribution's own user only, and forbid root to use it.
std::string user_data_of(const SeedWishes& wishes) {
  if (!wishes.user_data.empty()) return wishes.user_data;
  std::string text = "#cloud-config\n";
  if (wishes.ssh_keys.empty() && wishes.commands.empty()) text += "{}\n";  // nothing at all is no mapping
  if (!wishes.ssh_keys.empty()) text += "disable_root: false\n";
  if (!wishes.commands.empty()) text += "runcmd:\n";
  for (const auto& command : wishes.commands) text += fmt::format("  - {}\n", quoted("--run", command));
  return text;
}

}  // namespace

Seed make_seed(const SeedWishes& wishes) {
  check(wishes);
  Seed seed{.user_data = user_data_of(wishes), .meta_data = {}};
  if (!wishes.hostname.empty())
    seed.meta_data += fmt::format("local-hostname: {}\n", quoted("--hostname", wishes.hostname));
  if (!wishes.ssh_keys.empty()) seed.meta_data += "public-keys:\n";
  for (const auto& key : wishes.ssh_keys) seed.meta_data += fmt::format("  - {}\n", quoted("--ssh-key", key));
  const uint64_t id = hash(seed.user_data, hash(seed.meta_data));
  seed.meta_data = fmt::format("instance-id: lodge-{:016x}\n{}", id, seed.meta_data);
  return seed;
}

std::shared_ptr<block::Image> seed_image(const Seed& seed) {
  const auto volume =
      guestfs::make_iso9660("CIDATA", {{"user-data", seed.user_data}, {"meta-data", seed.meta_data}});
  Fd fd(::memfd_create("lodge-seed", MFD_CLOEXEC));
  if (!fd) throw_errno(seed_file);
  if (::write(fd.get(), volume.data(), volume.size()) != static_cast<ssize_t>(volume.size()))
    throw_errno(seed_file);
  auto storage = std::make_unique<block::FileStorage>(std::move(fd), seed_file, block::Use::read,
                                                      block::make_engine(block::Engine::automatic));
  return std::make_shared<block::RawImage>(std::move(storage), false);
}

}  // namespace lodge::vm
