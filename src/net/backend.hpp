// What a network card is plugged into: user-mode NAT, a tap, a stream to another VM. Ethernet frames, without
// the checksum at the end.
#pragma once

#include "base/event_loop.hpp"
#include "net/packet.hpp"

namespace lodge::net {

// Packets for the guest, as a back end has them. Called by the card, within Card::receive().
class Source {
 public:
  virtual ~Source() = default;
  // The next packet's frame is at most this long; 0: there is none for sure.
  virtual size_t largest() noexcept = 0;
  // Takes the next packet: its frame into `room`, which holds largest() bytes. Returns the frame's size, 0
  // when there is none now.
  virtual size_t read(PacketHeader& header, std::span<const iovec> room) noexcept = 0;
};

// The card's end.
class Card {
 public:
  enum class Received {
    all,   // the source has nothing more
    some,  // it may have: call again
    full,  // the guest has no room: the card calls Backend::receive_ready() later
  };
  virtual ~Card() = default;
  // Takes a number of packets from `source` for queue pair `queue`. Any thread.
  virtual Received receive(unsigned queue, Source& source) noexcept = 0;
  // The back end, which has refused a packet of this queue pair, has room again. Any thread.
  virtual void transmit_ready(unsigned queue) noexcept = 0;
  // The cable; it is in when a card is connected. Any thread.
  virtual void set_link(bool up) noexcept = 0;
};

// The network's end. Any thread. A card calls with its own lock held, so a back end holds none of its locks
// that these calls take while it calls the card.
class Backend {
 public:
  virtual ~Backend() = default;

  // --- What it can do; constant.
  virtual unsigned queues() const noexcept { return 1; }
  // What the guest may leave undone in what it sends, and what it has to cope with if it says so.
  virtual Offloads transmit_offloads() const noexcept { return {}; }
  virtual Offloads receive_offloads() const noexcept { return {}; }
  // The MTU to propose to the guest; 0: its own choice.
  virtual uint16_t mtu() const noexcept { return 0; }

  // Frames that it could not pass on so far. Any thread.
  struct Losses {
    uint64_t to_guest = 0, from_guest = 0;
  };
  virtual Losses losses() const noexcept { return {}; }
  // The machine starts: files may lose what they held. Until then a back end leaves nothing behind.
  virtual void keep() noexcept {}

  // Packets go to `card` until disconnect(), after whose return it is not called any more. `loop` serves the
  // card and outlives the connection.
  virtual void connect(Card& card, EventLoop& loop) noexcept = 0;
  virtual void disconnect() noexcept = 0;
  // What the guest copes with, a part of receive_offloads(); how many queue pairs it uses. Both go back to
  // nothing and one pair at disconnect().
  virtual void accept(const Offloads& /*offloads*/) noexcept {}
  virtual void use_queues(unsigned /*pairs*/) noexcept {}

  // A packet of the guest; `frame` is guest memory, for this call only, and may change meanwhile. At least
  // ethernet_header, at most max_frame bytes; the header has only what transmit_offloads() allows. Never
  // blocks. False: no room now; nothing was taken, and the back end calls Card::transmit_ready() later. What
  // cannot be sent at all is dropped, as networks do.
  virtual bool send(unsigned queue, const PacketHeader& header, std::span<const iovec> frame) noexcept = 0;
  // No more packets for the moment.
  virtual void flush(unsigned /*queue*/) noexcept {}
  // The card, which has refused a packet of this queue pair before, has room again.
  virtual void receive_ready(unsigned /*queue*/) noexcept {}
};

}  // namespace lodge::net
