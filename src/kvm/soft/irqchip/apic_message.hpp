// An interrupt on its way to local APICs: what an IPI, an IOAPIC pin and an MSI have in common (SDM vol.
// 3, 11.11).
#pragma once

#include <cstdint>

namespace lodge::kvm::soft {

enum class DeliveryMode : uint8_t {
  fixed = 0,
  lowest_priority = 1,
  smi = 2,
  reserved = 3,
  nmi = 4,
  init = 5,
  startup = 6,
  extint = 7,
};

struct ApicMessage {
  uint32_t destination = 0;
  uint8_t vector = 0;
  DeliveryMode mode = DeliveryMode::fixed;
  bool logical = false;      // logical, not physical destination
  bool level = false;        // level triggered
  bool from_x2apic = false;  // an IPI of a LAPIC in x2APIC mode: 32-bit destination, 0xff is no broadcast
  bool from_ipi = false;
};

// Decodes an MSI. `extended` (KVM_X2APIC_API_USE_32BIT_IDS): address_hi carries destination bits 31:8.
inline ApicMessage decode_msi(uint32_t address_lo, uint32_t address_hi, uint32_t data,
                              bool extended) noexcept {
  ApicMessage message;
  message.destination = (address_lo >> 12) & 0xff;
  if (extended) message.destination |= address_hi & 0xffffff00;
  message.vector = static_cast<uint8_t>(data);
  message.mode = static_cast<DeliveryMode>((data >> 8) & 7);
  message.logical = (address_lo & 4) != 0;
  message.level = (data & 0x8000) != 0;
  return message;
}

}  // namespace lodge::kvm::soft
