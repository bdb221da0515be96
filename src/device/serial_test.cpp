#include "device/serial.hpp"

#include <gtest/gtest.h>

#include "base/error.hpp"
#include "device/testing.hpp"

namespace lodge::device {
namespace {

using testing::FakeBackend;
using testing::FakeInterrupt;

constexpr uint64_t RBR = 0, THR = 0, DLL = 0, IER = 1, DLM = 1, IIR = 2, FCR = 2, LCR = 3, MCR = 4, LSR = 5,
                   MSR = 6, SCR = 7;

class SerialTest : public ::testing::Test {
 protected:
  uint8_t in(uint64_t reg) { return static_cast<uint8_t>(uart.read(reg, 1)); }
  void out(uint64_t reg, uint8_t value) { uart.write(reg, 1, value); }
  size_t type(std::string_view text) {
    return uart.receive({reinterpret_cast<const uint8_t*>(text.data()), text.size()});
  }

  FakeClock clock;
  FakeInterrupt irq;
  FakeBackend backend;
  Serial uart{clock, irq, backend};
};

TEST_F(SerialTest, AfterResetTheTransmitterIsEmptyAndNothingIsPending) {
  EXPECT_EQ(in(LSR), 0x60);
  EXPECT_EQ(in(IIR), 0x01);
  EXPECT_EQ(in(MSR), 0xb0);
  EXPECT_FALSE(irq.level);
}

TEST_F(SerialTest, AWrittenByteGoesToTheBackend) {
  for (char c : std::string("hello")) out(THR, static_cast<uint8_t>(c));
  EXPECT_EQ(backend.output, "hello");
  EXPECT_EQ(in(LSR)&0x60, 0x60);
}

TEST_F(SerialTest, AWordWriteReachesTwoRegisters) {
  uart.write(LCR, 2, 0x0b03);
  EXPECT_EQ(in(LCR), 0x03);
  EXPECT_EQ(in(MCR), 0x0b);
}

TEST_F(SerialTest, TheDivisorLatchHidesDataAndInterruptEnable) {
  out(IER, 0x05);
  out(LCR, 0x83);
  out(DLL, 0x01);
  out(DLM, 0x02);
  EXPECT_EQ(in(DLL), 0x01);
  EXPECT_EQ(in(DLM), 0x02);
  out(LCR, 0x03);
  EXPECT_EQ(in(IER), 0x05);
  EXPECT_EQ(backend.output, "");
}

TEST_F(SerialTest, ScratchAndReservedBits) {
  out(SCR, 0xa5);
  out(IER, 0xff);
  out(MCR, 0xff);
  EXPECT_EQ(in(SCR), 0xa5);
  EXPECT_EQ(in(IER), 0x0f);
  EXPECT_EQ(in(MCR), 0x1f);
}

TEST_F(SerialTest, FifoIsReportedInIirOnlyWhenEnabled) {
  EXPECT_EQ(in(IIR)&0xc0, 0x00);
  out(FCR, 0x01);
  EXPECT_EQ(in(IIR)&0xc0, 0xc0);
  out(FCR, 0x00);
  EXPECT_EQ(in(IIR)&0xc0, 0x00);
}

TEST_F(SerialTest, EnablingThreWhileIdleInterruptsAndReadingIirAcknowledges) {
  out(MCR, 0x08);
  out(IER, 0x02);
  EXPECT_TRUE(irq.level);
  EXPECT_EQ(in(IIR), 0x02);
  EXPECT_FALSE(irq.level);
  EXPECT_EQ(in(IIR), 0x01);
  out(IER, 0x00);
  out(IER, 0x02);
  EXPECT_EQ(in(IIR), 0x02);
}

TEST_F(SerialTest, EveryTransmittedByteGivesAnEdgeEvenWhenIirIsNeverRead) {
  out(MCR, 0x08);
  out(IER, 0x02);
  unsigned before = irq.rises;
  out(THR, 'a');
  out(THR, 'b');
  EXPECT_EQ(irq.rises, before + 2);
  EXPECT_TRUE(irq.level);
}

TEST_F(SerialTest, WithoutOut2NoInterruptLeavesTheChip) {
  out(IER, 0x02);
  EXPECT_FALSE(irq.level);
  out(MCR, 0x08);
  EXPECT_TRUE(irq.level);
}

TEST_F(SerialTest, ReceivedDataInterruptsAtTheTriggerLevel) {
  out(MCR, 0x08);
  out(FCR, 0x41);  // 4 bytes
  out(IER, 0x01);
  EXPECT_EQ(type("abc"), 3u);
  EXPECT_FALSE(irq.level);
  EXPECT_EQ(type("d"), 1u);
  EXPECT_EQ(in(IIR), 0xc4);
  EXPECT_TRUE(irq.level);
  EXPECT_EQ(in(RBR), 'a');
  EXPECT_FALSE(irq.level);
}

TEST_F(SerialTest, BytesBelowTheTriggerLevelTimeOutAfterFourCharacterTimes) {
  out(LCR, 0x83);
  out(DLL, 1);
  out(DLM, 0);
  out(LCR, 0x03);
  out(MCR, 0x08);
  out(FCR, 0xc1);  // 14 bytes
  out(IER, 0x01);
  type("ab");
  clock.advance(340'000);  // 40 bits at 115200 baud are 347.2 us
  EXPECT_EQ(in(IIR), 0xc1);
  clock.advance(8'000);
  EXPECT_EQ(in(IIR), 0xcc);
  EXPECT_EQ(in(RBR), 'a');
  EXPECT_EQ(in(IIR), 0xc1);
  clock.advance(348'000);
  EXPECT_EQ(in(IIR), 0xcc);
  EXPECT_EQ(in(RBR), 'b');
  clock.advance(1'000'000);
  EXPECT_EQ(in(IIR), 0xc1);
}

TEST_F(SerialTest, AFullFifoRefusesInputAndAsksForMoreOnceRead) {
  out(FCR, 0x01);
  EXPECT_EQ(type("0123456789abcdefgh"), 16u);
  EXPECT_EQ(backend.ready_calls, 0u);
  EXPECT_EQ(in(RBR), '0');
  EXPECT_EQ(backend.ready_calls, 1u);
  EXPECT_EQ(in(RBR), '1');
  EXPECT_EQ(backend.ready_calls, 1u);
}

TEST_F(SerialTest, WithoutFifoOneByteIsTaken) {
  EXPECT_EQ(type("ab"), 1u);
  EXPECT_EQ(in(LSR)&0x01, 0x01);
  EXPECT_EQ(in(RBR), 'a');
  EXPECT_EQ(in(LSR)&0x01, 0x00);
}

TEST_F(SerialTest, LoopbackReturnsWhatIsSent) {
  out(MCR, 0x10);
  out(THR, 0x5a);
  EXPECT_EQ(in(RBR), 0x5a);
  EXPECT_EQ(backend.output, "");
}

TEST_F(SerialTest, LoopbackConnectsTheModemOutputsToTheInputs) {
  const std::pair<uint8_t, uint8_t> wires[] = {{0x01, 0x20}, {0x02, 0x10}, {0x04, 0x40}, {0x08, 0x80}};
  for (auto [output, input] : wires) {
    out(MCR, 0x10 | output);
    EXPECT_EQ(in(MSR)&0xf0, input);
  }
}

TEST_F(SerialTest, LoopbackOverrunIsReportedOnce) {
  out(MCR, 0x10);
  out(THR, 1);
  out(THR, 2);
  EXPECT_EQ(in(LSR)&0x02, 0x02);
  EXPECT_EQ(in(LSR)&0x02, 0x00);
  EXPECT_EQ(in(RBR), 2);
}

TEST_F(SerialTest, InputIsHeldBackDuringLoopback) {
  out(MCR, 0x10);
  EXPECT_EQ(type("a"), 0u);
  out(MCR, 0x00);
  EXPECT_EQ(backend.ready_calls, 1u);
  EXPECT_EQ(type("a"), 1u);
}

TEST_F(SerialTest, ChangedModemLinesSetDeltasAndInterrupt) {
  out(IER, 0x08);
  out(MCR, 0x18);  // loop: CTS and DSR fall, DCD stays
  EXPECT_EQ(in(IIR), 0x00);
  EXPECT_TRUE(irq.level);
  EXPECT_EQ(in(MSR), 0x83);
  EXPECT_FALSE(irq.level);
  EXPECT_EQ(in(MSR), 0x80);
}

TEST_F(SerialTest, TheRingDeltaMarksTheTrailingEdgeOnly) {
  out(MCR, 0x14);
  EXPECT_EQ(in(MSR)&0x04, 0x00);
  out(MCR, 0x10);
  EXPECT_EQ(in(MSR)&0x04, 0x04);
}

TEST_F(SerialTest, LineStatusComesBeforeDataBeforeThre) {
  out(FCR, 0x01);
  out(MCR, 0x08);
  out(IER, 0x07);
  EXPECT_TRUE(uart.receive_break());
  EXPECT_EQ(in(IIR), 0xc6);
  EXPECT_EQ(in(LSR), 0xf1);  // break, FIFO error, data ready, transmitter empty
  EXPECT_EQ(in(IIR), 0xc4);
  EXPECT_EQ(in(RBR), 0);
  EXPECT_EQ(in(IIR), 0xc2);
  EXPECT_EQ(in(IIR), 0xc1);
}

TEST_F(SerialTest, AFullBackendHoldsTheTransmitterUntilItIsReady) {
  backend.room = 1;
  out(FCR, 0x01);
  out(MCR, 0x08);
  for (char c : std::string("abc")) out(THR, static_cast<uint8_t>(c));
  EXPECT_EQ(in(LSR)&0x60, 0x00);
  backend.room = 10;
  out(IER, 0x02);
  EXPECT_FALSE(irq.level);
  uart.transmit_ready();
  EXPECT_EQ(backend.output, "abc");
  EXPECT_EQ(in(LSR)&0x60, 0x60);
  EXPECT_TRUE(irq.level);
}

TEST_F(SerialTest, FifoClearBitsEmptyTheFifos) {
  out(FCR, 0x01);
  type("abc");
  out(FCR, 0x03);
  EXPECT_EQ(in(LSR)&0x01, 0x00);
  backend.room = 0;
  out(THR, 'x');
  out(FCR, 0x05);
  EXPECT_EQ(in(LSR)&0x60, 0x60);
}

TEST_F(SerialTest, SavedStateRoundTripsWithQueuedBytesAndLine) {
  out(FCR, 0x81);
  out(MCR, 0x0b);
  out(IER, 0x05);
  backend.room = 0;
  out(THR, 'q');
  type("0123456789");
  FakeInterrupt other_irq;
  FakeBackend other_backend;
  Serial other(clock, other_irq, other_backend);
  EXPECT_TRUE(testing::round_trip(uart, other));
  EXPECT_TRUE(other_irq.level);
  EXPECT_EQ(other.read(RBR, 1), '0');
  other.transmit_ready();
  EXPECT_EQ(other_backend.output, "q");
}

TEST_F(SerialTest, AnOverfullSavedFifoIsRefused) {
  nlohmann::json json;
  uart.save(json);
  json["rx_count"] = 17;
  EXPECT_THROW(uart.load(json), UsageError);
}

}  // namespace
}  // namespace lodge::device
