// The LAPIC and its timer.
#include <chrono>
#include <cstring>

#include "chips.hpp"

namespace lodge::contract {
namespace {

CONTRACT_SUITE(Lapic);

GUEST_CODE(self_ipi, 64, APIC "sti; movl $0x40061, 0x300(%rbp);" SOON "out %al, $0xe0");
CONTRACT_TEST(Lapic, ASelfIpiInterrupts) {
  auto guest = started(test, self_ipi);
  EXPECT_EQ(guest->trap().vector, 0x61u);
}

GUEST_CODE(apic_identity, 64,
           APIC "mov 0x20(%rbp), %ebx; mov 0x30(%rbp), %ecx; mov 0xf0(%rbp), %edx; out %al, $0xe0");
CONTRACT_TEST(Lapic, TheLapicTellsItsIdAndVersion) {
  auto guest = started(test, apic_identity);
  guest->finish();
  const auto regs = guest->vcpu().regs();
  EXPECT_EQ(regs.rbx >> 24, 0u);
  EXPECT_GE(regs.rcx & 0xff, 0x10u);
  EXPECT_GE(regs.rcx >> 16 & 0xff, 5u) << "LVT entries less one";
  EXPECT_EQ(regs.rdx & 0x1ff, 0x1ffu);
}

// The interrupt comes while IF is 0, is looked at (the loop goes back often enough), and has to wait; POPF
// then opens the window, and nothing else happens.
GUEST_CODE(
    late_window, 64,
    APIC "movl $0x40061, 0x300(%rbp); mov $200000, %ecx; 1: dec %ecx; jnz 1b; push $0x202; popf; 2: jmp 2b");
CONTRACT_TEST(Lapic, AnInterruptThatWaitedIsTakenWhenPopfOpensTheWindow) {
  auto guest = started(test, late_window);
  EXPECT_EQ(guest->trap().vector, 0x61u);
}
GUEST_CODE(late_sti, 64,
           APIC
           "movl $0x40061, 0x300(%rbp); mov $200000, %ecx; 1: dec %ecx; jnz 1b; sti; nop; nop; 2: jmp 2b");
CONTRACT_TEST(Lapic, AnInterruptThatWaitedIsTakenBehindSti) {
  auto guest = started(test, late_sti);
  EXPECT_EQ(guest->trap().vector, 0x61u);
}

GUEST_CODE(task_priority, 64,
           APIC "mov $6, %eax; mov %rax, %cr8; sti; movl $0x40055, 0x300(%rbp);" SOON
                "mov 0x80(%rbp), %ebx;"
                "mov 0x220(%rbp), %ecx; out %al, $0xe0; xor %eax, %eax; mov %rax, %cr8;" SOON
                "out %al, $0xe0");
CONTRACT_TEST(Lapic, TheTaskPriorityHoldsBackLowerVectors) {
  auto guest = started(test, task_priority);
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rbx, 0x60u) << "CR8 is the upper half of the TPR";
  EXPECT_EQ(guest->vcpu().regs().rcx, 1u << 21) << "waiting in the IRR";
  EXPECT_EQ(guest->trap().vector, 0x55u);
}

// The first interrupt's handler sends itself two more, one of its own priority class and one of a higher
// class.
GUEST_CODE(nested, 64, APIC "sti; movl $0x40051, 0x300(%rbp);" SOON "out %al, $0xe0");
GUEST_CODE(open_handler, 64,
           "mov 0x120(%rbp), %ebx; mov 0xa0(%rbp), %ecx; sti; movl $0x40052, 0x300(%rbp);" SOON
           "movl $0x40065, 0x300(%rbp);" SOON "out %al, $0xe0");
CONTRACT_TEST(Lapic, OnlyAHigherClassInterruptsAHandler) {
  auto guest = started(test, nested);
  guest->load(open_handler, handler);
  guest->set_gate(0x51, code64, handler);
  const unsigned vector = guest->trap().vector;
  if (guest->vcpu().regs().rbx == 0) test.deviates("the LAPIC shows no vector in service within a handler");
  EXPECT_EQ(vector, 0x65u) << "0x52 waits: it is of the class in service";
  EXPECT_EQ(guest->vcpu().regs().rbx, 1u << 17) << "ISR";
  EXPECT_EQ(guest->vcpu().regs().rcx, 0x50u) << "PPR";
}

GUEST_CODE(x2apic, 64,
           "mov $0x1b, %ecx; rdmsr; or $0xc00, %eax; wrmsr; mov $0x80f, %ecx; mov $0x1ff, %eax; xor %edx, "
           "%edx; wrmsr;"
           "mov $0x802, %ecx; rdmsr; mov %eax, %ebx; sti; mov $0x83f, %ecx; mov $0x62, %eax; xor %edx, %edx; "
           "wrmsr;" SOON "out %al, $0xe0");
CONTRACT_TEST(Lapic, X2apicModeWorksThroughMsrs) {
  test.needs_cpuid(1, &kvm_cpuid_entry2::ecx, 21, "x2APIC");
  auto guest = started(test, x2apic);
  EXPECT_EQ(guest->trap().vector, 0x62u);
  EXPECT_EQ(guest->vcpu().regs().rbx, 0u);
}

GUEST_CODE(x2apic_without, 64, "mov $0x802, %ecx; rdmsr");
CONTRACT_TEST(Lapic, X2apicRegistersNeedX2apicMode) {
  auto guest = started(test, x2apic_without);
  EXPECT_EQ(guest->trap().vector, 13u);
}

CONTRACT_TEST(Lapic, LapicStateRoundTrips) {
  auto guest = started(test, apic_identity);
  guest->finish();
  auto state = guest->vcpu().lapic();
  const uint32_t priority = 0x30;
  std::memcpy(state.regs + 0x80, &priority, 4);
  guest->vcpu().set_lapic(state);
  uint32_t seen = 0;
  std::memcpy(&seen, guest->vcpu().lapic().regs + 0x80, 4);
  EXPECT_EQ(seen, priority);
}

// The reserved bits too; not "delivery status", which is the LAPIC's own.
GUEST_CODE(icr_with_everything, 64,
           APIC
           "movl $0x05ffffff, 0x310(%rbp); movl $0xa5a5f0a5, 0x300(%rbp); mov 0x300(%rbp), %eax;"
           "mov 0x310(%rbp), %ebx; out %al, $0xe0");
CONTRACT_TEST(Lapic, TheIcrReadsAsItWasWritten) {
  auto guest = started(test, icr_with_everything);
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rax, 0xa5a5e0a5u);
  EXPECT_EQ(guest->vcpu().regs().rbx, 0x05000000u);
}

