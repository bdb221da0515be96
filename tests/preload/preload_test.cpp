// liblodge-kvm.so from outside: a small client, and QEMU, under `lodge kvm`.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "support/process.hpp"

namespace lodge {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using testing_support::Process;
using testing_support::run;
using testing_support::Seconds;

constexpr Seconds patience(120), boot_patience(600);

class Preload : public testing::TestWithParam<const char*> {};

TEST_P(Preload, ClientIsServed) {
  const auto result = run({LODGE_BINARY, "kvm", "--", LODGE_KVM_CLIENT, GetParam()}, patience);
  EXPECT_EQ(result.status, 0) << result.err;
}

TEST_P(Preload, ClientIsServedByTheInterpreter) {
  const auto result =
      run({LODGE_BINARY, "kvm", "--engine", "interpret", "--", LODGE_KVM_CLIENT, GetParam()}, patience);
  EXPECT_EQ(result.status, 0) << result.err;
}

INSTANTIATE_TEST_SUITE_P(All, Preload,
                         testing::Values("run", "descriptors", "fork", "writes", "signal", "mask",
                                         "immediate", "kick", "leaks"),
                         [](const auto& test) { return std::string(test.param); });

TEST(KvmCheck, AcceptsADynamicallyLinkedProgram) {
  const auto result = run({LODGE_BINARY, "kvm", "--check", "--", LODGE_KVM_CLIENT}, patience);
  EXPECT_EQ(result.status, 0) << result.err;
  EXPECT_THAT(result.out, HasSubstr("soft accelerator"));
}

TEST(KvmCheck, RefusesAStaticProgram) {
  const auto result = run({LODGE_BINARY, "kvm", "--check", "--", LODGE_STATIC_PROGRAM}, patience);
  EXPECT_EQ(result.status, 2);
  EXPECT_THAT(result.err, AllOf(HasSubstr("statically linked"), HasSubstr(LODGE_STATIC_PROGRAM)));
}

TEST(KvmCheck, RefusesASetUserIdProgramOfAnother) {
  if (::geteuid() != 0) GTEST_SKIP() << "making a file of another user's needs root";
  const std::filesystem::path program =
      std::filesystem::temp_directory_path() / ("lodge-setuid-" + std::to_string(::getpid()));
  std::filesystem::copy_file(LODGE_KVM_CLIENT, program);
  ASSERT_EQ(::chown(program.c_str(), 65534, 65534), 0);
  ASSERT_EQ(::chmod(program.c_str(), 04755), 0);
  const auto result = run({LODGE_BINARY, "kvm", "--check", "--", program.string()}, patience);
  std::filesystem::remove(program);
  EXPECT_EQ(result.status, 2);
  EXPECT_THAT(result.err, HasSubstr("set-user-ID"));
}

TEST(KvmCheck, RefusesASandboxOfQemus) {
  const auto result =
      run({LODGE_BINARY, "kvm", "--check", "--", LODGE_KVM_CLIENT, "-sandbox", "on"}, patience);
  EXPECT_EQ(result.status, 2);
  EXPECT_THAT(result.err, HasSubstr("seccomp"));
}

TEST(KvmCheck, NamesAProgramThatIsNotThere) {
  const auto result = run({LODGE_BINARY, "kvm", "--", "no-such-program"}, patience);
  EXPECT_EQ(result.status, 2);
  EXPECT_THAT(result.err, HasSubstr("no-such-program"));
}

// Debian's cloud kernel by SeaBIOS and QEMU's own devices, to userland and power-off.
class Qemu : public testing::Test {
 protected:
  static void boot(const std::string& machine, const std::string& accel, const std::string& cpus) {
    const std::string guest = std::string(LODGE_GUESTS) + "/cloud";
    if (!std::filesystem::exists(guest + "/vmlinuz"))
      GTEST_SKIP() << "guest 'cloud' is not there: run scripts/fetch-guests";
    Process process({LODGE_BINARY, "kvm",
                     "--",         "qemu-system-x86_64",
                     "-accel",     "kvm" + accel,
                     "-machine",   machine,
                     "-smp",       cpus,
                     "-m",         "512M",
                     "-nographic", "-no-reboot",
                     "-kernel",    guest + "/vmlinuz",
                     "-initrd",    guest + "/initramfs",
                     "-append",    "console=ttyS0 quiet panic=-1 lodge.mode=report"});
    EXPECT_TRUE(process.wait_output("lodge-guest: powering off", boot_patience))
        << process.out() << process.err();
    EXPECT_EQ(process.wait_exit(patience), 0) << process.out() << process.err();
    EXPECT_THAT(process.out(), HasSubstr("CPU:    " + cpus));
  }
};

TEST_F(Qemu, BootsWithTwoCpusAndTheWholeIrqchip) {
  boot("pc", "", "2");
}
TEST_F(Qemu, BootsWithTheSplitIrqchip) {
  boot("q35", ",kernel-irqchip=split", "1");
}
TEST_F(Qemu, BootsWithoutAnIrqchip) {
  boot("pc", ",kernel-irqchip=off", "1");
}

}  // namespace
}  // namespace lodge
