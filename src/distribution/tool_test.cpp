#include "distribution/tool.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mount.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <filesystem>
#include <fstream>

#include "base/error.hpp"
#include "base/fd.hpp"
#include "base/temporary_directory.hpp"
#include "distribution/scratch.hpp"

namespace lodge::distribution {
namespace {

namespace fs = std::filesystem;
using std::chrono::milliseconds;
using ::testing::ElementsAre;

TEST(Tool, AMissingOneIsNamedWithItsPackage) {
  try {
    find_tool("lodge-has-no-such-tool", "some-package");
    FAIL();
  } catch (const UsageError& error) {
    EXPECT_STREQ(error.what(), "lodge-has-no-such-tool is missing; install the Debian package some-package");
  }
}

TEST(Tool, LinesEnvironmentDescriptorAndStatusArrive) {
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  const Fd from(ends[0]), to(ends[1]);
  std::vector<std::string> lines;
  EndSignals signals;
  const int status =
      run_tool({.arguments = {find_tool("sh", "dash"), "-c",
                              "echo one; echo \"$LODGE_X\" >&2; printf five >&9; echo three; exit 7"},
                .environment = {{"LODGE_X", "two"}},
                .inherited = to.get()},
               signals, [&](std::string_view line) { lines.emplace_back(line); });
  EXPECT_EQ(status, 7);
  EXPECT_THAT(lines, ElementsAre("one", "two", "three"));
  char buffer[8] = {};
  EXPECT_EQ(::read(from.get(), buffer, sizeof buffer), 4);
  EXPECT_STREQ(buffer, "five");
}

struct Outcome {
  int signal = 0;  // of Interrupted
  std::vector<std::string> lines;
  std::chrono::duration<double> time{};
};

// Runs a shell script that gets `number` when it says "ready", and at each "again".
Outcome interrupted(int number, const std::string& script, milliseconds patience) {
  EndSignals signals;
  Outcome run;
  const auto begin = std::chrono::steady_clock::now();
  try {
    run_tool({.arguments = {find_tool("sh", "dash"), "-c", script}, .patience = patience}, signals,
             [&](std::string_view line) {
               run.lines.emplace_back(line);
               if (line == "ready" || line == "again") ::raise(number);
             });
  } catch (const Interrupted& end) {
    run.signal = end.signal();
  }
  run.time = std::chrono::steady_clock::now() - begin;
  return run;
}

TEST(Tool, ClearsUpWhenASignalEndsIt) {
  const TemporaryDirectory dir;
  for (const int number : {SIGINT, SIGTERM, SIGHUP}) {
    const std::string file = dir / std::to_string(number);
    const Outcome run = interrupted(
        number,
        "trap 'sleep 0.2; echo clear >" + file + "; exit 1' INT; echo ready; while :; do sleep 0.05; done",
        milliseconds(60'000));
    EXPECT_EQ(run.signal, number);
    EXPECT_THAT(run.lines, ElementsAre("ready"));
    EXPECT_TRUE(fs::exists(file)) << number;
  }
}

TEST(Tool, AllOfItIsKilledAfterItsPatienceOrAtASecondSignal) {
  // The one in the background holds the output open and hears no signal.
  const std::string deaf = "trap '' INT TERM HUP; sleep 600 & echo $!; ";
  Outcome run = interrupted(SIGTERM, deaf + "echo ready; sleep 600", milliseconds(300));
  EXPECT_EQ(run.signal, SIGTERM);
  EXPECT_GE(run.time.count(), 0.3);
  EXPECT_LT(run.time.count(), 60);
  run = interrupted(SIGINT, deaf + "echo ready; sleep 0.2; echo again; sleep 600", milliseconds(600'000));
  EXPECT_EQ(run.signal, SIGINT);
  EXPECT_LT(run.time.count(), 60);
}

TEST(Tool, WhatItMountsIsNotSeenOutside) {
  if (::geteuid() != 0) GTEST_SKIP() << "only root mounts";
  const TemporaryDirectory dir;
  EndSignals signals;
  std::vector<std::string> lines;
  const int status = run_tool({.arguments = {find_tool("sh", "dash"), "-c",
                                             "mount -t tmpfs none " + dir.path() + " && touch " + dir.path() +
                                                 "/inside && ls " + dir.path()}},
                              signals, [&](std::string_view line) { lines.emplace_back(line); });
  if (status != 0) GTEST_SKIP() << "this host permits no mounts";
  EXPECT_THAT(lines, ElementsAre("inside"));
  EXPECT_FALSE(fs::exists(dir / "inside"));
}

TEST(Tool, OneThatCannotBeStartedIsNamed) {
  EndSignals signals;
  try {
    run_tool({.arguments = {"/nonexistent/tool"}}, signals, [](std::string_view) {});
    FAIL();
  } catch (const std::system_error& error) {
    EXPECT_EQ(error.code().value(), ENOENT);
    EXPECT_THAT(error.what(), testing::HasSubstr("/nonexistent/tool"));
  }
}

TEST(ScratchDirectory, GoesWithItsContent) {
  const TemporaryDirectory dir;
  fs::path path;
  {
    const ScratchDirectory scratch(fs::path(dir.path()) / "scratch-XXXXXX", 0711);
    path = scratch.path();
    EXPECT_EQ(fs::status(path).permissions(), fs::perms(0711));
    fs::create_directories(path / "a/b");
    std::ofstream(path / "a/b/c") << "text";
    fs::create_directory_symlink(dir.path(), path / "link");
  }
  EXPECT_FALSE(fs::exists(path));
  EXPECT_TRUE(fs::exists(dir.path()));
}

TEST(ScratchDirectory, StaysWhereSomethingIsMounted) {
  if (::geteuid() != 0) GTEST_SKIP() << "only root mounts";
  const TemporaryDirectory dir;
  fs::create_directory(dir / "host");
  std::ofstream(dir / "host/precious") << "text";
  fs::path path;
  {
    const ScratchDirectory scratch(fs::path(dir.path()) / "scratch-XXXXXX", 0700);
    path = scratch.path();
    fs::create_directories(path / "a/b");
    if (::mount((dir / "host").c_str(), (path / "a/b").c_str(), nullptr, MS_BIND, nullptr) != 0)
      GTEST_SKIP() << "this host permits no mounts";
  }
  EXPECT_TRUE(fs::exists(dir / "host/precious"));
  ASSERT_EQ(::umount((path / "a/b").c_str()), 0);
  EXPECT_TRUE(fs::exists(path / "a/b"));
}

}  // namespace
}  // namespace lodge::distribution
