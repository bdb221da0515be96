#include "base/clock.hpp"

#include <poll.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <ctime>

#include "base/error.hpp"

namespace lodge {
namespace {

uint64_t read_clock(clockid_t id) noexcept {
  timespec now{};
  ::clock_gettime(id, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(now.tv_nsec);
}

}  // namespace

struct RealClock::Entry {
  std::function<void()> callback;
  uint64_t deadline = 0;
  bool queued = false;
};

class RealClock::RealTimer final : public Timer {
 public:
  RealTimer(RealClock& clock, std::shared_ptr<Entry> entry) : clock_(clock), entry_(std::move(entry)) {}
  ~RealTimer() override {
    std::unique_lock lock(clock_.mutex_);
    unqueue();
    // A timer that is destroyed by its own callback must not wait for itself.
    if (std::this_thread::get_id() != clock_.thread_.get_id())
      clock_.idle_.wait(lock, [this] { return clock_.running_ != entry_.get(); });
  }
  void arm(uint64_t deadline) noexcept override {
    const std::lock_guard lock(clock_.mutex_);
    unqueue();
    entry_->deadline = deadline;
    entry_->queued = true;
    clock_.queue_.emplace(deadline, entry_);
    if (clock_.programmed_ == 0 || deadline < clock_.programmed_) clock_.program(deadline);
  }
  void cancel() noexcept override {
    const std::lock_guard lock(clock_.mutex_);
    const bool was_next = entry_->queued && entry_->deadline == clock_.programmed_;
    unqueue();
    if (was_next) clock_.program_next();
  }

 private:
  void unqueue() noexcept {
    if (!entry_->queued) return;
    for (auto [it, end] = clock_.queue_.equal_range(entry_->deadline); it != end; ++it) {
      if (it->second != entry_) continue;
      clock_.queue_.erase(it);
      break;
    }
    entry_->queued = false;
  }

  RealClock& clock_;
  std::shared_ptr<Entry> entry_;
};

RealClock::RealClock()
    : timer_(::timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK)), wake_(Fd::event()) {
  if (!timer_) throw_errno("cannot create a timer descriptor");
  thread_ = std::thread([this] { loop(); });
}

RealClock::~RealClock() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  signal_event(wake_.get());
  thread_.join();
}

uint64_t RealClock::now() const noexcept {
  return read_clock(CLOCK_MONOTONIC);
}
uint64_t RealClock::wall() const noexcept {
  return read_clock(CLOCK_REALTIME);
}

std::unique_ptr<Timer> RealClock::make_timer(std::function<void()> callback) {
  auto entry = std::make_shared<Entry>();
  entry->callback = std::move(callback);
  return std::make_unique<RealTimer>(*this, std::move(entry));
}

void RealClock::program(uint64_t deadline) noexcept {
  programmed_ = deadline == 0 ? 1 : deadline;  // an it_value of zero would disarm
  itimerspec spec{};
  spec.it_value.tv_sec = static_cast<time_t>(programmed_ / 1'000'000'000);
  spec.it_value.tv_nsec = static_cast<long>(programmed_ % 1'000'000'000);
  ::timerfd_settime(timer_.get(), TFD_TIMER_ABSTIME, &spec, nullptr);
}

// The thread sleeps as long as nothing is due, so timers that are cancelled before they expire cost it
// nothing.
void RealClock::program_next() noexcept {
  if (!queue_.empty()) return program(queue_.begin()->first);
  programmed_ = 0;
  const itimerspec never{};
  ::timerfd_settime(timer_.get(), 0, &never, nullptr);
}

void RealClock::loop() noexcept {
  std::unique_lock lock(mutex_);
  while (!stop_) {
    lock.unlock();
    pollfd fds[2] = {{timer_.get(), POLLIN, 0}, {wake_.get(), POLLIN, 0}};
    ::poll(fds, 2, -1);
    if ((fds[0].revents & POLLIN) != 0) {
      uint64_t expirations = 0;
      [[maybe_unused]] const auto n = ::read(timer_.get(), &expirations, sizeof expirations);
    }
    lock.lock();
    while (!stop_ && !queue_.empty() && queue_.begin()->first <= now()) {
      const std::shared_ptr<Entry> entry = queue_.begin()->second;
      queue_.erase(queue_.begin());
      entry->queued = false;
      running_ = entry.get();
      lock.unlock();
      entry->callback();
      lock.lock();
      running_ = nullptr;
      idle_.notify_all();
    }
    program_next();
  }
}

class FakeClock::FakeTimer final : public Timer {
 public:
  FakeTimer(FakeClock& clock, std::shared_ptr<Entry> entry) : clock_(clock), entry_(std::move(entry)) {
    clock_.timers_[this] = entry_;
  }
  ~FakeTimer() override { clock_.timers_.erase(this); }
  void arm(uint64_t deadline) noexcept override { entry_->deadline = deadline; }
  void cancel() noexcept override { entry_->deadline = UINT64_MAX; }

 private:
  FakeClock& clock_;
  std::shared_ptr<Entry> entry_;
};

std::unique_ptr<Timer> FakeClock::make_timer(std::function<void()> callback) {
  auto entry = std::make_shared<Entry>();
  entry->callback = std::move(callback);
  return std::make_unique<FakeTimer>(*this, std::move(entry));
}

void FakeClock::advance(uint64_t nanoseconds) {
  const uint64_t end = now_ + nanoseconds;
  for (;;) {
    std::shared_ptr<Entry> next;
    for (const auto& [timer, entry] : timers_)
      if (entry->deadline <= end && (!next || entry->deadline < next->deadline)) next = entry;
    if (!next) break;
    if (next->deadline > now_) now_ = next->deadline;
    next->deadline = UINT64_MAX;
    next->callback();
  }
  now_ = end;
}

}  // namespace lodge
