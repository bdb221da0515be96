// What all VirtIO devices have in common, shown on a device whose requests a test completes by hand.
#include "device/virtio/device.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <condition_variable>
#include <nlohmann/json.hpp>
#include <random>
#include <thread>

#include "base/error.hpp"
#include "device/virtio/entropy.hpp"
#include "device/virtio/testing.hpp"

namespace lodge::device::virtio {
namespace {

using testing::FakeDriver;
using testing::Rings;

constexpr uint64_t F_LOUD = feature(3);

// Keeps every request until the test lets it go; its configuration is four bytes.
class Shelf final : public Device {
 public:
  explicit Shelf(machine::GuestMemory& memory)
      : Device({"shelf", DeviceType::entropy, 0xff0000, F_LOUD, {16, 16}}, memory) {}

  size_t kept() {
    const std::lock_guard lock(mutex_);
    return shelf_.size();
  }
  void complete() {
    const std::lock_guard lock(mutex_);
    const auto [index, chain] = shelf_.back();
    shelf_.pop_back();
    queue(index).push(chain, static_cast<uint32_t>(chain.write(0, std::array<uint8_t, 2>{0xaa, 0xbb})));
    notify(index);
    emptied_.notify_all();
  }
  void change() {
    const std::lock_guard lock(mutex_);
    config_[3]++;
    config_changed();
  }
  unsigned resets = 0;

 private:
  void process(unsigned index) noexcept override {
    drain(index, chain_, [&](const Chain& chain) {
      shelf_.emplace_back(index, chain);
      return true;
    });
  }
  unsigned config_size() const noexcept override { return 4; }
  void config_bytes(std::span<uint8_t> out) const noexcept override {
    std::ranges::copy(config_, out.begin());
  }
  void config_written(unsigned offset, std::span<const uint8_t> data) noexcept override {
    std::ranges::copy(data, config_.begin() + offset);
  }
  void quiesce(std::unique_lock<std::mutex>& lock, int which) noexcept override {
    emptied_.wait(lock, [&] {
      return std::ranges::none_of(
          shelf_, [&](const auto& kept) { return which < 0 || kept.first == unsigned(which); });
    });
  }
  void was_reset() noexcept override { resets++; }
  void save_device(nlohmann::json& json) const override { json = config_[3]; }
  void load_device(const nlohmann::json& json) override {
    if (!json.is_number_unsigned()) usage_error("shelf: no number");
    config_[3] = json.get<uint8_t>();
  }

  std::vector<std::pair<unsigned, Chain>> shelf_;
  std::condition_variable emptied_;
  std::array<uint8_t, 4> config_{1, 2, 3, 4};
  Chain chain_;
};

class DeviceTest : public ::testing::TestWithParam<Rings> {
 protected:
  machine::GuestMemory memory{8 * machine::layout::MiB};
  Shelf shelf{memory};
  FakeDriver driver{shelf, memory};
  uint64_t wanted = GetParam().features;
};

INSTANTIATE_TEST_SUITE_P(Rings, DeviceTest, ::testing::ValuesIn(testing::all_rings()),
                         [](const auto& test) { return test.param.name; });

TEST_P(DeviceTest, AnswersARequestWithAnInterrupt) {
  ASSERT_TRUE(driver.start(wanted));
  const uint64_t at = driver.allocate(16);
  driver.submit(1, {{at, 16, true}}, GetParam().indirect);
  EXPECT_EQ(shelf.kept(), 1u);
  EXPECT_FALSE(driver.used(1));
  shelf.complete();
  EXPECT_EQ(driver.transport.queue_interrupts[1], 1u);
  EXPECT_EQ(driver.used(1)->written, 2u);
  EXPECT_THAT(driver.get(at, 3), ::testing::ElementsAre(0xaa, 0xbb, 0));
}

TEST_P(DeviceTest, FeaturesAreASubsetOfTheOffer) {
  EXPECT_TRUE(shelf.features(false) & F_LOUD);
  EXPECT_FALSE(shelf.features(true) >> 32);
  shelf.set_status(ACKNOWLEDGE | DRIVER, false);
  shelf.set_driver_features(F_VERSION_1 | feature(5));
  shelf.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK, false);
  EXPECT_FALSE(shelf.status() & FEATURES_OK);
  shelf.set_driver_features(F_LOUD);  // without VERSION_1
  shelf.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK, false);
  EXPECT_FALSE(shelf.status() & FEATURES_OK);
  shelf.set_status(ACKNOWLEDGE | DRIVER | DRIVER_OK, false);
  EXPECT_FALSE(shelf.status() & DRIVER_OK);
  shelf.set_driver_features(F_VERSION_1 | F_LOUD);
  shelf.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK, false);
  EXPECT_TRUE(shelf.status() & FEATURES_OK);
  shelf.set_driver_features(F_VERSION_1);  // too late
  EXPECT_EQ(shelf.driver_features(), F_VERSION_1 | F_LOUD);
}

