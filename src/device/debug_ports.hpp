// Small ports for debugging and delays: a console, an exit, and latches.
#pragma once

#include <array>
#include <cstdint>
#include <mutex>
#include <string_view>

#include "base/state.hpp"
#include "device/byte_window.hpp"
#include "device/character.hpp"
#include "machine/io.hpp"

namespace lodge::device {

// One port: what is written goes to the back end, and reading gives the magic value that says it is there.
// Stateless.
class DebugConsole final : public ByteWindow {
 public:
  static constexpr uint8_t magic = 0xe9;
  explicit DebugConsole(CharBackend& backend) : backend_(backend) {}

 protected:
  uint8_t read_byte(uint64_t) noexcept override { return magic; }
  void write_byte(uint64_t, uint8_t value) noexcept override { backend_.write({&value, 1}); }

 private:
  CharBackend& backend_;
};

// Ends the VM with exit status (value << 1) | 1. Stateless.
class DebugExit final : public machine::RegisterWindow {
 public:
  explicit DebugExit(machine::Power& power) : power_(power) {}
  uint64_t read(uint64_t, unsigned) noexcept override { return 0; }
  void write(uint64_t, unsigned, uint64_t value) noexcept override {
    // Only the low 8 bits of an exit status reach a parent process; keep the number as the guest meant it.
    power_.exit_with(static_cast<int>(static_cast<uint32_t>(value) << 1 | 1));
  }

 private:
  machine::Power& power_;
};

// pvpanic: the guest's kernel says that it has panicked. The VM ends with a status of its own; nothing that a
// panicked kernel does afterwards is of use. Stateless.
class PanicPort final : public ByteWindow {
 public:
  static constexpr uint8_t panicked = 1;
  static constexpr int exit_status = 14;  // even, as all of ours (vm/ending.hpp)
  explicit PanicPort(machine::Power& power) : power_(power) {}

 protected:
  uint8_t read_byte(uint64_t) noexcept override { return panicked; }  // the events that are understood
  void write_byte(uint64_t, uint8_t value) noexcept override {
    if ((value & panicked) != 0) power_.exit_with(exit_status);
  }

 private:
  machine::Power& power_;
};

struct LatchPortsState {
  static constexpr std::string_view name = "latch-ports";
  static constexpr unsigned version = 1;
  std::array<uint8_t, 16> bytes{};
  template <class V>
  void visit(V& v) {
    v("bytes", bytes);
  }
};

// Up to 16 ports that keep what is written and do nothing: the POST code and DMA page registers at 0x80,
// which guests write for the delay, and the alternative delay port 0xed.
class LatchPorts final : public ByteWindow, public Savable {
 public:
  void save(nlohmann::json& json) const override;
  void load(const nlohmann::json& json) override;

 protected:
  uint8_t read_byte(uint64_t offset) noexcept override;
  void write_byte(uint64_t offset, uint8_t value) noexcept override;

 private:
  mutable std::mutex mutex_;
  LatchPortsState state_;
};

}  // namespace lodge::device
