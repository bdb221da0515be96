#include "device/pci/msix.hpp"

#include <gtest/gtest.h>

#include "base/error.hpp"
#include "device/testing.hpp"

namespace lodge::device::pci {
namespace {

class MsixTest : public ::testing::Test {
 protected:
  MsixTest() {
    msix.add_capability(config, 1, 0x2000);
    for (unsigned i = 0; i < 3; i++) {
      msix.window().write(i * 16, 4, 0xfee0'1000);
      msix.window().write(i * 16 + 8, 4, 0x30 + i);
      msix.window().write(i * 16 + 12, 4, 0);
    }
  }
  size_t sent() { return platform.messages.size(); }

  testing::FakePlatform platform;
  ConfigSpace config{256};
  Msix msix{3, platform};
};

TEST_F(MsixTest, TheCapabilityNamesTableAndPendingBits) {
  const unsigned at = msix.capability();
  EXPECT_EQ(config.read(at, 1), 0x11u);
  EXPECT_EQ(config.read(at + 2, 2), 2u);
  EXPECT_EQ(config.read(at + 4, 4), 0x2001u);
  EXPECT_EQ(config.read(at + 8, 4), 0x2801u);
  config.write(at + 2, 2, 0xffff);
  EXPECT_EQ(config.read(at + 2, 2), 0xc002u);
}

TEST_F(MsixTest, NothingIsSentWhileDisabled) {
  msix.signal(0);
  msix.control_written(0x8000);
  EXPECT_EQ(sent(), 0u);
  msix.signal(0);
  EXPECT_EQ(sent(), 1u);
  msix.signal(3);
  msix.signal(Msix::NO_VECTOR);
  EXPECT_EQ(sent(), 1u);
}

TEST_F(MsixTest, MasksKeepMessagesPending) {
  msix.control_written(0xc000);
  msix.signal(1);
  EXPECT_EQ(msix.window().read(0x800, 4), 2u);
  msix.control_written(0x8000);
  EXPECT_EQ(sent(), 1u);
  EXPECT_EQ(platform.messages[0].second, 0x31u);
  msix.window().write(2 * 16 + 12, 4, 1);
  msix.signal(2);
  msix.signal(2);
  EXPECT_EQ(sent(), 1u);
  msix.window().write(2 * 16 + 12, 4, 0);
  EXPECT_EQ(sent(), 2u);  // once, however often it was signalled
}

TEST_F(MsixTest, AccessesThatAreNotAllowedDoNothing) {
  EXPECT_EQ(msix.window().read(0, 2), 0u);
  EXPECT_EQ(msix.window().read(2, 4), 0u);
  msix.window().write(0, 1, 0xff);
  msix.window().write(3 * 16, 8, ~uint64_t{0});  // behind the table
  msix.window().write(0x800, 8, ~uint64_t{0});
  EXPECT_EQ(msix.window().read(0, 8), 0xfee0'1000u);
  EXPECT_EQ(msix.window().read(3 * 16, 8), 0u);
  EXPECT_EQ(msix.window().read(0x800, 8), 0u);
}

TEST_F(MsixTest, StateRoundTrip) {
  msix.control_written(0xc000);
  msix.signal(1);
  Msix other(3, platform), smaller(2, platform);
  EXPECT_TRUE(testing::round_trip(msix, other));
  other.control_written(0x8000);
  EXPECT_EQ(sent(), 1u);
  nlohmann::json json;
  msix.save(json);
  EXPECT_THROW(smaller.load(json), UsageError);
}

}  // namespace
}  // namespace lodge::device::pci