TEST_P(DeviceTest, WhatAQueueIsCannotChangeAfterDriverOk) {
  ASSERT_TRUE(driver.start(wanted));
  const QueueSetup before = shelf.queue_setup(0);
  shelf.set_queue_setup(0, {4, 0x5000, 0x6000, 0x7000});
  shelf.enable_queue(0, false);
  EXPECT_EQ(shelf.queue_setup(0), before);
  EXPECT_TRUE(shelf.queue_enabled(0));
  driver.submit(0, {{driver.allocate(16), 16, true}}, GetParam().indirect);
  EXPECT_EQ(shelf.kept(), 1u);
  shelf.complete();
  EXPECT_TRUE(driver.used(0));
}

TEST_P(DeviceTest, AQueueThatWasNotEnabledStaysOff) {
  shelf.set_status(ACKNOWLEDGE | DRIVER, false);
  shelf.set_driver_features(F_VERSION_1);
  shelf.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK, false);
  shelf.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK, false);
  shelf.set_queue_setup(0, {8, 0x5000, 0x6000, 0x7000});
  shelf.enable_queue(0);
  shelf.kick(0);
  EXPECT_FALSE(shelf.queue_enabled(0));
  EXPECT_EQ(shelf.kept(), 0u);
}

TEST_P(DeviceTest, ASizeThatWasNotOfferedIsTheLargest) {
  shelf.set_queue_setup(0, {32, 0, 0, 0});
  EXPECT_EQ(shelf.queue_setup(0).size, 16);
  shelf.set_queue_setup(0, {0, 0, 0, 0});
  EXPECT_EQ(shelf.queue_setup(0).size, 16);
}

TEST_P(DeviceTest, AQueueIsResetAndSetUpAnew) {
  ASSERT_TRUE(driver.start(wanted | F_RING_RESET));
  const uint64_t at = driver.allocate(16);
  driver.submit(0, {{at, 16, true}}, GetParam().indirect);
  driver.submit(1, {{at, 16, true}}, GetParam().indirect);
  std::thread host([&] {
    ::usleep(20'000);
    shelf.complete();  // of queue 1, which is not waited for
    shelf.complete();
  });
  shelf.reset_queue(0);  // returns when the request has come back
  host.join();
  EXPECT_FALSE(shelf.queue_enabled(0));
  EXPECT_TRUE(driver.used(0));
  driver.queues[0] =
      testing::DriverQueue(memory, driver.allocate(testing::DriverQueue::all_bytes(4)), 4, driver.features);
  shelf.set_queue_setup(0, driver.queues[0].setup);
  shelf.enable_queue(0);
  driver.submit(0, {{at, 16, true}}, GetParam().indirect);
  EXPECT_EQ(shelf.kept(), 1u);
  shelf.complete();
  EXPECT_TRUE(driver.used(0));
}

TEST_P(DeviceTest, AResetWaitsForRequestsThatAreOut) {
  ASSERT_TRUE(driver.start(wanted));
  const uint64_t at = driver.allocate(16);
  driver.submit(0, {{at, 16, true}}, GetParam().indirect);
  std::atomic<bool> completed = false;
  std::thread host([&] {
    ::usleep(20'000);
    completed = true;
    shelf.complete();
  });
  shelf.reset();
  EXPECT_TRUE(completed);
  host.join();
  EXPECT_EQ(shelf.status(), 0);
  EXPECT_EQ(shelf.driver_features(), 0u);
  ASSERT_TRUE(driver.start(wanted));
}

TEST_P(DeviceTest, ABrokenChainStopsTheDeviceUntilAReset) {
  ASSERT_TRUE(driver.start(wanted));
  driver.submit(0, {{uint64_t{1} << 45, 16, true}}, GetParam().indirect);
  EXPECT_TRUE(driver.needs_reset());
  EXPECT_EQ(driver.transport.config_interrupts, 1u);
  driver.submit(1, {{driver.allocate(16), 16, true}}, GetParam().indirect);
  EXPECT_EQ(shelf.kept(), 0u);
  ASSERT_TRUE(driver.start(wanted));
  EXPECT_FALSE(driver.needs_reset());
  driver.submit(1, {{driver.allocate(16), 16, true}}, GetParam().indirect);
  EXPECT_EQ(shelf.kept(), 1u);
  shelf.complete();
}

TEST_P(DeviceTest, AQueueOutsideRamStopsTheDevice) {
  shelf.set_status(ACKNOWLEDGE | DRIVER, false);
  shelf.set_driver_features(F_VERSION_1);
  shelf.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK, false);
  shelf.set_queue_setup(0, {8, uint64_t{1} << 45, 0x6000, 0x7000});
  shelf.enable_queue(0);
  shelf.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK, false);
  EXPECT_TRUE(driver.needs_reset());
  shelf.kick(0);
  EXPECT_EQ(shelf.kept(), 0u);
}

