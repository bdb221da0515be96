// The machine's ACPI tables.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "machine/acpi/aml.hpp"
#include "machine/memory.hpp"

namespace lodge::machine::acpi {

// A watchdog (WDAT): four registers of 32 bits, as device/watchdog has them.
struct Watchdog {
  uint16_t ports = 0;  // the first; 0: there is none
  uint32_t period_ms = 0, max_count = 0;
};

// A VirtIO device in a window on the memory bus (_HID LNRO0005).
struct VirtioWindow {
  uint64_t base;
  unsigned gsi;
};

// What the tables describe; everything else is fixed by machine/layout.hpp.
struct Config {
  // The PC: PCI with ECAM, 8259s, fixed power management hardware. Otherwise hardware-reduced ACPI: sleep,
  // reset and event registers at layout::reduced_power_port, and interrupts by the IOAPIC alone.
  bool pc = true;
  std::vector<VirtioWindow> virtio;
  unsigned cpus = 1;          // APIC IDs 0 to cpus - 1, 1 to layout::max_cpus
  unsigned serial_ports = 4;  // COM1 on, at most 4
  bool keyboard = false;      // an i8042 with PS/2 keyboard (and mouse): without, systems do not look for one
  bool mouse = false;
  bool hpet = true;
  bool rtc = true;
  bool fw_cfg = false;   // announces QEMU0002
  bool pvpanic = false;  // announces QEMU0001
  Watchdog watchdog;
};

// A finished table at the address where it belongs.
struct Table {
  uint64_t gpa;
  std::vector<uint8_t> bytes;
};

// All tables, the RSDP first, inside [layout::acpi_base, + acpi_size) and without overlaps.
// Throws UsageError when the configuration leaves its ranges.
std::vector<Table> build(const Config& config);

// Writes build() into guest memory and returns the guest-physical address of the RSDP. Throws UsageError when
// the guest has less than 1 MiB. Again after a machine reset: the guest may have overwritten the tables.
uint64_t install(const Config& config, GuestMemory& memory);

// The AML of the DSDT, without table header (dsdt.cpp).
aml::Code dsdt_code(const Config& config);

}  // namespace lodge::machine::acpi
