// Power management of a machine with hardware-reduced ACPI: sleep and reset registers, and the power button
// behind a generic event device.
#pragma once

#include <cstdint>
#include <mutex>
#include <string_view>

#include "base/state.hpp"
#include "device/byte_window.hpp"
#include "machine/io.hpp"
#include "machine/layout.hpp"

namespace lodge::device {

struct ReducedPowerState {
  static constexpr std::string_view name = "reduced-power";
  static constexpr unsigned version = 1;
  uint8_t sleep_control = 0, events = 0;
  template <class V>
  void visit(V& v) {
    v("sleep_control", sleep_control), v("events", events);
  }
};

// The window is reduced_power_size ports at reduced_power_port. Any thread.
class ReducedPower final : public ByteWindow, public Savable {
 public:
  static constexpr uint64_t window_size = machine::layout::reduced_power_size;

  // `event_line` is driven as a level. Both must outlive the chip.
  ReducedPower(machine::Interrupt& event_line, machine::Power& power) : line_(event_line), power_(power) {}

  // The user presses the power button for a moment: an event for the guest, which decides. Nothing tells
  // whether the guest listens.
  void press_power_button() noexcept;

  void save(nlohmann::json& json) const override;
  void load(const nlohmann::json& json) override;

 protected:
  uint8_t read_byte(uint64_t offset) noexcept override;
  void write_byte(uint64_t offset, uint8_t value) noexcept override;

 private:
  machine::Interrupt& line_;
  machine::Power& power_;
  mutable std::mutex mutex_;
  ReducedPowerState state_;
};

}  // namespace lodge::device
