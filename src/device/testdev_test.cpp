#include "device/testdev.hpp"

#include <gtest/gtest.h>

#include "base/error.hpp"
#include "device/testing.hpp"
#include "machine/layout.hpp"

namespace lodge::device {
namespace {

class TestdevTest : public ::testing::Test {
 protected:
  machine::GuestMemory ram{machine::layout::MiB};
  std::array<testing::FakeInterrupt, 24> lines;
  Testdev testdev{ram, [this](unsigned gsi) -> machine::Interrupt& { return lines.at(gsi); }};
};

TEST_F(TestdevTest, TheEchoRegisterTakesAnyPart) {
  testdev.echo_window().write(0, 4, 0x44332211);
  testdev.echo_window().write(1, 2, 0xbbaa);
  EXPECT_EQ(testdev.echo_window().read(0, 4), 0x44bbaa11u);
  EXPECT_EQ(testdev.echo_window().read(3, 1), 0x44u);
}

TEST_F(TestdevTest, InterruptPortsDriveTheirLine) {
  testdev.irq_window().write(5, 1, 1);
  EXPECT_TRUE(lines[5].level);
  testdev.irq_window().write(5, 1, 0);
  EXPECT_FALSE(lines[5].level);
}

TEST_F(TestdevTest, TheMemoryWindowKeepsItsContents) {
  testdev.memory_window().write(0xfff8, 8, 0x1122334455667788);
  EXPECT_EQ(testdev.memory_window().read(0xfffc, 4), 0x11223344u);
}

TEST_F(TestdevTest, FlushingAnyAddressIsHarmless) {
  ram.view(0x5000, 1)[0] = 9;
  testdev.flush_window().write(0, 4, 0x5000);
  testdev.flush_window().write(0, 4, 0xffff'ffff);
  EXPECT_EQ(ram.view(0x5000, 1)[0], 9);
}

TEST_F(TestdevTest, SavedStateRoundTrips) {
  testdev.echo_window().write(0, 4, 7);
  testdev.memory_window().write(100, 4, 8);
  Testdev other(ram, [this](unsigned gsi) -> machine::Interrupt& { return lines.at(gsi); });
  EXPECT_TRUE(testing::round_trip(testdev, other));
  EXPECT_EQ(other.memory_window().read(100, 4), 8u);
  nlohmann::json json;
  testdev.save(json);
  json["memory"] = "00";
  EXPECT_THROW(other.load(json), UsageError);
}

}  // namespace
}  // namespace lodge::device
