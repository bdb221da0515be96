// Accesses outside every slot leave as KVM_EXIT_MMIO, in pieces of at most 8 bytes that cross no page.
#include <cstring>

#include "harness.hpp"

namespace lodge::contract {
namespace {

CONTRACT_SUITE(Mmio);

void expect_write(Guest& guest, uint64_t gpa, unsigned size, uint64_t value) {
  const auto exit = guest.run();
  ASSERT_EQ(exit.status(), 0);
  ASSERT_EQ(exit.reason(), KVM_EXIT_MMIO) << guest.describe(exit);
  EXPECT_TRUE(exit.mmio().write);
  EXPECT_EQ(exit.mmio().gpa, gpa);
  ASSERT_EQ(exit.mmio().data.size(), size);
  uint64_t seen = 0;
  std::memcpy(&seen, exit.mmio().data.data(), size);
  EXPECT_EQ(seen, value);
}

void answer_read(Guest& guest, uint64_t gpa, unsigned size, uint64_t value) {
  const auto exit = guest.run();
  ASSERT_EQ(exit.status(), 0);
  ASSERT_EQ(exit.reason(), KVM_EXIT_MMIO) << guest.describe(exit);
  EXPECT_FALSE(exit.mmio().write);
  EXPECT_EQ(exit.mmio().gpa, gpa);
  ASSERT_EQ(exit.mmio().data.size(), size);
  std::memcpy(exit.mmio().data.data(), &value, size);
}

std::unique_ptr<Guest> started(Contract& test, std::span<const uint8_t> code, Mode mode = Mode::long64) {
  auto guest = test.guest();
  guest->load(code);
  guest->enter(mode);
  return guest;
}

GUEST_CODE(writes, 64,
           "mov $0xd0000000, %ebx; movabs $0x1122334455667788, %rax; mov %al, 1(%rbx); mov %ax, 2(%rbx);"
           "mov %eax, 4(%rbx); mov %rax, 8(%rbx); movl $0xabcd, 16(%rbx); out %al, $0xe0");
CONTRACT_TEST(Mmio, WritesOfEverySizeExitWithTheirData) {
  auto guest = started(test, writes);
  expect_write(*guest, 0xd0000001, 1, 0x88);
  expect_write(*guest, 0xd0000002, 2, 0x7788);
  expect_write(*guest, 0xd0000004, 4, 0x55667788);
  expect_write(*guest, 0xd0000008, 8, 0x1122334455667788);
  expect_write(*guest, 0xd0000010, 4, 0xabcd);
  guest->finish();
}

GUEST_CODE(
    reads, 64,
    "mov $0xd0000000, %ebp; mov $-1, %rax; mov $-1, %rbx; mov $-1, %rcx; mov $-1, %rdx; mov 1(%rbp), %al;"
    "mov 2(%rbp), %bx; mov 4(%rbp), %ecx; mov 8(%rbp), %rdx; movzbl (%rbp), %esi; movswq (%rbp), %rdi;"
    "movslq (%rbp), %r8; out %al, $0xe0");
CONTRACT_TEST(Mmio, ReadsOfEverySizeTakeTheAnswer) {
  auto guest = started(test, reads);
  answer_read(*guest, 0xd0000001, 1, 0x12);
  answer_read(*guest, 0xd0000002, 2, 0x3456);
  answer_read(*guest, 0xd0000004, 4, 0x89abcdef);
  answer_read(*guest, 0xd0000008, 8, 0x123456789abcdef0);
  answer_read(*guest, 0xd0000000, 1, 0xff);
  answer_read(*guest, 0xd0000000, 2, 0x8001);
  answer_read(*guest, 0xd0000000, 4, 0x80000001);
  guest->finish();
  const auto regs = guest->vcpu().regs();
  EXPECT_EQ(regs.rax, 0xffffffffffffff12u);
  EXPECT_EQ(regs.rbx, 0xffffffffffff3456u);
  EXPECT_EQ(regs.rcx, 0x89abcdefu);
  EXPECT_EQ(regs.rdx, 0x123456789abcdef0u);
  EXPECT_EQ(regs.rsi, 0xffu);
  EXPECT_EQ(regs.rdi, 0xffffffffffff8001u);
  EXPECT_EQ(regs.r8, 0xffffffff80000001u);
}

GUEST_CODE(modify, 64,
           "mov $0xd0000000, %ebx; orl $0x10, (%rbx); incw 8(%rbx); setc %cl; lock addl $5, 4(%rbx); out "
           "%al, $0xe0");
CONTRACT_TEST(Mmio, ReadModifyWriteReadsAndThenWrites) {
  auto guest = started(test, modify);
  answer_read(*guest, 0xd0000000, 4, 0x8001);
  expect_write(*guest, 0xd0000000, 4, 0x8011);
  answer_read(*guest, 0xd0000008, 2, 0xffff);
  expect_write(*guest, 0xd0000008, 2, 0);
  answer_read(*guest, 0xd0000004, 4, 7);
  expect_write(*guest, 0xd0000004, 4, 12);
  guest->finish();
}

GUEST_CODE(exchange, 64, "mov $0xd0000000, %ebx; mov $0x1234, %eax; xchg %eax, (%rbx); out %al, $0xe0");
CONTRACT_TEST(Mmio, ExchangeReadsAndWrites) {
  auto guest = started(test, exchange);
  answer_read(*guest, 0xd0000000, 4, 0x9999);
  expect_write(*guest, 0xd0000000, 4, 0x1234);
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rax, 0x9999u);
}

GUEST_CODE(compare, 64,
           "mov $0xd0000000, %ebx; cmpl $5, (%rbx); sete %al; testb $4, 4(%rbx); setnz %cl; add 8(%rbx), "
           "%rdx; out %al, $0xe0");
CONTRACT_TEST(Mmio, AnOperandMayBeADevice) {
  auto guest = started(test, compare);
  answer_read(*guest, 0xd0000000, 4, 5);
  answer_read(*guest, 0xd0000004, 1, 4);
  answer_read(*guest, 0xd0000008, 8, 0x700000000);
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rax & 0xff, 1u);
  EXPECT_EQ(guest->vcpu().regs().rcx & 0xff, 1u);
  EXPECT_EQ(guest->vcpu().regs().rdx, 0x700000000u);
}

