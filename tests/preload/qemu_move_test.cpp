// Guests under QEMU on `lodge kvm` that are saved, loaded and moved while they work (guests/check.cpp).
#include <fmt/format.h>

#include <charconv>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "preload/qemu.hpp"

namespace lodge {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using testing_support::Qemu;
using testing_support::qemu_patience;
using testing_support::Seconds;

using Clock = std::chrono::steady_clock;

constexpr const char* round_begins = "check: round ";

class QemuMove : public testing::Test {
 protected:
  void SetUp() override {
    if (!std::filesystem::exists(guest() + "/vmlinuz"))
      GTEST_SKIP() << "guest 'cloud' is not there: run scripts/fetch-guests";
    make_initramfs();
  }

  // Processors that work on 16 MiB each: two where QEMU can (qemu_boot_test.cpp).
  std::vector<std::string> machine(const std::string& kind, std::vector<std::string> more = {}) const {
    const bool alone = kind.ends_with("kernel-irqchip=off");
    std::vector<std::string> arguments = {"-machine", kind,
                                          "-smp",     alone ? "1" : "2",
                                          "-m",       "256M",
                                          "-nic",     "none",
                                          "-kernel",  guest() + "/vmlinuz",
                                          "-initrd",  directory_ / "initramfs",
                                          "-append",  "console=ttyS0 quiet panic=-1 lodge.mode=shell"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
  }

  static void start_work(Qemu& qemu) {
    ASSERT_TRUE(qemu.wait_serial("This is a shell in the guest.")) << qemu.output();
    qemu.send("/check 16\n");
    ASSERT_TRUE(qemu.wait_serial("check: round 5\r")) << qemu.output();
  }

  // The number of the last complete round of the guest's output; 0 without one.
  static unsigned last_round(const std::string& output) {
    const size_t end = output.rfind('\r');
    const size_t begin = end == std::string::npos ? end : output.rfind(round_begins, end);
    unsigned number = 0;
    if (begin != std::string::npos)
      std::from_chars(output.data() + begin + std::string_view(round_begins).size(), output.data() + end,
                      number);
    return number;
  }
  // Reads on until `done` is true of the output; not when the guest or QEMU gives up.
  template <typename Done>
  static bool wait_until(Qemu& qemu, Done done) {
    for (const auto end = Clock::now() + qemu_patience; !done(qemu.output());) {
      if (Clock::now() >= end || qemu.output().find("WRONG") != std::string::npos) return false;
      if (qemu.process().wait_exit(Seconds(0.1)) >= 0) return done(qemu.output());
    }
    return true;
  }
  // What another QEMU has begun to print begins anywhere in a line.
  static void works_on(Qemu& qemu, unsigned rounds) {
    ASSERT_TRUE(wait_until(qemu, [](const std::string& output) { return last_round(output) != 0; }))
        << qemu.output();
    const unsigned until = last_round(qemu.output()) + rounds;
    EXPECT_TRUE(wait_until(qemu, [&](const std::string& output) { return last_round(output) >= until; }))
        << qemu.output();
    EXPECT_THAT(qemu.output(), Not(HasSubstr("WRONG")));
  }

  TemporaryDirectory directory_;

 private:
  static std::string guest() { return std::string(LODGE_GUESTS) + "/cloud"; }

  // QEMU takes one file: the guest's initramfs, and behind it the program's.
  void make_initramfs() const {
    std::filesystem::copy_file(LODGE_GUEST_CHECK, directory_ / "check");
    const std::string command = "cd " + directory_ / "" + " && echo check | cpio --quiet -o -H newc >more";
    ASSERT_EQ(testing_support::run({"/bin/sh", "-c", command}, Seconds(60)).status, 0);
    std::ofstream out(directory_ / "initramfs", std::ios::binary);
    for (const std::string& path : {guest() + "/initramfs", directory_ / "more"}) {
      std::ifstream in(path, std::ios::binary);
      const std::string bytes{std::istreambuf_iterator<char>(in), {}};
      out << bytes << std::string(-bytes.size() % 512, '\0');
    }
  }
};

TEST_F(QemuMove, SavedStateIsLoadedAgainAndByTheNextRun) {
  const std::string disk = directory_ / "disk.qcow2";
  ASSERT_EQ(
      testing_support::run({"/usr/bin/qemu-img", "create", "-q", "-f", "qcow2", disk, "1G"}, Seconds(60))
          .status,
      0);
  std::vector<std::string> arguments = machine("pc", {"-drive", "if=none,format=qcow2,file=" + disk});
  Qemu qemu(arguments);
  start_work(qemu);
  EXPECT_EQ(qemu.monitor("savevm here"), "");
  works_on(qemu, 20);
  for (int i = 0; i < 3; ++i) {
    const unsigned before = last_round(qemu.output());
    const size_t printed = qemu.process().out().size();
    EXPECT_EQ(qemu.monitor("loadvm here"), "");
    // From the state that was saved on: the rounds are counted again.
    const std::string line = fmt::format("{}{}\r", round_begins, before);
    EXPECT_TRUE(wait_until(qemu, [&](const std::string& output) {
      return output.find(line, printed) != std::string::npos;
    })) << qemu.output();
    EXPECT_THAT(qemu.output(), Not(HasSubstr("WRONG")));
  }
  qemu.quit();

  arguments.insert(arguments.end(), {"-loadvm", "here"});
  Qemu next(arguments);
  works_on(next, 20);
  EXPECT_THAT(next.output(), Not(HasSubstr("lodge-guest: userland"))) << "it has booted instead";
  next.quit();
}

// To another QEMU while the guest works: what it writes meanwhile is found by the dirty log.
class QemuMigration : public QemuMove {
 protected:
  static void migrate(Qemu& from, const std::string& to) {
    // So slow that the guest writes to pages that were sent already.
    from.execute("migrate-set-parameters", {{"max-bandwidth", 100 << 20}, {"downtime-limit", 300}});
    from.execute("migrate", {{"uri", to}});
    nlohmann::json state;
    for (const auto end = Clock::now() + qemu_patience; Clock::now() < end;) {
      state = from.execute("query-migrate");
      if (state["status"] == "completed" || state["status"] == "failed") break;
      from.process().wait_exit(Seconds(0.1));
    }
    EXPECT_EQ(state["status"], "completed") << state;
    EXPECT_GE(state["ram"]["dirty-sync-count"], 3) << "the memory was sent once only: " << state;
  }

