// Split virtqueues (VirtIO 1.2, section 2.7).
//
// Modelled: all of it: chains, indirect tables, used_event and avail_event, NO_INTERRUPT and NO_NOTIFY. A
// guest that breaks a rule of the section gets Pop::broken.
#include <bit>

#include "device/virtio/ring.hpp"
#include "device/virtio/ring_access.hpp"

namespace lodge::device::virtio {

namespace {

// 2.7.6 struct virtq_avail, 2.7.8 struct virtq_used: flags, idx, ring[], event.
constexpr size_t FLAGS = 0, INDEX = 2, RING = 4;
constexpr size_t avail_element = 2, used_element = 8;
constexpr uint16_t AVAIL_NO_INTERRUPT = 1, USED_NO_NOTIFY = 1;

}  // namespace

bool walk_indirect(machine::GuestMemory& memory, uint64_t gpa, uint32_t bytes, bool packed,
                   Chain& chain) noexcept {
  if (bytes == 0 || bytes % sizeof(RawDescriptor) != 0) return false;
  const auto table = memory.view(gpa, bytes);
  if (table.empty()) return false;
  const uint32_t count = bytes / sizeof(RawDescriptor);
  // Chain::add() refuses more than max_descriptors, so a cycle ends there.
  for (uint32_t index = 0;;) {
    RawDescriptor descriptor = copy_descriptor(table.data() + size_t{index} * sizeof descriptor);
    if (packed) descriptor.flags = descriptor.next & DESC_WRITE;  // the rest is reserved there (2.8.7)
    if (descriptor.flags & DESC_INDIRECT) return false;
    if (!chain.add(memory, descriptor.address, descriptor.length, descriptor.flags & DESC_WRITE))
      return false;
    if (!packed && !(descriptor.flags & DESC_NEXT)) return true;
    index = packed ? index + 1 : descriptor.next;
    if (index >= count) return packed;
  }
}

bool SplitRing::activate(const QueueSetup& setup, uint64_t features, machine::GuestMemory& memory) noexcept {
  if (!std::has_single_bit(setup.size) || setup.size > max_size) return false;
  if (setup.descriptors % 16 != 0 || setup.driver % 2 != 0 || setup.device % 4 != 0) return false;
  *this = {};
  memory_ = &memory;
  size_ = setup.size;
  event_index_ = features & F_EVENT_IDX;
  indirect_ = features & F_INDIRECT_DESC;
  descriptors_ = memory.view(setup.descriptors, size_t{size_} * sizeof(RawDescriptor));
  available_ = memory.view(setup.driver, RING + size_ * avail_element + 2);
  used_ = memory.view(setup.device, RING + size_ * used_element + 2);
  used_gpa_ = setup.device;
  return !descriptors_.empty() && !available_.empty() && !used_.empty();
}

uint16_t SplitRing::available_index() const noexcept {
  return load16(available_, INDEX);
}

bool SplitRing::has_available() const noexcept {
  return available_index() != next_avail_;
}

Pop SplitRing::pop(Chain& chain, unsigned in_flight) noexcept {
  const auto waiting = static_cast<uint16_t>(available_index() - next_avail_);
  if (waiting == 0) return Pop::empty;
  // A driver never offers more than the ring has places for, of which some are still with the device.
  if (waiting > size_ || in_flight >= size_) return Pop::broken;
  chain.clear();
  const uint16_t head = load16(available_, RING + (next_avail_ % size_) * avail_element);
  chain.set_id(head);
  chain.set_slots(1);
  uint16_t index = head;
  // Linked within the table: no more steps than it has descriptors (2.7.5.2: no loops).
  for (unsigned step = 0;; step++) {
    if (index >= size_ || step >= size_) return Pop::broken;
    const RawDescriptor descriptor = copy_descriptor(descriptors_.data() + size_t{index} * sizeof descriptor);
    if (descriptor.flags & DESC_INDIRECT) {
      // The last of its chain, and only where it was negotiated (2.7.5.3.1).
      if (!indirect_ || descriptor.flags & DESC_NEXT) return Pop::broken;
      if (!walk_indirect(*memory_, descriptor.address, descriptor.length, false, chain)) return Pop::broken;
      break;
    }
    if (!chain.add(*memory_, descriptor.address, descriptor.length, descriptor.flags & DESC_WRITE))
      return Pop::broken;
    if (!(descriptor.flags & DESC_NEXT)) break;
    index = descriptor.next;
  }
  next_avail_++;
  return Pop::chain;
}

void SplitRing::undo_pop(const Chain&) noexcept {
  next_avail_--;
}

void SplitRing::push(const Chain& chain, uint32_t written) noexcept {
  const size_t at = RING + (next_used_ % size_) * used_element;
  store32(used_, at, chain.id());
  store32(used_, at + 4, written);
  next_used_++;
  store16(used_, INDEX, next_used_);  // release: the element is there before the index counts it
  memory_->note_write(used_gpa_ + at, used_element);
  memory_->note_write(used_gpa_, RING);
}

// 2.7.7.2: the index is published before the driver's wish is read, or both sides may miss each other.
bool SplitRing::interrupt_wanted() noexcept {
  full_fence();
  if (!event_index_) return !(load16(available_, FLAGS) & AVAIL_NO_INTERRUPT);
  const uint16_t event = load16(available_, RING + size_ * avail_element);
  const uint16_t before = std::exchange(signalled_, next_used_);
  if (!std::exchange(signalled_valid_, true)) return true;
  return static_cast<uint16_t>(next_used_ - event - 1) < static_cast<uint16_t>(next_used_ - before);
}

void SplitRing::want_kicks(bool wanted) noexcept {
  if (event_index_) {
    // Not wanted: leave the event where it is, behind the driver, which then says nothing.
    if (wanted) {
      const size_t at = RING + size_ * used_element;
      store16(used_, at, next_avail_);
      memory_->note_write(used_gpa_ + at, 2);
    }
  } else {
    store16(used_, FLAGS, wanted ? 0 : USED_NO_NOTIFY);
    memory_->note_write(used_gpa_, 2);
  }
  full_fence();
}

bool SplitRing::set_position(uint32_t position) noexcept {
  next_avail_ = static_cast<uint16_t>(position);
  next_used_ = static_cast<uint16_t>(position >> 16);
  signalled_valid_ = false;
  return true;
}

}  // namespace lodge::device::virtio
