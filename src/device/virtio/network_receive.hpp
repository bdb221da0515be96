// The receiving half of one queue pair of a network card: packets of a net::Source straight into the buffers
// that the driver has made available.
#pragma once

#include <deque>
#include <functional>
#include <vector>

#include "device/virtio/queue.hpp"
#include "net/backend.hpp"

namespace lodge::device::virtio {

// Not synchronised: its card guards it. Buffers stay taken from call to call, so that a packet of unknown
// size finds room, and what is left over need not be put back each time.
class PacketReceiver {
 public:
  struct Format {
    size_t header;  // bytes of the header that the driver knows: 10 or 12
    bool merge;     // a packet may fill several buffers
  };
  // Whether the driver wants a frame, of which up to 18 bytes are there.
  using Wanted = std::function<bool(std::span<const uint8_t> beginning)>;

  enum class Outcome { nothing, some, full, broken };
  // Takes one packet. nothing: the source has none. full: there is no room; the queue's driver has not been
  // asked for kicks. broken: the driver breaks a rule.
  Outcome receive(Queue& queue, const Format& format, net::Source& source, const Wanted& wanted) noexcept;
  // All that is taken goes back to the queue, whose other chains are all pushed; a packet that waits is lost.
  void give_back(Queue& queue) noexcept;
  // Packets that the driver has got, and those that no buffer held.
  const net::Traffic& traffic() const noexcept { return traffic_; }

 private:
  Outcome top_up(Queue& queue, const Format& format, size_t needed) noexcept;
  size_t room(const Format& format) const noexcept;
  void describe_room(const Format& format, size_t needed);
  void deliver(Queue& queue, const Format& format, const net::PacketHeader& header, size_t size) noexcept;
  Outcome deliver_waiting(Queue& queue, const Format& format) noexcept;
  void drop_front(Queue& queue, uint32_t written) noexcept;

  std::deque<Chain> taken_;  // oldest first
  size_t total_ = 0;         // bytes that they hold
  std::vector<Chain> spare_;
  std::vector<iovec> pieces_;
  std::vector<Segment> cut_;
  // A packet for which what was taken may have been too little.
  net::PacketHeader waiting_header_;
  std::vector<uint8_t> waiting_;
  size_t waiting_size_ = 0;  // 0: none
  net::Traffic traffic_;
};

}  // namespace lodge::device::virtio
