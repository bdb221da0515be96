// A virtqueue as a device uses it: requests come out, and go back with what was written.
#pragma once

#include <cstdint>
#include <deque>
#include <variant>

#include "device/virtio/chain.hpp"
#include "device/virtio/ring.hpp"

namespace lodge::device::virtio {

// Not synchronised: its device guards it.
class Queue {
 public:
  // Takes over what the driver has set up; from here on it cannot be changed. False, and the queue inactive,
  // when the set-up is impossible.
  bool activate(const QueueSetup& setup, uint64_t features, machine::GuestMemory& memory) noexcept;
  // Forgets the ring; chains that are still out must not be pushed any more.
  void deactivate() noexcept;
  bool active() const noexcept { return !std::holds_alternative<std::monostate>(ring_); }

  // The next request. After Pop::broken the queue gives nothing until it is activated again.
  Pop pop(Chain& chain) noexcept;
  // As if the last pop() had not been: only directly after it.
  void undo_pop(const Chain& chain) noexcept;
  // Gives a request back; the first `written` bytes of its writable part are the answer. Each popped chain
  // once, in any order. Nothing to do on an inactive queue.
  void push(const Chain& chain, uint32_t written) noexcept;
  // Whether the driver wants to be interrupted for what was given back since the last call.
  bool interrupt_wanted() noexcept;

  // Tells the driver whether to kick. After want_kicks(true), look again with has_available(): what came
  // before is not announced.
  void want_kicks(bool wanted) noexcept;
  bool has_available() const noexcept;

  // Chains that are out.
  unsigned in_flight() const noexcept { return chains_out_; }
  // Whether they fill the ring, so that the driver cannot add to them.
  bool full() const noexcept;

  // For saved state, while nothing is out; false when the position is impossible.
  uint32_t position() const noexcept;
  bool set_position(uint32_t position) noexcept;

 private:
  struct Completion {
    Chain chain;
    uint32_t written;
    bool done;
  };
  void note_written(const Chain& chain, uint32_t written) noexcept;
  void push_in_order(const Chain& chain, uint32_t written) noexcept;

  std::variant<std::monostate, SplitRing, PackedRing> ring_;
  machine::GuestMemory* memory_ = nullptr;
  bool broken_ = false, in_order_ = false;
  bool pushed_ = false;  // since the driver was last asked about an interrupt
  unsigned chains_out_ = 0, slots_out_ = 0;
  uint64_t next_ticket_ = 0;
  std::deque<Completion> order_;  // with F_IN_ORDER: what is out, oldest first
};

}  // namespace lodge::device::virtio
