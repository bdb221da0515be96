#include "device/virtio/network.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <deque>
#include <nlohmann/json.hpp>
#include <random>

#include "base/error.hpp"
#include "device/virtio/testing.hpp"

namespace lodge::device::virtio {
namespace {

using testing::FakeDriver;
using testing::Rings;

constexpr uint64_t F_CSUM = feature(0), F_GUEST_CSUM = feature(1), F_CTRL_GUEST_OFFLOADS = feature(2),
                   F_GUEST_TSO4 = feature(7), F_GUEST_TSO6 = feature(8), F_HOST_TSO4 = feature(11),
                   F_MRG_RXBUF = feature(15), F_CTRL_VQ = feature(17), F_CTRL_RX = feature(18),
                   F_CTRL_VLAN = feature(19), F_CTRL_RX_EXTRA = feature(20), F_GUEST_ANNOUNCE = feature(21),
                   F_MQ = feature(22), F_CTRL_MAC_ADDR = feature(23);

// A network that keeps what the guest sends, and has what a test puts into it.
class Wire final : public net::Backend, public net::Source {
 public:
  explicit Wire(unsigned queue_pairs = 2) : pairs(queue_pairs) {}
  unsigned queues() const noexcept override { return pairs; }
  net::Offloads transmit_offloads() const noexcept override { return {true, true, true, true}; }
  net::Offloads receive_offloads() const noexcept override { return {true, true, true, true}; }
  void connect(net::Card& plugged, EventLoop&) noexcept override { card = &plugged; }
  void disconnect() noexcept override { card = nullptr; }
  void accept(const net::Offloads& offloads) noexcept override { accepted = offloads; }
  void use_queues(unsigned count) noexcept override { used = count; }
  bool send(unsigned queue, const net::PacketHeader& header,
            std::span<const iovec> pieces) noexcept override {
    if (blocked) return false;
    std::vector<uint8_t> frame(net::total_size(pieces));
    net::gather(pieces, frame);
    sent.push_back(std::move(frame));
    sent_header = header;
    sent_queue = queue;
    return true;
  }
  void receive_ready(unsigned) noexcept override { ready_calls++; }
  size_t largest() noexcept override {
    return waiting.empty() ? 0 : std::max(unknown, waiting.front().size());
  }
  size_t read(net::PacketHeader& header, std::span<const iovec> room) noexcept override {
    if (waiting.empty()) return 0;
    EXPECT_GE(net::total_size(room), largest());
    header = next_header;
    const size_t size = net::scatter(waiting.front(), room);
    waiting.pop_front();
    return size;
  }
  net::Card::Received bring(std::vector<uint8_t> frame, unsigned queue = 0) {
    waiting.push_back(std::move(frame));
    return card->receive(queue, *this);
  }
  net::Card::Received again() { return card->receive(0, *this); }