CONTRACT_TEST(Lapic, ALoadedStateKeepsEveryBitOfItsVectors) {
  auto guest = started(test, apic_identity);
  auto state = guest->vcpu().lapic();
  constexpr unsigned irr = 0x200;
  const uint32_t wanted = 0x8000'1234;
  std::memcpy(state.regs + irr, &wanted, 4);
  guest->vcpu().set_lapic(state);
  uint32_t seen = 0;
  std::memcpy(&seen, guest->vcpu().lapic().regs + irr, 4);
  EXPECT_EQ(seen, wanted);
  guest->finish();  // with interrupts off; and 0-15 are never taken
}

// A state that is loaded may belong to any mode, whatever mode the vCPU is in (QEMU's loadvm). What the guest
// may not do, the VMM may; what no LAPIC can be in is refused to it as well.
constexpr uint64_t base_of_boot = 0xfee00100, enabled = 0x800, extended = 0x400;
constexpr uint64_t modes[] = {base_of_boot, base_of_boot | enabled, base_of_boot | enabled | extended};

CONTRACT_TEST(Lapic, TheVmmLeadsItFromAnyModeToAnyOtherByItsMsr) {
  test.needs_cpuid(1, &kvm_cpuid_entry2::ecx, 21, "x2APIC");
  auto guest = started(test, apic_identity);
  for (const uint64_t from : modes)
    for (const uint64_t to : modes)
      for (const uint64_t mode : {from, to}) {
        const kvm_msr_entry entry{.index = 0x1b, .data = mode};
        EXPECT_EQ(guest->vcpu().set_msrs({&entry, 1}), 1u) << std::hex << from << " to " << to;
        EXPECT_EQ(guest->vcpu().sregs().apic_base, mode);
      }
  const kvm_msr_entry impossible{.index = 0x1b, .data = base_of_boot | extended};
  EXPECT_EQ(guest->vcpu().set_msrs({&impossible, 1}), 0u);
}

CONTRACT_TEST(Lapic, TheVmmLeadsItFromAnyModeToAnyOtherBySpecialRegisters) {
  test.needs_cpuid(1, &kvm_cpuid_entry2::ecx, 21, "x2APIC");
  auto guest = started(test, apic_identity);
  auto sregs = guest->vcpu().sregs();
  for (const uint64_t from : modes)
    for (const uint64_t to : modes)
      for (const uint64_t mode : {from, to}) {
        sregs.apic_base = mode;
        EXPECT_NO_THROW(guest->vcpu().set_sregs(sregs)) << std::hex << from << " to " << to;
        EXPECT_EQ(guest->vcpu().sregs().apic_base, mode);
      }
}

// --- Timer

GUEST_CODE(timer_once, 64,
           APIC "movl $0x50, 0x320(%rbp); movl $0xb, 0x3e0(%rbp); movl $100000, 0x380(%rbp);" WAIT);
CONTRACT_TEST(Lapic, TheTimerFiresOnce) {
  auto guest = started(test, timer_once);
  const Trap trap = guest->trap();
  EXPECT_EQ(trap.vector, 0x50u);
  const auto lapic = guest->vcpu().lapic();
  uint32_t current = 1;
  std::memcpy(&current, lapic.regs + 0x390, 4);
  EXPECT_EQ(current, 0u);
}

GUEST_CODE(timer_periodic, 64,
           APIC
           "movl $0x20050, 0x320(%rbp); movl $0xb, 0x3e0(%rbp); movl $200000, 0x380(%rbp); sti;"
           "1: hlt; cmpl $5, 0x40000; jb 1b; out %al, $0xe0");
