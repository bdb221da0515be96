// Tells when a vCPU has had almost nothing to do for a while. Asked whenever it halts.
#pragma once

#include <cstdint>

namespace lodge::kvm::soft {

class IdleWatch {
 public:
  // A vCPU that has used less than this part of a window is idle.
  static constexpr uint64_t busy_share = 50;

  explicit IdleWatch(uint64_t window_ns) : window_(window_ns) {}

  // True once at the end of a window that was idle. `now` is of any steady clock; `used` gives the CPU time
  // of the thread and is called only when a window ends. All in nanoseconds.
  template <class Used>
  bool idle(uint64_t now, Used used) noexcept {
    if (now - start_ < window_) return false;
    const uint64_t used_now = used();
    const bool known = start_ != 0;
    const bool result = known && used_now - used_ < (now - start_) / busy_share;
    start_ = now;
    used_ = used_now;
    verdict_ = result;
    return result;
  }
  // Of the last whole window.
  bool was_idle() const noexcept { return verdict_; }
  // Until the present window ends.
  uint64_t left(uint64_t now) const noexcept { return now - start_ < window_ ? window_ - (now - start_) : 0; }

 private:
  const uint64_t window_;
  uint64_t start_ = 0, used_ = 0;
  bool verdict_ = false;
};

}  // namespace lodge::kvm::soft