TEST_P(DeviceTest, ConfigurationChangesAreCountedAndAnnounced) {
  ASSERT_TRUE(driver.start(wanted));
  std::array<uint8_t, 8> bytes{};
  shelf.read_config(2, bytes);
  EXPECT_THAT(bytes, ::testing::ElementsAre(3, 4, 0, 0, 0, 0, 0, 0));
  const uint8_t before = shelf.config_generation();
  shelf.change();
  EXPECT_NE(shelf.config_generation(), before);
  EXPECT_EQ(driver.transport.config_interrupts, 1u);
  shelf.write_config(3, std::array<uint8_t, 4>{9, 9, 9, 9});  // only the first is inside
  shelf.read_config(0, bytes);
  EXPECT_THAT(bytes, ::testing::ElementsAre(1, 2, 3, 9, 0, 0, 0, 0));
}

TEST_P(DeviceTest, KicksArriveOnTheLoop) {
  EventLoop loop("test");
  shelf.attach_loop(loop);
  ASSERT_TRUE(driver.start(wanted));
  driver.queues[0].submit({{driver.allocate(16), 16, true}}, false);
  signal_event(shelf.kick_fd(0));
  for (int i = 0; i < 5000 && shelf.kept() == 0; i++) ::usleep(1000);
  EXPECT_EQ(shelf.kept(), 1u);
  shelf.complete();
  shelf.detach_loop();
}

TEST_P(DeviceTest, SavedStateGoesOnWhereItWas) {
  ASSERT_TRUE(driver.start(wanted));
  const uint64_t at = driver.allocate(16);
  for (int i = 0; i < 21; i++) {
    driver.submit(0, {{at, 16, true}}, GetParam().indirect);
    shelf.complete();
    ASSERT_TRUE(driver.used(0));
  }
  nlohmann::json first, second;
  shelf.save(first);
  Shelf other(memory);
  testing::FakeTransport transport;
  other.connect(transport);
  other.load(first);
  other.save(second);
  EXPECT_EQ(first, second);
  EXPECT_EQ(other.status(), shelf.status());
  driver.queues[0].submit({{at, 16, true}}, GetParam().indirect);
  other.kick(0);
  ASSERT_EQ(other.kept(), 1u);
  other.complete();
  EXPECT_TRUE(driver.used(0));
}

