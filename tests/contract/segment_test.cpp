// Protected-mode segmentation, gates, hardware task switches and virtual-8086 mode (SDM volume 3, chapters 3,
// 5, 7, 20).
#include <cstring>

#include "harness.hpp"

namespace lodge::contract {
namespace {

CONTRACT_SUITE(Segments);

std::unique_ptr<Guest> started(Contract& test, std::span<const uint8_t> code) {
  auto guest = test.guest();
  guest->load(code);
  guest->enter(Mode::prot32);
  return guest;
}

GUEST_CODE(beyond_limit, 32, "mov $0x60, %eax; mov %eax, %ds; mov 0xfff, %bl; mov 0x1000, %bl");
CONTRACT_TEST(Segments, AnAccessBeyondTheLimitFaults) {
  auto guest = started(test, beyond_limit);
  guest->set_descriptor(free_selector, 0x40000, 0xfff, 0x93, 0x4);
  *guest->memory(0x40fff) = 0x5a;
  const Trap trap = guest->trap();
  EXPECT_EQ(trap.vector, 13u);
  EXPECT_EQ(trap.error, 0u);
  EXPECT_EQ(trap.rip, code_gpa + 13);
  EXPECT_EQ(guest->vcpu().regs().rbx & 0xff, 0x5au) << "the last byte is within, and the base was added";
}

GUEST_CODE(straddle_limit, 32, "mov $0x60, %eax; mov %eax, %ds; mov 0xffd, %ebx");
CONTRACT_TEST(Segments, AnAccessThatStraddlesTheLimitFaults) {
  auto guest = started(test, straddle_limit);
  guest->set_descriptor(free_selector, 0x40000, 0xfff, 0x93, 0x4);
  EXPECT_EQ(guest->trap().vector, 13u);
}

GUEST_CODE(expand_down, 32, "mov $0x60, %eax; mov %eax, %ds; mov 0x1000, %bl; mov 0xfff, %bl");
CONTRACT_TEST(Segments, AnExpandDownSegmentBeginsAboveItsLimit) {
  auto guest = started(test, expand_down);
  guest->set_descriptor(free_selector, 0x40000, 0xfff, 0x97, 0x4);
  const Trap trap = guest->trap();
  EXPECT_EQ(trap.vector, 13u);
  EXPECT_EQ(trap.rip, code_gpa + 13);
}

GUEST_CODE(stack_limit, 32, "mov $0x60, %eax; mov %eax, %ss; mov $0x1004, %ebp; mov (%ebp), %ebx");
CONTRACT_TEST(Segments, BeyondTheStacksLimitIsAStackFault) {
  auto guest = started(test, stack_limit);
  guest->set_descriptor(free_selector, 0x40000, 0xfff, 0x93, 0x4);
  // Within the segment, for the handler's frame: a fault at the same level keeps the stack.
  auto regs = guest->vcpu().regs();
  regs.rsp = 0x800;
  guest->vcpu().set_regs(regs);
  const auto exit = guest->run();
  ASSERT_TRUE(Guest::is_out(exit, trap_port)) << guest->describe(exit);
  EXPECT_EQ((guest->vcpu().regs().rip - stubs_gpa) / 16, 12u);
}

GUEST_CODE(read_only, 32, "mov $0x60, %eax; mov %eax, %ds; mov 0, %bl; mov %bl, 0");
CONTRACT_TEST(Segments, AReadOnlySegmentRefusesWrites) {
  auto guest = started(test, read_only);
  guest->set_descriptor(free_selector, 0x40000, 0xfff, 0x91, 0x4);
  const Trap trap = guest->trap();
  EXPECT_EQ(trap.vector, 13u);
  EXPECT_EQ(trap.rip, code_gpa + 13);
}

GUEST_CODE(code_write, 32, "movb $1, %cs:0x40000");
CONTRACT_TEST(Segments, ACodeSegmentRefusesWrites) {
  auto guest = started(test, code_write);
  EXPECT_EQ(guest->trap().vector, 13u);
}

GUEST_CODE(null_use, 32, "xor %eax, %eax; mov %eax, %es; mov %es:0, %bl");
CONTRACT_TEST(Segments, ANullSelectorLoadsAndFaultsWhenUsed) {
  auto guest = started(test, null_use);
  const Trap trap = guest->trap();
  EXPECT_EQ(trap.vector, 13u);
  EXPECT_EQ(trap.rip, code_gpa + 4);
}

GUEST_CODE(
    local_table, 32,
    "mov $0x60, %eax; lldt %ax; mov $0xc, %eax; mov %eax, %ds; mov 0, %ebx; sldt %ecx; out %al, $0xe0");
CONTRACT_TEST(Segments, ALocalTableDescribesSegments) {
  auto guest = started(test, local_table);
  guest->set_descriptor(free_selector, 0x40000, 0xf, 0x82, 0);
  guest->at<uint64_t>(0x40008) = 0x0040930500000fff;  // base 0x50000
  guest->at<uint32_t>(0x50000) = 0x1234;
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rbx, 0x1234u);
  EXPECT_EQ(guest->vcpu().regs().rcx & 0xffff, free_selector);
}

GUEST_CODE(
    inspect, 32,
    "mov $0x60, %ecx; lar %ecx, %eax; setz %dl; lsl %ecx, %ebx; setz %dh; verr %cx; setz 0x40000; verw %cx;"
    "setz 0x40001; mov $0x1000, %ecx; lar %ecx, %esi; setz 0x40002; out %al, $0xe0");
CONTRACT_TEST(Segments, LarLslVerrVerwInspectDescriptors) {
  auto guest = started(test, inspect);
  guest->set_descriptor(free_selector, 0x40000, 0x12, 0x91, 0xc);
  std::memset(guest->memory(0x40000), 0xff, 3);
  guest->finish();
  const auto regs = guest->vcpu().regs();
  EXPECT_EQ(regs.rax & 0xf0ff00, 0xc09100u);
  EXPECT_EQ(regs.rbx, 0x12fffu);
  EXPECT_EQ(regs.rdx & 0xffff, 0x101u);
  EXPECT_EQ(guest->at<uint32_t>(0x40000) & 0xffffff, 0x000001u) << "readable, not writable; beyond the table";
}

GUEST_CODE(
    adjust, 32,
    "mov $0x10, %eax; mov $0x23, %ecx; arpl %cx, %ax; setz %bl; arpl %cx, %ax; setz %bh; out %al, $0xe0");
CONTRACT_TEST(Segments, ArplRaisesThePrivilegeLevel) {
  auto guest = started(test, adjust);
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rax & 0xffff, 0x13u);
  EXPECT_EQ(guest->vcpu().regs().rbx & 0xffff, 0x0001u);
}

