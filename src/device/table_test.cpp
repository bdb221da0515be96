#include "device/table.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <deque>
#include <filesystem>
#include <fstream>

#include "base/error.hpp"
#include "base/temporary_directory.hpp"
#include "block/image.hpp"
#include "device/pci/root.hpp"
#include "device/reset.hpp"
#include "device/testing.hpp"
#include "device/virtio/device.hpp"
#include "device/virtio/mmio_slots.hpp"
#include "machine/layout.hpp"

namespace lodge::device {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

class TableTest : public ::testing::Test {
 protected:
  std::string error_of(const std::string& name, const std::map<std::string, std::string>& options) {
    try {
      create_device(context, name, options);
    } catch (const UsageError& error) {
      return error.what();
    }
    return "no error";
  }

  machine::Bus ports{"port", 0x10000};
  machine::Bus memory{"memory", uint64_t{1} << 52};
  machine::GuestMemory ram{machine::layout::MiB};
  FakeClock clock;
  testing::FakePower power;
  std::deque<testing::FakeInterrupt> lines{24};
  ResetControl reset{power};
  pci::Root pci{ports, memory, [this](unsigned gsi) -> machine::Interrupt& { return lines.at(gsi); }, reset};
  testing::FakePlatform platform;
  EventLoop loop{"test"};
  std::shared_ptr<testing::FakeBackend> backend = std::make_shared<testing::FakeBackend>();
  DeviceContext context{ports,
                        memory,
                        ram,
                        clock,
                        power,
                        [this](unsigned gsi) -> machine::Interrupt& { return lines.at(gsi); },
                        [this](const std::string&, const std::string&, bool) { return backend; },
                        nullptr,
                        nullptr,
                        &pci,
                        nullptr,
                        platform,
                        platform,
                        loop};
};

// On a machine without PCI the same rows give devices behind MMIO.
TEST_F(TableTest, VirtioDevicesGoWhereTheMachineHasRoomForThem) {
  virtio::MmioSlots slots([this](unsigned gsi) -> machine::Interrupt& { return lines.at(gsi); });
  context.virtio_mmio = &slots;
  context.pci = nullptr;
  const uint64_t base = machine::layout::virtio_mmio_base;
  EXPECT_THAT(error_of("virtio-rng", {{"addr", "5"}}), AllOf(HasSubstr("slot=5"), HasSubstr("--machine pc")));
  EXPECT_THAT(error_of("virtio-rng", {{"legacy", "on"}}), AllOf(HasSubstr("legacy=on"), HasSubstr("no PCI")));
  {
    const auto first = create_device(context, "virtio-rng", {});
    const auto second = create_device(context, "virtio-balloon", {});
    EXPECT_EQ(memory.read(base, 4), 0x7472'6976u);
    EXPECT_EQ(memory.read(base + 8, 4), 4u);
    EXPECT_EQ(memory.read(base + 0x1000 + 8, 4), 5u);
    EXPECT_EQ(platform.doorbells.size(), 1u + 5u);
  }
  EXPECT_EQ(memory.read(base, 4), 0xffff'ffffu);
  EXPECT_TRUE(platform.doorbells.empty());
}

TEST_F(TableTest, DebugExitSitsWhereItIsToldAndLeavesWithItsObject) {
  {
    auto device = create_device(context, "isa-debug-exit", {{"port", "0xf4"}});
    ports.write(0xf4, 1, 3);
    EXPECT_EQ(power.exit_status, 7);
  }
  EXPECT_TRUE(ports.describe().empty());
}

TEST_F(TableTest, TheSpellingsOfQemuAreAccepted) {
  auto device = create_device(context, "isa-debug-exit", {{"iobase", "244"}, {"iosize", "0x4"}});
  EXPECT_EQ(ports.describe().at(0), "0xf4-0xf7 isa-debug-exit");
}

TEST_F(TableTest, DebugConsolePrints) {
  auto device = create_device(context, "debugcon", {});
  ports.write(0xe9, 1, 'x');
  EXPECT_EQ(backend->output, "x");
}

TEST_F(TableTest, TestdevAnswersOnItsPortsAndInMemory) {
  auto device = create_device(context, "pc-testdev", {});
  ports.write(0xe0, 4, 0x12345678);
  EXPECT_EQ(ports.read(0xe8, 1), 0x78u);
  memory.write(0xff00'0010, 8, 42);
  EXPECT_EQ(memory.read(0xff00'0010, 8), 42u);
  ports.write(0x2003, 1, 1);
  EXPECT_TRUE(lines[3].level);
  ASSERT_NE(device->savable(), nullptr);
}

TEST_F(TableTest, AnUnknownDeviceListsTheKnownOnes) {
  EXPECT_THAT(error_of("floppy", {}),
              AllOf(HasSubstr("floppy"), HasSubstr("isa-debug-exit"), HasSubstr("pc-testdev")));
}

TEST_F(TableTest, AnUnknownOptionListsTheKnownOnes) {
  EXPECT_THAT(error_of("isa-debug-exit", {{"prot", "1"}}),
              AllOf(HasSubstr("isa-debug-exit"), HasSubstr("prot"), HasSubstr("port, size")));
  EXPECT_THAT(error_of("pc-testdev", {{"a", "1"}}), AllOf(HasSubstr("'a'"), HasSubstr("no options")));
}

TEST_F(TableTest, ABadNumberNamesOptionValueAndRange) {
  for (const char* bad : {"", "x", "0x", "0x10000", "-1", "12z"})
    EXPECT_THAT(error_of("isa-debug-exit", {{"port", bad}}), AllOf(HasSubstr("port="), HasSubstr("0xffff")))
        << bad;
}

TEST_F(TableTest, ALimitIsAnAmountAndABurstNeedsOne) {
  for (const char* bad : {"", "x", "5X", "1KB", "-1", "18446744073709551615K"})
    EXPECT_THAT(error_of("virtio-blk", {{"file", "f"}, {"bps", bad}}), HasSubstr("bps=")) << bad;
  EXPECT_THAT(error_of("virtio-blk", {{"file", "f"}, {"iops-burst", "5"}}), HasSubstr("iops="));
  const auto [row, options] = check_device("virtio-blk", {{"bps", "3m"}, {"iops", "1000"}});
  EXPECT_EQ(options.amount("bps"), 3u << 20);
  EXPECT_EQ(options.amount("iops"), 1000u);
}

TEST_F(TableTest, ADiskHasAQueueForEachProcessor) {
  const TemporaryDirectory directory;
  const std::string file = directory / "disk.raw";
  std::ofstream(file).close();
  std::filesystem::resize_file(file, 1 << 20);
  context.open_disk = [](const std::string& path, const block::OpenOptions& options) {
    return std::shared_ptr<block::Image>(block::open_image(path, options));
  };
  const auto queues = [&](unsigned cpus, std::map<std::string, std::string> options) {
    context.cpus = cpus;
    options.insert({{"file", file}, {"format", "raw"}});
    return create_device(context, "virtio-blk", options)->virtio_device()->queues();
  };
  EXPECT_EQ(queues(1, {}), 1u);
  EXPECT_EQ(queues(3, {}), 3u);
  EXPECT_EQ(queues(64, {}), 16u);
  EXPECT_EQ(queues(3, {{"queues", "2"}}), 2u);
}

TEST_F(TableTest, TwoDevicesOnOnePortAreRefusedByName) {
  auto device = create_device(context, "debugcon", {});
  EXPECT_THAT(error_of("isa-debug-exit", {{"port", "0xe8"}}),
              AllOf(HasSubstr("isa-debug-exit"), HasSubstr("debugcon")));
}

TEST(DeviceTable, EveryRowIsDescribedAndItsDefaultsAreValidOnTheirOwn) {
  for (const auto& row : device_table()) {
    EXPECT_FALSE(row.help.empty()) << row.name;
    for (const auto& option : row.options)
      EXPECT_FALSE(option.help.empty()) << row.name << "," << option.name;
    EXPECT_EQ(check_device(std::string(row.name), {}).first, &row);
  }
}

}  // namespace
}  // namespace lodge::device
