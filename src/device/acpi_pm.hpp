// ACPI fixed hardware: PM1 event and control blocks, PM timer, GPE0 block, SMI command port.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string_view>

#include "base/clock.hpp"
#include "base/state.hpp"
#include "device/byte_window.hpp"
#include "machine/io.hpp"
#include "machine/layout.hpp"

namespace lodge::device {

struct AcpiPmState {
  static constexpr std::string_view name = "acpi-pm";
  static constexpr unsigned version = 1;

  uint16_t pm1_status = 0, pm1_enable = 0, pm1_control = 0;
  uint64_t gpe_status = 0, gpe_enable = 0;
  uint8_t smi_data = 0;      // port 0xb3, a scratch register between the guest and its firmware
  uint64_t timer_ticks = 0;  // at the moment of saving

  template <class V>
  void visit(V& v) {
    v("pm1_status", pm1_status), v("pm1_enable", pm1_enable), v("pm1_control", pm1_control);
    v("gpe_status", gpe_status), v("gpe_enable", gpe_enable);
    v("smi_data", smi_data), v("timer_ticks", timer_ticks);
  }
};

// The window is acpi_pm_size ports at acpi_pm_base.
class AcpiPm final : public machine::RegisterWindow, public Savable {
 public:
  static constexpr uint64_t window_size = machine::layout::acpi_pm_size;

  // `sci` is driven as a level. All three must outlive the chip.
  AcpiPm(Clock& clock, machine::Interrupt& sci, machine::Power& power);

  // Two ports from smi_command_port on.
  machine::RegisterWindow& smi_window() noexcept { return smi_; }

  // What the real-time clock's interrupt drives besides IRQ 8: its rise is the RTC event, which Linux uses
  // for alarms when the HPET has taken IRQ 8.
  machine::Interrupt& rtc_input() noexcept { return rtc_; }

  // The user presses the power button for a moment: an event for the guest, which decides. Returns false when
  // the guest has not enabled the event (no ACPI driver yet), so that nobody waits for an answer. Any thread.
  bool press_power_button() noexcept;
  // Sets general-purpose event `event` (0 to 63; others are ignored). Any thread.
  void raise_gpe(unsigned event) noexcept;

  void reset() noexcept;

  uint64_t read(uint64_t offset, unsigned size) noexcept override;
  void write(uint64_t offset, unsigned size, uint64_t value) noexcept override;
  void save(nlohmann::json& json) const override;
  void load(const nlohmann::json& json) override;

 private:
  class SmiWindow final : public ByteWindow {
   public:
    explicit SmiWindow(AcpiPm& pm) : pm_(pm) {}

   protected:
    uint8_t read_byte(uint64_t offset) noexcept override;
    void write_byte(uint64_t offset, uint8_t value) noexcept override;

   private:
    AcpiPm& pm_;
  };

  class RtcInput final : public machine::Interrupt {
   public:
    explicit RtcInput(AcpiPm& pm) : pm_(pm) {}
    void set(bool level) noexcept override;

   private:
    AcpiPm& pm_;
    bool level_ = false;  // guarded by pm_.mutex_
  };

  uint64_t ticks() const noexcept;
  uint8_t register_byte(uint64_t offset, uint32_t timer) const noexcept;
  void set_register_byte(uint64_t offset, uint8_t value) noexcept;
  void set_control(uint16_t value) noexcept;
  void sync() noexcept;
  void on_timer() noexcept;

  Clock& clock_;
  machine::Interrupt& sci_;
  machine::Power& power_;
  mutable std::mutex mutex_;
  AcpiPmState state_;
  uint64_t base_time_;       // Clock::now() at which the timer showed state_.timer_ticks
  uint64_t seen_ticks_ = 0;  // up to where overflows have been noted
  bool level_ = false;
  SmiWindow smi_{*this};
  RtcInput rtc_{*this};
  std::unique_ptr<Timer> timer_;  // last: its callback uses everything above
};

}  // namespace lodge::device
