// Far control transfers: JMP, CALL, RET and IRET between code segments, through call gates and between tasks.
// SDM volume 3, section 5.8; volume 2, pages of the four instructions.
//
// On success the processor's state (also cpu.rip) is that of the target and the functions return true; a task
// switch may leave cpu.pending set, to be delivered in the new task. False: a fault is pending and nothing
// has changed.
#pragma once

#include <cstdint>

#include "kvm/soft/cpu/cpu.hpp"

namespace lodge::kvm::soft {

// `size`: operand size in bytes. `return_rip`: of the next instruction.
bool far_jump(Cpu& cpu, uint16_t selector, uint64_t offset, unsigned size, uint64_t return_rip) noexcept;
bool far_call(Cpu& cpu, uint16_t selector, uint64_t offset, unsigned size, uint64_t return_rip) noexcept;
bool far_return(Cpu& cpu, unsigned size, uint16_t release) noexcept;
bool interrupt_return(Cpu& cpu, unsigned size, uint64_t return_rip) noexcept;

}  // namespace lodge::kvm::soft
