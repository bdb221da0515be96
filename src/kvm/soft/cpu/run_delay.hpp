// How long the host kept a thread waiting for a processor: what KVM calls steal time.
#pragma once

#include <pthread.h>

#include <cstdint>

#include "base/fd.hpp"

namespace lodge::kvm::soft {

class RunDelay {
 public:
  // Whether this host tells (CONFIG_SCHED_INFO, and a /proc to read it from).
  static bool available() noexcept;

  // Nanoseconds that the calling thread was runnable and did not run since it last asked. 0 for a thread that
  // asks for the first time: what it waited before was no guest's time.
  uint64_t take() noexcept;

 private:
  Fd file_;  // of thread_
  pthread_t thread_{};
  uint64_t last_ = 0;
};

}  // namespace lodge::kvm::soft
