// Signals of the client while one of its threads is in KVM_RUN.
//
// In the kernel a signal ends KVM_RUN with EINTR, and its handler runs when the ioctl returns. Here the guest
// is user-space code in the client's thread, which a handler would interrupt in the middle, on whatever
// stack, and nothing would make the guest stop. So the client's handlers are wrapped: during KVM_RUN the
// wrapper kicks the vCPU, puts the signal back into the thread's queue and blocks all signals; when KVM_RUN
// has returned the mask becomes what it was, and the signal is taken like any other. Those of faults, which
// cannot be blocked, are only noted and sent anew then. Outside of KVM_RUN the wrapper calls the handler.
#pragma once

#include <signal.h>

#include <array>
#include <cstdint>
#include <optional>

#include "kvm/kvm.hpp"

namespace lodge::kvm::preload {

// Wraps the handlers that the process has now; those that come later are wrapped as they are installed.
// Before each VM, and so before the soft accelerator's own handlers of faults, which remember those that they
// replace; does something for the first. Throws std::system_error.
void adopt_signal_handlers();

// sigaction(2) for the client: shows it its own handlers. 0, or -1 with errno.
int client_sigaction(int number, const struct sigaction* action, struct sigaction* old) noexcept;

// What the client's pthread_sigmask(how, set) on this thread may do: a thread that runs vCPUs lets the
// accelerator's alarm through, without which a guest that does not exit would never see its timers. `room`
// holds the answer.
const sigset_t* without_alarm(int how, const sigset_t* set, sigset_t& room) noexcept;

// Around one KVM_RUN of this thread. `mask`: that of KVM_SET_SIGNAL_MASK, or none.
class SignalsWhileRunning {
 public:
  SignalsWhileRunning(Vcpu& vcpu, const std::optional<uint64_t>& mask) noexcept;
  ~SignalsWhileRunning();
  SignalsWhileRunning(const SignalsWhileRunning&) = delete;
  SignalsWhileRunning& operator=(const SignalsWhileRunning&) = delete;

  // For the handler: KVM_RUN ends, and the signal waits until it has returned. False: it cannot be put back.
  bool postpone(int number, siginfo_t* info, uint64_t& mask_on_return) noexcept;
  bool postponed() const noexcept { return postponed_; }

 private:
  Vcpu& vcpu_;
  SignalsWhileRunning* const outer_;
  // Only this thread and its handlers see these.
  volatile bool restore_ = false;
  volatile uint64_t before_ = 0;  // the thread's mask, when restore_ is set
  volatile bool postponed_ = false;
  volatile uint64_t held_ = 0;           // signals to be sent anew,
  std::array<siginfo_t, 32> sent_with_;  // as they were
};

}  // namespace lodge::kvm::preload
