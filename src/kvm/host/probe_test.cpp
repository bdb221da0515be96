#include "kvm/host/probe.hpp"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>

namespace lodge::kvm::host {
namespace {

const Ability& find(const Probe& result, std::string_view name) {
  const auto found = std::ranges::find(result.abilities, name, &Ability::name);
  if (found == result.abilities.end()) throw std::runtime_error("the probe has no such ability");
  return *found;
}

TEST(Probe, SaysWhyAMissingDeviceCannotBoot) {
  const Probe result = probe("/nonexistent/kvm");
  EXPECT_FALSE(result.available);
  EXPECT_FALSE(result.can_boot_stock_kernel);
  EXPECT_THAT(result.error, ::testing::HasSubstr("/nonexistent/kvm"));
  EXPECT_EQ(result.reasons.size(), 1u);
}

class Device : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!result_.available) GTEST_SKIP() << result_.error;
  }
  struct Measurement {
    std::chrono::steady_clock::time_point start = std::chrono::steady_clock::now();
    Probe result = probe();
    std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
  };
  static const Measurement& measurement() {
    static const Measurement once;
    return once;
  }
  const Probe& result_ = measurement().result;
  std::chrono::duration<double> time_ = measurement().time;
};

TEST_F(Device, TakesLessThanASecond) {
  EXPECT_LT(time_.count(), 1.0);
}

TEST_F(Device, MeasuresTheSpeedOfKernelCode) {
  EXPECT_GT(result_.kernel_mips, 0);
}

// KVM runs or emulates these everywhere, so a failure here is a mistake in the snippet.
TEST_F(Device, FindsWhatEveryKvmCan) {
  for (const char* name : {"CPUID", "WRMSR", "control registers", "REP STOS/MOVS", "LOCK instructions"})
    EXPECT_EQ(find(result_, name).result, Ability::Result::works)
        << name << ": " << find(result_, name).detail;
}

TEST_F(Device, GivesAReasonExactlyWhenItCannotBoot) {
  EXPECT_EQ(result_.can_boot_stock_kernel, result_.reasons.empty());
  const bool lacks = std::ranges::any_of(result_.abilities, [](const Ability& ability) {
    return ability.required && ability.result == Ability::Result::fails;
  });
  EXPECT_EQ(result_.can_boot_stock_kernel, !lacks && result_.kernel_mips >= needed_mips);
}

TEST_F(Device, Report) {
  fmt::print("{:.3f} s, ring 0 {:.1f} MIPS, ring 3 {:.1f} MIPS\n", time_.count(), result_.kernel_mips,
             result_.user_mips);
  for (const Ability& ability : result_.abilities)
    fmt::print("  {}: {} {}\n", ability.name, static_cast<int>(ability.result), ability.detail);
  SUCCEED();
}

}  // namespace
}  // namespace lodge::kvm::host
