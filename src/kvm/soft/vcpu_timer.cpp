#include "kvm/soft/vcpu_timer.hpp"

#include <linux/futex.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <ctime>

namespace lodge::kvm::soft {
namespace {

__extension__ typedef unsigned __int128 u128;

constexpr uint64_t spin_share = 8;  // at most an eighth of the time

// False: the time is over.
bool futex_wait(std::atomic<uint32_t>& word, const timespec* until) noexcept {
  const long result = ::syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_BITSET_PRIVATE, 0,
                                until, nullptr, FUTEX_BITSET_MATCH_ANY);
  return result == 0 || errno != ETIMEDOUT;
}

timespec until(uint64_t ns) noexcept {
  return {.tv_sec = static_cast<time_t>(ns / 1'000'000'000),
          .tv_nsec = static_cast<long>(ns % 1'000'000'000)};
}

uint64_t tsc() noexcept {
  return __builtin_ia32_rdtsc();
}

}  // namespace

void LeadTime::observe(uint64_t lateness_ns) noexcept {
  constexpr uint64_t step = 3'000, down = step / 200, shortest = 2'000;
  uint64_t up = 0;
  // What is out of reach (a busy host) says little about how long a wake-up takes.
  if (lateness_ns > ns_ + tolerable_ns)
    up = lateness_ns > 2 * longest_ns ? step : std::max(step, (lateness_ns - ns_) / 4);
  ns_ = std::clamp(ns_ + up - (up == 0 ? down : 0), shortest, longest_ns);
}

class VcpuTimer::Handle final : public Timer {
 public:
  explicit Handle(std::shared_ptr<VcpuTimer> timer) : timer_(std::move(timer)) {}
  void arm(uint64_t deadline) noexcept override { timer_->arm(deadline); }
  void cancel() noexcept override { timer_->cancel(); }

 private:
  std::shared_ptr<VcpuTimer> timer_;
};

VcpuTimer::VcpuTimer(Clock& clock, uint32_t tsc_khz, std::function<void()> approaching)
    : clock_(clock),
      tsc_khz_(tsc_khz),
      approaching_(std::move(approaching)),
      host_(clock.make_timer([this] { approaching_(); })) {}

std::unique_ptr<Timer> VcpuTimer::make_timer(const std::shared_ptr<VcpuTimer>& timer,
                                             std::function<void()> expired) {
  timer->expired_ = std::move(expired);
  return std::make_unique<Handle>(timer);
}

void VcpuTimer::detach() noexcept {
  deadline_ = 0;
  near_ = false;
  alarm_.reset();
  host_.reset();  // waits for `approaching`
}

uint64_t VcpuTimer::nanoseconds(uint64_t ticks) const noexcept {
  return static_cast<uint64_t>(static_cast<u128>(ticks) * 1'000'000 / tsc_khz_);
}

void VcpuTimer::arm(uint64_t deadline) noexcept {
  if (!host_) return;
  const uint64_t now_tsc = tsc();
  const uint64_t now = clock_.now();
  const uint64_t left = deadline > now ? deadline - now : 0;
  constexpr uint64_t far = uint64_t{1} << 62;
  deadline_ =
      now_tsc + static_cast<uint64_t>(std::min<u128>(static_cast<u128>(left) * tsc_khz_ / 1'000'000, far));
  near_ = left <= lead_running_.ns();
  if (near_)
    approaching_();
  else
    ask_host(now_tsc, left);
}

void VcpuTimer::ask_host(uint64_t now_tsc, uint64_t left_ns) noexcept {
  const uint64_t ahead = left_ns - lead_running_.ns();
  asked_for_ = now_tsc + static_cast<uint64_t>(static_cast<u128>(ahead) * tsc_khz_ / 1'000'000);
  const uint64_t at = clock_.now() + ahead;
  if (alarm_)
    alarm_->arm(at);
  else
    host_->arm(at);
}

void VcpuTimer::forget_host() noexcept {
  if (asked_for_.exchange(0) == 0) return;
  if (alarm_)
    alarm_->cancel();
  else if (host_)
    host_->cancel();
}

void VcpuTimer::cancel() noexcept {
  deadline_ = 0;
  near_ = false;
  forget_host();
}

// What was asked for elsewhere is asked for again by approach().
void VcpuTimer::move_to_this_thread() noexcept {
  forget_host();
  alarm_.reset();
  alarm_ = ThreadAlarm::create();
  alarm_of_ = ::pthread_self();
  alarm_tried_ = true;
  seen_missed_ = ThreadAlarm::missed();
  if (deadline_ != 0 && !near_) approaching_();
}

VcpuTimer::OnThread::OnThread(VcpuTimer& timer) noexcept : receiver_(timer.approaching_) {
  if (!timer.alarm_tried_ || ::pthread_equal(timer.alarm_of_, ::pthread_self()) == 0) {
    timer.move_to_this_thread();
  } else if (const uint32_t missed = ThreadAlarm::missed(); missed != timer.seen_missed_) {
    timer.seen_missed_ = missed;
    if (timer.deadline_ != 0) timer.approaching_();
  }
}

void VcpuTimer::approach() noexcept {
  const uint64_t deadline = deadline_;
  if (deadline == 0) return;
  const uint64_t now = tsc();
  const uint64_t left = now < deadline ? nanoseconds(deadline - now) : 0;
  // Early: the host's clock may be faster than the TSC, or the call was for a deadline that was replaced
  // since.
  if (left > LeadTime::longest_ns) return ask_host(now, left);
  if (const uint64_t asked_for = asked_for_.exchange(0); asked_for != 0 && asked_for < now)
    lead_running_.observe(nanoseconds(now - asked_for));
  near_ = true;
}

void VcpuTimer::expire_if_due() noexcept {
  const uint64_t deadline = deadline_;
  if (deadline == 0 || tsc() < deadline) return;
  deadline_ = 0;
  near_ = false;
  expired_();
}

// Default slack lets a sleep last 50 microseconds longer.
void VcpuTimer::tighten_slack() noexcept {
  if (slack_set_ && ::pthread_equal(slack_of_, ::pthread_self()) != 0) return;
  ::prctl(PR_SET_TIMERSLACK, 1);
  slack_of_ = ::pthread_self();
  slack_set_ = true;
}

uint64_t VcpuTimer::halted_lead(uint64_t now_tsc) noexcept {
  const uint64_t most = uint64_t{tsc_khz_} * 2;  // two milliseconds
  spin_credit_ = std::min(most, spin_credit_ + (now_tsc - credit_since_) / spin_share);
  credit_since_ = now_tsc;
  return std::min(lead_halted_.ns(), nanoseconds(spin_credit_));
}

void VcpuTimer::wait(std::atomic<uint32_t>& word, uint64_t at_most_ns) noexcept {
  const uint64_t deadline = deadline_;
  if (deadline == 0 && at_most_ns == forever) {
    futex_wait(word, nullptr);
    return;
  }
  if (const uint64_t now = tsc();
      deadline == 0 || (now < deadline && nanoseconds(deadline - now) > at_most_ns)) {
    // Before the deadline: what the host was asked for stays as it is.
    const timespec time = until(clock_.now() + at_most_ns);
    futex_wait(word, &time);
    return;
  }
  tighten_slack();
  forget_host();
  const uint64_t start = tsc();
  const uint64_t left = start < deadline ? nanoseconds(deadline - start) : 0;
  const uint64_t lead = halted_lead(start);
  bool timed_out = true;
  if (left > lead) {
    const uint64_t end = clock_.now() + left - lead;
    const timespec time = until(end);
    timed_out = !futex_wait(word, &time);
    if (timed_out) lead_halted_.observe(clock_.now() - end);
  }
  const uint64_t woken = tsc();
  if (timed_out) {
    while (word.load(std::memory_order_relaxed) == 0 && tsc() < deadline) __builtin_ia32_pause();
    const uint64_t spun = tsc() - woken;
    spin_credit_ -= std::min(spin_credit_, spun);
  }
  // Woken by something else: the guest goes on with the deadline still ahead.
  const uint64_t now = tsc();
  const uint64_t rest = now < deadline ? nanoseconds(deadline - now) : 0;
  near_ = rest <= lead_running_.ns();
  if (!near_) ask_host(now, rest);
}

}  // namespace lodge::kvm::soft
