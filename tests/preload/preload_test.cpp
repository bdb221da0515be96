// liblodge-kvm.so from outside: a small client under `lodge kvm`.
#include <elf.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <linux/capability.h>
#include <linux/xattr.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "base/temporary_directory.hpp"
#include "support/process.hpp"

namespace lodge {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;
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
                                         "cancel_later", "arguments", "first_forms", "no_bitmap", "leaks",
                                         "coalesced", "uring"),
                         [](const auto& test) { return std::string(test.param); });

testing_support::Result check(std::vector<std::string> words) {
  words.insert(words.begin(), {LODGE_BINARY, "kvm", "--check", "--"});
  return run(words, patience);
}

void write_program(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc) << bytes;
  std::filesystem::permissions(path, std::filesystem::perms{0755});
}

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
  // The kernel heeds the bit for the user alone, and not of a script.
  ASSERT_EQ(::chown(program.c_str(), ::geteuid(), 65534), 0);
  ASSERT_EQ(::chmod(program.c_str(), 04755), 0);
  EXPECT_EQ(check({program}).status, 0);
  write_program(program, "#!/bin/sh\n");
  ASSERT_EQ(::chown(program.c_str(), 65534, 65534), 0);
  ASSERT_EQ(::chmod(program.c_str(), 06755), 0);
  EXPECT_EQ(check({program}).status, 0);
}

TEST(KvmCheck, RefusesAProgramWithFileCapabilitiesToAllButRoot) {
  if (::geteuid() != 0) GTEST_SKIP() << "giving a file capabilities needs root";
  const TemporaryDirectory directory;
  ASSERT_EQ(::chmod(directory.path().c_str(), 0755), 0);
  const std::string program = directory / "program";
  std::filesystem::copy_file(LODGE_KVM_CLIENT, program);
  // Not effective: what is permitted suffices.
  const vfs_cap_data capabilities{VFS_CAP_REVISION_2, {{1U << CAP_NET_RAW, 0}, {}}};
  if (::setxattr(program.c_str(), XATTR_NAME_CAPS, &capabilities, sizeof capabilities, 0) != 0)
    GTEST_SKIP() << "capabilities cannot be set here: " << std::strerror(errno);
  EXPECT_EQ(check({program}).status, 0);

  const std::vector<std::string> nobody{"/usr/bin/setpriv", "--reuid=65534", "--regid=65534",
                                        "--clear-groups"};
  const auto as_nobody = [&](std::vector<std::string> words) {
    words.insert(words.begin(), nobody.begin(), nobody.end());
    return run(words, patience);
  };
  if (as_nobody({LODGE_BINARY, "--version"}).status != 0)
    GTEST_SKIP() << "no setpriv, or another user cannot run " LODGE_BINARY;
  const auto refused = as_nobody({LODGE_BINARY, "kvm", "--check", "--", program});
  EXPECT_EQ(refused.status, 2);
  EXPECT_THAT(refused.err, AllOf(HasSubstr(program), HasSubstr("file capabilities")));
  // Only inheritable, of which this user has none: the program gains nothing.
  const vfs_cap_data inheritable{VFS_CAP_REVISION_2, {{0, 1U << CAP_NET_RAW}, {}}};
  ASSERT_EQ(::setxattr(program.c_str(), XATTR_NAME_CAPS, &inheritable, sizeof inheritable, 0), 0);
  EXPECT_EQ(as_nobody({LODGE_BINARY, "kvm", "--check", "--", program}).status, 0);

  ASSERT_EQ(::chmod(directory.path().c_str(), 0700), 0);
  const auto hidden = as_nobody({LODGE_BINARY, "kvm", "--check", "--", program});
  EXPECT_EQ(hidden.status, 2);
  EXPECT_THAT(hidden.err, AllOf(HasSubstr(program), HasSubstr("Permission denied")));
}

TEST(KvmCheck, RefusesASandboxOfQemus) {
  for (const char* option : {"-sandbox", "--sandbox"})
    for (const char* value :
         {"on", "on,", "on,obsolete=deny", "yes", "true", "y", "enable=on", "enable=yes",
          "enable=on,spawn=deny", "spawn=deny,enable=on", "spawn=deny,enable", "enable=off,enable=on"}) {
      const auto result = check({LODGE_KVM_CLIENT, option, value});
      EXPECT_EQ(result.status, 2) << option << " " << value;
      EXPECT_THAT(result.err, AllOf(HasSubstr("seccomp"), HasSubstr(std::string(option) + " " + value)));
    }
}

TEST(KvmCheck, AcceptsASandboxThatIsOff) {
  for (const char* value : {"off", "enable=off", "enable=no", "spawn=deny", "spawn=deny,,enable=on",
                            "on,enable=off", "on,noenable"})
    EXPECT_EQ(check({LODGE_KVM_CLIENT, "-sandbox", value}).status, 0) << value;
}

