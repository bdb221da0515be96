// The DSDT: what cannot be found by probing.
//
// Modelled: processors, the PCI Express root with its windows, interrupt routing and _OSC, the ISA devices,
// the fixed areas that belong to nobody else (PNP0C02), soft off. On a machine with hardware-reduced ACPI,
// instead of PCI: the power button behind a generic event device, and VirtIO windows. Interrupts of PCI
// functions go to IOAPIC inputs directly; there are no PIRQ routers, so a system that runs without IOAPIC
// ("noapic") has no INTx. Document: ACPI Specification 6.4; PCI Firmware Specification 3.2, section 4.5
// (_OSC).
#include <fmt/format.h>

#include "machine/acpi/acpi.hpp"
#include "machine/layout.hpp"

namespace lodge::machine::acpi {

namespace {

using namespace aml;
using Terms = std::vector<Code>;

Code processors(const Config& config) {
  Terms devices;
  for (unsigned id = 0; id < config.cpus; ++id) {
    devices.push_back(
        device(fmt::format("C{:03X}", id), {name("_HID", string("ACPI0007")), name("_UID", integer(id))}));
  }
  return scope("\\_SB", devices);
}

// Which PCI Express features the system may drive itself. All of them: there is no firmware that would.
Code osc() {
  constexpr uint64_t hotplug = 1, pme = 4, aer = 8, capability = 0x10, latency_tolerance = 0x20;
  constexpr uint64_t unrecognized_uuid = 4, unrecognized_revision = 8, masked = 0x10;
  const Code granted = integer(hotplug | pme | aer | capability | latency_tolerance);
  return method(
      "_OSC", 4,
      {dword_field(arg(3), integer(0), "CDW1"),
       if_(equal(arg(0), uuid("33db4d5b-1ff7-401c-9657-7441c03dd766")),
           {dword_field(arg(3), integer(4), "CDW2"), dword_field(arg(3), integer(8), "CDW3"),
            and_(path("CDW3"), granted, local(0)),
            if_(not_(equal(arg(1), integer(1))),
                {or_(path("CDW1"), integer(unrecognized_revision), path("CDW1"))}),
            if_(not_(equal(path("CDW3"), local(0))), {or_(path("CDW1"), integer(masked), path("CDW1"))}),
            store(local(0), path("CDW3"))}),
       else_({or_(path("CDW1"), integer(unrecognized_uuid), path("CDW1"))}), return_(arg(3))});
}

Code interrupt_routing() {
  Terms entries;
  for (unsigned slot = 0; slot < 32; ++slot) {
    for (unsigned pin = 0; pin < 4; ++pin) {
      constexpr uint64_t any_function = 0xffff;
      entries.push_back(package({integer(uint64_t{slot} << 16 | any_function), integer(pin), integer(0),
                                 integer(layout::pci_gsi(slot, pin))}));
    }
  }
  return name("_PRT", package(entries));
}

Code pci_root() {
  const Code windows = resources({
      bus_numbers(0, 255),
      io_ports(0xcf8, 8),  // configuration access, the bridge's own
      io_window(0, 0xcf7),
      io_window(0xd00, 0xffff),
      memory_window32(static_cast<uint32_t>(layout::pci_mmio_base),
                      static_cast<uint32_t>(layout::pci_mmio_end - 1)),
      memory_window64(layout::pci_mmio64_base, layout::pci_mmio64_base + layout::pci_mmio64_size - 1),
  });
  return device("PCI0", {name("_HID", eisa_id("PNP0A08")), name("_CID", eisa_id("PNP0A03")),
                         name("_UID", integer(0)), name("_SEG", integer(0)), name("_BBN", integer(0)),
                         name("_CRS", windows), osc(), interrupt_routing()});
}

Code isa_device(std::string_view object, std::string_view id, unsigned number, const Terms& descriptors) {
  return device(object, {name("_HID", eisa_id(id)), name("_UID", integer(number)),
                         name("_CRS", resources(descriptors))});
}

// Device and register: device/reduced_power. _EVT runs when the event interrupt comes; reading the events
// takes them (5.6.9).
Terms reduced_power() {
  constexpr uint64_t power_button_event = 1, power_button_pressed = 0x80;
  return {device("PWRB", {name("_HID", eisa_id("PNP0C0C")), name("_UID", integer(0))}),
          device("GED0", {name("_HID", string("ACPI0013")), name("_UID", integer(0)),
                          name("_CRS", resources({gsi_level(layout::sci_irq)})),
                          operation_region("PWRR", layout::reduced_power_port, layout::reduced_power_size),
                          byte_field("PWRR", {{"EVST", layout::reduced_power_events}}),
                          method("_EVT", 1,
                                 {store(path("EVST"), local(0)),
                                  and_(local(0), integer(power_button_event), local(1)),
                                  if_(local(1), {notify("PWRB", power_button_pressed)})})})};
}

// LNRO0005 is what Linux and others know for VirtIO over MMIO.
Terms virtio_windows(const Config& config) {
  Terms devices;
  for (unsigned index = 0; const VirtioWindow& window : config.virtio) {
    devices.push_back(
        device(fmt::format("V{:03X}", index),
               {name("_HID", string("LNRO0005")), name("_UID", integer(index)),
                name("_CRS", resources({memory32(static_cast<uint32_t>(window.base),
                                                 static_cast<uint32_t>(layout::virtio_mmio_size)),
                                        gsi_level(window.gsi)}))}));
    index++;
  }
  return devices;
}

Terms isa_devices(const Config& config) {
  Terms devices;
  for (unsigned index = 0; index < config.serial_ports; ++index) {
    devices.push_back(
        isa_device(fmt::format("COM{}", index + 1), "PNP0501", index + 1,
                   {io_ports(layout::serial_ports[index], 8), irq(layout::serial_irqs[index])}));
  }
  if (config.rtc) {
    devices.push_back(
        isa_device("RTC0", "PNP0B00", 0, {io_ports(layout::rtc_port, 2), irq(layout::rtc_irq)}));
  }
  if (config.keyboard) {
    devices.push_back(isa_device("KBD0", "PNP0303", 0, {io_ports(0x60, 1), io_ports(0x64, 1), irq(1)}));
  }
  if (config.mouse) devices.push_back(isa_device("MOU0", "PNP0F13", 0, {irq(12)}));
  if (config.hpet) {
    devices.push_back(isa_device(
        "HPET", "PNP0103", 0,
        {memory32(static_cast<uint32_t>(layout::hpet_base), static_cast<uint32_t>(layout::hpet_size))}));
  }
  if (config.fw_cfg) {
    constexpr uint8_t fw_cfg_ports = 12;  // selector, data, DMA address
    devices.push_back(
        device("FWCF", {name("_HID", string("QEMU0002")),
                        name("_CRS", resources({io_ports(layout::fw_cfg_port, fw_cfg_ports)}))}));
  }
  if (config.pvpanic) {
    devices.push_back(device("PEVT", {name("_HID", string("QEMU0001")),
                                      name("_CRS", resources({io_ports(layout::pvpanic_port, 1)}))}));
  }
  return devices;
}

// The specification wants the ECAM window reserved here besides E820, and Linux complains when it is not. The
// power management ports are not listed: they are claimed through the LPC bridge's ACPI base register.
Code motherboard() {
  return isa_device(
      "MBRD", "PNP0C02", 0,
      {memory32(static_cast<uint32_t>(layout::ecam_base), static_cast<uint32_t>(layout::ecam_size)),
       io_ports(layout::smi_command_port, 2)});
}

}  // namespace

Code dsdt_code(const Config& config) {
  const Code soft_off = integer(layout::acpi_s5_type);
  const Code system = config.pc ? join({pci_root(), motherboard()})
                                : join({join(reduced_power()), join(virtio_windows(config))});
  return join({processors(config), scope("\\_SB", {system, join(isa_devices(config))}),
               name("\\_S5", package({soft_off, soft_off, integer(0), integer(0)}))});
}

}  // namespace lodge::machine::acpi
