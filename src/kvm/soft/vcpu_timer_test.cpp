// On the host's clocks, because that is what the timer is about: bounds are wide enough for a busy machine.
#include "kvm/soft/vcpu_timer.hpp"

#include <gtest/gtest.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <thread>

#include "kvm/soft/soft.hpp"
#include "kvm/soft/vm.hpp"

namespace lodge::kvm::soft {
namespace {

class VcpuTimerTest : public testing::Test {
 protected:
  ~VcpuTimerTest() override { timer->detach(); }

  // What a vCPU's thread does in the guest, until the timer has expired or `limit` is over.
  bool run(std::chrono::milliseconds limit) {
    const auto end = std::chrono::steady_clock::now() + limit;
    while (expired == 0 && std::chrono::steady_clock::now() < end) {
      if (request.exchange(0) != 0) timer->approach();
      if (timer->near()) timer->expire_if_due();
    }
    return expired != 0;
  }

  static uint32_t khz() { return open()->create_vm()->create_vcpu(0)->tsc_khz(); }

  RealClock clock;
  std::atomic<uint32_t> request{0};
  std::shared_ptr<VcpuTimer> timer = std::make_shared<VcpuTimer>(clock, khz(), [this] {
    told_by = std::this_thread::get_id();
    request = 1;
  });
  std::thread::id told_by;
  int expired = 0;
  uint64_t expired_at = 0;
  std::unique_ptr<Timer> handle = VcpuTimer::make_timer(timer, [this] {
    ++expired;
    expired_at = clock.now();
  });
};

constexpr uint64_t ms = 1'000'000;
constexpr auto patience = std::chrono::seconds(10);
// The TSC and the system's clock are read one after the other, and run at slightly different speeds.
constexpr uint64_t tolerance = ms / 10;

TEST_F(VcpuTimerTest, ExpiresWhileTheGuestRuns) {
  const uint64_t deadline = clock.now() + 3 * ms;
  handle->arm(deadline);
  EXPECT_FALSE(timer->near());
  ASSERT_TRUE(run(patience));
  EXPECT_GE(expired_at + tolerance, deadline);
}

TEST_F(VcpuTimerTest, APastDeadlineExpiresAtOnce) {
  handle->arm(1);
  EXPECT_TRUE(timer->near());
  EXPECT_EQ(request, 1u) << "whoever runs the guest is told to look";
  timer->expire_if_due();
  EXPECT_EQ(expired, 1);
}

TEST_F(VcpuTimerTest, AHaltLastsUntilTheDeadline) {
  const uint64_t deadline = clock.now() + 3 * ms;
  handle->arm(deadline);
  timer->wait(request);
  EXPECT_EQ(request, 0u) << "nobody else is asked to wake the thread";
  EXPECT_GE(clock.now() + tolerance, deadline);
  EXPECT_TRUE(timer->near());
  EXPECT_TRUE(run(patience));
}

TEST_F(VcpuTimerTest, AWakeEndsTheHaltAndLeavesTheTimerArmed) {
  const uint64_t deadline = clock.now() + 30 * ms;
  handle->arm(deadline);
  std::thread waker([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    request = 4;
    ::syscall(SYS_futex, reinterpret_cast<uint32_t*>(&request), FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
  });
  timer->wait(request);
  waker.join();
  EXPECT_EQ(request, 4u);
  EXPECT_EQ(expired, 0) << "that is for expire_if_due()";
  ASSERT_TRUE(run(patience));
  EXPECT_GE(expired_at + tolerance, deadline);
}

// As in run(): the alarm of the vCPU's thread tells, not the clock's thread.
TEST_F(VcpuTimerTest, TheThreadItselfIsInterrupted) {
  if (!ThreadAlarm::create()) GTEST_SKIP() << "no alarms here";
  const VcpuTimer::OnThread on_thread(*timer);
  ASSERT_EQ(request, 0u);
  const uint64_t deadline = clock.now() + 3 * ms;
  handle->arm(deadline);
  ASSERT_TRUE(run(patience));
  EXPECT_GE(expired_at + tolerance, deadline);
  EXPECT_EQ(told_by, std::this_thread::get_id());
}

TEST_F(VcpuTimerTest, AnAlarmBetweenTwoRunsIsNotForgotten) {
  if (!ThreadAlarm::create()) GTEST_SKIP() << "no alarms here";
  { const VcpuTimer::OnThread on_thread(*timer); }
  handle->arm(clock.now() + 2 * ms);
  std::this_thread::sleep_for(std::chrono::milliseconds(10));
  EXPECT_EQ(request, 0u);
  const VcpuTimer::OnThread on_thread(*timer);
  EXPECT_EQ(request, 1u);
  EXPECT_TRUE(run(patience));
}

TEST_F(VcpuTimerTest, AVcpuMayMoveToAnotherThreadWithItsTimer) {
  if (!ThreadAlarm::create()) GTEST_SKIP() << "no alarms here";
  {
    const VcpuTimer::OnThread on_thread(*timer);
    handle->arm(clock.now() + 5 * ms);
  }
  std::thread([&] {
    const VcpuTimer::OnThread on_thread(*timer);
    EXPECT_TRUE(run(patience));
    EXPECT_EQ(told_by, std::this_thread::get_id());
  }).join();
}

TEST_F(VcpuTimerTest, ACancelledTimerStaysSilent) {
  handle->arm(clock.now() + 2 * ms);
  handle->cancel();
  EXPECT_FALSE(run(std::chrono::milliseconds(20)));
}

TEST_F(VcpuTimerTest, ALaterDeadlineReplacesAnEarlierOne) {
  handle->arm(clock.now() + 2 * ms);
  const uint64_t deadline = clock.now() + 10 * ms;
  handle->arm(deadline);
  ASSERT_TRUE(run(patience));
  EXPECT_EQ(expired, 1);
  EXPECT_GE(expired_at + tolerance, deadline);
}

TEST(LeadTime, FollowsHowLateTheHostIs) {
  LeadTime lead(30'000);
  for (int i = 0; i < 20'000; ++i) lead.observe(60'000);
  EXPECT_GE(lead.ns() + LeadTime::tolerable_ns, 59'900u);
  EXPECT_LT(lead.ns() + LeadTime::tolerable_ns, 64'000u);
  for (int i = 0; i < 100; ++i) lead.observe(5'000'000);
  EXPECT_EQ(lead.ns(), LeadTime::longest_ns) << "a host that is out of reach costs no more than this";
}

}  // namespace
}  // namespace lodge::kvm::soft
