#include "support/process.hpp"

#include <fcntl.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <csignal>

#include "base/error.hpp"

namespace lodge::testing_support {
namespace {

using Clock = std::chrono::steady_clock;

struct Pipe {
  Fd read, write;
  Pipe() {
    int fds[2];
    if (::pipe2(fds, O_CLOEXEC) != 0) throw_errno("pipe");
    read.reset(fds[0]);
    write.reset(fds[1]);
  }
};

Clock::time_point after(Seconds deadline) {
  return Clock::now() + std::chrono::duration_cast<Clock::duration>(deadline);
}

// Appends what is there; closes at the end of the stream.
void drain(Fd& fd, std::string& text) {
  std::array<char, 4096> piece;
  const ssize_t size = ::read(fd.get(), piece.data(), piece.size());
  if (size > 0)
    text.append(piece.data(), static_cast<size_t>(size));
  else if (size == 0 || errno != EINTR)
    fd.reset();
}

// In the child: `fds` become 0, 1 and 2. It dies with the thread that started it, so that a test that is
// killed leaves nothing behind. `failure` tells why there is no such program.
[[noreturn]] void become(char* const* argv, const std::array<int, 3>& fds, pid_t parent, int failure) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (::getppid() != parent) ::_exit(127);  // it went before
  for (int fd = 0; fd < 3; ++fd) ::dup2(fds[static_cast<size_t>(fd)], fd);
  ::execv(argv[0], argv);
  const int error = errno;
  if (::write(failure, &error, sizeof error) < 0) ::_exit(126);
  ::_exit(127);
}

}  // namespace

Process::Process(const std::vector<std::string>& arguments) {
  ::signal(SIGPIPE, SIG_IGN);
  Pipe in, out, err, failure;
  std::vector<char*> argv;
  for (const auto& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  const pid_t parent = ::getpid();
  pid_ = ::fork();
  if (pid_ < 0) throw_errno("fork");
  if (pid_ == 0)
    become(argv.data(), {in.read.get(), out.write.get(), err.write.get()}, parent, failure.write.get());
  failure.write.reset();
  int error = 0;
  if (::read(failure.read.get(), &error, sizeof error) == sizeof error) {
    ::waitpid(pid_, nullptr, 0);
    throw_errno(error, arguments[0]);
  }
  input_ = std::move(in.write);
  output_ = std::move(out.read);
  errors_ = std::move(err.read);
}

Process::~Process() {
  if (pid_ <= 0) return;
  ::kill(pid_, SIGKILL);
  ::waitpid(pid_, nullptr, 0);
}

void Process::send(std::string_view text) {
  while (!text.empty()) {
    const ssize_t size = ::write(input_.get(), text.data(), text.size());
    if (size < 0) throw_errno("write to the child");
    text.remove_prefix(static_cast<size_t>(size));
  }
}

void Process::signal(int number) const {
  ::kill(pid_, number);
}

// Reads once; false at the deadline or when both streams have ended.
bool Process::pump(Clock::time_point end) {
  if (!output_ && !errors_) return false;
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(end - Clock::now()).count();
  if (left <= 0) return false;
  std::array<pollfd, 2> fds{{{output_.get(), POLLIN, 0}, {errors_.get(), POLLIN, 0}}};
  if (::poll(fds.data(), fds.size(), static_cast<int>(left)) <= 0) return Clock::now() < end;
  if (fds[0].revents) drain(output_, out_);
  if (fds[1].revents) drain(errors_, err_);
  return true;
}

bool Process::wait_output(std::string_view text, Seconds deadline) {
  const auto end = after(deadline);
  while (out_.find(text) == std::string::npos)
    if (!pump(end)) return out_.find(text) != std::string::npos;
  return true;
}

int Process::wait_exit(Seconds deadline) {
  if (pid_ <= 0) return status_;
  const auto end = after(deadline);
  while (pump(end)) continue;
  for (;;) {
    int status = 0;
    rusage usage{};
    if (::wait4(pid_, &status, WNOHANG, &usage) == pid_) {
      cpu_seconds_ = static_cast<double>(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
                     static_cast<double>(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
      pid_ = -1;
      return status_ = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    }
    if (Clock::now() >= end) return -1;
    ::usleep(2000);  // both streams have ended: the child is about to go
  }
}

Result run(const std::vector<std::string>& arguments, Seconds deadline) {
  Process process(arguments);
  process.close_input();
  const int status = process.wait_exit(deadline);
  return {status, process.out(), process.err()};
}

}  // namespace lodge::testing_support
