// System-management mode: its entry, the state save area, RSM. Intel SDM volume 3, chapter 32 (behaviour,
// 32-bit layout); AMD APM volume 2, sections 10.2 and 10.3 (64-bit layout). As in KVM processors with long
// mode use AMD's layout whatever their vendor, because firmware tells the layouts apart by the revision
// identifier.
//
// Not modelled: I/O instruction restart (the revision identifier does not offer it), SMRR, the monitor's
// memory-mapped I/O information, SMI as an exit of virtualization.
#pragma once

#include "kvm/soft/cpu/cpu.hpp"

namespace lodge::kvm::soft {

// Takes an SMI between two instructions: saves the state at SMBASE + 0xfe00 of the second address space and
// points the processor at the handler. False: the save area is no RAM, and the processor shuts down.
bool enter_smm(Cpu& cpu) noexcept;

// What RSM does. False: the save area is no RAM, or describes a state that cannot be: shutdown.
bool leave_smm(Cpu& cpu) noexcept;

}  // namespace lodge::kvm::soft
