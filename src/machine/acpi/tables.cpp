// The fixed tables: RSDP, RSDT, XSDT, FADT, FACS, MADT, MCFG, HPET, WAET, WDAT.
//
// Fixed hardware as in device/acpi_pm: legacy mode at reset, ACPI mode by the SMI command port; or none of it
// (hardware-reduced, 3.11.1), with the registers of device/reduced_power. Addresses
// come from machine/layout.hpp. Documents: ACPI Specification 6.4, chapter 5; PCI Firmware Specification 3.2
// (MCFG); IA-PC HPET Specification 1.0a, section 3.2.4 (HPET); Windows ACPI Emulated Devices Table (WAET);
// Hardware Watchdog Timers Design Specification 1.01 (WDAT).
#include <array>
#include <cstring>
#include <numeric>

#include "base/error.hpp"
#include "machine/acpi/acpi.hpp"
#include "machine/layout.hpp"

namespace lodge::machine::acpi {

namespace {

using Bytes = std::vector<uint8_t>;

uint8_t checksum(const uint8_t* data, size_t size) {
  return static_cast<uint8_t>(-std::accumulate(data, data + size, 0u));
}

// Appends little-endian fields in the order of the specification's tables.
class Fields {
 public:
  Fields& u8(uint64_t value) { return put(value, 1); }
  Fields& u16(uint64_t value) { return put(value, 2); }
  Fields& u32(uint64_t value) { return put(value, 4); }
  Fields& u64(uint64_t value) { return put(value, 8); }
  Fields& zeros(size_t count) {
    bytes_.resize(bytes_.size() + count);
    return *this;
  }
  // Exactly `size` characters, padded with blanks as OEM fields are.
  Fields& text(std::string_view value, size_t size) {
    for (size_t index = 0; index < size; ++index)
      u8(static_cast<uint8_t>(index < value.size() ? value[index] : ' '));
    return *this;
  }
  // A Generic Address Structure for I/O ports (5.2.3.2). `access`: 1 byte, 2 word, 3 double word.
  Fields& port_address(uint64_t port, unsigned bits, unsigned access) {
    return u8(1).u8(bits).u8(0).u8(access).u64(port);
  }
  Fields& append(const Bytes& more) {
    bytes_.insert(bytes_.end(), more.begin(), more.end());
    return *this;
  }
  Bytes take() { return std::move(bytes_); }

