// Several vCPUs: bring-up, interrupts between them, atomic instructions, code written by another vCPU or by
// the VMM.
#include <atomic>
#include <chrono>
#include <cstring>

#include "harness.hpp"

namespace lodge::contract {
namespace {

CONTRACT_SUITE(Smp);

#define APIC "mov $0xfee00000, %ebp; movl $0x1ff, 0xf0(%rbp);"

constexpr uint64_t counter = 0x40000, flag = 0x40040;

GUEST_CODE(bring_up, 64,
           APIC
           "movl $0x1000000, 0x310(%rbp); movl $0x4500, 0x300(%rbp); movl $0x1000000, 0x310(%rbp);"
           "movl $0x4609, 0x300(%rbp); 1: pause; cmpl $0x55, 0x40040; jne 1b; out %al, $0xe0");
GUEST_CODE(started_cpu, 16, "mov %cs, %bx; mov $0x4000, %ax; mov %ax, %ds; movl $0x55, 0x40; out %al, $0xe0");
CONTRACT_TEST(Smp, InitAndSipiStartAnotherVcpu) {
  auto guest = test.guest({.vcpus = 2, .irqchip = Irqchip::full});
  EXPECT_EQ(guest->vcpu(0).mp_state().mp_state, static_cast<uint32_t>(KVM_MP_STATE_RUNNABLE));
  EXPECT_EQ(guest->vcpu(1).mp_state().mp_state, static_cast<uint32_t>(KVM_MP_STATE_UNINITIALIZED));
  guest->load(bring_up);
  guest->load(started_cpu, 0x9000);
  guest->enter(Mode::long64);
  guest->together([&] { guest->finish(1); }, [&] { guest->finish(0); });
  EXPECT_EQ(guest->vcpu(1).regs().rbx & 0xffff, 0x900u) << "CS is the vector's page";
  EXPECT_EQ(guest->vcpu(1).sregs().cs.base, 0x9000u);
  EXPECT_EQ(guest->vcpu(1).mp_state().mp_state, static_cast<uint32_t>(KVM_MP_STATE_RUNNABLE));
}

GUEST_CODE(send_ipi, 64,
           APIC
           "1: pause; cmpl $1, 0x40040; jne 1b; movl $0x1000000, 0x310(%rbp); movl $0x4077, 0x300(%rbp); out "
           "%al, $0xe0");
GUEST_CODE(await_ipi, 64, APIC "movl $1, 0x40040; sti; 1: hlt; jmp 1b");
void two_running(Guest& guest, std::span<const uint8_t> first, std::span<const uint8_t> second) {
  guest.load(first);
  guest.load(second, 0x9000);
  guest.enter(Mode::long64, 0);
  guest.enter(Mode::long64, 1, 0x9000);
  guest.vcpu(1).set_mp_state({.mp_state = KVM_MP_STATE_RUNNABLE});
}
CONTRACT_TEST(Smp, AnIpiWakesAHaltedVcpu) {
  auto guest = test.guest({.vcpus = 2, .irqchip = Irqchip::full});
  two_running(*guest, send_ipi, await_ipi);
  guest->together(
      [&] {
        if (guest->trap(1).vector != 0x77) throw std::runtime_error("another vector");
      },
      [&] { guest->finish(0); });
}

GUEST_CODE(send_logical, 64,
           APIC
           "1: pause; cmpl $1, 0x40040; jne 1b; movl $0x2000000, 0x310(%rbp); movl $0x4878, 0x300(%rbp); out "
           "%al, $0xe0");
GUEST_CODE(
    await_logical, 64,
    APIC "movl $0xffffffff, 0xe0(%rbp); movl $0x2000000, 0xd0(%rbp); movl $1, 0x40040; sti; 1: hlt; jmp 1b");
CONTRACT_TEST(Smp, AnIpiReachesALogicalDestination) {
  auto guest = test.guest({.vcpus = 2, .irqchip = Irqchip::full});
  two_running(*guest, send_logical, await_logical);
  guest->together(
      [&] {
        if (guest->trap(1).vector != 0x78) throw std::runtime_error("another vector");
      },
      [&] { guest->finish(0); });
}

GUEST_CODE(send_others, 64,
           APIC
           "1: pause; cmpl $1, 0x40040; jne 1b; movl $0xc4079, 0x300(%rbp); sti; nop; nop; out %al, $0xe0");
CONTRACT_TEST(Smp, AnIpiToAllOthersSparesTheSender) {
  auto guest = test.guest({.vcpus = 2, .irqchip = Irqchip::full});
  two_running(*guest, send_others, await_ipi);
  guest->together(
      [&] {
        if (guest->trap(1).vector != 0x79) throw std::runtime_error("another vector");
      },
      [&] { guest->finish(0); });
}

GUEST_CODE(shoot, 64,
           APIC
           "1: pause; cmpl $1, 0x40040; jne 1b; movq $0x51003, 0x30000; movl $0x1000000, 0x310(%rbp);"
           "movl $0x407a, 0x300(%rbp); 2: pause; cmpl $2, 0x40040; jne 2b; out %al, $0xe0");
GUEST_CODE(shot, 64,
           APIC
           "mov 0x200010, %rbx; movl $1, 0x40040; sti; 1: cmpl $2, 0x40040; jne 1b; mov 0x200010, %rcx; out "
           "%al, $0xe0");
GUEST_CODE(
    shoot_handler, 64,
    "push %rax; invlpg 0x200000; movl $2, 0x40040; mov $0xfee000b0, %eax; movl $0, (%rax); pop %rax; iretq");
CONTRACT_TEST(Smp, ATranslationIsShotDownByIpi) {
  auto guest = test.guest({.vcpus = 2, .irqchip = Irqchip::full});
  two_running(*guest, shoot, shot);
  guest->load(shoot_handler, 0x48000);
  guest->set_gate(0x7a, code64, 0x48000);
  for (uint64_t i = 0; i < 512; ++i) guest->at<uint64_t>(0x30000 + i * 8) = (0x200000 + i * 0x1000) | 7;
  guest->at<uint64_t>(0x30000) = 0x50003;
  guest->at<uint64_t>(pd_gpa + 8) = 0x30007;
  guest->at<uint64_t>(0x50010) = 1;
  guest->at<uint64_t>(0x51010) = 2;
  guest->together([&] { guest->finish(1); }, [&] { guest->finish(0); });
  EXPECT_EQ(guest->vcpu(1).regs().rbx, 1u);
  EXPECT_EQ(guest->vcpu(1).regs().rcx, 2u);
}

// Without an irqchip all vCPUs are runnable from the start.
void run_both(Guest& guest) {
  guest.together([&] { guest.finish(1); }, [&] { guest.finish(0); });
}
std::unique_ptr<Guest> pair(Contract& test, std::span<const uint8_t> code) {
  auto guest = test.guest({.vcpus = 2, .seconds = 20});
  guest->load(code);
  guest->enter(Mode::long64, 0);
  guest->enter(Mode::long64, 1);
  return guest;
}

GUEST_CODE(locked_add, 64, "mov $20000, %ecx; 1: lock incl 0x40000; dec %ecx; jnz 1b; out %al, $0xe0");
CONTRACT_TEST(Smp, LockedIncrementsAreNotLost) {
  auto guest = pair(test, locked_add);
  run_both(*guest);
  EXPECT_EQ(guest->at<uint32_t>(counter), 40000u);
}

GUEST_CODE(locked_compare, 64,
           "mov $5000, %ecx; 1: mov 0x40000, %eax; 2: lea 1(%rax), %edx; lock cmpxchg %edx, 0x40000; jne 2b; "
           "dec %ecx; jnz 1b;"
           "out %al, $0xe0");
CONTRACT_TEST(Smp, CompareAndExchangeIsAtomic) {
  auto guest = pair(test, locked_compare);
  run_both(*guest);
  EXPECT_EQ(guest->at<uint32_t>(counter), 10000u);
}

GUEST_CODE(locked_xadd, 64,
           "mov $5000, %ecx; 1: mov $3, %eax; lock xadd %eax, 0x40002; dec %ecx; jnz 1b; out %al, $0xe0");
CONTRACT_TEST(Smp, ExchangeAndAddIsAtomicEvenWhenMisaligned) {
  auto guest = pair(test, locked_xadd);
  run_both(*guest);
  EXPECT_EQ(guest->at<uint32_t>(counter + 2), 30000u);
}

GUEST_CODE(
    spin_lock, 64,
    "mov $2000, %ecx; 1: mov $1, %eax; 2: xchg %eax, 0x40080; test %eax, %eax; jz 3f; pause; jmp 2b;"
    "3: mov 0x40000, %edx; inc %edx; mov %edx, 0x40000; movl $0, 0x40080; dec %ecx; jnz 1b; out %al, $0xe0");
CONTRACT_TEST(Smp, AnExchangeMakesALock) {
  auto guest = pair(test, spin_lock);
  run_both(*guest);
  EXPECT_EQ(guest->at<uint32_t>(counter), 4000u);
}

// --- Code that changes
// ----------------------------------------------------------------------------------------------

GUEST_CODE(patch_next, 64, "movb $2, 1f+1(%rip); 1: mov $1, %al; out %al, $0xe0");
CONTRACT_TEST(Smp, AnInstructionMayRewriteTheNextOne) {
  auto guest = test.guest();
  EXPECT_EQ(guest->result(Mode::long64, patch_next).rax & 0xff, 2u);
}

GUEST_CODE(
    patch_loop, 64,
    "xor %ebx, %ebx; mov $100, %ecx; 1: add $1, %ebx; incb 1b+2(%rip); dec %ecx; jnz 1b; out %al, $0xe0");
CONTRACT_TEST(Smp, ALoopMayRewriteItselfEveryRound) {
  auto guest = test.guest();
  const auto regs = guest->result(Mode::long64, patch_loop);
  // 1 + 2 + ... + 100, the immediate being a signed byte that stays below 128.
  EXPECT_EQ(regs.rbx, 5050u);
}

GUEST_CODE(patch_alias, 64,
           "call 1f; movb $9, 0x200000 + 1f - start + 0x8001; call 1f; out %al, $0xe0; 1: mov $1, %bl; add "
           "%bl, %cl; ret");
CONTRACT_TEST(Smp, CodeIsRewrittenThroughAnotherAddress) {
  auto guest = test.guest();
  guest->load(patch_alias);
  guest->enter(Mode::long64);
  guest->at<uint64_t>(pd_gpa + 8) = 0x87;  // the second 2 MiB show the first
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rcx & 0xff, 10u);
}

GUEST_CODE(
    string_patch, 64,
    "call 1f; lea 2f(%rip), %rsi; lea 1f(%rip), %rdi; mov $6, %ecx; rep movsb; call 1f; out %al, $0xe0;"
    "1: add $1, %ebx; nop; nop; ret; 2: add $2, %ebx; nop; nop; ret");
CONTRACT_TEST(Smp, CodeIsRewrittenByAStringInstruction) {
  auto guest = test.guest();
  EXPECT_EQ(guest->result(Mode::long64, string_patch).rbx, 3u);
}

GUEST_CODE(call_twice, 64, "mov $0x50000, %esi; call *%rsi; out %al, $0xe0; call *%rsi; out %al, $0xe0");
CONTRACT_TEST(Smp, CodeWrittenByTheVmmRunsAfterNoteWrite) {
  auto guest = test.guest();
  const uint8_t one[] = {0xb8, 1, 0, 0, 0, 0xc3}, two[] = {0xb8, 2, 0, 0, 0, 0xc3};  // mov $N, %eax; ret
  guest->load(one, 0x50000);
  guest->load(call_twice);
  guest->enter(Mode::long64);
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rax, 1u);
  guest->load(two, 0x50000);  // says note_write()
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rax, 2u);
}

