// What instructions do around their edges, as operating systems rely on it: partial progress at a fault,
// alignment, wrap-around, privileges of POPF and IRET, stack widths. Plain arithmetic is the silicon oracle's
// business.
#include <chrono>
#include <cstring>

#include "harness.hpp"

namespace lodge::contract {
namespace {

CONTRACT_SUITE(Instructions);

constexpr uint64_t page_table = free_gpa;

// 64-bit mode with 4 KiB pages at 2 MiB, identity; the page at 0x201000 is absent.
std::unique_ptr<Guest> with_hole(Contract& test, std::span<const uint8_t> code) {
  auto guest = test.guest();
  guest->load(code);
  guest->enter(Mode::long64);
  for (uint64_t i = 0; i < 512; ++i) guest->at<uint64_t>(page_table + i * 8) = (0x200000 + i * 0x1000) | 7;
  guest->at<uint64_t>(page_table + 8) = 0;
  guest->at<uint64_t>(pd_gpa + 8) = page_table | 7;
  guest->vm().note_write(page_table, 0x1000);
  guest->vm().note_write(pd_gpa, 0x1000);
  return guest;
}

GUEST_CODE(store_into_hole, 64,
           "mov $0x200ff0, %edi; mov $0x5a, %eax; mov $64, %ecx; rep stosb; out %al, $0xe0");
CONTRACT_TEST(Instructions, RepStosStopsExactlyAtAFault) {
  auto guest = with_hole(test, store_into_hole);
  const Trap trap = guest->trap();
  EXPECT_EQ(trap.vector, 14u);
  EXPECT_EQ(trap.rip, code_gpa + 15);
  const auto regs = guest->vcpu().regs();
  EXPECT_EQ(regs.rcx, 48u);
  EXPECT_EQ(regs.rdi, 0x201000u);
  EXPECT_EQ(guest->at<uint8_t>(0x200fff), 0x5a);
  EXPECT_EQ(guest->vcpu().sregs().cr2, 0x201000u);
}

GUEST_CODE(move_from_hole, 64,
           "mov $0x201fff, %esi; mov $0x202fff, %edi; std; mov $16, %ecx; rep movsb; out %al, $0xe0");
CONTRACT_TEST(Instructions, RepMovsDownwardsStopsExactlyAtAFault) {
  auto guest = with_hole(test, move_from_hole);
  auto regs = guest->vcpu().regs();
  EXPECT_EQ(guest->trap().vector, 14u);
  regs = guest->vcpu().regs();
  EXPECT_EQ(regs.rcx, 16u);
  EXPECT_EQ(regs.rsi, 0x201fffu);
  EXPECT_EQ(regs.rdi, 0x202fffu);
}

GUEST_CODE(resume_after, 64,
           "mov $0x200ff8, %edi; mov $0x77, %eax; mov $16, %ecx; rep stosb; out %al, $0xe0");
GUEST_CODE(map_handler, 64,
           "push %rax; mov $0x201007, %eax; mov %rax, 0x30008; pop %rax; add $8, %rsp; iretq");
CONTRACT_TEST(Instructions, AFaultedStringGoesOnAfterTheHandlerMappedThePage) {
  auto guest = with_hole(test, resume_after);
  guest->load(map_handler, 0x48000);
  guest->set_gate(14, code64, 0x48000);
  guest->finish();
  for (unsigned i = 0; i < 16; ++i) EXPECT_EQ(*guest->memory(0x200ff8 + i), 0x77) << i;
  EXPECT_EQ(guest->vcpu().regs().rcx, 0u);
}

GUEST_CODE(overlap, 64, "mov $0x40000, %esi; mov $0x40001, %edi; mov $15, %ecx; rep movsb; out %al, $0xe0");
CONTRACT_TEST(Instructions, OverlappingMovsRepeatsItsFirstByte) {
  auto guest = test.guest();
  guest->load(overlap);
  guest->enter(Mode::long64);
  *guest->memory(0x40000) = 0x42;
  guest->finish();
  for (unsigned i = 0; i < 16; ++i) EXPECT_EQ(*guest->memory(0x40000 + i), 0x42) << i;
}

GUEST_CODE(scan, 64,
           "mov $0x40000, %edi; mov $100, %ecx; mov $7, %al; repne scasb; setz %bl; mov %ecx, %r8d; mov "
           "$0x40000, %esi;"
           "mov $0x40100, %edi; mov $100, %ecx; repe cmpsb; setb %bh; mov %ecx, %r9d; out %al, $0xe0");
CONTRACT_TEST(Instructions, ScanAndCompareStopAtTheirItem) {
  auto guest = test.guest();
  guest->load(scan);
  guest->enter(Mode::long64);
  *guest->memory(0x40000 + 9) = 7;
  *guest->memory(0x40100 + 9) = 7;
  *guest->memory(0x40100 + 20) = 1;
  guest->finish();
  const auto regs = guest->vcpu().regs();
  EXPECT_EQ(regs.rbx & 0xffff, 0x101u);
  EXPECT_EQ(regs.r8, 90u);
  EXPECT_EQ(regs.r9, 79u);
}

GUEST_CODE(
    address32, 64,
    "movabs $0x100040000, %rsi; mov %rsi, %rdi; mov $0x33, %eax; movabs $0x200000002, %rcx; addr32 rep stosb;"
    "mov %rdi, %rbx; mov %rcx, %rdx; movl $0x44, 0x10(%esi); out %al, $0xe0");
CONTRACT_TEST(Instructions, AThirtyTwoBitAddressSizeCutsAddressesAndCounts) {
  auto guest = test.guest();
  const auto regs = guest->result(Mode::long64, address32);
  EXPECT_EQ(guest->at<uint16_t>(0x40000), 0x3333);
  EXPECT_EQ(guest->at<uint32_t>(0x40010), 0x44u);
  EXPECT_EQ(regs.rbx, 0x40002u) << "RDI is written as a 32-bit register";
  EXPECT_EQ(regs.rdx, 0u);
}

GUEST_CODE(wide_exchange, 64, "mov $0x40008, %esi; lock cmpxchg16b (%rsi); out %al, $0xe0");
CONTRACT_TEST(Instructions, Cmpxchg16bNeedsAlignment) {
  auto guest = test.guest();
  EXPECT_EQ(guest->fault(Mode::long64, wide_exchange).vector, 13u);
}

GUEST_CODE(aligned_move, 64, "movaps 0x40008, %xmm0; out %al, $0xe0");
CONTRACT_TEST(Instructions, MovapsNeedsAlignment) {
  auto guest = test.guest();
  EXPECT_EQ(guest->fault(Mode::long64, aligned_move).vector, 13u);
}

GUEST_CODE(unaligned_save, 64, "fxsave 0x40008; out %al, $0xe0");
CONTRACT_TEST(Instructions, FxsaveNeedsAlignment) {
  auto guest = test.guest();
  guest->load(unaligned_save);
  guest->enter(Mode::long64);
  const auto exit = guest->run();
  if (!Guest::is_out(exit, trap_port)) test.deviates("FXSAVE to an address that is no multiple of 16");
  EXPECT_EQ((guest->vcpu().regs().rip - stubs_gpa) / 16, 13u);
}

GUEST_CODE(bad_mxcsr, 64, "movl $0xffffffff, 0x40000; ldmxcsr 0x40000; out %al, $0xe0");
CONTRACT_TEST(Instructions, ReservedBitsOfMxcsrFault) {
  auto guest = test.guest();
  EXPECT_EQ(guest->fault(Mode::long64, bad_mxcsr).vector, 13u);
}

GUEST_CODE(sse_off, 64,
           "mov %cr4, %rax; and $~0x200, %rax; mov %rax, %cr4; movaps %xmm0, %xmm1; out %al, $0xe0");
CONTRACT_TEST(Instructions, SseNeedsOsfxsr) {
  auto guest = test.guest();
  EXPECT_EQ(guest->fault(Mode::long64, sse_off).vector, 6u);
}

GUEST_CODE(
    save_extended, 64,
    "mov %cr4, %rax; or $0x40000, %eax; mov %rax, %cr4; xor %ecx, %ecx; mov $3, %eax; xor %edx, %edx; xsetbv;"
    "mov $0x12345678, %eax; movd %eax, %xmm5; mov $3, %eax; xsave 0x40000; pxor %xmm5, %xmm5; xrstor 0x40000;"
    "movd %xmm5, %ebx; mov $1, %eax; xor %edx, %edx; movl $2, 0x40200; mov $2, %eax; xrstor 0x40000;"
    "movq $0, 0x40200; mov $2, %eax; xrstor 0x40000; movd %xmm5, %ecx; out %al, $0xe0");
CONTRACT_TEST(Instructions, XsaveAndXrstorKeepState) {
  test.needs_cpuid(1, &kvm_cpuid_entry2::ecx, 26, "XSAVE");
  auto guest = test.guest();
  const auto regs = guest->result(Mode::long64, save_extended);
  EXPECT_EQ(regs.rbx, 0x12345678u);
  EXPECT_EQ(regs.rcx, 0u) << "a component whose XSTATE_BV bit is clear is initialized";
}

GUEST_CODE(bad_xcr, 64,
           "mov %cr4, %rax; or $0x40000, %eax; mov %rax, %cr4; xor %ecx, %ecx; mov $4, %eax; xor %edx, %edx; "
           "xsetbv; out %al, $0xe0");
CONTRACT_TEST(Instructions, XsetbvRefusesAvxWithoutSse) {
  test.needs_cpuid(1, &kvm_cpuid_entry2::ecx, 26, "XSAVE");
  auto guest = test.guest();
  EXPECT_EQ(guest->fault(Mode::long64, bad_xcr).vector, 13u);
}

GUEST_CODE(xsave_off, 64, "xor %ecx, %ecx; xgetbv; out %al, $0xe0");
CONTRACT_TEST(Instructions, XgetbvNeedsOsxsave) {
  auto guest = test.guest();
  guest->load(xsave_off);
  guest->enter(Mode::long64);
  const auto exit = guest->run();
  if (!Guest::is_out(exit, trap_port)) test.deviates("XGETBV without CR4.OSXSAVE: " + guest->describe(exit));
  EXPECT_EQ((guest->vcpu().regs().rip - stubs_gpa) / 16, 6u);
}

GUEST_CODE(user_popf, 64, "pushq $0x3202; popf; pushf; pop %rax; ud2");
CONTRACT_TEST(Instructions, PopfAtUserLevelChangesNeitherIfNorIopl) {
  auto guest = test.guest();
  guest->load(user_popf);
  guest->enter(Mode::long64);
  guest->to_user();
  guest->trap();
  const uint64_t flags = guest->vcpu().regs().rax;
  if ((flags & 0x200) != 0) test.deviates("user code sees the host's IF");
  EXPECT_EQ(flags & 0x3200, 0u);
}

GUEST_CODE(sixteen_bit_stack, 32,
           "mov $0x38, %eax; mov %eax, %ss; mov $0x10000, %esp; pushl $0x11223344; mov %esp, %ebx; popl "
           "%ecx; mov %esp, %edx;"
           "out %al, $0xe0");
CONTRACT_TEST(Instructions, ASixteenBitStackSegmentUsesSpOnly) {
  auto guest = test.guest();
  const auto regs = guest->result(Mode::prot32, sixteen_bit_stack);
  EXPECT_EQ(regs.rbx, 0x1fffcu) << "the upper half of ESP is untouched, SP wrapped from 0 to 0xfffc";
  EXPECT_EQ(regs.rdx, 0x10000u);
  EXPECT_EQ(regs.rcx, 0x11223344u);
}

GUEST_CODE(real_wrap, 16, "mov $0xffff, %si; mov (%si), %al; mov (%si), %ax; out %al, $0xe0");
CONTRACT_TEST(Instructions, ARealModeWordAtTheSegmentsEndFaults) {
  auto guest = test.guest();
  const Trap trap = guest->fault(Mode::real, real_wrap);
  EXPECT_EQ(trap.vector, 13u);
  EXPECT_EQ(trap.rip, code_gpa + 5);
}

GUEST_CODE(frames, 64,
           "mov $0x1111, %ebp; enter $32, $1; mov %rsp, %rbx; mov %rbp, %rcx; leave; mov %rsp, %rdx; out "
           "%al, $0xe0");
CONTRACT_TEST(Instructions, EnterAndLeaveMakeAFrame) {
  auto guest = test.guest();
  const auto regs = guest->result(Mode::long64, frames);
  EXPECT_EQ(regs.rcx, stack - 8);
  EXPECT_EQ(regs.rbx, stack - 16 - 32) << "the saved RBP, the display entry, 32 bytes";
  EXPECT_EQ(regs.rdx, stack);
  EXPECT_EQ(regs.rbp, 0x1111u);
}

GUEST_CODE(stack_shadow, 64,
           "pushf; pop %rax; or $0x100, %eax; mov $0x10, %ecx; push %rax; popf; mov %ecx, %ss; nop; nop; out "
           "%al, $0xe0");
CONTRACT_TEST(Instructions, LoadingTheStackSegmentHoldsBackTheStepTrap) {
  auto guest = test.guest();
  guest->load(stack_shadow);
  guest->enter(Mode::long64);
  const Trap trap = guest->trap();
  EXPECT_EQ(trap.vector, 1u);
  // POPF at +13; MOV SS at +14 and the NOP after it run before the trap.
  if (trap.rip != code_gpa + stack_shadow.size() - 3)
    test.deviates("a step trap between MOV SS and its successor");
}

GUEST_CODE(msr_swap, 64,
           "mov $0xc0000101, %ecx; mov $0x11110000, %eax; xor %edx, %edx; wrmsr; inc %ecx; mov $0x22220000, "
           "%eax; wrmsr; swapgs;"
           "dec %ecx; rdmsr; mov %eax, %ebx; inc %ecx; rdmsr; out %al, $0xe0");
CONTRACT_TEST(Instructions, SwapgsExchangesTheBases) {
  auto guest = test.guest();
  const auto regs = guest->result(Mode::long64, msr_swap);
  EXPECT_EQ(regs.rbx, 0x22220000u);
  EXPECT_EQ(regs.rax, 0x11110000u);
}

GUEST_CODE(processor_id, 64,
           "mov $0xc0000103, %ecx; mov $0x1234, %eax; xor %edx, %edx; wrmsr; rdtscp; out %al, $0xe0");
CONTRACT_TEST(Instructions, RdtscpTellsTscAux) {
  test.needs_cpuid(0x80000001, &kvm_cpuid_entry2::edx, 27, "RDTSCP");
  auto guest = test.guest();
  EXPECT_EQ(guest->result(Mode::long64, processor_id).rcx, 0x1234u);
}

GUEST_CODE(
    harmless, 64,
    "movabs $0xffff800000000000, %rbx; prefetcht0 (%rbx); nopl (%rbx); lea 8(%rbx), %rax; out %al, $0xe0");
CONTRACT_TEST(Instructions, HintsAndAddressArithmeticTouchNoMemory) {
  auto guest = test.guest();
  EXPECT_EQ(guest->result(Mode::long64, harmless).rax, 0xffff800000000008u);
}

GUEST_CODE(flush_absent, 64, "clflush 0x201000; out %al, $0xe0");
CONTRACT_TEST(Instructions, ClflushOfAnAbsentPageFaults) {
  auto guest = with_hole(test, flush_absent);
  EXPECT_EQ(guest->trap().vector, 14u);
  EXPECT_EQ(guest->vcpu().sregs().cr2, 0x201000u);
}

GUEST_CODE(push_fault, 64,
           "mov $0x202000, %esp; push %rax; mov %rsp, %rbx; mov $0x202008, %esp; out %al, $0xe0");
CONTRACT_TEST(Instructions, APushThatFaultsLeavesTheStackPointer) {
  auto guest = with_hole(test, push_fault);
  guest->at<uint64_t>(tss_gpa + 0x24) = 0x7000;  // IST1, for the handler's frame
  *guest->memory(idt_gpa + 14 * 16 + 4) = 1;
  const Trap trap = guest->trap();
  EXPECT_EQ(trap.vector, 14u);
  EXPECT_EQ(trap.rsp, 0x202000u);
  EXPECT_EQ(guest->vcpu().sregs().cr2, 0x201ff8u);
}

GUEST_CODE(pop_to_stack, 64,
           "mov $0x7000, %esp; pushq $0x40000; pushq $0x1234; mov %rsp, %rbx; pop 8(%rsp); mov 8(%rbx), "
           "%rcx; mov 16(%rbx), %rdx; out %al, $0xe0");
CONTRACT_TEST(Instructions, PopIntoAnAddressBasedOnTheStackPointerUsesItsNewValue) {
  auto guest = test.guest();
  const auto regs = guest->result(Mode::long64, pop_to_stack);
  EXPECT_EQ(regs.rcx, 0x40000u);
  EXPECT_EQ(regs.rdx, 0x1234u);
}

GUEST_CODE(push_stack, 64,
           "mov $0x7000, %esp; push %rsp; pop %rax; mov %rsp, %rbx; push %rbx; pop %rsp; mov %rsp, %rcx; out "
           "%al, $0xe0");
CONTRACT_TEST(Instructions, PushingTheStackPointerPushesItsOldValue) {
  auto guest = test.guest();
  const auto regs = guest->result(Mode::long64, push_stack);
  EXPECT_EQ(regs.rax, 0x7000u);
  EXPECT_EQ(regs.rcx, 0x7000u);
}

GUEST_CODE(wide_modes, 64,
           "mov $0x40, %cl; mov $1, %eax; shl %cl, %eax; mov $1, %ebx; shl %cl, %rbx; mov $0x41, %cl; mov "
           "$1, %edx; shl %cl, %rdx;"
           "mov $-1, %rsi; cmove %eax, %esi; mov $-1, %rdi; xor %r8d, %r8d; bsf %r8, %rdi; setz %r9b; out "
           "%al, $0xe0");
CONTRACT_TEST(Instructions, ShiftCountsAreMaskedAndMovesClearTheUpperHalf) {
  auto guest = test.guest();
  const auto regs = guest->result(Mode::long64, wide_modes);
  EXPECT_EQ(regs.rax, 1u);
  EXPECT_EQ(regs.rbx, 1u);
  EXPECT_EQ(regs.rdx, 2u);
  EXPECT_EQ(regs.rsi, 0xffffffffu) << "CMOVcc writes its 32-bit register also when the condition is false";
  EXPECT_EQ(regs.rdi, ~0ull) << "BSF of zero leaves its destination";
  EXPECT_EQ(regs.r9 & 1, 1u);
}

GUEST_CODE(monitor, 64,
           "mov $0x40000, %eax; xor %ecx, %ecx; xor %edx, %edx; monitor; mov $1, %ebx; out %al, $0xe0");
CONTRACT_TEST(Instructions, MonitorIsUndefinedUnlessOffered) {
  auto guest = test.guest();
  auto cpuid = guest->vcpu().cpuid2();
  for (auto& leaf : cpuid)
    if (leaf.function == 1) leaf.ecx &= ~8u;
  guest->vcpu().set_cpuid2(cpuid);
  guest->load(monitor);
  guest->enter(Mode::long64);
  const auto exit = guest->run();
  // KVM runs MONITOR as a NOP without intercepting it on request of a quirk, and by default raises #UD.
  if (!Guest::is_out(exit, trap_port)) test.deviates("MONITOR without its CPUID bit runs");
  EXPECT_EQ((guest->vcpu().regs().rip - stubs_gpa) / 16, 6u);
}

GUEST_CODE(hypercall, 64, "mov $0xffff, %eax; vmcall; out %al, $0xe0");
CONTRACT_TEST(Instructions, AnUnknownHypercallAnswersEnosys) {
  auto guest = test.guest();
  guest->load(hypercall);
  const bool amd = test.system().supported_cpuid().front().ebx == 0x68747541;  // "Auth"enticAMD
  if (amd) *guest->memory(code_gpa + 7) = 0xd9;                                // VMMCALL
  guest->enter(Mode::long64);
  // KVM's emulator rewrites the instruction to the vendor's own and tries again; without hardware behind it,
  // for ever.
  std::jthread kicker;
  if (!test.soft())
    kicker = std::jthread([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(300));
      guest->vcpu().kick();
    });
  const auto exit = guest->vcpu().run();
  if (!Guest::is_out(exit, done_port)) test.deviates("a hypercall does not end: " + guest->describe(exit));
  EXPECT_EQ(guest->vcpu().regs().rax, static_cast<uint64_t>(-1000));  // -KVM_ENOSYS
}

}  // namespace
}  // namespace lodge::contract
