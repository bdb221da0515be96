// What every vector and x87 handler checks first, and how it reaches its memory operand.
#pragma once

#include "kvm/soft/interpret/op.hpp"
#include "kvm/soft/interpret/vector/form.hpp"

namespace lodge::kvm::soft::simd {

// False, with #UD, #NM or #MF raised, when the instruction cannot run now (SDM volume 3, sections 2.5
// and 23.25; volume 2, section 2.4).
bool available(Cpu& cpu, Need need) noexcept;

// True when an unmasked x87 exception waits (FSW.ES). With CR0.NE clear a PC would raise IRQ 13 through FERR#
// and go on when IGNNE# is asserted: here it goes on at once, as no chipset wires FERR#.
bool x87_pending(const Cpu& cpu) noexcept;
// False, with #MF raised, when a waiting instruction must not run.
bool x87_ready(Cpu& cpu) noexcept;

// The linear address of a memory operand of `size` bytes after segment and alignment checks.
bool locate(Cpu& cpu, const Op& op, unsigned size, bool write, unsigned alignment, uint64_t& linear) noexcept;
// #AC(0) when alignment checking is on and the address is odd for an operand of `size` bytes.
bool check_ac(Cpu& cpu, uint64_t linear, unsigned size) noexcept;

// Memory operand of `form` to and from the bounce buffer. store() commits nothing when it returns false;
// prepare_store() raises the faults that store() would.
bool load(Cpu& cpu, const Op& op, const Form& form, Bounce& bounce) noexcept;
bool prepare_store(Cpu& cpu, const Op& op, const Form& form) noexcept;
bool store(Cpu& cpu, const Op& op, const Form& form, const Bounce& bounce) noexcept;

}  // namespace lodge::kvm::soft::simd
