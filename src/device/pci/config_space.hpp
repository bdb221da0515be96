// The configuration space of one PCI function: bytes, and which of their bits a guest may change.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace lodge::device::pci {

// Offsets of the type 0 header (PCI Local Bus Specification 3.0, section 6.1).
inline constexpr uint16_t VENDOR_ID = 0x00, DEVICE_ID = 0x02, COMMAND = 0x04, STATUS = 0x06,
                          REVISION_ID = 0x08, CLASS_CODE = 0x09, CACHE_LINE_SIZE = 0x0c, LATENCY_TIMER = 0x0d,
                          HEADER_TYPE = 0x0e, BAR0 = 0x10, SUBSYSTEM_VENDOR_ID = 0x2c, SUBSYSTEM_ID = 0x2e,
                          CAPABILITIES = 0x34, INTERRUPT_LINE = 0x3c, INTERRUPT_PIN = 0x3d,
                          FIRST_CAPABILITY = 0x40;
inline constexpr uint16_t COMMAND_IO = 0x1, COMMAND_MEMORY = 0x2, COMMAND_BUS_MASTER = 0x4,
                          COMMAND_INTX_DISABLE = 0x400;
inline constexpr uint16_t STATUS_INTX = 0x8, STATUS_CAPABILITIES = 0x10;

// Not synchronised: its function guards it. Set-up calls expect offsets inside the space.
class ConfigSpace {
 public:
  // 256 bytes for a conventional function, 4096 for an Express one. All zero and read-only at first.
  explicit ConfigSpace(unsigned size) : bytes_(size), writable_(size), ones_clear_(size) {}

  unsigned size() const noexcept { return static_cast<unsigned>(bytes_.size()); }

  // Set-up, and changes that the device itself makes: no masks apply.
  uint32_t get(unsigned offset, unsigned size) const noexcept;
  void set(unsigned offset, unsigned size, uint32_t value) noexcept;
  // Bits that the guest may write, and bits that it clears by writing ones.
  void allow(unsigned offset, unsigned size, uint32_t mask) noexcept;
  void clear_by_ones(unsigned offset, unsigned size, uint32_t mask) noexcept;

  // Reserves `size` bytes (with the two header bytes) for capability `id` and puts it at the head of the
  // list. Returns its offset. Throws std::logic_error when the 192 bytes are used up: a mistake of the
  // device, not of a user.
  unsigned add_capability(uint8_t id, unsigned size);

  // The guest's access, any size from 1 to 4; beyond the space it reads ones and writes nothing.
  uint32_t read(unsigned offset, unsigned size) const noexcept;
  void write(unsigned offset, unsigned size, uint32_t value) noexcept;

  std::span<const uint8_t> bytes() const noexcept { return bytes_; }
  // Takes from saved bytes what the guest could have written; identity and capabilities stay as built. False,
  // and nothing changed, when the size differs.
  bool restore(std::span<const uint8_t> saved) noexcept;

 private:
  std::vector<uint8_t> bytes_, writable_, ones_clear_;
  unsigned next_capability_ = FIRST_CAPABILITY;
};

}  // namespace lodge::device::pci
