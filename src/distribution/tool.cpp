#include "distribution/tool.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <linux/sched.h>
#include <poll.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "base/error.hpp"
#include "base/fd.hpp"

namespace lodge::distribution {
namespace {

constexpr int inherited_as = 9;

std::vector<char*> pointers(std::vector<std::string>& texts) {
  std::vector<char*> all;
  all.reserve(texts.size() + 1);
  for (auto& text : texts) all.push_back(text.data());
  all.push_back(nullptr);
  return all;
}

std::vector<std::string> environment_with(const std::map<std::string, std::string>& more) {
  std::vector<std::string> all;
  for (char** entry = environ; *entry; entry++) {
    const std::string text = *entry;
    if (!more.contains(text.substr(0, text.find('=')))) all.push_back(text);
  }
  for (const auto& [name, value] : more) all.push_back(fmt::format("{}={}", name, value));
  return all;
}

// Calls line() for what is whole and keeps the rest.
void cut_lines(std::string& text, const std::function<void(std::string_view)>& line) {
  size_t begin = 0;
  for (size_t end; (end = text.find_first_of("\r\n", begin)) != std::string::npos; begin = end + 1)
    if (end > begin) line(std::string_view(text).substr(begin, end - begin));
  text.erase(0, begin);
}

Fd above_programs(int fd) {
  Fd copy(::fcntl(fd, F_DUPFD_CLOEXEC, inherited_as + 1));
  if (!copy) throw_errno("fcntl");
  return copy;
}

// To read from, and to write to.
std::pair<Fd, Fd> make_pipe() {
  std::array<int, 2> ends{};
  if (::pipe2(ends.data(), O_CLOEXEC) != 0) throw_errno("pipe");
  const Fd to(ends[1]);
  return {Fd(ends[0]), above_programs(to.get())};
}

// What the child needs, made before the fork: behind it only system calls are allowed.
struct Start {
  const EndSignals& signals;
  std::vector<char*> arguments, environment;
  int output, inherited, error;  // descriptors above those that the program gets; inherited: -1 for none
};

[[noreturn]] void become_program(const Start& start, bool contained) {
  ::setsid();
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (contained) {
    // Where the root is no mount point (a chroot), mounts stay as visible as they were.
    ::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr);
    ::mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, nullptr);
  }
  start.signals.reset_in_child();
  const int input = ::open("/dev/null", O_RDONLY);
  if (input > STDIN_FILENO) {
    ::dup2(input, STDIN_FILENO);
    ::close(input);
  }
  ::dup2(start.output, STDOUT_FILENO);
  ::dup2(start.output, STDERR_FILENO);
  if (start.inherited >= 0) ::dup2(start.inherited, inherited_as);
  ::execve(start.arguments[0], start.arguments.data(), start.environment.data());
  const int error = errno;
  [[maybe_unused]] const ssize_t written = ::write(start.error, &error, sizeof error);
  ::_exit(127);
}

// A running program; it does not outlive the object.
class Tool {
 public:
  explicit Tool(const Start& start) {
    if (::geteuid() == 0) fork(start, CLONE_NEWNS | CLONE_NEWPID);
    if (pid_ < 0) fork(start, 0);  // root of a container may have no namespaces
    if (pid_ < 0) throw_errno("fork");
  }
  ~Tool() {
    if (pid_ < 0) return;
    kill(SIGKILL);
    wait();
  }
  Tool(const Tool&) = delete;
  Tool& operator=(const Tool&) = delete;

  int ended() const noexcept { return ended_.get(); }  // a pidfd
  // All processes of its session, until wait().
  void kill(int signal) const noexcept { ::kill(-pid_, signal); }
  // Its exit status, or 128 + n.
  int wait() noexcept {
    int status = 0;
    while (::waitpid(pid_, &status, 0) < 0 && errno == EINTR) {
    }
    pid_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }

 private:
  void fork(const Start& start, unsigned long namespaces) {
    int fd = -1;
    const long result = ::syscall(SYS_clone, CLONE_PIDFD | SIGCHLD | namespaces, 0, &fd, 0, 0);
    if (result == 0) become_program(start, namespaces != 0);
    pid_ = static_cast<pid_t>(result);
    ended_.reset(fd);
  }

