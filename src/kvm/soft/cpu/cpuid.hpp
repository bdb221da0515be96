// What soft offers of the host's CPUID, and the CPUID instruction.
#pragma once

#include <linux/kvm.h>

#include <cstdint>
#include <vector>

#include "kvm/soft/cpu/cpu.hpp"

namespace lodge::kvm::soft {

// The subset of the host's processor that soft implements (KVM_GET_SUPPORTED_CPUID). A white list: unknown
// bits stay hidden. APIC IDs and the processor count are zero, for the VMM to fill in. The named models are
// vm/cpuid.hpp.
std::vector<kvm_cpuid_entry2> host_cpuid();

// The CPUID instruction: Features::query and the bits that follow CR4, XCR0 and the APIC. Of `features` in
// place of the vCPU's own: what it would answer with them.
Features::Result cpuid(Cpu& cpu, uint32_t leaf, uint32_t subleaf) noexcept;
Features::Result cpuid(Cpu& cpu, const Features& features, uint32_t leaf, uint32_t subleaf) noexcept;

// Bytes of an XSAVE area for the components of `xcr0` (standard form), or of `xcr0 | xss` (compacted).
uint32_t xsave_size(const Features& features, uint64_t components, bool compacted) noexcept;

}  // namespace lodge::kvm::soft
