#include "device/reset.hpp"

#include <gtest/gtest.h>

#include "device/testing.hpp"

namespace lodge::device {
namespace {

using machine::PowerRequest;

TEST(ResetControl, ResetsWhenResetCpuRises) {
  testing::FakePower power;
  ResetControl control(power);
  control.write(0, 1, 0x02);
  EXPECT_TRUE(power.requests.empty());
  control.write(0, 1, 0x06);
  ASSERT_EQ(power.requests.size(), 1u);
  EXPECT_EQ(power.requests[0], PowerRequest::reset);
}

TEST(ResetControl, ReadsBackTheKindOfResetOnly) {
  testing::FakePower power;
  ResetControl control(power);
  control.write(0, 1, 0xff);
  EXPECT_EQ(control.read(0, 1), 0x0au);
}

TEST(ResetControl, SavedStateRoundTrips) {
  testing::FakePower power;
  ResetControl control(power), other(power);
  control.write(0, 1, 0x0a);
  EXPECT_TRUE(testing::round_trip(control, other));
  EXPECT_EQ(other.read(0, 1), 0x0au);
}

TEST(Port92, ResetsOnFastInit) {
  testing::FakePower power;
  Port92 port(power);
  port.write(0, 1, 0x02);
  EXPECT_TRUE(power.requests.empty());
  port.write(0, 1, 0x03);
  ASSERT_EQ(power.requests.size(), 1u);
  EXPECT_EQ(power.requests[0], PowerRequest::reset);
}

TEST(Port92, TheA20BitReadsBack) {
  testing::FakePower power;
  Port92 port(power);
  EXPECT_EQ(port.read(0, 1), 0x02u);
  port.write(0, 1, 0x00);
  EXPECT_EQ(port.read(0, 1), 0x00u);
}

TEST(Port92, SavedStateRoundTrips) {
  testing::FakePower power;
  Port92 port(power), other(power);
  port.write(0, 1, 0x00);
  EXPECT_TRUE(testing::round_trip(port, other));
  EXPECT_EQ(other.read(0, 1), 0x00u);
}

}  // namespace
}  // namespace lodge::device
