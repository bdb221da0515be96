// A platform that knows nothing and answers nothing, for tests of instructions that ask it nothing.
#pragma once

#include <mutex>

#include "kvm/soft/cpu/platform.hpp"

namespace lodge::kvm::soft {

class QuietPlatform : public Platform {
 public:
  bool read_apic_msr(uint32_t, uint64_t&) noexcept override { return false; }
  bool write_apic_msr(uint32_t, uint64_t, bool) noexcept override { return false; }
  uint8_t tpr() noexcept override { return 0; }
  void set_tpr(uint8_t) noexcept override {}
  bool apic_enabled() noexcept override { return false; }
  bool x2apic_enabled() noexcept override { return false; }
  uint64_t tsc() noexcept override { return 0; }
  void set_tsc(uint64_t) noexcept override {}
  uint32_t tsc_khz() noexcept override { return 0; }
  uint64_t kvmclock_ns() noexcept override { return 0; }
  uint64_t wall_ns() noexcept override { return 0; }
  const VmSettings& settings() const noexcept override { return vm_settings; }
  bool exit_for_msr(uint32_t, bool, uint64_t, uint32_t) noexcept override { return false; }
  bool mmio(uint64_t, void*, unsigned, bool) noexcept override { return false; }
  bool io(uint16_t, void*, unsigned, uint32_t, bool) noexcept override { return false; }
  std::mutex& split_lock() noexcept override { return mutex_; }
  uint64_t hypercall(uint64_t, const uint64_t (&)[4]) noexcept override { return 0; }

 private:
  VmSettings vm_settings;
  std::mutex mutex_;
};

}  // namespace lodge::kvm::soft
