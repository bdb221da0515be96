// High Precision Event Timer (Intel IA-PC HPET Specification 1.0a, sections 2.3 and 2.4).
//
// Modelled: the 64-bit counter at 100 MHz, three comparators of 64 bits that can also run as 32 bits,
// one-shot and periodic with the accumulator write, edge and level interrupts, the routes GSI 20 to 23,
// legacy replacement. Not modelled: FSB (MSI) delivery, which the capability bit says; accesses of 1 and 2
// bytes, which the specification leaves out, read correctly and write nothing. A periodic comparator fires at
// most every 20 us, so that a guest cannot keep the host's timer thread busy.
#include "device/hpet.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>

namespace lodge::device {

namespace {

constexpr uint64_t GCAP_ID = 0x000, GEN_CONF = 0x010, GINTR_STA = 0x020, MAIN_CNT = 0x0f0, TIM0 = 0x100,
                   TIM_SIZE = 0x20;
constexpr uint64_t TIM_CONF = 0x00, TIM_COMP = 0x08;

constexpr uint64_t capabilities = uint64_t{machine::layout::hpet_period} << 32 | 0x8086'0000 |  // vendor
                                  1u << 15 | 1u << 13 |  // legacy replacement, 64-bit counter
                                  (hpet_timers - 1) << 8 | 1;
constexpr uint64_t ENABLE_CNF = 1, LEG_RT_CNF = 2;
constexpr uint64_t INT_TYPE_LEVEL = 1u << 1, INT_ENB = 1u << 2, TYPE_PERIODIC = 1u << 3,
                   PER_INT_CAP = 1u << 4, SIZE_CAP = 1u << 5, VAL_SET = 1u << 6, MODE_32 = 1u << 8,
                   ROUTE_MASK = 0x1f << 9;
constexpr uint64_t TIM_WRITABLE = INT_TYPE_LEVEL | INT_ENB | TYPE_PERIODIC | VAL_SET | MODE_32 | ROUTE_MASK;
constexpr uint64_t route_capabilities = uint64_t{0x00f0'0000} << 32;

constexpr uint64_t nanoseconds_per_tick = machine::layout::hpet_period / 1'000'000;
static_assert(nanoseconds_per_tick == 10);
constexpr uint64_t minimum_interval = 20'000;
constexpr uint64_t longest_sleep = uint64_t{1} << 60;  // nanoseconds: 36 years

uint64_t merge(uint64_t old, uint64_t value, uint64_t mask) {
  return (old & ~mask) | (value & mask);
}

uint64_t width(const HpetState::Comparator& timer) {
  return timer.config & MODE_32 ? uint64_t{0xffff'ffff} : ~uint64_t{0};
}

// Whether `count` has reached `due`, both on a circle of 2^64.
bool reached(uint64_t count, uint64_t due) {
  return static_cast<int64_t>(count - due) >= 0;
}

}  // namespace

Hpet::Hpet(Clock& clock, const HpetWiring& wiring) : clock_(clock), wiring_(wiring), base_time_(clock.now()) {
  for (unsigned n = 0; n < hpet_timers; n++) {
    for (unsigned i = 0; i < routes; i++) lines_[n][i] = &wiring_.line(first_route + i);
    deadlines_[n] = clock.make_timer([this, n] { on_timer(n); });
  }
}

bool Hpet::running() const noexcept {
  return (state_.config & ENABLE_CNF) != 0;
}
bool Hpet::legacy() const noexcept {
  return (state_.config & LEG_RT_CNF) != 0;
}

uint64_t Hpet::counter() const noexcept {
  return running() ? state_.counter + (clock_.now() - base_time_) / nanoseconds_per_tick : state_.counter;
}

void Hpet::stop_at(uint64_t value) noexcept {
  state_.counter = value;
  base_time_ = clock_.now();
}

// --- Interrupts
// ----------------------------------------------------------------------------------------------

// Where comparator `n` interrupts; null when the guest has chosen a route that is not wired.
machine::Interrupt* Hpet::output(unsigned n) noexcept {
  if (legacy() && n == 0) return &wiring_.irq0;
  if (legacy() && n == 1) return &wiring_.irq8;
  uint64_t route = (state_.timers[n].config & ROUTE_MASK) >> 9;
  return route >= first_route && route < first_route + routes ? lines_[n][route - first_route] : nullptr;
}

// Brings a level-triggered output to what the status bit says.
void Hpet::drive(unsigned n) noexcept {
  const auto& timer = state_.timers[n];
  bool level = (state_.status >> n & 1) && (timer.config & INT_TYPE_LEVEL) && (timer.config & INT_ENB);
  machine::Interrupt* wanted = level ? output(n) : nullptr;
  if (wanted == driven_[n]) return;
  if (driven_[n]) driven_[n]->set(false);
  driven_[n] = wanted;
  if (wanted) wanted->set(true);
}

void Hpet::fire(unsigned n) noexcept {
  if (!(state_.timers[n].config & INT_ENB)) return;
  if (state_.timers[n].config & INT_TYPE_LEVEL) {
    state_.status |= uint64_t{1} << n;
    drive(n);
  } else if (machine::Interrupt* line = output(n)) {
    line->pulse();
  }
}

void Hpet::RtcInput::set(bool level) noexcept {
  std::lock_guard lock(hpet_.mutex_);
  hpet_.rtc_level_ = level;
  if (!hpet_.legacy()) hpet_.wiring_.irq8.set(level);
}

// --- Comparators
// ---------------------------------------------------------------------------------------------

// Finds when comparator `n` matches next. A value that the 64-bit counter has passed lies centuries ahead:
// not armed.
void Hpet::derive(unsigned n) noexcept {
  auto& timer = state_.timers[n];
  uint64_t now = counter(), distance = (timer.value - now) & width(timer);
  timer.due = now + distance;
  timer.armed = distance < uint64_t{1} << 63;
}

// Passes over the matches that have happened: a one-shot is done, a periodic comparator moves on by whole
// periods.
void Hpet::catch_up(unsigned n) noexcept {
  auto& timer = state_.timers[n];
  uint64_t now = counter();
  if (!timer.armed || !reached(now, timer.due)) return;
  if (!(timer.config & TYPE_PERIODIC) || timer.period == 0) {
    timer.armed = 0;
    return;
  }
  timer.due += timer.period * (1 + (now - timer.due) / timer.period);
  timer.value = timer.due & width(timer);
}

void Hpet::schedule(unsigned n) noexcept {
  const auto& timer = state_.timers[n];
  if (!running() || !timer.armed || !(timer.config & INT_ENB)) return deadlines_[n]->cancel();
  uint64_t now = counter();
  uint64_t ticks = reached(now, timer.due) ? 0 : timer.due - now;
  uint64_t delay = std::min(ticks, longest_sleep / nanoseconds_per_tick) * nanoseconds_per_tick;
  if (timer.config & TYPE_PERIODIC) delay = std::max(delay, minimum_interval);
  deadlines_[n]->arm(clock_.now() + delay);
}

void Hpet::on_timer(unsigned n) noexcept {
  std::lock_guard lock(mutex_);
  auto& timer = state_.timers[n];
  // The guest may have moved the comparator while the deadline passed.
  if (running() && timer.armed && reached(counter(), timer.due)) {
    catch_up(n);
    fire(n);
  }
  schedule(n);
}

// --- Registers
// -----------------------------------------------------------------------------------------------

uint64_t Hpet::register_value(uint64_t offset) noexcept {
  switch (offset) {
    case GCAP_ID: return capabilities;
    case GEN_CONF: return state_.config;
    case GINTR_STA: return state_.status;
    case MAIN_CNT: return counter();
    default: break;
  }
  if (offset < TIM0 || offset >= TIM0 + hpet_timers * TIM_SIZE) return 0;
  auto n = static_cast<unsigned>((offset - TIM0) / TIM_SIZE);
  switch ((offset - TIM0) % TIM_SIZE) {
    case TIM_CONF: return state_.timers[n].config | PER_INT_CAP | SIZE_CAP | route_capabilities;
    case TIM_COMP:
      // An interrupt that is due is left to the deadline; otherwise a periodic value is brought up to date
      // here.
      if (!(state_.timers[n].config & INT_ENB)) catch_up(n);
      return state_.timers[n].value;
    default: return 0;
  }
}

uint64_t Hpet::read(uint64_t offset, unsigned size) noexcept {
  std::lock_guard lock(mutex_);
  uint64_t shift = (offset & 7) * 8;
  uint64_t value = register_value(offset & ~uint64_t{7}) >> shift;
  return size >= 8 ? value : value & ((uint64_t{1} << (size * 8)) - 1);
}

void Hpet::set_config(uint64_t value) noexcept {
  bool was_running = running(), was_legacy = legacy();
  uint64_t now = counter();
  state_.config = value & (ENABLE_CNF | LEG_RT_CNF);
  stop_at(now);
  if (was_legacy != legacy()) {
    wiring_.legacy_replacement(legacy());
    wiring_.irq8.set(!legacy() && rtc_level_);
  }
  for (unsigned n = 0; n < hpet_timers; n++) {
    if (!was_running && running()) derive(n);
    drive(n);
    schedule(n);
  }
}

void Hpet::set_timer_config(unsigned n, uint64_t value) noexcept {
  auto& timer = state_.timers[n];
  uint64_t changed = timer.config ^ value;
  if (!(timer.config & INT_ENB)) catch_up(n);  // what passed unheard does not interrupt now
  timer.config = value & TIM_WRITABLE;
  if (changed & MODE_32) {
    timer.value &= width(timer);
    timer.period &= width(timer);
    derive(n);
  }
  if (!(timer.config & INT_TYPE_LEVEL)) state_.status &= ~(uint64_t{1} << n);
  drive(n);
  schedule(n);
}

// In periodic mode a write sets the period, and with VAL_SET the comparator as well.
void Hpet::set_comparator(unsigned n, uint64_t value, uint64_t mask) noexcept {
  auto& timer = state_.timers[n];
  bool periodic = (timer.config & TYPE_PERIODIC) != 0;
  if (!periodic || (timer.config & VAL_SET)) {
    timer.value = merge(timer.value, value, mask) & width(timer);
    derive(n);
  }
  if (periodic) timer.period = merge(timer.period, value, mask) & width(timer);
  timer.config &= ~VAL_SET;
  schedule(n);
}

void Hpet::set_register(uint64_t offset, uint64_t value, uint64_t mask) noexcept {
  switch (offset) {
    case GEN_CONF: return set_config(merge(state_.config, value, mask));
    case GINTR_STA:
      state_.status &= ~(value & mask);
      for (unsigned n = 0; n < hpet_timers; n++) drive(n);
      return;
    case MAIN_CNT:
      // Meant for the halted counter; while it runs the comparators are measured against the new count.
      stop_at(merge(counter(), value, mask));
      for (unsigned n = 0; n < hpet_timers; n++) {
        derive(n);
        schedule(n);
      }
      return;
    default: break;
  }
  if (offset < TIM0 || offset >= TIM0 + hpet_timers * TIM_SIZE) return;
  auto n = static_cast<unsigned>((offset - TIM0) / TIM_SIZE);
  switch ((offset - TIM0) % TIM_SIZE) {
    case TIM_CONF: return set_timer_config(n, merge(state_.timers[n].config, value, mask));
    case TIM_COMP: return set_comparator(n, value, mask);
    default: return;
  }
}

void Hpet::write(uint64_t offset, unsigned size, uint64_t value) noexcept {
  if (size < 4 || offset % size != 0) return;
  std::lock_guard lock(mutex_);
  uint64_t shift = (offset & 7) * 8;
  uint64_t mask = size == 8 ? ~uint64_t{0} : uint64_t{0xffff'ffff} << shift;
  set_register(offset & ~uint64_t{7}, value << shift, mask);
}

// --- Reset and saved state
// -----------------------------------------------------------------------------------

void Hpet::reset() noexcept {
  std::lock_guard lock(mutex_);
  set_config(0);
  state_ = {};
  for (unsigned n = 0; n < hpet_timers; n++) {
    drive(n);
    schedule(n);
  }
}

void Hpet::save(nlohmann::json& json) const {
  std::lock_guard lock(mutex_);
  HpetState state = state_;
  state.counter = counter();
  save_state(state, json);
}

void Hpet::load(const nlohmann::json& json) {
  auto state = load_state<HpetState>(json);
  state.config &= ENABLE_CNF | LEG_RT_CNF;
  state.status &= (1u << hpet_timers) - 1;
  for (auto& timer : state.timers) {
    timer.config &= TIM_WRITABLE;
    timer.value &= width(timer);
    timer.period &= width(timer);
    timer.armed &= 1;
  }
  std::lock_guard lock(mutex_);
  bool was_legacy = legacy();
  state_ = state;
  base_time_ = clock_.now();
  if (was_legacy != legacy()) wiring_.legacy_replacement(legacy());
  for (unsigned n = 0; n < hpet_timers; n++) {
    drive(n);
    schedule(n);
  }
}

}  // namespace lodge::device
