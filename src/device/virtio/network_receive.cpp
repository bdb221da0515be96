// VirtIO 1.2, 5.1.6.3 and 5.1.6.4.
#include "device/virtio/network_receive.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

namespace lodge::device::virtio {

namespace {

constexpr size_t long_header = 12, num_buffers_at = 10;
constexpr size_t max_pieces = 1024;  // IOV_MAX
constexpr size_t beginning_size = net::ethernet_header + net::vlan_tag;

}  // namespace

// Where the next packet's frame may go; without merging that is one buffer.
size_t PacketReceiver::room(const Format& format) const noexcept {
  if (taken_.empty()) return 0;
  return (format.merge ? total_ : taken_.front().writable_size()) - format.header;
}

// Takes buffers until a frame of `needed` bytes has room, or there are no more.
PacketReceiver::Outcome PacketReceiver::top_up(Queue& queue, const Format& format, size_t needed) noexcept {
  while (room(format) < needed) {
    if (!format.merge && !taken_.empty()) break;  // more buffers are no help
    Chain chain;
    if (!spare_.empty()) {
      chain = std::move(spare_.back());
      spare_.pop_back();
    }
    const Pop result = queue.pop(chain);
    if (result != Pop::chain) {
      spare_.push_back(std::move(chain));
      if (result == Pop::broken) return Outcome::broken;
      break;
    }
    total_ += chain.writable_size();
    taken_.push_back(std::move(chain));
    // 5.1.6.3.1: a buffer holds more than the header, with merging each one.
    if (taken_.back().writable_size() <= format.header) return Outcome::broken;
  }
  return Outcome::some;
}

void PacketReceiver::drop_front(Queue& queue, uint32_t written) noexcept {
  total_ -= taken_.front().writable_size();
  queue.push(taken_.front(), written);
  spare_.push_back(std::move(taken_.front()));
  taken_.pop_front();
}

// `pieces_` becomes the guest's memory behind the header, at most `needed` bytes.
void PacketReceiver::describe_room(const Format& format, size_t needed) {
  pieces_.clear();
  size_t skip = format.header;
  for (const Chain& chain : taken_) {
    cut_.clear();
    chain.cut_writable(skip, needed, cut_);
    for (const Segment& piece : cut_) {
      if (pieces_.size() == max_pieces) return;
      pieces_.push_back({piece.bytes.data(), piece.bytes.size()});
      needed -= piece.bytes.size();
    }
    skip = 0;
    if (needed == 0 || !format.merge) return;
  }
}

// The frame is in the buffers; the header, and how many there are, complete it.
void PacketReceiver::deliver(Queue& queue, const Format& format, const net::PacketHeader& header,
                             size_t size) noexcept {
  traffic_.count(size);
  size_t left = format.header + size, buffers = 0;
  for (size_t covered = 0; covered < left; buffers++) covered += taken_[buffers].writable_size();
  std::array<uint8_t, long_header> bytes{};
  std::memcpy(bytes.data(), &header, sizeof header);
  bytes[num_buffers_at] = static_cast<uint8_t>(buffers);
  bytes[num_buffers_at + 1] = static_cast<uint8_t>(buffers >> 8);
  taken_.front().write(0, std::span(bytes).first(format.header));
  for (; buffers > 0; buffers--) {
    const size_t count = std::min<size_t>(left, taken_.front().writable_size());
    left -= count;
    drop_front(queue, static_cast<uint32_t>(count));
  }
}

PacketReceiver::Outcome PacketReceiver::deliver_waiting(Queue& queue, const Format& format) noexcept {
  const Outcome outcome = top_up(queue, format, waiting_size_);
  if (outcome != Outcome::some) return outcome;
  if (taken_.empty()) return Outcome::full;
  describe_room(format, waiting_size_);
  if (net::total_size(pieces_) < waiting_size_) {
    // With merging more buffers may come, unless the driver has none left to give.
    if (format.merge && pieces_.size() < max_pieces && !queue.full()) return Outcome::full;
    drop_front(queue, 0);
    traffic_.dropped++;
  } else {
    net::scatter(std::span(waiting_).first(waiting_size_), pieces_);
    deliver(queue, format, waiting_header_, waiting_size_);
  }
  waiting_size_ = 0;
  return Outcome::some;
}

PacketReceiver::Outcome PacketReceiver::receive(Queue& queue, const Format& format, net::Source& source,
                                                const Wanted& wanted) noexcept {
  if (waiting_size_ != 0) return deliver_waiting(queue, format);
  const size_t needed = source.largest();
  if (needed == 0) return Outcome::nothing;
  const Outcome outcome = top_up(queue, format, needed);
  if (outcome != Outcome::some) return outcome;
  if (taken_.empty()) return Outcome::full;
  describe_room(format, needed);
  net::PacketHeader header;
  std::array<uint8_t, beginning_size> beginning{};
  if (net::total_size(pieces_) >= needed) {
    const size_t size = source.read(header, pieces_);
    if (size == 0) return Outcome::nothing;
    net::gather(pieces_, beginning);
    if (wanted(std::span(beginning).first(std::min(size, beginning.size()))))
      deliver(queue, format, header, size);
    return Outcome::some;
  }
  // It may fit all the same: the source knows no more than the largest size.
  if (waiting_.size() < needed) waiting_.resize(needed);
  const iovec all{waiting_.data(), waiting_.size()};
  const size_t size = source.read(waiting_header_, {&all, 1});
  if (size == 0) return Outcome::nothing;
  if (!wanted(std::span(waiting_).first(std::min(size, beginning_size)))) return Outcome::some;
  waiting_size_ = size;
  return deliver_waiting(queue, format);
}

void PacketReceiver::give_back(Queue& queue) noexcept {
  for (; !taken_.empty(); taken_.pop_back()) queue.undo_pop(taken_.back());
  total_ = 0;
  if (std::exchange(waiting_size_, 0) != 0) traffic_.dropped++;
}

}  // namespace lodge::device::virtio
