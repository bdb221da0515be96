// The command line: what a person typed, as one typed command.
#pragma once

#include <CLI/App.hpp>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "cli/control.hpp"
#include "cli/image_options.hpp"
#include "cli/seed_options.hpp"
#include "vm/config.hpp"

namespace lodge::cli {

struct RunCommand {
  vm::VmConfig config;
  bool stats = false;   // what happened, on stderr at the end
  bool json = false;    // the same as one line of JSON
  std::string control;  // path of the control socket; empty: none
};
struct DoctorCommand {
  bool json = false;
};
// lodge kvm: a program that is to see the soft accelerator as /dev/kvm.
struct KvmCommand {
  std::vector<std::string> program;  // with its arguments
  std::string engine = "translate", code_cache_text = "64M";
  uint64_t code_cache = 0;
  bool check = false, trace = false;
};
struct CompletionCommand {
  std::string shell;
};
// Something to print on stdout: help or the version.
struct PrintCommand {
  std::string text;
};
using Command = std::variant<RunCommand, DoctorCommand, ImageCommand, CtlCommand, ListCommand, KvmCommand,
                             CompletionCommand, PrintCommand>;

// Throws UsageError with one line that names the option and the remedy.
Command parse_command_line(std::span<const char* const> arguments);

// A shell's completion script, derived from the same description of options that parsing uses. Throws
// UsageError for a shell other than bash, zsh and fish.
std::string completion_script(const std::string& shell);

namespace detail {
// The options as text, before their values are understood.
struct RawOptions {
  std::string kernel, append, cpus = "1", memory = "512M", machine = "pc", accel = "auto",
                              engine = "translate", code_cache = "64M", cpu = "host", name = "lodge", console,
                              shell, boot_disk;
  std::vector<std::string> initrds, serial, disks, networks, forwards, devices;
  std::vector<std::string> shares;
  std::string vsock, watchdog;
  bool snapshot = false, no_reboot = false, stats = false, perf_map = false, run_json = false,
       doctor_json = false;
  std::string control, transparent_huge_pages = "auto", huge_pages;
  std::optional<std::string> numa_node;
  std::string hotplug = "0";
  bool no_balloon = false, ksm = false, preallocate = false, memory_lock = false;
  RawSeedOptions seed;
  CtlCommand ctl;
  ListCommand list;
  KvmCommand kvm;
  RawImageOptions image;
};
std::unique_ptr<CLI::App> describe_command_line(RawOptions& raw);
// What may follow an option, for completions: fixed words, or a file (empty words, file set).
struct Values {
  std::vector<std::string> words;
  bool file = false;
};
Values values_of(const std::string& option);
}  // namespace detail

}  // namespace lodge::cli