TEST_P(DeviceTest, ADeviceThatNeedsAResetIsSavedAndLoaded) {
  ASSERT_TRUE(driver.start(wanted));
  driver.submit(0, {{driver.allocate(16), 16, true}});
  shelf.complete();
  driver.submit(1, {{uint64_t{1} << 40, 16, true}});
  ASSERT_TRUE(driver.needs_reset());
  Shelf other(memory);
  nlohmann::json first, second;
  shelf.save(first);
  other.load(first);
  other.save(second);
  EXPECT_EQ(first, second);
  EXPECT_TRUE(other.status() & DEVICE_NEEDS_RESET);
}

// A driver may write features that are not offered; only FEATURES_OK asks whether they fit.
TEST_P(DeviceTest, FeaturesInNegotiationAreSavedWhateverTheyAre) {
  shelf.set_status(ACKNOWLEDGE | DRIVER, false);
  shelf.set_driver_features(~uint64_t{0});
  Shelf other(memory);
  nlohmann::json saved;
  shelf.save(saved);
  other.load(saved);
  EXPECT_EQ(other.driver_features(), ~uint64_t{0});
  other.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK, false);
  EXPECT_FALSE(other.status() & FEATURES_OK);
}

TEST_P(DeviceTest, SavedStateThatDoesNotFitIsRefused) {
  ASSERT_TRUE(driver.start(wanted));
  nlohmann::json good, after;
  shelf.save(good);
  const auto refused = [&](auto change) {
    nlohmann::json bad = good;
    change(bad);
    EXPECT_THROW(shelf.load(bad), UsageError);
    shelf.save(after);
    EXPECT_EQ(after, good);
  };
  refused([](auto& json) { json["type"] = 1; });
  refused([](auto& json) { json["features"] = feature(50); });
  refused([](auto& json) { json.erase("queues"); });
  refused([](auto& json) { json["queues"].erase(0); });
  refused([](auto& json) { json["queues"][0]["size"] = 32; });
  refused([](auto& json) { json["queues"][0]["descriptors"] = uint64_t{1} << 50; });
  refused([](auto& json) { json["model"] = "x"; });
  refused([](auto& json) { json.erase("model"); });
}

TEST(HostileDriver, NothingItDoesHurtsTheEntropyDevice) {
  for (unsigned seed = 0; seed < 200; seed++) {
    machine::GuestMemory memory(2 * machine::layout::MiB);
    Entropy entropy(memory);
    FakeDriver driver(entropy, memory, 0x100000);
    std::mt19937 random(seed);
    testing::attack(entropy, memory, 300, [&](uint32_t below) { return random() % below; });
    ASSERT_TRUE(driver.start(F_RING_PACKED)) << seed;
    driver.submit(0, {{driver.allocate(16), 16, true}});
    EXPECT_TRUE(driver.used(0)) << seed;
  }
}

TEST(EntropyDevice, FillsWhatItIsGiven) {
  for (const Rings& rings : testing::all_rings()) {
    machine::GuestMemory memory(2 * machine::layout::MiB);
    uint8_t next = 0;
    Entropy entropy(memory, {}, [&](std::span<uint8_t> out) {
      for (auto& byte : out) byte = ++next;
    });
    FakeDriver driver(entropy, memory, 0x100000);
    ASSERT_TRUE(driver.start(rings.features));
    const uint64_t at = driver.allocate(16);
    driver.submit(0, {{at, 3, true}, {at + 8, 2, true}}, rings.indirect);
    EXPECT_EQ(driver.used(0)->written, 5u);
    EXPECT_THAT(driver.get(at, 10), ::testing::ElementsAre(1, 2, 3, 0, 0, 0, 0, 0, 4, 5));
    driver.submit(0, {{at, 16, false}}, rings.indirect);  // nothing to write to
    EXPECT_EQ(driver.used(0)->written, 0u);
    const uint64_t large = driver.allocate(128 * 1024);
    driver.submit(0, {{large, 128 * 1024, true}}, rings.indirect);
    EXPECT_EQ(driver.used(0)->written, 64u * 1024);
  }
}

TEST(EntropyDevice, HostBytesAreNotAllTheSame) {
  std::array<uint8_t, 64> a{}, b{};
  Entropy::host_entropy(a);
  Entropy::host_entropy(b);
  EXPECT_NE(a, b);
}

}  // namespace
}  // namespace lodge::device::virtio
