// What tests that boot whole systems have in common.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "base/temporary_directory.hpp"
#include "support/process.hpp"

namespace lodge {

using testing::HasSubstr;
using testing_support::Process;
using testing_support::Seconds;

// For a loaded machine with sanitizers: an idle one needs a tenth of it.
inline constexpr Seconds boot_patience(600), answer_patience(60);
inline constexpr const char* userland = "lodge-guest: userland after";

// What LODGE_TEST_ACCEL says, soft without it. With kvm the program is started under `lodge kvm` where the
// host's own /dev/kvm boots no kernel: those that it starts see the preload library's.
inline std::string accelerator() {
  const char* given = std::getenv("LODGE_TEST_ACCEL");
  return given != nullptr ? given : "soft";
}

class Boot : public testing::Test {
 protected:
  // The directory of a guest that scripts/fetch-guests has fetched; skips the test when it is not there.
  static std::string guest(const std::string& name) { return std::string(LODGE_GUESTS) + "/" + name; }
  static bool missing(const std::string& name) { return !std::filesystem::exists(guest(name)); }

  static std::vector<std::string> command(const std::string& name, const std::string& append,
                                          std::vector<std::string> more = {}) {
    std::vector<std::string> arguments = {LODGE_BINARY,
                                          "run",
                                          "--accel",
                                          accelerator(),
                                          "--no-reboot",
                                          "--kernel",
                                          guest(name) + "/vmlinuz",
                                          "--initrd",
                                          guest(name) + "/initramfs",
                                          "--append",
                                          append};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
  }

  // Boots to userland, lets the guest report and power off, and returns what it printed.
  static std::string report(const std::string& name, std::vector<std::string> more) {
    Process process(command(name, "console=ttyS0 quiet lodge.mode=report", std::move(more)));
    EXPECT_TRUE(process.wait_output(userland, boot_patience)) << process.out() << process.err();
    EXPECT_EQ(process.wait_exit(answer_patience), 0) << process.out() << process.err();
    EXPECT_THAT(process.out(), HasSubstr("lodge-guest: powering off"));
    return process.out();
  }
};

#define NEEDS_GUEST(name) \
  if (missing(name)) GTEST_SKIP() << "guest '" << (name) << "' is not there: run scripts/fetch-guests"

}  // namespace lodge