 private:
  Fields& put(uint64_t value, unsigned size) {
    for (unsigned index = 0; index < size; ++index)
      bytes_.push_back(static_cast<uint8_t>(value >> (8 * index)));
    return *this;
  }
  Bytes bytes_;
};

constexpr size_t header_size = 36;

// System description table header (5.2.6) and its checksum, around `body`.
Bytes table(std::string_view signature, uint8_t revision, const Bytes& body) {
  Fields fields;
  fields.text(signature, 4).u32(header_size + body.size()).u8(revision).u8(0);
  fields.text("LODGE", 6).text("LODGE", 4).text(signature, 4).u32(1).text("LDGE", 4).u32(1);
  Bytes bytes = fields.append(body).take();
  bytes[9] = checksum(bytes.data(), bytes.size());
  return bytes;
}

// 5.2.12. Linux takes processors from here and matches them with the DSDT by UID.
Bytes madt(const Config& config) {
  constexpr uint32_t has_8259 = 1;
  constexpr uint16_t level_active_high = 0x000d;
  constexpr uint8_t all_processors = 0xff, nmi_pin = 1;
  Fields fields;
  fields.u32(layout::lapic_base).u32(config.pc ? has_8259 : 0);
  for (unsigned id = 0; id < config.cpus; ++id) fields.u8(0).u8(8).u8(id).u8(id).u32(1);
  fields.u8(1).u8(12).u8(0).u8(0).u32(layout::ioapic_base).u32(0);
  if (config.pc) fields.u8(2).u8(10).u8(0).u8(0).u32(2).u16(0);  // the timer, IRQ 0, is wired to input 2
  fields.u8(2).u8(10).u8(0).u8(layout::sci_irq).u32(layout::sci_irq).u16(level_active_high);
  fields.u8(4).u8(6).u8(all_processors).u16(0).u8(nmi_pin);
  return table("APIC", 5, fields.take());
}

// 5.2.10: the global lock and the waking vector. Has no checksum.
Bytes facs() {
  return Fields().text("FACS", 4).u32(64).zeros(24).u8(2).zeros(31).take();
}

// 5.2.9, revision 6.3.
Bytes fadt(const Config& config, uint64_t facs_gpa, uint64_t dsdt_gpa) {
  constexpr uint16_t legacy_devices = 1, keyboard_controller = 2, no_vga = 4, no_rtc = 0x20;
  constexpr uint32_t wbinvd = 1, c1_supported = 4, no_sleep_button = 0x20, no_rtc_wake = 0x40,
                     timer_32bit = 0x100, reset_register = 0x400;
  constexpr uint16_t no_c2 = 0xfff, no_c3 = 0xfff;
  constexpr uint16_t pm = layout::acpi_pm_base, control = pm + 4, timer = pm + 8,
                     gpe0 = pm + layout::acpi_gpe0_offset;
  const auto boot_flags = static_cast<uint16_t>(
      legacy_devices | no_vga | (config.keyboard ? keyboard_controller : 0) | (config.rtc ? 0 : no_rtc));
  Fields f;
  f.u32(facs_gpa).u32(dsdt_gpa).u8(0).u8(0);  // no preferred power profile
  f.u16(layout::sci_irq)
      .u32(layout::smi_command_port)
      .u8(layout::acpi_enable_value)
      .u8(layout::acpi_disable_value);
  f.u8(0).u8(0);                                                            // no S4BIOS, no P-states
  f.u32(pm).u32(0).u32(control).u32(0).u32(0).u32(timer).u32(gpe0).u32(0);  // PM1b, PM2 and GPE1 do not exist
  f.u8(4).u8(2).u8(0).u8(4).u8(layout::acpi_gpe0_size).u8(0).u8(0).u8(0);
  f.u16(no_c2).u16(no_c3).u16(0).u16(0).u8(0).u8(0);       // no cache flushing by reading, no duty cycle
  f.u8(0).u8(0).u8(config.rtc ? layout::rtc_century : 0);  // the alarm has no day and month
  f.u16(boot_flags).u8(0);
  f.u32(wbinvd | c1_supported | no_sleep_button | (config.rtc ? 0 : no_rtc_wake) | timer_32bit |
        reset_register);
  f.port_address(layout::reset_port, 8, 1).u8(layout::reset_value);
  f.u16(0).u8(3);          // ARM flags; minor revision
  f.u64(0).u64(dsdt_gpa);  // the FACS is below 4 GiB: named once, above
  f.port_address(pm, 32, 2).zeros(12).port_address(control, 16, 2).zeros(12).zeros(12);
  f.port_address(timer, 32, 3).port_address(gpe0, layout::acpi_gpe0_size * 8u, 1).zeros(12);
  f.zeros(12).zeros(12);  // sleep control and status: only for hardware-reduced machines
  f.text("LODGE", 8);     // hypervisor vendor
  return table("FACP", 6, f.take());
}

// 5.2.9 for hardware-reduced machines: whatever names fixed hardware stays zero, and there is no FACS.
Bytes reduced_fadt(uint64_t dsdt_gpa) {
  constexpr uint16_t legacy_devices = 1, no_vga = 4, no_rtc = 0x20;
  constexpr uint32_t wbinvd = 1, c1_supported = 4, button_is_a_device = 0x10, no_sleep_button = 0x20,
                     no_rtc_wake = 0x40, reset_register = 0x400, hardware_reduced = 0x10'0000;
  constexpr uint16_t port = layout::reduced_power_port;
  Fields f;
  f.u32(0).u32(dsdt_gpa).u8(0).u8(0).zeros(109 - 46);
  f.u16(legacy_devices | no_vga | no_rtc).u8(0);  // the serial port is what is left of legacy
  f.u32(wbinvd | c1_supported | button_is_a_device | no_sleep_button | no_rtc_wake | reset_register |
        hardware_reduced);
  f.port_address(port + layout::reduced_power_reset, 8, 1).u8(layout::reset_value);
  f.u16(0).u8(3).u64(0).u64(dsdt_gpa).zeros(8 * 12);
  f.port_address(port, 8, 1).port_address(port + 1, 8, 1);
  f.text("LODGE", 8);
  return table("FACP", 6, f.take());
}

Bytes mcfg() {
  constexpr uint8_t last_bus = layout::ecam_size / layout::MiB - 1;
  return table("MCFG", 1, Fields().zeros(8).u64(layout::ecam_base).u16(0).u8(0).u8(last_bus).zeros(4).take());
}

Bytes hpet() {
  // The low half of the chip's capability register: revision 1, 3 comparators, 64 bits, legacy routing,
  // vendor.
  constexpr uint32_t block_id = 0x8086'a201;
  constexpr uint16_t minimum_tick = 100;  // 1 us at 100 MHz: below it a periodic comparator may miss
  Fields f;
  f.u32(block_id).u8(0).u8(64).u8(0).u8(0).u64(layout::hpet_base);
  return table("HPET", 1, f.u8(0).u16(minimum_tick).u8(0).take());
}

// Tells Windows that the RTC needs no acknowledge dance and that one read of the PM timer is enough.
Bytes waet() {
  return table("WAET", 1, Fields().u32(3).take());
}

// Which register does what. The registers are those of device/watchdog.
Bytes wdat(const Watchdog& watchdog) {
  constexpr uint8_t restart = 1, get_current = 4, get_count = 5, set_count = 6, get_running = 8,
                    set_running = 9, get_stopped = 10, set_stopped = 11, get_reboot = 16, set_reboot = 17,
                    get_status = 32, set_status = 33;
  constexpr uint8_t read_value = 0, read_count = 1, write_value = 2, write_count = 3;
  constexpr uint8_t enabled = 1;
  constexpr uint64_t COUNT = 0, CURRENT = 4, CONTROL = 8, STATUS = 12;
  constexpr uint32_t all = 0xffff'ffff, min_count = 10;
  Fields entries;
  uint32_t number = 0;
  const auto entry = [&](uint8_t action, uint8_t instruction, uint64_t port, uint32_t value, uint32_t mask) {
    entries.u8(action).u8(instruction).u16(0).port_address(watchdog.ports + port, 32, 3).u32(value).u32(mask);
    number++;
  };
  entry(restart, write_value, CURRENT, 1, all);
  entry(get_current, read_count, CURRENT, 0, all);
  entry(get_count, read_count, COUNT, 0, all);
  entry(set_count, write_count, COUNT, 0, all);
  entry(get_running, read_value, CONTROL, 1, 1);
  entry(set_running, write_value, CONTROL, 1, 1);
  entry(get_stopped, read_value, CONTROL, 0, 1);
  entry(set_stopped, write_value, CONTROL, 0, 1);
  // What happens is the host's choice: a guest that asks for a reset is told that it has one.
  entry(get_reboot, read_value, STATUS, 0, 0);
  entry(set_reboot, write_value, STATUS, 0, 0);
  entry(get_status, read_value, STATUS, 1, 1);
  entry(set_status, write_value, STATUS, 1, 1);
  Fields f;
  f.u32(32).u16(0xff).u8(0xff).u8(0xff).u8(0xff).zeros(3);  // no PCI function
  f.u32(watchdog.period_ms).u32(watchdog.max_count).u32(min_count).u8(enabled).zeros(3).u32(number);
  return table("WDAT", 1, f.append(entries.take()).take());
}

// Hands out addresses in the tables' area.
class Area {
 public:
  uint64_t place(size_t size, uint64_t alignment) {
    next_ = (next_ + alignment - 1) & ~(alignment - 1);
    const uint64_t gpa = next_;
    next_ += size;
    if (next_ > layout::acpi_base + layout::acpi_size) usage_error("the ACPI tables outgrew their area");
    return gpa;
  }

