// Whole systems, unmodified, under the soft accelerator or the host's: driven from outside through the
// command and its serial port.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <regex>
#include <sstream>

#include "system/guest.hpp"

namespace lodge {
namespace {

TEST_F(Boot, CloudKernelWithOneCpu) {
  NEEDS_GUEST("cloud");
  const std::string out = report("cloud", {"--memory", "512M"});
  EXPECT_THAT(out, HasSubstr("cloud-amd64"));
  EXPECT_THAT(out, HasSubstr("CPU:    1 x"));
  EXPECT_THAT(out, testing::ContainsRegex("Memory: 4[0-9]{5} kB"));
}

TEST_F(Boot, CloudKernelWithTwoCpus) {
  NEEDS_GUEST("cloud");
  EXPECT_THAT(report("cloud", {"--memory", "512M", "--cpus", "2"}), HasSubstr("CPU:    2 x"));
}

TEST_F(Boot, CloudKernelOnTheOldestProcessorModel) {
  NEEDS_GUEST("cloud");
  EXPECT_THAT(report("cloud", {"--memory", "256M", "--cpu", "x86-64-v1"}),
              HasSubstr("Lodge x86-64-v1 processor"));
}

TEST_F(Boot, I686Kernel) {
  NEEDS_GUEST("i686");
  EXPECT_THAT(report("i686", {"--memory", "256M"}), HasSubstr("i686"));
}

double cpu_seconds(pid_t pid) {
  std::ifstream stat("/proc/" + std::to_string(pid) + "/stat");
  std::string text((std::istreambuf_iterator<char>(stat)), {});
  std::istringstream fields(text.substr(text.rfind(')') + 2));
  std::string skip;
  double user = 0, system = 0;
  for (int i = 0; i < 11; i++) fields >> skip;
  fields >> user >> system;
  return (user + system) / static_cast<double>(::sysconf(_SC_CLK_TCK));
}

TEST_F(Boot, ShellAnswersAndAnIdleGuestCostsNoCpu) {
  NEEDS_GUEST("cloud");
  Process process(command("cloud", "console=ttyS0 quiet lodge.mode=shell", {"--memory", "512M"}));
  ASSERT_TRUE(process.wait_output("This is a shell in the guest.", boot_patience))
      << process.out() << process.err();
  process.send("echo answer=$((6*7))\n");
  ASSERT_TRUE(process.wait_output("answer=42", answer_patience)) << process.out();
  ::sleep(2);  // what the kernel does after boot settles
  const double before = cpu_seconds(process.pid());
  ::sleep(5);
  // The guest's own periodic work (RCU, the tick of a running shell) stays below a tenth of one CPU.
  EXPECT_LT(cpu_seconds(process.pid()) - before, 0.5);
  process.send("poweroff -f\n");
  EXPECT_EQ(process.wait_exit(answer_patience), 0) << process.out() << process.err();
}

TEST_F(Boot, KernelLogHasNoComplaints) {
  NEEDS_GUEST("cloud");
  Process process(command("cloud", "console=ttyS0 lodge.mode=off", {"--memory", "512M", "--cpus", "2"}));
  ASSERT_TRUE(process.wait_output(userland, boot_patience)) << process.out() << process.err();
  EXPECT_EQ(process.wait_exit(answer_patience), 0);
  const std::regex complaint("Unknown|BUG|WARNING|firmware bug|unexpected|Call Trace", std::regex::icase);
  // Lines that QEMU shows as well, and the answers that Linux gives on Intel models in any virtual machine
  // (docs/boot-log.md).
  const std::regex also_there("use \"pci=nocrs\" and report a bug|(SRBDS|GDS|MMIO Stale Data): Unknown");
  std::istringstream lines(process.out());
  for (std::string line; std::getline(lines, line);) {
    if (std::regex_search(line, complaint) && !std::regex_search(line, also_there)) ADD_FAILURE() << line;
  }
  // The help that the accelerator offers is taken.
  EXPECT_THAT(process.out(), HasSubstr("kvm-guest: PV spinlocks enabled"));
  EXPECT_THAT(process.out(), HasSubstr("kvm-guest: setup PV IPIs"));
  if (std::ifstream("/proc/thread-self/schedstat")) {  // where the host tells of steal time
    EXPECT_THAT(process.out(), HasSubstr("kvm-guest: KVM setup pv remote TLB flush"));
    EXPECT_THAT(process.out(), HasSubstr("kvm-guest: setup PV sched yield"));
  }
}

// memtest86+ draws a screen; the number of the running test is at line 4, column 35.
TEST_F(Boot, MemtestFinishesItsFirstTest) {
  NEEDS_GUEST("memtest");
  Process process({LODGE_BINARY, "run", "--accel", accelerator(), "--no-reboot", "--memory", "16M",
                   "--kernel", guest("memtest") + "/memtest86+x64.bin", "--append",
                   "console=ttyS0,115200 nosmp"});
  ASSERT_TRUE(process.wait_output("Memtest86+", boot_patience)) << process.out() << process.err();
  ASSERT_TRUE(process.wait_output("\x1b[4;35H #0", boot_patience)) << process.out();
  const std::regex later("\x1b\\[4;35H #[1-9]");
  const auto end = std::chrono::steady_clock::now() + boot_patience;
  while (!std::regex_search(process.out(), later)) {
    ASSERT_LT(std::chrono::steady_clock::now(), end) << process.out();
    process.wait_output("\x1b[4;35H #1", Seconds(5));
  }
  EXPECT_THAT(process.out(), HasSubstr("Errors: 0"));
  EXPECT_FALSE(std::regex_search(process.out(), std::regex("Errors: [1-9]")));
  process.signal(SIGQUIT);
  EXPECT_EQ(process.wait_exit(answer_patience), 10);
}

}  // namespace
}  // namespace lodge
