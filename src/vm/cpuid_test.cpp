#include "vm/cpuid.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.hpp"

namespace lodge::vm {
namespace {

kvm_cpuid_entry2 entry(uint32_t leaf, uint32_t index, uint32_t eax, uint32_t ebx, uint32_t ecx, uint32_t edx,
                       bool indexed = false) {
  kvm_cpuid_entry2 e{};
  e.function = leaf, e.index = index, e.flags = indexed ? KVM_CPUID_FLAG_SIGNIFCANT_INDEX : 0;
  e.eax = eax, e.ebx = ebx, e.ecx = ecx, e.edx = edx;
  return e;
}

// An accelerator that offers everything.
CpuidEntries full() {
  return {entry(0, 0, 0x1f, 0x756e6547, 0x6c65746e, 0x49656e69),
          entry(1, 0, 0x000906ea, 0x07100800, ~0u & ~(1u << 24), ~0u),
          entry(4, 0, 0x1c004121, 0, 0, 0, true),
          entry(4, 3, 0x1c03c163, 0, 0, 0, true),
          entry(4, 4, 0, 0, 0, 0, true),
          entry(6, 0, 4, 0, 0, 0),
          entry(7, 0, 1, ~0u, ~0u, ~0u, true),
          entry(7, 1, ~0u, 0, 0, 0, true),
          entry(0xb, 0, 1, 2, 0x100, 7, true),
          entry(0xd, 0, 0xe7, 2696, 2696, 0, true),
          entry(0xd, 1, 0xf, 0, 0, 0, true),
          entry(0xd, 2, 256, 576, 0, 0, true),
          entry(0xd, 5, 64, 1088, 0, 0, true),
          entry(0xd, 6, 512, 1152, 0, 0, true),
          entry(0xd, 7, 1024, 1664, 0, 0, true),
          entry(0x80000000, 0, 0x8000001e, 0, 0, 0),
          entry(0x80000001, 0, 0, 0, ~0u, ~0u),
          entry(0x80000002, 0, 1, 2, 3, 4),
          entry(0x80000003, 0, 1, 2, 3, 4),
          entry(0x80000004, 0, 1, 2, 3, 4),
          entry(0x80000008, 0, 0x3030, ~0u, 0x3007, 0),
          entry(0x8000001d, 3, 0x1c163, 0, 0, 0, true),
          entry(0x8000001e, 0, 5, 0x105, 0, 0),
          entry(0x40000001, 0, 0x01007efb, 0, 0, 0)};
}

const kvm_cpuid_entry2& at(const CpuidEntries& entries, uint32_t leaf, uint32_t index = 0) {
  for (const auto& e : entries)
    if (e.function == leaf && (!(e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX) || e.index == index)) return e;
  ADD_FAILURE() << "no leaf " << leaf << "." << index;
  static const kvm_cpuid_entry2 none{};
  return none;
}

TEST(ModelCpuid, HostKeepsAllButNestedVirtualization) {
  const auto entries = model_cpuid(full(), false, "host");
  EXPECT_EQ(at(entries, 1).ecx & (1u << 5), 0u);
  EXPECT_EQ(at(entries, 0x80000001).ecx, ~0u & ~(1u << 2));
  EXPECT_EQ(at(entries, 7).ebx, ~0u);
}

TEST(ModelCpuid, FrequenciesStandBehindTheHypervisorsLeaves) {
  CpuidEntries entries = full();
  add_frequencies(entries, 2'000'000);
  EXPECT_EQ(entries.size(), full().size()) << "no hypervisor's first leaf, no others";
  entries.push_back(entry(0x40000000, 0, 0x40000001, 0, 0, 0));
  add_frequencies(entries, 0);
  EXPECT_EQ(at(entries, 0x40000000).eax, 0x40000001u);
  add_frequencies(entries, 2'000'000);
  EXPECT_EQ(at(entries, 0x40000000).eax, 0x40000010u);
  EXPECT_EQ(at(entries, 0x40000010).eax, 2'000'000u);
  EXPECT_EQ(at(entries, 0x40000010).ebx, 1'000'000u);
}

TEST(ModelCpuid, TscDeadlineComesFromTheCapability) {
  EXPECT_EQ(at(model_cpuid(full(), false, "host"), 1).ecx & (1u << 24), 0u);
  EXPECT_NE(at(model_cpuid(full(), true, "x86-64-v2"), 1).ecx & (1u << 24), 0u);
}

TEST(ModelCpuid, LevelsAddTheirFeaturesAndNoOthers) {
  constexpr uint32_t avx2 = 1u << 5, avx512f = 1u << 16, smep = 1u << 7, popcnt = 1u << 23, aes = 1u << 25;
  const auto v1 = model_cpuid(full(), true, "x86-64-v1");
  EXPECT_EQ(at(v1, 1).ecx & (popcnt | aes), 0u);
  // Every level keeps what Linux needs to trust the TSC (cpuid.cpp): of leaf 7 that is TSC_ADJUST, and no
  // more.
  constexpr uint32_t tsc_adjust = 1u << 1;
  EXPECT_EQ(at(v1, 7).ebx, tsc_adjust);
  const auto v2 = model_cpuid(full(), true, "x86-64-v2");
  EXPECT_EQ(at(v2, 1).ecx & (popcnt | aes), popcnt);
  const auto v3 = model_cpuid(full(), true, "x86-64-v3");
  EXPECT_EQ(at(v3, 7).ebx & (avx2 | avx512f | smep), avx2);
  const auto v4 = model_cpuid(full(), true, "x86-64-v4");
  EXPECT_EQ(at(v4, 7).ebx & (avx2 | avx512f | smep), avx2 | avx512f);
}

TEST(ModelCpuid, LevelsOfferTheMatchingXsaveAreas) {
  EXPECT_EQ(at(model_cpuid(full(), true, "x86-64-v2"), 0xd).eax, 0u);
  const auto v3 = at(model_cpuid(full(), true, "x86-64-v3"), 0xd);
  EXPECT_EQ(v3.eax, 7u);
  EXPECT_EQ(v3.ecx, 832u);  // 576 and the upper halves of 16 YMM registers
  const auto v4 = at(model_cpuid(full(), true, "x86-64-v4"), 0xd);
  EXPECT_EQ(v4.eax, 0xe7u);
  EXPECT_EQ(v4.ecx, 2688u);
}

TEST(ModelCpuid, ALevelThatTheHostLacksIsRefusedByName) {
  auto supported = full();
  for (auto& e : supported)
    if (e.function == 7 && e.index == 0) e.ebx &= ~(1u << 5);
  EXPECT_NO_THROW(model_cpuid(supported, true, "x86-64-v2"));
  EXPECT_THAT([&] { model_cpuid(supported, true, "x86-64-v3"); },
              testing::ThrowsMessage<UsageError>(testing::HasSubstr("avx2")));
}

TEST(ModelCpuid, LevelsCarryTheirNameInTheBrandString) {
  const auto entries = model_cpuid(full(), true, "x86-64-v3");
  EXPECT_EQ(brand_string(entries), "Lodge x86-64-v3 processor");
}

TEST(VcpuCpuid, EachVcpuHasItsApicId) {
  const auto entries = vcpu_cpuid(model_cpuid(full(), true, "host"), 2, 3);
  EXPECT_EQ(at(entries, 1).ebx >> 24, 2u);
  EXPECT_EQ(at(entries, 1).ebx >> 16 & 0xff, 4u);
  EXPECT_NE(at(entries, 1).edx & (1u << 28), 0u);
  EXPECT_EQ(at(entries, 0x8000001e).eax, 2u);
  for (const uint32_t leaf : {0xbu, 0x1fu}) {
    EXPECT_EQ(at(entries, leaf, 0).ebx, 1u);
    EXPECT_EQ(at(entries, leaf, 1).eax, 2u);  // three cores need two bits
    EXPECT_EQ(at(entries, leaf, 1).ebx, 3u);
    EXPECT_EQ(at(entries, leaf, 1).ecx, 0x201u);
    EXPECT_EQ(at(entries, leaf, 1).edx, 2u);
  }
}

TEST(VcpuCpuid, OneVcpuHasNoSiblings) {
  const auto entries = vcpu_cpuid(model_cpuid(full(), true, "host"), 0, 1);
  EXPECT_EQ(at(entries, 1).edx & (1u << 28), 0u);
  EXPECT_EQ(at(entries, 0xb, 1).eax, 0u);
  EXPECT_EQ(at(entries, 0x80000008).ecx, 0u);
}

TEST(VcpuCpuid, TheThirdCacheLevelIsShared) {
  const auto entries = vcpu_cpuid(model_cpuid(full(), true, "host"), 0, 4);
  EXPECT_EQ(at(entries, 4, 0).eax >> 14 & 0xfff, 0u);
  EXPECT_EQ(at(entries, 4, 3).eax >> 14 & 0xfff, 3u);
  EXPECT_EQ(at(entries, 4, 3).eax >> 26, 3u);
  EXPECT_EQ(at(entries, 4, 4).eax, 0u);
  EXPECT_EQ(at(entries, 0x8000001d, 3).eax >> 14 & 0xfff, 3u);
}

}  // namespace
}  // namespace lodge::vm
