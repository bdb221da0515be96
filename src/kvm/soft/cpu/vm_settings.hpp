// What the VMM has settled for all vCPUs of a VM by KVM_ENABLE_CAP and KVM_X86_SET_MSR_FILTER, as
// instructions see it.
//
// Threads: any.
#pragma once

#include <linux/kvm.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace lodge::kvm::soft {

// KVM_X86_SET_MSR_FILTER (api.rst, section 4.97): which MSRs RDMSR and WRMSR may touch.
class MsrFilter {
 public:
  // Copies the bitmaps. Throws std::system_error: EINVAL (flags, a bitmap's size, all denied without a
  // range).
  explicit MsrFilter(const kvm_msr_filter& filter);
  bool allows(uint32_t index, bool write) const noexcept;

 private:
  struct Range {
    uint32_t flags, base, count;
    std::vector<uint8_t> bitmap;
  };
  bool default_allow_;
  std::vector<Range> ranges_;
};

class VmSettings {
 public:
  static constexpr uint64_t quirk_fix_hypercall = 1u << 5;  // KVM_X86_QUIRK_FIX_HYPERCALL_INSN
  static constexpr uint64_t quirks = quirk_fix_hypercall;   // KVM_CAP_DISABLE_QUIRKS2

  std::atomic<uint64_t> disabled_quirks{0};
  std::atomic<uint32_t> msr_exits{0};     // KVM_CAP_X86_USER_SPACE_MSR: KVM_MSR_EXIT_REASON_*
  std::atomic<bool> platform_info{true};  // KVM_CAP_MSR_PLATFORM_INFO: the guest may read it

  void set_filter(std::shared_ptr<const MsrFilter> filter) noexcept;
  // As the instructions ask; the x2APIC's registers are always allowed.
  bool allows_msr(uint32_t index, bool write) const noexcept {
    return !filtered_.load(std::memory_order_acquire) || ask_filter(index, write);
  }

 private:
  bool ask_filter(uint32_t index, bool write) const noexcept;

  std::atomic<bool> filtered_{false};
  mutable std::mutex mutex_;
  std::shared_ptr<const MsrFilter> filter_;
};

}  // namespace lodge::kvm::soft
