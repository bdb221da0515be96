// How rings touch guest memory that the guest changes at the same time.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <span>

#include "device/virtio/chain.hpp"
#include "device/virtio/constants.hpp"

namespace lodge::device::virtio {

// Aligned fields of rings; the alignment is checked when a ring is activated.
inline uint16_t load16(std::span<uint8_t> area, size_t offset) noexcept {
  return std::atomic_ref(*reinterpret_cast<uint16_t*>(area.data() + offset)).load(std::memory_order_acquire);
}
inline void store16(std::span<uint8_t> area, size_t offset, uint16_t value) noexcept {
  std::atomic_ref(*reinterpret_cast<uint16_t*>(area.data() + offset)).store(value, std::memory_order_release);
}
inline void store32(std::span<uint8_t> area, size_t offset, uint32_t value) noexcept {
  std::atomic_ref(*reinterpret_cast<uint32_t*>(area.data() + offset)).store(value, std::memory_order_release);
}

// What was stored before is seen by others before anything behind it is loaded. The instruction itself,
// because ThreadSanitizer does not know std::atomic_thread_fence.
inline void full_fence() noexcept {
  asm volatile("mfence" : : : "memory");
}

// A descriptor, copied. The last two fields are the split layout's; packed rings have the buffer's id in
// `flags`' place and the flags in `next`'s.
struct RawDescriptor {
  uint64_t address;
  uint32_t length;
  uint16_t flags;
  uint16_t next;
};
static_assert(sizeof(RawDescriptor) == 16);

// Exactly one copy: the barrier keeps the compiler from reading guest memory again where the copy is used.
inline RawDescriptor copy_descriptor(const uint8_t* from) noexcept {
  RawDescriptor copy;
  std::memcpy(&copy, from, sizeof copy);
  std::atomic_signal_fence(std::memory_order_seq_cst);
  asm volatile("" : "+m"(copy));
  return copy;
}

// The walk over an indirect table (2.7.5.3, 2.8.7), the same for both rings save for the order: split tables
// are linked by `next`, packed ones are read from front to back.
bool walk_indirect(machine::GuestMemory& memory, uint64_t gpa, uint32_t bytes, bool packed,
                   Chain& chain) noexcept;

}  // namespace lodge::device::virtio
