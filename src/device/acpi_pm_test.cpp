#include "device/acpi_pm.hpp"

#include <gtest/gtest.h>

#include "device/testing.hpp"

namespace lodge::device {
namespace {

using machine::PowerRequest;
namespace layout = machine::layout;

constexpr uint64_t PM1_STS = 0, PM1_EN = 2, PM1_CNT = 4, PM_TMR = 8, GPE0_STS = 0x20, GPE0_EN = 0x28;
constexpr uint64_t second = 1'000'000'000;

class AcpiPmTest : public ::testing::Test {
 protected:
  void enable_acpi() { pm.smi_window().write(0, 1, layout::acpi_enable_value); }

  FakeClock clock;
  testing::FakeInterrupt sci;
  testing::FakePower power;
  AcpiPm pm{clock, sci, power};
};

TEST_F(AcpiPmTest, TheTimerRunsAt3579545Hz) {
  auto before = static_cast<uint32_t>(pm.read(PM_TMR, 4));
  clock.advance(second);
  EXPECT_EQ(pm.read(PM_TMR, 4) - before, 3'579'545u);
}

TEST_F(AcpiPmTest, TheTimerIsReadOnlyAndReadableByBytes) {
  clock.advance(second);
  pm.write(PM_TMR, 4, 0);
  EXPECT_EQ(pm.read(PM_TMR, 4), 3'579'545u);
  EXPECT_EQ(pm.read(PM_TMR + 1, 1), 3'579'545u >> 8 & 0xff);
}

TEST_F(AcpiPmTest, SmiCommandsHandTheEventsOver) {
  EXPECT_EQ(pm.read(PM1_CNT, 2) & 1, 0u);
  enable_acpi();
  EXPECT_EQ(pm.read(PM1_CNT, 2) & 1, 1u);
  pm.smi_window().write(0, 1, layout::acpi_disable_value);
  EXPECT_EQ(pm.read(PM1_CNT, 2) & 1, 0u);
}

TEST_F(AcpiPmTest, TheSmiDataPortIsAScratchRegister) {
  pm.smi_window().write(1, 1, 0x5a);
  EXPECT_EQ(pm.smi_window().read(1, 1), 0x5au);
}

TEST_F(AcpiPmTest, ThePowerButtonRaisesTheSciUntilItsStatusIsCleared) {
  enable_acpi();
  pm.write(PM1_EN, 2, 0x100);
  EXPECT_TRUE(pm.press_power_button());
  EXPECT_TRUE(sci.level);
  EXPECT_EQ(pm.read(PM1_STS, 2), 0x100u);
  pm.write(PM1_STS, 2, 0x100);
  EXPECT_FALSE(sci.level);
  EXPECT_EQ(pm.read(PM1_STS, 2), 0u);
}

TEST_F(AcpiPmTest, AButtonThatNobodyListensToSaysSo) {
  EXPECT_FALSE(pm.press_power_button());
  enable_acpi();
  EXPECT_FALSE(pm.press_power_button());
  EXPECT_FALSE(sci.level);
  pm.write(PM1_EN, 2, 0x100);
  EXPECT_TRUE(sci.level) << "the event is kept for the driver that comes later";
}

TEST_F(AcpiPmTest, WritingSoftOffWithSleepEnablePowersOff) {
  enable_acpi();
  pm.write(PM1_CNT, 2, layout::acpi_s5_type << 10 | 1);
  EXPECT_TRUE(power.requests.empty());
  pm.write(PM1_CNT, 2, layout::acpi_s5_type << 10 | 1 << 13 | 1);
  ASSERT_EQ(power.requests.size(), 1u);
  EXPECT_EQ(power.requests[0], PowerRequest::power_off);
  EXPECT_EQ(pm.read(PM1_CNT, 2) & 1u << 13, 0u) << "SLP_EN reads as zero";
}

TEST_F(AcpiPmTest, AnUndeclaredSleepStateDoesNothing) {
  for (unsigned type = 0; type < 8; type++)
    if (type != layout::acpi_s5_type) pm.write(PM1_CNT, 2, type << 10 | 1u << 13);
  EXPECT_TRUE(power.requests.empty());
}

TEST_F(AcpiPmTest, TheTimerEventComesWhenBit31Toggles) {
  enable_acpi();
  pm.write(PM1_EN, 2, 1);
  clock.advance(599 * second);  // 2^31 ticks take 599.93 s
  EXPECT_FALSE(sci.level);
  clock.advance(second);
  EXPECT_TRUE(sci.level);
  EXPECT_EQ(pm.read(PM1_STS, 2), 1u);
  pm.write(PM1_STS, 2, 1);
  EXPECT_FALSE(sci.level);
  clock.advance(600 * second);
  EXPECT_TRUE(sci.level);
}

TEST_F(AcpiPmTest, TheTimerStatusIsSetWithoutItsEnableBit) {
  clock.advance(600 * second);
  EXPECT_EQ(pm.read(PM1_STS, 2), 1u);
  EXPECT_FALSE(sci.level);
}

TEST_F(AcpiPmTest, TheRtcEventComesWithTheRiseOfTheClocksInterrupt) {
  enable_acpi();
  pm.write(PM1_EN, 2, 0x400);
  pm.rtc_input().set(true);
  EXPECT_TRUE(sci.level);
  pm.write(PM1_STS, 2, 0x400);
  EXPECT_FALSE(sci.level) << "the level that stays is no new event";
  pm.rtc_input().set(false);
  pm.rtc_input().set(true);
  EXPECT_EQ(pm.read(PM1_STS, 2), 0x400u);
}

TEST_F(AcpiPmTest, GeneralPurposeEventsRaiseTheSciAndAreClearedByOnes) {
  enable_acpi();
  pm.write(GPE0_EN, 1, 0x04);
  pm.raise_gpe(2);
  pm.raise_gpe(63);
  pm.raise_gpe(64);
  EXPECT_TRUE(sci.level);
  EXPECT_EQ(pm.read(GPE0_STS, 8), 0x8000'0000'0000'0004u);
  pm.write(GPE0_STS, 1, 0xff);
  EXPECT_FALSE(sci.level);
  EXPECT_EQ(pm.read(GPE0_STS, 8), 0x8000'0000'0000'0000u);
}

TEST_F(AcpiPmTest, ResetGivesTheEventsBackToTheFirmware) {
  enable_acpi();
  pm.write(PM1_EN, 2, 0x100);
  pm.press_power_button();
  clock.advance(second);
  pm.reset();
  EXPECT_FALSE(sci.level);
  EXPECT_EQ(pm.read(PM1_CNT, 2), 0u);
  EXPECT_EQ(pm.read(PM_TMR, 4), 3'579'545u);
}

TEST_F(AcpiPmTest, SavedStateRoundTripsAndTheTimerGoesOn) {
  enable_acpi();
  pm.write(PM1_EN, 2, 0x101);
  pm.write(GPE0_EN, 8, 0xf0);
  pm.press_power_button();
  clock.advance(5 * second);
  FakeClock other_clock;
  testing::FakeInterrupt other_sci;
  AcpiPm other(other_clock, other_sci, power);
  EXPECT_TRUE(testing::round_trip(pm, other));
  EXPECT_TRUE(other_sci.level);
  EXPECT_EQ(other.read(PM_TMR, 4), pm.read(PM_TMR, 4));
}

}  // namespace
}  // namespace lodge::device
