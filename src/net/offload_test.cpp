#include "net/offload.hpp"

#include <gtest/gtest.h>

#include <random>

namespace lodge::net {
namespace {

// A TCP packet of `payload` bytes, its checksum left to the network, as Linux gives it with segmentation.
std::vector<uint8_t> packet(bool ip6, size_t payload, uint8_t flags = 0x18) {
  const size_t ip = 14, ip_size = ip6 ? 40 : 20, tcp = ip + ip_size;
  std::vector<uint8_t> frame(tcp + 20 + payload);
  frame[12] = ip6 ? 0x86 : 0x08, frame[13] = ip6 ? 0xdd : 0x00;
  const size_t length = ip6 ? 20 + payload : 40 + payload;
  frame[ip] = ip6 ? 0x60 : 0x45;
  const size_t length_at = ip6 ? ip + 4 : ip + 2;
  frame[length_at] = static_cast<uint8_t>(length >> 8), frame[length_at + 1] = static_cast<uint8_t>(length);
  if (!ip6) frame[ip + 4] = 0x12, frame[ip + 5] = 0xff;  // identification
  if (ip6) frame[ip + 6] = 6;
  if (!ip6) frame[ip + 9] = 6;
  for (size_t i = 0; i < (ip6 ? 32 : 8); i++)
    frame[ip + (ip6 ? 8 : 12) + i] = static_cast<uint8_t>(i * 3 + 1);
  frame[tcp + 4] = 0xff, frame[tcp + 5] = 0xff, frame[tcp + 6] = 0xff, frame[tcp + 7] = 0xf0;  // sequence
  frame[tcp + 12] = 0x50, frame[tcp + 13] = flags;
  for (size_t i = 0; i < payload; i++) frame[tcp + 20 + i] = static_cast<uint8_t>(i * 7 + (i >> 8));
  return frame;
}

// By the letter of RFC 1071.
uint16_t slow_sum(std::span<const uint8_t> bytes) {
  uint32_t sum = 0;
  for (size_t i = 0; i < bytes.size(); i++) sum += i % 2 ? bytes[i] : uint32_t{bytes[i]} << 8;
  while (sum >> 16) sum = (sum & 0xffff) + (sum >> 16);
  return static_cast<uint16_t>(sum);
}

bool tcp_checksum_is_right(bool ip6, const std::vector<uint8_t>& frame) {
  const size_t ip = 14, tcp = ip + (ip6 ? 40 : 20), length = frame.size() - tcp;
  std::vector<uint8_t> covered(frame.begin() + static_cast<ptrdiff_t>(ip + (ip6 ? 8 : 12)),
                               frame.begin() + static_cast<ptrdiff_t>(tcp));
  for (const uint8_t byte :
       {uint8_t{0}, uint8_t{6}, static_cast<uint8_t>(length >> 8), static_cast<uint8_t>(length)})
    covered.push_back(byte);
  covered.insert(covered.end(), frame.begin() + static_cast<ptrdiff_t>(tcp), frame.end());
  return slow_sum(covered) == 0xffff;
}

TEST(Checksum, IsTheSameAsByTheLetter) {
  std::mt19937 random(1);
  for (size_t size = 0; size < 100; size++) {
    std::vector<uint8_t> bytes(size);
    for (auto& byte : bytes) byte = static_cast<uint8_t>(random());
    EXPECT_EQ(internet_sum(bytes), slow_sum(bytes)) << size;
  }
}

TEST(Checksum, IsPutWhereTheHeaderSays) {
  for (const bool ip6 : {false, true}) {
    auto frame = packet(ip6, 101);
    const auto tcp = static_cast<uint16_t>(ip6 ? 54 : 34);
    // The driver leaves the pseudo header's sum in the field.
    std::vector<uint8_t> pseudo(frame.begin() + (ip6 ? 22 : 26), frame.begin() + tcp);
    pseudo.insert(pseudo.end(), {0, 6, 0, 121});
    const uint16_t sum = slow_sum(pseudo);
    frame[tcp + 16u] = static_cast<uint8_t>(sum >> 8), frame[tcp + 17u] = static_cast<uint8_t>(sum);
    EXPECT_TRUE(finish_checksum({PacketHeader::NEEDS_CSUM, 0, 0, 0, tcp, 16}, frame));
    EXPECT_TRUE(tcp_checksum_is_right(ip6, frame));
  }
}

TEST(Checksum, OutsideOfTheFrameIsRefused) {
  std::vector<uint8_t> frame(60);
  for (const auto& [start, offset] : {std::pair{60, 0}, {59, 0}, {10, 49}, {65535, 65535}, {0, 65535}})
    EXPECT_FALSE(finish_checksum(
        {PacketHeader::NEEDS_CSUM, 0, 0, 0, static_cast<uint16_t>(start), static_cast<uint16_t>(offset)},
        frame))
        << start;
  EXPECT_TRUE(finish_checksum({0, 0, 0, 0, 100, 100}, frame));
}

TEST(Segmentation, MakesWholePacketsOfTheStream) {
  for (const bool ip6 : {false, true}) {
    auto frame = packet(ip6, 5000, 0x19 | 0x80);
    const size_t tcp = ip6 ? 54 : 34, ip = 14;
    std::vector<std::vector<uint8_t>> segments;
    std::vector<uint8_t> scratch;
    const PacketHeader header{PacketHeader::NEEDS_CSUM,
                              ip6 ? PacketHeader::GSO_TCPV6 : PacketHeader::GSO_TCPV4,
                              0,
                              1448,
                              static_cast<uint16_t>(tcp),
                              16};
    ASSERT_TRUE(
        segment(header, frame, scratch, [&](auto one) { segments.emplace_back(one.begin(), one.end()); }));
    ASSERT_EQ(segments.size(), 4u);
    std::vector<uint8_t> stream;
    uint32_t sequence = 0xfffffff0;
    for (size_t i = 0; i < segments.size(); i++) {
      const auto& one = segments[i];
      EXPECT_TRUE(tcp_checksum_is_right(ip6, one)) << i;
      const size_t length_at = ip6 ? ip + 4 : ip + 2;
      EXPECT_EQ(one[length_at] << 8 | one[length_at + 1], static_cast<int>(one.size() - (ip6 ? 54 : 14)));
      if (!ip6) {
        EXPECT_EQ(slow_sum(std::span(one).subspan(ip, 20)), 0xffff);
        EXPECT_EQ(one[ip + 4] << 8 | one[ip + 5], static_cast<int>(0x12ff + i));
      }
      EXPECT_EQ(uint32_t{one[tcp + 4]} << 24 | one[tcp + 5] << 16 | one[tcp + 6] << 8 | one[tcp + 7],
                sequence);
      EXPECT_EQ(one[tcp + 13], i == 0 ? 0x90 : i == 3 ? 0x19 : 0x10);
      sequence += static_cast<uint32_t>(one.size() - tcp - 20);
      stream.insert(stream.end(), one.begin() + static_cast<ptrdiff_t>(tcp + 20), one.end());
    }
    EXPECT_EQ(stream, std::vector<uint8_t>(frame.begin() + static_cast<ptrdiff_t>(tcp + 20), frame.end()));
  }
}

TEST(Segmentation, NothingThatAGuestClaimsHurts) {
  std::mt19937 random(7);
  std::vector<uint8_t> scratch;
  for (unsigned i = 0; i < 20000; i++) {
    auto frame = packet(random() % 2, random() % 300);
    frame.resize(std::max<size_t>(14, random() % (frame.size() + 1)));
    for (unsigned change = random() % 4; change > 0; change--)
      frame[random() % frame.size()] = static_cast<uint8_t>(random());
    const PacketHeader header{static_cast<uint8_t>(random() % 2),
                              static_cast<uint8_t>(random() % 2 ? 1 : 4),
                              static_cast<uint16_t>(random()),
                              static_cast<uint16_t>(random() % 64),
                              static_cast<uint16_t>(random() % 2 ? 54 : random()),
                              static_cast<uint16_t>(random())};
    size_t bytes = 0;
    segment(header, frame, scratch, [&](auto one) { bytes += one.size(); });
    EXPECT_LE(bytes, 300u * 500);
  }
}

}  // namespace
}  // namespace lodge::net
