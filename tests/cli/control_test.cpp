// lodge ctl and lodge list, with a tiny guest on the soft accelerator.
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <sstream>

#include "base/temporary_directory.hpp"
#include "support/process.hpp"

namespace lodge {
namespace {

using testing::HasSubstr;
using testing_support::Process;
using testing_support::Result;
using testing_support::Seconds;

constexpr Seconds patience(60);

class Control : public testing::Test {
 protected:
  // The command, in a runtime directory of the test's own.
  std::vector<std::string> lodge(std::vector<std::string> arguments) const {
    std::vector<std::string> all = {"/usr/bin/env", "XDG_RUNTIME_DIR=" + directory_.path(), LODGE_BINARY};
    all.insert(all.end(), arguments.begin(), arguments.end());
    return all;
  }
  std::vector<std::string> machine(const std::string& action, const std::vector<std::string>& more) const {
    std::vector<std::string> all = {"run",     "--kernel", LODGE_GUEST, "--memory", "16M",
                                    "--accel", "soft",     "--append",  action};
    all.insert(all.end(), more.begin(), more.end());
    return lodge(all);
  }
  Result run(const std::vector<std::string>& arguments) const {
    return testing_support::run(lodge(arguments), patience);
  }
  nlohmann::json asked(const std::vector<std::string>& arguments) const {
    const Result result = run(arguments);
    EXPECT_EQ(result.status, 0) << result.err;
    return nlohmann::json::parse(result.out, nullptr, false);
  }
  TemporaryDirectory directory_;
};

TEST_F(Control, AMachineIsListedAskedAndEndedByItsName) {
  EXPECT_EQ(run({"list"}).out, "");
  Process web(machine("h", {"--name", "web"}));
  ASSERT_TRUE(web.wait_output("halted\n", patience)) << web.err();
  EXPECT_THAT(run({"list"}).out, HasSubstr("web"));
  const auto list = asked({"list", "--json"});
  ASSERT_EQ(list.size(), 1u);
  EXPECT_EQ(list[0]["status"], "running");
  EXPECT_EQ(list[0]["memory"], 16 << 20);

  EXPECT_EQ(asked({"ctl", "web", "pause", "--json"}), nlohmann::json::object());
  EXPECT_THAT(run({"ctl", "web", "status"}).out, HasSubstr("web: paused, process "));
  run({"ctl", "web", "resume"});
  EXPECT_EQ(asked({"ctl", "web", "status", "--json"})["status"], "running");

  EXPECT_EQ(run({"ctl", "web", "quit"}).status, 0);
  EXPECT_EQ(web.wait_exit(patience), 10);
  EXPECT_EQ(run({"list"}).out, "");
  EXPECT_EQ(run({"ctl", "web", "status"}).status, 2);
}

// The vCPU is asked while it runs the guest, and also while it stands still.
TEST_F(Control, StatisticsAreLive) {
  Process process(machine("s", {"--name", "spam", "--stats", "--serial", "null"}));
  nlohmann::json first = nlohmann::json::object();
  for (int i = 0; i < 600 && first.value("seconds", 0.0) == 0; i++) {
    const Result result = run({"ctl", "spam", "stats", "--json"});
    first = nlohmann::json::parse(result.status == 0 ? result.out : "{}", nullptr, false);
    ::usleep(100'000);
  }
  const auto instructions = [](const nlohmann::json& counted) {
    return counted["counted"]["instructions"]["interpreted"].get<uint64_t>() +
           counted["counted"]["instructions"]["translated"].get<uint64_t>();
  };
  for (int i = 0;
       i < 600 && asked({"ctl", "spam", "stats", "--json"})["exits"]["port"] == first["exits"]["port"]; i++)
    ::usleep(100'000);
  const auto second = asked({"ctl", "spam", "stats", "--json"});
  EXPECT_GT(instructions(second), instructions(first));
  EXPECT_GT(second["guest_mips"], 0);
  EXPECT_EQ(second["memory"]["size"], 16 << 20);
  EXPECT_GT(second["memory"]["resident"], 0);
  EXPECT_EQ(second["balloon"]["target"], 0);

  run({"ctl", "spam", "pause"});
  const auto paused = asked({"ctl", "spam", "stats", "--json"});
  ::usleep(100'000);
  EXPECT_EQ(instructions(asked({"ctl", "spam", "stats", "--json"})), instructions(paused));
  EXPECT_THAT(run({"ctl", "spam", "stats"}).out, HasSubstr(" million guest instructions for each of "));
  process.signal(SIGQUIT);
  EXPECT_EQ(process.wait_exit(patience), 10);
}

TEST_F(Control, AResetIsANewMachineBehindTheSameSocket) {
  Process process(machine("h", {"--control", directory_ / "socket"}));
  ASSERT_TRUE(process.wait_output("halted\n", patience)) << process.err();
  EXPECT_EQ(run({"ctl", directory_ / "socket", "reset"}).status, 0);
  ASSERT_TRUE(process.wait_output("halted\nhalted\n", patience)) << process.err();
  EXPECT_EQ(asked({"ctl", directory_ / "socket", "stats", "--json"})["resets"], 1);
  // A guest without drivers can be told things, and some cannot be done.
  EXPECT_EQ(run({"ctl", directory_ / "socket", "console-resize", "100x40"}).status, 0);
  for (const auto& [command, message] :
       {std::pair{"powerdown", "power button"}, std::pair{"disk-resize disk0 1G", "no disk"}}) {
    std::vector<std::string> words = {"ctl", directory_ / "socket"};
    std::istringstream text(command);
    for (std::string word; text >> word;) words.push_back(word);
    const Result result = run(words);
    EXPECT_EQ(result.status, 12) << command;
    EXPECT_THAT(result.err, HasSubstr(message));
  }
  EXPECT_EQ(run({"ctl", directory_ / "socket", "balloon", "8M"}).status, 0);
  EXPECT_THAT(run({"ctl", directory_ / "socket", "balloon"}).out,
              HasSubstr("target      8 MiB\nactual      0 MiB\n"));
  EXPECT_THAT(run({"ctl", directory_ / "socket", "balloon", "hint"}).err, HasSubstr("no driver"));
  process.signal(SIGQUIT);
  EXPECT_EQ(process.wait_exit(patience), 10);
}

TEST_F(Control, ADiskGrows) {
  const std::string disk = directory_ / "disk.raw";
  ASSERT_EQ(run({"image", "create", "--format", "raw", disk, "1M"}).status, 0);
  Process process(machine("h", {"--name", "db", "--disk", disk}));
  ASSERT_TRUE(process.wait_output("halted\n", patience)) << process.err();
  EXPECT_EQ(run({"ctl", "db", "disks"}).out, "disk0  raw  1 MiB\n");
  EXPECT_EQ(run({"ctl", "db", "disk-resize", "disk0", "2M"}).status, 0);
  EXPECT_EQ(std::filesystem::file_size(disk), 2u << 20);
  EXPECT_EQ(asked({"ctl", "db", "qmp", "query-block"})[0]["size"], 2 << 20);
  EXPECT_EQ(asked({"ctl", "db", "stats", "--json"})["disks"]["disk0"]["reads"], 0);
  EXPECT_THAT(run({"ctl", "db", "stats"}).out, HasSubstr("\n  disk0: 0 reads (0.0 MiB), 0 writes"));
  EXPECT_THAT(run({"ctl", "db", "disk-resize", "disk0", "1M"}).err, HasSubstr("only grows"));
  process.signal(SIGQUIT);
  EXPECT_EQ(process.wait_exit(patience), 10);
}

TEST_F(Control, ADiskThatCannotGrowSaysWhy) {
  const std::string disk = directory_ / "disk", other = directory_ / "other";
  ASSERT_EQ(run({"image", "create", "--qcow2-version", "2", disk, "1M"}).status, 0);
  ASSERT_EQ(run({"image", "snapshot", disk, "--create", "first"}).status, 0);
  ASSERT_EQ(run({"image", "create", other, "1M"}).status, 0);
  Process process(machine("h", {"--name", "db", "--hotplug", "1", "--disk", disk}));
  ASSERT_TRUE(process.wait_output("halted\n", patience)) << process.err();
  EXPECT_THAT(run({"ctl", "db", "disk-resize", "disk0", "2M"}).err,
              HasSubstr("lodge image info tells which"));
  // Nor does a second one come with its name.
  EXPECT_THAT(run({"ctl", "db", "add-disk", other + ",id=disk0"}).err, HasSubstr("is the name of a disk"));
  process.signal(SIGQUIT);
  EXPECT_EQ(process.wait_exit(patience), 10);
}

TEST_F(Control, ANameBelongsToOneMachineAndOutlivesAKilledOne) {
  {
    Process first(machine("h", {"--name", "one"}));
    ASSERT_TRUE(first.wait_output("halted\n", patience)) << first.err();
    const Result second = testing_support::run(machine("h", {"--name", "one"}), patience);
    EXPECT_EQ(second.status, 2);
    EXPECT_THAT(second.err, HasSubstr("a running machine has it"));
    first.signal(SIGKILL);
    first.wait_exit(patience);
  }
  EXPECT_TRUE(std::filesystem::exists(directory_ / "lodge/one.sock"));
  const Result result = run({"ctl", "one", "status"});
  EXPECT_EQ(result.status, 2);
  EXPECT_THAT(result.err, HasSubstr("no machine listens"));
  EXPECT_EQ(testing_support::run(machine("o", {"--name", "one"}), patience).status, 0);
  EXPECT_FALSE(std::filesystem::exists(directory_ / "lodge/one.sock"));
}

// The guest has no driver for slots: what is plugged in stays over a reset, and what shall go goes with one.
TEST_F(Control, DevicesComeAndGoInSlots) {
  for (const char* name : {"one", "two"})
    ASSERT_EQ(run({"image", "create", directory_ / name, "1M"}).status, 0);
  Process process(machine("h", {"--name", "hot", "--hotplug", "2", "--disk", directory_ / "one"}));
  ASSERT_TRUE(process.wait_output("halted\n", patience)) << process.err();
  EXPECT_EQ(run({"ctl", "hot", "slots"}).out, "hotplug1  empty\nhotplug2  empty\n");
  EXPECT_EQ(run({"ctl", "hot", "add-disk", directory_ / "two,id=data,readonly"}).out, "hotplug1\n");
  EXPECT_EQ(asked({"ctl", "hot", "add-device", "virtio-rng", "--json"}),
            nlohmann::json({{"slot", "hotplug2"}}));
  EXPECT_EQ(run({"ctl", "hot", "slots"}).out, "hotplug1  virtio-blk  data\nhotplug2  virtio-rng\n");
  EXPECT_EQ(run({"ctl", "hot", "disks"}).out, "disk0  qcow2  1 MiB\ndata  qcow2  1 MiB  read-only\n");
  for (const auto& [words, message] : std::vector<std::pair<std::vector<std::string>, std::string>>{
           {{"add-network", "user"}, "slots are full (2 of them)"},
           {{"add-disk", directory_ / "one,bus=hotplug1"}, "given twice"},
           {{"add-device", "watchdog"}, "watchdog cannot come to a running machine"},
           {{"remove", "disk0"}, "no slot has a device 'disk0'"}}) {
    std::vector<std::string> all = {"ctl", "hot"};
    all.insert(all.end(), words.begin(), words.end());
    const Result result = run(all);
    EXPECT_EQ(result.status, 12) << words[0];
    EXPECT_THAT(result.err, HasSubstr(message));
  }
  for (const char* name : {"data", "hotplug2"})
    EXPECT_EQ(run({"ctl", "hot", "qmp", "device_del", fmt::format(R"({{"id": "{}"}})", name)}).status, 0);
  EXPECT_EQ(run({"ctl", "hot", "slots"}).out,
            "hotplug1  virtio-blk  data  asked to leave\nhotplug2  virtio-rng  asked to leave\n");
  EXPECT_EQ(run({"image", "resize", directory_ / "two", "2M"}).status, 2) << "the machine still has it";

  EXPECT_EQ(run({"ctl", "hot", "reset"}).status, 0);
  ASSERT_TRUE(process.wait_output("halted\nhalted\n", patience)) << process.err();
  EXPECT_EQ(run({"ctl", "hot", "slots"}).out, "hotplug1  empty\nhotplug2  empty\n");
  EXPECT_EQ(run({"image", "resize", directory_ / "two", "2M"}).status, 0);
  EXPECT_EQ(run({"ctl", "hot", "add-disk", directory_ / "two"}).out, "hotplug1\n");
  EXPECT_EQ(run({"ctl", "hot", "reset"}).status, 0);
  ASSERT_TRUE(process.wait_output("halted\nhalted\nhalted\n", patience)) << process.err();
  EXPECT_EQ(run({"ctl", "hot", "disks"}).out, "disk0  qcow2  1 MiB\ndisk1  qcow2  2 MiB\n");
  process.signal(SIGQUIT);
  EXPECT_EQ(process.wait_exit(patience), 10);
}

TEST_F(Control, AMachineWithoutSlotsSaysHowToGetSome) {
  Process process(machine("h", {"--name", "cold"}));
  ASSERT_TRUE(process.wait_output("halted\n", patience)) << process.err();
  EXPECT_THAT(run({"ctl", "cold", "slots"}).out, HasSubstr("--hotplug N"));
  EXPECT_THAT(run({"ctl", "cold", "add-device", "virtio-rng"}).err, HasSubstr("start it with --hotplug 2"));
  process.signal(SIGQUIT);
  EXPECT_EQ(process.wait_exit(patience), 10);
}

TEST_F(Control, BadWordsAreRefusedBeforeAnythingIsAsked) {
  for (const auto& [words, message] : std::vector<std::pair<std::vector<std::string>, std::string>>{
           {{"ctl", "x", "jump"}, "there are status, stats"},
           {{"ctl", "x", "disk-resize", "disk0"}, "write 'disk-resize DISK SIZE'"},
           {{"ctl", "x", "status", "now"}, "write 'status'"},
           {{"ctl", "a b", "status"}, "cannot name a control socket"}}) {
    const Result result = run(words);
    EXPECT_EQ(result.status, 2);
    EXPECT_THAT(result.err, HasSubstr(message));
  }
}

// Memory of every kind that this host has; of the others it says what is missing.
TEST_F(Control, MemoryIsWhatWasAskedFor) {
  const auto resident = [&](const std::vector<std::string>& options) {
    std::vector<std::string> all = {"--json"};
    all.insert(all.end(), options.begin(), options.end());
    const Result result = testing_support::run(machine("o", all), patience);
    EXPECT_EQ(result.status, 0) << result.err;
    const auto json = nlohmann::json::parse(result.err, nullptr, false);
    return json.is_object() ? json["memory"]["resident"].get<uint64_t>() : 0;
  };
  EXPECT_EQ(resident({"--preallocate"}), 16u << 20);
  EXPECT_EQ(resident({"--preallocate", "--transparent-hugepages", "off"}), 16u << 20);
  const uint64_t touched = resident({"--transparent-hugepages", "off"});
  EXPECT_GT(touched, 0u);
  EXPECT_LT(touched, 16u << 20);
  if (std::filesystem::exists("/sys/kernel/mm/ksm")) {
    const uint64_t mergeable = resident({"--ksm", "--transparent-hugepages", "off"});
    EXPECT_GT(mergeable, 0u);
    EXPECT_LT(mergeable, 16u << 20);
  }
}

}  // namespace
}  // namespace lodge
