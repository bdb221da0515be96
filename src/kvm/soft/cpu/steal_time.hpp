// Steal time of KVM (Documentation/virt/kvm/x86/msr.rst, MSR_KVM_STEAL_TIME): an area of the guest's memory
// that tells for how long its vCPU wanted to run and did not, and whether it is out of the guest now. Other
// vCPUs read the latter, and ask a vCPU that is out to flush its TLB before it comes back
// (KVM_FEATURE_PV_TLB_FLUSH).
//
// The guest chooses the address: an area that is no RAM is left alone.
#pragma once

#include <cstdint>

#include "kvm/soft/cpu/cpu.hpp"
#include "kvm/soft/cpu/run_delay.hpp"

namespace lodge::kvm::soft {

// vCPU's thread only, with the vCPU's memory map in use.
class StealTime {
 public:
  explicit StealTime(Cpu& cpu) : cpu_(cpu) {}

  // The guest has set the register: time counts from here.
  void start() noexcept;
  // The vCPU goes on with guest instructions: "preempted" no longer, and the TLB is flushed if that was asked
  // for.
  void enter() noexcept;
  // It will not touch its TLB until enter(): it halts, or the VMM has work to do.
  void leave() noexcept;
  // The vCPU's thread goes back to the VMM, where it may be kept waiting as well.
  void left() noexcept;
  // Adds what the host has taken. At most once in a millisecond, since asking the host takes about one
  // microsecond; and when the VMM had the thread for longer than that takes.
  void update() noexcept;

 private:
  bool enabled() const noexcept;
  uint64_t area() const noexcept;

  Cpu& cpu_;
  RunDelay delay_;
  uint64_t next_update_ = 0, left_ = 0;  // TSC of the host; left_ is 0 since the last update
};

}  // namespace lodge::kvm::soft
