// Processor modes, their switches, and the two plainest exits.
#include "harness.hpp"

namespace lodge::contract {
namespace {

CONTRACT_SUITE(Modes);

GUEST_CODE(real_halt, 16, "mov $0x1234, %ax; hlt");
CONTRACT_TEST(Modes, RealModeHaltExitsAfterTheInstruction) {
  auto guest = test.guest();
  guest->load(real_halt);
  guest->enter(Mode::real);
  EXPECT_EQ(guest->run().reason(), KVM_EXIT_HLT);
  EXPECT_EQ(guest->vcpu().regs().rax, 0x1234u);
  EXPECT_EQ(guest->vcpu().regs().rip, code_gpa + 4);
}

GUEST_CODE(real_out, 16, "mov $0x3f8, %dx; mov $0x41, %al; out %al, %dx; inc %al; out %al, $0xe0");
CONTRACT_TEST(Modes, RealModeOutExitsWithPortAndData) {
  auto guest = test.guest();
  guest->load(real_out);
  guest->enter(Mode::real);
  const auto exit = guest->run();
  ASSERT_EQ(exit.reason(), KVM_EXIT_IO) << exit.describe();
  EXPECT_TRUE(exit.io().out);
  EXPECT_EQ(exit.io().port, 0x3f8);
  EXPECT_EQ(exit.io().size, 1);
  EXPECT_EQ(exit.io().count, 1u);
  EXPECT_EQ(exit.io().data[0], 0x41);
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rax & 0xff, 0x42u);
}

GUEST_CODE(real_segments, 16,
           "mov $0x3000, %ax; mov %ax, %ds; movw $0x55aa, 0x10; mov %ax, %es; mov %es:0x10, %bx;"
           "mov $0x4000, %ax; mov %ax, %ss; mov $0x100, %sp; push %bx; out %al, $0xe0");
CONTRACT_TEST(Modes, RealModeSegmentsAreSixteenTimesTheSelector) {
  auto guest = test.guest({.ram = 4 << 20});
  const auto regs = guest->result(Mode::real, real_segments);
  EXPECT_EQ(guest->at<uint16_t>(0x30010), 0x55aa);
  EXPECT_EQ(guest->at<uint16_t>(0x400fe), 0x55aa);
  EXPECT_EQ(regs.rbx & 0xffff, 0x55aau);
  EXPECT_EQ(regs.rsp & 0xffff, 0xfeu);
}

GUEST_CODE(prot16_add, 16, "mov $0xfff0, %ax; add $0x20, %ax; setc %bl; push %ax; pop %cx; out %al, $0xe0");
CONTRACT_TEST(Modes, SixteenBitProtectedModeComputes) {
  auto guest = test.guest();
  const auto regs = guest->result(Mode::prot16, prot16_add);
  EXPECT_EQ(regs.rcx & 0xffff, 0x10u);
  EXPECT_EQ(regs.rbx & 0xff, 1u);
}

GUEST_CODE(prot32_add, 32,
           "mov $0xfffffff0, %eax; add $0x20, %eax; setc %bl; push %eax; pop %ecx; out %al, $0xe0");
CONTRACT_TEST(Modes, ThirtyTwoBitProtectedModeComputes) {
  auto guest = test.guest();
  const auto regs = guest->result(Mode::prot32, prot32_add);
  EXPECT_EQ(regs.rcx, 0x10u);
  EXPECT_EQ(regs.rbx & 0xff, 1u);
}
CONTRACT_TEST(Modes, ThirtyTwoBitPagingComputes) {
  test.needs(Mode::paged32);
  auto guest = test.guest();
  EXPECT_EQ(guest->result(Mode::paged32, prot32_add).rcx, 0x10u);
}
CONTRACT_TEST(Modes, PaePagingComputes) {
  test.needs(Mode::pae32);
  auto guest = test.guest();
  EXPECT_EQ(guest->result(Mode::pae32, prot32_add).rcx, 0x10u);
}

GUEST_CODE(long64_add, 64,
           "mov $0xfffffffffffffff0, %rax; add $0x20, %rax; setc %bl; mov %rax, %r15; mov $-1, %rdx;"
           "mov $7, %edx; push %r15; pop %rcx; out %al, $0xe0");
CONTRACT_TEST(Modes, LongModeComputes) {
  auto guest = test.guest();
  const auto regs = guest->result(Mode::long64, long64_add);
  EXPECT_EQ(regs.rcx, 0x10u);
  EXPECT_EQ(regs.r15, 0x10u);
  EXPECT_EQ(regs.rbx & 0xff, 1u);
  EXPECT_EQ(regs.rdx, 7u) << "a 32-bit write clears the upper half";
}

// From real mode through 32-bit protected mode and PAE paging into 64-bit mode, as a boot loader does it.
GUEST_CODE(climb, 16,
           "cli; lgdtl " AT(climb_gdtr) "; mov %cr0, %eax; or $1, %al; mov %eax, %cr0; ljmpl $0x18, $" AT(climb32) ";"
           "climb_gdtr: .word 0xfff; .long 0x1000; .code32; climb32: mov $0x10, %eax; mov %eax, %ds; mov %eax, %ss;"
           "mov $0x20000, %eax; mov %eax, %cr3; mov %cr4, %eax; or $0x20, %eax; mov %eax, %cr4;"
           "mov $0xc0000080, %ecx; rdmsr; or $0x100, %eax; wrmsr; mov %cr0, %eax; or $0x80000000, %eax;"
           "mov %eax, %cr0; ljmp $8, $" AT(climb64) "; .code64; climb64: mov $0x123456789abcdef0, %rbx;"
           "mov $0xc0000080, %ecx; rdmsr; out %al, $0xe0");
CONTRACT_TEST(Modes, AGuestClimbsFromRealToLongMode) {
  auto guest = test.guest();
  guest->load(climb);
  guest->enter(Mode::long64);  // fills the tables
  guest->enter(Mode::real);
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rbx, 0x123456789abcdef0u);
  EXPECT_EQ(guest->vcpu().regs().rax & 0x500, 0x500u) << "EFER.LMA follows CR0.PG";
  EXPECT_TRUE(guest->vcpu().sregs().cs.l);
}

