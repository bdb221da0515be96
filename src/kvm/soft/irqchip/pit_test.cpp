#include "kvm/soft/irqchip/pit.hpp"

#include <gtest/gtest.h>

#include <cstring>

namespace lodge::kvm::soft {
namespace {

struct Line final : Pit::Client {
  int pit_interrupt() noexcept override {
    ++ticks;
    return answer;
  }
  int ticks = 0;
  int answer = 1;
};

class PitTest : public testing::Test {
 protected:
  // Time of `clocks` of the 8254, rounded up so that the clock edge has passed.
  static uint64_t ns(uint64_t clocks) {
    return (clocks * 1'000'000'000 + Pit::frequency - 1) / Pit::frequency;
  }
  void advance(uint64_t clocks) { clock.advance(ns(clocks)); }
  void program(unsigned channel, unsigned mode, uint16_t count, bool bcd = false) {
    pit.write(0x43, static_cast<uint8_t>(channel << 6 | 0x30 | mode << 1 | (bcd ? 1 : 0)));
    pit.write(static_cast<uint16_t>(0x40 + channel), static_cast<uint8_t>(count));
    pit.write(static_cast<uint16_t>(0x40 + channel), static_cast<uint8_t>(count >> 8));
  }
  uint16_t count(unsigned channel) {
    pit.write(0x43, static_cast<uint8_t>(channel << 6));
    const auto port = static_cast<uint16_t>(0x40 + channel);
    const uint8_t low = pit.read(port);
    return static_cast<uint16_t>(low | pit.read(port) << 8);
  }
  uint8_t status(unsigned channel) {
    pit.write(0x43, static_cast<uint8_t>(0xe0 | 2u << channel));
    return pit.read(static_cast<uint16_t>(0x40 + channel));
  }
  bool out(unsigned channel) { return (status(channel) & 0x80) != 0; }
  void gate(bool level) { pit.write(0x61, level ? 1 : 0); }
  // Every tick is completed by the guest at once.
  void advance_acking(uint64_t clocks, uint64_t steps) {
    for (uint64_t i = 0; i < steps; ++i) {
      advance(clocks);
      pit.acknowledged();
    }
  }

  FakeClock clock;
  Line line;
  Pit pit{line, clock, true};
};

// --- Modes ---

TEST_F(PitTest, IsSilentUntilItIsProgrammed) {
  clock.advance(10'000'000'000);
  EXPECT_EQ(line.ticks, 0);
}

TEST_F(PitTest, Mode0RaisesOutAtTheEndOnceAndCountsOn) {
  program(0, 0, 1000);
  EXPECT_FALSE(out(0));
  advance(999);
  EXPECT_EQ(line.ticks, 0);
  EXPECT_FALSE(out(0));
  advance(1);
  EXPECT_EQ(line.ticks, 1);
  EXPECT_TRUE(out(0));
  advance(5);
  EXPECT_GE(count(0), 0xfff0);  // went on below zero
  pit.acknowledged();
  advance(200'000);
  EXPECT_EQ(line.ticks, 1);
}

TEST_F(PitTest, Mode0WaitsForTheSecondByteAndRestartsOnANewCount) {
  program(0, 0, 1000);
  advance(500);
  pit.write(0x40, 0xe8);  // first byte: stops
  advance(1000);
  EXPECT_EQ(line.ticks, 0);
  pit.write(0x40, 0x03);
  advance(999);
  EXPECT_EQ(line.ticks, 0);
  advance(2);
  EXPECT_EQ(line.ticks, 1);
}

TEST_F(PitTest, Mode0IsPausedByTheGate) {
  gate(true);
  program(2, 0, 1000);
  advance(400);
  gate(false);
  advance(5000);
  EXPECT_EQ(count(2), 600);
  EXPECT_FALSE(out(2));
  gate(true);
  advance(599);
  EXPECT_FALSE(out(2));
  advance(2);
  EXPECT_TRUE(out(2));
}

TEST_F(PitTest, Mode1IsTriggeredByTheGateAndRetriggerable) {
  program(2, 1, 1000);
  EXPECT_TRUE(out(2));
  advance(5000);
  EXPECT_TRUE(out(2));  // not triggered yet
  gate(true);
  EXPECT_FALSE(out(2));
  advance(600);
  gate(false);
  gate(true);  // starts anew
  advance(600);
  EXPECT_FALSE(out(2));
  advance(401);
  EXPECT_TRUE(out(2));
}

TEST_F(PitTest, Mode2GivesOneLowClockAndAnInterruptEachPeriod) {
  program(0, 2, 1000);
  advance(998);
  EXPECT_TRUE(out(0));
  advance(1);
  EXPECT_FALSE(out(0));
  EXPECT_EQ(count(0), 1);
  EXPECT_EQ(line.ticks, 0);
  advance(1);
  EXPECT_TRUE(out(0));
  EXPECT_EQ(line.ticks, 1);
  pit.acknowledged();
  advance_acking(1000, 9);
  EXPECT_EQ(line.ticks, 10);
}

TEST_F(PitTest, Mode3IsASquareWaveThatCountsByTwo) {
  program(0, 3, 1000);
  advance(100);
  EXPECT_EQ(count(0), 800);
  EXPECT_TRUE(out(0));
  advance(399);
  EXPECT_TRUE(out(0));
  advance(2);
  EXPECT_FALSE(out(0));
  EXPECT_EQ(count(0) & 1, 0);
  advance(500);
  EXPECT_TRUE(out(0));
  EXPECT_EQ(line.ticks, 1);
}

TEST_F(PitTest, Mode3WithAnOddCountIsHighOneClockLonger) {
  gate(true);
  program(2, 3, 5);
  std::string wave;
  for (int i = 0; i < 10; ++i) {
    wave += out(2) ? 'H' : 'L';
    advance(1);
  }
  EXPECT_EQ(wave, "HHHLLHHHLL");
}

TEST_F(PitTest, Mode3IsHighWhileTheGateIsLowAndRestartsOnItsRise) {
  gate(true);
  program(2, 3, 1000);
  advance(700);
  EXPECT_FALSE(out(2));
  gate(false);
  EXPECT_TRUE(out(2));
  advance(700);
  EXPECT_TRUE(out(2));
  gate(true);
  EXPECT_EQ(count(2), 1000);
}

TEST_F(PitTest, Mode4StrobesOnceAtTheEnd) {
  program(0, 4, 1000);
  EXPECT_TRUE(out(0));
  advance(1000);
  EXPECT_FALSE(out(0));
  EXPECT_EQ(line.ticks, 0);
  advance(1);
  EXPECT_TRUE(out(0));
  EXPECT_EQ(line.ticks, 1);
  pit.acknowledged();
  advance(200'000);
  EXPECT_EQ(line.ticks, 1);
}

TEST_F(PitTest, Mode5StrobesAfterATrigger) {
  program(2, 5, 1000);
  advance(1000);
  EXPECT_TRUE(out(2));
  gate(true);
  advance(999);
  EXPECT_TRUE(out(2));
  advance(1);
  EXPECT_FALSE(out(2));
  advance(1);
  EXPECT_TRUE(out(2));
}

TEST_F(PitTest, Modes6And7AreModes2And3) {
  program(0, 6, 1000);
  EXPECT_EQ(status(0) & 0x0e, 2 << 1);
  program(0, 7, 1000);
  EXPECT_EQ(status(0) & 0x0e, 3 << 1);
}

// --- Registers ---

TEST_F(PitTest, CountZeroIs65536) {
  program(0, 2, 0);
  advance(65535);
  EXPECT_EQ(line.ticks, 0);
  advance(1);
  EXPECT_EQ(line.ticks, 1);
}

TEST_F(PitTest, BcdCountsDecimalAndZeroIs10000) {
  program(0, 2, 0x1234, true);
  advance(34);
  EXPECT_EQ(count(0), 0x1200);
  program(0, 2, 0, true);
  advance(1);
  EXPECT_EQ(count(0), 0x9999);
  advance(9999);
  EXPECT_EQ(line.ticks, 1);
}

TEST_F(PitTest, ALatchHoldsUntilItIsRead) {
  program(0, 2, 1000);
  advance(100);
  pit.write(0x43, 0x00);
  advance(100);
  pit.write(0x43, 0x00);  // ignored: the first is not read yet
  EXPECT_EQ(pit.read(0x40) | pit.read(0x40) << 8, 900);
  EXPECT_EQ(pit.read(0x40) | pit.read(0x40) << 8, 800);
}

TEST_F(PitTest, ByteAccessModesReadAndLoadTheirByte) {
  pit.write(0x43, 0x14);  // channel 0, low byte, mode 2
  pit.write(0x40, 200);
  advance(50);
  EXPECT_EQ(pit.read(0x40), 150);
  EXPECT_EQ(pit.read(0x40), 150);
  pit.write(0x43, 0x24);  // high byte
  pit.write(0x40, 2);
  advance(1);
  EXPECT_EQ(pit.read(0x40), 1);  // 511
  pit.write(0x43, 0x00);
  EXPECT_EQ(pit.read(0x40), 1);
}

TEST_F(PitTest, ReadBackGivesStatusFirstThenTheCount) {
  program(0, 2, 1000);
  advance(100);
  pit.write(0x43, 0xc2);  // both, of channel 0
  EXPECT_EQ(pit.read(0x40), 0x80 | 0x30 | 2 << 1);
  EXPECT_EQ(pit.read(0x40) | pit.read(0x40) << 8, 900);
}

TEST_F(PitTest, StatusShowsANullCountUntilOneIsLoaded) {
  pit.write(0x43, 0x30);
  EXPECT_EQ(status(0), 0x40 | 0x30);
  pit.write(0x40, 10);
  pit.write(0x40, 0);
  EXPECT_EQ(status(0) & 0x40, 0);
}

TEST_F(PitTest, ReadBackReachesSeveralChannels) {
  program(0, 2, 1000);
  program(2, 2, 500);
  gate(true);
  advance(100);
  pit.write(0x43, 0xda);  // counts of channels 0 and 2
  advance(50);
  EXPECT_EQ(pit.read(0x40) | pit.read(0x40) << 8, 900);
  EXPECT_EQ(pit.read(0x42) | pit.read(0x42) << 8, 400);
}

TEST_F(PitTest, TheControlPortReadsZero) {
  EXPECT_EQ(pit.read(0x43), 0);
}

// --- Port 0x61 ---

TEST_F(PitTest, Port61ShowsGateSpeakerDataAndOut2) {
  pit.write(0x61, 0xff);
  EXPECT_EQ(pit.read(0x61) & 3, 3);
  program(2, 0, 1000);
  EXPECT_EQ(pit.read(0x61) & 0x20, 0);
  advance(1000);
  EXPECT_EQ(pit.read(0x61) & 0x20, 0x20);
  pit.write(0x61, 0);
  EXPECT_EQ(pit.read(0x61) & 3, 0);
}

TEST_F(PitTest, TheRefreshBitTogglesEvery15Microseconds) {
  const uint8_t before = pit.read(0x61) & 0x10;
  clock.advance(15'085);
  EXPECT_NE(pit.read(0x61) & 0x10, before);
  clock.advance(15'085);
  EXPECT_EQ(pit.read(0x61) & 0x10, before);
}

TEST_F(PitTest, Port61BelongsToThePitOnlyWithTheSpeaker) {
  EXPECT_TRUE(pit.handles_port(0x61));
  Pit other(line, clock, false);
  EXPECT_FALSE(other.handles_port(0x61));
  EXPECT_TRUE(other.handles_port(0x43));
}

// --- Lost ticks ---

TEST_F(PitTest, TicksThatTheGuestIsTooSlowForAreDeliveredOneByOne) {
  program(0, 2, 1000);
  for (int i = 0; i < 5; ++i) advance(1000);
  EXPECT_EQ(line.ticks, 1);
  for (int i = 0; i < 10; ++i) pit.acknowledged();
  EXPECT_EQ(line.ticks, 5);
}

TEST_F(PitTest, WithoutReinjectionEveryTickIsAnEdge) {
  pit.set_reinject(false);
  program(0, 2, 1000);
  for (int i = 0; i < 5; ++i) advance(1000);
  EXPECT_EQ(line.ticks, 5);
  pit.acknowledged();
  EXPECT_EQ(line.ticks, 5);
}

TEST_F(PitTest, AMaskedTickLeavesNoBacklog) {
  line.answer = -1;
  program(0, 2, 1000);
  for (int i = 0; i < 5; ++i) advance(1000);
  EXPECT_EQ(line.ticks, 5);
  line.answer = 1;
  advance(1000);
  pit.acknowledged();
  EXPECT_EQ(line.ticks, 6);
}

TEST_F(PitTest, ALostAcknowledgementDoesNotStopTheClockForever) {
  program(0, 2, 1000);
  for (int i = 0; i < 150; ++i) advance(1000);
  EXPECT_GT(line.ticks, 1);
  EXPECT_LT(line.ticks, 60);
}

TEST_F(PitTest, AnAbsurdFrequencyDoesNotFloodTheTimer) {
  pit.set_reinject(false);
  program(0, 2, 1);
  clock.advance(1'000'000);
  EXPECT_LE(line.ticks, 5);
}

TEST_F(PitTest, ANewControlWordStopsTheOldPeriod) {
  program(0, 2, 1000);
  pit.write(0x43, 0x30);
  advance(10'000);
  EXPECT_EQ(line.ticks, 0);
}

// --- State ---

TEST_F(PitTest, StateRoundTrips) {
  program(0, 2, 1000);
  gate(true);
  program(2, 0, 5000);
  advance(100);
  gate(false);
  pit.write(0x43, 0x80);  // latch channel 2
  pit.write(0x43, 0xe2);  // latch status 0
  pit.write(0x61, 2);
  pit.write(0x43, 0x74);  // channel 1: first byte of two
  pit.write(0x41, 0x12);
  kvm_pit_state2 saved = pit.state();
  Line other;
  Pit copy(other, clock, true);
  copy.set_state(saved);
  kvm_pit_state2 again = copy.state();
  saved.channels[0].count_load_time = again.channels[0].count_load_time = 0;  // restarts, as in KVM
  // A channel without a count is saved as the longest; its load time is of no meaning.
  EXPECT_EQ(std::memcmp(&saved, &again, sizeof saved), 0);
  EXPECT_EQ(copy.read(0x40), 0x80 | 0x30 | 2 << 1);
  EXPECT_EQ(copy.read(0x42) | copy.read(0x42) << 8, 4900);
  copy.write(0x61, 1);
  advance(4901);
  EXPECT_NE(copy.read(0x61) & 0x20, 0);
  EXPECT_GT(other.ticks, 0);
}

TEST_F(PitTest, HpetLegacyModeSilencesChannel0) {
  program(0, 2, 1000);
  kvm_pit_state2 state = pit.state();
  state.flags |= KVM_PIT_FLAGS_HPET_LEGACY;
  pit.set_state(state);
  advance(10'000);
  EXPECT_EQ(line.ticks, 0);
  EXPECT_EQ(pit.state().flags & KVM_PIT_FLAGS_HPET_LEGACY, KVM_PIT_FLAGS_HPET_LEGACY + 0u);
}

TEST_F(PitTest, HostileStateIsBroughtIntoRange) {
  kvm_pit_state2 state;
  for (const int fill : {0xff, 0x00, 0x7f}) {
    std::memset(&state, fill, sizeof state);
    pit.set_state(state);
    for (uint16_t port = 0x40; port < 0x44; ++port) pit.read(port);
    pit.read(0x61);
    clock.advance(1'000'000);
  }
}

}  // namespace
}  // namespace lodge::kvm::soft