TEST(KvmCheck, RefusesWhatIsNotARegularFileWithoutOpeningIt) {
  const TemporaryDirectory directory;
  const std::string fifo = directory / "fifo";
  ASSERT_EQ(::mkfifo(fifo.c_str(), 0755), 0);
  const std::string link = directory / "link";
  std::filesystem::create_symlink(fifo, link);
  for (const std::string& program : {fifo, link, directory.path()}) {
    const auto result = run({LODGE_BINARY, "kvm", "--check", "--", program}, Seconds(20));
    EXPECT_EQ(result.status, 2) << program;
    EXPECT_THAT(result.err, AllOf(HasSubstr(program), HasSubstr("not a regular file")));
  }
}

TEST(KvmCheck, FollowsAScriptToItsInterpreter) {
  const TemporaryDirectory directory;
  const std::string script = directory / "script";
  const auto check_script = [&](const std::string& text) {
    write_program(script, text);
    return check({script});
  };
  EXPECT_EQ(check_script("#! /bin/sh -e\n").status, 0);
  EXPECT_THAT(check_script("#!" LODGE_STATIC_PROGRAM "\n").err,
              AllOf(HasSubstr(LODGE_STATIC_PROGRAM), HasSubstr("statically linked")));
  for (const char* empty : {"#!", "#!\n", "#! \t\n/bin/sh\n"})
    EXPECT_THAT(check_script(empty).err, AllOf(HasSubstr(script), HasSubstr("names no interpreter")));
  EXPECT_THAT(check_script("#!/no/interpreter -x\n").err,
              AllOf(HasSubstr(script), HasSubstr("/no/interpreter, which is not there")));
  EXPECT_THAT(check_script("#!/bin/sh\r\n").err, AllOf(HasSubstr(script), HasSubstr("carriage return")));
  EXPECT_THAT(check_script("#!" + script + "\n").err,
              AllOf(HasSubstr(script), HasSubstr("script of a script")));
  EXPECT_THAT(check_script("echo\n").err, AllOf(HasSubstr(script), HasSubstr("neither an ELF program")));
}

TEST(KvmCheck, SaysThatAnElfFileIsCutShort) {
  const TemporaryDirectory directory;
  const std::string program = directory / "program";
  std::ifstream whole(LODGE_KVM_CLIENT, std::ios::binary);
  const std::string bytes(std::istreambuf_iterator<char>(whole), {});
  for (const size_t size : {4, 20, 63, 100, 4096}) {  // in the identification, in each header, in a segment
    write_program(program, bytes.substr(0, size));
    const auto result = check({program});
    EXPECT_EQ(result.status, 2) << size;
    EXPECT_THAT(result.err, AllOf(HasSubstr(program), HasSubstr("cut short"))) << size;
  }
}

TEST(KvmCheck, TellsASharedLibraryFromAStaticProgram) {
  for (const char* program : {LODGE_STATIC_PROGRAM, LODGE_STATIC_PIE_PROGRAM})
    EXPECT_THAT(check({program}).err, AllOf(HasSubstr(program), HasSubstr("statically linked")));
  const std::string library = std::filesystem::path(LODGE_BINARY).parent_path() / "liblodge-kvm.so";
  const auto result = check({library});
  EXPECT_EQ(result.status, 2);
  EXPECT_THAT(result.err, AllOf(HasSubstr(library), HasSubstr("shared library"), Not(HasSubstr("static"))));
}

TEST(KvmCheck, SaysThatAnObjectFileIsNoProgram) {
  const TemporaryDirectory directory;
  const std::string program = directory / "object";
  Elf64_Ehdr header{};
  std::memcpy(header.e_ident, ELFMAG, SELFMAG);
  header.e_ident[EI_CLASS] = ELFCLASS64;
  header.e_machine = EM_X86_64;
  header.e_type = ET_REL;
  write_program(program, std::string(reinterpret_cast<const char*>(&header), sizeof header));
  EXPECT_THAT(check({program}).err, AllOf(HasSubstr(program), HasSubstr("not a program")));
  header.e_type = ET_EXEC;
  write_program(program, std::string(reinterpret_cast<const char*>(&header), sizeof header));
  EXPECT_THAT(check({program}).err, AllOf(HasSubstr(program), HasSubstr("no program headers")));
}

TEST(KvmCheck, HelpEndsWithAnExample) {
  const auto result = run({LODGE_BINARY, "kvm", "--help"}, patience);
  EXPECT_EQ(result.status, 0);
  const size_t example = result.out.find("\nExample:\n  lodge kvm -- qemu-system-x86_64 -accel kvm ");
  ASSERT_NE(example, std::string::npos) << result.out;
  EXPECT_EQ(result.out.find("\n\n", example + 1), result.out.find_last_not_of('\n') + 1);
}

TEST(KvmCheck, NamesAProgramThatIsNotThere) {
  const auto result = run({LODGE_BINARY, "kvm", "--", "no-such-program"}, patience);
  EXPECT_EQ(result.status, 2);
  EXPECT_THAT(result.err, HasSubstr("no-such-program"));
}

}  // namespace
}  // namespace lodge
