// RFC 9293 (TCP), RFC 791 (IPv4), RFC 8200 (IPv6), RFC 7323, section 2 (window scale).
#include "net/tcp_segment.hpp"

#include <algorithm>
#include <cstring>
#include <string_view>

#include "net/offload.hpp"
#include "net/wire.hpp"

namespace lodge::net {

namespace {

constexpr uint8_t OPTION_END = 0, OPTION_NONE = 1, OPTION_MSS = 2, OPTION_SCALE = 3;
constexpr size_t tcp_header = 20, ip4_header = 20, ip6_header = 40;
constexpr uint8_t hop_limit = 64;

// Where TCP begins and the packet ends; 0: it is none.
struct Place {
  size_t tcp = 0, end = 0;
};

Place place_in_ip4(std::span<const uint8_t> bytes, size_t frame_size, TcpEnds& ends) noexcept {
  constexpr size_t ip = ethernet_header;
  if (bytes.size() < ip + ip4_header || bytes[ip] >> 4 != 4 || bytes[ip + 9] != PROTOCOL_TCP) return {};
  if (get16(bytes, ip + 6) & 0x3fff) return {};  // a fragment
  const size_t header = (bytes[ip] & 15) * size_t{4}, total = get16(bytes, ip + 2);
  if (header < ip4_header || total < header + tcp_header || ip + total > frame_size) return {};
  std::copy_n(bytes.begin() + ip + 12, 4, ends.guest.begin());
  std::copy_n(bytes.begin() + ip + 16, 4, ends.peer.begin());
  return {ip + header, ip + total};
}

Place place_in_ip6(std::span<const uint8_t> bytes, size_t frame_size, TcpEnds& ends) noexcept {
  constexpr size_t ip = ethernet_header;
  if (bytes.size() < ip + ip6_header || bytes[ip] >> 4 != 6 || bytes[ip + 6] != PROTOCOL_TCP) return {};
  const size_t total = ip6_header + get16(bytes, ip + 4);
  if (total < ip6_header + tcp_header || ip + total > frame_size) return {};
  std::copy_n(bytes.begin() + ip + 8, 16, ends.guest.begin());
  std::copy_n(bytes.begin() + ip + 24, 16, ends.peer.begin());
  ends.ip6 = true;
  return {ip + ip6_header, ip + total};
}

// Only those that come with TCP_SYN count.
void parse_options(std::span<const uint8_t> options, TcpSegment& segment) noexcept {
  for (size_t at = 0; at < options.size() && options[at] != OPTION_END;) {
    if (options[at] == OPTION_NONE) {
      at++;
      continue;
    }
    if (at + 2 > options.size()) return;
    const size_t length = options[at + 1];
    if (length < 2 || at + length > options.size()) return;
    if (options[at] == OPTION_MSS && length == 4) segment.mss = get16(options, at + 2);
    // RFC 7323, 2.3: more than 14 is taken as 14.
    if (options[at] == OPTION_SCALE && length == 3) segment.window_scale = std::min<int>(options[at + 2], 14);
    at += length;
  }
}

size_t write_ip4(const TcpEnds& ends, size_t tcp_size, std::span<uint8_t> out) noexcept {
  const auto ip = out.first(ip4_header);
  std::ranges::fill(ip, uint8_t{0});
  ip[0] = 0x45;
  put16(ip, 2, ip4_header + tcp_size);
  put16(ip, 6, 0x4000);  // not to be fragmented
  ip[8] = hop_limit;
  ip[9] = PROTOCOL_TCP;
  std::copy_n(ends.peer.begin(), 4, ip.begin() + 12);
  std::copy_n(ends.guest.begin(), 4, ip.begin() + 16);
  put16(ip, 10, static_cast<uint16_t>(~internet_sum(ip)));
  return ip4_header;
}

size_t write_ip6(const TcpEnds& ends, size_t tcp_size, std::span<uint8_t> out) noexcept {
  const auto ip = out.first(ip6_header);
  std::ranges::fill(ip, uint8_t{0});
  ip[0] = 0x60;
  put16(ip, 4, tcp_size);
  ip[6] = PROTOCOL_TCP;
  ip[7] = hop_limit;
  std::copy_n(ends.peer.begin(), 16, ip.begin() + 8);
  std::copy_n(ends.guest.begin(), 16, ip.begin() + 24);
  return ip6_header;
}

}  // namespace

size_t TcpEndsHash::operator()(const TcpEnds& ends) const noexcept {
  std::array<char, 36> bytes;
  std::memcpy(bytes.data(), ends.guest.data(), 16);
  std::memcpy(bytes.data() + 16, ends.peer.data(), 16);
  std::memcpy(bytes.data() + 32, &ends.guest_port, 2);
  std::memcpy(bytes.data() + 34, &ends.peer_port, 2);
  return std::hash<std::string_view>()({bytes.data(), bytes.size()});
}

bool parse_tcp(std::span<const uint8_t> beginning, size_t frame_size, TcpSegment& segment) noexcept {
  segment = {};
  if (beginning.size() < ethernet_header) return false;
  const uint16_t type = get16(beginning, 12);
  Place place;
  if (type == ETHERTYPE_IPV4) place = place_in_ip4(beginning, frame_size, segment.ends);
  if (type == ETHERTYPE_IPV6) place = place_in_ip6(beginning, frame_size, segment.ends);
  if (place.tcp == 0 || beginning.size() < place.tcp + tcp_header) return false;
  const auto tcp = beginning.subspan(place.tcp);
  const size_t header = (tcp[12] >> 4) * size_t{4};
  if (header < tcp_header || header > tcp.size() || place.tcp + header > place.end) return false;
  std::copy_n(beginning.begin(), 6, segment.peer_mac.begin());
  std::copy_n(beginning.begin() + 6, 6, segment.guest_mac.begin());
  segment.ends.guest_port = get16(tcp, 0);
  segment.ends.peer_port = get16(tcp, 2);
  segment.sequence = get32(tcp, 4);
  segment.acknowledged = get32(tcp, 8);
  segment.flags = tcp[13];
  segment.window = get16(tcp, 14);
  if (segment.flags & TCP_SYN) parse_options(tcp.subspan(tcp_header, header - tcp_header), segment);
  segment.header = place.tcp + header;
  segment.payload = place.end - segment.header;
  return true;
}

size_t write_tcp(const TcpEnds& ends, const std::array<uint8_t, 6>& guest_mac,
                 const std::array<uint8_t, 6>& peer_mac, const TcpReply& reply, size_t payload,
                 std::span<uint8_t, max_tcp_headers> out) noexcept {
  std::array<uint8_t, 8> options{};
  size_t option_size = 0;
  if (reply.flags & TCP_SYN) {
    options[0] = OPTION_MSS, options[1] = 4;
    put16(options, 2, reply.mss);
    option_size = 4;
    if (reply.window_scale >= 0) {
      options[4] = OPTION_NONE, options[5] = OPTION_SCALE, options[6] = 3;
      options[7] = static_cast<uint8_t>(reply.window_scale);
      option_size = 8;
    }
  }
  std::ranges::copy(guest_mac, out.begin());
  std::ranges::copy(peer_mac, out.begin() + 6);
  put16(out, 12, ends.ip6 ? ETHERTYPE_IPV6 : ETHERTYPE_IPV4);
  const size_t tcp_size = tcp_header + option_size + payload;
  const auto ip = out.subspan(ethernet_header);
  const size_t ip_size = ends.ip6 ? write_ip6(ends, tcp_size, ip) : write_ip4(ends, tcp_size, ip);
  const auto tcp = ip.subspan(ip_size, tcp_header + option_size);
  put16(tcp, 0, ends.peer_port);
  put16(tcp, 2, ends.guest_port);
  put32(tcp, 4, reply.sequence);
  put32(tcp, 8, reply.acknowledged);
  tcp[12] = static_cast<uint8_t>((tcp_header + option_size) / 4 << 4);
  tcp[13] = reply.flags;
  put16(tcp, 14, reply.window);
  std::copy_n(options.begin(), option_size, tcp.begin() + tcp_header);
  const size_t length = ends.ip6 ? 16 : 4;
  const uint32_t sum =
      internet_sum(std::span(ends.guest).first(length),
                   static_cast<uint32_t>(PROTOCOL_TCP + (tcp_size >> 16) + (tcp_size & 0xffff)));
  put16(tcp, 16, internet_sum(std::span(ends.peer).first(length), sum));
  put16(tcp, 18, 0);
  return ethernet_header + ip_size + tcp_header + option_size;
}

}  // namespace lodge::net
