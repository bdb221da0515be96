// Host bridge of the Intel Q35 (data sheet 316966, section 5.1) and LPC bridge of the ICH9 (data sheet
// 316972, section 13.1).
//
// Modelled: identities, the base of ECAM (PCIEXBAR) and of the ACPI ports (PMBASE, ACPI_CNTL), which drivers
// read to find what the ACPI tables say as well. Both are fixed: a guest has no reason to move them, and
// firmware of ours sets them as they are. PAM, SMRAM, PIRQ routing and LPC decode registers read back as
// written and do nothing: RAM is always open, there is no SMM, and pins go to the IOAPIC (root.cpp).
#include "device/pci/chipset.hpp"

#include "machine/layout.hpp"

namespace lodge::device::pci {

namespace layout = machine::layout;

namespace {

constexpr unsigned PCIEXBAR = 0x60, PAM0 = 0x90, SMRAM = 0x9d;
constexpr uint32_t PCIEXBAR_ENABLE = 1;  // bits 2:1 zero: 256 MiB
constexpr unsigned PMBASE = 0x40, ACPI_CNTL = 0x44, PIRQA_ROUT = 0x60, PIRQE_ROUT = 0x68, LPC_I_O_DEC = 0x80;
constexpr uint32_t PMBASE_IO = 1, ACPI_EN = 0x80, PIRQ_DISABLED = 0x80;

}  // namespace

HostBridge::HostBridge() : Function("host bridge", {0x8086, 0x29c0, 0, 0x060000}) {
  static_assert(layout::ecam_size == 256 * layout::MiB && layout::ecam_base % layout::ecam_size == 0);
  config().set(PCIEXBAR, 4, static_cast<uint32_t>(layout::ecam_base) | PCIEXBAR_ENABLE);
  for (unsigned i = 0; i < 7; i++) config().allow(PAM0 + i, 1, 0x33);
  config().allow(SMRAM, 1, 0x48);
}

LpcBridge::LpcBridge() : Function("LPC bridge", {0x8086, 0x2918, 2, 0x060100}) {
  config().set(PMBASE, 4, layout::acpi_pm_base | PMBASE_IO);
  config().set(ACPI_CNTL, 1, ACPI_EN);  // SCI on IRQ 9
  static_assert(layout::sci_irq == 9);
  for (unsigned i = 0; i < 4; i++) {
    for (unsigned base : {PIRQA_ROUT, PIRQE_ROUT}) {
      config().set(base + i, 1, PIRQ_DISABLED);
      config().allow(base + i, 1, 0x8f);
    }
  }
  config().allow(LPC_I_O_DEC, 4, 0x3f0f'1377);
}

}  // namespace lodge::device::pci
