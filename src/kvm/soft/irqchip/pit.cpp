// Interval timer 8254 (Intel data sheet 231164-005), the PC's wiring of it, and port 0x61 (system control
// port B).
//
// Modelled: three channels, modes 0 to 5, binary and BCD, LSB/MSB/word access, counter latch and read-back of
// counts and status, the gate of channel 2, interrupts from channel 0 (gates 0 and 1 are tied high), and on
// port 0x61 the gate, speaker data, refresh toggle and OUT2. Nothing ticks: counters and outputs follow from
// the time of loading.
//
// Differences: a new count takes effect at once in every mode (modes 1, 2, 3 and 5 of the chip wait for the
// next trigger or period; KVM does not either), the clock's half cycles of loading are not counted. The timer
// runs at most every 200 us, so that a guest cannot keep the timer thread busy.
//
// Lost ticks: with re-injection the ticks that come before the guest has completed the last one are kept (at
// most `longest_backlog`) and delivered one by one, as guests that keep time by counting ticks need.
#include "kvm/soft/irqchip/pit.hpp"

#include <algorithm>
#include <utility>

namespace lodge::kvm::soft {
namespace {

constexpr uint64_t second = 1'000'000'000;
constexpr uint64_t shortest_period_ns = 200'000;
constexpr uint64_t refresh_half_period_ns = 15'085;  // 18 clocks: memory refresh of the PC AT
constexpr unsigned longest_backlog = 100;  // a second of DOS ticks five times over; 0.1 s at 1000 Hz

constexpr uint8_t unprogrammed = 0xff;  // "mode" after power-up, as in KVM's saved state

// Access states, in KVM's encoding.
enum Access : uint8_t {
  access_none = 0,
  access_low = 1,
  access_high = 2,
  access_word = 3,
  access_word_high = 4
};

__extension__ using Wide = unsigned __int128;  // nanoseconds times a frequency need more than 64 bits

uint64_t to_ticks(uint64_t ns) noexcept {
  return static_cast<uint64_t>(static_cast<Wide>(ns) * Pit::frequency / second);
}
// Rounded up, so that at that time the tick has happened.
uint64_t to_ns(uint64_t ticks) noexcept {
  return static_cast<uint64_t>((static_cast<Wide>(ticks) * second + Pit::frequency - 1) / Pit::frequency);
}

uint32_t modulus(const kvm_pit_channel_state& channel) noexcept {
  return channel.bcd != 0 ? 10000 : 0x10000;
}

uint32_t from_bcd(uint32_t value) noexcept {
  return (value & 15) + (value >> 4 & 15) * 10 + (value >> 8 & 15) * 100 + (value >> 12 & 15) * 1000;
}
uint32_t to_bcd(uint32_t value) noexcept {
  return value % 10 | value / 10 % 10 << 4 | value / 100 % 10 << 8 | value / 1000 % 10 << 12;
}

bool gate_pauses(uint8_t mode) noexcept {
  return mode == 0 || mode == 4;
}
bool gate_triggers(uint8_t mode) noexcept {
  return mode == 1 || mode == 5;
}

}  // namespace

Pit::Pit(Client& client, Clock& clock, bool speaker) : client_(client), clock_(clock), speaker_(speaker) {
  timer_ = clock_.make_timer([this] { expired(); });
  reset();
}

void Pit::reset() noexcept {
  const std::lock_guard lock(mutex_);
  channels_.fill(Channel{});
  frozen_.fill(0);
  flags_ = 0;
  for (unsigned i = 0; i < 3; ++i) {
    // Not programmed yet: no interrupts, so that a guest that never uses the PIT costs nothing.
    channels_[i].mode = unprogrammed;
    channels_[i].rw_mode = channels_[i].read_state = channels_[i].write_state = access_word;
    channels_[i].gate = i == 2 ? 0 : 1;
    load(i, 0);
  }
}

// --- Counters ---

// Clocks counted since the channel was loaded or triggered.
uint64_t Pit::elapsed(const Channel& channel) const noexcept {
  if (gate_pauses(channel.mode) && channel.gate == 0)
    return to_ticks(frozen_[static_cast<size_t>(&channel - channels_.data())]);
  const auto now = static_cast<int64_t>(clock_.now());
  return now <= channel.count_load_time ? 0 : to_ticks(static_cast<uint64_t>(now - channel.count_load_time));
}

bool Pit::output(const Channel& channel) const noexcept {
  if (channel.count == 0) return channel.mode != 0;  // a control word without a count yet
  const uint64_t d = elapsed(channel);
  switch (channel.mode) {
    case 0:
    case 1: return d >= channel.count;
    case 2: return channel.gate == 0 || d % channel.count != channel.count - 1;
    case 3: return channel.gate == 0 || d % channel.count < (channel.count + 1) / 2;
    default: return d != channel.count;  // 4 and 5: one low clock at the end
  }
}

uint16_t Pit::counter(const Channel& channel) const noexcept {
  if (channel.count == 0) return 0;
  const uint64_t d = elapsed(channel);
  const uint32_t wrap = modulus(channel);
  uint64_t value = 0;
  switch (channel.mode) {
    case 2: value = channel.gate == 0 ? channel.count : channel.count - d % channel.count; break;
    case 3: {
      // Counts by two, the odd remainder is skipped.
      const uint64_t phase = channel.gate == 0 ? 0 : 2 * d % channel.count;
      value = channel.count - phase;
      if (phase != 0 && (value & 1) != 0 && value > 1) --value;
      break;
    }
    default: value = (channel.count + wrap - d % wrap) % wrap; break;  // goes on below zero
  }
  value %= wrap;
  return static_cast<uint16_t>(channel.bcd != 0 ? to_bcd(static_cast<uint32_t>(value)) : value);
}

uint8_t Pit::status(const Channel& channel) const noexcept {
  return static_cast<uint8_t>((output(channel) ? 0x80 : 0) | (channel.count == 0 ? 0x40 : 0) |
                              (channel.rw_mode & 3) << 4 | (channel.mode & 7) << 1 |
                              (channel.bcd != 0 ? 1 : 0));
}

void Pit::load(unsigned index, uint32_t value) noexcept {
  Channel& channel = channels_[index];
  if (channel.bcd != 0) value = from_bcd(value);
  channel.count = value == 0 ? modulus(channel) : value;
  channel.count_load_time = static_cast<int64_t>(clock_.now());
  // Modes 1 and 5 wait for a trigger: the counter is as if it had run out long ago.
  if (gate_triggers(channel.mode)) channel.count_load_time -= static_cast<int64_t>(second);
  frozen_[index] = 0;
  if (index != 0) return;
  ticks_done_ = 0;
  waiting_ = false;
  backlog_ = 0;
  schedule();
}

void Pit::set_gate(unsigned index, bool level) noexcept {
  Channel& channel = channels_[index];
  if ((channel.gate != 0) == level) return;
  const auto now = static_cast<int64_t>(clock_.now());
  if (!level) {
    if (gate_pauses(channel.mode))
      frozen_[index] = static_cast<uint64_t>(std::max<int64_t>(now - channel.count_load_time, 0));
  } else if (gate_pauses(channel.mode)) {
    channel.count_load_time = now - static_cast<int64_t>(frozen_[index]);
  } else {
    channel.count_load_time = now;  // modes 2 and 3 restart, 1 and 5 are triggered
  }
  channel.gate = level ? 1 : 0;
}

// --- Interrupts of channel 0 ---

// Rising edges of OUT0 up to `now`.
uint64_t Pit::ticks_at(uint64_t now) const noexcept {
  const Channel& channel = channels_[0];
  if (channel.count == 0 || static_cast<int64_t>(now) <= channel.count_load_time) return 0;
  const uint64_t d = to_ticks(now - static_cast<uint64_t>(channel.count_load_time));
  switch (channel.mode) {
    case 0: return d >= channel.count ? 1 : 0;
    case 2:
    case 3: return d / channel.count;
    case 4: return d > channel.count ? 1 : 0;
    default: return 0;  // 1 and 5: gate 0 is tied high and never triggers
  }
}

void Pit::schedule() noexcept {
  const Channel& channel = channels_[0];
  uint64_t ticks = 0;  // clocks from loading to the next rising edge
  switch (channel.mode) {
    case 0: ticks = ticks_done_ == 0 ? channel.count : 0; break;
    case 2:
    case 3: ticks = (ticks_done_ + 1) * channel.count; break;
    case 4: ticks = ticks_done_ == 0 ? channel.count + 1 : 0; break;
    default: break;
  }
  if (channel.count == 0 || ticks == 0 || (flags_ & KVM_PIT_FLAGS_HPET_LEGACY) != 0) {
    if (deadline_ != 0) timer_->cancel();
    deadline_ = 0;
    return;
  }
  deadline_ = static_cast<uint64_t>(channel.count_load_time) + to_ns(ticks);
  if (to_ns(channel.count) < shortest_period_ns)
    deadline_ = std::max(deadline_, clock_.now() + shortest_period_ns);
  timer_->arm(deadline_);
}

void Pit::expired() noexcept {
  {
    const std::lock_guard lock(mutex_);
    const uint64_t now = clock_.now();
    // A callback may come late for a timer that was cancelled or armed anew.
    if (deadline_ == 0 || now < deadline_) return;
    const uint64_t due = ticks_at(now);
    const uint64_t fresh = due - std::min(ticks_done_, due);
    ticks_done_ = due;
    schedule();
    if (fresh == 0) return;
    if (reinject_) {
      const auto more = static_cast<unsigned>(std::min<uint64_t>(fresh, longest_backlog));
      backlog_ = std::min(backlog_ + (waiting_ ? more : more - 1), longest_backlog);
      // With a full backlog the guest is told once more: should the acknowledgement have got lost, ticks go
      // on.
      if (waiting_ && backlog_ < longest_backlog) return;
      waiting_ = true;
    }
  }
  interrupt();
}

void Pit::interrupt() noexcept {
  if (client_.pit_interrupt() > 0) return;
  // Masked or refused: nobody will complete it.
  const std::lock_guard lock(mutex_);
  waiting_ = false;
  backlog_ = 0;
}

void Pit::acknowledged() noexcept {
  {
    const std::lock_guard lock(mutex_);
    if (!waiting_) return;
    waiting_ = backlog_ != 0;
    if (!waiting_) return;
    --backlog_;
  }
  interrupt();
}

void Pit::set_reinject(bool on) noexcept {
  const std::lock_guard lock(mutex_);
  reinject_ = on;
  waiting_ = false;
  backlog_ = 0;
}

// --- Registers ---

void Pit::latch_count(Channel& channel) noexcept {
  if (channel.count_latched != access_none) return;  // the first latch holds until it is read
  channel.latched_count = counter(channel);
  channel.count_latched = channel.rw_mode;
}

void Pit::write_control(uint8_t value) noexcept {
  const unsigned index = value >> 6;
  if (index == 3) {  // read-back; a zero bit asks
    for (unsigned i = 0; i < 3; ++i) {
      if ((value >> (i + 1) & 1) == 0) continue;
      Channel& channel = channels_[i];
      if ((value & 0x20) == 0) latch_count(channel);
      if ((value & 0x10) == 0 && channel.status_latched == 0) {
        channel.status = status(channel);
        channel.status_latched = 1;
      }
    }
    return;
  }
  Channel& channel = channels_[index];
  const uint8_t access = value >> 4 & 3;
  if (access == 0) {
    latch_count(channel);
    return;
  }
  channel.rw_mode = channel.read_state = channel.write_state = access;
  channel.mode = value >> 1 & 7;
  if (channel.mode > 5) channel.mode -= 4;
  channel.bcd = value & 1;
  channel.count = 0;
  channel.count_latched = access_none;
  channel.status_latched = 0;
  if (index == 0) schedule();
}

void Pit::write_count(unsigned index, uint8_t value) noexcept {
  Channel& channel = channels_[index];
  switch (channel.write_state) {
    case access_high: load(index, static_cast<uint32_t>(value) << 8); break;
    case access_word:
      channel.write_latch = value;
      channel.write_state = access_word_high;
      // The first byte stops mode 0 until the second has come.
      if (channel.mode == 0) {
        channel.count = 0;
        if (index == 0) schedule();
      }
      break;
    case access_word_high:
      channel.write_state = access_word;
      load(index, channel.write_latch | static_cast<uint32_t>(value) << 8);
      break;
    default: load(index, value); break;
  }
}

uint8_t Pit::read_count(Channel& channel) noexcept {
  if (channel.status_latched != 0) {
    channel.status_latched = 0;
    return channel.status;
  }
  switch (channel.count_latched) {
    case access_low: channel.count_latched = access_none; return static_cast<uint8_t>(channel.latched_count);
    case access_high:
      channel.count_latched = access_none;
      return static_cast<uint8_t>(channel.latched_count >> 8);
    case access_word: channel.count_latched = access_high; return static_cast<uint8_t>(channel.latched_count);
    default: break;
  }
  const uint16_t value = counter(channel);
  switch (channel.read_state) {
    case access_high: return static_cast<uint8_t>(value >> 8);
    case access_word: channel.read_state = access_word_high; return static_cast<uint8_t>(value);
    case access_word_high: channel.read_state = access_word; return static_cast<uint8_t>(value >> 8);
    default: return static_cast<uint8_t>(value);
  }
}

void Pit::write(uint16_t port, uint8_t value) noexcept {
  const std::lock_guard lock(mutex_);
  if (port == 0x61) {
    flags_ =
        (flags_ & ~KVM_PIT_FLAGS_SPEAKER_DATA_ON) | ((value & 2) != 0 ? KVM_PIT_FLAGS_SPEAKER_DATA_ON : 0);
    set_gate(2, (value & 1) != 0);
  } else if ((port & 3) == 3) {
    write_control(value);
  } else {
    write_count(port & 3, value);
  }
}

uint8_t Pit::read(uint16_t port) noexcept {
  const std::lock_guard lock(mutex_);
  if (port == 0x61) {
    const bool refresh = (clock_.now() / refresh_half_period_ns & 1) != 0;
    return static_cast<uint8_t>(channels_[2].gate | ((flags_ & KVM_PIT_FLAGS_SPEAKER_DATA_ON) != 0 ? 2 : 0) |
                                (refresh ? 0x10 : 0) | (output(channels_[2]) ? 0x20 : 0));
  }
  return (port & 3) == 3 ? 0 : read_count(channels_[port & 3]);
}

// --- State ---

kvm_pit_state2 Pit::state() noexcept {
  const std::lock_guard lock(mutex_);
  kvm_pit_state2 state{};
  state.flags = flags_;
  for (unsigned i = 0; i < 3; ++i) {
    Channel& out = state.channels[i];
    out = channels_[i];
    // The format has no "no count yet"; 0 would divide by zero elsewhere.
    if (out.count == 0) out.count = modulus(out);
    if (gate_pauses(out.mode) && out.gate == 0)
      out.count_load_time = static_cast<int64_t>(clock_.now() - frozen_[i]);
  }
  return state;
}

void Pit::set_state(const kvm_pit_state2& state) noexcept {
  const std::lock_guard lock(mutex_);
  flags_ = state.flags & (KVM_PIT_FLAGS_HPET_LEGACY | KVM_PIT_FLAGS_SPEAKER_DATA_ON);
  const auto now = static_cast<int64_t>(clock_.now());
  for (unsigned i = 0; i < 3; ++i) {
    Channel& channel = channels_[i];
    channel = state.channels[i];
    // The state may come from a file: every field is brought into its range.
    channel.bcd = channel.bcd != 0 ? 1 : 0;
    channel.mode = channel.mode > 5 ? unprogrammed : channel.mode;
    channel.gate = i != 2 || channel.gate != 0 ? 1 : 0;
    channel.count = std::clamp<uint32_t>(channel.count, 1, modulus(channel));
    channel.rw_mode = (channel.rw_mode & 3) == 0 ? static_cast<uint8_t>(access_word) : channel.rw_mode & 3;
    if (channel.read_state == 0 || channel.read_state > access_word_high)
      channel.read_state = channel.rw_mode;
    if (channel.write_state == 0 || channel.write_state > access_word_high)
      channel.write_state = channel.rw_mode;
    channel.count_latched &= 3;
    // Load times are of the clock that the state was taken by. Channel 0 starts anew (as in KVM), since a
    // one-shot interrupt must not get lost.
    if (i == 0 || channel.count_load_time > now || channel.count_load_time < 0) channel.count_load_time = now;
    frozen_[i] = static_cast<uint64_t>(now - channel.count_load_time);
  }
  ticks_done_ = 0;
  waiting_ = false;
  backlog_ = 0;
  schedule();
}

}  // namespace lodge::kvm::soft
