// liblodge-kvm.so from outside: a small client under `lodge kvm`.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>

#include "base/temporary_directory.hpp"
#include "support/process.hpp"

namespace lodge {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using testing_support::run;
using testing_support::Seconds;

constexpr Seconds patience(120);

class Preload : public testing::TestWithParam<const char*> {
 protected:
  // What malloc keeps for a thread counts as allocated, and is as much as all that the test for leaks allows.
  static void SetUpTestSuite() { ::setenv("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0", 1); }
};

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
                         testing::Values("run", "descriptors", "fork", "writes", "vectors", "protection",
                                         "mappings", "generic", "handler", "signal", "mask", "alarm",
                                         "blocked", "immediate", "kick", "unblocked", "cancel",
                                         "cancel_later", "arguments", "leaks", "coalesced", "uring"),
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
  const TemporaryDirectory directory;
  const std::string program = directory / "program";
  std::filesystem::copy_file(LODGE_KVM_CLIENT, program);
  ASSERT_EQ(::chown(program.c_str(), 65534, 65534), 0);
  ASSERT_EQ(::chmod(program.c_str(), 04755), 0);
  const auto result = run({LODGE_BINARY, "kvm", "--check", "--", program}, patience);
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

}  // namespace
}  // namespace lodge