GUEST_CODE(mmio_crossing, 64,
           "mov $0xd0000ffc, %ebx; movabs $0x1122334455667788, %rax; mov %rax, (%rbx); mov (%rbx), %rcx; out "
           "%al, $0xe0");
CONTRACT_TEST(Mmio, AnAccessAcrossPagesExitsOnceAPage) {
  auto guest = started(test, mmio_crossing);
  expect_write(*guest, 0xd0000ffc, 4, 0x55667788);
  expect_write(*guest, 0xd0001000, 4, 0x11223344);
  answer_read(*guest, 0xd0000ffc, 4, 0xaaaaaaaa);
  answer_read(*guest, 0xd0001000, 4, 0xbbbbbbbb);
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rcx, 0xbbbbbbbbaaaaaaaau);
}

GUEST_CODE(leaving_ram, 64,
           "mov $0x3ffffd, %ebx; movabs $0x1122334455667788, %rax; mov %rax, (%rbx); mov (%rbx), %rcx; out "
           "%al, $0xe0");
CONTRACT_TEST(Mmio, AnAccessMayBeginInRamAndEndOutside) {
  auto guest = started(test, leaving_ram);
  expect_write(*guest, 0x400000, 5, 0x1122334455);
  EXPECT_EQ(guest->at<uint16_t>(0x3ffffd), 0x7788);
  answer_read(*guest, 0x400000, 5, 0x0504030201);
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rcx, 0x0504030201667788u);
}

