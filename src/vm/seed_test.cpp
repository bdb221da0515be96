#include "vm/seed.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.hpp"

namespace lodge::vm {
namespace {

using testing::HasSubstr;
using testing::StartsWith;

constexpr const char* key = "ssh-ed25519 AAAAC3Nza me@here";

TEST(Seed, SettingsAreMadeOfTheOptions) {
  const Seed seed = make_seed(
      {.ssh_keys = {key}, .hostname = "web", .commands = {"apt-get update", R"(echo "a: b" >\tmp)"}});
  EXPECT_EQ(seed.user_data,
            "#cloud-config\n"
            "disable_root: false\n"
            "runcmd:\n"
            "  - \"apt-get update\"\n"
            "  - \"echo \\\"a: b\\\" >\\\\tmp\"\n");
  EXPECT_THAT(seed.meta_data, StartsWith("instance-id: lodge-"));
  EXPECT_THAT(seed.meta_data, HasSubstr("\nlocal-hostname: \"web\"\n"));
  EXPECT_THAT(seed.meta_data, HasSubstr("\npublic-keys:\n  - \"ssh-ed25519 AAAAC3Nza me@here\"\n"));
}

// cloud-init calls a configuration without a mapping invalid.
TEST(Seed, AHostnameAloneIsAnEmptyConfiguration) {
  EXPECT_EQ(make_seed({.hostname = "web"}).user_data, "#cloud-config\n{}\n");
}

TEST(Seed, AFileIsTakenAsItIs) {
  const Seed seed = make_seed({.user_data = "#!/bin/sh\ntrue\n", .hostname = "web"});
  EXPECT_EQ(seed.user_data, "#!/bin/sh\ntrue\n");
  EXPECT_THAT(seed.meta_data, HasSubstr("web"));
}

TEST(Seed, ChangedSettingsAreAnotherInstance) {
  const auto id = [](const SeedWishes& wishes) {
    const std::string meta_data = make_seed(wishes).meta_data;
    return meta_data.substr(0, meta_data.find('\n'));
  };
  EXPECT_EQ(id({.hostname = "a"}), id({.hostname = "a"}));
  EXPECT_NE(id({.hostname = "a"}), id({.hostname = "b"}));
  EXPECT_NE(id({.user_data = "#!/bin/sh\n1"}), id({.user_data = "#!/bin/sh\n2"}));
  EXPECT_NE(id({.commands = {"a"}}), id({.commands = {"a", "a"}}));
}

TEST(Seed, WhatCannotBeSaidIsRefused) {
  const auto refused = [](const SeedWishes& wishes, const std::string& option) {
    try {
      make_seed(wishes);
      FAIL() << option;
    } catch (const UsageError& error) {
      EXPECT_THAT(error.what(), StartsWith(option + ": "));
    }
  };
  refused({.hostname = "Web"}, "--hostname");
  refused({.hostname = "-web"}, "--hostname");
  refused({.hostname = std::string(65, 'a')}, "--hostname");
  refused({.user_data = std::string((1 << 20) + 1, '#')}, "--user-data");
  refused({.user_data = "#!/bin/sh", .commands = {"true"}}, "--run");
  refused({.commands = {""}}, "--run");
  refused({.commands = {"\xff"}}, "--run");
  refused({.ssh_keys = {"one\ntwo"}}, "--ssh-key");
}

TEST(Seed, TheVolumeIsAReadOnlyDisk) {
  const auto image = seed_image({.user_data = "#cloud-config\n", .meta_data = "instance-id: a\n"});
  ASSERT_NE(image, nullptr);
  EXPECT_TRUE(image->read_only());
  std::string bytes(image->size(), '\0');
  ASSERT_EQ(block::read(*image, bytes.data(), bytes.size(), 0), 0);
  EXPECT_EQ(bytes.substr(16 * 2048 + 40, 7), "CIDATA ");
  EXPECT_THAT(bytes, HasSubstr("#cloud-config\n"));
  EXPECT_THAT(bytes, HasSubstr("instance-id: a\n"));
  EXPECT_EQ(block::write(*image, "x", 1, 0), EROFS);
}

}  // namespace
}  // namespace lodge::vm
