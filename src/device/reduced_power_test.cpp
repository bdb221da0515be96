#include "device/reduced_power.hpp"

#include <gtest/gtest.h>

#include "device/testing.hpp"

namespace lodge::device {
namespace {

using machine::PowerRequest;

class ReducedPowerTest : public ::testing::Test {
 protected:
  testing::FakeInterrupt line;
  testing::FakePower power;
  ReducedPower chip{line, power};
};

TEST_F(ReducedPowerTest, SoftOffNeedsItsTypeAndTheEnableBit) {
  chip.write(0, 1, 5 << 2);
  chip.write(0, 1, 3 << 2 | 1 << 5);
  EXPECT_TRUE(power.requests.empty());
  chip.write(0, 1, 5 << 2 | 1 << 5);
  ASSERT_EQ(power.requests.size(), 1u);
  EXPECT_EQ(power.requests[0], PowerRequest::power_off);
  EXPECT_EQ(chip.read(0, 1), 5u << 2) << "the enable bit reads as zero";
}

TEST_F(ReducedPowerTest, TheResetRegisterTakesItsValueOnly) {
  chip.write(2, 1, 1);
  EXPECT_TRUE(power.requests.empty());
  chip.write(2, 1, machine::layout::reset_value);
  ASSERT_EQ(power.requests.size(), 1u);
  EXPECT_EQ(power.requests[0], PowerRequest::reset);
}

TEST_F(ReducedPowerTest, ThePowerButtonIsAnEventUntilItIsRead) {
  chip.press_power_button();
  EXPECT_TRUE(line.level);
  EXPECT_EQ(chip.read(3, 1), 1u);
  EXPECT_FALSE(line.level);
  EXPECT_EQ(chip.read(3, 1), 0u);
  chip.write(3, 1, 0xff);
  EXPECT_FALSE(line.level);
}

TEST_F(ReducedPowerTest, SavedStateRoundTripsWithItsLine) {
  chip.write(0, 1, 0xff);
  chip.press_power_button();
  testing::FakeInterrupt other_line;
  ReducedPower other(other_line, power);
  EXPECT_TRUE(testing::round_trip(chip, other));
  EXPECT_TRUE(other_line.level);
  EXPECT_EQ(other.read(3, 1), 1u);
}

}  // namespace
}  // namespace lodge::device
