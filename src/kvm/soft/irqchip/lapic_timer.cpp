// The timer of the local APIC (SDM vol. 3, 11.5.4): one-shot, periodic and TSC-deadline, over a Clock.
//
// The counter is not ticked: a deadline is kept, and the current count follows from the time left. A periodic
// timer keeps its phase; periods that passed while nobody could be told count as one (KVM does the same), and
// periods below 200 us are stretched to it, so that a guest cannot keep the timer thread busy.
#include <algorithm>

#include "kvm/soft/irqchip/lapic.hpp"
#include "kvm/soft/irqchip/lapic_registers.hpp"

namespace lodge::kvm::soft {

using namespace apic;

namespace {
constexpr uint64_t shortest_period_ns = 200'000;
constexpr uint64_t longest_period_ns = uint64_t{1} << 62;  // of a slow bus clock
}  // namespace

unsigned Lapic::timer_mode() const noexcept {
  return (regs_[reg_lvt_timer] >> 17) & 3;
}

// Nanoseconds of one count.
uint64_t Lapic::timer_tick() const noexcept {
  const uint32_t divide = regs_[reg_divide];
  const unsigned code = (divide & 3) | ((divide & 8) >> 1);  // 0: by 2 ... 6: by 128, 7: by 1
  return options_.bus_period_ns << ((code + 1) & 7);
}

uint32_t Lapic::current_count() noexcept {
  if (deadline_ == 0 || timer_mode() == tsc_deadline_mode) return 0;
  check_timer();
  const uint64_t now = clock_.now();
  if (deadline_ <= now) return 0;
  const uint64_t tick = timer_tick();
  return static_cast<uint32_t>(
      std::min<uint64_t>((deadline_ - now + tick - 1) / tick, regs_[reg_initial_count]));
}

// Counts down from `count`, then (periodic) from the initial count again.
void Lapic::start_timer(uint32_t count) noexcept {
  stop_timer();
  if (count == 0 || timer_mode() > periodic || port_ == nullptr) return;
  const uint64_t tick = timer_tick();
  if (timer_mode() == periodic)
    period_ = std::clamp(regs_[reg_initial_count] * tick, shortest_period_ns, longest_period_ns);
  uint64_t left = count * tick;
  if (period_ != 0 && count == regs_[reg_initial_count]) left = period_;
  deadline_ = clock_.now() + std::min(left, longest_period_ns);
  timer_->arm(deadline_);
}

void Lapic::start_deadline() noexcept {
  const uint64_t target = tsc_deadline_;
  stop_timer();
  if (target == 0 || port_ == nullptr) return;
  tsc_deadline_ = target;
  // A deadline in the past fires within the write, without the detour over the timer's thread.
  if (port_->guest_tsc() >= target) {
    deadline_ = 1;
    check_timer();
    return;
  }
  deadline_ = std::max<uint64_t>(port_->tsc_deadline_to_clock_ns(target), 1);
  timer_->arm(deadline_);
}

void Lapic::stop_timer() noexcept {
  if (deadline_ != 0) timer_->cancel();
  deadline_ = 0;
  period_ = 0;
  tsc_deadline_ = 0;
}

// Fires if due. A callback may come late for a timer that was stopped or armed anew: then nothing is due.
bool Lapic::check_timer() noexcept {
  if (deadline_ == 0) return false;
  const uint64_t now = clock_.now();
  if (timer_mode() == tsc_deadline_mode && port_ != nullptr) {
    // The TSC decides: the clock may run at a slightly different speed.
    if (port_->guest_tsc() < tsc_deadline_) return false;
  } else if (now < deadline_) {
    return false;
  }
  if (period_ != 0) {
    deadline_ += ((now - deadline_) / period_ + 1) * period_;
    timer_->arm(deadline_);
  } else {
    deadline_ = 0;
    tsc_deadline_ = 0;
  }
  fire_lvt(reg_lvt_timer);
  update();
  return true;
}

void Lapic::timer_expired() noexcept {
  const std::lock_guard lock(mutex_);
  if (check_timer() || deadline_ == 0) return;
  // Too early.
  if (timer_mode() == tsc_deadline_mode)
    start_deadline();
  else
    timer_->arm(deadline_);
}

uint64_t Lapic::tsc_deadline() noexcept {
  const std::lock_guard lock(mutex_);
  if (timer_mode() != tsc_deadline_mode) return 0;
  check_timer();
  return tsc_deadline_;
}

void Lapic::set_tsc_deadline(uint64_t guest_tsc) noexcept {
  const std::lock_guard lock(mutex_);
  if (timer_mode() != tsc_deadline_mode) return;
  tsc_deadline_ = guest_tsc;
  start_deadline();
}

void Lapic::tsc_changed() noexcept {
  const std::lock_guard lock(mutex_);
  if (timer_mode() == tsc_deadline_mode && tsc_deadline_ != 0) start_deadline();
}

}  // namespace lodge::kvm::soft
