// The driver's side of VirtIO, for tests: drives any device through its queues as a guest would, or against
// the rules.
#pragma once

#include <atomic>
#include <cstring>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "device/virtio/constants.hpp"
#include "device/virtio/device.hpp"
#include "device/virtio/ring_access.hpp"
#include "machine/layout.hpp"
#include "machine/memory.hpp"

namespace lodge::device::virtio::testing {

class FakeTransport final : public Transport {
 public:
  void queue_interrupt(unsigned queue) noexcept override { queue_interrupts[queue]++; }
  void config_interrupt() noexcept override { config_interrupts++; }
  std::map<unsigned, std::atomic<unsigned>> queue_interrupts;
  std::atomic<unsigned> config_interrupts = 0;
};

struct Buffer {
  uint64_t gpa;
  uint32_t size;
  bool writable;
};

struct Used {
  uint16_t id;
  uint32_t written;
};

// A driver's half of one queue, in either layout. What it writes is public so that a hostile test can spoil
// it.
class DriverQueue {
 public:
  DriverQueue(machine::GuestMemory& memory, uint64_t base, uint16_t size, uint64_t features)
      : memory_(memory), packed_(features & F_RING_PACKED), size_(size), base_(base) {
    setup = {size, base, base + 16u * size, base + 16u * size + 0x2000};
    std::vector<uint8_t> zero(bytes_needed(size));
    memory.write(base, zero);
    table_ = base + bytes_needed(size);  // an indirect table for each place
  }
  static uint64_t bytes_needed(uint16_t size) { return 16u * size + 0x4000 + 8u * size; }
  static uint64_t all_bytes(uint16_t size) { return bytes_needed(size) + uint64_t{size} * table_bytes; }

  // Fields of rings, which the device uses on threads of its own: in order, as a driver's barriers make it.
  void put16(uint64_t gpa, uint16_t value) {
    if (gpa % 2 != 0) {  // of no ring; an attack's
      memory_.get().write(gpa, {reinterpret_cast<uint8_t*>(&value), 2});
    } else if (const auto at = memory_.get().view(gpa, 2); !at.empty()) {
      store16(at, 0, value);
    }
  }
  uint16_t get16(uint64_t gpa) const {
    const auto at = memory_.get().view(gpa, 2);
    return at.empty() ? uint16_t{0} : load16(at, 0);
  }
  uint32_t get32(uint64_t gpa) const { return get16(gpa) | uint32_t{get16(gpa + 2)} << 16; }
  // A descriptor as the layout in use has it.
  void put_descriptor(uint64_t gpa, uint64_t address, uint32_t length, uint16_t flags, uint16_t next_or_id) {
    struct {
      uint64_t address;
      uint32_t length;
      uint16_t a, b;
    } raw{address, length, packed_ ? next_or_id : flags, packed_ ? flags : next_or_id};
    memory_.get().write(gpa, {reinterpret_cast<uint8_t*>(&raw), 14});
    put16(gpa + 14, raw.b);  // a packed ring's device may look at the flags meanwhile
  }

  // Makes a chain available; returns its id. The ring must have room.
  uint16_t submit(const std::vector<Buffer>& buffers, bool indirect = false) {
    return packed_ ? submit_packed(buffers, indirect) : submit_split(buffers, indirect);
  }
  std::optional<Used> used() { return packed_ ? used_packed() : used_split(); }

  // The driver's wish for interrupts without event index.
  void suppress_interrupts(bool suppress) {
    if (packed_)
      put16(setup.driver + 2, suppress ? 1 : 0);
    else
      put16(setup.driver, suppress ? 1 : 0);
  }
  // With event index: after `ahead` more used buffers of one place each.
  void interrupt_after(uint16_t ahead) {
    if (packed_) {
      unsigned at = used_at_ + ahead - 1;
      bool wrap = used_wrap_;
      if (at >= size_) at -= size_, wrap = !wrap;
      put16(setup.driver, static_cast<uint16_t>(at | (wrap ? 0x8000 : 0)));
      put16(setup.driver + 2, 2);
    } else {
      put16(setup.driver + 4 + 2u * size_, static_cast<uint16_t>(used_at_ + ahead - 1));
    }
  }
  uint16_t size() const { return size_; }
  bool packed() const { return packed_; }

