// The hardware of one VM, assembled: memory, buses, chips, irqchip and processors. A reset of the machine is
// a new one.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/clock.hpp"
#include "base/event_loop.hpp"
#include "device/serial.hpp"
#include "device/table.hpp"
#include "device/virtio/device.hpp"
#include "kvm/kvm.hpp"
#include "machine/boot/boot.hpp"
#include "machine/bus.hpp"
#include "machine/memory.hpp"
#include "vm/backends.hpp"
#include "vm/chipset.hpp"
#include "vm/config.hpp"
#include "vm/cpuid.hpp"
#include "vm/interrupts.hpp"
#include "vm/platform.hpp"

namespace lodge::vm {

class Machine {
 public:
  // Everything is created, the kernel loaded, no processor has run. All arguments must outlive the machine.
  // Throws UsageError for what the configuration or the kernel is wrong about, std::system_error for what the
  // host refuses.
  Machine(const VmConfig& config, kvm::System& system, Clock& clock, Backends& backends,
          machine::Power& power);
  ~Machine();
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;

  unsigned cpus() const noexcept { return static_cast<unsigned>(vcpus_.size()); }
  kvm::Vcpu& vcpu(unsigned index) noexcept { return *vcpus_[index]; }
  machine::Bus& ports() noexcept { return ports_; }
  machine::Bus& mmio() noexcept { return mmio_; }
  machine::GuestMemory& memory() noexcept { return memory_; }
  // How the kernel was recognized and entered.
  const std::string& protocol() const noexcept { return protocol_; }
  // The `index`-th of the VirtIO devices of this class, in the order of the configuration; null: there are
  // not so many.
  template <class VirtioDevice>
  VirtioDevice* find_device(size_t index = 0) noexcept {
    for (const auto& [device, mounted] : optional_)
      if (auto* found = dynamic_cast<VirtioDevice*>(mounted->virtio_device()); found && index-- == 0)
        return found;
    return nullptr;
  }
  // False when it is known that the guest has no driver that would see it.
  bool press_power_button() noexcept { return chipset_->press_power_button(); }
  // The processors stand still, or go on.
  void set_paused(bool paused) noexcept {
    for (const auto& [device, mounted] : optional_) mounted->set_paused(paused);
  }
  // In the order of the configuration, by id, or "disk0" for the first one without and so on.
  struct NamedDisk {
    std::string name;
    device::Disk* disk;
  };
  std::vector<NamedDisk> disks();
  // Null: there is none of that name.
  device::Disk* disk(std::string_view name) noexcept;

  // --- Devices that come and go while the guest runs, each in the slot of a root port (--hotplug). One
  // caller at a time. Set-up: called on a vCPU's thread when the guest has let a device go; take_released()
  // is due then.
  void on_release(const std::function<void()>& released);
  struct Slot {
    std::string port;                // its id
    const DeviceConfig* device;      // null: empty
    device::MountedDevice* mounted;  // null: empty
    bool leaving;                    // its guest was asked to let it go
  };
  std::vector<Slot> slots();
  // Puts a device into the slot that its option `bus` names and tells the guest. Throws UsageError.
  void plug(const DeviceConfig& device);
  // Asks the guest to let the device in the slot of `port` go. False: nothing is there.
  bool ask_to_let_go(std::string_view port) noexcept;
  // Takes those out that were asked for and are still there: for when no guest sees it.
  void pull_leaving() noexcept;
  // Takes apart what is in its slot no more, and returns what that was.
  std::vector<DeviceConfig> take_released();

 private:
  void create_interrupt_inputs();
  void create_serial_ports(Clock& clock);
  device::DeviceContext device_context(unsigned cpus, bool running);
  void create_optional_devices(const VmConfig& config);
  void create_vcpus(const VmConfig& config, kvm::System& system);
  void describe(const VmConfig& config);
  void load_kernel(const VmConfig& config);
  machine::boot::BootState load_from_disk(const VmConfig& config, machine::boot::Request request);
  machine::Interrupt& interrupt(uint32_t gsi) { return inputs_[gsi]->add_driver(); }
  void mount(machine::Bus& bus, uint64_t base, uint64_t size, machine::RegisterWindow& window,
             const char* owner);

  // In the order of dependence: what is below uses what is above.
  Backends& backends_;
  Clock& clock_;
  machine::Power& power_;
  std::unique_ptr<kvm::Vm> vm_;
  machine::GuestMemory memory_;
  Platform platform_{*vm_};
  EventLoop loop_{"lodge-io"};  // of queues and back ends
  machine::Bus ports_{"port", 0x10000};
  machine::Bus mmio_{"memory", uint64_t{1} << 52};
  std::vector<std::unique_ptr<InterruptInput>> inputs_;
  std::unique_ptr<Chipset> chipset_;
  std::vector<std::unique_ptr<device::Serial>> serial_;
  std::vector<machine::Registration> mounted_;
  struct Optional {
    DeviceConfig config;
    std::unique_ptr<device::MountedDevice> mounted;
  };
  std::vector<Optional> optional_;
  std::vector<std::unique_ptr<kvm::Vcpu>> vcpus_;
  CpuidEntries cpuid_;  // what all vCPUs have in common
  uint64_t rsdp_ = 0;
  std::string protocol_;
};

}  // namespace lodge::vm
