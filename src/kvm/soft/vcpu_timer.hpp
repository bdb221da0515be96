// The timer of one vCPU's LAPIC. It expires on the vCPU's own thread: waking a thread takes tens of
// microseconds, so a vCPU in the guest is told a little *before* the deadline, by an alarm of its own thread,
// and from then on looks at the TSC between blocks; a halted one sleeps on the deadline itself, wakes a
// little before and spins for the rest. How much before follows from how late the host is (LeadTime);
// spinning is limited to an eighth of the time.
//
// While the vCPU is not in run() nothing expires: it is due when run() is entered. Before the first run(),
// and where the host grants no alarm, the clock's thread tells.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>

#include "base/clock.hpp"
#include "kvm/soft/thread_alarm.hpp"

namespace lodge::kvm::soft {

// How long before a deadline to ask the host, so that about one wake-up in 200 comes more than 10
// microseconds after it: up by a step or more when one did, down by a 200th of it when none did.
class LeadTime {
 public:
  static constexpr uint64_t longest_ns = 200'000, tolerable_ns = 5'000;
  explicit LeadTime(uint64_t start_ns) : ns_(start_ns) {}
  uint64_t ns() const noexcept { return ns_; }
  void observe(uint64_t lateness_ns) noexcept;

 private:
  uint64_t ns_;
};

class VcpuTimer {
 public:
  // `approaching` is called, by any thread, when the vCPU's thread has to look at the timer.
  VcpuTimer(Clock& clock, uint32_t tsc_khz, std::function<void()> approaching);

  // What the LAPIC calls. `timer` may be destroyed later than the vCPU: nothing is called after detach().
  static std::unique_ptr<Timer> make_timer(const std::shared_ptr<VcpuTimer>& timer,
                                           std::function<void()> expired);
  void detach() noexcept;

  // --- the vCPU's thread ---
  // Around all of run(): `approaching` is also called in a signal handler of this thread.
  class OnThread {
   public:
    explicit OnThread(VcpuTimer& timer) noexcept;

   private:
    ThreadAlarm::Receiver receiver_;
  };
  // Near: expire_if_due() is to be asked between blocks.
  bool near() const noexcept { return near_.load(std::memory_order_relaxed); }
  void approach() noexcept;  // after `approaching`
  void expire_if_due() noexcept;
  // Sleeps until `word` is not 0, the deadline has come, `at_most_ns` are over, or a signal has come. May
  // return early.
  static constexpr uint64_t forever = UINT64_MAX;
  void wait(std::atomic<uint32_t>& word, uint64_t at_most_ns = forever) noexcept;

 private:
  class Handle;
  void arm(uint64_t deadline) noexcept;
  void cancel() noexcept;
  void ask_host(uint64_t now_tsc, uint64_t left_ns) noexcept;
  void forget_host() noexcept;
  void move_to_this_thread() noexcept;
  uint64_t nanoseconds(uint64_t ticks) const noexcept;
  uint64_t halted_lead(uint64_t now_tsc) noexcept;  // no longer than there is credit for
  void tighten_slack() noexcept;

  Clock& clock_;
  const uint32_t tsc_khz_;
  std::function<void()> approaching_;
  std::function<void()> expired_;
  std::unique_ptr<Timer> host_;         // of the clock
  std::unique_ptr<ThreadAlarm> alarm_;  // of the thread that was last in run(); null: not granted
  pthread_t alarm_of_{};
  bool alarm_tried_ = false;
  uint32_t seen_missed_ = 0;            // alarms of that thread
  std::atomic<uint64_t> deadline_{0};   // TSC of the host; 0: none
  std::atomic<uint64_t> asked_for_{0};  // TSC at which the host was asked to tell; 0: it was not
  std::atomic<bool> near_{false};

  LeadTime lead_running_{50'000}, lead_halted_{50'000};
  uint64_t spin_credit_ = 0, credit_since_ = 0;  // TSC ticks
  pthread_t slack_of_{};
  bool slack_set_ = false;
};

}  // namespace lodge::kvm::soft