GUEST_CODE(cross_modify, 64, "movb $0x42, 0x50001; movl $1, 0x40040; out %al, $0xe0");
GUEST_CODE(cross_run, 64, "mov $0x50000, %esi; 1: call *%rsi; cmp $0x42, %al; jne 1b; out %al, $0xe0");
CONTRACT_TEST(Smp, CodeRewrittenByAnotherVcpuIsSeen) {
  auto guest = test.guest({.vcpus = 2});
  const uint8_t one[] = {0xb0, 1, 0xc3};  // mov $1, %al; ret
  guest->load(one, 0x50000);
  guest->load(cross_modify);
  guest->load(cross_run, 0x9000);
  guest->enter(Mode::long64, 0);
  guest->enter(Mode::long64, 1, 0x9000);
  guest->together([&] { guest->finish(1); },
                  [&] {
                    std::this_thread::sleep_for(std::chrono::milliseconds(3));
                    guest->finish(0);
                  });
}

GUEST_CODE(vmm_patched, 64, "mov $0x50000, %esi; 1: call *%rsi; cmp $0x42, %al; jne 1b; out %al, $0xe0");
CONTRACT_TEST(Smp, CodeRewrittenByTheVmmUnderARunningVcpuIsSeen) {
  auto guest = test.guest();
  const uint8_t one[] = {0xb0, 1, 0xc3};
  guest->load(one, 0x50000);
  guest->load(vmm_patched);
  guest->enter(Mode::long64);
  guest->together([&] { guest->finish(); },
                  [&] {
                    std::this_thread::sleep_for(std::chrono::milliseconds(3));
                    std::atomic_ref(*guest->memory(0x50001)).store(0x42);
                    guest->vm().note_write(0x50001, 1);
                  });
}

}  // namespace
}  // namespace lodge::contract
