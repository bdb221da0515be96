// Time for devices and interrupt controllers: a monotonic clock with one-shot timers.
//
// Real VMs use RealClock (one thread, nanosecond deadlines by timerfd); unit tests use FakeClock and advance
// it by hand, so that no test sleeps.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

#include "base/fd.hpp"

namespace lodge {

// A one-shot timer. Owned by the device; destroying it waits until its callback is not running.
class Timer {
 public:
  virtual ~Timer() = default;
  // Calls the callback once at `deadline` (nanoseconds of Clock::now; at once when past). Replaces an earlier
  // deadline. Any thread, also from the callback itself.
  virtual void arm(uint64_t deadline) noexcept = 0;
  // After cancel() returns no *new* callback starts; one that is running may still finish. Any thread.
  virtual void cancel() noexcept = 0;
};

class Clock {
 public:
  virtual ~Clock() = default;
  // Nanoseconds since an arbitrary start; never goes back. Any thread.
  virtual uint64_t now() const noexcept = 0;
  // Wall-clock time of day as nanoseconds since 1970-01-01 UTC. Any thread.
  virtual uint64_t wall() const noexcept = 0;
  // The callback runs on the clock's thread (RealClock) or inside advance() (FakeClock), without any lock of
  // the clock held; it must not block and must not throw.
  virtual std::unique_ptr<Timer> make_timer(std::function<void()> callback) = 0;
};

class RealClock final : public Clock {
 public:
  RealClock();  // throws std::system_error
  ~RealClock() override;
  uint64_t now() const noexcept override;
  uint64_t wall() const noexcept override;
  std::unique_ptr<Timer> make_timer(std::function<void()> callback) override;

 private:
  struct Entry;
  class RealTimer;
  void loop() noexcept;
  void program(uint64_t deadline) noexcept;
  void program_next() noexcept;

  std::mutex mutex_;
  std::condition_variable idle_;                           // signalled when a callback has finished
  std::multimap<uint64_t, std::shared_ptr<Entry>> queue_;  // by deadline
  Entry* running_ = nullptr;
  uint64_t programmed_ = 0;  // the deadline that the timerfd holds; 0: none
  bool stop_ = false;
  Fd timer_;
  Fd wake_;
  std::thread thread_;
};

class FakeClock final : public Clock {
 public:
  uint64_t now() const noexcept override { return now_; }
  uint64_t wall() const noexcept override { return wall_start + now_; }
  std::unique_ptr<Timer> make_timer(std::function<void()> callback) override;
  // Moves time forward, running due callbacks in order, each at its own deadline.
  void advance(uint64_t nanoseconds);

  uint64_t wall_start = 1'700'000'000'000'000'000;  // 2023-11-14 22:13:20 UTC

 private:
  struct Entry {
    std::function<void()> callback;
    uint64_t deadline = UINT64_MAX;
  };
  class FakeTimer;
  uint64_t now_ = 1'000'000'000;
  std::map<const FakeTimer*, std::shared_ptr<Entry>> timers_;
};

}  // namespace lodge
