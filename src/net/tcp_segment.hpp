// TCP segments in Ethernet frames, over IPv4 and IPv6.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>

#include "net/packet.hpp"

namespace lodge::net {

// Both ends of a connection of the guest's. IPv4 addresses are the first four bytes.
struct TcpEnds {
  std::array<uint8_t, 16> guest{}, peer{};
  uint16_t guest_port = 0, peer_port = 0;
  bool ip6 = false;
  bool operator==(const TcpEnds&) const = default;
};

struct TcpEndsHash {
  size_t operator()(const TcpEnds& ends) const noexcept;
};

// What comes from the guest.
struct TcpSegment {
  TcpEnds ends;
  std::array<uint8_t, 6> guest_mac{}, peer_mac{};
  uint32_t sequence = 0, acknowledged = 0;
  uint8_t flags = 0;
  uint16_t window = 0;             // as it stands there: not scaled
  uint16_t mss = 0;                // 0: the option is not there
  int window_scale = -1;           // -1: the option is not there
  size_t header = 0, payload = 0;  // bytes in the frame: all headers, and what is behind them
};

// No frame has longer headers: Ethernet, IPv6 without extensions or IPv4 with all options, TCP with all.
inline constexpr size_t max_tcp_headers = ethernet_header + 60 + 60;

// From the beginning of a frame (all of it or max_tcp_headers) of `frame_size` bytes. False: it is no whole
// TCP segment, or one with what this does not know: VLAN tags, IPv6 extension headers.
bool parse_tcp(std::span<const uint8_t> beginning, size_t frame_size, TcpSegment& segment) noexcept;

// What goes to the guest.
struct TcpReply {
  uint32_t sequence = 0, acknowledged = 0;
  uint8_t flags = 0;
  uint16_t window = 0;
  uint16_t mss = 0;       // with TCP_SYN
  int window_scale = -1;  // with TCP_SYN; -1: leave the option out
};

// Writes all headers of a segment from ends.peer to ends.guest with `payload` bytes behind them. Returns
// their size. The checksum field holds the sum of the pseudo header, as PacketHeader::NEEDS_CSUM wants it.
size_t write_tcp(const TcpEnds& ends, const std::array<uint8_t, 6>& guest_mac,
                 const std::array<uint8_t, 6>& peer_mac, const TcpReply& reply, size_t payload,
                 std::span<uint8_t, max_tcp_headers> out) noexcept;
// Where TCP begins in what write_tcp() has written.
inline size_t tcp_offset(const TcpEnds& ends) noexcept {
  return ethernet_header + (ends.ip6 ? 40 : 20);
}

}  // namespace lodge::net
