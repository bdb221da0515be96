#include "device/hpet.hpp"

#include <gtest/gtest.h>

#include <deque>

#include "device/testing.hpp"

namespace lodge::device {
namespace {

constexpr uint64_t CAP = 0, CONF = 0x10, STATUS = 0x20, COUNTER = 0xf0;
constexpr uint64_t LEVEL = 1u << 1, ENABLE = 1u << 2, PERIODIC = 1u << 3, VAL_SET = 1u << 6,
                   MODE_32 = 1u << 8;
constexpr uint64_t tick = 10, millisecond = 1'000'000;

uint64_t conf(unsigned n) {
  return 0x100 + n * 0x20;
}
uint64_t comp(unsigned n) {
  return 0x108 + n * 0x20;
}
uint64_t route(unsigned gsi) {
  return uint64_t{gsi} << 9;
}

class HpetTest : public ::testing::Test {
 protected:
  HpetWiring wiring() {
    return {irq0, irq8, [this](unsigned gsi) -> machine::Interrupt& { return lines.at(gsi); },
            [this](bool on) { legacy = on; }};
  }

  FakeClock clock;
  testing::FakeInterrupt irq0, irq8;
  std::deque<testing::FakeInterrupt> lines{24};
  bool legacy = false;
  Hpet hpet{clock, wiring()};
};

TEST_F(HpetTest, CapabilitiesNameThreeTimersOf64BitsAt100MHz) {
  EXPECT_EQ(hpet.read(CAP, 4), 0x8086'a201u);
  EXPECT_EQ(hpet.read(CAP + 4, 4), 10'000'000u);
  EXPECT_EQ(hpet.read(conf(0), 8), 0x00f0'0000'0000'0030u);
}

TEST_F(HpetTest, TheCounterRunsWhileEnabledAndKeepsItsValueWhileHalted) {
  clock.advance(millisecond);
  EXPECT_EQ(hpet.read(COUNTER, 8), 0u);
  hpet.write(CONF, 4, 1);
  clock.advance(millisecond);
  EXPECT_EQ(hpet.read(COUNTER, 8), 100'000u);
  hpet.write(CONF, 4, 0);
  clock.advance(millisecond);
  EXPECT_EQ(hpet.read(COUNTER, 8), 100'000u);
}

TEST_F(HpetTest, HalvesOfTheCounterAreReadAndWrittenApart) {
  hpet.write(COUNTER, 4, 0x1111'1111);
  hpet.write(COUNTER + 4, 4, 0x2222'2222);
  EXPECT_EQ(hpet.read(COUNTER, 8), 0x2222'2222'1111'1111u);
  EXPECT_EQ(hpet.read(COUNTER + 4, 4), 0x2222'2222u);
}

TEST_F(HpetTest, AOneShotInterruptsOnceAtItsValue) {
  hpet.write(CONF, 4, 1);
  hpet.write(conf(0), 4, ENABLE | route(20));
  hpet.write(comp(0), 8, 1000);
  clock.advance(999 * tick);
  EXPECT_EQ(lines[20].rises, 0u);
  clock.advance(tick);
  EXPECT_EQ(lines[20].rises, 1u);
  EXPECT_FALSE(lines[20].level);
  clock.advance(100 * millisecond);
  EXPECT_EQ(lines[20].rises, 1u);
}

TEST_F(HpetTest, AValueThatHasPassedDoesNotInterrupt) {
  hpet.write(CONF, 4, 1);
  clock.advance(millisecond);
  hpet.write(conf(0), 4, ENABLE | route(20));
  hpet.write(comp(0), 8, 1000);
  clock.advance(1000 * millisecond);
  EXPECT_EQ(lines[20].rises, 0u);
}

TEST_F(HpetTest, A32BitComparatorMatchesAfterTheWrap) {
  hpet.write(COUNTER, 8, 0x1'ffff'ff00);
  hpet.write(CONF, 4, 1);
  hpet.write(conf(1), 4, ENABLE | MODE_32 | route(21));
  hpet.write(comp(1), 4, 0x100);
  clock.advance(0x1ff * tick);
  EXPECT_EQ(lines[21].rises, 0u);
  clock.advance(tick);
  EXPECT_EQ(lines[21].rises, 1u);
}

TEST_F(HpetTest, APeriodicComparatorRepeatsAndShowsItsNextValue) {
  hpet.write(conf(0), 4, ENABLE | PERIODIC | VAL_SET | route(20));
  hpet.write(comp(0), 4, 5'000);    // first at 5,000
  hpet.write(comp(0), 4, 100'000);  // then every 100,000
  hpet.write(comp(0) + 4, 4,
             0);  // the high half, which reset has left as ones, does not matter for the period
  hpet.write(CONF, 4, 1);
  EXPECT_EQ(hpet.read(conf(0), 4) & VAL_SET, 0u);
  hpet.write(conf(0), 4, ENABLE | PERIODIC | VAL_SET | route(20));
  hpet.write(comp(0), 8, 5'000);
  hpet.write(comp(0), 8, 100'000);
  clock.advance(5'000 * tick);
  EXPECT_EQ(lines[20].rises, 1u);
  EXPECT_EQ(hpet.read(comp(0), 8), 105'000u);
  clock.advance(10 * millisecond);
  EXPECT_EQ(lines[20].rises, 11u);
}

TEST_F(HpetTest, ATinyPeriodIsSlowedDown) {
  hpet.write(CONF, 4, 1);
  hpet.write(conf(0), 4, ENABLE | PERIODIC | VAL_SET | route(20));
  hpet.write(comp(0), 8, 1);
  clock.advance(millisecond);
  EXPECT_LE(lines[20].rises, 50u);
  EXPECT_GE(lines[20].rises, 40u);
}

TEST_F(HpetTest, ALevelInterruptStaysUntilItsStatusIsCleared) {
  hpet.write(CONF, 4, 1);
  hpet.write(conf(2), 4, ENABLE | LEVEL | route(23));
  hpet.write(comp(2), 8, 100);
  clock.advance(millisecond);
  EXPECT_TRUE(lines[23].level);
  EXPECT_EQ(hpet.read(STATUS, 4), 4u);
  hpet.write(STATUS, 4, 4);
  EXPECT_FALSE(lines[23].level);
  EXPECT_EQ(hpet.read(STATUS, 4), 0u);
}

TEST_F(HpetTest, DisablingALevelInterruptReleasesTheLine) {
  hpet.write(CONF, 4, 1);
  hpet.write(conf(2), 4, ENABLE | LEVEL | route(23));
  hpet.write(comp(2), 8, 100);
  clock.advance(millisecond);
  hpet.write(conf(2), 4, LEVEL | route(23));
  EXPECT_FALSE(lines[23].level);
}

TEST_F(HpetTest, ARouteThatIsNotWiredInterruptsNobody) {
  hpet.write(CONF, 4, 1);
  hpet.write(conf(0), 4, ENABLE | route(31));
  hpet.write(comp(0), 8, 100);
  clock.advance(millisecond);
  for (const auto& line : lines) EXPECT_EQ(line.rises, 0u);
}

TEST_F(HpetTest, LegacyReplacementTakesTheLinesOfTheTimerAndTheRtc) {
  hpet.rtc_input().set(true);
  EXPECT_TRUE(irq8.level);
  hpet.write(CONF, 4, 3);
  EXPECT_TRUE(legacy);
  EXPECT_FALSE(irq8.level);
  hpet.write(conf(0), 4, ENABLE);
  hpet.write(comp(0), 8, 100);
  hpet.write(conf(1), 4, ENABLE);
  hpet.write(comp(1), 8, 200);
  clock.advance(millisecond);
  EXPECT_EQ(irq0.rises, 1u);
  EXPECT_EQ(irq8.rises, 2u);
  hpet.write(CONF, 4, 1);
  EXPECT_FALSE(legacy);
  EXPECT_TRUE(irq8.level) << "the clock's line is seen again";
}

TEST_F(HpetTest, ResetHaltsEverything) {
  hpet.write(CONF, 4, 3);
  hpet.write(conf(0), 4, ENABLE);
  hpet.write(comp(0), 8, 100);
  hpet.reset();
  EXPECT_FALSE(legacy);
  clock.advance(millisecond);
  EXPECT_EQ(irq0.rises, 0u);
  EXPECT_EQ(hpet.read(COUNTER, 8), 0u);
  EXPECT_EQ(hpet.read(comp(0), 8), ~uint64_t{0});
}

TEST_F(HpetTest, SavedStateRoundTripsAndTheComparatorsGoOn) {
  hpet.write(CONF, 4, 3);
  hpet.write(conf(0), 4, ENABLE);
  hpet.write(comp(0), 8, 150'000);
  hpet.write(conf(2), 4, ENABLE | LEVEL | route(22));
  hpet.write(comp(2), 8, 10);
  clock.advance(millisecond);
  FakeClock other_clock;
  testing::FakeInterrupt other_irq0, other_irq8;
  std::deque<testing::FakeInterrupt> other_lines{24};
  bool other_legacy = false;
  Hpet other(other_clock, {other_irq0, other_irq8,
                           [&](unsigned gsi) -> machine::Interrupt& { return other_lines.at(gsi); },
                           [&](bool on) { other_legacy = on; }});
  EXPECT_TRUE(testing::round_trip(hpet, other));
  EXPECT_TRUE(other_legacy);
  EXPECT_TRUE(other_lines[22].level);
  EXPECT_EQ(other.read(COUNTER, 8), 100'000u);
  other_clock.advance(millisecond / 2);
  EXPECT_EQ(other_irq0.rises, 1u);
}

}  // namespace
}  // namespace lodge::device
