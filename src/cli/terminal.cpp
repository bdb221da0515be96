#include "cli/terminal.hpp"

#include <signal.h>
#include <unistd.h>

#include <array>

namespace lodge::cli {
namespace {

// For the handler of fatal signals, which can reach nothing else. Written before the handlers are installed.
termios original;  // NOLINT: process-wide, like the terminal
volatile sig_atomic_t is_raw = 0;

constexpr std::array fatal_signals = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT};

// tcsetattr() and raise() are async-signal-safe. SA_RESETHAND has put the default action back.
void on_fatal(int signal) {
  if (is_raw) ::tcsetattr(STDIN_FILENO, TCSANOW, &original);
  ::raise(signal);
}

}  // namespace

RawTerminal::RawTerminal(bool wanted) {
  if (!wanted || !::isatty(STDIN_FILENO) || ::tcgetpgrp(STDIN_FILENO) != ::getpgrp()) return;
  if (::tcgetattr(STDIN_FILENO, &original) != 0) return;
  active_ = true;
  for (const int signal : fatal_signals) {
    struct sigaction action {};
    action.sa_handler = on_fatal;
    action.sa_flags = static_cast<int>(SA_RESETHAND | SA_NODEFER | SA_ONSTACK);
    ::sigaction(signal, &action, nullptr);
  }
}

RawTerminal::~RawTerminal() {
  restore();
}

void RawTerminal::enter() noexcept {
  if (!active_) return;
  termios raw = original;
  ::cfmakeraw(&raw);
  raw.c_oflag =
      original.c_oflag;  // our own messages need their line feeds; the guest's CR LF passes well enough
  is_raw = 1;
  ::tcsetattr(STDIN_FILENO, TCSANOW, &raw);
}

void RawTerminal::restore() noexcept {
  if (!active_ || !is_raw) return;
  is_raw = 0;
  ::tcsetattr(STDIN_FILENO, TCSANOW, &original);
}

}  // namespace lodge::cli