// A call gate with two parameters: at 0x68, to `gate_target`, callable from level 3.
GUEST_CODE(through_gate, 32,
           "push $0x1111; push $0x2222; lcall $0x68, $0; mov %cs, %edi; mov %esp, %ebp; ud2;"
           "gate_target: mov %cs, %eax; mov %ss, %ebx; mov 8(%esp), %ecx; mov 12(%esp), %edx; mov %esp, "
           "%esi; lret $8");
CONTRACT_TEST(Segments, ACallGateRaisesThePrivilegeAndCopiesParameters) {
  auto guest = started(test, through_gate);
  const uint64_t target = code_gpa + 10 + 7 + 2 + 2 + 2;
  guest->at<uint64_t>(gdt_gpa + 0x68) = target | uint64_t{code32} << 16 | uint64_t{0xec02} << 32;
  guest->to_user();
  const auto exit = guest->run();
  if (!Guest::is_out(exit, trap_port) || (guest->vcpu().regs().rip - stubs_gpa) / 16 != 6)
    test.deviates("far call through a call gate: " + guest->describe(exit));
  const auto regs = guest->vcpu().regs();
  if (regs.rax != code32) test.deviates("far call through a call gate is undefined");
  EXPECT_EQ(regs.rbx, data);
  EXPECT_EQ(regs.rcx, 0x2222u);
  EXPECT_EQ(regs.rdx, 0x1111u);
  EXPECT_EQ(regs.rsi, stack - 24);
  EXPECT_EQ(regs.rdi, user_code32);
  EXPECT_EQ(regs.rbp, user_stack) << "LRET dropped the parameters from both stacks";
}

GUEST_CODE(gate64, 64,
           "lcall *0x40000; ud2; mov %cs, %eax; mov (%rsp), %rbx; mov 8(%rsp), %rcx; out %al, $0xe0");
CONTRACT_TEST(Segments, ASixtyFourBitCallGateHoldsAWholeAddress) {
  auto guest = test.guest();
  guest->load(gate64);
  guest->enter(Mode::long64);
  guest->at<uint32_t>(0x40000) = 0;
  guest->at<uint16_t>(0x40004) = 0x68;
  const uint64_t target = code_gpa + 9;
  guest->at<uint64_t>(gdt_gpa + 0x68) = target | uint64_t{code64} << 16 | uint64_t{0x8c00} << 32;
  guest->at<uint64_t>(gdt_gpa + 0x70) = 0;
  const auto exit = guest->run();
  if (!Guest::is_out(exit, done_port)) test.deviates("64-bit call gate: " + guest->describe(exit));
  EXPECT_EQ(guest->vcpu().regs().rbx, code_gpa + 7);
  EXPECT_EQ(guest->vcpu().regs().rcx, code64);
}

