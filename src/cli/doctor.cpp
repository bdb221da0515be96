// lodge doctor: what this host offers.
#include <fmt/format.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "cli/commands.hpp"
#include "vm/accelerator.hpp"

namespace lodge::cli {
namespace {

struct Host {
  std::string cpu = "unknown", kernel;
  long cores = 0;
  uint64_t memory = 0;
  bool virtual_machine = false;  // a guest itself
};

Host describe_host() {
  Host host;
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);) {
    const auto colon = line.find(": ");
    if (colon == std::string::npos) continue;
    if (line.starts_with("model name")) host.cpu = line.substr(colon + 2);
    if (line.starts_with("flags")) {
      host.virtual_machine = (line + " ").find(" hypervisor ") != std::string::npos;
      break;
    }
  }
  utsname name{};
  if (::uname(&name) == 0) host.kernel = fmt::format("{} {}", name.sysname, name.release);
  host.cores = ::sysconf(_SC_NPROCESSORS_ONLN);
  host.memory = vm::host_limits().memory;
  return host;
}

nlohmann::json to_json(const vm::AcceleratorReport& report) {
  return {{"name", report.name},
          {"available", report.available},
          {"boots_stock_kernels", report.boots_kernels},
          {"measured_mips", report.mips},
          {"problems", report.problems}};
}

void print(const vm::AcceleratorReport& report) {
  fmt::print("{:<6} {}", report.name, report.available ? "available" : "not available");
  if (report.mips > 0)
    fmt::print(", {:.0f} million instructions a second of kernel code (measured)", report.mips);
  if (report.available)
    fmt::print("{}", report.boots_kernels ? "; boots stock kernels" : "; cannot boot a stock kernel");
  fmt::print("\n");
  for (const auto& problem : report.problems) fmt::print("         - {}\n", problem);
}

}  // namespace

int doctor(const DoctorCommand& command) {
  const Host host = describe_host();
  const vm::HostReport report = vm::examine_host();
  if (command.json) {
    const nlohmann::json json = {{"host",
                                  {{"cpu", host.cpu},
                                   {"cpus", host.cores},
                                   {"memory_bytes", host.memory},
                                   {"kernel", host.kernel},
                                   {"is_virtual_machine", host.virtual_machine}}},
                                 {"accelerators", {to_json(report.kvm), to_json(report.soft)}},
                                 {"auto", {{"choice", vm::name_of(report.choice)}, {"why", report.why}}}};
    fmt::print("{}\n", json.dump(2));
    return 0;
  }
  fmt::print("host   {} x {}, {} MiB, {}{}\n", host.cores, host.cpu, host.memory >> 20, host.kernel,
             host.virtual_machine ? ", itself a virtual machine" : "");
  print(report.kvm);
  print(report.soft);
  fmt::print("auto   {}: {}\n", vm::name_of(report.choice), report.why);
  return 0;
}

}  // namespace lodge::cli