  QueueSetup setup;

 private:
  static constexpr uint64_t table_bytes = 16 * 64;

  uint16_t submit_split(const std::vector<Buffer>& buffers, bool indirect) {
    const auto head = static_cast<uint16_t>(next_descriptor_ % size_);
    if (indirect) {
      put_table(head, buffers);
      put_descriptor(base_ + 16u * head, table_ + head * table_bytes,
                     static_cast<uint32_t>(16 * buffers.size()), DESC_INDIRECT, 0);
      next_descriptor_++;
    } else {
      for (size_t i = 0; i < buffers.size(); i++) {
        const auto at = static_cast<uint16_t>(next_descriptor_++ % size_);
        const uint16_t flags =
            (buffers[i].writable ? DESC_WRITE : 0) | (i + 1 < buffers.size() ? DESC_NEXT : 0);
        put_descriptor(base_ + 16u * at, buffers[i].gpa, buffers[i].size, flags,
                       static_cast<uint16_t>(next_descriptor_ % size_));
      }
    }
    put16(setup.driver + 4 + 2u * (avail_ % size_), head);
    put16(setup.driver + 2, ++avail_);
    return head;
  }

  uint16_t submit_packed(const std::vector<Buffer>& buffers, bool indirect) {
    uint16_t id = 0;
    while (slots_.contains(id)) id++;
    const uint16_t first = avail_;
    const size_t count = indirect ? 1 : buffers.size();
    slots_[id] = static_cast<uint16_t>(count);
    if (indirect) put_table(id, buffers);
    for (size_t i = 0; i < count; i++) {
      uint16_t flags = wrap_ ? DESC_AVAIL : DESC_USED;
      if (indirect)
        flags |= DESC_INDIRECT;
      else
        flags |= (buffers[i].writable ? DESC_WRITE : 0) | (i + 1 < count ? DESC_NEXT : 0);
      if (i == 0) flags ^= DESC_AVAIL | DESC_USED;  // not yet: the head comes last
      const uint64_t address = indirect ? table_ + id * table_bytes : buffers[i].gpa;
      const auto length = indirect ? static_cast<uint32_t>(16 * buffers.size()) : buffers[i].size;
      put_descriptor(base_ + 16u * avail_, address, length, flags, id);
      if (++avail_ == size_) avail_ = 0, wrap_ = !wrap_;
    }
    const uint64_t flags_at = base_ + 16u * first + 14;
    put16(flags_at, get16(flags_at) ^ (DESC_AVAIL | DESC_USED));
    return id;
  }

  void put_table(uint16_t place, const std::vector<Buffer>& buffers) {
    for (size_t i = 0; i < buffers.size(); i++) {
      uint16_t flags = buffers[i].writable ? DESC_WRITE : 0;
      if (!packed_ && i + 1 < buffers.size()) flags |= DESC_NEXT;
      put_descriptor(table_ + place * table_bytes + 16 * i, buffers[i].gpa, buffers[i].size, flags,
                     static_cast<uint16_t>(i + 1));
    }
  }

  std::optional<Used> used_split() {
    if (get16(setup.device + 2) == used_at_) return std::nullopt;
    const uint64_t at = setup.device + 4 + 8u * (used_at_++ % size_);
    return Used{static_cast<uint16_t>(get32(at)), get32(at + 4)};
  }

