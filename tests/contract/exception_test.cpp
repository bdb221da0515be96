// Exceptions, software interrupts and how they are delivered (SDM volume 3, chapter 6).
#include "harness.hpp"

namespace lodge::contract {
namespace {

CONTRACT_SUITE(Exceptions);

constexpr uint64_t flag_tf = 0x100, flag_if = 0x200, flag_rf = 0x10000, flag_ac = 0x40000;

GUEST_CODE(divide_by_zero, 64, "xor %ecx, %ecx; mov $1, %eax; cltd; div %ecx");
CONTRACT_TEST(Exceptions, DivisionByZero) {
  auto guest = test.guest();
  const Trap trap = guest->fault(Mode::long64, divide_by_zero);
  EXPECT_EQ(trap.vector, 0u);
  EXPECT_EQ(trap.rip, code_gpa + 8);
  EXPECT_EQ(guest->vcpu().regs().rax, 1u) << "the dividend is untouched";
}

GUEST_CODE(divide_overflow, 64, "mov $2, %edx; mov $1, %ecx; div %ecx");
CONTRACT_TEST(Exceptions, QuotientTooLarge) {
  auto guest = test.guest();
  EXPECT_EQ(guest->fault(Mode::long64, divide_overflow).vector, 0u);
}

GUEST_CODE(undefined, 64, "nop; ud2");
CONTRACT_TEST(Exceptions, UndefinedInstruction) {
  auto guest = test.guest();
  const Trap trap = guest->fault(Mode::long64, undefined);
  EXPECT_EQ(trap.vector, 6u);
  EXPECT_EQ(trap.rip, code_gpa + 1);
  EXPECT_NE(trap.rflags & flag_rf, 0u);
}

GUEST_CODE(bad_lock, 64, ".byte 0xf0; mov %eax, (%rsp)");
CONTRACT_TEST(Exceptions, LockOnAnInstructionThatHasNoneIsUndefined) {
  auto guest = test.guest();
  EXPECT_EQ(guest->fault(Mode::long64, bad_lock).vector, 6u);
}

GUEST_CODE(lock_register, 64, ".byte 0xf0, 0x01, 0xc0");
CONTRACT_TEST(Exceptions, LockOnARegisterIsUndefined) {
  auto guest = test.guest();
  EXPECT_EQ(guest->fault(Mode::long64, lock_register).vector, 6u);
}

GUEST_CODE(removed_in_long_mode, 64, ".byte 0x27; hlt");  // DAA
CONTRACT_TEST(Exceptions, InstructionsRemovedFromLongModeAreUndefined) {
  auto guest = test.guest();
  EXPECT_EQ(guest->fault(Mode::long64, removed_in_long_mode).vector, 6u);
}

GUEST_CODE(too_long, 64, ".fill 15, 1, 0x66; nop; hlt");
CONTRACT_TEST(Exceptions, AnInstructionOfSixteenBytesIsAGeneralProtectionFault) {
  auto guest = test.guest();
  guest->load(too_long);
  guest->enter(Mode::long64);
  const auto exit = guest->run();
  if (!Guest::is_out(exit, trap_port)) test.deviates("16-byte instruction: " + guest->describe(exit));
  EXPECT_EQ((guest->vcpu().regs().rip - stubs_gpa) / 16, 13u);
}

GUEST_CODE(selector_beyond, 64, "mov $0x1008, %eax; mov %eax, %ds");
CONTRACT_TEST(Exceptions, ASelectorBeyondTheTableNamesItselfInTheErrorCode) {
  auto guest = test.guest();
  const Trap trap = guest->fault(Mode::long64, selector_beyond);
  EXPECT_EQ(trap.vector, 13u);
  EXPECT_EQ(trap.error, 0x1008u);
}

GUEST_CODE(load_free_ds, 64, "mov $0x60, %eax; mov %eax, %ds; out %al, $0xe0");
CONTRACT_TEST(Exceptions, AnAbsentSegmentIsNotPresent) {
  auto guest = test.guest();
  guest->load(load_free_ds);
  guest->enter(Mode::long64);
  guest->set_descriptor(free_selector, 0, 0xfffff, 0x13, 0xc);
  const Trap trap = guest->trap();
  EXPECT_EQ(trap.vector, 11u);
  EXPECT_EQ(trap.error, free_selector);
}

GUEST_CODE(load_free_ss, 64, "mov $0x60, %eax; mov %eax, %ss; out %al, $0xe0");
CONTRACT_TEST(Exceptions, AnAbsentStackSegmentIsAStackFault) {
  auto guest = test.guest();
  guest->load(load_free_ss);
  guest->enter(Mode::long64);
  guest->set_descriptor(free_selector, 0, 0xfffff, 0x13, 0xc);
  const Trap trap = guest->trap();
  EXPECT_EQ(trap.vector, 12u);
  EXPECT_EQ(trap.error, free_selector);
}

CONTRACT_TEST(Exceptions, AStackSegmentMustBeWritable) {
  auto guest = test.guest();
  guest->load(load_free_ss);
  guest->enter(Mode::long64);
  guest->set_descriptor(free_selector, 0, 0xfffff, 0x91, 0xc);
  const Trap trap = guest->trap();
  EXPECT_EQ(trap.vector, 13u);
  EXPECT_EQ(trap.error, free_selector);
}

CONTRACT_TEST(Exceptions, LoadingASegmentSetsItsAccessedBit) {
  auto guest = test.guest();
  guest->load(load_free_ds);
  guest->enter(Mode::long64);
  guest->set_descriptor(free_selector, 0, 0xfffff, 0x92, 0xc);
  guest->finish();
  EXPECT_EQ(*guest->memory(gdt_gpa + free_selector + 5), 0x93);
}

GUEST_CODE(breakpoint, 64, "nop; int3");
CONTRACT_TEST(Exceptions, Int3ReportsTheNextInstruction) {
  auto guest = test.guest();
  const Trap trap = guest->fault(Mode::long64, breakpoint);
  EXPECT_EQ(trap.vector, 3u);
  EXPECT_EQ(trap.rip, code_gpa + 2);
}

GUEST_CODE(software_interrupt, 64, "int $0x50");
CONTRACT_TEST(Exceptions, IntNReportsTheNextInstruction) {
  auto guest = test.guest();
  const Trap trap = guest->fault(Mode::long64, software_interrupt);
  EXPECT_EQ(trap.vector, 0x50u);
  EXPECT_EQ(trap.rip, code_gpa + 2);
  EXPECT_EQ(trap.rflags & flag_rf, 0u);
}

CONTRACT_TEST(Exceptions, UserCodeNeedsAGateOfItsLevelForIntN) {
  auto guest = test.guest();
  guest->load(software_interrupt);
  guest->enter(Mode::long64);
  guest->to_user();
  const Trap trap = guest->trap();
  if (trap.vector != 13)
    test.deviates("INT 0x50 at CPL 3 without a gate for it gave another exception than #GP");
  EXPECT_EQ(trap.error, 0x50u * 8 + 2) << "the gate's index and the IDT bit";
}

CONTRACT_TEST(Exceptions, AGateOfLevelThreeAdmitsUserCode) {
  auto guest = test.guest();
  guest->load(software_interrupt);
  guest->enter(Mode::long64);
  guest->set_gate(0x50, code64, stubs_gpa + 0x500, 0xee);
  guest->to_user();
  const auto exit = guest->run();
  if (!Guest::is_out(exit, trap_port) || (guest->vcpu().regs().rip - stubs_gpa) / 16 != 0x50)
    test.deviates("INT 0x50 at CPL 3: " + guest->describe(exit));
  EXPECT_EQ(guest->vcpu().sregs().cs.selector, code64);
}

GUEST_CODE(real_interrupt, 16, "sti; int $0x50");
CONTRACT_TEST(Exceptions, RealModeInterruptsGoThroughTheVectorTable) {
  auto guest = test.guest();
  const Trap trap = guest->fault(Mode::real, real_interrupt);
  EXPECT_EQ(trap.vector, 0x50u);
  EXPECT_EQ(trap.rip, code_gpa + 3);
  EXPECT_EQ(trap.cs, 0u);
  EXPECT_NE(trap.rflags & flag_if, 0u);
  EXPECT_EQ(guest->vcpu().regs().rflags & flag_if, 0u);
}

GUEST_CODE(single_step, 64, "pushf; orl $0x100, (%rsp); popf; nop; nop");
CONTRACT_TEST(Exceptions, TheTrapFlagTrapsAfterTheNextInstruction) {
  auto guest = test.guest();
  const Trap trap = guest->fault(Mode::long64, single_step);
  EXPECT_EQ(trap.vector, 1u);
  EXPECT_EQ(trap.rip, code_gpa + 10) << "after the first NOP";
  EXPECT_NE(trap.rflags & flag_tf, 0u);
  EXPECT_EQ(guest->vcpu().regs().rflags & flag_tf, 0u);
  EXPECT_NE(guest->vcpu().debugregs().dr6 & 0x4000, 0u) << "DR6.BS";
}

GUEST_CODE(icebp, 64, ".byte 0xf1; nop");
CONTRACT_TEST(Exceptions, IcebpIsADebugTrap) {
  auto guest = test.guest();
  const Trap trap = guest->fault(Mode::long64, icebp);
  EXPECT_EQ(trap.vector, 1u);
  EXPECT_EQ(trap.rip, code_gpa + 1);
}

GUEST_CODE(overflow, 32, "mov $0x7fffffff, %eax; inc %eax; into");
CONTRACT_TEST(Exceptions, Into) {
  auto guest = test.guest();
  const Trap trap = guest->fault(Mode::prot32, overflow);
  EXPECT_EQ(trap.vector, 4u);
  EXPECT_EQ(trap.rip, code_gpa + 7);
}

GUEST_CODE(bounds, 32, "movl $2, 0x40000; movl $5, 0x40004; mov $6, %eax; bound %eax, 0x40000");
CONTRACT_TEST(Exceptions, Bound) {
  auto guest = test.guest();
  EXPECT_EQ(guest->fault(Mode::prot32, bounds).vector, 5u);
}

GUEST_CODE(misaligned, 64, "mov 0x200001, %eax; out %al, $0xe0");
CONTRACT_TEST(Exceptions, AlignmentCheckAtUserLevel) {
  auto guest = test.guest();
  guest->load(misaligned);
  guest->enter(Mode::long64);
  guest->to_user();
  auto sregs = guest->vcpu().sregs();
  sregs.cr0 |= 0x40000;
  guest->vcpu().set_sregs(sregs);
  auto regs = guest->vcpu().regs();
  regs.rflags |= flag_ac;
  guest->vcpu().set_regs(regs);
  const Trap trap = guest->trap();
  if (trap.vector == 13) test.deviates("no #AC at CPL 3 although CR0.AM and RFLAGS.AC are set");
  EXPECT_EQ(trap.vector, 17u);
  EXPECT_EQ(trap.error, 0u);
}

GUEST_CODE(kernel_misaligned, 64, "mov 0x200001, %eax; out %al, $0xe0");
CONTRACT_TEST(Exceptions, NoAlignmentCheckForTheKernel) {
  auto guest = test.guest();
  guest->load(kernel_misaligned);
  guest->enter(Mode::long64);
  auto sregs = guest->vcpu().sregs();
  sregs.cr0 |= 0x40000;
  guest->vcpu().set_sregs(sregs);
  auto regs = guest->vcpu().regs();
  regs.rflags |= flag_ac;
  guest->vcpu().set_regs(regs);
  guest->finish();
}

GUEST_CODE(double_fault, 64, "mov 0x200000, %rax");
CONTRACT_TEST(Exceptions, AFaultWhileDeliveringAPageFaultIsADoubleFault) {
  auto guest = test.guest();
  guest->load(double_fault);
  guest->enter(Mode::long64);
  guest->at<uint64_t>(pd_gpa + 8) = 0;
  guest->set_gate(14, code64, stubs_gpa + 14 * 16, 0x0e);  // not present: #NP while delivering #PF
  const Trap trap = guest->trap();
  EXPECT_EQ(trap.vector, 8u);
  EXPECT_EQ(trap.error, 0u);
}

CONTRACT_TEST(Exceptions, AFaultWhileDeliveringADoubleFaultShutsDown) {
  auto guest = test.guest();
  guest->load(double_fault);
  guest->enter(Mode::long64);
  guest->at<uint64_t>(pd_gpa + 8) = 0;
  guest->set_gate(14, code64, 0, 0x0e);
  guest->set_gate(8, code64, 0, 0x0e);
  EXPECT_EQ(guest->run().reason(), KVM_EXIT_SHUTDOWN);
}

CONTRACT_TEST(Exceptions, AnExceptionWithoutAnIdtShutsDown) {
  auto guest = test.guest();
  guest->load(undefined);
  guest->enter(Mode::long64);
  auto sregs = guest->vcpu().sregs();
  sregs.idt.limit = 0;
  guest->vcpu().set_sregs(sregs);
  EXPECT_EQ(guest->run().reason(), KVM_EXIT_SHUTDOWN);
}

GUEST_CODE(device_missing, 64, "mov %cr0, %rax; or $8, %rax; mov %rax, %cr0; fnstsw %ax");
CONTRACT_TEST(Exceptions, X87AfterATaskSwitchIsDeviceNotAvailable) {
  auto guest = test.guest();
  guest->load(device_missing);
  guest->enter(Mode::long64);
  const auto exit = guest->run();
  if (!Guest::is_out(exit, trap_port)) test.deviates("x87 with CR0.TS: " + guest->describe(exit));
  EXPECT_EQ((guest->vcpu().regs().rip - stubs_gpa) / 16, 7u);
}

GUEST_CODE(
    simd_error, 64,
    "movl $0x1d80, 0x40000; ldmxcsr 0x40000; xorps %xmm1, %xmm1; mov $0x3f800000, %eax; movd %eax, %xmm0;"
    "divss %xmm1, %xmm0; out %al, $0xe0");
CONTRACT_TEST(Exceptions, AnUnmaskedSimdErrorTraps) {
  auto guest = test.guest();
  EXPECT_EQ(guest->fault(Mode::long64, simd_error).vector, 19u);
}

GUEST_CODE(
    x87_error, 64,
    "fninit; movw $0x37b, 0x40000; fldcw 0x40000; fld1; fldz; fdivrp %st, %st(1); fwait; out %al, $0xe0");
CONTRACT_TEST(Exceptions, AnUnmaskedX87ErrorTrapsAtTheNextX87Instruction) {
  auto guest = test.guest();
  const Trap trap = guest->fault(Mode::long64, x87_error);
  EXPECT_EQ(trap.vector, 16u);
}

GUEST_CODE(user_fault, 64, "ud2");
CONTRACT_TEST(Exceptions, AFaultAtUserLevelSwitchesToTheTasksStack) {
  auto guest = test.guest();
  guest->load(user_fault);
  guest->enter(Mode::long64);
  guest->to_user();
  const Trap trap = guest->trap();
  EXPECT_EQ(trap.vector, 6u);
  EXPECT_EQ(trap.cs, user_code64);
  EXPECT_EQ(trap.ss, user_data);
  EXPECT_EQ(trap.rsp, user_stack);
  EXPECT_EQ(guest->vcpu().regs().rsp, stack - 40);
  EXPECT_EQ(guest->vcpu().sregs().ss.selector & 0xfffc, 0) << "SS is null after a switch to the kernel";
}

CONTRACT_TEST(Exceptions, AnInterruptStackTableEntryIsUsed) {
  auto guest = test.guest();
  guest->load(user_fault);
  guest->enter(Mode::long64);
  guest->at<uint64_t>(tss_gpa + 0x24) = 0x60008;  // IST1; the processor aligns it to 16
  *guest->memory(idt_gpa + 6 * 16 + 4) = 1;
  const Trap trap = guest->trap();
  EXPECT_EQ(trap.vector, 6u);
  EXPECT_EQ(guest->vcpu().regs().rsp, 0x60000u - 40);
  EXPECT_EQ(trap.rsp, stack);
}

GUEST_CODE(enable_and_fault, 64, "sti; nop; ud2");
CONTRACT_TEST(Exceptions, AnInterruptGateClearsIfAndATrapGateKeepsIt) {
  auto guest = test.guest();
  guest->fault(Mode::long64, enable_and_fault);
  EXPECT_EQ(guest->vcpu().regs().rflags & flag_if, 0u);
  guest->enter(Mode::long64);
  guest->set_gate(6, code64, stubs_gpa + 6 * 16, 0x8f);
  guest->trap();
  EXPECT_NE(guest->vcpu().regs().rflags & flag_if, 0u);
}

GUEST_CODE(
    privileged, 64,
    "hlt; nop; nop; cli; nop; nop; mov %rax, %cr3; mov %cr0, %rax; wrmsr; nop; rdmsr; nop; lgdt (%rsp);"
    ".byte 0x0f, 0x08, 0x90; mov %rax, %dr0; clts; nop");
CONTRACT_TEST(Exceptions, PrivilegedInstructionsFaultAtUserLevel) {
  auto guest = test.guest();
  guest->load(privileged);
  for (const uint64_t offset : {0, 3, 6, 9, 12, 15, 25, 28}) {
    guest->enter(Mode::long64, 0, code_gpa + offset);
    guest->to_user();
    const Trap trap = guest->trap();
    EXPECT_EQ(trap.vector, 13u) << "offset " << offset;
    EXPECT_EQ(trap.rip, code_gpa + offset);
  }
}

GUEST_CODE(store_gdt, 64, "sgdt 0x200000; ud2");
CONTRACT_TEST(Exceptions, UmipHidesTheTablesFromUserCode) {
  test.needs_cpuid(7, &kvm_cpuid_entry2::ecx, 2, "UMIP");
  auto guest = test.guest();
  guest->load(store_gdt);
  guest->enter(Mode::long64);
  auto sregs = guest->vcpu().sregs();
  sregs.cr4 |= 0x800;
  guest->vcpu().set_sregs(sregs);
  guest->to_user();
  const Trap trap = guest->trap();
  EXPECT_EQ(trap.vector, 13u);
  EXPECT_EQ(trap.rip, code_gpa);
}

GUEST_CODE(to_ring3, 64,
           "pushq $0x23; pushq $0x6800; pushq $0x3202; pushq $0x2b; lea 1f(%rip), %rax; push %rax; iretq;"
           "1: mov %cs, %ecx; mov %ss, %edx; mov %rsp, %rsi; pushf; pop %rdi; ud2");
CONTRACT_TEST(Exceptions, IretqEntersUserCode) {
  auto guest = test.guest();
  const Trap trap = guest->fault(Mode::long64, to_ring3);
  EXPECT_EQ(trap.vector, 6u);
  const auto regs = guest->vcpu().regs();
  if (regs.rcx != user_code64) test.deviates("user code sees another CS than IRETQ loaded");
  EXPECT_EQ(regs.rdx, user_data);
  EXPECT_EQ(regs.rsi, user_stack);
  EXPECT_EQ(regs.rdi & 0x3200, 0x3200u) << "IF and IOPL as IRET loaded them";
}

GUEST_CODE(iret_bad, 64,
           "pushq $0x10; push %rsp; pushq $2; pushq $8; movabs $0x800000000000, %rax; push %rax; iretq");
CONTRACT_TEST(Exceptions, IretqToANonCanonicalAddressFaults) {
  auto guest = test.guest();
  EXPECT_EQ(guest->fault(Mode::long64, iret_bad).vector, 13u);
}

// STAR: kernel CS 0x08; SYSRET's base 0x1b gives SS 0x23 and 64-bit CS 0x2b.
GUEST_CODE(system_call, 64,
           "mov $0xc0000080, %ecx; rdmsr; or $1, %eax; wrmsr; mov $0xc0000081, %ecx; xor %eax, %eax; mov "
           "$0x001b0008, %edx;"
           "wrmsr; inc %ecx; lea 2f(%rip), %rax; xor %edx, %edx; wrmsr; mov $0xc0000084, %ecx; mov $0x200, "
           "%eax; wrmsr;"
           "lea 1f(%rip), %rcx; mov $0x202, %r11d; sysretq;"
           "1: mov %cs, %r8d; mov %ss, %r9d; pushf; pop %r10; syscall; 3: nop;"
           "2: lea 3b(%rip), %rbx; mov %cs, %r12d; mov %ss, %r13d; pushf; pop %r14; out %al, $0xe0");
CONTRACT_TEST(Exceptions, SyscallAndSysretChangeLevels) {
  auto guest = test.guest();
  guest->load(system_call);
  guest->enter(Mode::long64);
  auto start = guest->vcpu().regs();
  start.rsp = user_stack;  // SYSCALL switches no stack
  guest->vcpu().set_regs(start);
  const auto exit = guest->run();
  if (!Guest::is_out(exit, done_port)) test.deviates("SYSRET and SYSCALL: " + guest->describe(exit));
  const auto regs = guest->vcpu().regs();
  EXPECT_EQ(regs.r8, 0x2bu);
  EXPECT_EQ(regs.r9, 0x23u);
  EXPECT_EQ(regs.r10 & flag_if, flag_if);
  EXPECT_EQ(regs.rcx, regs.rbx) << "RCX holds the return address";
  EXPECT_EQ(regs.r11 & flag_if, flag_if);
  EXPECT_EQ(regs.r12, 0x08u);
  EXPECT_EQ(regs.r13, 0x10u);
  EXPECT_EQ(regs.r14 & flag_if, 0u) << "the mask cleared IF";
}

GUEST_CODE(
    fast_call, 64,
    "mov $0x174, %ecx; mov $8, %eax; xor %edx, %edx; wrmsr; inc %ecx; mov $0x7000, %eax; wrmsr; inc %ecx;"
    "lea 1f(%rip), %rax; wrmsr; mov %cs, %r8d; sysenter; ud2; 1: mov %rsp, %r9; mov %cs, %r10d; out %al, "
    "$0xe0");
CONTRACT_TEST(Exceptions, SysenterTakesItsTargetFromMsrs) {
  auto guest = test.guest();
  guest->load(fast_call);
  guest->enter(Mode::long64);
  const auto exit = guest->run();
  if (!Guest::is_out(exit, done_port)) {
    // AMD processors have no SYSENTER in 64-bit mode (APM volume 3): #UD is right there.
    const bool amd = test.system().supported_cpuid().front().ebx == 0x68747541;  // "Auth"enticAMD
    if (amd && (guest->vcpu().regs().rip - stubs_gpa) / 16 == 6)
      throw Unable("SYSENTER is undefined in 64-bit mode of an AMD processor");
    FAIL() << guest->describe(exit);
  }
  EXPECT_EQ(guest->vcpu().regs().r9, 0x7000u);
  EXPECT_EQ(guest->vcpu().regs().r10, 8u);
}

GUEST_CODE(fast_call32, 32,
           "mov $0x174, %ecx; mov $0x60, %eax; xor %edx, %edx; wrmsr; inc %ecx; mov $0x7000, %eax; wrmsr; inc %ecx;"
           "mov $" AT(1f) ", %eax; wrmsr; mov $0x6800, %ecx; mov $" AT(2f) ", %edx; sysexit; 2: mov %cs, %ebx; mov %ss, %edi;"
           "mov %esp, %ebp; sysenter; 1: mov %esp, %edx; mov %cs, %esi; out %al, $0xe0");
CONTRACT_TEST(Exceptions, SysexitAndSysenterChangeLevels) {
  auto guest = test.guest();
  guest->load(fast_call32);
  guest->enter(Mode::prot32);
  // The four descriptors lie one after the other: code and data of level 0, code and data of level 3.
  guest->at<uint64_t>(gdt_gpa + 0x60) = guest->at<uint64_t>(gdt_gpa + code32);
  guest->at<uint64_t>(gdt_gpa + 0x68) = guest->at<uint64_t>(gdt_gpa + data);
  guest->at<uint64_t>(gdt_gpa + 0x70) = guest->at<uint64_t>(gdt_gpa + (user_code32 & ~3));
  guest->at<uint64_t>(gdt_gpa + 0x78) = guest->at<uint64_t>(gdt_gpa + (user_data & ~3));
  const auto exit = guest->run();
  if (!Guest::is_out(exit, done_port)) test.deviates("SYSEXIT and SYSENTER: " + guest->describe(exit));
  const auto regs = guest->vcpu().regs();
  EXPECT_EQ(regs.rbx, 0x73u);
  EXPECT_EQ(regs.rdi, 0x7bu);
  EXPECT_EQ(regs.rbp, 0x6800u);
  EXPECT_EQ(regs.rdx, 0x7000u);
  EXPECT_EQ(regs.rsi, 0x60u);
}

GUEST_CODE(unknown_msr, 64, "mov $0xdeadbeef, %ecx; rdmsr");
CONTRACT_TEST(Exceptions, AnUnknownMsrFaults) {
  auto guest = test.guest();
  const Trap trap = guest->fault(Mode::long64, unknown_msr);
  EXPECT_EQ(trap.vector, 13u);
  EXPECT_EQ(trap.error, 0u);
}

GUEST_CODE(bad_lstar, 64, "mov $0xc0000082, %ecx; mov $0x8000, %edx; wrmsr; out %al, $0xe0");
CONTRACT_TEST(Exceptions, ANonCanonicalAddressInAnMsrFaults) {
  auto guest = test.guest();
  EXPECT_EQ(guest->fault(Mode::long64, bad_lstar).vector, 13u);
}

GUEST_CODE(bad_cr4, 64, "mov %cr4, %rax; bts $31, %rax; mov %rax, %cr4; out %al, $0xe0");
CONTRACT_TEST(Exceptions, AReservedBitOfCr4Faults) {
  auto guest = test.guest();
  EXPECT_EQ(guest->fault(Mode::long64, bad_cr4).vector, 13u);
}

GUEST_CODE(bad_cr0, 64, "mov %cr0, %rax; bts $29, %rax; btr $30, %rax; mov %rax, %cr0; out %al, $0xe0");
CONTRACT_TEST(Exceptions, NotWriteThroughWithoutCacheDisableFaults) {
  auto guest = test.guest();
  EXPECT_EQ(guest->fault(Mode::long64, bad_cr0).vector, 13u);
}

GUEST_CODE(hidden_popcnt, 64, "popcnt %eax, %eax; out %al, $0xe0");
CONTRACT_TEST(Exceptions, AFeatureHiddenByCpuidIsUndefined) {
  if (!test.soft()) throw Unable("hardware runs POPCNT whatever CPUID says");
  auto guest = test.guest();
  auto cpuid = guest->vcpu().cpuid2();
  for (auto& leaf : cpuid)
    if (leaf.function == 1) leaf.ecx &= ~(1u << 23);
  guest->vcpu().set_cpuid2(cpuid);
  EXPECT_EQ(guest->fault(Mode::long64, hidden_popcnt).vector, 6u);
}

}  // namespace
}  // namespace lodge::contract
