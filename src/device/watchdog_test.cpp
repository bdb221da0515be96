#include "device/watchdog.hpp"

#include <gtest/gtest.h>

#include "base/error.hpp"
#include "device/testing.hpp"

namespace lodge::device {
namespace {

constexpr uint64_t second = 1'000'000'000;

class WatchdogTest : public ::testing::Test {
 protected:
  void write(uint64_t offset, uint64_t value) { watchdog.write(offset, 4, value); }
  uint64_t read(uint64_t offset) { return watchdog.read(offset, 4); }

  FakeClock clock;
  int expired = 0;
  Watchdog watchdog{clock, [this] { expired++; }};
};

TEST_F(WatchdogTest, ExpiresOnceWhenItIsLeftAlone) {
  write(Watchdog::COUNT, 30);
  clock.advance(10 * second);
  EXPECT_EQ(read(Watchdog::CURRENT), 0u);
  write(Watchdog::CONTROL, Watchdog::RUN);
  EXPECT_EQ(read(Watchdog::CURRENT), 30u);
  clock.advance(second);
  EXPECT_EQ(read(Watchdog::CURRENT), 20u);
  clock.advance(2 * second - 1);
  EXPECT_EQ(expired, 0);
  clock.advance(1);
  EXPECT_EQ(expired, 1);
  EXPECT_EQ(read(Watchdog::STATUS), Watchdog::FIRED);
  EXPECT_EQ(read(Watchdog::CONTROL), 0u);
  clock.advance(100 * second);
  EXPECT_EQ(expired, 1);
  write(Watchdog::STATUS, Watchdog::FIRED);
  EXPECT_EQ(read(Watchdog::STATUS), 0u);
}

TEST_F(WatchdogTest, EveryRestartGivesAllOfTheTime) {
  write(Watchdog::COUNT, 20);
  write(Watchdog::CURRENT, 1);  // does not start it
  clock.advance(5 * second);
  EXPECT_EQ(expired, 0);
  write(Watchdog::CONTROL, Watchdog::RUN);
  for (int i = 0; i < 10; i++) {
    clock.advance(2 * second - 1);
    write(Watchdog::CURRENT, 1);
  }
  write(Watchdog::CONTROL, Watchdog::RUN);  // running already: no restart
  clock.advance(second);
  write(Watchdog::CONTROL, Watchdog::RUN);
  clock.advance(second);
  EXPECT_EQ(expired, 1);
}

TEST_F(WatchdogTest, StopsWhenItIsTold) {
  write(Watchdog::COUNT, 10);
  write(Watchdog::CONTROL, Watchdog::RUN);
  write(Watchdog::CONTROL, 0);
  clock.advance(100 * second);
  EXPECT_EQ(expired, 0);
}

TEST_F(WatchdogTest, CountsAreBoundedAndOddAccessesIgnored) {
  write(Watchdog::COUNT, 0);
  EXPECT_EQ(read(Watchdog::COUNT), 1u);
  write(Watchdog::COUNT, 0xffff'ffff);
  EXPECT_EQ(read(Watchdog::COUNT), Watchdog::max_count);
  watchdog.write(Watchdog::CONTROL, 1, Watchdog::RUN);
  EXPECT_EQ(read(Watchdog::CONTROL), 0u);
  EXPECT_EQ(watchdog.read(Watchdog::COUNT, 2), 0u);
  EXPECT_EQ(watchdog.read(2, 4), 0u);
}

TEST_F(WatchdogTest, NoTimePassesWhileTheMachineIsPaused) {
  write(Watchdog::COUNT, 30);
  write(Watchdog::CONTROL, Watchdog::RUN);
  clock.advance(second);
  watchdog.set_paused(true);
  watchdog.set_paused(true);  // once more: nothing new
  clock.advance(1000 * second);
  EXPECT_EQ(expired, 0);
  EXPECT_EQ(read(Watchdog::CURRENT), 20u);
  watchdog.set_paused(false);
  EXPECT_EQ(read(Watchdog::CURRENT), 20u);
  clock.advance(2 * second - 1);
  EXPECT_EQ(expired, 0);
  clock.advance(1);
  EXPECT_EQ(expired, 1);
}

// A vCPU gets its last instructions done after the pause was asked for.
TEST_F(WatchdogTest, ARestartInThePauseGivesAllOfTheTimeAfterIt) {
  write(Watchdog::COUNT, 30);
  watchdog.set_paused(true);
  write(Watchdog::CONTROL, Watchdog::RUN);
  clock.advance(2 * second);
  write(Watchdog::CURRENT, 1);
  FakeClock later;
  int fired = 0;
  Watchdog restored(later, [&] { fired++; });
  EXPECT_TRUE(testing::round_trip(watchdog, restored));  // as a machine is saved: paused
  later.advance(3 * second);
  EXPECT_EQ(fired, 1);
  clock.advance(1000 * second);
  watchdog.set_paused(false);
  clock.advance(3 * second - 1);
  EXPECT_EQ(expired, 0);
  clock.advance(1);
  EXPECT_EQ(expired, 1);
  watchdog.set_paused(true);
  watchdog.set_paused(false);
  clock.advance(1000 * second);
  EXPECT_EQ(expired, 1);
}

TEST_F(WatchdogTest, SavedStateKeepsTheTimeThatIsLeft) {
  write(Watchdog::COUNT, 30);
  write(Watchdog::CONTROL, Watchdog::RUN);
  clock.advance(second);
  FakeClock later;
  later.advance(1000 * second);
  int fired = 0;
  Watchdog other(later, [&] { fired++; });
  EXPECT_TRUE(testing::round_trip(watchdog, other));
  later.advance(2 * second - 1);
  EXPECT_EQ(fired, 0);
  later.advance(1);
  EXPECT_EQ(fired, 1);
  nlohmann::json bad;
  watchdog.save(bad);
  bad["count"] = 0;
  EXPECT_THROW(other.load(bad), UsageError);
}

}  // namespace
}  // namespace lodge::device
