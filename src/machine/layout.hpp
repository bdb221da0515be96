// The guest-physical and port layout of the machine, q35-like. Every fixed address is here and nowhere else.
#pragma once

#include <cstdint>

namespace lodge::machine::layout {

inline constexpr uint64_t KiB = 1024, MiB = 1024 * KiB, GiB = 1024 * MiB;

// RAM: [0, min(size, low_ram_limit)) and the rest from 4 GiB on. 640 KiB to 1 MiB is RAM too (no VGA yet),
// but E820 reports it reserved.
inline constexpr uint64_t low_ram_limit = 2 * GiB;
inline constexpr uint64_t high_ram_base = 4 * GiB;

inline constexpr uint64_t ecam_base = 0xb000'0000, ecam_size = 256 * MiB;  // PCI Express configuration, MCFG
inline constexpr uint64_t pci_mmio_base = 0xc000'0000, pci_mmio_end = 0xfec0'0000;
inline constexpr uint64_t pci_mmio64_base = 0x80'0000'0000, pci_mmio64_size = 0x80'0000'0000;  // from 512 GiB
// VirtIO devices of machines without PCI: a page each, and IOAPIC inputs that they share from the ninth on.
inline constexpr uint64_t virtio_mmio_base = 0xd000'0000, virtio_mmio_size = 0x1000;
inline constexpr unsigned virtio_mmio_max = 32, virtio_mmio_gsi = 16, virtio_mmio_gsis = 8;
inline constexpr uint64_t ioapic_base = 0xfec0'0000;
inline constexpr uint64_t hpet_base = 0xfed0'0000;
inline constexpr uint64_t lapic_base = 0xfee0'0000;
inline constexpr uint64_t tss_base = 0xfffb'd000;           // KVM_SET_TSS_ADDR: three pages (Intel hosts)
inline constexpr uint64_t identity_map_base = 0xfffb'c000;  // KVM_SET_IDENTITY_MAP_ADDR: one page
inline constexpr uint64_t pci_ports_base = 0xc000, pci_ports_end = 0x1'0000;  // BARs of I/O type

// ACPI and SMBIOS tables: in the reserved area below 1 MiB, where the RSDP is searched for.
inline constexpr uint64_t acpi_base = 0xe0000, acpi_size = 0x10000;
inline constexpr uint64_t smbios_base = 0xf0000, smbios_size = 0x10000;

inline constexpr uint16_t acpi_pm_base = 0x600;  // PM1 events +0, PM1 control +4, PM timer +8, GPE0 +0x20
// 128 ports, as the LPC bridge decodes them: Linux reserves all of them from its registers, and objects to an
// ACPI reservation of a part.
inline constexpr uint16_t acpi_pm_size = 0x80;
inline constexpr uint16_t acpi_gpe0_offset = 0x20;  // from acpi_pm_base
inline constexpr uint8_t acpi_gpe0_size = 16;       // 8 bytes of status, 8 of enable: 64 events
inline constexpr uint8_t acpi_s5_type = 5;          // SLP_TYP of soft off, for \_S5
inline constexpr uint16_t smi_command_port = 0xb2;  // FADT SMI_CMD, with the two values that follow
inline constexpr uint8_t acpi_enable_value = 2, acpi_disable_value = 3;
inline constexpr uint8_t sci_irq = 9;  // level, active high
// Of machines with hardware-reduced ACPI: sleep control, sleep status, reset, events; the reset value is the
// same.
inline constexpr uint16_t reduced_power_port = 0x600;
inline constexpr uint8_t reduced_power_size = 4, reduced_power_reset = 2, reduced_power_events = 3;
inline constexpr uint16_t reset_port = 0xcf9;
inline constexpr uint8_t reset_value = 0x06;  // FADT RESET_VALUE
inline constexpr uint16_t rtc_port = 0x70;
inline constexpr uint8_t rtc_irq = 8, rtc_century = 0x32;  // FADT CENTURY
inline constexpr uint64_t hpet_size = 0x400;
inline constexpr uint32_t hpet_period = 10'000'000;  // femtoseconds
// The IOAPIC input (GSI) of a PCI interrupt pin (0 for INTA to 3 for INTD) on the root bus; level
// triggered; _PRT says the same. The host bridge wires it so.
constexpr unsigned pci_gsi(unsigned slot, unsigned pin) {
  return 16 + ((slot + pin) & 7);
}
inline constexpr uint16_t serial_ports[4] = {0x3f8, 0x2f8, 0x3e8, 0x2e8};
inline constexpr uint8_t serial_irqs[4] = {4, 3, 4, 3};
inline constexpr uint16_t fw_cfg_port = 0x510;
inline constexpr uint16_t debug_console_port = 0xe9;
inline constexpr uint16_t pvpanic_port = 0x505;
inline constexpr unsigned max_cpus = 255;  // 8-bit APIC IDs, 0xff is broadcast

}  // namespace lodge::machine::layout
