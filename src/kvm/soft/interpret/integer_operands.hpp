// Operands of the integer instructions that are not hot. When Op::has_memory is set, the instruction's r/m
// operand is in memory; otherwise it is the register `dst` (destination forms) or `src` (source forms).
#pragma once

#include <utility>

#include "kvm/soft/interpret/integer.hpp"
#include "kvm/soft/interpret/threaded.hpp"

namespace lodge::kvm::soft::integer {

__extension__ typedef __int128 i128;
__extension__ typedef unsigned __int128 u128;

inline bool in_memory(const Op& op) noexcept {
  return (op.flags & Op::has_memory) != 0;
}

// Reads the r/m source of `size` bytes.
inline bool load_source(Cpu& cpu, const Op& op, unsigned size, uint64_t& value) noexcept {
  if (!in_memory(op)) {
    value = cpu.get_reg(op.src, size);
    return true;
  }
  uint64_t lin = 0;
  if (!cpu.linear(op, size, false, lin) || !cpu.load_slow(lin, size)) return false;
  value = cpu.scratch;
  return true;
}

inline bool load_destination(Cpu& cpu, const Op& op, unsigned size, uint64_t& value) noexcept {
  if (!in_memory(op)) {
    value = cpu.get_reg(op.dst, size);
    return true;
  }
  uint64_t lin = 0;
  if (!cpu.linear(op, size, false, lin) || !cpu.load_slow(lin, size)) return false;
  value = cpu.scratch;
  return true;
}

inline bool store_destination(Cpu& cpu, const Op& op, unsigned size, uint64_t value) noexcept {
  if (!in_memory(op)) {
    cpu.set_reg(op.dst, size, value);
    return true;
  }
  uint64_t lin = 0;
  return cpu.linear(op, size, true, lin) && cpu.store_slow(lin, size, value);
}

// destination = f(destination, flags), atomically when in RAM: unlocked instructions lose nothing by it. `f`
// may run more than once. Flags are committed only when the store succeeded.
template <class T, class F>
bool modify_as(Cpu& cpu, const Op& op, F&& f) noexcept {
  uint16_t flags = cpu.arith;
  if (!in_memory(op)) {
    put<T>(cpu, op.dst, f(cpu.reg<T>(op.dst), flags));
    cpu.arith = flags;
    return true;
  }
  uint64_t lin = 0;
  if (!cpu.linear(op, sizeof(T), true, lin)) return false;
  return modify_at<T>(cpu, lin, std::forward<F>(f));
}

inline Step done(bool ok) noexcept {
  return ok ? Step::next : Step::fault;
}

// Parts of simple(), by file.
Complex bit_instruction(ZydisMnemonic mnemonic) noexcept;       // integer_bits.cpp
Complex multiply_instruction(ZydisMnemonic mnemonic) noexcept;  // integer_multiply.cpp
Complex decimal_instruction(ZydisMnemonic mnemonic) noexcept;   // integer_decimal.cpp
Complex branch_instruction(ZydisMnemonic mnemonic) noexcept;    // integer_branch.cpp: stack and near branches

}  // namespace lodge::kvm::soft::integer
