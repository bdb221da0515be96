// The whole machine's registers from several threads at once, as the vCPUs of a guest and the user would: for
// the thread sanitizer, which sees a chip that forgets its lock or takes locks in another order than its
// neighbour.
#include "vm/machine.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <barrier>
#include <cstdio>
#include <filesystem>
#include <random>
#include <thread>

#include "base/temporary_directory.hpp"
#include "device/watchdog.hpp"
#include "kvm/soft/soft.hpp"
#include "machine/boot/test_kernels.hpp"
#include "machine/layout.hpp"
#include "vm/virtual_machine.hpp"

namespace lodge::vm {
namespace {

namespace kernels = machine::boot::test_kernels;

class CountingPower final : public machine::Power {
 public:
  void request(machine::PowerRequest) noexcept override { ++requests; }
  void exit_with(int) noexcept override { ++requests; }
  std::atomic<unsigned> requests = 0;
};

struct Window {
  machine::Bus* bus;
  uint64_t base, size;
  unsigned widest;
};

// What is registered on the bus, by its own description: a chip that is added is tested as well.
void add_windows(std::vector<Window>& windows, machine::Bus& bus, unsigned widest) {
  for (const std::string& line : bus.describe()) {
    unsigned long long first = 0, last = 0;
    ASSERT_EQ(std::sscanf(line.c_str(), "%llx-%llx", &first, &last), 2) << line;
    windows.push_back({&bus, first, last - first + 1, widest});
  }
}

// The registers that the threads meet in at this step: eight bytes of the window.
uint64_t meeting_point(const Window& window, unsigned step) {
  constexpr uint64_t busy_part = 0x200;  // of the HPET and of a PCI function: further on there is nothing
  return std::mt19937(step)() % std::min(window.size, busy_part) & ~uint64_t{7};
}

void access_near(const Window& window, uint64_t begin, std::mt19937& random) {
  const unsigned width = std::min(1u << random() % 4, window.widest);
  uint64_t offset = begin + random() % std::min<uint64_t>(window.size - begin, 8);
  if (random() % 4 != 0) offset &= ~uint64_t{width - 1};  // many registers answer only so
  if (random() % 2 == 0)
    window.bus->read(window.base + offset, width);
  else
    window.bus->write(window.base + offset, width, uint64_t{random()} << 32 | random());
}

class MachineThreads : public testing::TestWithParam<MachineType> {};

INSTANTIATE_TEST_SUITE_P(Machines, MachineThreads, testing::Values(MachineType::pc, MachineType::micro),
                         [](const auto& test) { return test.param == MachineType::pc ? "Pc" : "Micro"; });

TEST_P(MachineThreads, AllRegistersAnswerSeveralProcessorsAtOnce) {
  constexpr unsigned threads = 3, rounds = 50, accesses = 20;
  constexpr uint64_t kernel_at = 1 << 20;
  const kernels::TemporaryFile kernel(
      kernels::elf64({.paddr = kernel_at, .vaddr = kernel_at, .entry = kernel_at}));
  const kernels::TemporaryFile disk(std::vector<uint8_t>(1 << 20));
  VmConfig config{.kernel = kernel.path, .cpus = 2, .memory = 16 << 20, .cpu = "host"};
  config.machine = GetParam();
  config.serial.assign(GetParam() == MachineType::pc ? 4 : 1, {SerialConfig::Kind::null, {}});
  const TemporaryDirectory directory;
  config.devices = {{"debugcon", {{"output", "null"}}},
                    {"isa-debug-exit", {}},
                    {"pvpanic", {}},
                    {"pc-testdev", {}},
                    {"virtio-rng", {}},
                    {"virtio-balloon", {}},
                    {"virtio-net", {}},
                    {"virtio-blk", {{"file", disk.path}}},
                    {"virtio-console", {{"console", "null"}}},
                    {"virtio-keyboard", {}},
                    {"virtio-tablet", {}},
                    {"virtio-vsock", {{"path", directory / "socket"}}},
                    {"virtio-fs", {{"path", directory.path()}, {"tag", "tag"}, {"readonly", "on"}}}};
  if (GetParam() == MachineType::pc) {
    config.devices.push_back({"virtio-rng", {{"bus", "port"}}});
    for (const char* id : {"port", "slot"}) config.devices.push_back({"pcie-root-port", {{"id", id}}});
  }

  const auto system = kvm::soft::open();
  Backends backends(config.serial, {});
  RealClock clock;
  CountingPower power;
  Machine machine(config, *system, clock, backends, power);
  std::vector<Window> windows;
  add_windows(windows, machine.ports(), 4);
  add_windows(windows, machine.mmio(), 8);
  ASSERT_GE(windows.size(), GetParam() == MachineType::pc ? 25u : 12u);

  {
    // All threads in the same few registers for a short time, then in the next ones: the locks of other chips
    // would order their accesses, and a thread that runs alone races with nobody.
    const auto steps = rounds * static_cast<unsigned>(windows.size());
    std::barrier<> next_step(threads);
    std::vector<std::jthread> running;
    for (unsigned seed = 0; seed < threads; ++seed)
      running.emplace_back([&, seed] {
        std::mt19937 random(seed);
        for (unsigned step = 0; step < steps; ++step) {
          const Window& window = windows[step % windows.size()];
          const uint64_t begin = meeting_point(window, step);
          next_step.arrive_and_wait();
          for (unsigned n = 0; n < accesses; ++n) access_near(window, begin, random);
        }
      });
    running.emplace_back([&] {
      for (unsigned i = 0; i < rounds; ++i) {
        machine.press_power_button();
        if (GetParam() == MachineType::pc) {
          machine.plug({"virtio-rng", {{"bus", "slot"}}});
          machine.ask_to_let_go("slot");
          machine.pull_leaving();  // if the guest has not let go what it was asked for
          machine.take_released();
        }
        backends.serial(i % backends.serial_ports()).receive_ready();
        std::this_thread::yield();
      }
    });
  }
  EXPECT_GT(power.requests, 0u);
  // The chips still work: the scratch register of a serial port keeps what is written.
  machine.ports().write(machine::layout::serial_ports[0] + 7, 1, 0x5a);
  EXPECT_EQ(machine.ports().read(machine::layout::serial_ports[0] + 7, 1), 0x5au);
}

TEST(MachineDisks, AreFoundByNameAndGrow) {
  constexpr uint64_t kernel_at = 1 << 20, size = 1 << 20;
  const kernels::TemporaryFile kernel(
      kernels::elf64({.paddr = kernel_at, .vaddr = kernel_at, .entry = kernel_at}));
  const std::vector<uint8_t> empty(size);
  const kernels::TemporaryFile first(empty), second(empty), third(empty);
  VmConfig config{.kernel = kernel.path, .memory = 16 << 20, .cpu = "host"};
  config.serial.assign(1, {SerialConfig::Kind::null, {}});
  config.devices = {{"virtio-blk", {{"file", first.path}}},
                    {"virtio-rng", {}},
                    {"virtio-blk", {{"file", second.path}, {"id", "data"}, {"readonly", "on"}}},
                    {"virtio-blk", {{"file", third.path}}}};
  VirtualMachine machine(config, kvm::soft::open(), std::make_unique<Backends>(config.serial, nullptr));
  EXPECT_EQ(machine.resize_disk("disk1", 2 * size), 0);
  EXPECT_EQ(std::filesystem::file_size(third.path), 2 * size);
  EXPECT_EQ(std::filesystem::file_size(first.path), size);
  EXPECT_EQ(machine.resize_disk("disk0", size / 2), EINVAL);
  EXPECT_EQ(machine.resize_disk("data", 2 * size), EROFS);
  EXPECT_EQ(machine.resize_disk("disk2", 2 * size), ENODEV);
}

// The guest cannot ask for more time while it stands still, so the watchdog must not count meanwhile.
TEST(MachinePause, TheWatchdogWaitsToo) {
  using device::Watchdog;
  constexpr uint64_t kernel_at = 1 << 20;
  const kernels::TemporaryFile kernel(
      kernels::elf64({.paddr = kernel_at, .vaddr = kernel_at, .entry = kernel_at}));
  VmConfig config{.kernel = kernel.path, .memory = 16 << 20, .cpu = "host"};
  config.serial.assign(1, {SerialConfig::Kind::null, {}});
  config.devices = {{"watchdog", {{"action", "none"}}}};
  VirtualMachine machine(config, kvm::soft::open(), std::make_unique<Backends>(config.serial, nullptr));
  const auto status = [&] {
    uint64_t value = 0;
    machine.with_machine(
        [&](Machine& present) { value = present.ports().read(Watchdog::ports + Watchdog::STATUS, 4); });
    return value;
  };
  machine.pause();
  machine.with_machine([](Machine& present) {
    present.ports().write(Watchdog::ports + Watchdog::COUNT, 4, 1);  // a tenth of a second
    present.ports().write(Watchdog::ports + Watchdog::CONTROL, 4, Watchdog::RUN);
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  EXPECT_EQ(status(), 0u);
  machine.resume();
  for (int i = 0; i < 6000 && status() == 0; i++) std::this_thread::sleep_for(std::chrono::milliseconds(10));
  EXPECT_EQ(status(), Watchdog::FIRED);
}

}  // namespace
}  // namespace lodge::vm
