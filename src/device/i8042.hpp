// PS/2 keyboard controller 8042.
#pragma once

#include <array>
#include <cstdint>
#include <mutex>
#include <string_view>

#include "base/state.hpp"
#include "device/byte_window.hpp"
#include "machine/io.hpp"

namespace lodge::device {

struct I8042State {
  static constexpr std::string_view name = "i8042";
  static constexpr unsigned version = 1;

  std::array<uint8_t, 32> ram{0x45};  // [0] is the command byte: keyboard interrupt, system flag, translation
  uint8_t status = 0x14;              // keyboard not locked, self test passed
  uint8_t output = 0;                 // what port 0x60 gives
  uint8_t output_port = 0x03;         // A20 open, reset line high
  uint8_t command = 0;                // that waits for its data byte

  template <class V>
  void visit(V& v) {
    v("ram", ram), v("status", status), v("output", output), v("output_port", output_port),
        v("command", command);
  }
};

// Two windows of one port each: data at 0x60, command and status at 0x64.
class I8042 final : public Savable {
 public:
  // Lines 1 and 12 of the PC. All must outlive the controller.
  I8042(machine::Interrupt& keyboard, machine::Interrupt& mouse, machine::Power& power);

  machine::RegisterWindow& data_window() noexcept { return data_; }
  machine::RegisterWindow& command_window() noexcept { return command_; }
  void reset() noexcept;

  void save(nlohmann::json& json) const override;
  void load(const nlohmann::json& json) override;

 private:
  class DataWindow final : public ByteWindow {
   public:
    explicit DataWindow(I8042& controller) : controller_(controller) {}

   protected:
    uint8_t read_byte(uint64_t) noexcept override { return controller_.read_data(); }
    void write_byte(uint64_t, uint8_t value) noexcept override { controller_.write_data(value); }

   private:
    I8042& controller_;
  };
  class CommandWindow final : public ByteWindow {
   public:
    explicit CommandWindow(I8042& controller) : controller_(controller) {}

   protected:
    uint8_t read_byte(uint64_t) noexcept override { return controller_.read_status(); }
    void write_byte(uint64_t, uint8_t value) noexcept override { controller_.write_command(value); }

   private:
    I8042& controller_;
  };

  uint8_t read_data() noexcept;
  void write_data(uint8_t value) noexcept;
  uint8_t read_status() noexcept;
  void write_command(uint8_t value) noexcept;

  // With mutex_ held; the result says whether the guest has pulled the reset line.
  bool run_command(uint8_t command) noexcept;
  bool run_command_with_data(uint8_t command, uint8_t value) noexcept;
  void respond(uint8_t byte, uint8_t flags = 0) noexcept;
  void update_interrupts() noexcept;

  machine::Interrupt& keyboard_;
  machine::Interrupt& mouse_;
  machine::Power& power_;
  mutable std::mutex mutex_;
  I8042State state_;
  DataWindow data_{*this};
  CommandWindow command_{*this};
};

}  // namespace lodge::device
