#include "vm/interrupts.hpp"

namespace lodge::vm {
namespace {

constexpr uint32_t pins = 24;

kvm_irq_routing_entry route(uint32_t gsi, uint32_t chip, uint32_t pin) {
  kvm_irq_routing_entry entry{};
  entry.gsi = gsi;
  entry.type = KVM_IRQ_ROUTING_IRQCHIP;
  entry.u.irqchip.irqchip = chip;
  entry.u.irqchip.pin = pin;
  return entry;
}

}  // namespace

std::vector<kvm_irq_routing_entry> pc_routing() {
  constexpr uint32_t isa = 16, cascade = 2;
  std::vector<kvm_irq_routing_entry> entries;
  const auto add = [&](uint32_t gsi, uint32_t chip, uint32_t pin) {
    entries.push_back(route(gsi, chip, pin));
  };
  for (uint32_t gsi = 0; gsi < isa; gsi++) {
    if (gsi == cascade) continue;  // between the two 8259; the IOAPIC's pin is the timer's
    add(gsi, gsi < 8 ? KVM_IRQCHIP_PIC_MASTER : KVM_IRQCHIP_PIC_SLAVE, gsi % 8);
    add(gsi, KVM_IRQCHIP_IOAPIC, gsi == 0 ? 2 : gsi);
  }
  for (uint32_t gsi = isa; gsi < pins; gsi++) add(gsi, KVM_IRQCHIP_IOAPIC, gsi);
  return entries;
}

std::vector<kvm_irq_routing_entry> ioapic_routing() {
  std::vector<kvm_irq_routing_entry> entries;
  for (uint32_t gsi = 0; gsi < pins; gsi++) entries.push_back(route(gsi, KVM_IRQCHIP_IOAPIC, gsi));
  return entries;
}

}  // namespace lodge::vm
