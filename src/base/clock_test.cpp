#include "base/clock.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <vector>

namespace lodge {
namespace {

TEST(FakeClock, RunsCallbacksInOrderOfDeadlineAtTheirOwnTime) {
  FakeClock clock;
  const uint64_t start = clock.now();
  std::vector<uint64_t> seen;
  auto late = clock.make_timer([&] { seen.push_back(clock.now() - start); });
  auto early = clock.make_timer([&] { seen.push_back(clock.now() - start); });
  late->arm(start + 200);
  early->arm(start + 100);
  clock.advance(150);
  EXPECT_EQ(seen, (std::vector<uint64_t>{100}));
  clock.advance(150);
  EXPECT_EQ(seen, (std::vector<uint64_t>{100, 200}));
}

TEST(FakeClock, ATimerMayRearmItselfAndIsSilentOnceCancelled) {
  FakeClock clock;
  int ticks = 0;
  std::unique_ptr<Timer> timer;
  timer = clock.make_timer([&] {
    ++ticks;
    timer->arm(clock.now() + 10);
  });
  timer->arm(clock.now() + 10);
  clock.advance(100);
  EXPECT_EQ(ticks, 10);
  timer->cancel();
  clock.advance(100);
  EXPECT_EQ(ticks, 10);
}

TEST(RealClock, FiresAfterItsDeadlineAndNotAfterDestruction) {
  RealClock clock;
  std::atomic<uint64_t> fired{0};
  auto timer = clock.make_timer([&] { fired = clock.now(); });
  const uint64_t deadline = clock.now() + 2'000'000;
  timer->arm(deadline);
  while (fired == 0) std::this_thread::yield();
  EXPECT_GE(fired.load(), deadline);
  fired = 0;
  timer->arm(clock.now() + 20'000'000);
  timer.reset();
  std::this_thread::sleep_for(std::chrono::milliseconds(40));
  EXPECT_EQ(fired.load(), 0u);
}

TEST(RealClock, ALaterTimerFiresAfterAnEarlierOneWasCancelled) {
  RealClock clock;
  std::atomic<bool> fired{false};
  auto a = clock.make_timer([] { FAIL() << "was cancelled"; });
  auto b = clock.make_timer([&] { fired = true; });
  b->arm(clock.now() + 5'000'000);
  a->arm(clock.now() + 2'000'000);
  a->cancel();
  while (!fired) std::this_thread::yield();
  // Nothing is armed now, and then something is.
  b->arm(clock.now() + 60'000'000'000);
  b->cancel();
  fired = false;
  b->arm(clock.now() + 1'000'000);
  while (!fired) std::this_thread::yield();
}

TEST(RealClock, AnEarlierTimerOvertakesALaterOne) {
  RealClock clock;
  std::atomic<bool> late{false};
  std::atomic<bool> early{false};
  auto a = clock.make_timer([&] { late = true; });
  auto b = clock.make_timer([&] { early = true; });
  a->arm(clock.now() + 60'000'000'000);
  b->arm(clock.now() + 1'000'000);
  while (!early) std::this_thread::yield();
  EXPECT_FALSE(late);
}

}  // namespace
}  // namespace lodge
