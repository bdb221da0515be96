// What the guest's CPUID offers, as words that the decoder and the control registers ask for.
#pragma once

#include <linux/kvm.h>

#include <cstdint>
#include <span>
#include <vector>

namespace lodge::kvm::soft {

// What decoding and translating depend on: the same for vCPUs that differ in topology only.
struct FeatureWords {
  uint32_t leaf1_ecx = 0, leaf1_edx = 0;
  uint32_t leaf7_ebx = 0, leaf7_ecx = 0, leaf7_edx = 0, leaf7_1_eax = 0;
  uint32_t leaf_d_1_eax = 0;
  uint32_t ext1_ecx = 0, ext1_edx = 0;  // 0x80000001
  uint32_t ext8_ebx = 0;                // 0x80000008
  uint32_t kvm_features = 0;            // 0x40000001 EAX
  uint64_t xcr0_valid = 1;              // bits that XSETBV accepts
  unsigned physical_bits = 36, linear_bits = 48;
  bool amd_like =
      false;  // AMD or Hygon: SYSENTER is #UD in long mode, SYSCALL exists in compatibility mode...
  bool operator==(const FeatureWords&) const = default;
};

class Features : public FeatureWords {
 public:
  Features() = default;
  explicit Features(std::span<const kvm_cpuid_entry2> entries);

  struct Result {
    uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  };
  // As CPUID answers (leaves out of range as the vendor does). Bits that follow CR4, XCR0 or the APIC base
  // are the CPUID instruction's business.
  Result query(uint32_t leaf, uint32_t subleaf) const noexcept;
  const std::vector<kvm_cpuid_entry2>& entries() const noexcept { return entries_; }

 private:
  std::vector<kvm_cpuid_entry2> entries_;
};

}  // namespace lodge::kvm::soft