  void moves(const std::string& kind) {
    const std::string socket = "unix:" + directory_ / "migration";
    Qemu from(machine(kind, {"-trace", "kvm_clear_dirty_log"}));
    start_work(from);
    Qemu to(machine(kind, {"-incoming", socket}));
    migrate(from, socket);
    EXPECT_THAT(from.output(), HasSubstr("kvm_clear_dirty_log slot"));  // the log is protected page by page
    EXPECT_THAT(from.output(), Not(HasSubstr("WRONG")));
    works_on(to, 20);
    EXPECT_GT(last_round(to.output()), last_round(from.output()));
    // And back, with a third: what was loaded is saved and logged as well as what was booted.
    const std::string next = "unix:" + directory_ / "next";
    Qemu last(machine(kind, {"-incoming", next}));
    migrate(to, next);
    EXPECT_THAT(to.output(), Not(HasSubstr("WRONG")));
    works_on(last, 20);
    EXPECT_GT(last_round(last.output()), last_round(to.output()));
    from.quit();
    to.quit();
    last.quit();
  }
};

TEST_F(QemuMigration, WorkGoesOnElsewhere) {
  moves("pc");
}
TEST_F(QemuMigration, WorkGoesOnElsewhereWithTheSplitIrqchip) {
  moves("q35,kernel-irqchip=split");
}
TEST_F(QemuMigration, WorkGoesOnElsewhereWithoutAnIrqchip) {
  moves("pc,kernel-irqchip=off");
}

}  // namespace
}  // namespace lodge
