// Interrupts without an in-accelerator irqchip: the VMM injects them.
#include "harness.hpp"

namespace lodge::contract {
namespace {

CONTRACT_SUITE(Injection);

std::unique_ptr<Guest> started(Contract& test, std::span<const uint8_t> code) {
  auto guest = test.guest();
  guest->load(code);
  guest->enter(Mode::long64);
  return guest;
}

GUEST_CODE(open_halt, 64, "sti; hlt; out %al, $0xe0");
CONTRACT_TEST(Injection, AHaltedGuestIsWokenByAnInjectedInterrupt) {
  auto guest = started(test, open_halt);
  const auto exit = guest->run();
  ASSERT_EQ(exit.reason(), KVM_EXIT_HLT);
  EXPECT_TRUE(guest->vcpu().shared().if_flag);
  EXPECT_TRUE(guest->vcpu().shared().ready_for_interrupt_injection);
  ASSERT_EQ(guest->vcpu().interrupt(0x60), 0);
  const Trap trap = guest->trap();
  EXPECT_EQ(trap.vector, 0x60u);
  EXPECT_EQ(trap.rip, code_gpa + 2);
}

GUEST_CODE(open_later, 64,
           "out %al, $0x90; nop; sti; nop; nop; mov $4000, %ecx; 1: dec %ecx; jnz 1b; out %al, $0xe0");
CONTRACT_TEST(Injection, TheInterruptWindowOpensAfterSti) {
  auto guest = started(test, open_later);
  ASSERT_TRUE(Guest::is_out(guest->run(), 0x90));
  EXPECT_FALSE(guest->vcpu().shared().if_flag);
  EXPECT_FALSE(guest->vcpu().shared().ready_for_interrupt_injection);
  guest->vcpu().shared().request_interrupt_window = 1;
  const auto exit = guest->run();
  ASSERT_EQ(exit.reason(), KVM_EXIT_IRQ_WINDOW_OPEN) << guest->describe(exit);
  if (guest->vcpu().regs().rip != code_gpa + 5)
    test.deviates("the window opened elsewhere than after the instruction that STI shadows");
  guest->vcpu().shared().request_interrupt_window = 0;
  EXPECT_TRUE(guest->vcpu().shared().ready_for_interrupt_injection);
  ASSERT_EQ(guest->vcpu().interrupt(0x61), 0);
  EXPECT_EQ(guest->trap().vector, 0x61u);
}

CONTRACT_TEST(Injection, TheWindowOpensForA8259OfTheVmmsAsWell) {
  auto guest = test.guest({.irqchip = Irqchip::split});
  guest->load(open_later);
  guest->enter(Mode::long64);
  ASSERT_TRUE(Guest::is_out(guest->run(), 0x90));
  EXPECT_FALSE(guest->vcpu().shared().ready_for_interrupt_injection);
  guest->vcpu().shared().request_interrupt_window = 1;
  const auto exit = guest->run();
  if (exit.reason() != KVM_EXIT_IRQ_WINDOW_OPEN) test.deviates("no exit: " + guest->describe(exit));
  guest->vcpu().shared().request_interrupt_window = 0;
  EXPECT_TRUE(guest->vcpu().shared().ready_for_interrupt_injection);
  ASSERT_EQ(guest->vcpu().interrupt(0x61), 0);
  EXPECT_EQ(guest->trap().vector, 0x61u);
}

// LINT0 leads the 8259's interrupts to the LAPIC: while it is masked there is no window.
GUEST_CODE(masked_lint0, 64,
           "mov $0xfee00000, %ebp; movl $0x1ff, 0xf0(%rbp); movl $0x10700, 0x350(%rbp); sti; nop; nop; out "
           "%al, $0x90;"
           "movl $0x700, 0x350(%rbp); mov $200000, %ecx; 1: dec %ecx; jnz 1b; out %al, $0xe0");
CONTRACT_TEST(Injection, ThereIsNoWindowWhileLint0IsMasked) {
  auto guest = test.guest({.irqchip = Irqchip::split});
  guest->load(masked_lint0);
  guest->enter(Mode::long64);
  guest->vcpu().shared().request_interrupt_window = 1;
  auto exit = guest->run();
  ASSERT_TRUE(Guest::is_out(exit, 0x90)) << guest->describe(exit);
  EXPECT_FALSE(guest->vcpu().shared().ready_for_interrupt_injection);
  exit = guest->run();
  if (exit.reason() != KVM_EXIT_IRQ_WINDOW_OPEN) test.deviates("no exit: " + guest->describe(exit));
}

// A halted vCPU with an open window does not sleep on it.
GUEST_CODE(open_and_halt, 64, "cli; out %al, $0x90; sti; hlt; out %al, $0xe0");
CONTRACT_TEST(Injection, AHaltedVcpuOpensTheWindow) {
  auto guest = test.guest({.irqchip = Irqchip::split});
  guest->load(open_and_halt);
  guest->enter(Mode::long64);
  ASSERT_TRUE(Guest::is_out(guest->run(), 0x90));
  guest->vcpu().shared().request_interrupt_window = 1;
  const auto exit = guest->run();
  if (exit.reason() != KVM_EXIT_IRQ_WINDOW_OPEN) test.deviates("no exit: " + guest->describe(exit));
  guest->vcpu().shared().request_interrupt_window = 0;
  ASSERT_EQ(guest->vcpu().interrupt(0x62), 0);
  const Trap trap = guest->trap();
  EXPECT_EQ(trap.vector, 0x62u);
  EXPECT_EQ(trap.rip, code_gpa + 5u);
}

CONTRACT_TEST(Injection, ASecondInterruptBeforeDeliveryIsRefused) {
  // KVM keeps one for the VMM's 8259 where it has the LAPIC itself; without either a second replaces the
  // first.
  auto guest = test.guest({.irqchip = Irqchip::split});
  ASSERT_EQ(guest->vcpu().interrupt(0x60), 0);
  EXPECT_EQ(guest->vcpu().interrupt(0x61), -EEXIST);
}

CONTRACT_TEST(Injection, InjectionIsRefusedWithAnIrqchip) {
  auto guest = test.guest({.irqchip = Irqchip::full});
  EXPECT_EQ(guest->vcpu().interrupt(0x60), -ENXIO);
}

GUEST_CODE(priority, 64,
           "mov $9, %eax; mov %rax, %cr8; out %al, $0x90; mov $3, %eax; mov %rax, %cr8; mov %cr8, %rbx; out "
           "%al, $0xe0");
CONTRACT_TEST(Injection, LoweringTheTaskPriorityExits) {
  auto guest = started(test, priority);
  const auto first = guest->run();
  ASSERT_TRUE(Guest::is_out(first, 0x90)) << guest->describe(first);
  EXPECT_EQ(guest->vcpu().shared().cr8, 9u);
  const auto exit = guest->run();
  if (exit.reason() != KVM_EXIT_SET_TPR)
    test.deviates("no exit when CR8 was lowered: " + guest->describe(exit));
  EXPECT_EQ(guest->vcpu().shared().cr8, 3u);
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rbx, 3u);
}

GUEST_CODE(nmi_spin, 64, "1: jmp 1b");
CONTRACT_TEST(Injection, AnNmiIsDelivered) {
  auto guest = started(test, nmi_spin);
  ASSERT_EQ(guest->vcpu().nmi(), 0);
  EXPECT_EQ(guest->trap().vector, 2u);
}

GUEST_CODE(events_pending, 64, "nop; out %al, $0xe0");
CONTRACT_TEST(Injection, AnExceptionGivenByTheVmmIsDelivered) {
  auto guest = started(test, events_pending);
  auto events = guest->vcpu().vcpu_events();
  events.exception.injected = 1;
  events.exception.nr = 13;
  events.exception.has_error_code = 1;
  events.exception.error_code = 0x28;
  events.flags = 0;
  guest->vcpu().set_vcpu_events(events);
  const Trap trap = guest->trap();
  EXPECT_EQ(trap.vector, 13u);
  EXPECT_EQ(trap.error, 0x28u);
  EXPECT_EQ(trap.rip, code_gpa);
}

GUEST_CODE(open_window, 64, "sti; nop; nop; out %al, $0xe0");
CONTRACT_TEST(Injection, StateThatIsLoadedReplacesAnInterruptThatWaits) {
  auto guest = started(test, open_window);
  const auto without = guest->vcpu().vcpu_events();
  EXPECT_EQ(guest->vcpu().interrupt(0x41), 0);
  EXPECT_EQ(guest->vcpu().vcpu_events().interrupt.injected, 1);
  guest->vcpu().set_vcpu_events(without);
  EXPECT_EQ(guest->vcpu().vcpu_events().interrupt.injected, 0);
  guest->finish();
}

}  // namespace
}  // namespace lodge::contract
