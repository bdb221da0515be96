// What one virtual machine is to be: typed, and checked before anything is created.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "device/spelling.hpp"
#include "kvm/soft/options.hpp"
#include "machine/memory.hpp"
#include "vm/seed.hpp"

namespace lodge::vm {

enum class Accelerator { automatic, kvm, soft };
enum class MachineType { pc, micro };  // vm/chipset.hpp

struct SerialConfig {
  enum class Kind { null, stdio, file, pty };
  Kind kind = Kind::null;
  std::string path;  // of Kind::file
  bool operator==(const SerialConfig&) const = default;
};

// One --device: "name,key=value,...", or one of another option that stands for such a device.
struct DeviceConfig {
  std::string name;
  std::map<std::string, std::string> options;
  device::Spelling spelling{};  // for messages
  bool operator==(const DeviceConfig&) const = default;
};

struct VmConfig {
  std::string name = "lodge";
  std::string kernel;                // path; empty: the one on boot_disk
  std::string boot_disk;             // of a virtio-blk in devices, as its file= names it
  std::optional<Seed> seed;          // for cloud-init, which boot_disk must have; on the disk file=seed_file
  std::vector<std::string> initrds;  // paths: joined to one initramfs; multiboot: modules, "path arguments"
  std::string append;                // the kernel's command line
  unsigned cpus = 1;
  uint64_t memory = 512ull << 20;  // bytes, a multiple of 4096
  MachineType machine = MachineType::pc;
  machine::MemoryOptions memory_options;
  machine::MemoryProgress memory_progress;  // may be empty
  Accelerator accelerator = Accelerator::automatic;
  kvm::soft::Options soft;   // of the soft accelerator
  std::string cpu = "host";  // a name of cpu_models()
  std::vector<SerialConfig> serial = {{SerialConfig::Kind::stdio, {}}};
  std::vector<DeviceConfig> devices;
  bool reboot = true;  // false: a reset ends the VM
};

// What the host can give at most.
struct HostLimits {
  uint64_t memory;  // bytes of RAM
};
HostLimits host_limits();

// The pieces of a command line or of a configuration file. Each throws UsageError with one sentence that
// names `option` and the remedy.
uint64_t parse_size(std::string_view option, std::string_view text);  // "512M", "2G", "1024" (MiB), "640K"
unsigned parse_cpus(std::string_view option, std::string_view text);
Accelerator parse_accelerator(std::string_view option, std::string_view text);
MachineType parse_machine(std::string_view option, std::string_view text);
kvm::soft::Engine parse_engine(std::string_view option, std::string_view text);
size_t parse_code_cache(std::string_view option, std::string_view text);    // 1 MiB to 1 GiB
uint64_t parse_huge_pages(std::string_view option, std::string_view text);  // 2M or 1G
machine::MemoryOptions::Transparent parse_transparent(std::string_view option, std::string_view text);
SerialConfig parse_serial(std::string_view option, std::string_view text);

// Lists of options. A comma in a value, as in a file's name, is written twice.
DeviceConfig parse_device(std::string_view option, std::string_view text);

// FILE[,OPTION[=VALUE]...] as options of virtio-blk; an option without a value is switched on.
DeviceConfig parse_disk(std::string_view option, std::string_view text);

// PATH:TAG[,OPTION[=VALUE]...] as options of virtio-fs.
DeviceConfig parse_share(std::string_view option, std::string_view text);

// KIND[,OPTION=VALUE]... as options of virtio-net. Checked against that device's own table.
DeviceConfig parse_network(std::string_view option, std::string_view text);

// Throws UsageError when two devices have what may be there once: a disk's name (also "disk0", "disk1"... of
// those without id=), a share's tag, a card's mac=.
void check_names(std::span<const DeviceConfig> devices);

// Whether a serial port or a console is on the user's terminal.
bool uses_terminal(const VmConfig& config) noexcept;

std::string_view name_of(Accelerator accelerator) noexcept;

// The names that --cpu takes, "host" first.
std::span<const std::string_view> cpu_models() noexcept;

// Throws UsageError when the parts are impossible in themselves, do not fit together or exceed the host. What
// only the kernel image can tell (its format, the memory it needs) is checked when the VM is built.
void validate(const VmConfig& config, const HostLimits& limits);

}  // namespace lodge::vm
