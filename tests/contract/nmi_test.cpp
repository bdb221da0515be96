// What holds interrupts back and what gets through: shadows, NMI, kicks.
#include "chips.hpp"

namespace lodge::contract {
namespace {

CONTRACT_SUITE(Shadows);

GUEST_CODE(sti_shadow, 64,
           APIC "movl $0x40061, 0x300(%rbp); sti; incl %ebx; incl %ebx; incl %ebx; 1: jmp 1b");
CONTRACT_TEST(Shadows, StiHoldsInterruptsBackForOneInstruction) {
  auto guest = started(test, sti_shadow);
  EXPECT_EQ(guest->trap().vector, 0x61u);
  if (guest->vcpu().regs().rbx != 1) test.deviates("an interrupt came later than one instruction after STI");
}

GUEST_CODE(sti_halt, 64, APIC "movl $0x40061, 0x300(%rbp); sti; hlt; out %al, $0xe0");
CONTRACT_TEST(Shadows, APendingInterruptEndsStiHltAfterTheHalt) {
  auto guest = started(test, sti_halt);
  const Trap trap = guest->trap();
  EXPECT_EQ(trap.vector, 0x61u);
  EXPECT_EQ(trap.rip, code_gpa + sti_halt.size() - 2);
}

GUEST_CODE(halted, 64, "2: hlt; jmp 2b");
CONTRACT_TEST(Shadows, AnNmiInterruptsEvenWithInterruptsOff) {
  auto guest = started(test, halted);
  ASSERT_EQ(guest->vcpu().nmi(), 0);
  EXPECT_EQ(guest->trap().vector, 2u);
}

GUEST_CODE(nmi_ipi, 64, APIC "movl $0x40400, 0x300(%rbp);" SOON "out %al, $0xe0");
CONTRACT_TEST(Shadows, AnNmiCanBeSentToOneself) {
  auto guest = started(test, nmi_ipi);
  EXPECT_EQ(guest->trap().vector, 2u);
}

GUEST_CODE(nmi_handler, 64,
           "incl 0x40000; cmpl $2, 0x40000; je 1f; out %al, $0x90; nop; nop; out %al, $0x91; iretq; 1: out "
           "%al, $0x92");
CONTRACT_TEST(Shadows, ASecondNmiWaitsForIret) {
  auto guest = started(test, halted);
  guest->load(nmi_handler, handler);
  guest->set_gate(2, code64, handler);
  guest->vcpu().nmi();
  EXPECT_TRUE(Guest::is_out(guest->run(), 0x90));
  guest->vcpu().nmi();
  EXPECT_TRUE(Guest::is_out(guest->run(), 0x91)) << "the first handler goes on";
  EXPECT_TRUE(Guest::is_out(guest->run(), 0x92)) << "the second comes after IRET";
}

CONTRACT_TEST(Shadows, AKickReachesAHaltedVcpu) {
  auto guest = started(test, halted);
  int status = 0;
  std::thread thread([&] { status = guest->vcpu().run().status(); });
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  guest->vcpu().kick();
  thread.join();
  EXPECT_EQ(status, -EINTR);
}

}  // namespace
}  // namespace lodge::contract
