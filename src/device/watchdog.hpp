// A watchdog: when the guest has not asked for more time, something happens to the machine.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <optional>

#include "base/clock.hpp"
#include "base/state.hpp"
#include "machine/io.hpp"

namespace lodge::device {

// Four registers of 32 bits; what else is read is zero, what else is written is ignored.
class Watchdog final : public machine::RegisterWindow, public Savable {
 public:
  static constexpr uint16_t ports = 0x580;
  static constexpr uint64_t window_size = 16;
  static constexpr uint32_t period_ms = 100;     // the unit of all counts
  static constexpr uint32_t max_count = 0xffff;  // somewhat less than two hours

  enum Register : uint32_t {
    COUNT = 0,    // periods that a restart gives, 1 to max_count
    CURRENT = 4,  // read: periods left; written, whatever the value: restart
    CONTROL = 8,  // RUN
    STATUS = 12,  // FIRED, cleared by writing it
  };
  static constexpr uint32_t RUN = 1, FIRED = 1;

  // `expired` is called on the clock's thread; it must not block.
  Watchdog(Clock& clock, std::function<void()> expired);

  uint64_t read(uint64_t offset, unsigned size) noexcept override;
  void write(uint64_t offset, unsigned size, uint64_t value) noexcept override;
  void save(nlohmann::json& json) const override;
  void load(const nlohmann::json& json) override;

  // While its machine is paused no time passes for it: a guest that cannot run cannot ask for more. Any
  // thread.
  void set_paused(bool paused) noexcept;

 private:
  uint64_t now() const noexcept { return paused_at_ ? *paused_at_ : clock_.now(); }
  uint64_t time_left() const noexcept;  // 0: it does not run, or has none left
  void arm() noexcept;
  void restart() noexcept;
  void check() noexcept;

  Clock& clock_;
  std::function<void()> expired_;
  mutable std::mutex mutex_;
  uint32_t count_ = max_count;
  bool running_ = false, fired_ = false;
  uint64_t deadline_ = 0;              // by now()
  std::optional<uint64_t> paused_at_;  // when its time stood still
  std::unique_ptr<Timer> timer_;       // last: its callback uses everything above
};

}  // namespace lodge::device
