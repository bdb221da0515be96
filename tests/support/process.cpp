#include "support/process.hpp"

#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
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

}  // namespace

Process::Process(const std::vector<std::string>& arguments) {
  ::signal(SIGPIPE, SIG_IGN);
  Pipe in, out, err;
  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawn_file_actions_adddup2(&actions, in.read.get(), 0);
  ::posix_spawn_file_actions_adddup2(&actions, out.write.get(), 1);
  ::posix_spawn_file_actions_adddup2(&actions, err.write.get(), 2);
  std::vector<char*> argv;
  for (const auto& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  const int error = ::posix_spawn(&pid_, argv[0], &actions, nullptr, argv.data(), environ);
  ::posix_spawn_file_actions_destroy(&actions);
  if (error) throw_errno(error, arguments[0]);
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
  const auto end = after(deadline);
  while (pump(end)) continue;
  for (;;) {
    int status = 0;
    rusage usage{};
    if (::wait4(pid_, &status, WNOHANG, &usage) == pid_) {
      cpu_seconds_ = static_cast<double>(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
                     static_cast<double>(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
      pid_ = -1;
      return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
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
