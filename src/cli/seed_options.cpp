#include "cli/seed_options.hpp"

#include <fstream>
#include <iterator>

#include "base/error.hpp"
#include "vm/seed.hpp"

namespace lodge::cli {
namespace {

std::string read_user_data(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string text;
  // One more than is allowed: what is larger is seen to be so, and what has no end is not read to it.
  text.resize(vm::max_user_data + 1);
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<size_t>(file.gcount()));
  if (text.empty()) usage_error("--user-data: '{}' cannot be read or is empty", path);
  return text;
}

}  // namespace

void describe_seed(CLI::App& run, RawSeedOptions& raw) {
  constexpr const char* group = "Settings for cloud-init in the guest";
  run.add_option("--user-data", raw.user_data, "cloud-init's user data: a #cloud-config, a script...")
      ->type_name("FILE")
      ->group(group);
  run.add_option("--ssh-key", raw.ssh_keys,
                 "who may log in by SSH, as root and as the system's own user: a public key, or a file with "
                 "one; repeatable")
      ->type_name("KEY")
      ->allow_extra_args(false)
      ->group(group);
  run.add_option("--hostname", raw.hostname, "the guest's name")->type_name("NAME")->group(group);
  run.add_option("--run", raw.commands, "a shell command that root runs once; repeatable")
      ->type_name("COMMAND")
      ->allow_extra_args(false)
      ->group(group);
}

void add_seed(const RawSeedOptions& raw, vm::VmConfig& config) {
  vm::SeedWishes wishes{.user_data = {}, .ssh_keys = {}, .hostname = raw.hostname, .commands = raw.commands};
  if (!raw.user_data.empty()) wishes.user_data = read_user_data(raw.user_data);
  for (const auto& key : raw.ssh_keys) wishes.ssh_keys.push_back(read_key(key));
  if (wishes.empty()) return;
  config.seed = vm::make_seed(wishes);
  config.devices.push_back({"virtio-blk", {{"file", vm::seed_file}, {"readonly", "on"}}});
}

std::string read_key(const std::string& text) {
  if (text.starts_with("ssh-") || text.starts_with("ecdsa-") || text.starts_with("sk-")) return text;
  std::ifstream file(text);
  std::string key;
  if (!std::getline(file, key) || key.empty())
    usage_error("--ssh-key: '{}' is neither a public key nor a file with one", text);
  if (key.find("PRIVATE KEY") != std::string::npos)
    usage_error("--ssh-key: '{}' is a private key; give the public one, {}.pub", text, text);
  return key;
}

}  // namespace lodge::cli
