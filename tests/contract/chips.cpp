#include "chips.hpp"

namespace lodge::contract {

GUEST_CODE(count_handler, 64,
           "push %rax; incl 0x40000; mov $0xfee000b0, %eax; movl $0, (%rax); pop %rax; iretq");

std::unique_ptr<Guest> started(Contract& test, std::span<const uint8_t> code, Irqchip irqchip) {
  auto guest = test.guest({.irqchip = irqchip});
  guest->load(code);
  guest->load(count_handler, handler);
  guest->enter(Mode::long64);
  return guest;
}

kvm_irq_routing_entry msi_route(uint32_t gsi, uint32_t vector, bool level) {
  kvm_irq_routing_entry route{};
  route.gsi = gsi;
  route.type = KVM_IRQ_ROUTING_MSI;
  route.u.msi.address_lo = 0xfee00000;
  route.u.msi.data = vector | (level ? 0xc000 : 0);
  return route;
}

}  // namespace lodge::contract
