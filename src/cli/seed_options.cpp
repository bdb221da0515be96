#include "cli/seed_options.hpp"

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <iterator>
#include <optional>
#include <sstream>
#include <string_view>

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

// The type of a key and what follows it, behind the options that a line of authorized_keys may begin with.
std::string_view without_options(std::string_view line) {
  const auto is_key = [](std::string_view text) {
    return text.starts_with("ssh-") || text.starts_with("ecdsa-") || text.starts_with("sk-");
  };
  if (is_key(line)) return line;
  bool quoted = false;
  for (size_t i = 0; i < line.size(); i++) {
    if (line[i] == '"' && (i == 0 || line[i - 1] != '\\')) quoted = !quoted;
    if (quoted || (line[i] != ' ' && line[i] != '\t')) continue;
    line.remove_prefix(std::min(line.find_first_not_of(" \t", i), line.size()));
    return is_key(line) ? line : "";
  }
  return "";
}

std::optional<std::string> decode_base64(std::string_view text) {
  constexpr std::string_view digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  if (text.empty() || text.size() % 4 != 0) return std::nullopt;
  for (int i = 0; i < 2 && text.ends_with('='); i++) text.remove_suffix(1);
  std::string bytes;
  uint32_t bits = 0;
  unsigned count = 0;
  for (const char c : text) {
    const size_t digit = digits.find(c);
    if (digit == std::string_view::npos) return std::nullopt;
    bits = bits << 6 | static_cast<uint32_t>(digit);
    if (count += 6; count >= 8) bytes += static_cast<char>(bits >> (count -= 8));
  }
  return bytes;
}

// TYPE BASE64 [COMMENT]; the bytes begin with the type and its length (RFC 4253, section 6.6).
bool is_public_key(std::string_view line) {
  if (std::ranges::any_of(line, [](char c) { return static_cast<uint8_t>(c) < ' ' && c != '\t'; }))
    return false;
  line = without_options(line);
  const std::string_view type = line.substr(0, line.find_first_of(" \t"));
  line.remove_prefix(std::min(line.find_first_not_of(" \t", type.size()), line.size()));
  const auto bytes = decode_base64(line.substr(0, line.find_first_of(" \t")));
  return bytes && type.size() < 256 &&
         bytes->starts_with(std::string{0, 0, 0, static_cast<char>(type.size())} + std::string(type));
}

// Those of a file, each a line; none when there is a line that is neither a key nor a comment.
std::vector<std::string> keys_of(const std::string& text) {
  std::vector<std::string> keys;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.ends_with('\r')) line.pop_back();
    line.erase(0, std::min(line.find_first_not_of(" \t"), line.size()));
    if (line.empty() || line[0] == '#') continue;
    if (!is_public_key(line)) return {};
    keys.push_back(line);
  }
  return keys;
}

}  // namespace

void describe_seed(CLI::App& run, RawSeedOptions& raw) {
  constexpr const char* group = "Settings for cloud-init in the guest";
  run.add_option("--user-data", raw.user_data, "cloud-init's user data: a #cloud-config, a script...")
      ->type_name("FILE")
      ->group(group);
  run.add_option("--ssh-key", raw.ssh_keys,
                 "who may log in by SSH, as root and as the system's own user: a public key, or a file with "
                 "keys; repeatable")
      ->type_name("KEY")
      ->allow_extra_args(false)
      ->group(group);
  run.add_option_function<std::string>(
         "--hostname",
         [&raw](const std::string& name) {
           if (name.empty()) usage_error("--hostname: the name is empty");
           raw.hostname = name;
         },
         "the guest's name")
      ->type_name("NAME")
      ->group(group);
  run.add_option("--run", raw.commands, "a shell command that root runs once; repeatable")
      ->type_name("COMMAND")
      ->allow_extra_args(false)
      ->group(group);
}

void add_seed(const RawSeedOptions& raw, vm::VmConfig& config) {
  vm::SeedWishes wishes{.user_data = {}, .ssh_keys = {}, .hostname = raw.hostname, .commands = raw.commands};
  if (!raw.user_data.empty()) wishes.user_data = read_user_data(raw.user_data);
  for (const auto& key : raw.ssh_keys) std::ranges::move(read_keys(key), std::back_inserter(wishes.ssh_keys));
  if (wishes.empty()) return;
  config.seed = vm::make_seed(wishes);
  config.devices.push_back({"virtio-blk", {{"file", vm::seed_file}, {"readonly", "on"}}});
}

std::vector<std::string> read_keys(const std::string& text) {
  if (is_public_key(text)) return {text};
  std::ifstream file(text, std::ios::binary);
  std::string contents(1 << 20, 0);  // far more than people have keys; a device may have no end
  file.read(contents.data(), static_cast<std::streamsize>(contents.size()));
  contents.resize(static_cast<size_t>(file.gcount()));
  if (contents.find("PRIVATE KEY") != std::string::npos)
    usage_error("--ssh-key: '{}' is a private key; give the public one, {}.pub", text, text);
  auto keys = keys_of(contents);
  if (keys.empty()) usage_error("--ssh-key: '{}' is neither a public key nor a file with one", text);
  return keys;
}

}  // namespace lodge::cli
