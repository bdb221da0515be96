// MSI-X (PCI Local Bus Specification 3.0, section 6.8.2).
//
// Modelled: table, pending bits, function mask and entry masks; a message that was masked is sent when the
// last mask goes. Accesses of 4 and 8 bytes, aligned, as the specification allows; others read zero and write
// nothing.
#include "device/pci/msix.hpp"

#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "base/state.hpp"

namespace lodge::device::pci {

namespace {

constexpr uint8_t capability_id = 0x11;
constexpr unsigned capability_size = 12, CONTROL = 2, TABLE = 4, PBA = 8;
constexpr uint16_t CONTROL_ENABLE = 0x8000, CONTROL_MASK = 0x4000;
constexpr uint32_t ENTRY_MASKED = 1;
constexpr uint64_t entry_size = 16, pba_offset = Msix::window_size / 2;

struct MsixState {
  static constexpr std::string_view name = "msix";
  static constexpr unsigned version = 1;
  bool enabled = false, masked = false;
  std::vector<uint8_t> table;  // as the guest reads it
  std::vector<uint8_t> pending;
  template <class V>
  void visit(V& v) {
    v("enabled", enabled), v("masked", masked), v("table", table), v("pending", pending);
  }
};

}  // namespace

Msix::Msix(unsigned vectors, machine::MsiTarget& target) : target_(target), entries_(vectors) {}

void Msix::add_capability(ConfigSpace& config, unsigned bar, uint32_t offset) {
  capability_ = config.add_capability(capability_id, capability_size);
  config.set(capability_ + CONTROL, 2, vectors() - 1);
  config.allow(capability_ + CONTROL, 2, CONTROL_ENABLE | CONTROL_MASK);
  config.set(capability_ + TABLE, 4, offset | bar);
  config.set(capability_ + PBA, 4, (offset + static_cast<uint32_t>(pba_offset)) | bar);
}

void Msix::control_written(uint16_t control) noexcept {
  const std::lock_guard lock(mutex_);
  enabled_ = control & CONTROL_ENABLE;
  masked_ = control & CONTROL_MASK;
  deliver_pending();
}

bool Msix::enabled() const noexcept {
  const std::lock_guard lock(mutex_);
  return enabled_;
}

void Msix::signal(unsigned vector) noexcept {
  const std::lock_guard lock(mutex_);
  if (!enabled_ || vector >= entries_.size()) return;
  entries_[vector].pending = true;
  deliver(entries_[vector]);
}

void Msix::deliver(Entry& entry) noexcept {
  if (!entry.pending || !enabled_ || masked_ || (entry.control & ENTRY_MASKED)) return;
  entry.pending = false;
  target_.signal(entry.address, entry.data);
}

void Msix::deliver_pending() noexcept {
  for (Entry& entry : entries_) deliver(entry);
}

void Msix::reset() noexcept {
  const std::lock_guard lock(mutex_);
  enabled_ = masked_ = false;
  for (Entry& entry : entries_) entry = {};
}

// --- Table and pending bits

uint32_t Msix::read_word(uint64_t offset) const noexcept {
  if (offset >= pba_offset) {
    uint32_t bits = 0;
    const uint64_t first = (offset - pba_offset) * 8;
    for (unsigned i = 0; i < 32; i++)
      if (first + i < entries_.size() && entries_[first + i].pending) bits |= 1u << i;
    return bits;
  }
  if (offset / entry_size >= entries_.size()) return 0;
  const Entry& entry = entries_[offset / entry_size];
  switch (offset % entry_size) {
    case 0: return static_cast<uint32_t>(entry.address);
    case 4: return static_cast<uint32_t>(entry.address >> 32);
    case 8: return entry.data;
    default: return entry.control;
  }
}

void Msix::write_word(uint64_t offset, uint32_t value) noexcept {
  if (offset / entry_size >= entries_.size()) return;  // pending bits are read-only
  Entry& entry = entries_[offset / entry_size];
  switch (offset % entry_size) {
    case 0: entry.address = (entry.address & ~uint64_t{0xffff'ffff}) | (value & ~3u); break;
    case 4: entry.address = (entry.address & 0xffff'ffff) | uint64_t{value} << 32; break;
    case 8: entry.data = value; break;
    default:
      entry.control = value & ENTRY_MASKED;
      deliver(entry);
      break;
  }
}

uint64_t Msix::Window::read(uint64_t offset, unsigned size) noexcept {
  const std::lock_guard lock(msix_.mutex_);
  if (size < 4 || offset % size != 0) return 0;
  uint64_t value = msix_.read_word(offset);
  if (size == 8) value |= uint64_t{msix_.read_word(offset + 4)} << 32;
  return value;
}

void Msix::Window::write(uint64_t offset, unsigned size, uint64_t value) noexcept {
  const std::lock_guard lock(msix_.mutex_);
  if (size < 4 || offset % size != 0) return;
  msix_.write_word(offset, static_cast<uint32_t>(value));
  if (size == 8) msix_.write_word(offset + 4, static_cast<uint32_t>(value >> 32));
}

// --- Saved state

void Msix::save(nlohmann::json& json) const {
  const std::lock_guard lock(mutex_);
  MsixState state{enabled_, masked_, {}, {}};
  for (size_t i = 0; i < entries_.size(); i++) {
    for (unsigned byte = 0; byte < entry_size; byte++)
      state.table.push_back(static_cast<uint8_t>(read_word(i * entry_size + byte / 4 * 4) >> (byte % 4 * 8)));
    state.pending.push_back(entries_[i].pending);
  }
  save_state(std::move(state), json);
}

void Msix::load(const nlohmann::json& json) {
  const auto state = load_state<MsixState>(json);
  const std::lock_guard lock(mutex_);
  if (state.table.size() != entries_.size() * entry_size || state.pending.size() != entries_.size())
    usage_error("saved state of msix: a table for {} vectors, expected {}", state.pending.size(),
                entries_.size());
  enabled_ = masked_ = false;  // nothing is sent while the table is filled
  for (size_t i = 0; i < entries_.size(); i++) {
    for (unsigned word = 0; word < entry_size; word += 4) {
      uint32_t value = 0;
      for (unsigned byte = 0; byte < 4; byte++)
        value |= uint32_t{state.table[i * entry_size + word + byte]} << (byte * 8);
      write_word(i * entry_size + word, value);
    }
    entries_[i].pending = state.pending[i] & 1;
  }
  enabled_ = state.enabled;
  masked_ = state.masked;
}

}  // namespace lodge::device::pci
