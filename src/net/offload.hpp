// What hardware offloads leave undone, done in software: for back ends whose other end takes plain frames.
#pragma once

#include <functional>
#include <vector>

#include "net/packet.hpp"

namespace lodge::net {

// The Internet checksum (RFC 1071) of bytes, folded, not complemented; `sum` continues an earlier one.
uint16_t internet_sum(std::span<const uint8_t> bytes, uint32_t sum = 0) noexcept;

// Puts the checksum in that NEEDS_CSUM asks for. False when the header points outside of the frame: a
// sender's mistake, the frame is to be dropped.
bool finish_checksum(const PacketHeader& header, std::span<uint8_t> frame) noexcept;

// Cuts a TCP packet that is longer than its segments may be (gso_type TCPV4 or TCPV6) into frames with
// complete headers and checksums; others get their checksum. `emit` is called for each; a buffer of the
// caller's, `scratch`, holds it. False, possibly behind some frames, when header and frame do not fit
// together.
bool segment(const PacketHeader& header, std::span<uint8_t> frame, std::vector<uint8_t>& scratch,
             const std::function<void(std::span<const uint8_t>)>& emit);

}  // namespace lodge::net
