// Port I/O: sizes, string I/O with its count, and permission.
#include <algorithm>
#include <cstring>

#include "harness.hpp"

namespace lodge::contract {
namespace {

CONTRACT_SUITE(PortIo);

std::unique_ptr<Guest> started(Contract& test, std::span<const uint8_t> code, Mode mode = Mode::long64) {
  auto guest = test.guest();
  guest->load(code);
  guest->enter(mode);
  return guest;
}

GUEST_CODE(
    out_sizes, 64,
    "mov $0x11223344, %eax; out %al, $0x10; out %ax, $0x11; out %eax, $0x12; mov $0xffff, %edx; out %al, %dx;"
    "out %al, $0xe0");
CONTRACT_TEST(PortIo, OutOfEverySizeExits) {
  auto guest = started(test, out_sizes);
  const struct {
    uint16_t port;
    uint8_t size;
    uint32_t value;
  } expected[] = {{0x10, 1, 0x44}, {0x11, 2, 0x3344}, {0x12, 4, 0x11223344}, {0xffff, 1, 0x44}};
  for (const auto& want : expected) {
    const auto exit = guest->run();
    ASSERT_EQ(exit.reason(), KVM_EXIT_IO) << guest->describe(exit);
    EXPECT_EQ(exit.io().port, want.port);
    ASSERT_EQ(exit.io().size, want.size);
    uint32_t value = 0;
    std::memcpy(&value, exit.io().data.data(), want.size);
    EXPECT_EQ(value, want.value);
  }
  guest->finish();
}

GUEST_CODE(in_sizes, 64,
           "mov $-1, %rax; in $0x10, %al; mov %rax, %rbx; mov $-1, %rax; in $0x10, %ax; mov %rax, %rcx; mov "
           "$-1, %rax;"
           "mov $0x10, %edx; in %dx, %eax; out %al, $0xe0");
CONTRACT_TEST(PortIo, InOfEverySizeTakesTheAnswer) {
  auto guest = started(test, in_sizes);
  for (const uint8_t size : {1, 2, 4}) {
    const auto exit = guest->run();
    ASSERT_EQ(exit.reason(), KVM_EXIT_IO) << guest->describe(exit);
    EXPECT_FALSE(exit.io().out);
    ASSERT_EQ(exit.io().size, size);
    const uint32_t value = 0x89abcdef;
    std::memcpy(exit.io().data.data(), &value, size);
  }
  guest->finish();
  const auto regs = guest->vcpu().regs();
  EXPECT_EQ(regs.rbx, 0xffffffffffffffefu);
  EXPECT_EQ(regs.rcx, 0xffffffffffffcdefu);
  EXPECT_EQ(regs.rax, 0x89abcdefu) << "a 32-bit IN clears the upper half";
}

// How a string instruction is cut into exits is the accelerator's choice; the items and their order are not.
std::vector<uint8_t> collect_out(Guest& guest, uint16_t port, uint8_t size, size_t bytes) {
  std::vector<uint8_t> data;
  while (data.size() < bytes) {
    const auto exit = guest.run();
    if (exit.reason() != KVM_EXIT_IO || exit.io().port != port)
      throw std::runtime_error(guest.describe(exit));
    EXPECT_TRUE(exit.io().out);
    EXPECT_EQ(exit.io().size, size);
    EXPECT_EQ(exit.io().data.size(), size_t{size} * exit.io().count);
    data.insert(data.end(), exit.io().data.begin(), exit.io().data.end());
  }
  return data;
}

GUEST_CODE(rep_outs, 64, "mov $0x40000, %esi; mov $5, %ecx; mov $0x20, %edx; rep outsw; out %al, $0xe0");
CONTRACT_TEST(PortIo, RepOutsSendsEveryItem) {
  auto guest = started(test, rep_outs);
  for (uint8_t i = 0; i < 12; ++i) *guest->memory(0x40000 + i) = i;
  EXPECT_THAT(collect_out(*guest, 0x20, 2, 10), ::testing::ElementsAre(0, 1, 2, 3, 4, 5, 6, 7, 8, 9));
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rsi, 0x4000au);
  EXPECT_EQ(guest->vcpu().regs().rcx, 0u);
}

GUEST_CODE(rep_outs_down, 64,
           "std; mov $0x40004, %esi; mov $3, %ecx; mov $0x20, %edx; rep outsb; out %al, $0xe0");
CONTRACT_TEST(PortIo, RepOutsFollowsTheDirectionFlag) {
  auto guest = started(test, rep_outs_down);
  for (uint8_t i = 0; i < 12; ++i) *guest->memory(0x40000 + i) = i;
  EXPECT_THAT(collect_out(*guest, 0x20, 1, 3), ::testing::ElementsAre(4, 3, 2));
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rsi, 0x40001u);
}

