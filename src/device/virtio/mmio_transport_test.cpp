// VirtIO over MMIO from the registers' side (VirtIO 1.2, section 4.2).
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "base/error.hpp"
#include "device/testing.hpp"
#include "device/virtio/console.hpp"
#include "device/virtio/entropy.hpp"
#include "device/virtio/mmio.hpp"
#include "device/virtio/mmio_slots.hpp"
#include "device/virtio/testing.hpp"
#include "machine/bus.hpp"
#include "machine/layout.hpp"

namespace lodge::device::virtio {
namespace {

namespace layout = machine::layout;
using device::testing::FakeInterrupt;
using device::testing::FakePlatform;
using testing::DriverQueue;

constexpr uint64_t base = layout::virtio_mmio_base;

class MmioTransportTest : public ::testing::TestWithParam<testing::Rings> {
 protected:
  MmioTransportTest() {
    bus.add(base, MmioTransport::window_size, transport, "virtio");
    transport.mounted(base);
  }
  uint32_t get(uint64_t at) { return static_cast<uint32_t>(bus.read(base + at, 4)); }
  void put(uint64_t at, uint64_t value) { bus.write(base + at, 4, value); }

  // 3.1.1 with the registers of 4.2.3.1 and 4.2.3.2.
  void start(uint64_t features) {
    put(0x70, 0);
    put(0x70, ACKNOWLEDGE | DRIVER);
    for (uint32_t half = 0; half < 2; half++) {
      put(0x24, half);
      put(0x20, features >> (32 * half) & 0xffff'ffff);
    }
    put(0x70, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    set_up_queue(features);
    put(0x70, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
  }
  void set_up_queue(uint64_t features) {
    queue.emplace(ram, 0x100000, 8, features);
    put(0x30, 0);
    put(0x38, 8);
    put(0x80, queue->setup.descriptors);
    put(0x84, queue->setup.descriptors >> 32);
    put(0x90, queue->setup.driver);
    put(0x94, queue->setup.driver >> 32);
    put(0xa0, queue->setup.device);
    put(0xa4, queue->setup.device >> 32);
    put(0x44, 1);
  }
  void request() {
    queue->submit({{0x90000, 16, true}}, GetParam().indirect);
    transport.device().kick(0);
  }
  uint64_t wanted = GetParam().features | F_VERSION_1;

  machine::GuestMemory ram{4 * layout::MiB};
  machine::Bus bus{"memory", uint64_t{1} << 52};
  FakeInterrupt line;
  FakePlatform platform;
  MmioTransport transport{std::make_unique<Entropy>(ram), line, platform};
  std::optional<DriverQueue> queue;
};

INSTANTIATE_TEST_SUITE_P(Rings, MmioTransportTest, ::testing::ValuesIn(testing::all_rings()),
                         [](const auto& test) { return test.param.name; });

TEST_P(MmioTransportTest, SaysWhatItIs) {
  EXPECT_EQ(get(0x00), 0x7472'6976u);
  EXPECT_EQ(get(0x04), 2u);
  EXPECT_EQ(get(0x08), 4u);
  put(0x14, 1);
  EXPECT_EQ(get(0x10) & 1, 1u) << "VERSION_1";
  put(0x14, 2);
  EXPECT_EQ(get(0x10), 0u);
  for (uint64_t at = 0xb0; at < 0xc0; at += 4) EXPECT_EQ(get(at), 0xffff'ffffu) << "no shared memory region";
}

TEST_P(MmioTransportTest, OtherThanAlignedWordsReachNoControlRegister) {
  EXPECT_EQ(bus.read(base + 4, 1), 0u);
  EXPECT_EQ(bus.read(base, 8), 0u);
  bus.write(base + 0x70, 1, ACKNOWLEDGE);
  bus.write(base + 0x70, 8, ACKNOWLEDGE);
  EXPECT_EQ(get(0x70), 0u);
}

TEST_P(MmioTransportTest, ARequestRaisesTheLineUntilItIsAcknowledged) {
  start(wanted);
  EXPECT_EQ(get(0x70), 15u);
  EXPECT_EQ(get(0x44), 1u);
  request();
  EXPECT_EQ(queue->used()->written, 16u);
  EXPECT_TRUE(line.level);
  EXPECT_EQ(get(0x60), 1u);
  EXPECT_TRUE(line.level) << "reading acknowledges nothing";
  put(0x64, 2);
  EXPECT_TRUE(line.level);
  put(0x64, 1);
  EXPECT_FALSE(line.level);
  EXPECT_EQ(get(0x60), 0u);
}

TEST_P(MmioTransportTest, ANotificationSignalsTheQueue) {
  start(wanted);
  take_event(transport.device().kick_fd(0));
  put(0x50, 0);
  EXPECT_EQ(take_event(transport.device().kick_fd(0)), 1u);
  put(0x50, 0x8005'0000);  // with notification data
  EXPECT_EQ(take_event(transport.device().kick_fd(0)), 1u);
  put(0x50, 1);  // there is no such queue
  EXPECT_EQ(take_event(transport.device().kick_fd(0)), 0u);
}

TEST_P(MmioTransportTest, TheDriverMayTakeItsQueueBackAndSetItUpAgain) {
  start(wanted);
  request();
  put(0x44, 0);
  EXPECT_EQ(get(0x44), 0u);
  put(0x80, 0x5000);  // free again
  put(0x44, 0);
  set_up_queue(wanted);
  EXPECT_EQ(get(0x44), 1u);
  request();
  EXPECT_TRUE(queue->used());
  put(0x80, 0x5000);  // frozen
  request();
  EXPECT_TRUE(queue->used());
}

TEST_P(MmioTransportTest, AQueueIsResetWhereThatWasNegotiated) {
  start(wanted);
  put(0xc0, 1);
  EXPECT_EQ(get(0x44), 1u) << "not negotiated";
  start(wanted | F_RING_RESET);
  put(0xc0, 1);
  EXPECT_EQ(get(0xc0), 0u) << "complete";
  EXPECT_EQ(get(0x44), 0u);
  set_up_queue(wanted);
  request();
  EXPECT_TRUE(queue->used());
}

TEST_P(MmioTransportTest, QueuesThatAreNotThereReadAsZero) {
  put(0x30, 0xffff'ffff);
  EXPECT_EQ(get(0x34), 0u);
  put(0x38, 8);
  put(0x44, 1);
  put(0xc0, 1);
  EXPECT_EQ(get(0x44), 0u);
  put(0x30, 0);
  EXPECT_EQ(get(0x34), 64u);
  put(0x38, 0x10008);  // more than a ring can have
  put(0x44, 1);
  EXPECT_EQ(transport.device().queue_setup(0).size, 64u);
}

TEST_P(MmioTransportTest, AResetForgetsEverything) {
  start(wanted);
  request();
  put(0x14, 1);
  put(0x70, 0);
  EXPECT_EQ(get(0x70), 0u);
  EXPECT_EQ(get(0x60), 0u);
  EXPECT_FALSE(line.level);
  EXPECT_EQ(get(0x44), 0u);
  EXPECT_EQ(get(0x10), static_cast<uint32_t>(transport.device().features(false)));
}

TEST_P(MmioTransportTest, SavedStateComesBackWithItsInterrupt) {
  start(wanted);
  request();
  FakeInterrupt other_line;
  MmioTransport other(std::make_unique<Entropy>(ram), other_line, platform);
  EXPECT_TRUE(device::testing::round_trip(transport, other));
  EXPECT_TRUE(other_line.level);
  ASSERT_TRUE(queue->used());
  queue->submit({{0x90000, 16, true}}, GetParam().indirect);
  other.device().kick(0);
  EXPECT_TRUE(queue->used());
  nlohmann::json good, after;
  other.save(good);
  auto bad = good;
  bad.erase("virtio");
  EXPECT_THROW(other.load(bad), UsageError);
  other.save(after);
  EXPECT_EQ(good, after);
}

TEST_P(MmioTransportTest, AnyOrderOfRegisterAccessesIsSurvived) {
  std::mt19937 random(7);
  for (int step = 0; step < 20000; step++) {
    const uint64_t at = random() % 4 ? random() % 0x40 * 4 : random() % 0x1000;
    const unsigned size = random() % 4 ? 4 : 1u << random() % 4;
    if (random() % 2)
      bus.read(base + at, size);
    else
      bus.write(base + at, size, random() % 4 ? random() % 16 : random());
    if (step % 16 == 0) transport.device().kick(0);
  }
  start(wanted);
  request();
  EXPECT_TRUE(queue->used());
}

TEST(MmioDoorbells, OneQueueTakesAnyValueAndSeveralTheirNumber) {
  machine::GuestMemory ram{4 * layout::MiB};
  FakeInterrupt line;
  FakePlatform platform;
  MmioTransport single(std::make_unique<Entropy>(ram), line, platform);
  single.mounted(base);
  ASSERT_EQ(platform.doorbells.size(), 1u);
  EXPECT_EQ(platform.doorbells[0].address, base + 0x50);
  EXPECT_FALSE(platform.doorbells[0].match);
  EXPECT_TRUE(single.device().features(false) & F_NOTIFICATION_DATA);
  {
    MmioTransport several(
        std::make_unique<Console>(
            ram, std::vector<Console::PortConfig>{{"", std::make_shared<device::NullBackend>()}}),
        line, platform);
    several.mounted(base + 0x1000);
    ASSERT_EQ(platform.doorbells.size(), 1u + several.device().queues());
    EXPECT_EQ(platform.doorbells[2].match, 1u);
    EXPECT_FALSE(several.device().features(false) & F_NOTIFICATION_DATA) << "its kicks would all be slow";
  }
  EXPECT_EQ(platform.doorbells.size(), 1u) << "a transport that goes takes its doorbells along";
}

TEST(MmioConfiguration, IsReadInTheWidthOfItsFields) {
  machine::GuestMemory ram{4 * layout::MiB};
  FakeInterrupt line;
  FakePlatform platform;
  MmioTransport console(
      std::make_unique<Console>(
          ram, std::vector<Console::PortConfig>{{"", std::make_shared<device::NullBackend>()}}),
      line, platform);
  EXPECT_EQ(console.read(0x100, 2), 80u);
  EXPECT_EQ(console.read(0x102, 2), 25u);
  EXPECT_EQ(console.read(0x100, 4), 80u | 25u << 16);
  EXPECT_EQ(console.read(0xff8, 8), 0u);
}

TEST(MmioSlots, AreHandedOutInOrderUntilTheyAreAllTaken) {
  MmioSlots slots([](unsigned) -> machine::Interrupt& { throw std::logic_error("not asked for"); });
  for (unsigned i = 0; i < layout::virtio_mmio_max; i++) {
    EXPECT_EQ(slots.next(), i);
    const auto place = slots.take();
    EXPECT_EQ(place.base, layout::virtio_mmio_base + i * layout::virtio_mmio_size);
    EXPECT_GE(place.gsi, 16u);
    EXPECT_LT(place.gsi, 24u);
  }
  EXPECT_THROW(slots.take(), UsageError);
}

}  // namespace
}  // namespace lodge::device::virtio
