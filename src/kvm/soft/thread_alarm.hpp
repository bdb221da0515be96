// A timer of the host that interrupts one thread, by a signal.
//
// A busy thread learns so of a deadline without another thread having to wake first: the host's timer expires
// on the processor that the thread runs on, while a sleeping helper's processor may take a millisecond to
// come back from its idle state, above all where the host is a virtual machine itself.
#pragma once

#include <signal.h>
#include <time.h>

#include <cstdint>
#include <functional>
#include <memory>

namespace lodge::kvm::soft {

class ThreadAlarm {
 public:
  // For the calling thread, whose mask is changed to let the signal through. Null where the host grants no
  // timer. What else comes by this signal goes to the handler that was there before.
  static std::unique_ptr<ThreadAlarm> create() noexcept;
  // SIGRTMIN + 6: the host accelerator has the fifth.
  static int signal() noexcept;
  ~ThreadAlarm();
  ThreadAlarm(const ThreadAlarm&) = delete;
  ThreadAlarm& operator=(const ThreadAlarm&) = delete;

  // At `deadline`, in nanoseconds of CLOCK_MONOTONIC (at once when past); replaces an earlier one. Any
  // thread.
  void arm(uint64_t deadline) noexcept;
  void cancel() noexcept;

  // While it lives, alarms of this thread call `ring`, inside the signal handler: it must be safe there. An
  // alarm may also come late, for a deadline that was replaced.
  class Receiver {
   public:
    explicit Receiver(const std::function<void()>& ring) noexcept;
    ~Receiver();
    Receiver(const Receiver&) = delete;
    Receiver& operator=(const Receiver&) = delete;

   private:
    const std::function<void()>* outer_;
  };
  // Alarms of this thread that came while nobody received, ever.
  static uint32_t missed() noexcept;

 private:
  explicit ThreadAlarm(timer_t timer) noexcept : timer_(timer) {}

  timer_t timer_;
};

}  // namespace lodge::kvm::soft
