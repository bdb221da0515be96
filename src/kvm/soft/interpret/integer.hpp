// The integer instructions that are not hot (integer.cpp, string.cpp), for the decoder.
#pragma once

#include <mutex>

#include "kvm/soft/cpu/events.hpp"
#include "kvm/soft/interpret/alu.hpp"
#include "kvm/soft/interpret/op.hpp"
#include "kvm/soft/mmu/host_access.hpp"

namespace lodge::kvm::soft::integer {

// Misalignment comes before the page faults of a write that a read-modify-write probes for. #AC(0).
inline bool check_alignment(Cpu& cpu, uint64_t linear, unsigned size) noexcept {
  return !cpu.alignment_checks || (linear & (size - 1)) == 0 || cpu.raise(Exception::ac, 0);
}

// In Op::src: the second operand is not a register but imm.
inline constexpr uint8_t no_register = 0xff;

// Memory-destination forms: dst is in memory, the other operand is register `src` or imm.
Complex alu_memory(Alu a) noexcept;
Complex unary_memory(Unary u) noexcept;
Complex shift_memory(Shift s) noexcept;
// Handlers that need no more choice than their mnemonic; null when there is none.
Complex simple(ZydisMnemonic mnemonic) noexcept;
Complex string_op(ZydisMnemonic mnemonic) noexcept;
Complex multiply_signed() noexcept;  // one-operand IMUL
Complex imul_memory(bool three) noexcept;

Step cmov_source(Cpu& cpu, const Op& op) noexcept;   // imm: condition
Step setcc_memory(Cpu& cpu, const Op& op) noexcept;  // imm: condition
Step movbe_load(Cpu& cpu, const Op& op) noexcept;
Step movbe_store(Cpu& cpu, const Op& op) noexcept;
Step push_register(Cpu& cpu, const Op& op) noexcept;
Step push_immediate(Cpu& cpu, const Op& op) noexcept;
Step push_memory(Cpu& cpu, const Op& op) noexcept;
Step pop_register(Cpu& cpu, const Op& op) noexcept;
Step pop_memory(Cpu& cpu, const Op& op) noexcept;
Step jmp_indirect(Cpu& cpu, const Op& op) noexcept;
Step call_indirect(Cpu& cpu, const Op& op) noexcept;
Step call_relative(Cpu& cpu, const Op& op) noexcept;
Step jmp_relative(Cpu& cpu, const Op& op) noexcept;
Step jcc_relative(Cpu& cpu, const Op& op) noexcept;  // src: condition
Step ret_near(Cpu& cpu, const Op& op) noexcept;      // imm: bytes to release
Step nothing(Cpu& cpu, const Op& op) noexcept;

// [linear] = f([linear], flags), atomically in RAM. Across a page boundary, or on a device, in two steps
// under a lock of all vCPUs' split accesses: no processor promises more of a split lock to a device.
template <class T, class F>
bool modify_at(Cpu& cpu, uint64_t linear, F&& f) noexcept {
  uint16_t flags = cpu.arith;
  if (uint8_t* host = cpu.host_for_write(linear, sizeof(T)); host != nullptr) {
    const auto address = reinterpret_cast<uint64_t>(host);
    for (;;) {
      const T old = host_load<T>(address);
      flags = cpu.arith;
      if (host_compare_exchange<T>(address, old, f(old, flags))) break;
    }
    cpu.arith = flags;
    return true;
  }
  if (cpu.interrupted_access()) return false;
  if (!check_alignment(cpu, linear, sizeof(T)) || !cpu.probe_write(linear, sizeof(T))) return false;
  const std::lock_guard lock(cpu.platform_split_lock());
  if (!cpu.load_slow(linear, sizeof(T))) return false;
  const T result = f(static_cast<T>(cpu.scratch), flags);
  if (!cpu.store_slow(linear, sizeof(T), result)) return false;
  cpu.arith = flags;
  return true;
}

}  // namespace lodge::kvm::soft::integer
