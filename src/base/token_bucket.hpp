// A rate limit with a burst: a bucket that fills at its rate, as a time instead of a level.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>

namespace lodge {

// Not synchronised.
class TokenBucket {
 public:
  using Clock = std::chrono::steady_clock;

  // Of `per_second` units, 0: no limit; `burst` is what the bucket holds, as the time in which it fills.
  TokenBucket(double per_second, Clock::duration burst) noexcept : per_second_(per_second), burst_(burst) {}
  // The same of `rate` units a second that holds `burst` of them; 0: a tenth of a second's worth.
  static TokenBucket of(uint64_t rate, uint64_t burst) noexcept {
    const auto per_second = static_cast<double>(rate);
    const bool usual = rate == 0 || burst == 0;
    return {per_second, time(usual ? 0.1 : static_cast<double>(burst) / per_second)};
  }

  // When something may begin, whatever it costs; not after `now`: at once.
  Clock::time_point free_at() const noexcept { return paid_until_ - burst_; }
  // Pays for it. What costs more than there is makes the next one wait longer.
  void pay(double amount, Clock::time_point now) noexcept {
    if (per_second_ <= 0) return;
    paid_until_ = std::max(paid_until_, now) + time(amount / per_second_);
  }

 private:
  // At most an hour, so that no sum leaves the clock's range.
  static Clock::duration time(double seconds) noexcept {
    return std::chrono::duration_cast<Clock::duration>(
        std::chrono::duration<double>(std::min(seconds, 3600.0)));
  }

  double per_second_;
  Clock::duration burst_;
  Clock::time_point paid_until_{};  // when the bucket would be full again if nothing more came
};

}  // namespace lodge
