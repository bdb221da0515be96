// The life cycle of VMs inside one process, through the library and not through the command.
#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <thread>

#include "base/temporary_directory.hpp"
#include "vm/accelerator.hpp"
#include "vm/virtual_machine.hpp"

namespace lodge::vm {
namespace {

using namespace std::chrono_literals;

class Life : public testing::TestWithParam<Accelerator> {
 protected:
  void SetUp() override {
    if (GetParam() == Accelerator::kvm && ::access("/dev/kvm", R_OK | W_OK) != 0)
      GTEST_SKIP() << "no usable /dev/kvm";
  }

  std::string output(const std::string& name) const { return dir_ / name; }
  std::unique_ptr<VirtualMachine> machine(const std::string& name, const std::string& action) {
    VmConfig config;
    config.name = name;
    config.kernel = LODGE_GUEST;
    config.append = action;
    config.memory = 16 << 20;
    config.reboot = false;
    config.serial = {{SerialConfig::Kind::file, output(name)}};
    auto backends = std::make_unique<Backends>(config.serial, Stream::Filter{});
    return std::make_unique<VirtualMachine>(config, open_accelerator(GetParam()).system, std::move(backends));
  }
  // Waits for a condition that a machine brings about; false after a minute.
  static bool eventually(const std::function<bool()>& condition) {
    for (int i = 0; i < 6000; i++) {
      if (condition()) return true;
      std::this_thread::sleep_for(10ms);
    }
    return false;
  }

  TemporaryDirectory dir_;
};

TEST_P(Life, TwoMachinesLiveInOneProcess) {
  auto first = machine("first", "o"), second = machine("second", "r");
  Ending endings[2];
  std::thread other([&] { endings[0] = first->run(); });
  endings[1] = second->run();
  other.join();
  EXPECT_EQ(endings[0].exit_status(), 0);
  EXPECT_EQ(endings[1].exit_status(), 4);
  EXPECT_EQ(std::filesystem::file_size(output("first")), 6u);  // "hello\n"
}

TEST_P(Life, PauseHoldsTheProcessorsAndResumeLetsThemGoOn) {
  auto vm = machine("spam", "s");
  std::thread runner([&] { vm->run(); });
  const auto size = [&] { return std::filesystem::file_size(output("spam")); };
  EXPECT_TRUE(eventually([&] { return size() > 100; }));
  vm->pause();
  // The stream writes out what it holds; then the file must stand still.
  uintmax_t last = 0;
  EXPECT_TRUE(eventually([&] {
    const auto before = size();
    std::this_thread::sleep_for(300ms);
    last = size();
    return last == before;
  }));
  std::this_thread::sleep_for(300ms);
  EXPECT_EQ(size(), last);
  vm->resume();
  EXPECT_TRUE(eventually([&] { return size() > last; }));
  vm->end();
  runner.join();
}

TEST_P(Life, AnEndBeforeTheStartIsNotForgotten) {
  auto vm = machine("halted", "h");
  vm->end();
  EXPECT_EQ(vm->run().cause, Ending::Cause::outside);
}

TEST_P(Life, APausedMachineCanBeEnded) {
  auto vm = machine("paused", "h");
  vm->pause();
  std::thread runner([&] { EXPECT_EQ(vm->run().cause, Ending::Cause::outside); });
  vm->end();
  runner.join();
}

INSTANTIATE_TEST_SUITE_P(Accelerators, Life, testing::Values(Accelerator::kvm, Accelerator::soft),
                         [](const auto& p) { return std::string(name_of(p.param)); });

}  // namespace
}  // namespace lodge::vm
