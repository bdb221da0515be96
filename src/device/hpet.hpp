// High Precision Event Timer: three comparators on a 100 MHz counter.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string_view>

#include "base/clock.hpp"
#include "base/state.hpp"
#include "machine/io.hpp"
#include "machine/layout.hpp"

namespace lodge::device {

inline constexpr unsigned hpet_timers = 3;

struct HpetState {
  static constexpr std::string_view name = "hpet";
  static constexpr unsigned version = 1;

  struct Comparator {
    uint64_t config = 0;
    uint64_t value = ~uint64_t{0};  // what the register shows
    uint64_t period = 0;
    uint64_t due = 0;    // the full 64-bit count at which it fires next
    uint64_t armed = 0;  // 1: `due` is valid
  };
  uint64_t config = 0;
  uint64_t status = 0;
  uint64_t counter = 0;  // at the moment of saving, or while it stands still
  std::array<Comparator, hpet_timers> timers{};

  template <class V>
  void visit(V& v) {
    v("config", config), v("status", status), v("counter", counter), v("timers", timers);
  }
};

// What the HPET is wired to. All of it outlives the chip.
struct HpetWiring {
  machine::Interrupt& irq0;  // legacy replacement: comparator 0 instead of the 8254
  machine::Interrupt& irq8;  // legacy replacement: comparator 1 instead of the real-time clock
  // A new source on GSI 20 to 23, shared with PCI.
  std::function<machine::Interrupt&(unsigned gsi)> line;
  // Tells the 8254 that its interrupt is (true) or is no longer (false) replaced. Must not throw.
  std::function<void(bool)> legacy_replacement;
};

// The window is layout::hpet_size bytes at layout::hpet_base.
class Hpet final : public machine::RegisterWindow, public Savable {
 public:
  static constexpr uint64_t window_size = machine::layout::hpet_size;

  Hpet(Clock& clock, const HpetWiring& wiring);

  // What the real-time clock drives: passed on to irq8 unless comparator 1 has taken its place.
  machine::Interrupt& rtc_input() noexcept { return rtc_; }
  void reset() noexcept;

  uint64_t read(uint64_t offset, unsigned size) noexcept override;
  void write(uint64_t offset, unsigned size, uint64_t value) noexcept override;
  void save(nlohmann::json& json) const override;
  void load(const nlohmann::json& json) override;

 private:
  static constexpr unsigned first_route = 20, routes = 4;

  class RtcInput final : public machine::Interrupt {
   public:
    explicit RtcInput(Hpet& hpet) : hpet_(hpet) {}
    void set(bool level) noexcept override;

   private:
    Hpet& hpet_;
  };

  // All of these: with mutex_ held.
  bool running() const noexcept;
  bool legacy() const noexcept;
  uint64_t counter() const noexcept;
  void stop_at(uint64_t value) noexcept;
  machine::Interrupt* output(unsigned n) noexcept;
  void derive(unsigned n) noexcept;
  void catch_up(unsigned n) noexcept;
  void schedule(unsigned n) noexcept;
  void fire(unsigned n) noexcept;
  void drive(unsigned n) noexcept;
  uint64_t register_value(uint64_t offset) noexcept;
  void set_register(uint64_t offset, uint64_t value, uint64_t mask) noexcept;
  void set_config(uint64_t value) noexcept;
  void set_timer_config(unsigned n, uint64_t value) noexcept;
  void set_comparator(unsigned n, uint64_t value, uint64_t mask) noexcept;

  void on_timer(unsigned n) noexcept;

  Clock& clock_;
  HpetWiring wiring_;
  mutable std::mutex mutex_;
  HpetState state_;
  uint64_t base_time_;  // Clock::now() at which the running counter was state_.counter
  bool rtc_level_ = false;
  std::array<std::array<machine::Interrupt*, routes>, hpet_timers> lines_{};
  std::array<machine::Interrupt*, hpet_timers> driven_{};  // held high for a level-triggered comparator
  RtcInput rtc_{*this};
  std::array<std::unique_ptr<Timer>, hpet_timers> deadlines_;  // last: their callbacks use everything above
};

}  // namespace lodge::device
