// The paravirtual clock of KVM: a page of the guest's memory that tells how to turn its TSC into nanoseconds
// (Documentation/virt/kvm/x86/msr.rst, MSR_KVM_SYSTEM_TIME_NEW and MSR_KVM_WALL_CLOCK_NEW).
#pragma once

#include "kvm/soft/cpu/cpu.hpp"

namespace lodge::kvm::soft {

// Writes the vCPU's time page when the guest has registered one: to be called when it registers, after
// set_tsc(), KVM_SET_CLOCK, a restore, and at request::clock. vCPU's thread only.
void update_kvmclock(Cpu& cpu) noexcept;

// The same for a vCPU of any thread, of which `msr` is the MSR and `platform` the surroundings:
// KVM_SET_CLOCK. No vCPU may run with the new page of its own and the old one of another, since Linux's vDSO
// reads the first vCPU's on all.
void write_clock_page(const MemoryMap& memory, uint64_t msr, Platform& platform) noexcept;

// Writes the boot time (wall clock minus kvmclock) to `gpa`.
void write_wall_clock(Cpu& cpu, uint64_t gpa) noexcept;

// The factor and shift for "ns = (tsc << shift) * mul >> 32" (negative shifts to the right).
struct ClockScale {
  uint32_t mul = 0;
  int8_t shift = 0;

  uint64_t nanoseconds(uint64_t ticks) const noexcept;
};
ClockScale clock_scale(uint32_t tsc_khz) noexcept;

}  // namespace lodge::kvm::soft