  std::optional<Used> used_packed() {
    const uint64_t at = base_ + 16u * used_at_;
    const uint16_t flags = get16(at + 14);
    if (static_cast<bool>(flags & DESC_AVAIL) != used_wrap_ ||
        static_cast<bool>(flags & DESC_USED) != used_wrap_)
      return std::nullopt;
    const Used used{get16(at + 12), get32(at + 8)};
    unsigned next = used_at_ + slots_[used.id];
    slots_.erase(used.id);
    if (next >= size_) next -= size_, used_wrap_ = !used_wrap_;
    used_at_ = static_cast<uint16_t>(next);
    return used;
  }

  std::reference_wrapper<machine::GuestMemory> memory_;
  bool packed_;
  uint16_t size_;
  uint64_t base_, table_ = 0;
  uint32_t next_descriptor_ = 0;
  uint16_t avail_ = 0, used_at_ = 0;
  bool wrap_ = true, used_wrap_ = true;
  std::map<uint16_t, uint16_t> slots_;
};

// A driver that follows the rules, until a test makes it do otherwise. The device is called directly: its
// kicks are served within the call.
class FakeDriver {
 public:
  FakeDriver(Device& driven, machine::GuestMemory& ram, uint64_t first_free = machine::layout::MiB)
      : device(driven), memory(ram), free_(first_free) {
    device.connect(transport);
  }

  uint64_t allocate(uint64_t size, uint64_t alignment = 4096) {
    free_ = (free_ + alignment - 1) & ~(alignment - 1);
    return std::exchange(free_, free_ + size);
  }
  uint64_t put(const std::vector<uint8_t>& bytes) {
    const uint64_t gpa = allocate(bytes.size(), 16);
    memory.write(gpa, bytes);
    return gpa;
  }
  template <class Struct>
  uint64_t put_struct(const Struct& value) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(&value);
    return put({bytes, bytes + sizeof value});
  }
  std::vector<uint8_t> get(uint64_t gpa, size_t size) const {
    std::vector<uint8_t> bytes(size);
    memory.read(gpa, bytes);
    return bytes;
  }

  // 3.1.1: all that is wanted of what is offered; every queue with at most `queue_size` entries. False when
  // the device refuses.
  bool start(uint64_t wanted, uint16_t queue_size = 16) {
    device.reset();
    device.set_status(ACKNOWLEDGE, false);
    device.set_status(ACKNOWLEDGE | DRIVER, false);
    features = (wanted & device.features(false)) | F_VERSION_1;
    device.set_driver_features(features);
    device.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK, false);
    if (!(device.status() & FEATURES_OK)) return false;
    queues.clear();
    for (unsigned i = 0; i < device.queues(); i++) {
      const uint16_t size = std::min(queue_size, device.queue_max_size(i));
      queues.emplace_back(memory, allocate(DriverQueue::all_bytes(size)), size, features);
      device.set_queue_setup(i, queues[i].setup);
      device.enable_queue(i);
    }
    device.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK, false);
    return device.status() & DRIVER_OK;
  }

  uint16_t submit(unsigned queue, const std::vector<Buffer>& buffers, bool indirect = false) {
    const uint16_t id = queues[queue].submit(buffers, indirect && (features & F_INDIRECT_DESC));
    device.kick(queue);
    return id;
  }
  std::optional<Used> used(unsigned queue) { return queues[queue].used(); }
  bool needs_reset() { return device.status() & DEVICE_NEEDS_RESET; }

  Device& device;
  machine::GuestMemory& memory;
  FakeTransport transport;
  uint64_t features = 0;
  std::vector<DriverQueue> queues;

 private:
  uint64_t free_;
};

// What tests of all devices are repeated for.
struct Rings {
  const char* name;
  uint64_t features;
  bool indirect;
};
inline const std::vector<Rings>& all_rings() {
  static const std::vector<Rings> all = {
      {"Split", 0, false},
      {"SplitIndirectEventIndex", F_INDIRECT_DESC | F_EVENT_IDX, true},
      {"SplitInOrder", F_IN_ORDER, false},
      {"Packed", F_RING_PACKED, false},
      {"PackedIndirectEventIndex", F_RING_PACKED | F_INDIRECT_DESC | F_EVENT_IDX, true},
      {"PackedInOrder", F_RING_PACKED | F_IN_ORDER, false},
  };
  return all;
}