  pid_t pid_ = -1;
  Fd ended_;
};

// How far the end that a signal has asked for has come.
class Ending {
 public:
  explicit Ending(const ToolRun& run, const Tool& tool) : run_(run), tool_(tool) {}
  int signal() const noexcept { return signal_; }
  bool over() const noexcept { return killed_ && left() == 0; }
  int timeout() const noexcept { return signal_ == 0 ? -1 : left(); }

  void ask(int signal) {
    if (signal_ != 0) return kill();
    signal_ = signal;
    tool_.kill(SIGINT);
    until_ = Clock::now() + run_.patience;
  }
  void look_at_clock() {
    if (signal_ != 0 && !killed_ && left() == 0) kill();
  }
  // The last of the output of processes that die.
  void kill() {
    if (std::exchange(killed_, true)) return;
    tool_.kill(SIGKILL);
    until_ = Clock::now() + std::chrono::seconds(2);
  }

 private:
  using Clock = std::chrono::steady_clock;
  int left() const noexcept {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(until_ - Clock::now()).count();
    return static_cast<int>(std::max<int64_t>(left, 0));
  }

  const ToolRun& run_;
  const Tool& tool_;
  int signal_ = 0;
  bool killed_ = false;
  Clock::time_point until_;
};

// Until the program has ended and nobody holds its output any more.
void follow(Fd from, const Tool& tool, EndSignals& signals, Ending& ending,
            const std::function<void(std::string_view)>& line) {
  std::string text;
  std::array<char, 4096> piece;
  bool ended = false;
  while ((from || !ended) && !ending.over()) {
    std::array<pollfd, 3> polls{
        {{from.get(), POLLIN, 0}, {signals.fd(), POLLIN, 0}, {ended ? -1 : tool.ended(), POLLIN, 0}}};
    if (::poll(polls.data(), polls.size(), ending.timeout()) < 0 && errno != EINTR) throw_errno("poll");
    if (const int signal = signals.take()) ending.ask(signal);
    ending.look_at_clock();
    if (polls[2].revents) ended = true;
    if (ended && ending.signal() != 0) ending.kill();  // what the program has left behind
    if (!polls[0].revents) continue;
    const ssize_t count = ::read(from.get(), piece.data(), piece.size());
    if (count > 0) text.append(piece.data(), static_cast<size_t>(count));
    if (count == 0 || (count < 0 && errno != EINTR)) from.reset();
    cut_lines(text, line);
  }
}

}  // namespace

std::string find_tool(const std::string& name, const std::string& package) {
  const char* path = std::getenv("PATH");
  // System programs are not in the path of every user.
  std::string rest = std::string(path ? path : "") + ":/usr/sbin:/sbin:/usr/bin:/bin:";
  for (size_t colon; (colon = rest.find(':')) != std::string::npos; rest.erase(0, colon + 1)) {
    std::string file = rest.substr(0, colon) + "/" + name;
    if (colon > 0 && ::access(file.c_str(), X_OK) == 0) return file;
  }
  usage_error("{} is missing; install the Debian package {}", name, package);
}

int run_tool(const ToolRun& run, EndSignals& signals, const std::function<void(std::string_view)>& line) {
  auto [output, output_end] = make_pipe();
  auto [errors, errors_end] = make_pipe();
  auto arguments = run.arguments;
  auto environment = environment_with(run.environment);
  Fd inherited;
  if (run.inherited >= 0) inherited = above_programs(run.inherited);
  Tool tool({signals, pointers(arguments), pointers(environment), output_end.get(), inherited.get(),
             errors_end.get()});
  output_end.reset();
  errors_end.reset();
  // At its end when the program has begun.
  int error = 0;
  if (::read(errors.get(), &error, sizeof error) == sizeof error) throw_errno(error, arguments[0]);

  Ending ending(run, tool);
  follow(std::move(output), tool, signals, ending, line);
  const int status = tool.wait();
  if (const int signal = ending.signal())
    throw Interrupted(signal, fmt::format("ended by SIG{}", ::sigabbrev_np(signal)));
  return status;
}

}  // namespace lodge::distribution
