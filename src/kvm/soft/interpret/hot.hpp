// Chooses the specialised threaded handlers (hot.cpp).
#pragma once

#include "kvm/soft/interpret/alu.hpp"
#include "kvm/soft/interpret/threaded.hpp"

namespace lodge::kvm::soft {

// Operands of a two-operand instruction, as Op holds them: dst and src registers, imm, the memory operand.
enum class Form : uint8_t { reg_reg, reg_imm, reg_mem, mem_reg, mem_imm };

namespace hot {
Handler alu(Alu a, unsigned size, Form form, Ea ea) noexcept;
Handler mov(unsigned size, Form form, Ea ea) noexcept;
Handler extend(unsigned to, unsigned from, bool is_signed, bool memory,
               Ea ea) noexcept;  // MOVZX, MOVSX, MOVSXD
Handler lea(unsigned size) noexcept;
Handler unary(Unary u, unsigned size) noexcept;              // register operand
Handler shift(Shift s, unsigned size, bool by_cl) noexcept;  // register operand
// Branches: Op::imm is the target relative to the block's RIP; `wide`: 64-bit code with 64-bit operand size.
Handler jcc(unsigned code, bool wide) noexcept;
Handler jmp(bool wide) noexcept;
Handler setcc(unsigned code) noexcept;                // register operand
Handler cmov(unsigned code, unsigned size) noexcept;  // register operands
Handler imul(unsigned size, bool three) noexcept;     // dst * src, or dst = src * imm
// `wide`: 64-bit code and operands; else flat 32-bit code and 32-bit operands.
Handler call(bool wide) noexcept;
Handler ret(bool wide) noexcept;  // imm: bytes to release
Handler push(bool wide) noexcept;
Handler pop(bool wide) noexcept;
Handler nop() noexcept;
}  // namespace hot
}  // namespace lodge::kvm::soft
