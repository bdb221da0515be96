// Building blocks of the threaded handlers: addresses, the inline soft-TLB access, and the two ways to go on.
//
// A handler ends in a tail call to the next op (LODGE_NEXT), so it must not let the address of a local
// variable escape: slow paths return their values in Cpu::scratch.
#pragma once

#include "kvm/soft/interpret/op.hpp"
#include "kvm/soft/mmu/host_access.hpp"

namespace lodge::kvm::soft {

#define LODGE_NEXT return op[1].handler(cpu, op + 1)

// How the memory operand's linear address is made.
enum class Ea : uint8_t {
  flat64,   // 64-bit mode, 64-bit addresses: base + index * scale + disp (+ FS or GS base)
  flat32,   // 32-bit code, 32-bit addresses in flat DS, ES or SS
  general,  // everything else, through Cpu::linear
};

Ea ea_kind(const Cpu& cpu, const Op& op) noexcept;

// Leaves the block with `op` not done.
[[gnu::noinline, gnu::cold]] inline void leave(Cpu& cpu, const Op* op) noexcept {
  cpu.rip = cpu.this_rip(*op);
}

// The address; false (after leave()) when a segment check failed.
template <Ea E>
[[gnu::always_inline]] inline bool address(Cpu& cpu, const Op* op, unsigned size, bool write) noexcept {
  if constexpr (E != Ea::general) return true;
  if (cpu.linear(*op, size, write, cpu.scratch)) return true;
  leave(cpu, op);
  return false;
}

template <Ea E>
[[gnu::always_inline]] inline uint64_t linear_of(Cpu& cpu, const Op* op) noexcept {
  if constexpr (E == Ea::general) return cpu.scratch;
  const uint64_t sum =
      cpu.gpr[op->base] + (cpu.gpr[op->index] << op->scale) + static_cast<uint64_t>(op->disp);
  if constexpr (E == Ea::flat32) return static_cast<uint32_t>(sum);
  return sum + cpu.segment[op->flat_segment].base;
}

// Slow paths of explicit operands: check what the fast path left to the TLB (canonical form, with #SS where
// due).
[[gnu::noinline]] bool slow_load(Cpu& cpu, const Op* op, uint64_t linear, unsigned size) noexcept;
[[gnu::noinline]] bool slow_store(Cpu& cpu, const Op* op, uint64_t linear, unsigned size,
                                  uint64_t value) noexcept;
// A load whose result will be written back: faults as a write, as the architecture does for
// read-modify-write.
[[gnu::noinline]] bool slow_load_for_write(Cpu& cpu, const Op* op, uint64_t linear, unsigned size) noexcept;
// The same for stack accesses.
[[gnu::noinline]] bool slow_stack_load(Cpu& cpu, const Op* op, uint64_t linear, unsigned size) noexcept;
[[gnu::noinline]] bool slow_stack_store(Cpu& cpu, const Op* op, uint64_t linear, unsigned size,
                                        uint64_t value) noexcept;

#define LODGE_LOAD_BY(slow, T, value, lin)                              \
  T value;                                                              \
  if (const TlbEntry& e_##value = cpu.tlb->at(lin);                     \
      __builtin_expect(TlbSet::hit(e_##value.read, lin, sizeof(T)), 1)) \
    value = host_load<T>(e_##value.host_of(lin));                       \
  else {                                                                \
    if (!slow(cpu, op, lin, sizeof(T))) return;                         \
    value = static_cast<T>(cpu.scratch);                                \
  }

#define LODGE_STORE_BY(slow, T, value, lin)                            \
  if (const TlbEntry& e_store = cpu.tlb->at(lin);                      \
      __builtin_expect(TlbSet::hit(e_store.write, lin, sizeof(T)), 1)) \
    host_store<T>(e_store.host_of(lin), value);                        \
  else if (!slow(cpu, op, lin, sizeof(T), value))                      \
    return;

#define LODGE_LOAD(T, value, lin) LODGE_LOAD_BY(slow_load, T, value, lin)
#define LODGE_STORE(T, value, lin) LODGE_STORE_BY(slow_store, T, value, lin)
#define LODGE_STACK_LOAD(T, value, lin) LODGE_LOAD_BY(slow_stack_load, T, value, lin)
#define LODGE_STACK_STORE(T, value, lin) LODGE_STORE_BY(slow_stack_store, T, value, lin)

// A register write with the architecture's rule for 32-bit results.
template <class T>
[[gnu::always_inline]] inline void put(Cpu& cpu, uint8_t offset, T value) noexcept {
  if constexpr (sizeof(T) == 4)
    cpu.reg<uint64_t>(offset) = value;
  else
    cpu.reg<T>(offset) = value;
}

// Calls f with a zero of the unsigned type of `size` bytes.
template <class F>
[[gnu::always_inline]] inline auto by_size(unsigned size, F&& f) noexcept {
  switch (size) {
    case 1: return f(uint8_t{});
    case 2: return f(uint16_t{});
    case 4: return f(uint32_t{});
    default: return f(uint64_t{});
  }
}

}  // namespace lodge::kvm::soft