CONTRACT_TEST(Lapic, ThePeriodicTimerFiresAgainAndAgain) {
  auto guest = started(test, timer_periodic);
  guest->set_gate(0x50, code64, handler);
  const auto start = std::chrono::steady_clock::now();
  guest->finish();
  // 200,000 ticks of the APIC's 1 GHz bus (KVM's) are 0.2 ms; five of them cannot take less than 0.8 ms.
  EXPECT_GE(std::chrono::steady_clock::now() - start, std::chrono::microseconds(800));
}

GUEST_CODE(timer_busy, 64,
           APIC
           "movl $0x20050, 0x320(%rbp); movl $0xb, 0x3e0(%rbp); movl $200000, 0x380(%rbp); sti;"
           "1: inc %rbx; cmpl $5, 0x40000; jb 1b; out %al, $0xe0");
CONTRACT_TEST(Lapic, ThePeriodicTimerInterruptsAGuestThatComputes) {
  auto guest = started(test, timer_busy);
  guest->set_gate(0x50, code64, handler);
  const auto start = std::chrono::steady_clock::now();
  guest->finish();
  EXPECT_GE(std::chrono::steady_clock::now() - start, std::chrono::microseconds(800));
}

GUEST_CODE(timer_outside, 64,
           APIC
           "movl $0x50, 0x320(%rbp); movl $0xb, 0x3e0(%rbp); movl $1000000, 0x380(%rbp); out %al, $0xe0;"
           "sti; 1: jmp 1b");
CONTRACT_TEST(Lapic, ATimerExpiresWhileTheVcpuIsOutsideTheGuest) {
  auto guest = started(test, timer_outside);
  guest->finish();
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  EXPECT_EQ(guest->trap().vector, 0x50u);
}

GUEST_CODE(timer_count, 64,
           APIC
           "movl $0x10050, 0x320(%rbp); movl $0xb, 0x3e0(%rbp); movl $0x7fffffff, 0x380(%rbp); mov "
           "0x390(%rbp), %ebx;"
           "mov $2000, %eax; 1: dec %eax; jnz 1b; mov 0x390(%rbp), %ecx; out %al, $0xe0");
CONTRACT_TEST(Lapic, TheTimersCountFalls) {
  auto guest = started(test, timer_count);
  guest->finish();
  const auto regs = guest->vcpu().regs();
  EXPECT_GT(regs.rbx, regs.rcx);
  EXPECT_GT(regs.rcx, 0u);
}

GUEST_CODE(
    timer_deadline, 64,
    APIC
    "movl $0x40050, 0x320(%rbp); rdtsc; shl $32, %rdx; or %rdx, %rax; add $1000000, %rax; mov %rax, %rdx;"
    "shr $32, %rdx; mov %rax, %rbx; mov $0x6e0, %ecx; wrmsr;" WAIT);
CONTRACT_TEST(Lapic, TheTscDeadlineTimerFiresAtItsTime) {
  test.needs_capability(KVM_CAP_TSC_DEADLINE_TIMER, "TSC-deadline timer");
  auto guest = test.guest({.irqchip = Irqchip::full});
  // KVM leaves this CPUID bit to the VMM.
  auto cpuid = guest->vcpu().cpuid2();
  for (auto& leaf : cpuid)
    if (leaf.function == 1) leaf.ecx |= 1u << 24;
  guest->vcpu().set_cpuid2(cpuid);
  guest->load(timer_deadline);
  guest->enter(Mode::long64);
  EXPECT_EQ(guest->trap().vector, 0x50u);
  kvm_msr_entry tsc{.index = 0x10};
  ASSERT_EQ(guest->vcpu().msrs({&tsc, 1}), 1u);
  EXPECT_GE(tsc.data, guest->vcpu().regs().rbx);
}

GUEST_CODE(timer_restored, 64, APIC "movl $0x40050, 0x320(%rbp); out %al, $0xe0; sti; 1: jmp 1b");
CONTRACT_TEST(Lapic, ADeadlineThatTheVmmSetsFires) {
  test.needs_capability(KVM_CAP_TSC_DEADLINE_TIMER, "TSC-deadline timer");
  auto guest = started(test, timer_restored);
  auto cpuid = guest->vcpu().cpuid2();
  for (auto& leaf : cpuid)
    if (leaf.function == 1) leaf.ecx |= 1u << 24;
  guest->vcpu().set_cpuid2(cpuid);
  guest->finish();
  kvm_msr_entry tsc{.index = 0x10};
  ASSERT_EQ(guest->vcpu().msrs({&tsc, 1}), 1u);
  const uint64_t deadline = tsc.data + guest->vcpu().tsc_khz() * 3ull;  // three milliseconds
  kvm_msr_entry entry{.index = 0x6e0, .data = deadline};
  ASSERT_EQ(guest->vcpu().set_msrs({&entry, 1}), 1u);
  EXPECT_EQ(guest->trap().vector, 0x50u);
  ASSERT_EQ(guest->vcpu().msrs({&tsc, 1}), 1u);
  EXPECT_GE(tsc.data, deadline);
}

}  // namespace
}  // namespace lodge::contract
