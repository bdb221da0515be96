#include "cli/seed_options.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

#include "base/error.hpp"
#include "base/temporary_directory.hpp"

namespace lodge::cli {
namespace {

using ::testing::ElementsAre;

const std::string one =
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f me@here";
const std::string two = "ssh-rsa AAAAB3NzaC1yc2EAAAADAQAB";

class SshKeys : public testing::Test {
 protected:
  std::string file(const std::string& text) const {
    std::ofstream(dir_ / "keys", std::ios::binary) << text;
    return dir_ / "keys";
  }
  static void refuse(const std::string& argument) {
    try {
      read_keys(argument);
      ADD_FAILURE() << argument;
    } catch (const UsageError& error) {
      EXPECT_EQ(error.what(), "--ssh-key: '" + argument + "' is neither a public key nor a file with one");
    }
  }

  TemporaryDirectory dir_;
};

TEST_F(SshKeys, AreTakenFromTheArgumentOrFromAllLinesOfAFile) {
  EXPECT_THAT(read_keys(one), ElementsAre(one));
  EXPECT_THAT(read_keys(file(one + "\n")), ElementsAre(one));
  EXPECT_THAT(read_keys(file("# mine\n\n" + one + "\r\n  " + two + "\n")), ElementsAre(one, two));
}

TEST_F(SshKeys, MayHaveTheOptionsOfAuthorizedKeys) {
  const std::string line = "no-pty,command=\"echo \\\"a b\\\" c\" " + one;
  EXPECT_THAT(read_keys(file(line)), ElementsAre(line));
}

TEST_F(SshKeys, WhatIsNoneIsRefused) {
  refuse(dir_ / "missing");
  refuse(dir_.path());
  refuse("/dev/zero");
  refuse("ssh-ed25519 AAAA");
  for (const std::string& text :
       {std::string(), std::string("# nothing\n"), std::string("hello\n"), one + "\nhello\n",
        std::string("ssh-ed25519\n"), "ssh-rsa " + one.substr(12), one.substr(0, 60) + "*" + one.substr(61),
        one + std::string("\0\1", 2),
        std::string("\x7f"
                    "ELF\2\1\1\0\0",
                    9)})
    refuse(file(text));
}

}  // namespace
}  // namespace lodge::cli
