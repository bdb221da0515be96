// The options by which cloud-init in the guest is told something (vm/seed.hpp).
#pragma once

#include <CLI/App.hpp>
#include <string>
#include <vector>

#include "vm/config.hpp"

namespace lodge::cli {

struct RawSeedOptions {
  std::string user_data, hostname;
  std::vector<std::string> ssh_keys, commands;
};

void describe_seed(CLI::App& run, RawSeedOptions& raw);

// Gives `config` the seed and its disk, behind those that it has; nothing when no option was given. Throws
// UsageError.
void add_seed(const RawSeedOptions& raw, vm::VmConfig& config);

// --ssh-key, in all commands: a public key as OpenSSH writes it, or the path of a file with such, each a
// line. Throws UsageError.
std::vector<std::string> read_keys(const std::string& text);

}  // namespace lodge::cli
