#include "device/rtc.hpp"

#include <gtest/gtest.h>

#include "base/error.hpp"
#include "device/testing.hpp"

namespace lodge::device {
namespace {

constexpr uint64_t second = 1'000'000'000;
constexpr uint8_t A = 0x0a, B = 0x0b, C = 0x0c, D = 0x0d, Century = 0x32;
constexpr uint8_t B_SET = 0x80, B_PIE = 0x40, B_AIE = 0x20, B_UIE = 0x10, B_BINARY = 4, B_24H = 2;

class RtcTest : public ::testing::Test {
 protected:
  uint8_t get(uint8_t index) {
    rtc.write(0, 1, index);
    return static_cast<uint8_t>(rtc.read(1, 1));
  }
  void put(uint8_t index, uint8_t value) {
    rtc.write(0, 1, index);
    rtc.write(1, 1, value);
  }
  // hh:mm:ss as the registers show it
  std::string time() { return fmt::format("{:02x}:{:02x}:{:02x}", get(4), get(2), get(0)); }
  std::string date() {
    return fmt::format("{:02x}{:02x}-{:02x}-{:02x}", get(Century), get(9), get(8), get(7));
  }

  FakeClock clock;  // wall(): 2023-11-14 22:13:21
  testing::FakeInterrupt irq;
  Rtc rtc{clock, irq};
};

TEST_F(RtcTest, ShowsTheWallClockInBcdAnd24Hours) {
  EXPECT_EQ(time(), "22:13:21");
  EXPECT_EQ(date(), "2023-11-14");
  EXPECT_EQ(get(6), 3);  // Tuesday
  EXPECT_EQ(get(D), 0x80);
}

TEST_F(RtcTest, ShowsBinaryWhenAsked) {
  put(B, B_24H | B_BINARY);
  EXPECT_EQ(get(4), 22);
  EXPECT_EQ(get(2), 13);
  EXPECT_EQ(get(9), 23);
  EXPECT_EQ(get(Century), 20);
}

TEST_F(RtcTest, Shows12HoursWithThePmBit) {
  put(B, 0);
  EXPECT_EQ(get(4), 0x80 | 0x10);
  put(B, B_BINARY);
  EXPECT_EQ(get(4), 0x80 | 10);
  clock.advance(2 * 3600 * second);
  EXPECT_EQ(get(4), 12);  // after midnight
}

TEST_F(RtcTest, GoesOnAcrossMidnightYearAndLeapDay) {
  put(B, B_SET | B_24H);
  put(Century, 0x20), put(9, 0x24), put(8, 0x02), put(7, 0x28), put(4, 0x23), put(2, 0x59), put(0, 0x59);
  put(B, B_24H);
  clock.advance(second);
  EXPECT_EQ(date() + " " + time(), "2024-02-29 00:00:00");
  clock.advance(86'400 * second);
  EXPECT_EQ(date(), "2024-03-01");
}

TEST_F(RtcTest, SetStopsTheUpdatesAndReleaseKeepsTheSecondsPhase) {
  clock.advance(second / 4);
  put(B, B_SET | B_24H);
  put(0, 0x30);
  clock.advance(10 * second);
  EXPECT_EQ(get(0), 0x30);
  put(B, B_24H);
  EXPECT_EQ(get(0), 0x30);
  clock.advance(second * 3 / 4);
  EXPECT_EQ(get(0), 0x31);
}

TEST_F(RtcTest, TheFirstUpdateFollowsHalfASecondAfterDividerReset) {
  put(A, 0x70);
  put(0, 0x10);
  clock.advance(5 * second);
  put(A, 0x26);
  clock.advance(second / 2 - 1);
  EXPECT_EQ(get(0), 0x10);
  clock.advance(1);
  EXPECT_EQ(get(0), 0x11);
}

TEST_F(RtcTest, ATimeRegisterMayBeWrittenWhileTheClockRuns) {
  put(4, 0x05);
  EXPECT_EQ(time(), "05:13:21");
  clock.advance(second);
  EXPECT_EQ(time(), "05:13:22");
}

TEST_F(RtcTest, TheWeekdayCanBeRenamed) {
  put(6, 7);
  EXPECT_EQ(get(6), 7);
  clock.advance(86'400 * second);
  EXPECT_EQ(get(6), 1);
}

TEST_F(RtcTest, NonsenseDatesDoNotHurt) {
  put(B, B_SET | B_24H | B_BINARY);
  for (uint8_t index : {0, 2, 4, 6, 7, 8, 9, 0x32}) put(index, 0xff);
  put(B, B_24H);
  clock.advance(second);
  get(0);
  EXPECT_LE(get(8), 0x12);
}

TEST_F(RtcTest, UpdateInProgressShowsBeforeTheUpdate) {
  EXPECT_EQ(get(A), 0x26);
  clock.advance(second - 244'000);
  EXPECT_EQ(get(A), 0xa6);
  clock.advance(244'000);
  EXPECT_EQ(get(A), 0x26);
}

TEST_F(RtcTest, TheUpdateInterruptComesEverySecondUntilRead) {
  put(B, B_24H | B_UIE);
  get(C);
  clock.advance(second);
  EXPECT_TRUE(irq.level);
  clock.advance(3 * second);
  EXPECT_EQ(irq.rises, 1u);
  EXPECT_EQ(get(C), 0x90 | 0x40);  // the periodic flag is set as well, it just does not interrupt
  EXPECT_FALSE(irq.level);
  clock.advance(second);
  EXPECT_EQ(irq.rises, 2u);
}

TEST_F(RtcTest, FlagsAreSetWithoutTheirInterruptEnabled) {
  get(C);
  clock.advance(second);
  EXPECT_EQ(get(C), 0x50);
  EXPECT_EQ(get(C), 0x00);
  EXPECT_EQ(irq.rises, 0u);
}

TEST_F(RtcTest, TheAlarmMatchesTheTimeOfDay) {
  put(1, 0x30), put(3, 0x15), put(5, 0x22);
  put(B, B_24H | B_AIE);
  get(C);
  clock.advance(128 * second);  // 22:15:29
  EXPECT_FALSE(irq.level);
  clock.advance(second);
  EXPECT_TRUE(irq.level);
  EXPECT_EQ(get(C) & 0xa0, 0xa0);
  clock.advance(86'399 * second);
  EXPECT_FALSE(irq.level);
  clock.advance(second);
  EXPECT_TRUE(irq.level);
}

TEST_F(RtcTest, AlarmFieldsThatDoNotCareMatchEverything) {
  put(1, 0x00), put(3, 0xff), put(5, 0xc0);
  put(B, B_24H | B_AIE);
  get(C);
  for (int minute = 0; minute < 3; minute++) {
    clock.advance(60 * second);
    EXPECT_EQ(get(C) & 0xa0, 0xa0);
  }
  EXPECT_EQ(irq.rises, 3u);
}

TEST_F(RtcTest, AnImpossibleAlarmNeverComes) {
  put(1, 0x61), put(3, 0x00), put(5, 0x00);
  put(B, B_24H | B_AIE);
  clock.advance(2 * 86'400 * second);
  EXPECT_EQ(irq.rises, 0u);
}

TEST_F(RtcTest, ThePeriodicInterruptHasTheSelectedRate) {
  for (auto [rate, hertz] : std::initializer_list<std::pair<uint8_t, unsigned>>{
           {15, 2}, {10, 64}, {6, 1024}, {3, 8192}, {1, 256}}) {
    put(A, 0x20 | rate);
    put(B, B_24H | B_PIE);
    get(C);
    unsigned before = irq.rises;
    for (unsigned i = 0; i < hertz; i++) {
      clock.advance(second / hertz + 1);
      get(C);
    }
    EXPECT_EQ(irq.rises - before, hertz) << "rate " << int{rate};
    put(B, B_24H);
  }
}

TEST_F(RtcTest, AnIdleClockArmsNoTimer) {
  clock.advance(3600 * second);
  EXPECT_EQ(irq.rises, 0u);
  EXPECT_EQ(time(), "23:13:21");
}

TEST_F(RtcTest, MemoryKeepsWhatIsWritten) {
  put(0x0e, 0x12);
  put(0x7f, 0x34);
  EXPECT_EQ(get(0x0e), 0x12);
  EXPECT_EQ(get(0xff), 0x34) << "bit 7 of the index is the NMI mask";
}

TEST_F(RtcTest, MemorySizesAreDescribedAsFirmwareDoes) {
  rtc.describe_memory(256ull << 20, 1ull << 32);
  EXPECT_EQ(get(0x15) | get(0x16) << 8, 640);
  EXPECT_EQ(get(0x17) | get(0x18) << 8, 0xffff);
  EXPECT_EQ(get(0x34) | get(0x35) << 8, (256 - 16) * 16);
  EXPECT_EQ(get(0x5b) | get(0x5c) << 8 | get(0x5d) << 16, 0x10000);
}

TEST_F(RtcTest, ResetDisablesInterruptsAndKeepsTimeAndMemory) {
  put(0x20, 0x77);
  put(B, B_24H | B_UIE);
  clock.advance(second);
  EXPECT_TRUE(irq.level);
  rtc.reset();
  EXPECT_FALSE(irq.level);
  EXPECT_EQ(get(B), B_24H);
  EXPECT_EQ(get(0x20), 0x77);
  EXPECT_EQ(time(), "22:13:22");
}

TEST_F(RtcTest, SavedStateRoundTripsTimeAlarmAndLine) {
  put(4, 0x05);
  put(B, B_24H | B_UIE);
  clock.advance(second);
  testing::FakeInterrupt other_irq;
  Rtc other(clock, other_irq);
  EXPECT_TRUE(testing::round_trip(rtc, other));
  EXPECT_TRUE(other_irq.level);
  other.write(0, 1, 4);
  EXPECT_EQ(other.read(1, 1), 0x05u);
}

TEST_F(RtcTest, SavedFieldsOutOfRangeAreRefused) {
  nlohmann::json json;
  rtc.save(json);
  for (auto [field, value] :
       std::initializer_list<std::pair<const char*, uint64_t>>{{"index", 128},
                                                               {"offset_nanoseconds", second},
                                                               {"weekday_shift", 7},
                                                               {"offset_seconds", 1ull << 62}}) {
    auto bad = json;
    bad[field] = value;
    EXPECT_THROW(rtc.load(bad), UsageError) << field;
  }
}

}  // namespace
}  // namespace lodge::device
