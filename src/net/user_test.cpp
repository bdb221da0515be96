#include "net/user.hpp"

#include <gtest/gtest.h>

#include "base/error.hpp"
#include "net/testing.hpp"

namespace lodge::net {
namespace {

using testing::Listener;
using testing::send;

// Who has 10.0.2.2?
std::vector<uint8_t> arp_request() {
  std::vector<uint8_t> frame(60);
  const uint8_t bytes[] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x52, 0x54, 0,    1,    2,  3, 8, 6,
                           0,    1,    8,    0,    6,    4,    0,    1,    0x52, 0x54, 0,  1, 2, 3,
                           10,   0,    2,    15,   0,    0,    0,    0,    0,    0,    10, 0, 2, 2};
  std::copy(std::begin(bytes), std::end(bytes), frame.begin());
  return frame;
}
bool is_arp_reply(const std::vector<uint8_t>& frame) {
  return frame.size() >= 42 && frame[12] == 8 && frame[13] == 6 && frame[21] == 2 && frame[31] == 2;
}

TEST(UserNetwork, AnswersTheGuest) {
  Listener card;
  EventLoop loop{"test"};
  const auto network = open_user_network({});
  network->connect(card, loop);
  send(*network, arp_request());
  EXPECT_TRUE(card.saw(is_arp_reply));
  network->disconnect();
}

TEST(UserNetwork, FramesWaitForRoom) {
  Listener card;
  EventLoop loop{"test"};
  card.room = false;
  const auto network = open_user_network({});
  network->connect(card, loop);
  send(*network, arp_request());
  ::usleep(50'000);
  EXPECT_TRUE(card.frames().empty());
  card.room = true;
  network->receive_ready(0);
  EXPECT_TRUE(card.saw(is_arp_reply));
  network->disconnect();
}

// A card that has taken a frame out and then finds no room for all of it, as one with merged buffers does.
class Hesitant final : public Card {
 public:
  Received receive(unsigned, Source& source) noexcept override {
    const size_t largest = source.largest();
    if (largest != 0) {
      std::vector<uint8_t> frame(largest);
      const iovec all{frame.data(), frame.size()};
      PacketHeader header;
      taken += source.read(header, {&all, 1}) != 0;
    }
    if (taken == 0) return Received::all;
    if (!room) return Received::full;
    delivered = taken.load();
    return largest == 0 ? Received::all : Received::some;
  }
  void transmit_ready(unsigned) noexcept override {}
  void set_link(bool) noexcept override {}
  std::atomic<unsigned> taken = 0, delivered = 0;
  std::atomic<bool> room = false;
};

TEST(UserNetwork, ACardThatKeepsTheLastFrameIsCalledAgain) {
  Hesitant card;
  EventLoop loop{"test"};
  const auto network = open_user_network({});
  network->connect(card, loop);
  send(*network, arp_request());
  ASSERT_TRUE(Listener::eventually([&] { return card.taken == 1; }));
  card.room = true;
  network->receive_ready(0);
  EXPECT_TRUE(Listener::eventually([&] { return card.delivered == 1; }));
  network->disconnect();
}

TEST(UserNetwork, OddFramesDoNotHurt) {
  Listener card;
  EventLoop loop{"test"};
  const auto network = open_user_network({});
  network->connect(card, loop);
  uint32_t value = 1;
  for (size_t size = 0; size < 2000; size++) {
    std::vector<uint8_t> frame(14 + size % 1600);
    if (size % 100 == 0) frame.resize(max_frame - size);
    for (auto& byte : frame) byte = static_cast<uint8_t>((value = value * 1664525 + 1013904223) >> 24);
    if (size % 2 == 0 && frame.size() > 34) frame[12] = 8, frame[13] = 0, frame[14] = 0x45;
    send(*network, frame);
  }
  send(*network, arp_request());
  // Some are refused when too many wait: ask until it has caught up.
  for (int i = 0; i < 100 && !card.saw(is_arp_reply, 100); i++) send(*network, arp_request());
  EXPECT_TRUE(card.saw(is_arp_reply));
  network->disconnect();
}

// Who has more to send than the network takes at once is told when it goes on.
TEST(UserNetwork, AsksToWaitAndToGoOn) {
  Listener card;
  EventLoop loop{"test"};
  const auto network = open_user_network({});
  network->connect(card, loop);
  bool refused = false;
  for (unsigned i = 0; i < 1'000'000 && !refused; i++) refused = !send(*network, testing::frame_of(60));
  ASSERT_TRUE(refused);
  EXPECT_TRUE(Listener::eventually([&] { return card.ready > 0; }));
  EXPECT_TRUE(send(*network, arp_request()));
  EXPECT_TRUE(card.saw(is_arp_reply));
  network->disconnect();
}

// Answers are said to have good checksums only to a guest that has agreed to believe it.
TEST(UserNetwork, ChecksumsAreKnownToBeGood) {
  for (const bool agreed : {false, true}) {
    Listener card;
    EventLoop loop{"test"};
    const auto network = open_user_network({});
    network->connect(card, loop);
    network->accept({.checksum = agreed});
    send(*network, arp_request());
    ASSERT_TRUE(card.saw(is_arp_reply));
    EXPECT_EQ(card.header_of(0), (PacketHeader{.flags = agreed ? PacketHeader::DATA_VALID : uint8_t{0}}));
    network->disconnect();
  }
}

TEST(Forwards, AreParsed) {
  EXPECT_EQ(parse_forward("--forward", "2222:22"), (Forward{false, "127.0.0.1", 2222, 22}));
  EXPECT_EQ(parse_forward("--forward", "udp:53:5353"), (Forward{true, "127.0.0.1", 53, 5353}));
  EXPECT_EQ(parse_forward("--forward", "tcp:0.0.0.0:80:8080"), (Forward{false, "0.0.0.0", 80, 8080}));
  for (const char* bad : {"", "22", "0:22", "1:70000", "a:b", "x.y:1:2", ":", "1:2x"})
    EXPECT_THROW(parse_forward("--forward", bad), UsageError) << bad;
}

TEST(Forwards, APortThatIsTakenIsRefused) {
  const auto network = open_user_network({Forward{false, "127.0.0.1", 28762, 22}});
  EXPECT_THROW(open_user_network({Forward{false, "127.0.0.1", 28762, 22}}), UsageError);
}

TEST(Forwards, OneThatCannotBeIsNamedWithItsRemedy) {
  const auto refusal = [](const char* text) -> std::string {
    try {
      open_user_network({parse_forward("--forward", text)});
      return "";
    } catch (const UsageError& error) {
      return error.what();
    }
  };
  EXPECT_EQ(
      refusal("192.0.2.1:28763:22"),
      "--forward 192.0.2.1:28763:22: cannot listen on 192.0.2.1: Cannot assign requested address; give an "
      "address of this host, or 0.0.0.0 for all");
  const auto network = open_user_network({parse_forward("--forward", "28764:22")});
  EXPECT_EQ(refusal("28764:22"),
            "--forward 28764:22: cannot listen on 127.0.0.1: Address already in use; choose another port");
}

}  // namespace
}  // namespace lodge::net
