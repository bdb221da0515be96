// Watchdog timer behind the ACPI WDAT table (Microsoft, Hardware Watchdog Timers Design Specification, 2008),
// which tells a guest which registers to use for what: Linux (wdat_wdt) and Windows drive it without knowing
// the hardware. machine/acpi/tables.cpp describes these registers. Not modelled: a second stage before the
// action.
#include "device/watchdog.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <utility>

#include "base/error.hpp"

namespace lodge::device {

namespace {

constexpr uint64_t period_ns = Watchdog::period_ms * 1'000'000ull;

struct WatchdogState {
  static constexpr std::string_view name = "watchdog";
  static constexpr unsigned version = 1;
  uint32_t count = 0;
  bool running = false, fired = false;
  uint64_t left_ns = 0;
  template <class V>
  void visit(V& v) {
    v("count", count), v("running", running), v("fired", fired), v("left_ns", left_ns);
  }
};

}  // namespace

Watchdog::Watchdog(Clock& clock, std::function<void()> expired)
    : clock_(clock), expired_(std::move(expired)), timer_(clock.make_timer([this] { check(); })) {}

void Watchdog::arm() noexcept {
  if (running_ && !paused_at_)
    timer_->arm(deadline_);
  else
    timer_->cancel();
}

// A vCPU may come here just after the machine was paused: it has all of its time when the machine goes on.
void Watchdog::restart() noexcept {
  deadline_ = now() + count_ * period_ns;
  arm();
}

void Watchdog::set_paused(bool paused) noexcept {
  const std::lock_guard lock(mutex_);
  if (paused == paused_at_.has_value()) return;
  if (paused)
    paused_at_ = clock_.now();
  else
    deadline_ += clock_.now() - *std::exchange(paused_at_, std::nullopt);
  arm();
}

void Watchdog::check() noexcept {
  {
    const std::lock_guard lock(mutex_);
    // The guest may have been faster than this call.
    if (!running_ || paused_at_ || clock_.now() < deadline_) return;
    running_ = false;
    fired_ = true;
  }
  expired_();
}

uint64_t Watchdog::time_left() const noexcept {
  const uint64_t at = now();
  return running_ && at < deadline_ ? deadline_ - at : 0;
}

uint64_t Watchdog::read(uint64_t offset, unsigned size) noexcept {
  if (size != 4) return 0;
  const std::lock_guard lock(mutex_);
  switch (offset) {
    case COUNT: return count_;
    case CURRENT: return (time_left() + period_ns - 1) / period_ns;
    case CONTROL: return running_ ? RUN : 0;
    case STATUS: return fired_ ? FIRED : 0;
    default: return 0;
  }
}

void Watchdog::write(uint64_t offset, unsigned size, uint64_t value) noexcept {
  if (size != 4) return;
  const std::lock_guard lock(mutex_);
  switch (offset) {
    case COUNT: count_ = std::clamp<uint32_t>(static_cast<uint32_t>(value), 1, max_count); break;
    case CURRENT:
      if (running_) restart();
      break;
    case CONTROL:
      if (const bool run = value & RUN; run != running_) {
        running_ = run;
        restart();
      }
      break;
    case STATUS:
      if (value & FIRED) fired_ = false;
      break;
    default: break;
  }
}

// --- Saved state: the time that is left, so that time without the machine does not count.

void Watchdog::save(nlohmann::json& json) const {
  const std::lock_guard lock(mutex_);
  save_state(WatchdogState{count_, running_, fired_, time_left()}, json);
}

void Watchdog::load(const nlohmann::json& json) {
  const auto state = load_state<WatchdogState>(json);
  if (state.count < 1 || state.count > max_count || state.left_ns > max_count * period_ns)
    usage_error("saved state of watchdog: {} periods of {} ms are more than it counts", state.count,
                period_ms);
  const std::lock_guard lock(mutex_);
  count_ = state.count;
  running_ = state.running;
  fired_ = state.fired;
  deadline_ = now() + state.left_ns;
  arm();
}

}  // namespace lodge::device
