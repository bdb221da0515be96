#include "device/i8042.hpp"

#include <gtest/gtest.h>

#include "device/testing.hpp"

namespace lodge::device {
namespace {

class I8042Test : public ::testing::Test {
 protected:
  void command(uint8_t value) { i8042.command_window().write(0, 1, value); }
  void data(uint8_t value) { i8042.data_window().write(0, 1, value); }
  uint8_t data() { return static_cast<uint8_t>(i8042.data_window().read(0, 1)); }
  uint8_t status() { return static_cast<uint8_t>(i8042.command_window().read(0, 1)); }

  testing::FakeInterrupt keyboard, mouse;
  testing::FakePower power;
  I8042 i8042{keyboard, mouse, power};
};

TEST_F(I8042Test, SelfTestPasses) {
  EXPECT_EQ(status() & 0x01, 0);
  command(0xaa);
  EXPECT_EQ(status() & 0x01, 1);
  EXPECT_EQ(data(), 0x55);
  EXPECT_EQ(status() & 0x01, 0);
}

TEST_F(I8042Test, InterfaceTestsPass) {
  command(0xab);
  EXPECT_EQ(data(), 0x00);
  command(0xa9);
  EXPECT_EQ(data(), 0x00);
}

TEST_F(I8042Test, TheCommandByteReadsBackAndGovernsTheSystemFlag) {
  command(0x60);
  data(0x43);
  EXPECT_EQ(status() & 0x04, 0);
  command(0x20);
  EXPECT_EQ(data(), 0x43);
}

TEST_F(I8042Test, RamKeepsWhatIsWritten) {
  command(0x7f);
  data(0x99);
  command(0x3f);
  EXPECT_EQ(data(), 0x99);
}

TEST_F(I8042Test, EnableAndDisableShowInTheCommandByte) {
  command(0xad);
  command(0xa7);
  command(0x20);
  EXPECT_EQ(data() & 0x30, 0x30);
  command(0xae);
  command(0xa8);
  command(0x20);
  EXPECT_EQ(data() & 0x30, 0x00);
}

TEST_F(I8042Test, TheStatusTellsACommandFromData) {
  command(0xae);
  EXPECT_EQ(status() & 0x08, 0x08);
  data(0x00);
  EXPECT_EQ(status() & 0x08, 0x00);
}

TEST_F(I8042Test, TheLoopCommandsFillTheOutputBufferAndInterrupt) {
  command(0x60);
  data(0x03);
  command(0xd2);
  data(0xa5);
  EXPECT_TRUE(keyboard.level);
  EXPECT_FALSE(mouse.level);
  EXPECT_EQ(data(), 0xa5);
  EXPECT_FALSE(keyboard.level);
  command(0xd3);
  data(0x5a);
  EXPECT_EQ(status() & 0x21, 0x21);
  EXPECT_TRUE(mouse.level);
  EXPECT_EQ(data(), 0x5a);
  EXPECT_EQ(status() & 0x21, 0x00);
}

TEST_F(I8042Test, WithInterruptsOffTheBufferFillsQuietly) {
  command(0x60);
  data(0x00);
  command(0xd2);
  data(1);
  EXPECT_FALSE(keyboard.level);
  EXPECT_EQ(status() & 0x01, 1);
}

TEST_F(I8042Test, AbsentDevicesTimeOut) {
  data(0xf2);
  EXPECT_EQ(status() & 0x61, 0x41);
  EXPECT_EQ(data(), 0xfe);
  command(0xd4);
  data(0xf2);
  EXPECT_EQ(status() & 0x61, 0x61);
  EXPECT_EQ(data(), 0xfe);
}

TEST_F(I8042Test, PulsingTheResetLineResetsTheMachine) {
  command(0xff);
  EXPECT_TRUE(power.requests.empty());
  command(0xfe);
  ASSERT_EQ(power.requests.size(), 1u);
  EXPECT_EQ(power.requests[0], machine::PowerRequest::reset);
}

TEST_F(I8042Test, PullingTheResetLineInTheOutputPortResetsTheMachine) {
  command(0xd1);
  data(0x03);
  EXPECT_TRUE(power.requests.empty());
  command(0xd1);
  data(0x02);
  EXPECT_EQ(power.requests.size(), 1u);
}

TEST_F(I8042Test, TheA20BitOfTheOutputPortReadsBack) {
  command(0xd1);
  data(0x01);
  command(0xd0);
  EXPECT_EQ(data(), 0x01);
  command(0xd1);
  data(0x03);
  command(0xd0);
  EXPECT_EQ(data(), 0x03);
}

TEST_F(I8042Test, SavedStateRoundTripsWithAByteAndItsInterrupt) {
  command(0xd2);
  data(0x77);
  command(0xd3);  // and a command that waits for its data
  testing::FakeInterrupt other_keyboard, other_mouse;
  I8042 other(other_keyboard, other_mouse, power);
  EXPECT_TRUE(testing::round_trip(i8042, other));
  EXPECT_TRUE(other_keyboard.level);
  EXPECT_EQ(other.data_window().read(0, 1), 0x77u);
  other.data_window().write(0, 1, 0x88);
  EXPECT_EQ(other.command_window().read(0, 1) & 0x21, 0x21u);
}

}  // namespace
}  // namespace lodge::device
