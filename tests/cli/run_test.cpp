// lodge run with a tiny guest, on every accelerator of this host.
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <pty.h>
#include <sys/wait.h>
#include <unistd.h>
#include <utmp.h>

#include <csignal>
#include <filesystem>
#include <fstream>
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

class Run : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    if (std::string(GetParam()) == "kvm" && ::access("/dev/kvm", R_OK | W_OK) != 0)
      GTEST_SKIP() << "no usable /dev/kvm";
  }
  std::vector<std::string> command(const std::string& action, std::vector<std::string> more = {}) {
    std::vector<std::string> arguments = {LODGE_BINARY, "run",     "--kernel", LODGE_GUEST, "--memory",
                                          "16M",        "--accel", GetParam(), "--append",  action};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
  }
  Result run(const std::string& action, std::vector<std::string> more = {}) {
    return testing_support::run(command(action, std::move(more)), patience);
  }
};

TEST_P(Run, PowerOffEndsWithStatusZeroAndAllOutputArrives) {
  const Result result = run("o");
  EXPECT_EQ(result.status, 0) << result.err;
  EXPECT_EQ(result.out, "hello\n");
  EXPECT_EQ(result.err, "");
}

TEST_P(Run, DebugExitGivesItsValue) {
  const Result result = run("d", {"--device", "isa-debug-exit,port=0xf4,size=4"});
  EXPECT_EQ(result.status, 5 << 1 | 1) << result.err;
}

TEST_P(Run, AKernelPanicEndsWithItsOwnStatus) {
  const Result result = run("p", {"--device", "pvpanic"});
  EXPECT_EQ(result.status, 14) << result.err;
}

TEST_P(Run, ResetWithoutRebootEndsWithItsOwnStatus) {
  const Result result = run("r", {"--no-reboot"});
  EXPECT_EQ(result.status, 4) << result.err;
  EXPECT_EQ(result.out, "reset?\n");
}

TEST_P(Run, ResetStartsTheKernelAnew) {
  Process process(command("r"));
  EXPECT_TRUE(process.wait_output("reset?\nreset?\nreset?\n", patience)) << process.out() << process.err();
  process.signal(SIGQUIT);
  EXPECT_EQ(process.wait_exit(patience), 10);
}

// As when a guest has removed the kernel from the disk that it was booted from.
TEST_P(Run, AResetWithoutAKernelEndsWithAReason) {
  const TemporaryDirectory directory;
  const std::string kernel = directory / "kernel";
  std::filesystem::copy_file(LODGE_GUEST, kernel);
  Process process(
      {LODGE_BINARY, "run", "--kernel", kernel, "--memory", "16M", "--accel", GetParam(), "--append", "r"});
  EXPECT_TRUE(process.wait_output("reset?\nreset?\n", patience)) << process.out() << process.err();
  std::filesystem::remove(kernel);
  EXPECT_EQ(process.wait_exit(patience), 16) << process.err();
  EXPECT_THAT(process.err(),
              testing::StartsWith("lodge: the guest reset the machine, which cannot start again: "));
  EXPECT_THAT(process.err(), HasSubstr(kernel));
  EXPECT_EQ(std::ranges::count(process.err(), '\n'), 1) << process.err();
}

TEST_P(Run, TripleFaultIsTold) {
  const Result result = run("t", {"--no-reboot"});
  EXPECT_EQ(result.status, 6) << result.err;
  EXPECT_THAT(result.err, HasSubstr("triple fault"));
}

TEST_P(Run, InputReachesTheGuestAndItsEndDoesNoHarm) {
  Process process(command("e"));
  ASSERT_TRUE(process.wait_output("ready\n", patience)) << process.err();
  process.send("abc\x01x");  // no terminal, so no escape key
  EXPECT_TRUE(process.wait_output("abc\x01x", patience)) << process.out();
  process.send("q");
  process.close_input();
  EXPECT_EQ(process.wait_exit(patience), 0) << process.err();
}

TEST_P(Run, SerialPortsGoWhereTheyAreToldTo) {
  const TemporaryDirectory directory;
  const std::string file = directory / "serial";
  const Result result = run("o", {"--serial", "file:" + file, "--serial", "null", "--serial", "pty"});
  EXPECT_EQ(result.status, 0) << result.err;
  EXPECT_EQ(result.out, "");
  EXPECT_THAT(result.err, HasSubstr("serial port 3 is /dev/pts/"));
  std::ifstream stream(file);
  EXPECT_EQ(std::string((std::istreambuf_iterator<char>(stream)), {}), "hello\n");
}

TEST_P(Run, AsManyFilesMayBeOpenAsTheHostPermits) {
  std::vector<std::string> limited = {"/bin/sh", "-c", "ulimit -Sn 100; exec \"$@\"", "sh"};
  for (const auto& word : command("h")) limited.push_back(word);
  Process process(limited);
  ASSERT_TRUE(process.wait_output("halted\n", patience)) << process.err();
  std::ifstream limits(fmt::format("/proc/{}/limits", process.pid()));
  std::string line, soft, hard;
  while (std::getline(limits, line) && !line.starts_with("Max open files")) continue;
  std::istringstream(line.substr(14)) >> soft >> hard;
  EXPECT_EQ(soft, hard) << line;
  EXPECT_NE(soft, "100");
  process.signal(SIGTERM);
  EXPECT_EQ(process.wait_exit(patience), 10);
}

TEST_P(Run, SigtermEndsAGuestThatKnowsNoPowerButton) {
  Process process(command("h"));
  ASSERT_TRUE(process.wait_output("halted\n", patience)) << process.err();
  process.signal(SIGTERM);
  EXPECT_EQ(process.wait_exit(patience), 10);
}

