// Which instructions the guest's CPUID offers.
#pragma once

#include <Zydis/Zydis.h>

#include "kvm/soft/cpu/features.hpp"

namespace lodge::kvm::soft {

// False: the instruction is #UD for this guest. By the instruction-set label that Zydis gives; sets that are
// not listed are refused.
bool allowed_by_cpuid(const Features& features, const ZydisDecodedInstruction& insn) noexcept;

}  // namespace lodge::kvm::soft
