// Reset registers: RST_CNT at 0xCF9 (Intel ICH9 data sheet, section 13.7.5) and system control port A at 0x92
// (IBM PS/2 hardware interface technical reference, system board I/O controller).
//
// Modelled: the reset on a rising edge of RST_CPU or of port 0x92 bit 0. A "hard", "soft" or "full" reset is
// the same here: the whole machine starts anew. Not modelled: the A20 gate. Bit 1 of port 0x92 reads back as
// written, but address line 20 is always open, as in every PC that boots a 32-bit or 64-bit kernel; only
// real-mode programs from the 1980s count on wrap-around at 1 MiB.
#include "device/reset.hpp"

#include <nlohmann/json.hpp>

namespace lodge::device {

namespace {

constexpr uint8_t SYS_RST = 1u << 1, RST_CPU = 1u << 2, FULL_RST = 1u << 3;
constexpr uint8_t FAST_INIT = 1u << 0, ALT_A20 = 1u << 1;

}  // namespace

uint8_t ResetControl::read_byte(uint64_t) noexcept {
  std::lock_guard lock(mutex_);
  return state_.control;
}

void ResetControl::write_byte(uint64_t, uint8_t value) noexcept {
  bool rising;
  {
    std::lock_guard lock(mutex_);
    rising = (value & RST_CPU) && !(state_.control & RST_CPU);
    // RST_CPU is not kept: after the reset it is clear again.
    state_.control = value & (SYS_RST | FULL_RST);
  }
  if (rising) power_.request(machine::PowerRequest::reset);
}

void ResetControl::save(nlohmann::json& json) const {
  std::lock_guard lock(mutex_);
  save_state(state_, json);
}

void ResetControl::load(const nlohmann::json& json) {
  auto state = load_state<ResetControlState>(json);
  std::lock_guard lock(mutex_);
  state_.control = state.control & (SYS_RST | FULL_RST);
}

uint8_t Port92::read_byte(uint64_t) noexcept {
  std::lock_guard lock(mutex_);
  return state_.control;
}

void Port92::write_byte(uint64_t, uint8_t value) noexcept {
  {
    std::lock_guard lock(mutex_);
    state_.control = value & ALT_A20;
  }
  if (value & FAST_INIT) power_.request(machine::PowerRequest::reset);
}

void Port92::save(nlohmann::json& json) const {
  std::lock_guard lock(mutex_);
  save_state(state_, json);
}

void Port92::load(const nlohmann::json& json) {
  auto state = load_state<Port92State>(json);
  std::lock_guard lock(mutex_);
  state_.control = state.control & ALT_A20;
}

}  // namespace lodge::device
