// Debug console (the port 0xE9 convention of Bochs), isa-debug-exit and latches.
//
// isa-debug-exit follows the interface that QEMU's command line documents: default port 0x501, two ports
// wide. pvpanic follows QEMU's docs/specs/pvpanic: one port, bit 0 panicked; the other events are not
// offered. The debug console drops what its back end does not take: it has no way to make the guest wait.
#include "device/debug_ports.hpp"

#include <nlohmann/json.hpp>

namespace lodge::device {

uint8_t LatchPorts::read_byte(uint64_t offset) noexcept {
  std::lock_guard lock(mutex_);
  return offset < state_.bytes.size() ? state_.bytes[offset] : 0xff;
}

void LatchPorts::write_byte(uint64_t offset, uint8_t value) noexcept {
  std::lock_guard lock(mutex_);
  if (offset < state_.bytes.size()) state_.bytes[offset] = value;
}

void LatchPorts::save(nlohmann::json& json) const {
  std::lock_guard lock(mutex_);
  save_state(state_, json);
}

void LatchPorts::load(const nlohmann::json& json) {
  auto state = load_state<LatchPortsState>(json);
  std::lock_guard lock(mutex_);
  state_ = state;
}

}  // namespace lodge::device