// Everything that a hostile driver can do to a device, chosen by `choose(n)`, which gives a number below n:
// garbage in the rings and behind them, any order of status, resets in mid-request, kicks. Afterwards the
// device must still do what `start()` asks, which the caller checks.
template <class Choose>
void attack(Device& device, machine::GuestMemory& memory, unsigned steps, Choose choose) {
  const uint64_t ram = memory.ranges()[0].size;
  const auto address = [&]() -> uint64_t {
    switch (choose(8)) {
      case 0: return ram - choose(32);                      // the end of RAM
      case 1: return 0xffff'ffff'ffff'ffff - choose(4096);  // wraps
      case 2: return uint64_t{choose(1u << 16)} << 40;
      default: return choose(static_cast<uint32_t>(ram - 4096)) & ~15u;
    }
  };
  const auto queue = [&] { return choose(device.queues()); };
  uint8_t status = 0;
  std::vector<DriverQueue> rings;
  const auto set_up = [&](uint64_t features) {
    device.reset();
    device.set_status(ACKNOWLEDGE | DRIVER, false);
    device.set_driver_features((features & device.features(false)) | F_VERSION_1);
    device.set_status(status = ACKNOWLEDGE | DRIVER | FEATURES_OK, false);
    rings.clear();
    for (unsigned i = 0; i < device.queues(); i++) {
      rings.emplace_back(memory, 0x10000 + uint64_t{i % 8} * 0x10000,
                         uint16_t(std::min<uint16_t>(8, device.queue_max_size(i))), features);
      device.set_queue_setup(i, rings.back().setup);
      device.enable_queue(i);
    }
    device.set_status(status |= DRIVER_OK, false);
  };
  set_up(uint64_t{choose(256)} << 28 | uint64_t{choose(1u << 16)} | F_RING_RESET | F_INDIRECT_DESC);
  for (unsigned step = 0; step < steps; step++) {
    switch (choose(12)) {
      case 0: set_up(uint64_t{choose(1u << 13)} << 28 | choose(1u << 24)); break;
      case 1: device.set_status(static_cast<uint8_t>(choose(256)), choose(2)); break;
      case 2: device.reset_queue(queue()); break;
      case 3: {
        QueueSetup setup{static_cast<uint16_t>(choose(1 << 16)), address(), address(), address()};
        const unsigned at = queue();
        device.set_queue_setup(at, setup);
        if (choose(2)) device.enable_queue(at);
        break;
      }
      case 4: {  // one field of a ring
        auto& ring = rings[queue()];
        ring.put16(ring.setup.descriptors + choose(16 * 8 + 64), static_cast<uint16_t>(choose(1 << 16)));
        break;
      }
      case 5: {
        auto& ring = rings[queue()];
        ring.put16(ring.setup.driver + choose(24), static_cast<uint16_t>(choose(choose(2) ? 1 << 16 : 16)));
        break;
      }
      case 6:
      case 7: {  // a chain of odd buffers
        auto& ring = rings[queue()];
        std::vector<Buffer> buffers(1 + choose(6));
        for (auto& buffer : buffers)
          buffer = {address(), static_cast<uint32_t>(choose(8) ? choose(8192) : choose(0xffff'ffff)),
                    choose(2) == 1};
        ring.submit(buffers, choose(2));
        break;
      }
      case 8: {  // bytes in a configuration or in a header
        std::vector<uint8_t> bytes(1 + choose(64));
        for (auto& byte : bytes) byte = static_cast<uint8_t>(choose(256));
        if (choose(2))
          memory.write(address() % ram, bytes);
        else
          device.write_config(choose(64), std::span(bytes).first(std::min<size_t>(bytes.size(), 8)));
        break;
      }
      default: device.kick(queue()); break;
    }
  }
  device.reset();
}

}  // namespace lodge::device::virtio::testing
