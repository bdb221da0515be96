// ACPI sleep control and status registers (ACPI specification 6.4, sections 4.8.3.7 "Sleep Control and Status
// Registers" and 4.8.3.6 "Reset Register"), and one register of our own for the generic event device of
// section 5.6.9, which the DSDT describes.
//
// Modelled: soft off (S5) by SLP_EN with its type, reset, the power button as an event that a read takes. Not
// modelled: S1, S3 and S4, which the DSDT does not declare; so WAK_STS is never set.
#include "device/reduced_power.hpp"

#include <nlohmann/json.hpp>

namespace lodge::device {

namespace layout = machine::layout;

namespace {

constexpr uint64_t SLEEP_CONTROL = 0, RESET = layout::reduced_power_reset,
                   EVENTS = layout::reduced_power_events;
constexpr uint8_t SLP_EN = 1u << 5, SLP_TYP = 7u << 2;
constexpr uint8_t POWER_BUTTON = 1;

}  // namespace

void ReducedPower::press_power_button() noexcept {
  const std::lock_guard lock(mutex_);
  state_.events |= POWER_BUTTON;
  line_.set(true);
}

uint8_t ReducedPower::read_byte(uint64_t offset) noexcept {
  const std::lock_guard lock(mutex_);
  if (offset == SLEEP_CONTROL) return state_.sleep_control;
  if (offset != EVENTS) return 0;
  line_.set(false);
  return std::exchange(state_.events, uint8_t{0});
}

void ReducedPower::write_byte(uint64_t offset, uint8_t value) noexcept {
  if (offset == RESET && value == layout::reset_value) return power_.request(machine::PowerRequest::reset);
  if (offset != SLEEP_CONTROL) return;
  {
    const std::lock_guard lock(mutex_);
    state_.sleep_control = value & SLP_TYP;  // SLP_EN reads as zero
  }
  if ((value & SLP_EN) && (value & SLP_TYP) >> 2 == layout::acpi_s5_type)
    power_.request(machine::PowerRequest::power_off);
}

void ReducedPower::save(nlohmann::json& json) const {
  const std::lock_guard lock(mutex_);
  save_state(state_, json);
}

void ReducedPower::load(const nlohmann::json& json) {
  auto state = load_state<ReducedPowerState>(json);
  const std::lock_guard lock(mutex_);
  state_.sleep_control = state.sleep_control & SLP_TYP;
  state_.events = state.events & POWER_BUTTON;
  line_.set(state_.events != 0);
}

}  // namespace lodge::device
