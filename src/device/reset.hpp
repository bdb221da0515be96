// The two reset registers that are not the keyboard controller's: the PCI reset control register at 0xCF9 and
// the PS/2 system control port A at 0x92.
#pragma once

#include <cstdint>
#include <mutex>
#include <string_view>

#include "base/state.hpp"
#include "device/byte_window.hpp"
#include "machine/io.hpp"

namespace lodge::device {

struct ResetControlState {
  static constexpr std::string_view name = "reset-control";
  static constexpr unsigned version = 1;
  uint8_t control = 0;
  template <class V>
  void visit(V& v) {
    v("control", control);
  }
};

// One port, 0xCF9. It lies inside the configuration address register of the PCI host bridge, which hands byte
// accesses to it.
class ResetControl final : public ByteWindow, public Savable {
 public:
  explicit ResetControl(machine::Power& power) : power_(power) {}
  void save(nlohmann::json& json) const override;
  void load(const nlohmann::json& json) override;

 protected:
  uint8_t read_byte(uint64_t offset) noexcept override;
  void write_byte(uint64_t offset, uint8_t value) noexcept override;

 private:
  machine::Power& power_;
  mutable std::mutex mutex_;
  ResetControlState state_;
};

struct Port92State {
  static constexpr std::string_view name = "port92";
  static constexpr unsigned version = 1;
  uint8_t control = 2;  // A20 open
  template <class V>
  void visit(V& v) {
    v("control", control);
  }
};

// One port, 0x92.
class Port92 final : public ByteWindow, public Savable {
 public:
  explicit Port92(machine::Power& power) : power_(power) {}
  void save(nlohmann::json& json) const override;
  void load(const nlohmann::json& json) override;

 protected:
  uint8_t read_byte(uint64_t offset) noexcept override;
  void write_byte(uint64_t offset, uint8_t value) noexcept override;

 private:
  machine::Power& power_;
  mutable std::mutex mutex_;
  Port92State state_;
};

}  // namespace lodge::device
