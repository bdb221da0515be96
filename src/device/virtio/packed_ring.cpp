// Packed virtqueues (VirtIO 1.2, section 2.8).
//
// Modelled: all of it: chains, indirect tables, both event suppression structures. Where the device completes
// chains in another order than it took them, the used descriptor stands at the next used place and as many
// places are skipped as the chain had (2.8.6): that never passes a place that is still available, because no
// more places are in flight than the ring has.
#include "device/virtio/ring.hpp"
#include "device/virtio/ring_access.hpp"

namespace lodge::device::virtio {

namespace {

// 2.8.10: struct pvirtq_event_suppress { le16 desc; le16 flags; }
constexpr size_t EVENT_DESC = 0, EVENT_FLAGS = 2, event_size = 4;
constexpr uint16_t EVENT_ENABLE = 0, EVENT_DISABLE = 1, EVENT_AT_DESC = 2;
// Offsets in a descriptor; a used one has the length at `LENGTH` (2.8.4).
constexpr size_t LENGTH = 8, ID = 12, FLAGS = 14;

}  // namespace

void PackedRing::Place::advance(unsigned count, unsigned size) noexcept {
  unsigned next = index + count;
  if (next >= size) next -= size, wrap = !wrap;
  index = static_cast<uint16_t>(next);
}

void PackedRing::Place::retreat(unsigned count, unsigned size) noexcept {
  unsigned next = index;
  if (next < count) next += size, wrap = !wrap;
  index = static_cast<uint16_t>(next - count);
}

bool PackedRing::activate(const QueueSetup& setup, uint64_t features, machine::GuestMemory& memory) noexcept {
  if (setup.size == 0 || setup.size > max_size) return false;  // any other number will do (2.8.10.1)
  if (setup.descriptors % 16 != 0 || setup.driver % 4 != 0 || setup.device % 4 != 0) return false;
  *this = {};
  memory_ = &memory;
  size_ = setup.size;
  event_index_ = features & F_EVENT_IDX;
  indirect_ = features & F_INDIRECT_DESC;
  descriptors_ = memory.view(setup.descriptors, size_t{size_} * sizeof(RawDescriptor));
  driver_event_ = memory.view(setup.driver, event_size);
  device_event_ = memory.view(setup.device, event_size);
  descriptors_gpa_ = setup.descriptors;
  device_event_gpa_ = setup.device;
  return !descriptors_.empty() && !driver_event_.empty() && !device_event_.empty();
}

// 2.8.1: available when the AVAIL bit equals the wrap counter and the USED bit does not.
bool PackedRing::is_available(uint16_t flags) const noexcept {
  return static_cast<bool>(flags & DESC_AVAIL) == next_avail_.wrap &&
         static_cast<bool>(flags & DESC_USED) != next_avail_.wrap;
}

bool PackedRing::has_available() const noexcept {
  return is_available(load16(descriptors_, size_t{next_avail_.index} * sizeof(RawDescriptor) + FLAGS));
}

Pop PackedRing::pop(Chain& chain, unsigned in_flight) noexcept {
  if (!has_available()) return Pop::empty;  // acquire: the rest of the descriptor is there
  chain.clear();
  Place place = next_avail_;
  unsigned slots = 0;
  for (bool more = true; more;) {
    if (in_flight + slots >= size_) return Pop::broken;
    const RawDescriptor raw = copy_descriptor(descriptors_.data() + size_t{place.index} * sizeof raw);
    const uint16_t id = raw.flags, flags = raw.next;  // the layouts differ (2.8.13)
    slots++;
    place.advance(1, size_);
    more = flags & DESC_NEXT;
    if (!more) chain.set_id(id);  // the last one's counts (2.8.6)
    if (flags & DESC_INDIRECT) {
      // Alone in its chain, and only where it was negotiated (2.8.7).
      if (!indirect_ || more || slots != 1) return Pop::broken;
      if (!walk_indirect(*memory_, raw.address, raw.length, true, chain)) return Pop::broken;
    } else if (!chain.add(*memory_, raw.address, raw.length, flags & DESC_WRITE)) {
      return Pop::broken;
    }
  }
  chain.set_slots(static_cast<uint16_t>(slots));
  next_avail_ = place;
  return Pop::chain;
}

void PackedRing::undo_pop(const Chain& chain) noexcept {
  next_avail_.retreat(chain.slots(), size_);
}

void PackedRing::push(const Chain& chain, uint32_t written) noexcept {
  const size_t at = size_t{next_used_.index} * sizeof(RawDescriptor);
  store32(descriptors_, at + LENGTH, written);
  store16(descriptors_, at + ID, chain.id());
  uint16_t flags = next_used_.wrap ? DESC_AVAIL | DESC_USED : 0;
  if (written != 0) flags |= DESC_WRITE;
  store16(descriptors_, at + FLAGS, flags);  // release: everything else is there before
  memory_->note_write(descriptors_gpa_ + at, sizeof(RawDescriptor));
  next_used_.advance(chain.slots(), size_);
  used_since_ += chain.slots();
}

// 2.8.10.1 Whether the driver's event lies among the places used since the last time.
bool PackedRing::interrupt_wanted() noexcept {
  full_fence();
  const uint32_t since = std::exchange(used_since_, 0);
  const uint16_t flags = load16(driver_event_, EVENT_FLAGS) & 3;
  if (flags == EVENT_DISABLE) return false;
  if (flags != EVENT_AT_DESC || !event_index_) return true;
  const uint16_t event = load16(driver_event_, EVENT_DESC);
  const bool event_wrap = event & 0x8000;
  // How far behind the next used place it is.
  int behind = static_cast<int>(next_used_.index) - static_cast<int>(event & 0x7fff);
  if (event_wrap != next_used_.wrap) behind += size_;
  return behind > 0 && static_cast<uint32_t>(behind) <= since;
}

void PackedRing::want_kicks(bool wanted) noexcept {
  if (wanted && event_index_) store16(device_event_, EVENT_DESC, next_avail_.packed());
  store16(device_event_, EVENT_FLAGS, !wanted ? EVENT_DISABLE : event_index_ ? EVENT_AT_DESC : EVENT_ENABLE);
  memory_->note_write(device_event_gpa_, event_size);
  full_fence();
}

bool PackedRing::set_position(uint32_t position) noexcept {
  const auto place = [](uint32_t packed) {
    return Place{static_cast<uint16_t>(packed & 0x7fff), static_cast<bool>(packed & 0x8000)};
  };
  const Place avail = place(position & 0xffff), used = place(position >> 16);
  if (avail.index >= size_ || used.index >= size_) return false;
  next_avail_ = avail;
  next_used_ = used;
  used_since_ = size_;  // whatever the driver waits for may have happened before
  return true;
}

}  // namespace lodge::device::virtio
