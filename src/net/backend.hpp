// What a network card is plugged into: user-mode NAT, a tap, another VM. Ethernet frames, without checksum at
// the end.
#pragma once

#include <cstdint>
#include <span>

namespace lodge::net {

// Longer than any frame that a back end carries.
inline constexpr size_t max_frame = 65536;

// The card's end.
class Card {
 public:
  virtual ~Card() = default;
  // A frame for the guest, on the back end's thread. False: no room now; the back end keeps or drops it, and
  // the card calls Backend::receive_ready() later.
  virtual bool receive(std::span<const uint8_t> frame) noexcept = 0;
};

// The network's end. Any thread. A card calls with its own lock held, so a back end holds none of its locks
// that these calls take while it calls the card.
class Backend {
 public:
  virtual ~Backend() = default;
  // Frames go to `card` until disconnect(), after whose return it is not called any more.
  virtual void connect(Card& card) noexcept = 0;
  virtual void disconnect() noexcept = 0;
  // A frame of the guest, copied. Never blocks: what is too much is dropped, as networks do.
  virtual void send(std::span<const uint8_t> frame) noexcept = 0;
  // The card, which has refused a frame before, has room again.
  virtual void receive_ready() noexcept {}
};

}  // namespace lodge::net
