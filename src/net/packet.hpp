// What goes with an Ethernet frame between a card and its network: what the sender has left to do.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <span>

namespace lodge::net {

// VirtIO 1.2, 5.1.6: struct virtio_net_hdr without num_buffers, which is also what a tap carries before each
// frame with IFF_VNET_HDR (kernel Documentation/networking/tuntap.rst). Little-endian.
struct PacketHeader {
  static constexpr uint8_t NEEDS_CSUM = 1, DATA_VALID = 2;                          // flags
  static constexpr uint8_t GSO_NONE = 0, GSO_TCPV4 = 1, GSO_TCPV6 = 4, ECN = 0x80;  // gso_type
  uint8_t flags = 0, gso_type = GSO_NONE;
  uint16_t hdr_len = 0;      // of all headers of a packet to segment: a hint
  uint16_t gso_size = 0;     // payload of each segment
  uint16_t csum_start = 0;   // the checksum covers the frame from here to its end,
  uint16_t csum_offset = 0;  // and is put here, counted from csum_start
  bool operator==(const PacketHeader&) const = default;
};
static_assert(sizeof(PacketHeader) == 10);

// What a sender may leave to the receiver of its frames.
struct Offloads {
  bool checksum = false, tso4 = false, tso6 = false, ecn = false;
  bool segmentation() const noexcept { return tso4 || tso6; }
  bool operator==(const Offloads&) const = default;
};

// What has passed in one direction, and what was lost on the way; bytes are those of frames.
struct Traffic {
  uint64_t packets = 0, bytes = 0, dropped = 0;
  void count(size_t frame) noexcept { packets++, bytes += frame; }
  bool operator==(const Traffic&) const = default;
};

// An Ethernet header with a VLAN tag and the longest IPv4 packet: no frame is longer.
inline constexpr size_t ethernet_header = 14, vlan_tag = 4;
inline constexpr size_t max_frame = ethernet_header + vlan_tag + 65535;

// Bytes of all pieces; a copy of them, as far as there is room.
size_t total_size(std::span<const iovec> pieces) noexcept;
size_t gather(std::span<const iovec> pieces, std::span<uint8_t> out) noexcept;
size_t scatter(std::span<const uint8_t> bytes, std::span<const iovec> pieces) noexcept;
// From one to the other, as far as there is room.
size_t copy_pieces(std::span<const iovec> from, std::span<const iovec> to) noexcept;
// The part that begins at `offset` and has `count` bytes, or fewer where `pieces` or `out` end. Returns how
// many of `out` it takes, none of them empty.
size_t cut_pieces(std::span<const iovec> pieces, size_t offset, size_t count, std::span<iovec> out) noexcept;

}  // namespace lodge::net
