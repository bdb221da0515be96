// One request of a driver: a descriptor chain, copied and checked. What the chain points to stays in guest
// memory and may change at any time: a device copies a header before it looks at it.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "machine/memory.hpp"

namespace lodge::device::virtio {

// A contiguous piece of guest RAM.
struct Segment {
  uint64_t gpa;
  std::span<uint8_t> bytes;
};

// Filled by a Queue. Belongs to one thread at a time. Reusing an object saves its allocations.
class Chain {
 public:
  // More than any driver builds (Linux: 256 at most), also in indirect tables, whose length the guest
  // chooses.
  static constexpr unsigned max_descriptors = 1024;

  // What the device may read comes first, then what it may write (2.7.4.2); none of them is empty.
  std::span<const Segment> readable() const noexcept { return std::span(segments_).first(readable_count_); }
  std::span<const Segment> writable() const noexcept { return std::span(segments_).subspan(readable_count_); }
  uint64_t readable_size() const noexcept { return readable_size_; }
  uint64_t writable_size() const noexcept { return writable_size_; }

  // Copies out of the readable part from byte `offset` on; returns how many bytes there were.
  size_t read(uint64_t offset, std::span<uint8_t> out) const noexcept;
  // Copies into the writable part from byte `offset` on; returns how many bytes found room.
  size_t write(uint64_t offset, std::span<const uint8_t> data) const noexcept;

  // The pieces of [offset, offset + size) of one part, appended to `out`; less when the part is shorter.
  void cut_readable(uint64_t offset, uint64_t size, std::vector<Segment>& out) const;
  void cut_writable(uint64_t offset, uint64_t size, std::vector<Segment>& out) const;

  // The driver's name for the buffer: what the used ring gives back.
  uint16_t id() const noexcept { return id_; }

  // --- For rings.
  void clear() noexcept;
  // Adds a descriptor's buffer. False when it breaks a rule: outside RAM, readable behind writable, more than
  // 4 GiB in all (2.7.5.2), more than max_descriptors.
  bool add(machine::GuestMemory& memory, uint64_t gpa, uint32_t size, bool writable);
  void set_id(uint16_t id) noexcept { id_ = id; }
  // How many places of a packed ring the chain fills.
  void set_slots(uint16_t slots) noexcept { slots_ = slots; }
  uint16_t slots() const noexcept { return slots_; }
  // Numbers the chains of a queue in the order in which they were taken.
  void set_ticket(uint64_t ticket) noexcept { ticket_ = ticket; }
  uint64_t ticket() const noexcept { return ticket_; }

 private:
  std::vector<Segment> segments_;
  size_t readable_count_ = 0;
  unsigned descriptors_ = 0;
  uint64_t readable_size_ = 0, writable_size_ = 0;
  uint16_t id_ = 0, slots_ = 0;
  uint64_t ticket_ = 0;
};

}  // namespace lodge::device::virtio
