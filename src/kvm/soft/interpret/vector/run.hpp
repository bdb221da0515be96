// The handlers of the vector family (Op::complex), by file.
#pragma once

#include "kvm/soft/interpret/op.hpp"

namespace lodge::kvm::soft::simd {

// uncached.cpp: an instruction whose stub found no room in the cache: decoded and compiled at each execution.
Step run_uncached(Cpu& cpu, const Op& op) noexcept;

// run.cpp: stubs. Op::aux is a Form.
Step run_vector(Cpu& cpu, const Op& op) noexcept;
Step run_vector_fp(Cpu& cpu, const Op& op) noexcept;  // uses and sets MXCSR
Step run_mmx(Cpu& cpu, const Op& op) noexcept;        // touches an MMX register
Step run_fence(Cpu& cpu, const Op& op) noexcept;

// decode.cpp: moves whose memory operand has to be aligned to its size.
bool is_aligned_move(ZydisMnemonic mnemonic) noexcept;

// control.cpp: Op::src is 1 for VEX forms where both exist.
Step run_ldmxcsr(Cpu& cpu, const Op& op) noexcept;
Step run_stmxcsr(Cpu& cpu, const Op& op) noexcept;
Step run_vzeroupper(Cpu& cpu, const Op& op) noexcept;  // Op::dst: first byte cleared (0: VZEROALL)
Step run_emms(Cpu& cpu, const Op& op) noexcept;
// Op::size is the number of bytes (8 or 16), Op::dst the data and Op::src the mask register.
Step run_maskmov(Cpu& cpu, const Op& op) noexcept;   // MASKMOVDQU
Step run_vmaskmov(Cpu& cpu, const Op& op) noexcept;  // VMASKMOVDQU
Step run_maskmovq(Cpu& cpu, const Op& op) noexcept;

// gather.cpp: Op::imm is a packed Gather.
Step run_gather(Cpu& cpu, const Op& op) noexcept;
Step run_scatter(Cpu& cpu, const Op& op) noexcept;

// x87.cpp: Op::aux is a Form for the first, dst and src the high and low byte of FOP.
Step run_x87(Cpu& cpu, const Op& op) noexcept;
Step run_fninit(Cpu& cpu, const Op& op) noexcept;
Step run_fnclex(Cpu& cpu, const Op& op) noexcept;
Step run_fwait(Cpu& cpu, const Op& op) noexcept;
Step run_fnstsw_ax(Cpu& cpu, const Op& op) noexcept;
Step run_fnstsw(Cpu& cpu, const Op& op) noexcept;
Step run_fnstcw(Cpu& cpu, const Op& op) noexcept;
Step run_fldcw(Cpu& cpu, const Op& op) noexcept;
// Op::size 2 or 4 is the width of the environment's format.
Step run_fnstenv(Cpu& cpu, const Op& op) noexcept;
Step run_fldenv(Cpu& cpu, const Op& op) noexcept;
Step run_fnsave(Cpu& cpu, const Op& op) noexcept;
Step run_frstor(Cpu& cpu, const Op& op) noexcept;
Step run_x87_nop(Cpu& cpu, const Op& op) noexcept;  // FENI, FDISI, FSETPM

// xsave.cpp: Op::dst is 1 for the forms with REX.W.
Step run_fxsave(Cpu& cpu, const Op& op) noexcept;
Step run_fxrstor(Cpu& cpu, const Op& op) noexcept;
Step run_xsave(Cpu& cpu, const Op& op) noexcept;
Step run_xsaveopt(Cpu& cpu, const Op& op) noexcept;
Step run_xsavec(Cpu& cpu, const Op& op) noexcept;
Step run_xsaves(Cpu& cpu, const Op& op) noexcept;
Step run_xrstor(Cpu& cpu, const Op& op) noexcept;
Step run_xrstors(Cpu& cpu, const Op& op) noexcept;

}  // namespace lodge::kvm::soft::simd
