#include <gtest/gtest.h>
#include <linux/kvm.h>

#include "kvm/soft/interpret/vector/host.hpp"
#include "kvm/soft/interpret/vector/test_support.hpp"
#include "kvm/soft/interpret/vector/x87.hpp"

namespace lodge::kvm::soft::simd {
namespace {

class Xsave : public testing::Test {
 protected:
  void SetUp() override {
    m.cpu.gpr[rsi] = TestMachine::data;
    m.cpu.gpr[rax] = m.cpu.gpr[rdx] = 0xffff'ffff;
    m.run({0xdb, 0xe3});
    for (unsigned i = 0; i < 32; ++i) m.set_lane<uint64_t>(i, i % 8, i + 100);
    m.cpu.vector.k[3] = 9;
  }
  static constexpr std::initializer_list<uint8_t> xsave64 = {0x48, 0x0f, 0xae, 0x26},
                                                  xrstor64 = {0x48, 0x0f, 0xae, 0x2e},
                                                  xsavec64 = {0x48, 0x0f, 0xc7, 0x26};
  uint64_t& header(unsigned i) { return m.at<uint64_t>(TestMachine::data + 512 + 8 * i); }
  TestMachine m;
};

TEST_F(Xsave, StandardRoundTrip) {
  ASSERT_TRUE(m.run(xsave64));
  const auto zmm = m.cpu.vector.zmm;
  m.cpu.vector.zmm = {};
  m.cpu.vector.k = {};
  ASSERT_TRUE(m.run(xrstor64));
  EXPECT_EQ(m.cpu.vector.zmm, zmm);
  if (host().avx512) {
    EXPECT_EQ(m.cpu.vector.k[3], 9u);
  }
}

TEST_F(Xsave, CompactedRoundTripLeavesOutInitialState) {
  for (auto& reg : m.cpu.vector.zmm) std::fill(reg.begin() + 16, reg.end(), uint8_t{0});  // no AVX state
  for (unsigned i = 16; i < 32; ++i) m.cpu.vector.zmm[i] = {};
  ASSERT_TRUE(m.run(xsavec64));
  EXPECT_EQ(header(0) & 4, 0u);
  EXPECT_EQ(header(1), (supported_xcr0() & m.cpu.xcr0) | uint64_t{1} << 63);
  const auto zmm = m.cpu.vector.zmm;
  m.set_lane<uint64_t>(5, 2, 1);
  ASSERT_TRUE(m.run(xrstor64));
  EXPECT_EQ(m.cpu.vector.zmm, zmm);
}

TEST_F(Xsave, RequestMaskLimitsWhatIsTouched) {
  m.cpu.gpr[rax] = 1;
  m.cpu.gpr[rdx] = 0;
  header(0) = 2;
  ASSERT_TRUE(m.run(xsave64));
  EXPECT_EQ(header(0) & 2, 2u) << "bits outside the request stay";
  EXPECT_EQ(m.at<uint64_t>(TestMachine::data + 160), 0u);
}

TEST_F(Xsave, BadHeadersAreRefused) {
  ASSERT_TRUE(m.run(xsave64));
  header(0) |= uint64_t{1} << 62;
  EXPECT_TRUE(m.raises(Exception::gp, xrstor64));
  header(0) = 3;
  header(2) = 1;
  EXPECT_TRUE(m.raises(Exception::gp, xrstor64));
  header(2) = 0;
  m.at<uint32_t>(TestMachine::data + 24) = 0xffff'ffff;
  EXPECT_TRUE(m.raises(Exception::gp, xrstor64));
}

TEST_F(Xsave, AlignmentAndEnables) {
  m.cpu.gpr[rsi] += 16;
  EXPECT_TRUE(m.raises(Exception::gp, xsave64));
  m.cpu.gpr[rsi] -= 16;
  m.cpu.cr4 &= ~cr4::osxsave;
  EXPECT_TRUE(m.raises(Exception::ud, xsave64));
  m.cpu.cr4 |= cr4::osxsave;
  m.cpu.cr0 |= cr0::ts;
  EXPECT_TRUE(m.raises(Exception::nm, xsave64));
}

TEST_F(Xsave, FaultInTheAreaStoresNothing) {
  m.cpu.gpr[rsi] = TestMachine::hole - 256;
  EXPECT_TRUE(m.raises(Exception::pf, xsave64));
  for (uint64_t i = 0; i < 256; ++i) EXPECT_EQ(m.at<uint8_t>(TestMachine::hole - 256 + i), 0);
}

TEST_F(Xsave, FxsaveRoundTripAndAlignment) {
  ASSERT_TRUE(m.run({0x48, 0x0f, 0xae, 0x06}));
  const auto low = m.lane<uint64_t>(9, 1);
  m.set_lane<uint64_t>(9, 1, 0);
  ASSERT_TRUE(m.run({0x48, 0x0f, 0xae, 0x0e}));
  EXPECT_EQ(m.lane<uint64_t>(9, 1), low);
  m.cpu.gpr[rsi] += 8;
  EXPECT_TRUE(m.raises(Exception::gp, {0x48, 0x0f, 0xae, 0x06}));
}

TEST_F(Xsave, InUseFollowsTheValues) {
  VectorState v;
  reset_vector(v, false);
  EXPECT_EQ(xinuse(v), 1u) << "the power-up control word is not FNINIT's";
  init_x87(v);
  EXPECT_EQ(xinuse(v), 0u);
  v.zmm[3][20] = 1;
  if (host().avx) {
    EXPECT_EQ(xinuse(v), 4u);
  }
}

TEST_F(Xsave, ExchangeRoundTripsAndRefusesBadImages) {
  std::array<uint8_t, 4096> area;
  get_xsave(m.cpu.vector, area);
  VectorState other;
  reset_vector(other, false);
  ASSERT_TRUE(set_xsave(other, area, supported_xcr0()));
  EXPECT_EQ(other.zmm, m.cpu.vector.zmm);
  area[27] = 0xff;  // MXCSR
  EXPECT_FALSE(set_xsave(other, area, supported_xcr0()));
  area[27] = 0;
  area[519] = 0x80;  // XSTATE_BV
  EXPECT_FALSE(set_xsave(other, area, supported_xcr0()));

  kvm_fpu fpu;
  get_fpu(m.cpu.vector, fpu);
  VectorState third;
  reset_vector(third, false);
  ASSERT_TRUE(set_fpu(third, fpu));
  EXPECT_TRUE(std::equal(third.fx.begin(), third.fx.begin() + image::x87_size, m.cpu.vector.fx.begin()));
  fpu.mxcsr = 0xffff'ffff;
  EXPECT_FALSE(set_fpu(third, fpu));
}

}  // namespace
}  // namespace lodge::kvm::soft::simd
