// Real-time clock MC146818A (Motorola data sheet ADI1026, "Register A" to "Register D" and "Interrupts"),
// with the PC's century byte at 0x32 (ACPI FADT) and its CMOS memory map.
//
// Modelled: time and date in BCD or binary, 12 or 24 hours, read and set (SET bit, divider reset, or on the
// fly); the update-in-progress window; alarm with "don't care" codes; periodic, alarm and update interrupts;
// 128 bytes of memory. Flags of register C are computed when somebody looks or waits, so that an idle clock
// costs the host nothing. Not modelled: daylight saving (DSE reads back; the rule it implements was repealed
// in 1987), the square wave output (no pin in a PC), NMI masking by bit 7 of the index (the accelerator owns
// NMIs).
#include "device/rtc.hpp"

#include <algorithm>
#include <chrono>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "machine/layout.hpp"

namespace lodge::device {

namespace {

enum Index : uint8_t {
  Seconds,
  SecondsAlarm,
  Minutes,
  MinutesAlarm,
  Hours,
  HoursAlarm,
  Weekday,
  Day,
  Month,
  Year,
  RegA,
  RegB,
  RegC,
  RegD,
  FirstMemory,
  Century = machine::layout::rtc_century
};

constexpr uint8_t A_UIP = 0x80, A_RATE = 0x0f, A_32KHZ = 0x20;
constexpr uint8_t B_SET = 0x80, B_PIE = 0x40, B_AIE = 0x20, B_UIE = 0x10, B_SQWE = 0x08, B_BINARY = 0x04,
                  B_24H = 0x02;
constexpr uint8_t C_IRQF = 0x80, C_PF = 0x40, C_AF = 0x20, C_UF = 0x10;
constexpr uint8_t D_VRT = 0x80;
constexpr uint8_t HOURS_PM = 0x80, ALARM_ANY = 0xc0;

constexpr uint32_t second = 1'000'000'000;
constexpr uint32_t uip_time = 244'141;  // the guest has 244 us from UIP to the update
constexpr int64_t never = INT64_MAX;
constexpr int64_t ticks_per_second = 32'768;
// Beyond this no date that the registers can hold lies; it keeps a loaded offset from overflowing.
constexpr int64_t offset_limit = 1'000'000'000'000;

bool is_time(uint8_t index) {
  return index == Seconds || index == Minutes || index == Hours || (index >= Weekday && index <= Year) ||
         index == Century;
}

int64_t periodic_ticks(int64_t seconds, uint32_t nanoseconds) {
  return seconds * ticks_per_second + int64_t{nanoseconds} * ticks_per_second / second;
}

}  // namespace

Rtc::Rtc(Clock& clock, machine::Interrupt& interrupt, int64_t offset_seconds)
    : clock_(clock), interrupt_(interrupt), timer_(clock.make_timer([this] { on_timer(); })) {
  state_.offset_seconds = std::clamp(offset_seconds, -offset_limit, offset_limit);
  state_.ram[RegA] = A_32KHZ | 6;  // 1024 Hz, as a PC's firmware leaves it
  state_.ram[RegB] = B_24H;
  seen_ = now();
}

// --- Time
// ----------------------------------------------------------------------------------------------------

Rtc::Moment Rtc::now() const noexcept {
  uint64_t wall = clock_.wall();
  auto nanoseconds = static_cast<uint32_t>(wall % second) + state_.offset_nanoseconds;
  return {static_cast<int64_t>(wall / second) + state_.offset_seconds + nanoseconds / second,
          nanoseconds % second};
}

void Rtc::set_now(Moment moment) noexcept {
  uint64_t wall = clock_.wall();
  auto wall_nanoseconds = static_cast<uint32_t>(wall % second);
  bool borrow = moment.nanoseconds < wall_nanoseconds;
  state_.offset_nanoseconds = moment.nanoseconds + (borrow ? second : 0) - wall_nanoseconds;
  state_.offset_seconds = moment.seconds - static_cast<int64_t>(wall / second) - (borrow ? 1 : 0);
  seen_ = moment;
}

bool Rtc::divider_reset() const noexcept {
  return (state_.ram[RegA] & 0x60) == 0x60;
}
bool Rtc::frozen() const noexcept {
  return (state_.ram[RegB] & B_SET) || divider_reset();
}

unsigned Rtc::decode(uint8_t value) const noexcept {
  return state_.ram[RegB] & B_BINARY ? value : (value >> 4) * 10u + (value & 15u);
}

uint8_t Rtc::encode(unsigned value) const noexcept {
  return static_cast<uint8_t>(state_.ram[RegB] & B_BINARY ? value : value / 10 << 4 | value % 10);
}

unsigned Rtc::decode_hours(uint8_t value) const noexcept {
  if (state_.ram[RegB] & B_24H) return decode(value);
  return decode(value & ~HOURS_PM) % 12 + (value & HOURS_PM ? 12 : 0);
}

uint8_t Rtc::encode_hours(unsigned hours) const noexcept {
  if (state_.ram[RegB] & B_24H) return encode(hours);
  unsigned half_day = hours % 12 == 0 ? 12 : hours % 12;
  return encode(half_day) | (hours >= 12 ? HOURS_PM : 0);
}

// Writes a moment into the time registers, as the guest sees them.
void Rtc::store_time(Moment moment) noexcept {
  using namespace std::chrono;
  auto days = floor<std::chrono::days>(sys_seconds(seconds(moment.seconds)));
  year_month_day date(days);
  auto time = static_cast<unsigned>((sys_seconds(seconds(moment.seconds)) - days).count());
  auto& ram = state_.ram;
  ram[Seconds] = encode(time % 60);
  ram[Minutes] = encode(time / 60 % 60);
  ram[Hours] = encode_hours(time / 3600);
  ram[Weekday] = encode((weekday(days).c_encoding() + state_.weekday_shift) % 7 + 1);
  ram[Day] = encode(static_cast<unsigned>(date.day()));
  ram[Month] = encode(static_cast<unsigned>(date.month()));
  auto year = static_cast<unsigned>(std::clamp(static_cast<int>(date.year()), 0, 9999));
  ram[Year] = encode(year % 100);
  ram[Century] = encode(year / 100);
}

// The moment that the time registers name. The guest may have written nonsense: fields that exceed their
// range carry over, which the chip leaves undefined.
int64_t Rtc::stored_seconds() const noexcept {
  using namespace std::chrono;
  const auto& ram = state_.ram;
  unsigned month_number = std::clamp(decode(ram[Month]), 1u, 12u);
  year_month_day first(year(static_cast<int>(decode(ram[Century]) * 100 + decode(ram[Year]))),
                       month(month_number), day(1));
  int64_t days = sys_days(first).time_since_epoch().count() + int64_t{decode(ram[Day])} - 1;
  return ((days * 24 + decode_hours(ram[Hours])) * 60 + decode(ram[Minutes])) * 60 + decode(ram[Seconds]);
}

void Rtc::refresh_time_registers() noexcept {
  if (!frozen()) store_time(now());
}

void Rtc::write_time(uint8_t index, uint8_t value) noexcept {
  refresh_time_registers();
  if (index == Weekday) {
    unsigned shown = decode(state_.ram[Weekday]);
    state_.weekday_shift = static_cast<uint8_t>((state_.weekday_shift + decode(value) + 7 * 256 - shown) % 7);
  }
  state_.ram[index] = value;
  // While the clock runs the divider keeps its phase; only whole seconds change.
  if (!frozen()) set_now({stored_seconds(), now().nanoseconds});
}

// Registers A and B start and stop the clock.
void Rtc::write_control(uint8_t index, uint8_t value) noexcept {
  bool was_frozen = frozen(), was_reset = divider_reset();
  refresh_time_registers();
  uint32_t phase = now().nanoseconds;
  if (index == RegA) {
    state_.ram[RegA] = value & ~A_UIP;
  } else {
    // Setting the time ends a pending update cycle and its interrupt.
    state_.ram[RegB] = value & B_SET ? value & ~B_UIE : value;
  }
  if (was_frozen && !frozen()) {
    // The first update follows 500 ms after the divider is released; SET alone leaves the divider running.
    set_now({stored_seconds(), was_reset ? second / 2 : phase});
  }
}

// --- Events
// --------------------------------------------------------------------------------------------------

// The first second after `after` that the alarm registers match; `never` when they name no time of day.
int64_t Rtc::next_alarm(int64_t after) const noexcept {
  auto matches = [](uint8_t pattern, unsigned wanted, unsigned value) {
    return (pattern & ALARM_ANY) == ALARM_ANY || wanted == value;
  };
  const auto& ram = state_.ram;
  unsigned hours = decode_hours(ram[HoursAlarm]), minutes = decode(ram[MinutesAlarm]),
           seconds = decode(ram[SecondsAlarm]);
  // At most 25 hours, 60 minutes and 60 seconds are stepped through.
  for (int64_t time = after + 1; time <= after + 90'000;) {
    auto of_day = static_cast<unsigned>(((time % 86'400) + 86'400) % 86'400);
    if (!matches(ram[HoursAlarm], hours, of_day / 3600)) {
      time += 3600 - of_day % 3600;
    } else if (!matches(ram[MinutesAlarm], minutes, of_day / 60 % 60)) {
      time += 60 - of_day % 60;
    } else if (!matches(ram[SecondsAlarm], seconds, of_day % 60)) {
      time++;
    } else {
      return time;
    }
  }
  return never;
}

// The periodic interrupt comes every 2^shift ticks of the 32,768 Hz time base; 0: off.
unsigned Rtc::periodic_shift() const noexcept {
  unsigned rate = state_.ram[RegA] & A_RATE;
  if (rate == 0 || divider_reset()) return 0;
  return rate <= 2 ? rate + 6 : rate - 1;  // codes 1 and 2 repeat 8 and 9 with this time base
}

// Brings register C up to the present, drives the line, and waits for the next event that would raise it.
void Rtc::sync() noexcept {
  Moment moment = now();
  uint8_t& flags = state_.ram[RegC];
  bool forward = moment.seconds > seen_.seconds ||
                 (moment.seconds == seen_.seconds && moment.nanoseconds >= seen_.nanoseconds);
  if (forward) {
    if (!frozen() && moment.seconds != seen_.seconds) {
      flags |= C_UF;
      if (next_alarm(seen_.seconds) <= moment.seconds) flags |= C_AF;
    }
    unsigned shift = periodic_shift();
    if (shift && periodic_ticks(moment.seconds, moment.nanoseconds) >> shift !=
                     periodic_ticks(seen_.seconds, seen_.nanoseconds) >> shift)
      flags |= C_PF;
  }
  seen_ = moment;

  bool level = (flags & state_.ram[RegB] & (C_PF | C_AF | C_UF)) != 0;
  flags = level ? flags | C_IRQF : flags & ~C_IRQF;
  if (level != level_) {
    level_ = level;
    interrupt_.set(level);
  }
  schedule(moment);
}

// A flag that is set already raises nothing new until the guest reads register C: no timer for it.
void Rtc::schedule(Moment moment) noexcept {
  auto wanted = static_cast<uint8_t>(state_.ram[RegB] & ~state_.ram[RegC]);
  constexpr uint64_t none = UINT64_MAX;
  uint64_t delay = none;
  uint64_t to_next_second = second - moment.nanoseconds;
  if ((wanted & B_UIE) && !frozen()) delay = to_next_second;
  if ((wanted & B_AIE) && !frozen()) {
    int64_t alarm = next_alarm(moment.seconds);
    // Looked at once a minute at least, because the host's wall clock may be set.
    if (alarm != never)
      delay = std::min(delay, to_next_second + std::min<uint64_t>(alarm - moment.seconds - 1, 60) * second);
  }
  unsigned shift = periodic_shift();
  if ((wanted & B_PIE) && shift) {
    int64_t next = ((periodic_ticks(moment.seconds, moment.nanoseconds) >> shift) + 1) << shift;
    int64_t ticks = next - moment.seconds * ticks_per_second;
    delay =
        std::min(delay, static_cast<uint64_t>(ticks) * second / ticks_per_second + 1 - moment.nanoseconds);
  }
  if (delay == none)
    timer_->cancel();
  else
    timer_->arm(clock_.now() + delay);
}

void Rtc::on_timer() noexcept {
  std::lock_guard lock(mutex_);
  sync();
}

// --- Registers
// -----------------------------------------------------------------------------------------------

uint8_t Rtc::read_register(uint8_t index) noexcept {
  switch (index) {
    case RegA: return state_.ram[RegA] | (!frozen() && now().nanoseconds >= second - uip_time ? A_UIP : 0);
    case RegC: {
      sync();
      uint8_t flags = state_.ram[RegC];
      state_.ram[RegC] = 0;
      sync();
      return flags;
    }
    case RegD: return D_VRT;
    default:
      if (is_time(index)) refresh_time_registers();
      return state_.ram[index];
  }
}

void Rtc::write_register(uint8_t index, uint8_t value) noexcept {
  if (index == RegC || index == RegD) return;  // read-only
  sync();
  if (index == RegA || index == RegB)
    write_control(index, value);
  else if (is_time(index))
    write_time(index, value);
  else
    state_.ram[index] = value;
  sync();
}

uint8_t Rtc::read_byte(uint64_t offset) noexcept {
  if (offset == 0) return 0xff;  // the index is write-only
  std::lock_guard lock(mutex_);
  return read_register(state_.index);
}

void Rtc::write_byte(uint64_t offset, uint8_t value) noexcept {
  std::lock_guard lock(mutex_);
  if (offset == 0)
    state_.index = value & 0x7f;
  else
    write_register(state_.index, value);
}

// --- Set-up and saved state
// ----------------------------------------------------------------------------------

void Rtc::set_memory(uint8_t index, uint8_t value) noexcept {
  if (index < FirstMemory || index >= state_.ram.size() || index == Century) return;
  std::lock_guard lock(mutex_);
  state_.ram[index] = value;
}

void Rtc::describe_memory(uint64_t low, uint64_t high) noexcept {
  using machine::layout::KiB, machine::layout::MiB;
  auto set16 = [this](uint8_t index, uint64_t value) {
    value = std::min<uint64_t>(value, 0xffff);
    set_memory(index, static_cast<uint8_t>(value));
    set_memory(index + 1, static_cast<uint8_t>(value >> 8));
  };
  set16(0x15, std::min<uint64_t>(low / KiB, 640));
  uint64_t extended = low > MiB ? (low - MiB) / KiB : 0;
  set16(0x17, extended);
  set16(0x30, extended);
  set16(0x34, low > 16 * MiB ? (low - 16 * MiB) / (64 * KiB) : 0);
  uint64_t above = std::min<uint64_t>(high / (64 * KiB), 0xff'ffff);
  for (uint8_t i = 0; i < 3; i++) set_memory(0x5b + i, static_cast<uint8_t>(above >> (8 * i)));
}

void Rtc::reset() noexcept {
  std::lock_guard lock(mutex_);
  state_.ram[RegB] &= static_cast<uint8_t>(~(B_PIE | B_AIE | B_UIE | B_SQWE));
  state_.ram[RegC] = 0;
  sync();
}

void Rtc::save(nlohmann::json& json) const {
  std::lock_guard lock(mutex_);
  save_state(state_, json);
}

void Rtc::load(const nlohmann::json& json) {
  auto state = load_state<RtcState>(json);
  if (state.index >= state.ram.size() || state.offset_nanoseconds >= second || state.weekday_shift >= 7 ||
      state.offset_seconds > offset_limit || state.offset_seconds < -offset_limit)
    usage_error("saved state of rtc: a field is out of range");
  std::lock_guard lock(mutex_);
  state_ = state;
  seen_ = now();
  level_ = false;
  interrupt_.set(false);
  sync();
}

}  // namespace lodge::device
