// Fields of packets, in network byte order, and the few numbers that name protocols.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace lodge::net {

inline constexpr uint16_t ETHERTYPE_IPV4 = 0x0800, ETHERTYPE_IPV6 = 0x86dd, ETHERTYPE_VLAN = 0x8100;
inline constexpr uint8_t PROTOCOL_TCP = 6;
// RFC 9293, 3.1; RFC 3168, 6.1
inline constexpr uint8_t TCP_FIN = 1, TCP_SYN = 2, TCP_RST = 4, TCP_PSH = 8, TCP_ACK = 16, TCP_CWR = 0x80;

inline uint16_t get16(std::span<const uint8_t> bytes, size_t at) noexcept {
  return static_cast<uint16_t>(bytes[at] << 8 | bytes[at + 1]);
}
inline uint32_t get32(std::span<const uint8_t> bytes, size_t at) noexcept {
  return uint32_t{get16(bytes, at)} << 16 | get16(bytes, at + 2);
}
inline void put16(std::span<uint8_t> bytes, size_t at, size_t value) noexcept {
  bytes[at] = static_cast<uint8_t>(value >> 8);
  bytes[at + 1] = static_cast<uint8_t>(value);
}
inline void put32(std::span<uint8_t> bytes, size_t at, uint32_t value) noexcept {
  put16(bytes, at, value >> 16);
  put16(bytes, at + 2, value & 0xffff);
}

}  // namespace lodge::net
