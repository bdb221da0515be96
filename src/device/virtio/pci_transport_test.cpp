// VirtIO over PCI from the registers' side (VirtIO 1.2, section 4.1).
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>

#include <deque>
#include <thread>

#include "base/error.hpp"
#include "device/pci/allocate.hpp"
#include "device/pci/root.hpp"
#include "device/reset.hpp"
#include "device/testing.hpp"
#include "device/virtio/entropy.hpp"
#include "device/virtio/pci.hpp"
#include "device/virtio/testing.hpp"

namespace lodge::device::virtio {
namespace {

namespace layout = machine::layout;
using device::testing::FakeInterrupt;
using device::testing::FakePlatform;
using device::testing::FakePower;
using testing::DriverQueue;

class PciTransportTest : public ::testing::Test {
 protected:
  PciTransportTest() {
    memory_bus.add(layout::ecam_base, layout::ecam_size, root.ecam_window(), "ecam");
    root.add(2, 0, function);
    pci::assign_resources(root);
    for (uint8_t at = static_cast<uint8_t>(config(0x34, 1)); at != 0;
         at = static_cast<uint8_t>(config(at + 1u, 1)))
      if (config(at, 1) == 9)
        capabilities[config(at + 3u, 1)] = at;
      else
        msix_capability = at;
  }
  ~PciTransportTest() override { root.remove(2, 0); }

  uint32_t config(unsigned offset, unsigned size) {
    return static_cast<uint32_t>(memory_bus.read(layout::ecam_base + (2 << 15) + offset, size));
  }
  void set_config(unsigned offset, unsigned size, uint32_t value) {
    memory_bus.write(layout::ecam_base + (2 << 15) + offset, size, value);
  }
  uint64_t bar(unsigned index) {
    uint64_t address = config(0x10 + index * 4, 4);
    if (index == 4) address |= uint64_t{config(0x24, 4)} << 32;
    return address & ~uint64_t{15};
  }
  // The structure of a capability.
  uint64_t part(unsigned type) {
    return bar(config(capabilities[type] + 4u, 1)) + config(capabilities[type] + 8u, 4);
  }
  uint64_t common(unsigned offset, unsigned size) { return memory_bus.read(part(1) + offset, size); }
  void set_common(unsigned offset, unsigned size, uint64_t value) {
    memory_bus.write(part(1) + offset, size, value);
  }
  uint64_t legacy(unsigned offset, unsigned size) { return ports.read(bar(0) + offset, size); }
  void set_legacy(unsigned offset, unsigned size, uint64_t value) {
    ports.write(bar(0) + offset, size, value);
  }

