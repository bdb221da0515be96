// The PC: Q35-like, with PCI, 8259s, 8254, HPET, real-time clock, fixed ACPI hardware and a keyboard
// controller.
#include <exception>
#include <vector>

#include "device/acpi_pm.hpp"
#include "device/debug_ports.hpp"
#include "device/hpet.hpp"
#include "device/i8042.hpp"
#include "device/pci/allocate.hpp"
#include "device/pci/chipset.hpp"
#include "device/pci/root.hpp"
#include "device/reset.hpp"
#include "device/rtc.hpp"
#include "device/shared_line.hpp"
#include "machine/fw_cfg/fw_cfg.hpp"
#include "machine/layout.hpp"
#include "vm/chipset.hpp"
#include "vm/interrupts.hpp"

namespace lodge::vm {
namespace {

namespace layout = machine::layout;

constexpr uint32_t keyboard_irq = 1, mouse_irq = 12;

class PcChipset final : public Chipset {
 public:
  PcChipset(const VmConfig& config, const ChipsetWiring& wiring);
  device::pci::Root* pci() noexcept override { return &pci_; }
  void devices_are_in() override { device::pci::assign_resources(pci_); }
  void describe(machine::acpi::Config& tables) const override { tables.pc = tables.fw_cfg = true; }
  uint16_t reset_port() const noexcept override { return layout::reset_port; }
  bool press_power_button() noexcept override { return pm_.press_power_button(); }

 private:
  void mount(machine::Bus& bus, uint64_t base, uint64_t size, machine::RegisterWindow& window,
             const char* owner) {
    mounted_.emplace_back(bus, base, size, window, owner);
  }
  void mount_chips();
  void replace_pit(bool replaced) noexcept;

  ChipsetWiring wiring_;
  device::AcpiPm pm_;
  device::Port92 port92_;
  device::ResetControl reset_;
  device::Hpet hpet_;
  device::SplitLine rtc_line_;
  device::Rtc rtc_;
  device::I8042 i8042_;
  device::LatchPorts post_, delay_;
  device::pci::HostBridge host_bridge_;
  device::pci::LpcBridge lpc_bridge_;
  device::pci::Root pci_;
  machine::FwCfg fw_cfg_;
  std::vector<machine::Registration> mounted_;
};

PcChipset::PcChipset(const VmConfig& config, const ChipsetWiring& wiring)
    : wiring_(wiring),
      pm_(wiring.clock, wiring.line(layout::sci_irq), wiring.power),
      port92_(wiring.power),
      reset_(wiring.power),
      hpet_(wiring.clock,
            device::HpetWiring{.irq0 = wiring.line(0),
                               .irq8 = wiring.line(layout::rtc_irq),
                               .line = wiring.line,
                               .legacy_replacement = [this](bool replaced) { replace_pit(replaced); }}),
      // Also to the ACPI chip: when the HPET has taken IRQ 8, Linux waits for alarms there.
      rtc_line_(hpet_.rtc_input(), pm_.rtc_input()),
      rtc_(wiring.clock, rtc_line_),
      i8042_(wiring.line(keyboard_irq), wiring.line(mouse_irq), wiring.power),
      pci_(wiring.ports, wiring.mmio, wiring.line, reset_),
      fw_cfg_(wiring.memory) {
  uint64_t low = 0, high = 0;
  for (const auto& range : wiring.memory.ranges())
    (range.gpa < layout::high_ram_base ? low : high) += range.size;
  rtc_.describe_memory(low, high);
  using Key = machine::FwCfgKey;
  fw_cfg_.set_u64(Key::ram_size, config.memory);
  fw_cfg_.set_u16(Key::cpu_count, static_cast<uint16_t>(config.cpus));
  fw_cfg_.set_u16(Key::max_cpus, static_cast<uint16_t>(config.cpus));
  fw_cfg_.set_u16(Key::nographic, 1);
  mount_chips();
  pci_.add(device::pci::HostBridge::slot, 0, host_bridge_);
  pci_.add(device::pci::LpcBridge::slot, 0, lpc_bridge_);
}

void PcChipset::mount_chips() {
  machine::Bus &ports = wiring_.ports, &mmio = wiring_.mmio;
  mount(ports, layout::acpi_pm_base, device::AcpiPm::window_size, pm_, "ACPI power management");
  mount(ports, layout::smi_command_port, 2, pm_.smi_window(), "SMI command port");
  mount(ports, 0x60, 1, i8042_.data_window(), "keyboard controller");
  mount(ports, 0x64, 1, i8042_.command_window(), "keyboard controller");
  mount(ports, 0x92, 1, port92_, "system control port A");
  mount(ports, 0x80, 16, post_, "POST code and DMA page registers");
  mount(ports, 0xed, 1, delay_, "delay port");
  mount(mmio, layout::hpet_base, device::Hpet::window_size, hpet_, "HPET");
  mount(ports, layout::rtc_port, device::Rtc::window_size, rtc_, "real-time clock");
  mount(ports, device::pci::Root::ports_base, device::pci::Root::ports_size, pci_.port_window(),
        "PCI configuration");
  mount(mmio, layout::ecam_base, layout::ecam_size, pci_.ecam_window(), "PCI Express configuration");
  mount(ports, layout::fw_cfg_port, machine::FwCfg::window_size, fw_cfg_, "firmware configuration");
}

// The HPET's legacy replacement takes IRQ 0 from the 8254, which is inside the accelerator (api.rst,
// KVM_SET_PIT2).
void PcChipset::replace_pit(bool replaced) noexcept {
  try {
    kvm_pit_state2 pit = wiring_.vm.pit2();
    pit.flags =
        replaced ? pit.flags | KVM_PIT_FLAGS_HPET_LEGACY : pit.flags & ~uint32_t{KVM_PIT_FLAGS_HPET_LEGACY};
    wiring_.vm.set_pit2(pit);
  } catch (const std::exception&) {
    // An accelerator without the flag: the guest gets both interrupts, as some boards do.
  }
}

}  // namespace

std::unique_ptr<Chipset> create_pc_chipset(const VmConfig& config, const ChipsetWiring& wiring) {
  wiring.vm.create_irqchip();
  kvm_pit_config pit{};
  pit.flags = KVM_PIT_SPEAKER_DUMMY;  // port 0x61 answers
  wiring.vm.create_pit2(pit);
  wiring.vm.set_gsi_routing(pc_routing());
  return std::make_unique<PcChipset>(config, wiring);
}

}  // namespace lodge::vm
