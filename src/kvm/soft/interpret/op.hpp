// A decoded instruction, ready to run, and what the decoders of the instruction families are told.
#pragma once

#include <Zydis/Zydis.h>

#include <cstdint>

#include "kvm/soft/cpu/cpu.hpp"

namespace lodge::kvm::soft {

// Threaded code: runs the instruction, then the next one by a tail call; returns at the block's end.
using Handler = void (*)(Cpu& cpu, const Op* op) noexcept;
// Everything that is not hot: one instruction, reached through a common Handler.
using Complex = Step (*)(Cpu& cpu, const Op& op) noexcept;

struct Op {
  static constexpr uint8_t lock = 1, rep = 2, repne = 4, has_memory = 8, count_in_cl = 0x10,
                           outside = 0x20;  // what it does or reads lies outside registers and RAM

  Handler handler = nullptr;
  Complex complex = nullptr;
  union {
    uint64_t imm = 0;  // immediate, sign-extended; branch target; absolute address of moffs
    const void* aux;   // a handler's own compiled form (vector stubs); owned by its family
  };
  int64_t disp = 0;     // of the memory operand; RIP-relative ones: from the block's start
  uint16_t offset = 0;  // of the instruction in its block, bytes
  uint8_t length = 0;   // bytes
  uint8_t size = 0;     // operand size, bytes
  uint8_t dst = 0;      // register operands, as the handler says: byte offsets in gpr
  uint8_t src = 0;
  uint8_t base = gpr_zero, index = gpr_zero;  // of the memory operand: numbers in gpr
  uint8_t scale = 0;                          // shift of the index
  uint8_t segment = seg_none;                 // seg_none: flat, neither base nor check
  uint8_t address_size = 8;                   // 2, 4 or 8
  uint8_t flags = 0;
  uint8_t flat_segment = seg_none;  // whose base a flat 64-bit access adds: seg_fs, seg_gs or seg_none
};

struct DecodeContext {
  Cpu& cpu;      // mode and features (constant for the block's key)
  uint64_t rip;  // of this instruction
  const uint8_t* bytes;
  const ZydisDecodedInstruction& insn;
  const ZydisDecodedOperand* operands;  // insn.operand_count, hidden ones included
};

// Families. Each looks at the instruction and fills op.complex or op.handler (and aux or imm, dst, src) and
// returns true, or returns false for "not mine". Filled already: offset, length, size (insn.operand_width /
// 8), prefixes (lock, rep, repne) and, when there is a memory operand, base, index, scale, disp, segment,
// address_size, has_memory. A form that the guest's CPUID hides is "mine" with complex = undefined_opcode.
bool decode_integer(const DecodeContext& context, Op& op) noexcept;
bool decode_system(const DecodeContext& context, Op& op) noexcept;
bool decode_vector(const DecodeContext& context, Op& op) noexcept;

// Raises #UD.
Step undefined_opcode(Cpu& cpu, const Op& op) noexcept;
// The handler for ops that only have `complex`: calls it and acts on the Step.
void run_complex(Cpu& cpu, const Op* op) noexcept;

// Byte offset of a Zydis general-purpose register in Cpu::gpr (AH..BH: number * 8 + 1).
uint8_t gpr_offset(ZydisRegister reg) noexcept;

}  // namespace lodge::kvm::soft
