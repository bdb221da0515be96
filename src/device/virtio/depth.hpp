// Whether a driver keeps several requests out at a time, as far as a device can see that.
#pragma once

#include <algorithm>
#include <atomic>

namespace lodge::device::virtio {

// A vCPU that does a request itself, within its kick, is the fastest way for a driver that waits for the
// answer: no thread is woken. A driver that has more to ask goes on meanwhile if another thread does it.
// Which kind it is shows only on that thread: who asks for more before it has been told of the last answer
// does not wait. So now and then a kick is handed over, to see; ever less often while that finds nothing.
class Depth {
 public:
  // For a vCPU that has kicked: whether the other thread shall serve it. Any thread.
  bool hand_over() noexcept {
    if (deep() || on_trial_.load(std::memory_order_relaxed)) return true;
    if (until_trial_.fetch_sub(1, std::memory_order_relaxed) != 1) return false;
    until_trial_.store(interval_.load(std::memory_order_relaxed), std::memory_order_relaxed);
    on_trial_.store(true, std::memory_order_relaxed);
    return true;
  }
  // The other thread has come; true: on trial.
  bool arrived() noexcept { return on_trial_.exchange(false, std::memory_order_relaxed); }
  // On the other thread, with the device's lock held: a request came before its driver knew of the last
  // answer, or did not come.
  void observe(bool overlapped) noexcept {
    const int score = score_.load(std::memory_order_relaxed);
    score_.store(overlapped ? std::min(score + gain, highest) : std::max(score - 1, 0),
                 std::memory_order_relaxed);
    const unsigned interval = interval_.load(std::memory_order_relaxed);
    if (overlapped)
      interval_.store(first_interval, std::memory_order_relaxed);
    else if (score == 0)
      interval_.store(std::min(2 * interval, last_interval), std::memory_order_relaxed);
  }
  bool deep() const noexcept { return score_.load(std::memory_order_relaxed) > 0; }

  // In kicks. A trial costs a wake-up and a wait, some 80 us: of requests that take 25 us, a twentieth of the
  // time at first, and soon a thousandth.
  static constexpr unsigned first_interval = 64, last_interval = 4096;

 private:
  // A driver of many requests also pauses: sixteen waits in a row end what four overlaps have begun.
  static constexpr int gain = 4, highest = 16;
  std::atomic<int> score_ = 0;
  std::atomic<bool> on_trial_ = false;  // what is kicked for until the other thread comes is its own
  std::atomic<unsigned> until_trial_ = first_interval, interval_ = first_interval;
};

}  // namespace lodge::device::virtio
