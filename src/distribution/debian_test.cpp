#include "distribution/debian.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/error.hpp"

namespace lodge::distribution {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

DebianDisk good() {
  DebianDisk disk;
  disk.size = 4ull << 30;
  return disk;
}

std::string refusal(const DebianDisk& disk) {
  try {
    check(disk);
    return "";
  } catch (const UsageError& error) {
    return error.what();
  }
}

TEST(DebianDisk, WhatCannotBeMeantIsRefusedByItsOption) {
  EXPECT_EQ(refusal(good()), "");
  const auto with = [](auto change) {
    DebianDisk disk = good();
    change(disk);
    return refusal(disk);
  };
  EXPECT_THAT(with([](auto& d) { d.size = 100 << 20; }), HasSubstr("--size"));
  EXPECT_THAT(with([](auto& d) { d.suite = "$(id)"; }), HasSubstr("--suite"));
  EXPECT_THAT(with([](auto& d) { d.hostname = "-a"; }), HasSubstr("--hostname"));
  EXPECT_THAT(with([](auto& d) { d.hostname = ""; }), HasSubstr("--hostname"));
  EXPECT_THAT(with([](auto& d) { d.packages = {"fio", "--simulate"}; }), HasSubstr("--package"));
  EXPECT_THAT(with([](auto& d) { d.packages = {"a,b"}; }), HasSubstr("--package"));
  EXPECT_THAT(with([](auto& d) { d.password = "a:b"; }), HasSubstr("--password"));
  EXPECT_THAT(with([](auto& d) { d.ssh_keys = {"one\ntwo"}; }), HasSubstr("--ssh-key"));
  EXPECT_THAT(with([](auto& d) { d.mirror = "somewhere"; }), HasSubstr("--mirror"));
}

TEST(DebianProgress, RisesWithThePackages) {
  std::vector<unsigned> seen;
  std::string last;
  detail::Progress progress([&](std::string_view what, unsigned percent) {
    seen.push_back(percent);
    last = what;
  });
  for (const char* line : {"I: running apt-get update...", "I: downloading packages with apt...",
                           "0 upgraded, 2 newly installed, 0 to remove and 0 not upgraded.",
                           "Get:1 http://deb.debian.org/a", "Unpacking a (1) ...", "Setting up a (1) ...",
                           "I: installing remaining packages inside the chroot...",
                           "0 upgraded, 1 newly installed, 0 to remove and 0 not upgraded.",
                           "Setting up b (1) ...", "lodge: making the file system"})
    progress.line(line);
  EXPECT_THAT(seen, ElementsAre(0, 5, 5, 10, 15, 20, 35, 35, 53, 92));
  EXPECT_EQ(last, "making the file system");
}

TEST(DebianFailure, IsToldWithWhatToDoAboutIt) {
  EXPECT_EQ(detail::explain({"I: one", "E: Unable to locate package x", "I: cleaning up"}, "ann"),
            "E: Unable to locate package x");
  EXPECT_EQ(detail::explain({}, "ann"), "it said nothing");
  EXPECT_THAT(detail::explain(
                  {"E: unable to pick chroot mode automatically (use --mode for manual selection)"}, "ann"),
              HasSubstr("usermod --add-subuids 100000-165535 --add-subgids 100000-165535 ann`"));
}

}  // namespace
}  // namespace lodge::distribution
