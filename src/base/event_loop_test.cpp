#include "base/event_loop.hpp"

#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <system_error>

namespace lodge {
namespace {

// Waits for what another thread does; the deadline only ends a test that has failed.
template <class Condition>
bool eventually(Condition condition) {
  for (int i = 0; i < 5000 && !condition(); i++) ::usleep(1000);
  return condition();
}

TEST(EventLoop, CallsBackOnItsOwnThread) {
  EventLoop loop("test");
  const Fd event = Fd::event();
  std::atomic<int> calls = 0;
  std::atomic<bool> own = false;
  const auto watch = loop.watch_event(event.get(), [&] { own = loop.on_loop_thread(), calls++; });
  signal_event(event.get());
  EXPECT_TRUE(eventually([&] { return calls == 1; }));
  EXPECT_TRUE(own);
  EXPECT_FALSE(loop.on_loop_thread());
}

TEST(EventLoop, NothingIsCalledAfterItsWatchIsGone) {
  EventLoop loop("test");
  const Fd event = Fd::event(), other = Fd::event();
  std::atomic<int> calls = 0, others = 0;
  auto watch = loop.watch_event(event.get(), [&] { calls++; });
  const auto second = loop.watch_event(other.get(), [&] { others++; });
  watch.reset();
  signal_event(event.get());
  signal_event(other.get());
  EXPECT_TRUE(eventually([&] { return others == 1; }));
  EXPECT_EQ(calls, 0);
}

TEST(EventLoop, DestroyingAWatchWaitsForItsCallback) {
  EventLoop loop("test");
  const Fd event = Fd::event();
  std::atomic<bool> inside = false, left = false;
  auto watch = loop.watch_event(event.get(), [&] {
    inside = true;
    ::usleep(50'000);
    left = true;
  });
  signal_event(event.get());
  EXPECT_TRUE(eventually([&] { return inside.load(); }));
  watch.reset();
  EXPECT_TRUE(left);
}

TEST(EventLoop, ACallbackMayDestroyItsOwnWatch) {
  EventLoop loop("test");
  const Fd event = Fd::event();
  std::atomic<int> calls = 0;
  EventLoop::Watch watch;
  watch = loop.watch_event(event.get(), [&] {
    watch.reset();
    calls++;  // last: it tells the other thread that `watch` is its own again
  });
  signal_event(event.get());
  EXPECT_TRUE(eventually([&] { return calls == 1; }));
  signal_event(event.get());
  ::usleep(20'000);
  EXPECT_EQ(calls, 1);
}

TEST(EventLoop, EventsCanBeTurnedOffAndOn) {
  EventLoop loop("test");
  const Fd event = Fd::event();
  std::atomic<int> calls = 0;
  auto watch = loop.watch_event(event.get(), [&] { calls++; });
  watch.set_events(0);
  signal_event(event.get());
  ::usleep(20'000);
  EXPECT_EQ(calls, 0);
  watch.set_events(EPOLLIN);
  EXPECT_TRUE(eventually([&] { return calls == 1; }));
}

TEST(EventLoop, RefusesWhatCannotBeWatched) {
  EventLoop loop("test");
  EXPECT_THROW(std::ignore = loop.watch(-1, EPOLLIN, [](uint32_t) {}), std::system_error);
}

}  // namespace
}  // namespace lodge
