// Work that checks itself, in Debian's kernel on two processors: stress-ng's methods with --verify, and a
// compiler whose output has the same bytes as on the host. And every block of a boot by both tiers.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <sstream>

#include "system/guest.hpp"

namespace lodge {
namespace {

// For a loaded machine: an idle one needs a tenth of it.
constexpr Seconds patience(900), lockstep_patience(3500);

std::string guest(const std::string& name) {
  return std::string(LODGE_GUESTS) + "/" + name;
}

// What LODGE_STRESS_SECONDS says, 60 without it: two minutes in all.
unsigned seconds() {
  const char* given = std::getenv("LODGE_STRESS_SECONDS");
  return given != nullptr ? static_cast<unsigned>(std::atoi(given)) : 60;
}

std::vector<std::string> command(const std::string& initramfs, const std::string& append,
                                 std::vector<std::string> more) {
  std::vector<std::string> all = {LODGE_BINARY,
                                  "run",
                                  "--accel",
                                  accelerator(),
                                  "--no-reboot",
                                  "--kernel",
                                  guest("cloud") + "/vmlinuz",
                                  "--initrd",
                                  initramfs,
                                  "--append",
                                  append};
  all.insert(all.end(), more.begin(), more.end());
  return all;
}

class Stress : public testing::Test {
 protected:
  void SetUp() override {
    for (const char* name : {"cloud", "stress"})
      if (!std::filesystem::exists(guest(name)))
        GTEST_SKIP() << "guest '" << name << "' is not there: run scripts/fetch-guests";
  }

  // What the guest printed in `mode`; its work succeeded.
  static std::string work(const std::string& mode, Seconds at_most) {
    Process process(command(guest("stress") + "/initramfs", "console=ttyS0 quiet panic=-1 lodge.mode=" + mode,
                            {"--memory", "1G", "--cpus", "2"}));
    EXPECT_EQ(process.wait_exit(at_most), 0) << process.out() << process.err();
    EXPECT_THAT(process.out(), HasSubstr("lodge-guest: status 0"));
    EXPECT_THAT(process.out(), HasSubstr("lodge-guest: powering off"));
    return process.out();
  }

  static void stress(const std::string& methods) {
    const std::string out =
        work(methods + " lodge.seconds=" + std::to_string(seconds()), patience + Seconds(seconds()));
    EXPECT_THAT(out, HasSubstr("successful run completed")) << out;
    // A failed check makes stress-ng fail as well; this says which.
    EXPECT_THAT(out, testing::Not(HasSubstr("fail"))) << out;
    EXPECT_THAT(out, testing::Not(HasSubstr("lodge-guest: kernel log"))) << out;
  }
};

TEST_F(Stress, CpuMemoryAndFutexMethodsAgree) {
  stress("stress");
}

TEST_F(Stress, SignalsArrive) {
  stress("signals");
}

// The lines of compile.sh.
std::string compiled(const std::string& output) {
  std::string lines;
  std::istringstream in(output);
  for (std::string line; std::getline(in, line);) {
    if (!line.empty() && line.back() == '\r') line.pop_back();
    if (line.starts_with("compile: ")) lines += line + "\n";
  }
  return lines;
}

TEST_F(Stress, TheCompilerBuildsTheSameBytesAsHere) {
  const TemporaryDirectory here;
  const testing_support::Result native = testing_support::run(
      {"/bin/sh", LODGE_STRESS "/compile.sh", guest("stress") + "/root", here.path()}, patience);
  ASSERT_EQ(native.status, 0) << native.err;
  const std::string wanted = compiled(native.out);
  ASSERT_EQ(std::count(wanted.begin(), wanted.end(), '\n'), 5 * 4);  // levels, files
  EXPECT_EQ(compiled(work("compile", patience)), wanted);
}

TEST(Lockstep, LockstepToUserland) {
  if (!std::filesystem::exists(guest("cloud")))
    GTEST_SKIP() << "guest 'cloud' is not there: run scripts/fetch-guests";
  Process process(command(guest("cloud") + "/initramfs", "console=ttyS0 quiet lodge.mode=off",
                          {"--memory", "256M", "--engine", "lockstep"}));
  EXPECT_EQ(process.wait_exit(lockstep_patience), 0) << process.out() << process.err();
  EXPECT_THAT(process.out(), HasSubstr("lodge-guest: userland after"));
  EXPECT_THAT(process.out(), HasSubstr("lodge-guest: powering off"));
}

}  // namespace
}  // namespace lodge
