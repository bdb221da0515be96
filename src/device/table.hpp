// The devices that a user may add with --device NAME,OPTION=VALUE,... Each is described once, in a row of the
// table: the command line, its help and completions, and the configuration file derive from it.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "base/clock.hpp"
#include "base/event_loop.hpp"
#include "base/state.hpp"
#include "block/image.hpp"
#include "device/character.hpp"
#include "device/disk.hpp"
#include "device/spelling.hpp"
#include "machine/bus.hpp"
#include "machine/io.hpp"
#include "machine/memory.hpp"
#include "net/config.hpp"

namespace lodge::device {

namespace pci {
class Root;
}
namespace virtio {
class Device;
class MmioSlots;
}  // namespace virtio

// What a factory may use of the machine. All of it outlives every device.
struct DeviceContext {
  machine::Bus& ports;
  machine::Bus& memory;
  machine::GuestMemory& ram;
  Clock& clock;
  machine::Power& power;
  // A new source on the interrupt input `gsi` (0 to 23); alive as long as the machine.
  std::function<machine::Interrupt&(unsigned gsi)> line;
  // Opens what --serial calls a back end ("stdio", "file:PATH", "null", ...), for a device that prints or,
  // `input`, also reads. Throws UsageError naming `option`, which stands before "=".
  std::function<std::shared_ptr<CharBackend>(const std::string& specification, const std::string& option,
                                             bool input)>
      open_backend;
  // Opens a disk image, or gives the one that the same disk had before a machine reset. Throws UsageError,
  // also when another device of this machine has it.
  std::function<std::shared_ptr<block::Image>(const std::string& path, const block::OpenOptions& options)>
      open_disk;
  // A network as described, or what the same card had before a machine reset. Throws UsageError.
  std::function<std::shared_ptr<net::Backend>(const net::Config& config)> open_network;
  // Where VirtIO devices go. One of the two is null: a machine has PCI, or windows on the memory bus.
  pci::Root* pci;
  virtio::MmioSlots* virtio_mmio;
  machine::MsiTarget& msi;
  machine::Doorbells& doorbells;
  EventLoop& loop;       // for queues and back ends that need little time at once
  unsigned cpus = 1;     // the machine's processors
  bool running = false;  // the guest is told of what is plugged in; only behind a port
};

// A device that is part of the machine; destroying it takes it out.
class MountedDevice {
 public:
  virtual ~MountedDevice() = default;
  virtual Savable* savable() noexcept { return nullptr; }  // null: it has no state
  virtual Disk* disk() noexcept { return nullptr; }        // null: it is none
  // The machine's processors stand still, or go on: for what counts the guest's time. Any thread.
  virtual void set_paused(bool /*paused*/) noexcept {}
  // The VirtIO device behind the transport; null: it is none.
  virtual virtio::Device* virtio_device() noexcept { return nullptr; }
};

struct OptionSchema {
  std::string_view name;
  std::string_view alias;     // another accepted spelling, or empty
  std::string_view fallback;  // the value when not given; empty: none
  std::string_view help;
};

// The options of one device: complete, known and with their defaults filled in.
class DeviceOptions {
 public:
  DeviceOptions(Spelling spelling, std::span<const OptionSchema> schemas,
                std::map<std::string, std::string> values)
      : spelling_(std::move(spelling)), schemas_(schemas), values_(std::move(values)) {}

  const std::string& text(std::string_view name) const;
  // The device as the user asked for it ("--disk a.img"), one of its options ("--disk a.img,serial") and that
  // with its value ("--disk a.img,serial=X"), for messages.
  const std::string& spelled() const noexcept { return spelling_.option; }
  std::string spelled_name(std::string_view name) const;
  std::string spelled(std::string_view name) const;
  // Decimal or 0x hexadecimal. Throws UsageError naming the option as it was spelled, value and range.
  uint64_t number(std::string_view name, uint64_t minimum, uint64_t maximum) const;
  // Decimal with an optional K, M, G or T (powers of 1024). Throws UsageError.
  uint64_t amount(std::string_view name) const;
  // "on" or "off". Throws UsageError.
  bool flag(std::string_view name) const;

 private:
  Spelling spelling_;                      // complete
  std::span<const OptionSchema> schemas_;  // of the device's row, which is for ever
  std::map<std::string, std::string> values_;
};

struct DeviceDescriptor {
  std::string_view name;
  std::string_view help;  // one line
  std::span<const OptionSchema> options;
  std::unique_ptr<MountedDevice> (*create)(const DeviceContext& context, const DeviceOptions& options);
  bool first = false;  // created before the others, which may name it in their options
};

// All rows, by name.
std::span<const DeviceDescriptor> device_table() noexcept;

// Whether the device `name` is to be created before those that are not.
bool created_first(std::string_view name) noexcept;

// Checks one device against its row and fills in the defaults. Throws UsageError naming the unknown device
// or option and listing the valid ones. Needs no machine: a command line is checked before anything is
// created.
std::pair<const DeviceDescriptor*, DeviceOptions> check_device(
    const std::string& name, const std::map<std::string, std::string>& options, Spelling spelling = {});

// Creates the device and puts it into the machine. Throws UsageError (also when its addresses are taken).
std::unique_ptr<MountedDevice> create_device(const DeviceContext& context, const std::string& name,
                                             const std::map<std::string, std::string>& options,
                                             Spelling spelling = {});

}  // namespace lodge::device