GUEST_CODE(far_return, 32,
           "pushl $0x23; pushl $0x6800; pushl $0x53; pushl $" AT(
               outer) "; lret; outer: mov %cs, %eax; mov %esp, %ebx; ud2");
CONTRACT_TEST(Segments, AFarReturnEntersAnOuterLevel) {
  auto guest = started(test, far_return);
  guest->at<uint64_t>(tss_gpa + 4) = stack | uint64_t{data} << 32;
  EXPECT_EQ(guest->trap().vector, 6u);
  EXPECT_EQ(guest->vcpu().regs().rax, user_code32);
  EXPECT_EQ(guest->vcpu().regs().rbx, user_stack);
}

// --- Hardware tasks
// -------------------------------------------------------------------------------------------------

constexpr uint64_t second_tss = 0x3200;
constexpr uint16_t second_task = 0x60;

// The second task's TSS, which starts at `ip`; its descriptor at 0x60.
void make_task(Guest& guest, uint32_t ip) {
  std::memset(guest.memory(second_tss), 0, 0x68);
  guest.at<uint32_t>(second_tss + 0x20) = ip;
  guest.at<uint32_t>(second_tss + 0x24) = 2;
  guest.at<uint32_t>(second_tss + 0x28) = 0xaaaa;  // EAX
  guest.at<uint32_t>(second_tss + 0x38) = 0x7400;  // ESP
  for (const unsigned offset : {0x48, 0x50, 0x54, 0x58, 0x5c}) guest.at<uint32_t>(second_tss + offset) = data;
  guest.at<uint32_t>(second_tss + 0x4c) = code32;
  guest.at<uint16_t>(second_tss + 0x66) = 0x68;
  guest.set_descriptor(second_task, second_tss, 0x67, 0x89, 0);
}

GUEST_CODE(jump_task, 32,
           "mov $0x1234, %ebx; ljmp $0x60, $0; ud2; other: mov %esp, %ebp; str %ecx; out %al, $0xe0");
CONTRACT_TEST(Segments, AFarJumpSwitchesTasks) {
  auto guest = started(test, jump_task);
  make_task(*guest, code_gpa + 14);
  const auto exit = guest->run();
  if (!Guest::is_out(exit, done_port)) test.deviates("task switch by JMP: " + guest->describe(exit));
  const auto regs = guest->vcpu().regs();
  EXPECT_EQ(regs.rax, 0xaaaau);
  EXPECT_EQ(regs.rbp, 0x7400u);
  EXPECT_EQ(regs.rcx & 0xffff, second_task);
  EXPECT_EQ(guest->at<uint32_t>(tss_gpa + 0x34), 0x1234u) << "the old task's EBX is saved";
  EXPECT_EQ(guest->at<uint32_t>(tss_gpa + 0x20), code_gpa + 12) << "and where it goes on";
  EXPECT_EQ(*guest->memory(gdt_gpa + task + 5), 0x89) << "no longer busy";
  EXPECT_EQ(*guest->memory(gdt_gpa + second_task + 5), 0x8b) << "busy";
  EXPECT_NE(guest->vcpu().sregs().cr0 & 8, 0u) << "CR0.TS";
}

GUEST_CODE(call_task, 32,
           "lcall $0x60, $0; mov $0x77, %ecx; out %al, $0xe0; pushf; pop %edx; mov %edx, 0x40000; iret");
CONTRACT_TEST(Segments, ATaskCallNestsAndIretReturns) {
  auto guest = started(test, call_task);
  make_task(*guest, code_gpa + 14);
  const auto exit = guest->run();
  if (!Guest::is_out(exit, done_port)) test.deviates("task switch by CALL: " + guest->describe(exit));
  EXPECT_EQ(guest->vcpu().regs().rcx, 0x77u);
  EXPECT_NE(guest->at<uint32_t>(0x40000) & 0x4000, 0u) << "NT was set in the nested task";
  EXPECT_EQ(guest->at<uint16_t>(second_tss), task) << "its back link";
  EXPECT_EQ(*guest->memory(gdt_gpa + second_task + 5), 0x89);
}

GUEST_CODE(fault_task, 32, "mov $0x1008, %eax; mov %eax, %ds; ud2; pop %ebx; str %ecx; out %al, $0xe0");
CONTRACT_TEST(Segments, ATaskGateHandlesAFaultWithItsErrorCode) {
  auto guest = started(test, fault_task);
  make_task(*guest, code_gpa + 9);
  guest->at<uint64_t>(idt_gpa + 13 * 8) = uint64_t{second_task} << 16 | uint64_t{0x8500} << 32;
  const auto exit = guest->run();
  if (!Guest::is_out(exit, done_port)) test.deviates("task gate: " + guest->describe(exit));
  EXPECT_EQ(guest->vcpu().regs().rbx, 0x1008u);
  EXPECT_EQ(guest->vcpu().regs().rcx & 0xffff, second_task);
  EXPECT_EQ(guest->at<uint32_t>(tss_gpa + 0x20), code_gpa + 5) << "the faulting instruction";
}