TEST_P(Run, AReaderThatStopsReadingDoesNotStopTheCommandFromEnding) {
  Process process(command("s"));
  ASSERT_TRUE(process.wait_output("hello\nhello\n", patience)) << process.err();
  ::usleep(300'000);  // the pipe and the buffers fill up
  process.signal(SIGTERM);
  EXPECT_EQ(process.wait_exit(patience), 10);
}

TEST_P(Run, StatisticsAreJsonOnRequest) {
  const std::string accelerator = GetParam(), name = "tiny-" + std::to_string(::getpid());
  const Result result = run("o", {"--json", "--name", name});
  EXPECT_EQ(result.status, 0);
  const auto json = nlohmann::json::parse(result.err);
  EXPECT_EQ(json["name"], name);
  EXPECT_EQ(json["accelerator"], GetParam());
  EXPECT_EQ(json["exit_status"], 0);
  EXPECT_GE(json["exits"]["port"], 12);  // six characters, each with a look at the line status
  EXPECT_EQ(json.contains("counted"), accelerator == "soft");
  if (accelerator != "soft") return;
  EXPECT_GT(json["guest_mips"], 0);
  EXPECT_GT(json["counted"]["instructions"]["interpreted"], 0);
}

TEST_P(Run, StatisticsAreTextOnRequest) {
  const std::string accelerator = GetParam();
  const Result result = run("o", {"--stats"});
  EXPECT_EQ(result.status, 0);
  EXPECT_THAT(result.err, HasSubstr(" s of CPU, "));
  if (accelerator != "soft") return;
  EXPECT_THAT(result.err, HasSubstr(" million guest instructions for each of "));
  EXPECT_THAT(result.err, HasSubstr("\n  blocks: decoded "));
}

// A terminal of our own, to see what the command does with it.
class Terminal {
 public:
  Terminal() {
    int master, slave;
    EXPECT_EQ(::openpty(&master, &slave, nullptr, nullptr, nullptr), 0);
    master_.reset(master);
    slave_.reset(slave);
  }
  // Starts the command as a session leader with this terminal.
  pid_t start(const std::vector<std::string>& arguments) {
    const pid_t pid = ::fork();
    if (pid == 0) {
      ::login_tty(slave_.release());
      std::vector<char*> argv;
      for (const auto& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
      argv.push_back(nullptr);
      ::execv(argv[0], argv.data());
      ::_exit(99);
    }
    return pid;
  }
  bool echoes() const {
    termios mode{};
    ::tcgetattr(slave_.get(), &mode);
    return mode.c_lflag & ECHO;
  }
  bool wait(std::string_view text) {
    char piece[256];
    while (seen_.find(text) == std::string::npos) {
      pollfd ready{master_.get(), POLLIN, 0};
      if (::poll(&ready, 1, 60'000) <= 0) return false;
      const ssize_t size = ::read(master_.get(), piece, sizeof piece);
      if (size <= 0) return false;
      seen_.append(piece, static_cast<size_t>(size));
    }
    return true;
  }
  void type(std::string_view text) const {
    ASSERT_EQ(::write(master_.get(), text.data(), text.size()), static_cast<ssize_t>(text.size()));
  }
  static int wait_exit(pid_t pid) {
    int status = 0;
    ::waitpid(pid, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }
  const std::string& seen() const { return seen_; }

 private:
  Fd master_, slave_;
  std::string seen_;
};

TEST_P(Run, TerminalIsRawWhileTheGuestHasItAndGivenBack) {
  Terminal terminal;
  const pid_t pid = terminal.start(command("e"));
  ASSERT_TRUE(terminal.wait("ready")) << terminal.seen();
  EXPECT_FALSE(terminal.echoes());
  terminal.type("x\x03y");  // Ctrl-C is the guest's
  EXPECT_TRUE(terminal.wait("x\x03y")) << terminal.seen();
  terminal.type("\x01x");
  EXPECT_EQ(Terminal::wait_exit(pid), 10);
  EXPECT_TRUE(terminal.echoes());
}

TEST_P(Run, TakingMemoryIsShownOnATerminal) {
  Terminal terminal;
  const pid_t pid = terminal.start(command("h", {"--preallocate"}));
  ASSERT_TRUE(terminal.wait("halted")) << terminal.seen();
  EXPECT_THAT(terminal.seen(), HasSubstr("taking memory from the host: 100 %"));
  ::kill(pid, SIGTERM);
  EXPECT_EQ(Terminal::wait_exit(pid), 10);
}

TEST_P(Run, TerminalIsGivenBackAfterASignal) {
  Terminal terminal;
  const pid_t pid = terminal.start(command("h"));
  ASSERT_TRUE(terminal.wait("halted")) << terminal.seen();
  ::kill(pid, SIGTERM);
  EXPECT_EQ(Terminal::wait_exit(pid), 10);
  EXPECT_TRUE(terminal.echoes());
}

TEST_P(Run, EscapeKeyHelpsAndWorksAlthoughTheGuestReadsNothing) {
  Terminal terminal;
  const pid_t pid = terminal.start(command("h"));
  ASSERT_TRUE(terminal.wait("halted")) << terminal.seen();
  terminal.type(std::string(200, 'z'));  // far more than the chip's FIFO
  terminal.type("\x01h");
  EXPECT_TRUE(terminal.wait("Ctrl-A X ends the machine")) << terminal.seen();
  terminal.type("\x01x");
  EXPECT_EQ(Terminal::wait_exit(pid), 10);
}

INSTANTIATE_TEST_SUITE_P(Accelerators, Run, testing::Values("kvm", "soft"),
                         [](const auto& p) { return std::string(p.param); });

}  // namespace
}  // namespace lodge
