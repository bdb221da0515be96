// Handlers of signals that others use as well.
#pragma once

#include <signal.h>

namespace lodge::kvm::soft {

// Calls the handler that stood where ours stands now. False: there was none. Async-signal-safe.
inline bool call_previous(const struct sigaction& previous, int number, siginfo_t* info,
                          void* context) noexcept {
  if ((previous.sa_flags & SA_SIGINFO) != 0)
    previous.sa_sigaction(number, info, context);
  else if (previous.sa_handler != SIG_DFL && previous.sa_handler != SIG_IGN)
    previous.sa_handler(number);
  else
    return false;
  return true;
}

}  // namespace lodge::kvm::soft
