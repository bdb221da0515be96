#include "kvm/soft/cpu/features.hpp"

#include <algorithm>

#include "kvm/soft/cpu/cpuid_bits.hpp"

namespace lodge::kvm::soft {
namespace {

const kvm_cpuid_entry2* find(std::span<const kvm_cpuid_entry2> entries, uint32_t leaf, uint32_t subleaf) {
  const auto found = std::ranges::find_if(entries, [&](const kvm_cpuid_entry2& entry) {
    return entry.function == leaf &&
           ((entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX) == 0 || entry.index == subleaf);
  });
  return found == entries.end() ? nullptr : &*found;
}

constexpr uint32_t ebx_of(const char (&text)[13], unsigned at) {
  return static_cast<uint32_t>(static_cast<uint8_t>(text[at])) |
         static_cast<uint32_t>(static_cast<uint8_t>(text[at + 1])) << 8 |
         static_cast<uint32_t>(static_cast<uint8_t>(text[at + 2])) << 16 |
         static_cast<uint32_t>(static_cast<uint8_t>(text[at + 3])) << 24;
}

bool vendor_is(const Features::Result& leaf0, const char (&text)[13]) {
  return leaf0.ebx == ebx_of(text, 0) && leaf0.edx == ebx_of(text, 4) && leaf0.ecx == ebx_of(text, 8);
}

}  // namespace

Features::Features(std::span<const kvm_cpuid_entry2> entries) : entries_(entries.begin(), entries.end()) {
  const Result leaf0 = query(0, 0);
  amd_like = vendor_is(leaf0, "AuthenticAMD") || vendor_is(leaf0, "HygonGenuine");
  // Only leaves that exist: beyond the last one Intel repeats its data.
  const auto exact = [&](uint32_t leaf, uint32_t subleaf) {
    const kvm_cpuid_entry2* const entry = find(entries_, leaf, subleaf);
    return entry != nullptr ? Result{entry->eax, entry->ebx, entry->ecx, entry->edx} : Result{};
  };
  const Result leaf1 = exact(1, 0), leaf7 = exact(7, 0), ext1 = exact(0x8000'0001, 0),
               ext8 = exact(0x8000'0008, 0), leaf_d = exact(0xd, 0);
  leaf1_ecx = leaf1.ecx;
  leaf1_edx = leaf1.edx;
  leaf7_ebx = leaf7.ebx;
  leaf7_ecx = leaf7.ecx;
  leaf7_edx = leaf7.edx;
  leaf7_1_eax = exact(7, 1).eax;
  leaf_d_1_eax = exact(0xd, 1).eax;
  ext1_ecx = ext1.ecx;
  ext1_edx = ext1.edx;
  ext8_ebx = ext8.ebx;
  kvm_features = exact(0x4000'0001, 0).eax;
  xcr0_valid = 1;
  if ((leaf1_ecx & cpuid1_ecx::xsave) != 0) xcr0_valid |= uint64_t{leaf_d.edx} << 32 | leaf_d.eax;
  if ((ext8.eax & 0xff) != 0) {
    physical_bits = std::clamp(ext8.eax & 0xff, 32u, 52u);
    linear_bits = (ext8.eax >> 8 & 0xff) >= 57 ? 57 : 48;
  }
}

Features::Result Features::query(uint32_t leaf, uint32_t subleaf) const noexcept {
  const kvm_cpuid_entry2* entry = find(entries_, leaf, subleaf);
  if (entry == nullptr && (leaf & 0x8000'0000) == 0 && (leaf >> 16) != 0x4000) {
    // Beyond the last basic leaf Intel answers with the last one's data, AMD with zeros. An unknown subleaf
    // of a known leaf is zeros on both.
    const kvm_cpuid_entry2* const first = find(entries_, 0, 0);
    if (first != nullptr && leaf > first->eax && !amd_like) entry = find(entries_, first->eax, subleaf);
  }
  if (entry == nullptr) {
    // The topology leaves keep the level number and the APIC ID for every subleaf.
    if (leaf == 0xb || leaf == 0x1f) {
      const kvm_cpuid_entry2* const level0 = find(entries_, leaf, 0);
      if (level0 != nullptr) return {0, 0, subleaf & 0xff, level0->edx};
    }
    return {};
  }
  return {entry->eax, entry->ebx, entry->ecx, entry->edx};
}

}  // namespace lodge::kvm::soft
