// I/O APIC 82093AA (Intel data sheet 290566-001), version 0x11: no EOI register; the LAPICs' EOI messages
// reach it.
//
// Modelled: the redirection table with its read-only bits, edge and level inputs with remote IRR, level
// requests held while masked (edges of a masked input are lost, data sheet 3.2.4), every delivery mode that
// LAPICs accept.
//
// As in KVM: polarity is stored and has no effect (devices speak of asserted and deasserted), a switch to
// edge triggering clears remote IRR (operating systems rely on it as an EOI), the window does not move.
// Missing: ExtINT through a pin (the 8259 is wired to LINT0), the APIC bus arbitration ID beyond its
// register.
#include "kvm/soft/irqchip/ioapic.hpp"

#include <cstring>

namespace lodge::kvm::soft {
namespace {

constexpr uint32_t offset_select = 0x00;
constexpr uint32_t offset_window = 0x10;

constexpr uint8_t reg_id = 0x00;
constexpr uint8_t reg_version = 0x01;
constexpr uint8_t reg_arbitration = 0x02;
constexpr uint8_t reg_table = 0x10;

constexpr uint64_t entry_logical = 1u << 11;
constexpr uint64_t entry_status = 1u << 12;
constexpr uint64_t entry_remote_irr = 1u << 14;
constexpr uint64_t entry_level = 1u << 15;
constexpr uint64_t entry_masked = 1u << 16;
constexpr uint64_t entry_defined = 0xff0000000001ffff;

uint32_t pin_bit(unsigned pin) noexcept {
  return 1u << pin;
}

}  // namespace

Ioapic::Ioapic(Client& client) : client_(client) {
  reset();
}

void Ioapic::reset() noexcept {
  const std::lock_guard lock(mutex_);
  select_ = 0;
  id_ = 0;
  irr_ = 0;
  entries_.fill(entry_masked);
  sources_.fill(0);
  publish_vectors();
}

void Ioapic::publish_vectors() noexcept {
  std::array<uint64_t, 4> vectors{};
  for (const uint64_t entry : entries_) vectors[(entry & 0xff) / 64] |= uint64_t{1} << (entry % 64);
  for (unsigned i = 0; i < 4; ++i) vectors_[i].store(vectors[i], std::memory_order_relaxed);
}

// Sends the interrupt of `pin` if its entry lets it.
int Ioapic::service(unsigned pin) noexcept {
  uint64_t& entry = entries_[pin];
  const bool level = (entry & entry_level) != 0;
  if ((entry & entry_masked) != 0 || (level && (entry & entry_remote_irr) != 0)) return -1;
  ApicMessage message;
  message.vector = static_cast<uint8_t>(entry);
  message.mode = static_cast<DeliveryMode>((entry >> 8) & 7);
  message.logical = (entry & entry_logical) != 0;
  message.level = level;
  message.destination = static_cast<uint32_t>(entry >> 56);
  const int result = client_.deliver(message);
  // Remote IRR waits for an EOI, which comes only if a LAPIC has taken the vector.
  if (level && result > 0) entry |= entry_remote_irr;
  return result;
}

int Ioapic::set_irq(unsigned pin, unsigned source, bool level) noexcept {
  if (pin >= pins) return -1;
  const std::lock_guard lock(mutex_);
  const uint32_t source_bit = 1u << (source & 31);
  if (level)
    sources_[pin] |= source_bit;
  else
    sources_[pin] &= ~source_bit;
  if (sources_[pin] == 0) {
    irr_ &= ~pin_bit(pin);
    return 1;
  }
  const bool was_high = (irr_ & pin_bit(pin)) != 0;
  irr_ |= pin_bit(pin);
  if (was_high && (entries_[pin] & entry_level) == 0) return 0;
  return service(pin);
}

void Ioapic::end_of_interrupt(uint8_t vector, bool broadcast) noexcept {
  if (!handles_vector(vector)) return;
  uint32_t acked = 0;
  {
    const std::lock_guard lock(mutex_);
    for (unsigned pin = 0; pin < pins; ++pin) {
      if (static_cast<uint8_t>(entries_[pin]) != vector) continue;
      acked |= pin_bit(pin);
      if (!broadcast || (entries_[pin] & entry_level) == 0) continue;
      entries_[pin] &= ~entry_remote_irr;
    }
  }
  // Listeners lower their lines first, so that a level that is about to fall does not interrupt once more.
  for (unsigned pin = 0; pin < pins; ++pin)
    if ((acked & pin_bit(pin)) != 0) client_.ioapic_acked(pin);
  if (!broadcast) return;
  const std::lock_guard lock(mutex_);
  for (unsigned pin = 0; pin < pins; ++pin)
    if ((acked & irr_ & pin_bit(pin)) != 0 && (entries_[pin] & entry_level) != 0) service(pin);
}

uint32_t Ioapic::read_indirect() const noexcept {
  switch (select_) {
    case reg_id:
    case reg_arbitration: return static_cast<uint32_t>(id_ & 0xf) << 24;
    case reg_version: return 0x11 | (pins - 1) << 16;
    default: break;
  }
  const unsigned index = select_ - reg_table;  // wraps to a large number below the table
  if (index >= pins * 2) return 0xffffffff;
  const uint64_t entry = entries_[index / 2];
  return static_cast<uint32_t>((index & 1) != 0 ? entry >> 32 : entry);
}

void Ioapic::write_indirect(uint32_t value) noexcept {
  if (select_ == reg_id) {
    id_ = (value >> 24) & 0xf;
    return;
  }
  const unsigned index = select_ - reg_table;
  if (index >= pins * 2) return;
  const unsigned pin = index / 2;
  uint64_t& entry = entries_[pin];
  constexpr uint64_t read_only = entry_remote_irr | entry_status;
  if ((index & 1) != 0) {
    entry = (entry & 0xffffffff) | (static_cast<uint64_t>(value & 0xff000000) << 32);
  } else {
    entry = (entry & (0xffffffff00000000 | read_only)) | (value & entry_defined & ~read_only);
    publish_vectors();
  }
  if ((entry & entry_level) == 0)
    entry &= ~entry_remote_irr;
  else if ((irr_ & pin_bit(pin)) != 0)
    service(pin);
}

void Ioapic::read(uint32_t offset, void* data, unsigned size) noexcept {
  uint32_t value = 0;
  {
    const std::lock_guard lock(mutex_);
    if ((offset & 0xf0) == offset_select)
      value = select_;
    else if ((offset & 0xf0) == offset_window)
      value = read_indirect();
  }
  auto* bytes = static_cast<uint8_t*>(data);
  for (unsigned i = 0; i < size; ++i) {
    const unsigned byte = (offset & 15) + i;
    bytes[i] = byte < 4 ? static_cast<uint8_t>(value >> (byte * 8)) : 0;
  }
}

void Ioapic::write(uint32_t offset, const void* data, unsigned size) noexcept {
  if ((offset & 15) != 0 || size == 0) return;
  uint32_t value = 0;
  std::memcpy(&value, data, size < sizeof value ? size : sizeof value);
  const std::lock_guard lock(mutex_);
  if ((offset & 0xf0) == offset_select)
    select_ = static_cast<uint8_t>(value);
  else if ((offset & 0xf0) == offset_window)
    write_indirect(value);
}

kvm_ioapic_state Ioapic::state() noexcept {
  const std::lock_guard lock(mutex_);
  kvm_ioapic_state state{};
  state.base_address = default_base;
  state.ioregsel = select_;
  state.id = id_;
  for (unsigned pin = 0; pin < pins; ++pin) {
    state.redirtbl[pin].bits = entries_[pin];
    // What KVM saves: levels that are high. An edge has been delivered or was lost, and must not come again.
    if ((entries_[pin] & entry_level) != 0) state.irr |= irr_ & pin_bit(pin);
  }
  return state;
}

void Ioapic::set_state(const kvm_ioapic_state& state) noexcept {
  const std::lock_guard lock(mutex_);
  select_ = static_cast<uint8_t>(state.ioregsel);
  id_ = state.id & 0xf;
  for (unsigned pin = 0; pin < pins; ++pin) entries_[pin] = state.redirtbl[pin].bits & entry_defined;
  publish_vectors();
  irr_ = 0;
  // Lines that were high are driven by the VMM's devices, which raise them with source 0 (KVM_IRQ_LINE).
  for (unsigned pin = 0; pin < pins; ++pin) {
    const bool high = (state.irr & pin_bit(pin)) != 0;
    sources_[pin] = (sources_[pin] & ~1u) | (high ? 1u : 0u);
    if (sources_[pin] == 0) continue;
    irr_ |= pin_bit(pin);
    if (high) service(pin);
  }
}

}  // namespace lodge::kvm::soft
