#include "base/end_signals.hpp"

#include <sys/signalfd.h>
#include <unistd.h>

#include <cstring>

#include "base/error.hpp"

namespace lodge {
namespace {

constexpr int numbers[] = {SIGINT, SIGTERM, SIGHUP};

}  // namespace

EndSignals::EndSignals() {
  sigset_t set;
  ::sigemptyset(&set);
  for (const int number : numbers) {
    struct sigaction action {};
    ::sigaction(number, nullptr, &action);
    // Blocked, it would be queued although it is ignored.
    if (action.sa_handler != SIG_IGN) ::sigaddset(&set, number);
  }
  fd_.reset(::signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK));
  if (!fd_) throw_errno("signalfd");
  ::pthread_sigmask(SIG_BLOCK, &set, &before_);
}

EndSignals::~EndSignals() {
  ::pthread_sigmask(SIG_SETMASK, &before_, nullptr);
}

int EndSignals::take() noexcept {
  signalfd_siginfo info{};
  return ::read(fd_.get(), &info, sizeof info) == sizeof info ? static_cast<int>(info.ssi_signo) : 0;
}

void EndSignals::check() {
  if (const int signal = take())
    throw Interrupted(signal, fmt::format("ended by SIG{}", ::sigabbrev_np(signal)));
}

void EndSignals::reset_in_child() const noexcept {
  sigset_t mask = before_;
  for (const int number : numbers) {
    ::signal(number, SIG_DFL);
    ::sigdelset(&mask, number);
  }
  ::sigprocmask(SIG_SETMASK, &mask, nullptr);
}

}  // namespace lodge
