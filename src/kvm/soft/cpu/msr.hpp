// Model-specific registers. SDM volume 4; AMD APM volume 2, appendix A; Documentation/virt/kvm/x86/msr.rst.
#pragma once

#include <linux/kvm.h>

#include <cstdint>
#include <span>

#include "kvm/soft/cpu/cpu.hpp"

namespace lodge::kvm::soft {

// False: no such register, or a value that it refuses; RDMSR and WRMSR raise #GP(0) then. Nothing is raised
// here. `host_initiated` (KVM_GET_MSRS, KVM_SET_MSRS) also reaches registers that the guest's CPUID hides,
// and may write read-only ones.
bool read_msr(Cpu& cpu, uint32_t index, uint64_t& value, bool host_initiated) noexcept;
bool write_msr(Cpu& cpu, uint32_t index, uint64_t value, bool host_initiated) noexcept;

// Whether there is such a register at all, whatever the guest's CPUID says.
bool knows_msr(Cpu& cpu, uint32_t index) noexcept;

// KVM_GET_MSR_INDEX_LIST: what a snapshot must carry, in an order in which it can be restored.
std::span<const uint32_t> msr_index_list() noexcept;
// KVM_GET_MSR_FEATURE_INDEX_LIST and the values of those registers.
std::span<const uint32_t> msr_feature_index_list() noexcept;
bool read_feature_msr(uint32_t index, uint64_t& value) noexcept;

}  // namespace lodge::kvm::soft