  unsigned pairs, used = 1;
  net::Card* card = nullptr;
  net::Offloads accepted;
  std::vector<std::vector<uint8_t>> sent;
  net::PacketHeader sent_header, next_header;
  unsigned sent_queue = 0, ready_calls = 0;
  bool blocked = false;
  size_t unknown = 0;  // what largest() says when it is more than the packet
  std::deque<std::vector<uint8_t>> waiting;
};
using Received = net::Card::Received;

std::vector<uint8_t> frame_of(size_t size) {
  std::vector<uint8_t> frame(size);
  for (size_t i = 0; i < size; i++) frame[i] = static_cast<uint8_t>(i * 7);
  return frame;
}

class NetworkTest : public ::testing::TestWithParam<Rings> {
 protected:
  machine::GuestMemory memory{8 * machine::layout::MiB};
  std::shared_ptr<Wire> wire = std::make_shared<Wire>();
  EventLoop loop{"test"};
  Network network{memory, wire, {{0x52, 0x54, 0, 1, 2, 3}, 1400}};
  FakeDriver driver{network, memory};
  NetworkTest() { network.plug_in(loop); }
  // Asks the control queue, which is behind both pairs if the driver knows of them.
  int ask(const std::vector<uint8_t>& command) {
    const unsigned at = driver.features & F_MQ ? 4 : 2;
    const uint64_t answer = driver.put({0xee});
    driver.submit(at,
                  {{driver.put(command), static_cast<uint32_t>(command.size()), false}, {answer, 1, true}},
                  GetParam().indirect);
    EXPECT_TRUE(driver.used(at));
    return driver.get(answer, 1)[0];
  }
};

INSTANTIATE_TEST_SUITE_P(Rings, NetworkTest, ::testing::ValuesIn(testing::all_rings()),
                         [](const auto& test) { return test.param.name; });

TEST_P(NetworkTest, FramesOfTheGuestLoseTheirHeader) {
  ASSERT_TRUE(driver.start(GetParam().features));
  auto frame = frame_of(100);
  std::vector<uint8_t> packet(12);
  packet.insert(packet.end(), frame.begin(), frame.end());
  const uint64_t at = driver.put(packet);
  driver.submit(1, {{at, 12, false}, {at + 12, 60, false}, {at + 72, 40, false}}, GetParam().indirect);
  ASSERT_EQ(wire->sent.size(), 1u);
  EXPECT_EQ(wire->sent[0], frame);
  EXPECT_TRUE(driver.used(1));
  driver.submit(1, {{at, 4, false}}, GetParam().indirect);   // not even a header
  driver.submit(1, {{at, 20, false}}, GetParam().indirect);  // no frame
  driver.submit(1, {{driver.allocate(200000), 200000, false}}, GetParam().indirect);
  EXPECT_EQ(wire->sent.size(), 1u);
  EXPECT_TRUE(driver.used(1));
}

TEST_P(NetworkTest, WhatIsLeftUndoneGoesWithTheFrame) {
  std::vector<uint8_t> packet = {1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0};
  const auto frame = frame_of(5000);
  packet.insert(packet.end(), frame.begin(), frame.end());
  const auto send = [&](uint64_t features) {
    EXPECT_TRUE(driver.start(GetParam().features | features));
    const uint64_t at = driver.put(packet);
    driver.submit(1, {{at, static_cast<uint32_t>(packet.size()), false}}, GetParam().indirect);
    EXPECT_TRUE(driver.used(1));
  };
  send(0);  // has agreed to nothing
  send(F_CSUM);
  EXPECT_TRUE(wire->sent.empty());
  send(F_CSUM | F_HOST_TSO4);
  ASSERT_EQ(wire->sent.size(), 1u);
  EXPECT_EQ(wire->sent[0], frame);
  EXPECT_EQ(wire->sent_header, (net::PacketHeader{1, 1, 54, 1448, 34, 16}));
  packet[1] = 0;
  send(0);
  EXPECT_EQ(wire->sent_header.flags, 0);
  packet[1] = 3;  // UFO is not offered
  send(F_CSUM | F_HOST_TSO4 | feature(14));
  EXPECT_EQ(wire->sent.size(), 2u);
}

// A network that is busy keeps the guest waiting; nothing is lost, nothing overtakes.
TEST_P(NetworkTest, SendingWaitsForTheNetwork) {
  ASSERT_TRUE(driver.start(GetParam().features));
  wire->blocked = true;
  for (uint8_t i = 0; i < 3; i++) {
    std::vector<uint8_t> packet(12 + 60);
    packet[12] = i;
    const uint64_t at = driver.put(packet);
    driver.submit(1, {{at, 72, false}}, GetParam().indirect);
  }
  EXPECT_FALSE(driver.used(1));
  wire->blocked = false;
  wire->card->transmit_ready(0);
  ASSERT_EQ(wire->sent.size(), 3u);
  for (uint8_t i = 0; i < 3; i++) {
    EXPECT_EQ(wire->sent[i][0], i);
    EXPECT_TRUE(driver.used(1));
  }
}

TEST_P(NetworkTest, CountsWhatPasses) {
  wire->bring(frame_of(64));  // no driver yet
  ASSERT_TRUE(driver.start(GetParam().features));
  const uint64_t at = driver.put(std::vector<uint8_t>(112));
  driver.submit(1, {{at, 112, false}}, GetParam().indirect);
  driver.submit(1, {{at, 20, false}}, GetParam().indirect);  // no frame
  wire->blocked = true;
  driver.submit(1, {{at, 92, false}}, GetParam().indirect);  // counts when it goes
  wire->blocked = false;
  wire->card->transmit_ready(0);
  const uint64_t buffer = driver.allocate(4096);
  driver.submit(0, {{buffer, 2000, true}}, GetParam().indirect);
  driver.submit(0, {{buffer + 2000, 50, true}}, GetParam().indirect);
  wire->bring(frame_of(1000));
  wire->bring(frame_of(1001));  // for which the buffer is too small
  const auto counted = network.counters();
  EXPECT_EQ(counted.mac, (Mac{0x52, 0x54, 0, 1, 2, 3}));
  EXPECT_EQ(counted.from_guest, (net::Traffic{.packets = 2, .bytes = 180, .dropped = 1}));
  EXPECT_EQ(counted.to_guest, (net::Traffic{.packets = 1, .bytes = 1000, .dropped = 2}));
}

TEST_P(NetworkTest, FramesForTheGuestFillABuffer) {
  ASSERT_TRUE(driver.start(GetParam().features));
  EXPECT_EQ(wire->bring(frame_of(64)), Received::full);  // no buffer yet
  const uint64_t at = driver.allocate(2048);
  driver.submit(0, {{at, 12, true}, {at + 12, 1600, true}}, GetParam().indirect);
  EXPECT_GE(wire->ready_calls, 1u);
  wire->next_header = {2, 1, 54, 1448, 34, 16};
  EXPECT_EQ(wire->again(), Received::all);
  EXPECT_EQ(driver.used(0)->written, 76u);
  EXPECT_EQ(driver.get(at + 12, 64), frame_of(64));
  EXPECT_EQ(driver.get(at, 12), (std::vector<uint8_t>{2, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 1, 0}));
  // Too small: the frame is lost, the buffer comes back.
  driver.submit(0, {{at, 32, true}}, GetParam().indirect);
  EXPECT_EQ(wire->bring(frame_of(64)), Received::all);
  EXPECT_EQ(driver.used(0)->written, 0u);
  EXPECT_FALSE(driver.needs_reset());
}

TEST_P(NetworkTest, MergedBuffersHoldALargeFrame) {
  // Whether the network knows how large the packet is or not.
  for (const size_t unknown : {size_t{0}, net::max_frame}) {
    ASSERT_TRUE(driver.start(GetParam().features | F_MRG_RXBUF));
    wire->unknown = unknown;
    const uint64_t at = driver.allocate(4096);
    for (uint64_t i = 0; i < 2; i++) driver.submit(0, {{at + i * 512, 512, true}}, GetParam().indirect);
    EXPECT_EQ(wire->bring(frame_of(1200)), Received::full);  // waits: there is not enough
    EXPECT_EQ(wire->bring(frame_of(100)), Received::full);
    EXPECT_FALSE(driver.used(0));
    driver.submit(0, {{at + 1024, 512, true}}, GetParam().indirect);
    driver.submit(0, {{at + 1536, 512, true}}, GetParam().indirect);
    EXPECT_EQ(wire->again(), Received::all);
    EXPECT_EQ(driver.used(0)->written, 512u);
    EXPECT_EQ(driver.used(0)->written, 512u);
    EXPECT_EQ(driver.used(0)->written, 188u);
    EXPECT_EQ(driver.get(at + 12, 1200), frame_of(1200));
    EXPECT_EQ(driver.get(at + 10, 2), (std::vector<uint8_t>{3, 0}));
    EXPECT_EQ(driver.used(0)->written, 112u);
    EXPECT_EQ(driver.get(at + 1536 + 12, 100), frame_of(100));
    EXPECT_EQ(driver.get(at + 1536 + 10, 2), (std::vector<uint8_t>{1, 0}));
  }
}

// A ring that could never hold the packet does not stop the network.
TEST_P(NetworkTest, APacketThatNoRingHoldsIsLost) {
  ASSERT_TRUE(driver.start(GetParam().features | F_MRG_RXBUF));
  const uint64_t at = driver.allocate(16 * 100);
  for (uint64_t i = 0; i < 16; i++) driver.submit(0, {{at + i * 100, 100, true}}, GetParam().indirect);
  EXPECT_EQ(wire->bring(frame_of(1600)), Received::all);
  EXPECT_EQ(wire->bring(frame_of(60)), Received::all);
  EXPECT_EQ(driver.used(0)->written, 0u);
  EXPECT_EQ(driver.used(0)->written, 72u);
  EXPECT_FALSE(driver.used(0));
}

TEST_P(NetworkTest, ABufferWithoutRoomForTheHeaderStopsTheDevice) {
  ASSERT_TRUE(driver.start(GetParam().features | F_MRG_RXBUF));
  driver.submit(0, {{driver.allocate(16), 12, true}}, GetParam().indirect);
  wire->bring(frame_of(60));
  EXPECT_TRUE(driver.needs_reset());
  EXPECT_EQ(wire->bring(frame_of(60)), Received::all);  // lost, but the network goes on
  EXPECT_TRUE(wire->waiting.empty());
}

TEST_P(NetworkTest, TheControlQueueAnswers) {
  ASSERT_TRUE(driver.start(GetParam().features | F_CTRL_VQ | F_CTRL_RX));
  EXPECT_EQ(ask({0, 0, 1}), 0);
  EXPECT_EQ(ask({0, 0}), 1);
  EXPECT_EQ(ask({0, 9, 1}), 1);
  EXPECT_EQ(ask({4, 0, 1, 0}), 1);  // pairs were not negotiated
  EXPECT_EQ(ask({9, 0, 1}), 1);
  EXPECT_EQ(ask({1}), 1);
  EXPECT_EQ(ask(std::vector<uint8_t>(9000)), 1);
}

TEST_P(NetworkTest, OnlyWhatTheDriverListensToArrives) {
  ASSERT_TRUE(driver.start(GetParam().features | F_CTRL_VQ | F_CTRL_RX | F_CTRL_RX_EXTRA | F_CTRL_VLAN |
                           F_CTRL_MAC_ADDR));
  const auto arrives = [&](std::vector<uint8_t> start) {
    start.resize(60);
    driver.submit(0, {{driver.allocate(256), 256, true}}, GetParam().indirect);
    EXPECT_EQ(wire->bring(std::move(start)), Received::all);
    return driver.used(0).has_value();
  };
  const std::vector<uint8_t> other = {2, 0, 0, 0, 0, 9}, own = {0x52, 0x54, 0, 1, 2, 3},
                             group = {0x33, 0x33, 0, 0, 0, 1}, all(6, 0xff);
  EXPECT_TRUE(arrives(other));
  EXPECT_EQ(ask({0, 0, 0}), 0);  // not promiscuous any more
  EXPECT_FALSE(arrives(other));
  EXPECT_FALSE(arrives(group));
  EXPECT_TRUE(arrives(own));
  EXPECT_TRUE(arrives(all));
  EXPECT_EQ(ask({1, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 9, 1, 0, 0, 0, 0x33, 0x33, 0, 0, 0, 1}), 0);
  EXPECT_TRUE(arrives(other));
  EXPECT_TRUE(arrives(group));
  EXPECT_EQ(ask({1, 0, 0, 0, 0, 0x10, 2, 0, 0, 0, 0, 9}), 1);  // more than there is
  EXPECT_EQ(ask({1, 0, 0, 0, 0, 0, 0, 0, 0, 0}), 0);
  EXPECT_FALSE(arrives(group));
  EXPECT_EQ(ask({0, 1, 1}), 0);
  EXPECT_TRUE(arrives(group));
  EXPECT_EQ(ask({0, 3, 1}), 0);
  EXPECT_FALSE(arrives(group));
  EXPECT_EQ(ask({0, 5, 1}), 0);
  EXPECT_FALSE(arrives(all));
  EXPECT_EQ(ask({1, 1, 2, 0, 0, 0, 0, 7}), 0);  // an address of its own
  EXPECT_FALSE(arrives(own));
  EXPECT_TRUE(arrives({2, 0, 0, 0, 0, 7}));
  std::array<uint8_t, 6> mac{};
  network.read_config(0, mac);
  EXPECT_EQ(mac[5], 7);
  const std::vector<uint8_t> tagged = {2, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0x81, 0, 0x20, 5};
  EXPECT_FALSE(arrives(tagged));
  EXPECT_EQ(ask({2, 0, 5, 0}), 0);
  EXPECT_TRUE(arrives(tagged));
  EXPECT_EQ(ask({2, 1, 5, 0}), 0);
  EXPECT_FALSE(arrives(tagged));
  EXPECT_EQ(ask({2, 0, 0, 16}), 1);
  ASSERT_TRUE(driver.start(GetParam().features));  // all of it is forgotten
  EXPECT_TRUE(arrives(tagged));
  EXPECT_TRUE(arrives(own));
}

TEST_P(NetworkTest, PairsOfQueues) {
  ASSERT_TRUE(driver.start(GetParam().features | F_CTRL_VQ | F_MQ));
  std::array<uint8_t, 2> pairs{};
  network.read_config(8, pairs);
  EXPECT_EQ(pairs[0], 2);
  driver.submit(2, {{driver.allocate(256), 256, true}}, GetParam().indirect);
  EXPECT_EQ(wire->bring(frame_of(60), 1), Received::all);
  EXPECT_FALSE(driver.used(2));  // not in use yet
  for (const uint8_t wrong : {0, 3, 255}) EXPECT_EQ(ask({4, 0, wrong, 0}), 1);
  EXPECT_EQ(ask({4, 0, 2, 0}), 0);
  EXPECT_EQ(wire->used, 2u);
  EXPECT_EQ(wire->bring(frame_of(60), 1), Received::all);
  EXPECT_TRUE(driver.used(2));
  driver.submit(3, {{driver.put(std::vector<uint8_t>(100)), 100, false}}, GetParam().indirect);
  EXPECT_EQ(wire->sent_queue, 1u);
  EXPECT_TRUE(driver.used(3));
  driver.device.reset();
  EXPECT_EQ(wire->used, 1u);
}

TEST_P(NetworkTest, OffloadsAreWhatTheDriverAgreesTo) {
  ASSERT_TRUE(driver.start(GetParam().features | F_GUEST_TSO4));  // nothing without the checksum
  EXPECT_EQ(wire->accepted, net::Offloads{});
  ASSERT_TRUE(
      driver.start(GetParam().features | F_CTRL_VQ | F_CTRL_GUEST_OFFLOADS | F_GUEST_CSUM | F_GUEST_TSO4));
  EXPECT_EQ(wire->accepted, (net::Offloads{true, true, false, false}));
  EXPECT_EQ(ask({5, 0, 2, 0, 0, 0, 0, 0, 0, 0}), 0);
  EXPECT_EQ(wire->accepted, (net::Offloads{true, false, false, false}));
  EXPECT_EQ(ask({5, 0, 2, 1, 0, 0, 0, 0, 0, 0}), 1);  // TSO6 was not negotiated
  EXPECT_EQ(ask({5, 0, 1, 0, 0, 0, 0, 0, 0, 0}), 1);  // nor is that one of them
  driver.device.reset();
  EXPECT_EQ(wire->accepted, net::Offloads{});
}

TEST_P(NetworkTest, TheCableAndTheAnnouncement) {
  ASSERT_TRUE(driver.start(GetParam().features | F_CTRL_VQ | F_GUEST_ANNOUNCE));
  const auto status = [&] {
    std::array<uint8_t, 2> bytes{};
    network.read_config(6, bytes);
    return bytes[0];
  };
  const unsigned before = driver.transport.config_interrupts;
  wire->card->set_link(false);
  wire->card->set_link(false);
  EXPECT_EQ(status(), 0);
  EXPECT_EQ(driver.transport.config_interrupts, before + 1);
  wire->card->set_link(true);
  EXPECT_EQ(status(), 1);
  nlohmann::json state;
  network.save(state);
  network.load(state);
  network.kick(2);  // runs here
  EXPECT_EQ(status(), 3);
  EXPECT_EQ(driver.transport.config_interrupts, before + 3);
  EXPECT_EQ(ask({3, 0}), 0);
  EXPECT_EQ(status(), 1);
}

TEST_P(NetworkTest, ConfigurationAndState) {
  std::array<uint8_t, 12> config{};
  network.read_config(0, config);
  EXPECT_THAT(config, ::testing::ElementsAre(0x52, 0x54, 0, 1, 2, 3, 1, 0, 2, 0, 0x78, 5));
  ASSERT_TRUE(driver.start(GetParam().features | F_CTRL_VQ | F_CTRL_RX | F_CTRL_VLAN | F_CTRL_MAC_ADDR |
                           F_MQ | F_GUEST_CSUM | F_GUEST_TSO6));
  for (const auto& command : std::vector<std::vector<uint8_t>>{
           {0, 0, 0},
           {0, 1, 1},
           {1, 1, 2, 0, 0, 0, 0, 7},
           {2, 0, 9, 0},
           {4, 0, 2, 0},
           {1, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 9, 1, 0, 0, 0, 0x33, 0x33, 0, 0, 0, 1}})
    EXPECT_EQ(ask(command), 0);
  // Buffers that are taken already belong to the driver's ring in what is saved.
  const uint64_t at = driver.allocate(4 * 2048);
  for (uint64_t i = 0; i < 4; i++) driver.submit(0, {{at + i * 2048, 2048, true}}, GetParam().indirect);
  wire->unknown = 3000;
  std::vector<uint8_t> own = {2, 0, 0, 0, 0, 7};
  own.resize(60);
  EXPECT_EQ(wire->bring(own), Received::all);
  EXPECT_TRUE(driver.used(0));
  nlohmann::json first, second;
  network.save(first);
  auto other_wire = std::make_shared<Wire>();
  Network other(memory, other_wire, {{0x52, 0x54, 0, 1, 2, 3}, 1400});
  other.plug_in(loop);
  other.load(first);
  other.save(second);
  EXPECT_EQ(first, second);
  EXPECT_EQ(other_wire->used, 2u);
  EXPECT_EQ(other_wire->accepted, (net::Offloads{true, false, true, false}));
  EXPECT_EQ(other_wire->bring(frame_of(60)), Received::all);  // for somebody else
  EXPECT_FALSE(driver.used(0));
  EXPECT_EQ(other_wire->bring(own), Received::all);
  EXPECT_TRUE(driver.used(0));

  const auto refused = [&](auto change) {
    nlohmann::json wrong = first;
    change(wrong["model"]);
    EXPECT_THROW(other.load(wrong), UsageError);
  };
  refused([](auto& model) { model["pairs"] = 3; });
  refused([](auto& model) { model["pairs"] = 0; });
  refused([](auto& model) { model["offloads"] = 1; });
  refused([](auto& model) { model.erase("filter"); });
  refused([](auto& model) { model["filter"]["unicast"] = "01"; });
  nlohmann::json third;
  other.save(third);
  EXPECT_EQ(third["model"], first["model"]);
}

TEST(HostileDriver, NothingItDoesHurtsTheNetwork) {
  for (unsigned seed = 0; seed < 100; seed++) {
    machine::GuestMemory memory(2 * machine::layout::MiB);
    auto wire = std::make_shared<Wire>();
    EventLoop loop("test");
    Network network(memory, wire, {});
    network.plug_in(loop);
    FakeDriver driver(network, memory);
    std::mt19937 random(seed);
    testing::attack(network, memory, 300, [&](uint32_t below) {
      if (random() % 16 == 0) {
        wire->unknown = random() % 2 ? 0 : net::max_frame;
        wire->blocked = random() % 4 == 0;
        wire->waiting.clear();
        wire->bring(frame_of(random() % 8 ? 14 + random() % 3000 : net::max_frame), random() % 2);
        if (random() % 4 == 0) wire->card->transmit_ready(random() % 2);
      }
      return random() % below;
    });
    wire->blocked = false;
    wire->waiting.clear();
    ASSERT_TRUE(driver.start(F_RING_PACKED)) << seed;
    driver.submit(0, {{driver.allocate(2048), 2048, true}});
    EXPECT_EQ(wire->bring(frame_of(60)), Received::all);
    EXPECT_TRUE(driver.used(0)) << seed;
  }
}

}  // namespace
}  // namespace lodge::device::virtio
