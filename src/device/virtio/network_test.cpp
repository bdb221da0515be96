#include "device/virtio/network.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <random>

#include "device/virtio/testing.hpp"

namespace lodge::device::virtio {
namespace {

using testing::FakeDriver;
using testing::Rings;

constexpr uint64_t F_MRG_RXBUF = feature(15), F_CTRL_VQ = feature(17);

class Wire final : public net::Backend {
 public:
  void connect(net::Card& plugged) noexcept override { card = &plugged; }
  void disconnect() noexcept override { card = nullptr; }
  void send(std::span<const uint8_t> frame) noexcept override {
    sent.emplace_back(frame.begin(), frame.end());
  }
  void receive_ready() noexcept override { ready_calls++; }
  net::Card* card = nullptr;
  std::vector<std::vector<uint8_t>> sent;
  unsigned ready_calls = 0;
};

std::vector<uint8_t> frame_of(size_t size) {
  std::vector<uint8_t> frame(size);
  for (size_t i = 0; i < size; i++) frame[i] = static_cast<uint8_t>(i * 7);
  return frame;
}

class NetworkTest : public ::testing::TestWithParam<Rings> {
 protected:
  machine::GuestMemory memory{8 * machine::layout::MiB};
  std::shared_ptr<Wire> wire = std::make_shared<Wire>();
  Network network{memory, wire, {{0x52, 0x54, 0, 1, 2, 3}, 1400}};
  FakeDriver driver{network, memory};
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

TEST_P(NetworkTest, FramesForTheGuestFillABuffer) {
  ASSERT_TRUE(driver.start(GetParam().features));
  EXPECT_FALSE(wire->card->receive(frame_of(64)));  // no buffer yet
  const uint64_t at = driver.allocate(2048);
  driver.submit(0, {{at, 12, true}, {at + 12, 1600, true}}, GetParam().indirect);
  EXPECT_GE(wire->ready_calls, 1u);
  EXPECT_TRUE(wire->card->receive(frame_of(64)));
  EXPECT_EQ(driver.used(0)->written, 76u);
  EXPECT_EQ(driver.get(at + 12, 64), frame_of(64));
  EXPECT_EQ(driver.get(at + 10, 2), (std::vector<uint8_t>{1, 0}));
  driver.submit(0, {{at, 32, true}},
                GetParam().indirect);  // too small: the frame is lost, the buffer comes back
  EXPECT_TRUE(wire->card->receive(frame_of(64)));
  EXPECT_EQ(driver.used(0)->written, 0u);
}

TEST_P(NetworkTest, MergedBuffersHoldALargeFrame) {
  ASSERT_TRUE(driver.start(GetParam().features | F_MRG_RXBUF));
  const uint64_t at = driver.allocate(4096);
  for (uint64_t i = 0; i < 2; i++) driver.submit(0, {{at + i * 512, 512, true}}, GetParam().indirect);
  EXPECT_TRUE(wire->card->receive(frame_of(1200)));  // lost: there is not enough
  EXPECT_FALSE(driver.used(0));
  driver.submit(0, {{at + 1024, 512, true}}, GetParam().indirect);
  EXPECT_TRUE(wire->card->receive(frame_of(1200)));
  EXPECT_EQ(driver.used(0)->written, 512u);
  EXPECT_EQ(driver.used(0)->written, 512u);
  EXPECT_EQ(driver.used(0)->written, 188u);
  EXPECT_EQ(driver.get(at + 12, 1200), frame_of(1200));
  EXPECT_EQ(driver.get(at + 10, 2), (std::vector<uint8_t>{3, 0}));
}

TEST_P(NetworkTest, TheControlQueueAnswers) {
  ASSERT_TRUE(driver.start(GetParam().features | F_CTRL_VQ));
  const auto ask = [&](uint8_t group, uint8_t command) {
    const uint64_t answer = driver.put({0xee});
    driver.submit(2, {{driver.put({group, command, 1}), 3, false}, {answer, 1, true}}, GetParam().indirect);
    EXPECT_TRUE(driver.used(2));
    return driver.get(answer, 1)[0];
  };
  EXPECT_EQ(ask(0, 0), 0);
  EXPECT_EQ(ask(0, 9), 1);
  EXPECT_EQ(ask(4, 0), 1);
}

TEST_P(NetworkTest, ConfigurationAndState) {
  std::array<uint8_t, 12> config{};
  network.read_config(0, config);
  EXPECT_THAT(config, ::testing::ElementsAre(0x52, 0x54, 0, 1, 2, 3, 1, 0, 1, 0, 0x78, 5));
  ASSERT_TRUE(driver.start(GetParam().features));
  const uint64_t at = driver.allocate(2048);
  driver.submit(0, {{at, 2048, true}}, GetParam().indirect);
  nlohmann::json first, second;
  network.save(first);
  auto other_wire = std::make_shared<Wire>();
  Network other(memory, other_wire, {{0x52, 0x54, 0, 1, 2, 3}, 1400});
  other.load(first);
  other.save(second);
  EXPECT_EQ(first, second);
  EXPECT_TRUE(other_wire->card->receive(frame_of(60)));
  EXPECT_TRUE(driver.used(0));
}

TEST(HostileDriver, NothingItDoesHurtsTheNetwork) {
  for (unsigned seed = 0; seed < 100; seed++) {
    machine::GuestMemory memory(2 * machine::layout::MiB);
    auto wire = std::make_shared<Wire>();
    Network network(memory, wire, {});
    FakeDriver driver(network, memory);
    std::mt19937 random(seed);
    testing::attack(network, memory, 300, [&](uint32_t below) {
      if (random() % 16 == 0) wire->card->receive(frame_of(random() % 3000));
      return random() % below;
    });
    ASSERT_TRUE(driver.start(F_RING_PACKED)) << seed;
    driver.submit(0, {{driver.allocate(2048), 2048, true}});
    EXPECT_TRUE(wire->card->receive(frame_of(60)));
    EXPECT_TRUE(driver.used(0)) << seed;
  }
}

}  // namespace
}  // namespace lodge::device::virtio
