// The two layouts of a virtqueue, and the one walk over their descriptors. Both rings offer the same calls,
// in the order of use: pop() a chain, push() it back, ask interrupt_wanted(). Queue puts them together.
//
// The guest is hostile and runs meanwhile. So every descriptor is copied before it is looked at; a walk takes
// at most Chain::max_descriptors steps; the ring's addresses were checked and turned into host memory once,
// by activate(), and nothing that the driver writes to a register later reaches them.
#pragma once

#include <cstdint>
#include <span>

#include "device/virtio/chain.hpp"
#include "machine/memory.hpp"

namespace lodge::device::virtio {

// What a driver has written to the registers of a queue: sizes in entries, guest-physical addresses.
struct QueueSetup {
  uint16_t size = 0;
  uint64_t descriptors = 0;  // split: descriptor table; packed: descriptor ring
  uint64_t driver = 0;       // split: available ring;   packed: driver event suppression
  uint64_t device = 0;       // split: used ring;        packed: device event suppression
  bool operator==(const QueueSetup&) const = default;
};

enum class Pop {
  chain,   // there is a request
  empty,   // nothing available
  broken,  // the driver has broken the rules: the device needs a reset
};

// 2.7 Split virtqueues
class SplitRing {
 public:
  static constexpr uint32_t max_size = 32768;

  // False when the size is no power of two or too large, or an area is misaligned or not wholly RAM.
  bool activate(const QueueSetup& setup, uint64_t features, machine::GuestMemory& memory) noexcept;

  Pop pop(Chain& chain, unsigned in_flight) noexcept;
  void undo_pop(const Chain& chain) noexcept;
  void push(const Chain& chain, uint32_t written) noexcept;
  bool interrupt_wanted() noexcept;
  void want_kicks(bool wanted) noexcept;
  bool has_available() const noexcept;

  uint16_t size() const noexcept { return size_; }

  // next available index | next used index << 16
  uint32_t position() const noexcept { return next_avail_ | uint32_t{next_used_} << 16; }
  bool set_position(uint32_t position) noexcept;

 private:
  uint16_t available_index() const noexcept;

  machine::GuestMemory* memory_ = nullptr;
  uint16_t size_ = 0;
  bool event_index_ = false, indirect_ = false;
  std::span<uint8_t> descriptors_, available_, used_;
  uint64_t used_gpa_ = 0;
  uint16_t next_avail_ = 0, next_used_ = 0;
  uint16_t signalled_ = 0;  // next_used_ when the driver was last asked about an interrupt
  bool signalled_valid_ = false;
};

// 2.8 Packed virtqueues
class PackedRing {
 public:
  static constexpr uint32_t max_size = 32768;

  bool activate(const QueueSetup& setup, uint64_t features, machine::GuestMemory& memory) noexcept;

  Pop pop(Chain& chain, unsigned in_flight) noexcept;
  void undo_pop(const Chain& chain) noexcept;
  void push(const Chain& chain, uint32_t written) noexcept;
  bool interrupt_wanted() noexcept;
  void want_kicks(bool wanted) noexcept;
  bool has_available() const noexcept;

  uint16_t size() const noexcept { return size_; }

  // next available place, its wrap counter in bit 15 | the same of the next used place << 16
  uint32_t position() const noexcept { return next_avail_.packed() | uint32_t{next_used_.packed()} << 16; }
  bool set_position(uint32_t position) noexcept;

 private:
  struct Place {
    uint16_t index = 0;
    bool wrap = true;
    uint16_t packed() const noexcept { return static_cast<uint16_t>(index | (wrap ? 0x8000 : 0)); }
    void advance(unsigned count, unsigned size) noexcept;
    void retreat(unsigned count, unsigned size) noexcept;
  };
  bool is_available(uint16_t flags) const noexcept;

  machine::GuestMemory* memory_ = nullptr;
  uint16_t size_ = 0;
  bool event_index_ = false, indirect_ = false;
  std::span<uint8_t> descriptors_, driver_event_, device_event_;
  uint64_t descriptors_gpa_ = 0, device_event_gpa_ = 0;
  Place next_avail_, next_used_;
  uint32_t used_since_ = 0;  // places used since the driver was last asked about an interrupt
};

}  // namespace lodge::device::virtio
