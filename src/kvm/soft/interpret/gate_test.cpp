#include "kvm/soft/interpret/gate.hpp"

#include <gtest/gtest.h>

#include <initializer_list>
#include <vector>

#include "kvm/soft/cpu/cpuid_bits.hpp"

namespace lodge::kvm::soft {
namespace {

// A guest whose CPUID has every bit that the gate asks for, but for one.
class Gate : public ::testing::Test {
 protected:
  Gate() {
    for (uint32_t* word : words()) *word = ~0u;
  }
  std::vector<uint32_t*> words() {
    return {&features.leaf1_ecx, &features.leaf1_edx,   &features.leaf7_ebx,    &features.leaf7_ecx,
            &features.leaf7_edx, &features.leaf7_1_eax, &features.leaf_d_1_eax, &features.ext1_ecx,
            &features.ext1_edx,  &features.ext8_ebx};
  }
  bool allowed(std::initializer_list<uint8_t> bytes) {
    ZydisDecoder decoder;
    ZydisDecoderInit(&decoder, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
    ZydisDecodedInstruction insn;
    std::vector<uint8_t> image(bytes);
    EXPECT_TRUE(
        ZYAN_SUCCESS(ZydisDecoderDecodeInstruction(&decoder, nullptr, image.data(), image.size(), &insn)));
    return allowed_by_cpuid(features, insn);
  }
  // Allowed with all bits, refused without this one.
  void expect_needs(uint32_t& word, uint32_t bit, std::initializer_list<uint8_t> bytes) {
    EXPECT_TRUE(allowed(bytes));
    word &= ~bit;
    EXPECT_FALSE(allowed(bytes));
    word |= bit;
  }
  Features features;
};

TEST_F(Gate, IntegerExtensionsFollowTheirBits) {
  expect_needs(features.leaf7_ebx, cpuid7_ebx::bmi1, {0xc4, 0xe2, 0x78, 0xf2, 0xc1});  // ANDN
  expect_needs(features.leaf7_ebx, cpuid7_ebx::bmi2, {0xc4, 0xe2, 0x7b, 0xf6, 0xc1});  // MULX
  expect_needs(features.leaf7_ebx, cpuid7_ebx::adx, {0x66, 0x0f, 0x38, 0xf6, 0xc1});   // ADCX
  expect_needs(features.leaf1_ecx, cpuid1_ecx::popcnt, {0xf3, 0x0f, 0xb8, 0xc1});      // POPCNT
  expect_needs(features.leaf1_ecx, cpuid1_ecx::movbe, {0x0f, 0x38, 0xf0, 0x00});       // MOVBE
  expect_needs(features.leaf1_ecx, cpuid1_ecx::cx16, {0x48, 0x0f, 0xc7, 0x08});        // CMPXCHG16B
  expect_needs(features.leaf7_ebx, cpuid7_ebx::rdseed, {0x0f, 0xc7, 0xf8});            // RDSEED
  expect_needs(features.leaf1_edx, cpuid1_edx::cmov, {0x0f, 0x44, 0xc1});              // CMOVE
}

TEST_F(Gate, VectorSetsFollowTheirBits) {
  expect_needs(features.leaf1_edx, cpuid1_edx::sse2, {0x66, 0x0f, 0x58, 0xc1});         // ADDPD
  expect_needs(features.leaf1_ecx, cpuid1_ecx::sse41, {0x66, 0x0f, 0x38, 0x40, 0xc1});  // PMULLD
  expect_needs(features.leaf1_ecx, cpuid1_ecx::aes, {0x66, 0x0f, 0x38, 0xdc, 0xc1});    // AESENC
  expect_needs(features.leaf7_ebx, cpuid7_ebx::sha, {0x0f, 0x38, 0xc8, 0xc1});          // SHA1NEXTE
  expect_needs(features.leaf1_ecx, cpuid1_ecx::avx, {0xc5, 0xf4, 0x58, 0xc1});          // VADDPS
  expect_needs(features.leaf7_ebx, cpuid7_ebx::avx2, {0xc5, 0xf5, 0xfe, 0xc1});         // VPADDD ymm
  expect_needs(features.leaf1_ecx, cpuid1_ecx::fma, {0xc4, 0xe2, 0x75, 0x98, 0xc1});    // VFMADD132PS
  expect_needs(features.leaf1_ecx, cpuid1_ecx::f16c, {0xc4, 0xe2, 0x7d, 0x13, 0xc1});   // VCVTPH2PS
  expect_needs(features.leaf7_ecx, cpuid7_ecx::vaes, {0xc4, 0xe2, 0x75, 0xdc, 0xc1});   // VAESENC ymm
}

TEST_F(Gate, Avx512FormsNeedTheirSetTheFoundationAndTheirLength) {
  const std::initializer_list<uint8_t> ymm = {0x62, 0xf1, 0x75, 0x28, 0xfc, 0xc1};  // VPADDB ymm (BW)
  expect_needs(features.leaf7_ebx, cpuid7_ebx::avx512bw, ymm);
  expect_needs(features.leaf7_ebx, cpuid7_ebx::avx512vl, ymm);
  expect_needs(features.leaf7_ebx, cpuid7_ebx::avx512f, ymm);
  features.leaf7_ebx &= ~cpuid7_ebx::avx512vl;
  EXPECT_TRUE(allowed({0x62, 0xf1, 0x75, 0x48, 0xfc, 0xc1}));  // the same for zmm
  EXPECT_TRUE(allowed({0x62, 0xf1, 0x76, 0x08, 0x58, 0xc1}));  // VADDSS: scalar
}

TEST_F(Gate, WhatSoftNeverHasIsRefusedWhateverCpuidSays) {
  EXPECT_FALSE(allowed({0x0f, 0x01, 0xc2}));              // VMLAUNCH
  EXPECT_FALSE(allowed({0x0f, 0x01, 0xd8}));              // VMRUN
  EXPECT_FALSE(allowed({0x0f, 0x01, 0xd5}));              // XEND
  EXPECT_FALSE(allowed({0xc4, 0xe2, 0x78, 0x49, 0x00}));  // LDTILECFG
  EXPECT_FALSE(allowed({0x0f, 0x01, 0xcf}));              // ENCLS
}

TEST_F(Gate, HintsAreAlwaysThere) {
  for (uint32_t* word : words()) *word = 0;
  EXPECT_TRUE(allowed({0xf3, 0x0f, 0x1e, 0xfa}));  // ENDBR64
  EXPECT_TRUE(allowed({0x0f, 0x1f, 0x00}));        // NOP
  EXPECT_TRUE(allowed({0xf3, 0x90}));              // PAUSE
  EXPECT_TRUE(allowed({0x0f, 0x0d, 0x08}));        // PREFETCHW
  EXPECT_TRUE(allowed({0x0f, 0x01, 0xc1}));        // VMCALL
}

}  // namespace
}  // namespace lodge::kvm::soft
