// SSE, AVX and AVX-512: availability, faults, what is committed. Results of arithmetic are the silicon
// oracle's business (tests/oracle).
#include <gtest/gtest.h>

#include "kvm/soft/interpret/vector/arena.hpp"
#include "kvm/soft/interpret/vector/host.hpp"
#include "kvm/soft/interpret/vector/run.hpp"
#include "kvm/soft/interpret/vector/test_support.hpp"
#include "kvm/soft/interpret/vector/x87.hpp"

namespace lodge::kvm::soft::simd {
namespace {

class Vector : public testing::Test {
 protected:
  void SetUp() override { m.cpu.gpr[rsi] = TestMachine::data; }
  void need_avx512() {
    if (!host().avx512) GTEST_SKIP() << "the host has no AVX-512";
  }
  TestMachine m;
};

TEST_F(Vector, LegacySseKeepsTheUpperBits) {
  m.set_lane<uint64_t>(1, 7, 42);
  m.set_lane<uint64_t>(2, 0, 5);
  ASSERT_TRUE(m.run({0x0f, 0x28, 0xca}));  // movaps xmm1, xmm2
  EXPECT_EQ(m.lane<uint64_t>(1, 0), 5u);
  EXPECT_EQ(m.lane<uint64_t>(1, 7), 42u);
}

TEST_F(Vector, VexClearsTheUpperBits) {
  if (!host().avx) GTEST_SKIP();
  m.set_lane<uint64_t>(1, 3, 42);
  ASSERT_TRUE(m.run({0xc5, 0xf8, 0x28, 0xca}));  // vmovaps xmm1, xmm2
  EXPECT_EQ(m.lane<uint64_t>(1, 3), 0u);
}

TEST_F(Vector, SseNeedsOsfxsrAndNoEmulation) {
  m.cpu.cr4 &= ~cr4::osfxsr;
  EXPECT_TRUE(m.raises(Exception::ud, {0x0f, 0x28, 0xca}));
  m.cpu.cr4 |= cr4::osfxsr;
  m.cpu.cr0 |= cr0::em;
  EXPECT_TRUE(m.raises(Exception::ud, {0x0f, 0x28, 0xca}));
  m.cpu.cr0 &= ~cr0::em;
  m.cpu.cr0 |= cr0::ts;
  EXPECT_TRUE(m.raises(Exception::nm, {0x0f, 0x28, 0xca}));
}

TEST_F(Vector, AvxNeedsXcr0) {
  m.cpu.xcr0 = 3;
  EXPECT_TRUE(m.raises(Exception::ud, {0xc5, 0xf8, 0x28, 0xca}));
  m.cpu.xcr0 = supported_xcr0();
  m.cpu.cr4 &= ~cr4::osxsave;
  EXPECT_TRUE(m.raises(Exception::ud, {0xc5, 0xf8, 0x28, 0xca}));
}

TEST_F(Vector, HiddenByCpuidIsUndefined) {
  m.cpu.features.leaf1_edx &= ~(1u << 25 | 1u << 26);
  EXPECT_TRUE(m.raises(Exception::ud, {0x0f, 0x28, 0xca}));
}

TEST_F(Vector, AlignedOperandsMustBeAligned) {
  m.cpu.gpr[rsi] += 8;
  EXPECT_TRUE(m.raises(Exception::gp, {0x0f, 0x28, 0x0e}));  // movaps xmm1, [rsi]
  EXPECT_TRUE(m.run({0x0f, 0x10, 0x0e}));                    // movups
}

TEST_F(Vector, StoreThatFaultsWritesNothing) {
  m.cpu.gpr[rsi] = TestMachine::hole - 8;
  m.at<uint64_t>(TestMachine::hole - 8) = 7;
  m.set_lane<uint64_t>(1, 0, 99);
  ASSERT_TRUE(m.raises(Exception::pf, {0x0f, 0x11, 0x0e}));  // movups [rsi], xmm1
  EXPECT_EQ(m.cpu.pending.payload, TestMachine::hole);
  EXPECT_EQ(m.cpu.pending.error, 2u);
  EXPECT_EQ(m.at<uint64_t>(TestMachine::hole - 8), 7u);
}

TEST_F(Vector, MaskedElementsDoNotFault) {
  need_avx512();
  m.cpu.gpr[rsi] = TestMachine::hole - 8;
  m.at<uint64_t>(TestMachine::hole - 8) = 7;
  m.cpu.vector.k[1] = 1;
  ASSERT_TRUE(m.run({0x62, 0xf1, 0xfe, 0xc9, 0x6f, 0x0e}));  // vmovdqu64 zmm1{k1}{z}, [rsi]
  EXPECT_EQ(m.lane<uint64_t>(1, 0), 7u);
  EXPECT_EQ(m.lane<uint64_t>(1, 1), 0u);
  m.cpu.vector.k[1] = 3;
  EXPECT_TRUE(m.raises(Exception::pf, {0x62, 0xf1, 0xfe, 0xc9, 0x6f, 0x0e}));
}

TEST_F(Vector, GatherKeepsItsProgressAtAFault) {
  if (!host().runs[ZYDIS_ISA_SET_AVX2GATHER]) GTEST_SKIP();
  m.at<uint32_t>(TestMachine::data) = 11;
  m.set_lane<uint32_t>(2, 0, 0);
  m.set_lane<uint32_t>(2, 1, 0x1000);  // in the hole
  for (unsigned i = 0; i < 4; ++i) m.set_lane<uint32_t>(3, i, ~0u);
  // vpgatherdd xmm1, [rsi + xmm2], xmm3
  ASSERT_TRUE(m.raises(Exception::pf, {0xc4, 0xe2, 0x61, 0x90, 0x0c, 0x16}));
  EXPECT_EQ(m.lane<uint32_t>(1, 0), 11u);
  EXPECT_EQ(m.lane<uint32_t>(3, 0), 0u);
  EXPECT_EQ(m.lane<uint32_t>(3, 1), ~0u);
  EXPECT_EQ(m.cpu.pending.payload, TestMachine::hole);
}

TEST_F(Vector, UnmaskedExceptionChangesNoRegister) {
  set_mxcsr(m.cpu.vector, 0x1f80 & ~(1u << 9));  // divide by zero unmasked
  m.set_lane<float>(1, 0, 1.0F);
  ASSERT_TRUE(m.raises(Exception::xm, {0x0f, 0x5e, 0xca}));  // divps xmm1, xmm2
  EXPECT_EQ(m.lane<float>(1, 0), 1.0F);
  EXPECT_NE(mxcsr(m.cpu.vector) & 4, 0u);
  m.cpu.cr4 &= ~cr4::osxmmexcpt;
  EXPECT_TRUE(m.raises(Exception::ud, {0x0f, 0x5e, 0xca}));
}

TEST_F(Vector, LdmxcsrRefusesReservedBits) {
  m.at<uint32_t>(TestMachine::data) = 0x8000'1f80;
  EXPECT_TRUE(m.raises(Exception::gp, {0x0f, 0xae, 0x16}));
  m.at<uint32_t>(TestMachine::data) = 0x1fa0;
  EXPECT_TRUE(m.run({0x0f, 0xae, 0x16}));
  EXPECT_EQ(mxcsr(m.cpu.vector), 0x1fa0u);
}

TEST_F(Vector, CompareSetsTheGuestsFlags) {
  m.cpu.set_rflags(flag::fixed | flag::of | flag::sf);
  m.set_lane<float>(1, 0, 2.0F);
  ASSERT_TRUE(m.run({0x0f, 0x2f, 0xca}));  // comiss xmm1, xmm2
  EXPECT_EQ(m.cpu.rflags() & flag::arithmetic, 0u);
}

TEST_F(Vector, GeneralRegistersKeepTheirNumbers) {
  m.set_lane<uint64_t>(1, 0, 0x1'2345'6789);
  m.cpu.gpr[rsp] = ~uint64_t{0};
  ASSERT_TRUE(m.run({0x66, 0x0f, 0x7e, 0xcc}));  // movd esp, xmm1: 32 bits clear the upper half
  EXPECT_EQ(m.cpu.gpr[rsp], 0x2345'6789u);
}

TEST_F(Vector, ThirtyTwoBitCodeIgnoresW) {
  if (!host().avx) GTEST_SKIP();
  m.protected_mode_32();
  m.cpu.gpr[rcx] = 0xffff'ffff'1234'5678;
  m.set_lane<uint64_t>(1, 0, ~uint64_t{0});
  ASSERT_TRUE(m.run({0xc4, 0xe1, 0xf9, 0x6e, 0xc9}));  // vmovd xmm1, ecx with VEX.W = 1
  EXPECT_EQ(m.lane<uint64_t>(1, 0), 0x1234'5678u);
}

TEST_F(Vector, ThirtyTwoBitCodeRunsWithMemoryOperands) {
  m.protected_mode_32();
  m.at<float>(TestMachine::data) = 3.0F;
  m.set_lane<float>(1, 0, 2.0F);
  ASSERT_TRUE(m.run({0xf3, 0x0f, 0x58, 0x0e}));  // addss xmm1, [esi]
  EXPECT_EQ(m.lane<float>(1, 0), 5.0F);
}

TEST_F(Vector, LockIsUndefined) {
  EXPECT_TRUE(m.raises(Exception::ud, {0xf0, 0x0f, 0x58, 0xca}));
}

TEST_F(Vector, WorksWithoutRoomInTheStubCache) {
  const std::array<uint8_t, 4> addps = {0x0f, 0x58, 0x4e, 0x10};  // addps xmm1, [rsi + 16]
  std::copy(addps.begin(), addps.end(), &m.at<uint8_t>(TestMachine::code));
  m.at<float>(TestMachine::data + 16) = 3.0F;
  m.set_lane<float>(1, 0, 2.0F);
  m.cpu.gpr[gpr_rip] = TestMachine::code;
  Op op;
  op.length = addps.size();
  op.flags = Op::has_memory;
  op.base = rsi;
  op.disp = 16;
  op.segment = seg_ds;
  for (int i = 0; i < 2; ++i) ASSERT_EQ(run_uncached(m.cpu, op), Step::next);
  EXPECT_EQ(m.lane<float>(1, 0), 8.0F);
}

TEST(Arena, GivesUpAtItsLimit) {
  Arena arena;
  const std::vector<uint8_t> code(Arena::chunk_size, 0xc3);
  for (size_t i = 0; i < Arena::limit / Arena::chunk_size; ++i) ASSERT_NE(arena.add(code), nullptr);
  EXPECT_EQ(arena.add(code), nullptr);
}

}  // namespace
}  // namespace lodge::kvm::soft::simd
