// Checksums (RFC 1071) and TCP segmentation. The frames are a hostile guest's: every offset is checked before
// it is used.
#include "net/offload.hpp"

#include <algorithm>
#include <cstring>

#include "net/wire.hpp"

namespace lodge::net {

namespace {

// Where the parts of a TCP packet are.
struct Layout {
  bool ip6 = false;
  size_t ip = 0, tcp = 0, payload = 0;
};

// False when the frame is not what its header says, or longer headers are claimed than there are.
bool parse(const PacketHeader& header, std::span<const uint8_t> frame, Layout& at) noexcept {
  at.ip = ethernet_header;
  if (frame.size() < at.ip + vlan_tag + 20) return false;
  uint16_t type = get16(frame, 12);
  if (type == ETHERTYPE_VLAN) {
    type = get16(frame, 16);
    at.ip += vlan_tag;
  }
  at.ip6 = (header.gso_type & ~PacketHeader::ECN) == PacketHeader::GSO_TCPV6;
  if (type != (at.ip6 ? ETHERTYPE_IPV6 : ETHERTYPE_IPV4)) return false;
  const size_t ip_size = at.ip6 ? 40 : (frame[at.ip] & 15) * size_t{4};
  if (ip_size < 20 || frame.size() < at.ip + ip_size + 20) return false;
  if (!at.ip6 && frame[at.ip + 9] != PROTOCOL_TCP) return false;
  // IPv6 may have extension headers; the driver says where TCP begins.
  at.tcp = at.ip6 ? header.csum_start : at.ip + ip_size;
  if (at.tcp < at.ip + ip_size || frame.size() < at.tcp + 20) return false;
  at.payload = at.tcp + (frame[at.tcp + 12] >> 4) * size_t{4};
  return at.payload >= at.tcp + 20 && at.payload <= frame.size();
}

// The checksum of TCP over `frame`, with the pseudo header (RFC 9293, 3.1; RFC 8200, 8.1).
uint16_t tcp_checksum(const Layout& at, std::span<const uint8_t> frame) noexcept {
  const size_t addresses = at.ip + (at.ip6 ? 8 : 12), length = frame.size() - at.tcp;
  uint32_t sum = internet_sum(frame.subspan(addresses, at.ip6 ? 32 : 8));
  sum += static_cast<uint32_t>(PROTOCOL_TCP + (length >> 16) + (length & 0xffff));
  return static_cast<uint16_t>(~internet_sum(frame.subspan(at.tcp), sum));
}

}  // namespace

// Sums in 64 bits and the host's byte order, which the one's complement sum allows (RFC 1071, 2B), and folds
// at the end.
uint16_t internet_sum(std::span<const uint8_t> bytes, uint32_t sum) noexcept {
  uint64_t wide = 0;
  size_t done = 0;
  for (; done + 8 <= bytes.size(); done += 8) {
    uint64_t word;
    std::memcpy(&word, bytes.data() + done, 8);
    wide += word & 0xffff'ffff;
    wide += word >> 32;
  }
  for (; done + 2 <= bytes.size(); done += 2) {
    uint16_t word;
    std::memcpy(&word, bytes.data() + done, 2);
    wide += word;
  }
  if (done < bytes.size()) wide += bytes[done];
  while (wide >> 16) wide = (wide & 0xffff) + (wide >> 16);
  uint64_t total = uint64_t{__builtin_bswap16(static_cast<uint16_t>(wide))} + sum;
  while (total >> 16) total = (total & 0xffff) + (total >> 16);
  return static_cast<uint16_t>(total);
}

bool finish_checksum(const PacketHeader& header, std::span<uint8_t> frame) noexcept {
  if (!(header.flags & PacketHeader::NEEDS_CSUM)) return true;
  const size_t at = size_t{header.csum_start} + header.csum_offset;
  if (header.csum_start >= frame.size() || at + 2 > frame.size()) return false;
  // The field holds the sum of the pseudo header.
  const auto sum = static_cast<uint16_t>(~internet_sum(frame.subspan(header.csum_start)));
  // 0 says "none" in UDP; for the others both zeroes are the same.
  put16(frame, at, sum == 0 ? 0xffff : sum);
  return true;
}

bool segment(const PacketHeader& header, std::span<uint8_t> frame, std::vector<uint8_t>& scratch,
             const std::function<void(std::span<const uint8_t>)>& emit) {
  if (header.gso_type == PacketHeader::GSO_NONE) {
    if (!finish_checksum(header, frame)) return false;
    emit(frame);
    return true;
  }
  Layout at;
  if (!parse(header, frame, at) || header.gso_size == 0) return false;
  const size_t all = frame.size() - at.payload;
  const uint32_t sequence = get32(frame, at.tcp + 4);
  const uint16_t identification = at.ip6 ? 0 : get16(frame, at.ip + 4);
  const uint8_t flags = frame[at.tcp + 13];
  size_t done = 0;
  for (unsigned number = 0; number == 0 || done < all; number++) {
    const size_t count = std::min<size_t>(header.gso_size, all - done);
    scratch.assign(frame.begin(), frame.begin() + static_cast<ptrdiff_t>(at.payload));
    const auto from = frame.begin() + static_cast<ptrdiff_t>(at.payload + done);
    scratch.insert(scratch.end(), from, from + static_cast<ptrdiff_t>(count));
    put32(scratch, at.tcp + 4, sequence + static_cast<uint32_t>(done));
    done += count;
    // The end of the stream is the last one's, the answer to congestion the first one's (RFC 3168, 6.1.2).
    scratch[at.tcp + 13] =
        static_cast<uint8_t>(flags & ~((done < all ? TCP_FIN | TCP_PSH : 0) | (number != 0 ? TCP_CWR : 0)));
    if (at.ip6) {
      put16(scratch, at.ip + 4, scratch.size() - at.ip - 40);
    } else {
      put16(scratch, at.ip + 2, scratch.size() - at.ip);
      put16(scratch, at.ip + 4, (identification + number) & 0xffff);
      put16(scratch, at.ip + 10, 0);
      const auto ip = std::span<const uint8_t>(scratch).subspan(at.ip, at.tcp - at.ip);
      put16(scratch, at.ip + 10, static_cast<uint16_t>(~internet_sum(ip)));
    }
    put16(scratch, at.tcp + 16, 0);
    put16(scratch, at.tcp + 16, tcp_checksum(at, scratch));
    emit(scratch);
  }
  return true;
}

}  // namespace lodge::net