GUEST_CODE(compat, 64,
           "lea compat_far(%rip), %rax; ljmpl *(%rax); compat_far: .long " AT(compat32) "; .word 0x18;"
           ".code32; compat32: mov $-1, %eax; inc %eax; dec %eax; mov %eax, %ebx; ljmp $8, $" AT(compat64) ";"
           ".code64; compat64: mov %cs, %ecx; out %al, $0xe0");
CONTRACT_TEST(Modes, CompatibilityModeRunsThirtyTwoBitCode) {
  auto guest = test.guest();
  const auto regs = guest->result(Mode::long64, compat);
  EXPECT_EQ(regs.rbx, 0xffffffffu) << "40 and 48 are INC and DEC there, not REX prefixes";
  EXPECT_EQ(regs.rcx, code64);
}

GUEST_CODE(down, 32,
           "ljmp $0x30, $" AT(down16) "; .code16; down16: mov $0x38, %ax; mov %ax, %ds; mov %ax, %ss; mov %ax, %es;"
           "lidtl " AT(down_idtr) "; mov %cr0, %eax; and $0xfe, %al; mov %eax, %cr0; ljmp $0, $" AT(down_real) ";"
           "down_idtr: .word 0x3ff; .long 0; down_real: xor %ax, %ax; mov %ax, %ds; mov %ax, %ss; mov $0x7000, %sp;"
           "mov $0x77, %bl; out %al, $0xe0");
CONTRACT_TEST(Modes, AGuestReturnsFromProtectedToRealMode) {
  auto guest = test.guest();
  const auto regs = guest->result(Mode::prot32, down);
  EXPECT_EQ(regs.rbx & 0xff, 0x77u);
  EXPECT_EQ(guest->vcpu().sregs().cr0 & 1, 0u);
}

// Big real mode: segment limits loaded in protected mode outlive the return (firmware relies on it).
GUEST_CODE(unreal, 16,
           "cli; lgdtl " AT(unreal_gdtr) "; mov %cr0, %eax; or $1, %al; mov %eax, %cr0; jmp 1f; 1: mov $0x10, %bx;"
           "mov %bx, %ds; and $0xfe, %al; mov %eax, %cr0; ljmp $0, $" AT(unreal_back) ";"
           "unreal_gdtr: .word 0xfff; .long 0x1000; unreal_back: xor %ax, %ax; mov %ax, %ds; mov $0x200000, %esi;"
           "movl $0xcafe, (%esi); out %al, $0xe0");
CONTRACT_TEST(Modes, BigRealModeKeepsTheLimits) {
  auto guest = test.guest();
  guest->load(unreal);
  guest->enter(Mode::prot32);  // fills the GDT
  guest->enter(Mode::real);
  guest->finish();
  EXPECT_EQ(guest->at<uint32_t>(0x200000), 0xcafeu);
}

}  // namespace
}  // namespace lodge::contract
