// Boots the same kernel and initramfs in Lodge and in QEMU's TCG, in turn, and compares the time from the
// start of the process to the first line of userland and to its end.
#include <fmt/format.h>
#include <unistd.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <algorithm>
#include <chrono>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "support/process.hpp"

namespace {

using lodge::testing_support::Process;
using lodge::testing_support::Seconds;

struct Side {
  std::string name;
  std::vector<std::string> command;
  std::vector<double> userland, off, cpu;  // seconds
};

struct Options {
  std::string guests = LODGE_GUESTS, guest = "cloud", accelerator = "soft", memory = "512M",
              qemu = "/usr/bin/qemu-system-x86_64";
  unsigned rounds = 3, cpus = 1;
  bool json = false;
};

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// False, with a message, when the boot went wrong.
bool boot(Side& side) {
  constexpr Seconds patience(900);
  const double start = now();
  Process process(side.command);
  process.close_input();
  if (!process.wait_output("lodge-guest: userland", patience)) {
    fmt::print(stderr, "{} did not reach userland:\n{}\n{}\n", side.name, process.out(), process.err());
    return false;
  }
  side.userland.push_back(now() - start);
  const int status = process.wait_exit(patience);
  side.off.push_back(now() - start);
  side.cpu.push_back(process.cpu_seconds());
  if (status != 0) fmt::print(stderr, "{} ended with status {}:\n{}\n", side.name, status, process.err());
  return status == 0;
}

double minimum(const std::vector<double>& values) {
  return *std::ranges::min_element(values);
}
double median(std::vector<double> values) {
  std::ranges::sort(values);
  const size_t middle = values.size() / 2;
  return values.size() % 2 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

nlohmann::json to_json(const Side& side) {
  return {{"name", side.name},
          {"userland_s",
           {{"min", minimum(side.userland)}, {"median", median(side.userland)}, {"all", side.userland}}},
          {"power_off_s", {{"min", minimum(side.off)}, {"median", median(side.off)}, {"all", side.off}}},
          {"cpu_s", {{"min", minimum(side.cpu)}, {"median", median(side.cpu)}, {"all", side.cpu}}}};
}

void print_table(const std::vector<Side>& sides) {
  fmt::print("{:<24}{:>24}{:>24}{:>24}\n", "minimum / median", "to userland", "to power-off",
             "processor time");
  const auto cell = [](const std::vector<double>& values) {
    return fmt::format("{:.2f} / {:.2f} s", minimum(values), median(values));
  };
  for (const auto& side : sides)
    fmt::print("{:<24}{:>24}{:>24}{:>24}\n", side.name, cell(side.userland), cell(side.off), cell(side.cpu));
  const auto ratio = [&](std::vector<double> Side::*values) {
    return fmt::format("{:.1f}x / {:.1f}x", minimum(sides[0].*values) / minimum(sides[1].*values),
                       median(sides[0].*values) / median(sides[1].*values));
  };
  fmt::print("{:<24}{:>24}{:>24}{:>24}\n", "ratio", ratio(&Side::userland), ratio(&Side::off),
             ratio(&Side::cpu));
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app("Boot time of Lodge beside QEMU's TCG", "boot_bench");
  app.add_option("--rounds", options.rounds, "boots of each side")
      ->check(CLI::Range(1u, 100u))
      ->capture_default_str();
  app.add_option("--cpus", options.cpus)->capture_default_str();
  app.add_option("--memory", options.memory)->capture_default_str();
  app.add_option("--guest", options.guest, "a directory of .cache/guests: cloud or i686")
      ->capture_default_str();
  app.add_option("--accel", options.accelerator, "Lodge's accelerator")->capture_default_str();
  app.add_option("--qemu", options.qemu)->capture_default_str();
  app.add_flag("--json", options.json, "print JSON instead of a table");
  CLI11_PARSE(app, argc, argv);

  const std::string directory = options.guests + "/" + options.guest, kernel = directory + "/vmlinuz",
                    initrd = directory + "/initramfs";
  for (const auto& path : {kernel, initrd, options.qemu}) {
    if (!std::filesystem::exists(path)) {
      fmt::print(stderr, "boot_bench: {} is missing; run scripts/setup and scripts/fetch-guests\n", path);
      return 2;
    }
  }
  const std::string append = "console=ttyS0 quiet lodge.mode=off", cpus = std::to_string(options.cpus);
  std::vector<Side> sides = {
      {"lodge " + options.accelerator,
       {LODGE_BINARY, "run", "--accel", options.accelerator, "--kernel", kernel, "--initrd", initrd,
        "--append", append, "--cpus", cpus, "--memory", options.memory, "--no-reboot"},
       {},
       {}},
      {"qemu tcg -cpu max q35",
       {options.qemu, "-accel",     "tcg",          "-cpu",     "max",     "-M",       "q35",     "-smp",
        cpus,         "-m",         options.memory, "-display", "none",    "-monitor", "none",    "-serial",
        "stdio",      "-no-reboot", "-kernel",      kernel,     "-initrd", initrd,     "-append", append},
       {},
       {}}};
  // In turn, so that a change of the machine's load meets both sides.
  for (unsigned round = 0; round < options.rounds; round++) {
    for (auto& side : sides)
      if (!boot(side)) return 1;
  }
  if (options.json) {
    fmt::print("{}\n", nlohmann::json{{"guest", options.guest},
                                      {"cpus", options.cpus},
                                      {"memory", options.memory},
                                      {"rounds", options.rounds},
                                      {"sides", {to_json(sides[0]), to_json(sides[1])}}}
                           .dump(2));
  } else {
    print_table(sides);
  }
  return 0;
}