GUEST_CODE(busy_task, 32, "ljmp $0x40, $0");
CONTRACT_TEST(Segments, ABusyTaskCannotBeEntered) {
  auto guest = started(test, busy_task);
  const auto exit = guest->run();
  if (!Guest::is_out(exit, trap_port)) test.deviates("jump to a busy task: " + guest->describe(exit));
  EXPECT_EQ((guest->vcpu().regs().rip - stubs_gpa) / 16, 13u);
}

// --- Virtual-8086 mode
// ----------------------------------------------------------------------------------------------

// IRETD to VM86 at 0x5000:0 (DS 0x4000, SS 0x6000) with the given EFLAGS in EDX.
GUEST_CODE(enter_v86, 32,
           "xor %eax, %eax; pushl %eax; pushl %eax; pushl $0x4000; pushl $0x4000; pushl $0x6000; pushl "
           "$0x1000; pushl %edx;"
           "pushl $0x5000; pushl $0; iret");
std::unique_ptr<Guest> v86(Contract& test, std::initializer_list<uint8_t> code, uint32_t iopl = 0) {
  auto guest = started(test, enter_v86);
  std::copy(code.begin(), code.end(), guest->memory(0x50000));
  auto regs = guest->vcpu().regs();
  regs.rdx = 0x20002 | iopl << 12;
  guest->vcpu().set_regs(regs);
  return guest;
}

CONTRACT_TEST(Segments, VirtualModeAddressesAsRealModeDoes) {
  // movw $0x1234, 0x10; mov $0x77, %bl; push %cs; int $0x50
  auto guest = v86(test, {0xc7, 0x06, 0x10, 0x00, 0x34, 0x12, 0xb3, 0x77, 0x0e, 0xcd, 0x50}, 3);
  guest->set_gate(0x50, code32, stubs_gpa + 0x500, 0xee);
  const auto exit = guest->run();
  if (!Guest::is_out(exit, trap_port) || (guest->vcpu().regs().rip - stubs_gpa) / 16 != 0x50)
    test.deviates("virtual-8086 mode: " + guest->describe(exit));
  EXPECT_EQ(guest->at<uint16_t>(0x40010), 0x1234);
  EXPECT_EQ(guest->at<uint16_t>(0x60ffe), 0x5000);
  const auto regs = guest->vcpu().regs();
  EXPECT_EQ(regs.rbx & 0xff, 0x77u);
  EXPECT_EQ(regs.rflags & 0x20000, 0u) << "the handler runs in protected mode";
  // The frame: EIP CS EFLAGS ESP SS ES DS FS GS, from the level-0 stack.
  EXPECT_EQ(regs.rsp, stack - 36);
  EXPECT_EQ(guest->at<uint32_t>(regs.rsp), 11u);
  EXPECT_EQ(guest->at<uint32_t>(regs.rsp + 4), 0x5000u);
  EXPECT_NE(guest->at<uint32_t>(regs.rsp + 8) & 0x20000, 0u);
  EXPECT_EQ(guest->at<uint32_t>(regs.rsp + 12), 0xffeu);
  EXPECT_EQ(guest->at<uint32_t>(regs.rsp + 16), 0x6000u);
  EXPECT_EQ(guest->at<uint32_t>(regs.rsp + 24), 0x4000u) << "DS";
  EXPECT_EQ(guest->vcpu().sregs().ds.selector, 0);
}

CONTRACT_TEST(Segments, VirtualModeWithoutPrivilegeFaultsOnInterruptFlagAndIntN) {
  for (const uint8_t opcode : {0xfa, 0xfb, 0x9c, 0x9d, 0xcf, 0xcd}) {  // cli sti pushf popf iret int
    auto guest = v86(test, {opcode, 0x50});
    const auto exit = guest->run();
    if (!Guest::is_out(exit, trap_port)) test.deviates("virtual-8086 mode: " + guest->describe(exit));
    EXPECT_EQ((guest->vcpu().regs().rip - stubs_gpa) / 16, 13u) << "opcode " << int{opcode};
  }
}

CONTRACT_TEST(Segments, VirtualModeHasNoPrivilegedInstructions) {
  auto guest = v86(test, {0xf4}, 3);
  const auto exit = guest->run();
  if (!Guest::is_out(exit, trap_port)) test.deviates("virtual-8086 mode: " + guest->describe(exit));
  EXPECT_EQ((guest->vcpu().regs().rip - stubs_gpa) / 16, 13u);
}

}  // namespace
}  // namespace lodge::contract
