// What the translator has to know of one guest instruction.
#pragma once

#include <Zydis/Zydis.h>

#include <array>
#include <cstdint>

#include "kvm/soft/interpret/op.hpp"

namespace lodge::kvm::soft {

enum class Kind : uint8_t {
  nothing,  // no effect (multi-byte NOP, PREFETCH)
  copy,     // registers only
  memory,   // one memory operand, by ModRM
  address,  // LEA
  push,     // of a register or an immediate
  push_memory,
  pop,            // to a register
  leave,          // LEAVE
  call,           // near, relative
  call_indirect,  // near, through a register or memory
  ret,            // near
  jump,           // near, relative
  jump_indirect,  // near, through a register or memory
  branch,         // Jcc, relative
  loop,           // LOOP, LOOPE, LOOPNE and JRCXZ
  bit_test,       // BT, BTS, BTR and BTC of memory, with the offset in a register
  string,         // LODS, STOS, MOVS, SCAS and CMPS without REP
  swap_gs,        // SWAPGS at CPL 0
  clear_if,       // CLI at CPL 0
  set_if,         // STI at CPL 0
  read_tsc,       // RDTSC and RDTSCP
  load_control,   // LDMXCSR and FLDCW
  read_segment,   // MOV of a segment register to a general one
  push_flags,     // PUSHF
  pop_flags,      // POPF
  set_df,         // CLD and STD
  pause,
  serialize,
  complex,  // one for the interpreter
};

// Arithmetic flags as a set: bits of RFLAGS.
using Flags = uint16_t;
inline constexpr Flags no_flags = 0, all_flags = 0x8d5;

struct Instruction {
  const Op* op = nullptr;
  Kind kind = Kind::complex;
  std::array<uint8_t, 15> bytes{};
  ZydisDecodedInstruction insn{};
  std::array<ZydisDecodedOperand, ZYDIS_MAX_OPERAND_COUNT> operands{};

  Flags reads = no_flags;     // flags it depends on
  Flags writes = no_flags;    // flags it may change
  Flags replaces = no_flags;  // flags that it certainly defines, whatever they were

  // Registers that live in memory among the explicit operands (not in the address): at most two differ.
  uint16_t operand_registers = 0;  // a bit for each guest register among the operands
  uint16_t written_registers = 0;  // a bit for each that it changes, hidden operands included
  uint16_t address_registers = 0;  // base and index of the memory operand

  bool memory_read = false, memory_write = false;
  uint8_t memory_size = 0;
  bool narrow_address = false;  // 32-bit addresses
  uint8_t level = 0;            // vector level that it needs (Boundary::level)
  bool may_fault = false;       // natively, on other grounds than its memory operand's page: #DE, alignment

  bool has_memory() const noexcept { return memory_read || memory_write; }
  // Op::imm is where it leads to.
  bool is_direct() const noexcept { return kind == Kind::branch || kind == Kind::jump || kind == Kind::call; }
};

// Analyses the instruction at `bytes`, decoded before as `op`. `cpu` gives mode and enabled features.
void analyse(const Cpu& cpu, const ZydisDecoder& decoder, const uint8_t* bytes, unsigned available,
             const Op& op, Instruction& out) noexcept;

// The decoder of the present mode; false when the translator has none for it.
bool translator_decoder(const Cpu& cpu, ZydisDecoder& decoder) noexcept;

}  // namespace lodge::kvm::soft
