// The micro machine: LAPICs, an IOAPIC, serial ports and hardware-reduced ACPI; VirtIO devices in windows on
// the memory bus.
//
// Left out of the PC, and what a guest uses instead: PCI (VirtIO over MMIO, found by ACPI), the 8259s (routed
// to nobody and not announced, though an accelerator has them), the 8254 and HPET (kvmclock and the LAPIC's
// TSC-deadline timer), the real-time clock (kvmclock's wall clock), the keyboard controller, fw_cfg, and the
// ACPI fixed hardware (device/reduced_power).
#include "device/reduced_power.hpp"
#include "device/virtio/mmio_slots.hpp"
#include "machine/layout.hpp"
#include "vm/chipset.hpp"
#include "vm/interrupts.hpp"

namespace lodge::vm {
namespace {

namespace layout = machine::layout;

class MicroChipset final : public Chipset {
 public:
  explicit MicroChipset(const ChipsetWiring& wiring)
      : slots_(wiring.line),
        power_(wiring.line(layout::sci_irq), wiring.power),
        power_ports_(wiring.ports, layout::reduced_power_port, device::ReducedPower::window_size, power_,
                     "ACPI sleep and reset") {}
  device::virtio::MmioSlots* virtio_mmio() noexcept override { return &slots_; }
  void describe(machine::acpi::Config& tables) const override {
    tables.pc = tables.hpet = tables.rtc = false;
    for (const auto& place : slots_.taken()) tables.virtio.push_back({place.base, place.gsi});
  }
  uint16_t reset_port() const noexcept override {
    return layout::reduced_power_port + layout::reduced_power_reset;
  }
  bool press_power_button() noexcept override {
    power_.press_power_button();
    return true;
  }

 private:
  device::virtio::MmioSlots slots_;
  device::ReducedPower power_;
  machine::Registration power_ports_;
};

}  // namespace

std::unique_ptr<Chipset> create_micro_chipset(const VmConfig&, const ChipsetWiring& wiring) {
  wiring.vm.create_irqchip();
  wiring.vm.set_gsi_routing(ioapic_routing());
  return std::make_unique<MicroChipset>(wiring);
}

std::unique_ptr<Chipset> create_chipset(const VmConfig& config, const ChipsetWiring& wiring) {
  return config.machine == MachineType::micro ? create_micro_chipset(config, wiring)
                                              : create_pc_chipset(config, wiring);
}

}  // namespace lodge::vm
