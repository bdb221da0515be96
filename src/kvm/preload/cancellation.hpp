// Threads of the client that can be cancelled at any point (PTHREAD_CANCEL_ASYNCHRONOUS) while they are in an
// ioctl.
//
// In the kernel such a thread ends in the middle of KVM_RUN. Here it is in the middle of C++, and of the
// guest's code, which cannot be unwound; and it may hold locks. So cancellation is held back until the ioctl
// is done, and pthread_cancel kicks the vCPU that the thread runs. Threads of the default type (deferred) and
// those that have cancellation off are not concerned: no ioctl is a cancellation point. Of the other
// functions of this library a thread must call none while it can be cancelled at any point, as of the C
// library's (POSIX allows it pthread_cancel, pthread_setcancelstate and pthread_setcanceltype).
#pragma once

#include "kvm/kvm.hpp"

namespace lodge::kvm::preload {

// Whether this thread's cancellation is held back from now on. One load for a thread that never was of the
// asynchronous type. Does not return when the thread is cancelled meanwhile: it unwinds the caller, who must
// allow that, and have no objects with destructors yet.
bool hold_back_cancellation();
// Afterwards, if it was. Does not return when the thread was cancelled meanwhile: it unwinds the caller, who
// must allow that.
void admit_cancellation();

// Around one KVM_RUN of this thread: what pthread_cancel kicks.
class CancellableRun {
 public:
  explicit CancellableRun(Vcpu& vcpu) noexcept;
  ~CancellableRun();
  CancellableRun(const CancellableRun&) = delete;
  CancellableRun& operator=(const CancellableRun&) = delete;

 private:
  const bool cancellable_;
};

}  // namespace lodge::kvm::preload