 private:
  uint64_t next_ = layout::acpi_base;
};

// 5.2.5.3. The first 20 bytes have their own checksum, for ACPI 1.0.
Bytes rsdp(uint64_t rsdt_gpa, uint64_t xsdt_gpa) {
  constexpr size_t version1_size = 20, size = 36;
  Bytes bytes = Fields()
                    .text("RSD PTR ", 8)
                    .u8(0)
                    .text("LODGE", 6)
                    .u8(2)
                    .u32(rsdt_gpa)
                    .u32(size)
                    .u64(xsdt_gpa)
                    .zeros(4)
                    .take();
  bytes[8] = checksum(bytes.data(), version1_size);
  bytes[32] = checksum(bytes.data(), size);
  return bytes;
}

}  // namespace

std::vector<Table> build(const Config& config) {
  if (config.cpus < 1 || config.cpus > layout::max_cpus) {
    usage_error("--cpus {}: give 1 to {}", config.cpus, layout::max_cpus);
  }
  if (config.serial_ports > 4) usage_error("{} serial ports: at most 4", config.serial_ports);
  constexpr size_t rsdp_size = 36;
  Area area;
  const uint64_t rsdp_gpa = area.place(rsdp_size, 16);  // found by its signature on 16-byte boundaries
  std::vector<Table> tables{{rsdp_gpa, {}}};
  const auto add = [&](Bytes bytes, uint64_t alignment = 16) {
    const uint64_t gpa = area.place(bytes.size(), alignment);
    tables.push_back({gpa, std::move(bytes)});
    return gpa;
  };
  const uint64_t facs_gpa = config.pc ? add(facs(), 64) : 0;
  const uint64_t dsdt_gpa = add(table("DSDT", 2, dsdt_code(config)));
  std::vector<uint64_t> listed{add(config.pc ? fadt(config, facs_gpa, dsdt_gpa) : reduced_fadt(dsdt_gpa)),
                               add(madt(config))};
  if (config.pc) listed.push_back(add(mcfg())), listed.push_back(add(waet()));
  if (config.hpet) listed.push_back(add(hpet()));
  if (config.watchdog.ports != 0) listed.push_back(add(wdat(config.watchdog)));
  Fields narrow, wide;
  for (const uint64_t gpa : listed) {
    narrow.u32(gpa);
    wide.u64(gpa);
  }
  const uint64_t rsdt_gpa = add(table("RSDT", 1, narrow.take()));
  const uint64_t xsdt_gpa = add(table("XSDT", 1, wide.take()));
  tables.front().bytes = rsdp(rsdt_gpa, xsdt_gpa);
  return tables;
}

uint64_t install(const Config& config, GuestMemory& memory) {
  const std::vector<Table> tables = build(config);
  for (const Table& table : tables) {
    if (!memory.write(table.gpa, table.bytes)) usage_error("--memory: a machine with ACPI needs at least 1M");
  }
  return tables.front().gpa;
}

}  // namespace lodge::machine::acpi
