// Real-time clock and CMOS memory MC146818.
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

namespace lodge::device {

struct RtcState {
  static constexpr std::string_view name = "rtc";
  static constexpr unsigned version = 1;

  uint8_t index = 0;
  std::array<uint8_t, 128>
      ram{};  // alarm, registers A to C, memory; the time registers only while it is being set
  int64_t offset_seconds = 0;       // the clock's time is the host's wall clock plus this,
  uint32_t offset_nanoseconds = 0;  // and this (below 10^9)
  uint8_t weekday_shift = 0;        // the guest may call any day the first

  template <class V>
  void visit(V& v) {
    v("index", index), v("ram", ram);
    v("offset_seconds", offset_seconds), v("offset_nanoseconds", offset_nanoseconds);
    v("weekday_shift", weekday_shift);
  }
};

// The window is two ports at 0x70: index and data.
class Rtc final : public ByteWindow, public Savable {
 public:
  static constexpr uint64_t window_size = 2;

  // Shows the host's time in UTC, shifted by `offset_seconds`. `interrupt` is driven as a level.
  Rtc(Clock& clock, machine::Interrupt& interrupt, int64_t offset_seconds = 0);

  // Writes what a PC's firmware leaves in CMOS about memory (bytes below and above 4 GiB).
  void describe_memory(uint64_t low, uint64_t high) noexcept;
  // One byte of CMOS memory (index 0x0e to 0x7f; others, and the century, are ignored).
  void set_memory(uint8_t index, uint8_t value) noexcept;
  // The RESET pin: disables the interrupts; time and memory stay.
  void reset() noexcept;

  void save(nlohmann::json& json) const override;
  void load(const nlohmann::json& json) override;

 protected:
  uint8_t read_byte(uint64_t offset) noexcept override;
  void write_byte(uint64_t offset, uint8_t value) noexcept override;

 private:
  // Since 1970; nanoseconds below 10^9. Two fields because 64 bits of nanoseconds end in the year 2262.
  struct Moment {
    int64_t seconds;
    uint32_t nanoseconds;
  };

  Moment now() const noexcept;
  void set_now(Moment moment) noexcept;
  bool divider_reset() const noexcept;
  bool frozen() const noexcept;
  unsigned decode(uint8_t value) const noexcept;
  uint8_t encode(unsigned value) const noexcept;
  unsigned decode_hours(uint8_t value) const noexcept;
  uint8_t encode_hours(unsigned hours) const noexcept;
  void store_time(Moment moment) noexcept;
  int64_t stored_seconds() const noexcept;
  void refresh_time_registers() noexcept;
  void write_time(uint8_t index, uint8_t value) noexcept;
  void write_control(uint8_t index, uint8_t value) noexcept;
  uint8_t read_register(uint8_t index) noexcept;
  void write_register(uint8_t index, uint8_t value) noexcept;

  int64_t next_alarm(int64_t after) const noexcept;
  unsigned periodic_shift() const noexcept;
  void sync() noexcept;
  void schedule(Moment moment) noexcept;
  void on_timer() noexcept;

  Clock& clock_;
  machine::Interrupt& interrupt_;
  mutable std::mutex mutex_;
  RtcState state_;
  Moment seen_;  // events up to here are in register C
  bool level_ = false;
  std::unique_ptr<Timer> timer_;  // last: its callback uses everything above
};

}  // namespace lodge::device
