// Keeps the TSCs of a VM's vCPUs together, as KVM does (kvm_synchronize_tsc). A guest that is told of a
// stable kvmclock reads one vCPU's page with the TSC of another (Linux's vDSO does), so there must be no
// difference.
//
// The VMM writes one TSC after the other, each a little later: a value that is less than a second off where
// another vCPU's TSC is by now is meant to be the same TSC.
#pragma once

#include <array>
#include <cstdint>
#include <mutex>

namespace lodge::kvm::soft {

class TscLines {
 public:
  explicit TscLines(uint32_t host_khz) noexcept : host_khz_(host_khz) {}

  enum class Cause {
    creation,   // of a vCPU; its TSC is where those of the others are
    frequency,  // KVM_SET_TSC_KHZ; `value` is where the TSC was before
    write,      // KVM_SET_MSRS
  };
  // The offset for a TSC of `khz` that is to be `value` when the host's, scaled to that frequency, is
  // `scaled`. Any thread.
  uint64_t place(Cause cause, uint32_t khz, uint64_t value, uint64_t scaled) noexcept {
    const std::lock_guard lock(mutex_);
    Line& line = lines_[khz == host_khz_ ? 0 : 1];
    const uint64_t own = value - scaled;
    if (line.khz == khz && joins(line, cause, value, scaled)) return line.offset;
    // A frequency moves no TSC, so it says nothing about where the others are to be.
    if (line.khz != khz || cause != Cause::frequency)
      line = {.khz = khz, .offset = own, .written = cause == Cause::write};
    return own;
  }

  // KVM_VCPU_TSC_OFFSET: others' values are compared with this one from now on.
  void set(uint32_t khz, uint64_t offset) noexcept {
    const std::lock_guard lock(mutex_);
    lines_[khz == host_khz_ ? 0 : 1] = {.khz = khz, .offset = offset, .written = true};
  }

 private:
  // The TSC at any time is the scaled TSC of the host plus `offset`.
  struct Line {
    uint32_t khz = 0;
    uint64_t offset = 0;
    bool written = false;  // by the VMM, which may mean a moment that has nothing to do with a VM's creation
  };

  static bool joins(const Line& line, Cause cause, uint64_t value, uint64_t scaled) noexcept {
    if (cause == Cause::creation || value == 0) return true;
    if (cause == Cause::write && !line.written) return false;
    const uint64_t second = uint64_t{line.khz} * 1000;
    const uint64_t ahead = value - (line.offset + scaled), behind = -ahead;
    return ahead < second || behind < second;
  }

  const uint32_t host_khz_;
  std::mutex mutex_;
  std::array<Line, 2> lines_;  // of the host's frequency, and of the last other one
};

}  // namespace lodge::kvm::soft
