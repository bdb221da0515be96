#include "device/debug_ports.hpp"

#include <gtest/gtest.h>

#include "device/testing.hpp"

namespace lodge::device {
namespace {

TEST(DebugConsole, PrintsWhatIsWrittenAndReadsItsMagic) {
  testing::FakeBackend backend;
  DebugConsole console(backend);
  for (char c : std::string("ok\n")) console.write(0, 1, static_cast<uint8_t>(c));
  EXPECT_EQ(backend.output, "ok\n");
  EXPECT_EQ(console.read(0, 1), 0xe9u);
}

TEST(DebugExit, ExitsWithTheValueShiftedAndOdd) {
  testing::FakePower power;
  DebugExit port(power);
  port.write(0, 1, 0x10);
  EXPECT_EQ(power.exit_status, 0x21);
  port.write(0, 4, 0);
  EXPECT_EQ(power.exit_status, 1);
  EXPECT_EQ(port.read(0, 1), 0u);
}

TEST(PanicPort, OffersThePanicEventAndEndsTheVmOnlyForIt) {
  testing::FakePower power;
  PanicPort port(power);
  EXPECT_EQ(port.read(0, 1), 1u);
  port.write(0, 1, 2);
  EXPECT_FALSE(power.exit_status.has_value());
  port.write(0, 1, 1);
  EXPECT_EQ(power.exit_status, 14);
}

TEST(LatchPorts, KeepWhatIsWritten) {
  LatchPorts ports;
  ports.write(0, 2, 0xbeef);
  EXPECT_EQ(ports.read(1, 1), 0xbeu);
  EXPECT_EQ(ports.read(15, 1), 0u);
}

TEST(LatchPorts, SavedStateRoundTrips) {
  LatchPorts ports, other;
  ports.write(3, 1, 7);
  EXPECT_TRUE(testing::round_trip(ports, other));
  EXPECT_EQ(other.read(3, 1), 7u);
}

}  // namespace
}  // namespace lodge::device
