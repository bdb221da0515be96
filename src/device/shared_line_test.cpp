#include "device/shared_line.hpp"

#include <gtest/gtest.h>

#include "device/testing.hpp"

namespace lodge::device {
namespace {

TEST(SharedLine, IsHighWhileAnySourceIs) {
  testing::FakeInterrupt out;
  SharedLine line(out);
  auto& a = line.add_input();
  auto& b = line.add_input();
  a.set(true);
  EXPECT_TRUE(out.level);
  b.set(true);
  a.set(false);
  EXPECT_TRUE(out.level);
  b.set(false);
  EXPECT_FALSE(out.level);
  EXPECT_EQ(out.rises, 1u);
}

TEST(SharedLine, ARepeatedLevelCountsOnce) {
  testing::FakeInterrupt out;
  SharedLine line(out);
  auto& a = line.add_input();
  a.set(true);
  a.set(true);
  a.set(false);
  EXPECT_FALSE(out.level);
}

TEST(SplitLine, DrivesBothEnds) {
  testing::FakeInterrupt first, second;
  SplitLine line(first, second);
  line.set(true);
  EXPECT_TRUE(first.level && second.level);
  line.set(false);
  EXPECT_FALSE(first.level || second.level);
}

}  // namespace
}  // namespace lodge::device
