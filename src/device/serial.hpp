// UART 16550A: eight ports and one interrupt line.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string_view>

#include "base/clock.hpp"
#include "base/state.hpp"
#include "device/byte_window.hpp"
#include "device/character.hpp"

namespace lodge::device {

inline constexpr unsigned serial_fifo_size = 16;

struct SerialState {
  static constexpr std::string_view name = "serial";
  static constexpr unsigned version = 1;

  uint8_t ier = 0, fcr = 0, lcr = 0, mcr = 0, scr = 0;
  uint8_t dll = 12, dlm = 0;  // 9600 baud: what firmware leaves
  uint8_t errors = 0;         // LSR bits 1 to 4 not yet read
  uint8_t lines = 0;          // MSR bits 4 to 7 as last seen by the guest's delta bits
  uint8_t deltas = 0;         // MSR bits 0 to 3
  bool thre_pending = false;
  bool timeout_pending = false;
  uint8_t rx_count = 0, tx_count = 0;
  std::array<uint8_t, serial_fifo_size> rx{};
  std::array<uint8_t, serial_fifo_size> rx_errors{};  // LSR bits that come with each byte
  std::array<uint8_t, serial_fifo_size> tx{};

  template <class V>
  void visit(V& v) {
    v("ier", ier), v("fcr", fcr), v("lcr", lcr), v("mcr", mcr), v("scr", scr);
    v("dll", dll), v("dlm", dlm);
    v("errors", errors), v("lines", lines), v("deltas", deltas);
    v("thre_pending", thre_pending), v("timeout_pending", timeout_pending);
    v("rx_count", rx_count), v("tx_count", tx_count);
    v("rx", rx), v("rx_errors", rx_errors), v("tx", tx);
  }
};

class Serial final : public ByteWindow, public CharPort, public Savable {
 public:
  static constexpr uint64_t window_size = 8;

  // All three must outlive the UART. `interrupt` is driven as a level: high while a source is pending.
  Serial(Clock& clock, machine::Interrupt& interrupt, CharBackend& backend);

  size_t receive(std::span<const uint8_t> bytes) noexcept override;
  void transmit_ready() noexcept override;
  // The far end holds the line in its break condition (Linux: SysRq on a console). False when the FIFO is
  // full.
  bool receive_break() noexcept;

  void save(nlohmann::json& json) const override;
  void load(const nlohmann::json& json) override;

 protected:
  uint8_t read_byte(uint64_t offset) noexcept override;
  void write_byte(uint64_t offset, uint8_t value) noexcept override;

 private:
  // All of these: with mutex_ held.
  bool fifo_enabled() const noexcept;
  bool loopback() const noexcept;
  unsigned rx_capacity() const noexcept;
  unsigned rx_trigger() const noexcept;
  uint8_t pending_source() const noexcept;
  uint8_t line_status() const noexcept;
  uint8_t modem_lines() const noexcept;
  void update_modem_lines() noexcept;
  void update_interrupt() noexcept;
  void push(uint8_t byte, uint8_t errors) noexcept;
  uint8_t pop() noexcept;
  void restart_timeout() noexcept;
  void transmit(uint8_t byte) noexcept;
  void drain() noexcept;
  void set_ier(uint8_t value) noexcept;
  void set_fcr(uint8_t value) noexcept;
  void set_mcr(uint8_t value) noexcept;
  uint8_t read_line_status() noexcept;
  uint8_t read_modem_status() noexcept;
  uint8_t read_interrupt_id() noexcept;
  bool take_ready() noexcept;

  void on_timeout() noexcept;

  Clock& clock_;
  machine::Interrupt& interrupt_;
  CharBackend& backend_;
  mutable std::mutex mutex_;
  SerialState state_;
  bool level_ = false;
  bool input_refused_ = false;    // receive() took less than offered
  std::unique_ptr<Timer> timer_;  // last: its callback uses everything above
};

}  // namespace lodge::device