  void enable_msix() {
    set_config(msix_capability + 2u, 2, 0x8000);
    for (unsigned vector = 0; vector < 2; vector++) {
      memory_bus.write(bar(1) + vector * 16, 8, 0xfee0'0000);
      memory_bus.write(bar(1) + vector * 16 + 8, 8, 0x40 + vector);
    }
  }
  void start(uint64_t features) {
    set_common(20, 1, 0);
    set_common(20, 1, 3);
    for (uint32_t half = 0; half < 2; half++) {
      set_common(8, 4, half);
      set_common(12, 4, static_cast<uint32_t>(features >> (32 * half)));
    }
    set_common(20, 1, 11);
    queue.emplace(ram, 0x100000, 8, features);
    set_common(22, 2, 0);
    set_common(24, 2, 8);
    set_common(26, 2, 1);
    set_common(32, 8, queue->setup.descriptors);
    set_common(40, 4, static_cast<uint32_t>(queue->setup.driver));  // by halves
    set_common(44, 4, queue->setup.driver >> 32);
    set_common(48, 8, queue->setup.device);
    set_common(28, 2, 1);
    set_common(20, 1, 15);
  }
  void request() {
    queue->submit({{0x90000, 16, true}});
    function.device().kick(0);
  }

  machine::GuestMemory ram{4 * layout::MiB};
  machine::Bus ports{"port", 0x10000}, memory_bus{"memory", uint64_t{1} << 52};
  std::deque<FakeInterrupt> lines{24};
  FakePower power;
  ResetControl reset{power};
  FakePlatform platform;
  pci::Root root{ports, memory_bus, [this](unsigned gsi) -> machine::Interrupt& { return lines.at(gsi); },
                 reset};
  PciTransport function{std::make_unique<Entropy>(ram), {platform, platform}, true};
  std::map<unsigned, uint8_t> capabilities;
  uint8_t msix_capability = 0;
  std::optional<DriverQueue> queue;
};

TEST_F(PciTransportTest, IsAnnouncedAsATransitionalDevice) {
  EXPECT_EQ(config(0, 4), 0x1005'1af4u);
  EXPECT_EQ(config(8, 1), 0u);
  EXPECT_EQ(config(0x2e, 2), 4u);
  EXPECT_EQ(capabilities.size(), 5u);
  EXPECT_NE(msix_capability, 0);
  for (const auto& [type, at] : capabilities) {
    if (type != 5) {
      EXPECT_EQ(config(at + 4u, 1), 4u) << type;
    }
  }
  PciTransport modern(std::make_unique<Entropy>(ram), {platform, platform}, false);
  EXPECT_EQ(modern.config_read(0, 4), 0x1044'1af4u);
  EXPECT_EQ(modern.config_read(8, 1), 1u);
  EXPECT_EQ(modern.config_read(0x10, 4), 0u);  // no ports
}

TEST_F(PciTransportTest, AddressesAreAssignedInsideTheWindowsAndMayMove) {
  EXPECT_GE(bar(0), layout::pci_ports_base);
  EXPECT_GE(bar(1), layout::pci_mmio_base);
  EXPECT_GE(bar(4), layout::pci_mmio_base);
  EXPECT_LT(bar(4), layout::pci_mmio_end);
  EXPECT_EQ(config(0x3c, 1), layout::pci_gsi(2, 0));
  const auto before = platform.doorbells;
  ASSERT_EQ(before.size(), 2u);  // one for each interface
  set_config(0x24, 4, 0x90);     // BAR 4 to above 4 GiB
  EXPECT_EQ(common(18, 2), 1u);
  EXPECT_EQ(platform.doorbells.size(), 2u);
  const auto found =
      std::ranges::find_if(platform.doorbells, [](const auto& doorbell) { return !doorbell.port; });
  EXPECT_EQ(found->address, part(2));
  set_config(4, 2, 0);  // decoding off: no doorbells either
  EXPECT_TRUE(platform.doorbells.empty());
}

// The guest moves the registers to and fro while one of its processors uses the device and another looks at
// both places: each access finds the device as it is, or nothing.
TEST_F(PciTransportTest, RegistersMoveWhileTheDeviceWorks) {
  enable_msix();
  start(F_VERSION_1 | F_RING_PACKED);
  const uint64_t low = static_cast<uint32_t>(bar(4));
  const std::array<uint64_t, 2> places = {uint64_t{0x90} << 32 | low, uint64_t{0x91} << 32 | low};
  std::jthread other([&](const std::stop_token& stop) {
    while (!stop.stop_requested())
      for (const uint64_t place : places) {
        const uint64_t status = memory_bus.read(place + 20, 1);
        EXPECT_TRUE(status == 15 || status == 0xff) << status;
        memory_bus.write(place + 8, 4, 0);
      }
  });
  for (unsigned i = 0; i < 500; i++) {
    set_config(0x24, 4, 0x90 + i % 2);
    ASSERT_EQ(common(20, 1), 15u);
    ASSERT_EQ(part(2) >> 32, 0x90 + i % 2);
    ASSERT_TRUE(
        std::ranges::any_of(platform.doorbells, [&](const auto& bell) { return bell.address == part(2); }));
    const uint16_t id = queue->submit({{0x90000, 16, true}});
    memory_bus.write(part(2), 2, 0);
    pollfd kicked{function.device().kick_fd(0), POLLIN, 0};
    ASSERT_EQ(::poll(&kicked, 1, 0), 1);
    ASSERT_TRUE(take_event(kicked.fd));
    function.device().kick(0);
    const auto used = queue->used();
    ASSERT_TRUE(used);
    EXPECT_EQ(used->id, id);
    if (i % 50 == 0) {  // off and on again
      set_config(4, 2, 0);
      EXPECT_EQ(common(20, 1), 0xffu);
      EXPECT_TRUE(platform.doorbells.empty());
      set_config(4, 2, 7);
    }
  }
  EXPECT_EQ(platform.messages.size(), 500u);
}

class QuickDevice final : public Device {
 public:
  explicit QuickDevice(machine::GuestMemory& ram)
      : Device({.name = "virtio-quick",
                .type = DeviceType::entropy,
                .pci_class = 0xff0000,
                .features = 0,
                .queue_sizes = {8, 8},
                .quick = true},
               ram) {}
  std::vector<std::pair<unsigned, std::thread::id>> served;

 private:
  void process(unsigned queue) noexcept override { served.emplace_back(queue, std::this_thread::get_id()); }
};

TEST_F(PciTransportTest, AQuickDeviceIsServedByTheVcpuWhereThatIsCheaper) {
  auto owned = std::make_unique<QuickDevice>(ram);
  QuickDevice& quick = *owned;
  platform.cheap_windows = true;
  PciTransport other(std::move(owned), {platform, platform}, true);
  root.add(3, 0, other);
  pci::assign_resources(root);
  EXPECT_EQ(platform.doorbells.size(), 2u);  // of the other device
  testing::FakeDriver driver(quick, ram, 2 * layout::MiB);
  ASSERT_TRUE(driver.start(0));
  const uint64_t slot = layout::ecam_base + (3 << 15);
  const uint64_t modern = (memory_bus.read(slot + 0x20, 4) & ~uint64_t{15}) | memory_bus.read(slot + 0x24, 4)
                                                                                  << 32;
  memory_bus.write(modern + 0x3004, 2, 1);
  ports.write((memory_bus.read(slot + 0x10, 4) & ~uint64_t{15}) + 16, 2, 0);
  EXPECT_THAT(quick.served, ::testing::ElementsAre(std::pair(1u, std::this_thread::get_id()),
                                                   std::pair(0u, std::this_thread::get_id())));
  root.remove(3, 0);
}

TEST_F(PciTransportTest, AModernDriverGetsMessages) {
  enable_msix();
  start(F_VERSION_1 | F_RING_PACKED);
  EXPECT_EQ(common(20, 1), 15u);
  request();
  ASSERT_EQ(platform.messages.size(), 1u);
  EXPECT_EQ(platform.messages[0], std::pair(uint64_t{0xfee0'0000}, uint32_t{0x41}));
  EXPECT_EQ(queue->used()->written, 16u);
  EXPECT_FALSE(lines[layout::pci_gsi(2, 0)].level);
  // Masked: pending, and sent when the mask goes.
  memory_bus.write(bar(1) + 16 + 12, 4, 1);
  request();
  EXPECT_EQ(platform.messages.size(), 1u);
  EXPECT_EQ(memory_bus.read(bar(1) + 0x800, 8), 2u);
  memory_bus.write(bar(1) + 16 + 12, 4, 0);
  EXPECT_EQ(platform.messages.size(), 2u);
  EXPECT_EQ(memory_bus.read(bar(1) + 0x800, 8), 0u);
}

TEST_F(PciTransportTest, WithoutMsixThePinIsRaisedUntilTheIsrIsRead) {
  start(F_VERSION_1);
  request();
  EXPECT_TRUE(lines[layout::pci_gsi(2, 0)].level);
  EXPECT_EQ(memory_bus.read(part(3), 1), 1u);
  EXPECT_FALSE(lines[layout::pci_gsi(2, 0)].level);
  EXPECT_EQ(memory_bus.read(part(3), 1), 0u);
  EXPECT_TRUE(platform.messages.empty());
}

TEST_F(PciTransportTest, ANotificationSignalsTheQueue) {
  start(F_VERSION_1);
  take_event(function.device().kick_fd(0));
  const uint64_t at = part(2) + config(capabilities[2] + 16u, 4) * common(30, 2);
  memory_bus.write(at, 2, 0);
  EXPECT_EQ(take_event(function.device().kick_fd(0)), 1u);
  memory_bus.write(at, 4, 0x8005'0000);  // with notification data
  EXPECT_EQ(take_event(function.device().kick_fd(0)), 1u);
  set_legacy(16, 2, 0);
  EXPECT_EQ(take_event(function.device().kick_fd(0)), 1u);
  set_legacy(16, 2, 1);  // there is no such queue
  memory_bus.write(part(2) + 4, 2, 0);
  EXPECT_EQ(take_event(function.device().kick_fd(0)), 0u);
}

TEST_F(PciTransportTest, QueuesThatAreNotThereReadAsZero) {
  set_common(22, 2, 1);
  EXPECT_EQ(common(24, 2), 0u);
  set_common(24, 2, 8);
  set_common(28, 2, 1);
  EXPECT_EQ(common(28, 2), 0u);
  set_common(22, 2, 0);
  EXPECT_EQ(common(24, 2), 64u);
  set_common(26, 2, 2);  // no such vector
  EXPECT_EQ(common(26, 2), 0xffffu);
  set_common(26, 2, 1);
  EXPECT_EQ(common(26, 2), 1u);
}

TEST_F(PciTransportTest, AResetForgetsEverything) {
  enable_msix();
  start(F_VERSION_1);
  set_common(16, 2, 0);
  set_common(20, 1, 0);
  EXPECT_EQ(common(20, 1), 0u);
  EXPECT_EQ(common(16, 2), 0xffffu);
  set_common(22, 2, 0);
  EXPECT_EQ(common(26, 2), 0xffffu);
  EXPECT_EQ(common(28, 2), 0u);
  EXPECT_EQ(common(32, 8), 0u);
  set_common(8, 4, 1);
  EXPECT_EQ(common(12, 4), 0u);
}

TEST_F(PciTransportTest, ConfigurationAccessWorksThroughTheCapability) {
  const unsigned at = capabilities[5];
  set_config(at + 4, 1, 4);
  set_config(at + 8, 4, 18);  // num_queues
  set_config(at + 12, 4, 2);
  EXPECT_EQ(config(at + 16, 2), 1u);
  set_config(at + 8, 4, 20);
  set_config(at + 12, 4, 1);
  set_config(at + 16, 1, 1);
  EXPECT_EQ(common(20, 1), 1u);
  set_config(at + 8, 4, 0xffff'fffc);  // nowhere
  set_config(at + 12, 4, 4);
  set_config(at + 16, 4, 7);
  set_config(at + 12, 4, 3);  // an impossible size
  config(at + 16, 4);
  EXPECT_EQ(common(20, 1), 1u);
}

TEST_F(PciTransportTest, ALegacyDriverFindsItsRegisters) {
  set_legacy(18, 1, 0);
  set_legacy(18, 1, 3);
  EXPECT_EQ(legacy(0, 4) & F_INDIRECT_DESC, F_INDIRECT_DESC);
  set_legacy(4, 4, 0);
  set_legacy(14, 2, 0);
  EXPECT_EQ(legacy(12, 2), 64u);
  EXPECT_EQ(legacy(8, 4), 0u);
  // 2.7.2: one block, the used ring on the next page.
  queue.emplace(ram, 0x100000, 64, 0);
  queue->setup.driver = 0x100000 + 64 * 16;
  queue->setup.device = 0x101000;
  set_legacy(8, 4, 0x100);
  EXPECT_EQ(legacy(8, 4), 0x100u);
  set_legacy(18, 1, 7);
  EXPECT_EQ(legacy(18, 1), 7u);
  request();
  EXPECT_EQ(queue->used()->written, 16u);
  EXPECT_TRUE(lines[layout::pci_gsi(2, 0)].level);
  EXPECT_EQ(legacy(19, 1), 1u);
  EXPECT_FALSE(lines[layout::pci_gsi(2, 0)].level);
  enable_msix();
  set_legacy(22, 2, 1);
  EXPECT_EQ(legacy(22, 2), 1u);
  request();
  EXPECT_EQ(platform.messages.size(), 1u);
}

TEST_F(PciTransportTest, SavedStateComesBack) {
  enable_msix();
  start(F_VERSION_1 | F_RING_PACKED);
  request();
  ASSERT_TRUE(queue->used());
  PciTransport other(std::make_unique<Entropy>(ram), {platform, platform}, true);
  EXPECT_TRUE(device::testing::round_trip(function, other));
  platform.messages.clear();
  queue->submit({{0x90000, 16, true}});
  other.device().kick(0);
  EXPECT_TRUE(queue->used());
  EXPECT_EQ(platform.messages.size(), 1u);
  nlohmann::json good, after;
  other.save(good);
  auto bad = good;
  bad["function"] = {};
  EXPECT_THROW(other.load(bad), UsageError);
  other.save(after);
  EXPECT_EQ(good, after);
}

}  // namespace
}  // namespace lodge::device::virtio