GUEST_CODE(string_store, 64,
           "mov $0xd0000000, %edi; mov $0x5a, %eax; mov $3, %ecx; rep stosl; out %al, $0xe0");
CONTRACT_TEST(Mmio, RepStosWritesItemByItem) {
  auto guest = started(test, string_store);
  for (unsigned i = 0; i < 3; ++i) expect_write(*guest, 0xd0000000 + i * 4, 4, 0x5a);
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rcx, 0u);
  EXPECT_EQ(guest->vcpu().regs().rdi, 0xd000000cu);
}

GUEST_CODE(string_move, 64,
           "mov $0xd0000000, %esi; mov $0x40000, %edi; mov $3, %ecx; rep movsw; mov $0x40000, %esi; mov "
           "$0xd0001000, %edi;"
           "mov $2, %ecx; rep movsb; out %al, $0xe0");
CONTRACT_TEST(Mmio, RepMovsCopiesFromAndToADevice) {
  auto guest = started(test, string_move);
  answer_read(*guest, 0xd0000000, 2, 0x1111);
  answer_read(*guest, 0xd0000002, 2, 0x2222);
  answer_read(*guest, 0xd0000004, 2, 0x3333);
  expect_write(*guest, 0xd0001000, 1, 0x11);
  expect_write(*guest, 0xd0001001, 1, 0x11);
  guest->finish();
  EXPECT_EQ(guest->at<uint64_t>(0x40000), 0x333322221111u);
}

GUEST_CODE(pushed, 64, "mov $0xd0000000, %ebx; push (%rbx); pop 8(%rbx); out %al, $0xe0");
CONTRACT_TEST(Mmio, PushAndPopMayNameADevice) {
  auto guest = started(test, pushed);
  answer_read(*guest, 0xd0000000, 8, 0x123456789);
  expect_write(*guest, 0xd0000008, 8, 0x123456789);
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rsp, stack);
}

GUEST_CODE(vector_access, 64,
           "mov $0xd0000000, %ebx; movdqu (%rbx), %xmm0; movdqu %xmm0, 16(%rbx); out %al, $0xe0");
CONTRACT_TEST(Mmio, ASixteenByteAccessExitsInTwoPieces) {
  auto guest = started(test, vector_access);
  answer_read(*guest, 0xd0000000, 8, 0x1111);
  answer_read(*guest, 0xd0000008, 8, 0x2222);
  expect_write(*guest, 0xd0000010, 8, 0x1111);
  expect_write(*guest, 0xd0000018, 8, 0x2222);
  guest->finish();
}

GUEST_CODE(real_mmio, 16,
           "mov $0xb800, %ax; mov %ax, %es; movw $0x741, %es:0x10; mov %es:0x12, %bl; out %al, $0xe0");
CONTRACT_TEST(Mmio, RealModeReachesDevices) {
  auto guest = test.guest({.ram = 0xa0000});
  guest->load(real_mmio);
  guest->enter(Mode::real);
  expect_write(*guest, 0xb8010, 2, 0x741);
  answer_read(*guest, 0xb8012, 1, 0x55);
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rbx & 0xff, 0x55u);
}

CONTRACT_TEST(Mmio, AnExitMayBeInterruptedBeforeItIsCompleted) {
  auto guest = started(test, reads);
  answer_read(*guest, 0xd0000001, 1, 0x12);
  // immediate_exit completes the access and returns before the next instruction (api.rst, section 5).
  guest->vcpu().shared().immediate_exit = 1;
  EXPECT_EQ(guest->vcpu().run().status(), -EINTR);
  guest->vcpu().shared().immediate_exit = 0;
  EXPECT_EQ(guest->vcpu().regs().rax & 0xff, 0x12u);
  answer_read(*guest, 0xd0000002, 2, 0);
}

}  // namespace
}  // namespace lodge::contract
