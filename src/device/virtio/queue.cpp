// What split and packed rings have in common, and F_IN_ORDER (VirtIO 1.2, sections 2.7.9 and 2.8.8):
// completions wait until all older ones have been given back. Using a buffer each, instead of one for a
// batch, is always allowed.
#include "device/virtio/queue.hpp"

#include <algorithm>
#include <utility>

#include "device/virtio/constants.hpp"

namespace lodge::device::virtio {

namespace {

template <class... Calls>
struct Either : Calls... {
  using Calls::operator()...;
};
template <class... Calls>
Either(Calls...) -> Either<Calls...>;  // clang 14 asks for it

}  // namespace

bool Queue::activate(const QueueSetup& setup, uint64_t features, machine::GuestMemory& memory) noexcept {
  deactivate();
  memory_ = &memory;
  in_order_ = features & F_IN_ORDER;
  const auto start = [&](auto ring) {
    if (!ring.activate(setup, features, memory)) return false;
    ring_ = ring;
    return true;
  };
  return features & F_RING_PACKED ? start(PackedRing{}) : start(SplitRing{});
}

void Queue::deactivate() noexcept {
  ring_ = std::monostate{};
  broken_ = in_order_ = pushed_ = false;
  chains_out_ = slots_out_ = 0;
  order_.clear();
}

Pop Queue::pop(Chain& chain) noexcept {
  if (broken_) return Pop::broken;
  const Pop result = std::visit(Either{[](std::monostate&) { return Pop::empty; },
                                       [&](SplitRing& ring) { return ring.pop(chain, chains_out_); },
                                       [&](PackedRing& ring) { return ring.pop(chain, slots_out_); }},
                                ring_);
  broken_ = result == Pop::broken;
  if (result != Pop::chain) return result;
  chain.set_ticket(next_ticket_++);
  chains_out_++;
  slots_out_ += chain.slots();
  if (in_order_) order_.push_back({{}, 0, false});
  return result;
}

void Queue::undo_pop(const Chain& chain) noexcept {
  std::visit(Either{[](std::monostate&) {}, [&](auto& ring) { ring.undo_pop(chain); }}, ring_);
  next_ticket_--;
  chains_out_--;
  slots_out_ -= chain.slots();
  if (in_order_) order_.pop_back();
}

// Only what the answer fills: the rest of the writable part is as the driver left it.
void Queue::note_written(const Chain& chain, uint32_t written) noexcept {
  uint64_t left = written;
  for (const Segment& segment : chain.writable()) {
    if (left == 0) break;
    const uint64_t length = std::min<uint64_t>(left, segment.bytes.size());
    memory_->note_write(segment.gpa, length);
    left -= length;
  }
}

void Queue::push(const Chain& chain, uint32_t written) noexcept {
  if (!active() || chains_out_ == 0) return;
  note_written(chain, written);
  if (in_order_) return push_in_order(chain, written);
  chains_out_--;
  slots_out_ -= chain.slots();
  std::visit(Either{[](std::monostate&) {}, [&](auto& ring) { ring.push(chain, written), pushed_ = true; }},
             ring_);
}

void Queue::push_in_order(const Chain& chain, uint32_t written) noexcept {
  const uint64_t oldest = next_ticket_ - order_.size();
  if (chain.ticket() < oldest || chain.ticket() >= next_ticket_) return;
  order_[chain.ticket() - oldest] = {chain, written, true};
  while (!order_.empty() && order_.front().done) {
    const Completion& front = order_.front();
    chains_out_--;
    slots_out_ -= front.chain.slots();
    std::visit(Either{[](std::monostate&) {},
                      [&](auto& ring) { ring.push(front.chain, front.written), pushed_ = true; }},
               ring_);
    order_.pop_front();
  }
}

bool Queue::interrupt_wanted() noexcept {
  if (!std::exchange(pushed_, false)) return false;
  return std::visit(
      Either{[](std::monostate&) { return false; }, [](auto& ring) { return ring.interrupt_wanted(); }},
      ring_);
}

void Queue::want_kicks(bool wanted) noexcept {
  std::visit(Either{[](std::monostate&) {}, [&](auto& ring) { ring.want_kicks(wanted); }}, ring_);
}

bool Queue::has_available() const noexcept {
  if (broken_) return false;
  return std::visit(Either{[](const std::monostate&) { return false; },
                           [](const auto& ring) { return ring.has_available(); }},
                    ring_);
}

bool Queue::full() const noexcept {
  return std::visit(Either{[](const std::monostate&) { return true; },
                           [this](const SplitRing& ring) { return chains_out_ >= ring.size(); },
                           [this](const PackedRing& ring) { return slots_out_ >= ring.size(); }},
                    ring_);
}

uint32_t Queue::position() const noexcept {
  return std::visit(
      Either{[](const std::monostate&) { return 0u; }, [](const auto& ring) { return ring.position(); }},
      ring_);
}

bool Queue::set_position(uint32_t position) noexcept {
  return std::visit(
      Either{[](std::monostate&) { return false; }, [&](auto& ring) { return ring.set_position(position); }},
      ring_);
}

}  // namespace lodge::device::virtio
