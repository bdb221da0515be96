// What a machine type decides: the chips around processors and memory, how interrupts are wired, and where
// VirtIO devices go.
#pragma once

#include <functional>
#include <memory>

#include "base/clock.hpp"
#include "device/table.hpp"
#include "kvm/kvm.hpp"
#include "machine/acpi/acpi.hpp"
#include "machine/bus.hpp"
#include "machine/memory.hpp"
#include "vm/config.hpp"

namespace lodge::vm {

// What a chipset is built from. All of it outlives the chipset.
struct ChipsetWiring {
  kvm::Vm& vm;
  machine::GuestMemory& memory;
  machine::Bus& ports;
  machine::Bus& mmio;
  Clock& clock;
  machine::Power& power;
  // A new driver of the interrupt input `gsi`, as DeviceContext's.
  std::function<machine::Interrupt&(unsigned gsi)> line;
};

// Built before any device, destroyed after all. While no vCPU runs, save for press_power_button().
class Chipset {
 public:
  virtual ~Chipset() = default;
  // Exactly one of the two is null.
  virtual device::pci::Root* pci() noexcept { return nullptr; }
  virtual device::virtio::MmioSlots* virtio_mmio() noexcept { return nullptr; }
  // All devices are in: what firmware would do about them. Throws UsageError.
  virtual void devices_are_in() {}
  // What of the chipset the ACPI tables say.
  virtual void describe(machine::acpi::Config& tables) const = 0;
  // Takes layout::reset_value.
  virtual uint16_t reset_port() const noexcept = 0;
  // Any thread. False when it is known that no driver of the guest would see it.
  virtual bool press_power_button() noexcept = 0;
};

// Creates the irqchip too, so: before any vCPU. Throws UsageError and std::system_error.
std::unique_ptr<Chipset> create_chipset(const VmConfig& config, const ChipsetWiring& wiring);
// One for each machine type; create_chipset() chooses.
std::unique_ptr<Chipset> create_pc_chipset(const VmConfig& config, const ChipsetWiring& wiring);
std::unique_ptr<Chipset> create_micro_chipset(const VmConfig& config, const ChipsetWiring& wiring);

}  // namespace lodge::vm
