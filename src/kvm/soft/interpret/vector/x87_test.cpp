#include "kvm/soft/interpret/vector/x87.hpp"

#include <gtest/gtest.h>

#include "kvm/soft/interpret/vector/test_support.hpp"

namespace lodge::kvm::soft::simd {
namespace {

class X87 : public testing::Test {
 protected:
  void SetUp() override {
    m.cpu.gpr[rsi] = TestMachine::data;
    ASSERT_TRUE(m.run({0xdb, 0xe3}));  // fninit
  }
  uint16_t fsw() { return get<uint16_t>(m.cpu.vector, image::fsw); }
  TestMachine m;
};

TEST_F(X87, ArithmeticRunsOnTheGuestsStack) {
  ASSERT_TRUE(m.run({0xd9, 0xe8}));  // fld1
  ASSERT_TRUE(m.run({0xd8, 0xc0}));  // fadd st, st
  ASSERT_TRUE(m.run({0xd9, 0x1e}));  // fstp dword [rsi]
  EXPECT_EQ(m.at<float>(TestMachine::data), 2.0F);
  EXPECT_EQ(fsw(), 0);
  EXPECT_EQ(m.cpu.vector.fx[image::ftw], 0);
}

TEST_F(X87, ExceptionWaitsForTheNextInstruction) {
  m.at<uint16_t>(TestMachine::data) = 0x37f & ~4;  // divide by zero unmasked
  ASSERT_TRUE(m.run({0xd9, 0x2e}));                // fldcw [rsi]
  ASSERT_TRUE(m.run({0xd9, 0xe8}));                // fld1
  ASSERT_TRUE(m.run({0xd9, 0xee}));                // fldz
  ASSERT_TRUE(m.run({0xde, 0xf9}));                // fdivp
  EXPECT_TRUE(m.raises(Exception::mf, {0x9b}));    // fwait
  EXPECT_TRUE(m.raises(Exception::mf, {0xd9, 0xe8}));
  ASSERT_TRUE(m.run({0xdf, 0xe0}));  // fnstsw ax does not wait
  EXPECT_NE(m.cpu.gpr[rax] & 0x84, 0u);
  ASSERT_TRUE(m.run({0xdb, 0xe2}));  // fnclex
  EXPECT_TRUE(m.run({0x9b}));
}

TEST_F(X87, WithoutNeAPendingExceptionIsIgnored) {
  m.cpu.cr0 &= ~cr0::ne;
  put<uint16_t>(m.cpu.vector, image::fcw, 0x340);
  load_fsw(m.cpu.vector, 1);
  EXPECT_TRUE(m.run({0xd9, 0xe8}));
  EXPECT_NE(fsw() & 0x81, 0);
}

TEST_F(X87, TaskSwitchedAndEmulatedAreNotAvailable) {
  m.cpu.cr0 |= cr0::ts;
  EXPECT_TRUE(m.raises(Exception::nm, {0xd9, 0xe8}));
  EXPECT_TRUE(m.raises(Exception::nm, {0x9b}));
  m.cpu.cr0 = (m.cpu.cr0 & ~cr0::ts) | cr0::em;
  EXPECT_TRUE(m.raises(Exception::nm, {0xdb, 0xe3}));
}

TEST_F(X87, EnvironmentHoldsGuestPointers) {
  m.protected_mode_32();
  ASSERT_TRUE(m.run({0xd9, 0x06}));  // fld dword [esi]
  m.cpu.gpr[rdi] = TestMachine::data + 64;
  ASSERT_TRUE(m.run({0xd9, 0x37}));  // fnstenv [edi]
  const uint64_t env = TestMachine::data + 64;
  EXPECT_EQ(m.at<uint32_t>(env + 12), TestMachine::code);
  EXPECT_EQ(m.at<uint32_t>(env + 16), 0x0106'0008u);  // opcode D9 06 and CS
  EXPECT_EQ(m.at<uint32_t>(env + 20), TestMachine::data);
  EXPECT_EQ(m.at<uint16_t>(env + 24), 0x10);   // DS
  EXPECT_EQ(m.at<uint16_t>(env + 8), 0x7fff);  // only physical register 7 holds something: zero
}

TEST_F(X87, SaveAndRestoreRoundTrip) {
  ASSERT_TRUE(m.run({0xd9, 0xeb}));  // fldpi
  ASSERT_TRUE(m.run({0xd9, 0xe8}));  // fld1
  const auto before = m.cpu.vector.fx;
  ASSERT_TRUE(m.run({0xdd, 0x36}));  // fnsave [rsi]
  EXPECT_EQ(m.cpu.vector.fx[image::ftw], 0);
  ASSERT_TRUE(m.run({0xdd, 0x26}));  // frstor [rsi]
  EXPECT_TRUE(std::equal(before.begin() + image::st, before.begin() + image::x87_size,
                         m.cpu.vector.fx.begin() + image::st));
  EXPECT_EQ(m.cpu.vector.fx[image::ftw], before[image::ftw]);
}

TEST_F(X87, StoreThatFaultsDoesNotPop) {
  ASSERT_TRUE(m.run({0xd9, 0xe8}));
  m.cpu.gpr[rsi] = TestMachine::hole - 2;
  const uint16_t before = fsw();
  EXPECT_TRUE(m.raises(Exception::pf, {0xd9, 0x1e}));
  EXPECT_EQ(fsw(), before);
}

TEST_F(X87, MmxSwitchesToPhysicalRegisters) {
  ASSERT_TRUE(m.run({0xd9, 0xe8}));  // fld1: TOP = 7, the value in physical register 7
  m.cpu.gpr[rax] = 5;
  ASSERT_TRUE(m.run({0x0f, 0x6e, 0xc0}));  // movd mm0, eax
  EXPECT_EQ(fsw() & 0x3800, 0);
  EXPECT_EQ(m.cpu.vector.fx[image::ftw], 0xff);
  EXPECT_EQ(get<uint64_t>(m.cpu.vector, image::st), 5u);
  EXPECT_EQ(get<uint16_t>(m.cpu.vector, image::st + 8), 0xffff);
  EXPECT_EQ(get<uint64_t>(m.cpu.vector, image::st + 16 * 7), uint64_t{1} << 63);
  ASSERT_TRUE(m.run({0x0f, 0x77}));  // emms
  EXPECT_EQ(m.cpu.vector.fx[image::ftw], 0);
}

TEST_F(X87, CompareAndMoveUseTheGuestsFlags) {
  ASSERT_TRUE(m.run({0xd9, 0xee}));  // fldz
  ASSERT_TRUE(m.run({0xd9, 0xe8}));  // fld1
  ASSERT_TRUE(m.run({0xdb, 0xf1}));  // fcomi st, st1: 1 > 0
  EXPECT_EQ(m.cpu.rflags() & (flag::zf | flag::pf | flag::cf), 0u);
  m.cpu.set_rflags(flag::fixed | flag::zf);
  ASSERT_TRUE(m.run({0xda, 0xc9}));  // fcmove st, st1
  EXPECT_EQ(get<uint64_t>(m.cpu.vector, image::st), 0u);
}

}  // namespace
}  // namespace lodge::kvm::soft::simd