GUEST_CODE(rep_ins, 64, "mov $0x40ffe, %edi; mov $6, %ecx; mov $0x20, %edx; rep insb; out %al, $0xe0");
CONTRACT_TEST(PortIo, RepInsStoresEveryItemAcrossPages) {
  auto guest = started(test, rep_ins);
  uint8_t next = 1;
  while (next <= 6) {
    const auto exit = guest->run();
    ASSERT_EQ(exit.reason(), KVM_EXIT_IO) << guest->describe(exit);
    ASSERT_FALSE(exit.io().out);
    ASSERT_EQ(exit.io().port, 0x20);
    for (auto& byte : exit.io().data) byte = next++;
  }
  guest->finish();
  EXPECT_EQ(guest->at<uint32_t>(0x40ffe), 0x04030201u);
  EXPECT_EQ(guest->at<uint16_t>(0x41002), 0x0605u);
  EXPECT_EQ(guest->vcpu().regs().rdi, 0x41004u);
  EXPECT_EQ(guest->vcpu().regs().rcx, 0u);
}

GUEST_CODE(rep_none, 64,
           "xor %ecx, %ecx; mov $0x20, %edx; mov $0x40000, %edi; rep insb; rep outsb; out %al, $0xe0");
CONTRACT_TEST(PortIo, ARepeatCountOfZeroDoesNothing) {
  auto guest = started(test, rep_none);
  guest->finish();
}

GUEST_CODE(rep_many, 64, "mov $0x40000, %esi; mov $6000, %ecx; mov $0x20, %edx; rep outsb; out %al, $0xe0");
CONTRACT_TEST(PortIo, ALongStringFitsIntoTheSharedStructure) {
  auto guest = started(test, rep_many);
  for (unsigned i = 0; i < 6000; ++i) *guest->memory(0x40000 + i) = static_cast<uint8_t>(i * 7);
  const auto sent = collect_out(*guest, 0x20, 1, 6000);
  ASSERT_EQ(sent.size(), 6000u);
  EXPECT_EQ(std::memcmp(sent.data(), guest->memory(0x40000), 6000), 0);
  guest->finish();
}

GUEST_CODE(user_out, 64, "out %al, $0x80");
CONTRACT_TEST(PortIo, UserCodeWithoutPrivilegeFaults) {
  auto guest = started(test, user_out);
  guest->to_user();
  const Trap trap = guest->trap();
  EXPECT_EQ(trap.vector, 13u);
  EXPECT_EQ(trap.error, 0u);
  EXPECT_EQ(trap.rip, code_gpa);
}

CONTRACT_TEST(PortIo, IoPrivilegeLevelThreeAllowsUserCode) {
  auto guest = started(test, user_out);
  guest->to_user();
  auto regs = guest->vcpu().regs();
  regs.rflags |= 0x3000;
  guest->vcpu().set_regs(regs);
  const auto exit = guest->run();
  if (!Guest::is_out(exit, 0x80)) test.deviates("OUT at CPL 3 with IOPL 3: " + guest->describe(exit));
}

GUEST_CODE(user_bitmap, 64, "out %al, $0x81; out %al, $0x80");
CONTRACT_TEST(PortIo, TheTasksBitmapAllowsSinglePorts) {
  auto guest = started(test, user_bitmap);
  guest->at<uint16_t>(tss_gpa + 0x66) = 0x68;
  std::memset(guest->memory(tss_gpa + 0x68), 0xff, 0x100);
  *guest->memory(tss_gpa + 0x68 + 0x80 / 8) = 0xfd;  // port 0x81
  auto sregs = guest->vcpu().sregs();
  sregs.tr.limit = 0x167;
  guest->vcpu().set_sregs(sregs);
  guest->to_user();
  const auto exit = guest->run();
  ASSERT_TRUE(Guest::is_out(exit, 0x81)) << guest->describe(exit);
  EXPECT_EQ(guest->trap().vector, 13u);
}

// The VMM's answer is for that instruction, or for nobody.
GUEST_CODE(asks, 64, "in $0x60, %al; nop; 1: jmp 1b");
CONTRACT_TEST(PortIo, AnAnswerIsNotTakenByAnotherInstruction) {
  constexpr uint64_t high = 0x10000000;
  auto guest = test.guest();
  const auto memory = Mapping::anonymous(0x1000);
  std::ranges::copy(asks, memory.data());
  guest->vm().set_user_memory_region({.slot = 1,
                                      .flags = 0,
                                      .guest_phys_addr = high,
                                      .memory_size = memory.size(),
                                      .userspace_addr = reinterpret_cast<uint64_t>(memory.data())});
  guest->enter(Mode::long64, 0, high);
  EXPECT_EQ(guest->run().reason(), KVM_EXIT_IO);
  // Its code is gone meanwhile, and a fault comes instead.
  guest->at<uint64_t>(pd_gpa + (high >> 21) * 8) = 0;
  guest->vm().note_write(pd_gpa, 0x1000);
  guest->vcpu().set_sregs(guest->vcpu().sregs());
  EXPECT_EQ(guest->trap().vector, 14u);
}

}  // namespace
}  // namespace lodge::contract
