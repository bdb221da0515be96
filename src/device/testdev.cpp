// pc-testdev: the interface that kvm-unit-tests use (its x86 tests name the ports: emulator, ioapic,
// eventinj).
//
// Modelled: the echo register at 0xe0 and 0xe8, the page flush at 0xe4, the interrupt lines at 0x2000, the
// MMIO window at 0xff000000. The older ports for console, exit and memory size (0xf1, 0xf4, 0xd1) are
// separate devices today: a serial port, isa-debug-exit and fw_cfg.
#include "device/testdev.hpp"

#include <cstring>
#include <nlohmann/json.hpp>

#include "base/error.hpp"

namespace lodge::device {

namespace {

uint64_t mask(unsigned size) {
  return size >= 8 ? ~uint64_t{0} : (uint64_t{1} << (size * 8)) - 1;
}

}  // namespace

Testdev::Testdev(machine::GuestMemory& ram, const std::function<machine::Interrupt&(unsigned gsi)>& line)
    : ram_(ram) {
  for (unsigned gsi = 0; gsi < irq_size; gsi++) lines_[gsi] = &line(gsi);
  state_.memory.resize(memory_size);
}

uint64_t Testdev::EchoWindow::read(uint64_t offset, unsigned size) noexcept {
  std::lock_guard lock(testdev_.mutex_);
  return uint64_t{testdev_.state_.echo} >> (offset * 8) & mask(size);
}

void Testdev::EchoWindow::write(uint64_t offset, unsigned size, uint64_t value) noexcept {
  std::lock_guard lock(testdev_.mutex_);
  auto bits = static_cast<uint32_t>(mask(size) << (offset * 8));
  testdev_.state_.echo =
      (testdev_.state_.echo & ~bits) | (static_cast<uint32_t>(value << (offset * 8)) & bits);
}

void Testdev::IrqWindow::write_byte(uint64_t offset, uint8_t value) noexcept {
  if (offset < irq_size) testdev_.lines_[offset]->set(value != 0);
}

uint64_t Testdev::MemoryWindow::read(uint64_t offset, unsigned size) noexcept {
  std::lock_guard lock(testdev_.mutex_);
  uint64_t value = 0;
  if (offset + size <= memory_size) std::memcpy(&value, testdev_.state_.memory.data() + offset, size);
  return value;
}

void Testdev::MemoryWindow::write(uint64_t offset, unsigned size, uint64_t value) noexcept {
  std::lock_guard lock(testdev_.mutex_);
  if (offset + size <= memory_size) std::memcpy(testdev_.state_.memory.data() + offset, &value, size);
}

void Testdev::save(nlohmann::json& json) const {
  std::lock_guard lock(mutex_);
  save_state(state_, json);
}

void Testdev::load(const nlohmann::json& json) {
  auto state = load_state<TestdevState>(json);
  if (state.memory.size() != memory_size)
    usage_error("saved state of pc-testdev: memory has {} bytes, expected {}", state.memory.size(),
                memory_size);
  std::lock_guard lock(mutex_);
  state_ = std::move(state);
}

}  // namespace lodge::device
