// The IOAPIC in the accelerator; and the split irqchip, where it is the VMM's.
#include <chrono>
#include <cstring>

#include "chips.hpp"

namespace lodge::contract {
namespace {

CONTRACT_SUITE(Ioapic);

// --- In the accelerator

GUEST_CODE(ioapic_edge, 64,
           PICS_OFF APIC IOAPIC_WRITE(0x25, 0) IOAPIC_WRITE(0x24, 0x40) "out %al, $0xe0;" WAIT);
CONTRACT_TEST(Ioapic, AnIoapicPinInterrupts) {
  auto guest = started(test, ioapic_edge);
  guest->finish();
  EXPECT_GT(guest->vm().irq_line(10, true), 0);
  EXPECT_EQ(guest->trap().vector, 0x40u);
}

GUEST_CODE(ioapic_masked, 64,
           PICS_OFF APIC IOAPIC_WRITE(0x25, 0)
               IOAPIC_WRITE(0x24, 0x10040) "out %al, $0xe0; sti; nop; nop; out %al, $0xe0");
CONTRACT_TEST(Ioapic, AMaskedIoapicPinDoesNotInterrupt) {
  auto guest = started(test, ioapic_masked);
  guest->finish();
  guest->vm().irq_line(10, true);
  guest->finish();
}

GUEST_CODE(ioapic_level, 64,
           PICS_OFF APIC IOAPIC_WRITE(0x25, 0) IOAPIC_WRITE(0x24, 0x8040) "out %al, $0xe0;" WAIT);
// Ends each interrupt and tells of the third before it returns: with the line high, nothing else need ever
// run.
GUEST_CODE(
    level_handler, 64,
    "incl 0x40000; movl $0, 0xb0(%rbp); cmpl $3, 0x40000; jne 1f; out %al, $0x90; 1: cmpl $5, 0x40000; jb 2f;"
    "out %al, $0x91; 2: iretq");
CONTRACT_TEST(Ioapic, ALevelInterruptRepeatsUntilTheLineFalls) {
  auto guest = started(test, ioapic_level);
  guest->load(level_handler, handler);
  guest->set_gate(0x40, code64, handler);
  guest->finish();
  guest->vm().irq_line(10, true);
  auto exit = guest->run();
  ASSERT_TRUE(Guest::is_out(exit, 0x90)) << guest->describe(exit);
  guest->vm().irq_line(10, false);
  // One more may have been accepted before the line fell, a fifth not: the guest halts until it is kicked.
  std::thread kicker([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    guest->vcpu().kick();
  });
  const auto last = guest->vcpu().run();
  kicker.join();
  EXPECT_EQ(last.status(), -EINTR) << guest->describe(last);
  EXPECT_LE(guest->at<uint32_t>(counter), 4u);
}

GUEST_CODE(ioapic_registers, 64,
           "mov $0xfec00000, %edi; movl $1, (%rdi); mov 0x10(%rdi), %eax; mov %eax, %ebx;" IOAPIC_WRITE(
               0x13,
               0x5000000) "mov 0x10(%rdi), %ecx; movl $0x12, (%rdi); mov 0x10(%rdi), %edx; out %al, $0xe0");
CONTRACT_TEST(Ioapic, TheIoapicHas24MaskedPins) {
  auto guest = started(test, ioapic_registers);
  guest->finish();
  const auto regs = guest->vcpu().regs();
  EXPECT_EQ(regs.rbx >> 16 & 0xff, 23u);
  EXPECT_EQ(regs.rcx, 0x5000000u);
  EXPECT_NE(regs.rdx & 0x10000, 0u);
}

CONTRACT_TEST(Ioapic, IoapicStateRoundTrips) {
  auto guest = started(test, ioapic_edge);
  guest->finish();
  kvm_irqchip chip = guest->vm().irqchip(KVM_IRQCHIP_IOAPIC);
  EXPECT_EQ(chip.chip.ioapic.redirtbl[10].bits & 0xff, 0x40u);
  chip.chip.ioapic.redirtbl[11].bits = 0x10055;
  guest->vm().set_irqchip(chip);
  EXPECT_EQ(guest->vm().irqchip(KVM_IRQCHIP_IOAPIC).chip.ioapic.redirtbl[11].bits & 0x100ff, 0x10055u);
}

// --- Split irqchip

GUEST_CODE(split_wait, 64, APIC "out %al, $0xe0; sti; 1: cmpl $1, 0x40000; jb 1b;" SOON "out %al, $0xe0");
CONTRACT_TEST(Ioapic, WithASplitIrqchipTheEoiOfALevelInterruptExits) {
  auto guest = started(test, split_wait, Irqchip::split);
  guest->set_gate(0x45, code64, handler);
  const auto route = msi_route(10, 0x45, true);
  guest->vm().set_gsi_routing({&route, 1});
  guest->finish();
  EXPECT_GT(guest->vm().irq_line(10, true), 0);
  const auto exit = guest->run();
  ASSERT_EQ(exit.reason(), KVM_EXIT_IOAPIC_EOI) << guest->describe(exit);
  EXPECT_EQ(exit.raw().eoi.vector, 0x45);
  guest->finish();
}

// What follows an EOI in a straight line is asked for after the EOI's exit, each once.
GUEST_CODE(split_port_handler, 64,
           "incl 0x40000; movl $0, 0xb0(%rbp); in $0x90, %al; mov %al, %bl; out %al, $0x91; iretq");
CONTRACT_TEST(Ioapic, WithASplitIrqchipPortAccessesBehindAnEoiAreNotLost) {
  auto guest = started(test, split_wait, Irqchip::split);
  guest->load(split_port_handler, handler);
  guest->set_gate(0x45, code64, handler);
  const auto route = msi_route(10, 0x45, true);
  guest->vm().set_gsi_routing({&route, 1});
  guest->finish();
  EXPECT_GT(guest->vm().irq_line(10, true), 0);
  auto exit = guest->run();
  if (exit.reason() != KVM_EXIT_IOAPIC_EOI) test.deviates("an access overtakes the EOI exit before it");
  exit = guest->run();
  ASSERT_EQ(exit.reason(), KVM_EXIT_IO) << guest->describe(exit);
  ASSERT_FALSE(exit.io().out);
  ASSERT_EQ(exit.io().port, 0x90);
  exit.io().data[0] = 0x5a;
  exit = guest->run();
  ASSERT_TRUE(Guest::is_out(exit, 0x91)) << guest->describe(exit);
  EXPECT_EQ(exit.io().data[0], 0x5a);
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rbx & 0xff, 0x5au);
  EXPECT_EQ(guest->at<uint32_t>(counter), 1u);
}

GUEST_CODE(
    split_mmio_handler, 64,
    "mov $0xd0000000, %edi; incl 0x40000; movl $0, 0xb0(%rbp); mov (%rdi), %ebx; movl $7, 8(%rdi); iretq");
CONTRACT_TEST(Ioapic, WithASplitIrqchipMemoryAccessesBehindAnEoiAreNotLost) {
  auto guest = started(test, split_wait, Irqchip::split);
  guest->load(split_mmio_handler, handler);
  guest->set_gate(0x45, code64, handler);
  const auto route = msi_route(10, 0x45, true);
  guest->vm().set_gsi_routing({&route, 1});
  guest->finish();
  EXPECT_GT(guest->vm().irq_line(10, true), 0);
  auto exit = guest->run();
  if (exit.reason() != KVM_EXIT_IOAPIC_EOI) test.deviates("an access overtakes the EOI exit before it");
  exit = guest->run();
  ASSERT_EQ(exit.reason(), KVM_EXIT_MMIO) << guest->describe(exit);
  ASSERT_FALSE(exit.mmio().write);
  ASSERT_EQ(exit.mmio().gpa, 0xd0000000u);
  const uint32_t answer = 0x12345678;
  std::memcpy(exit.mmio().data.data(), &answer, 4);
  exit = guest->run();
  ASSERT_EQ(exit.reason(), KVM_EXIT_MMIO) << guest->describe(exit);
  ASSERT_TRUE(exit.mmio().write);
  EXPECT_EQ(exit.mmio().gpa, 0xd0000008u);
  EXPECT_EQ(exit.mmio().data[0], 7);
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rbx, answer);
  EXPECT_EQ(guest->at<uint32_t>(counter), 1u);
}

CONTRACT_TEST(Ioapic, WithASplitIrqchipAnEdgeInterruptDoesNotExit) {
  auto guest = started(test, split_wait, Irqchip::split);
  guest->set_gate(0x45, code64, handler);
  guest->finish();
  kvm_msi msi{};
  msi.address_lo = 0xfee00000;
  msi.data = 0x45;
  EXPECT_GT(guest->vm().signal_msi(msi), 0);
  guest->finish();
}

GUEST_CODE(split_ports, 64, "in $0x21, %al; mov $0xfec00000, %ebx; mov 0x10(%rbx), %eax; out %al, $0xe0");
CONTRACT_TEST(Ioapic, WithASplitIrqchipPicAndIoapicAreTheVmms) {
  auto guest = started(test, split_ports, Irqchip::split);
  auto exit = guest->run();
  ASSERT_EQ(exit.reason(), KVM_EXIT_IO) << guest->describe(exit);
  EXPECT_EQ(exit.io().port, 0x21);
  exit = guest->run();
  ASSERT_EQ(exit.reason(), KVM_EXIT_MMIO) << guest->describe(exit);
  EXPECT_EQ(exit.mmio().gpa, 0xfec00010u);
}

}  // namespace
}  // namespace lodge::contract
