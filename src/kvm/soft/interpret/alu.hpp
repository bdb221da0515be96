// Arithmetic done by the host's own instructions, so that results and all flags - those that the manuals
// leave undefined too - are the silicon's. Flags travel as LAHF and SETO give them (CpuState::arith).
#pragma once

#include <cstdint>

namespace lodge::kvm::soft {

enum class Alu : uint8_t { add, bit_or, adc, sbb, bit_and, sub, bit_xor, cmp, test };

#define LODGE_SAVE_FLAGS "lahf\n\tseto %%al"
// Sets OF, then SF ZF AF PF CF from the flags in AX.
#define LODGE_LOAD_FLAGS "addb $127, %%al\n\tsahf\n\t"

// a OP b; returns the result and replaces `f`.
template <Alu A, class T>
[[gnu::always_inline]] inline T alu(T a, T b, uint16_t& f) noexcept {
  if constexpr (A == Alu::add)
    asm("add %[b], %[a]\n\t" LODGE_SAVE_FLAGS : [a] "+&q"(a), "=&a"(f) : [b] "q"(b) : "cc");
  else if constexpr (A == Alu::bit_or)
    asm("or %[b], %[a]\n\t" LODGE_SAVE_FLAGS : [a] "+&q"(a), "=&a"(f) : [b] "q"(b) : "cc");
  else if constexpr (A == Alu::adc)
    asm("btl $8, %%eax\n\tadc %[b], %[a]\n\t" LODGE_SAVE_FLAGS : [a] "+&q"(a), "+&a"(f) : [b] "q"(b) : "cc");
  else if constexpr (A == Alu::sbb)
    asm("btl $8, %%eax\n\tsbb %[b], %[a]\n\t" LODGE_SAVE_FLAGS : [a] "+&q"(a), "+&a"(f) : [b] "q"(b) : "cc");
  else if constexpr (A == Alu::bit_and)
    asm("and %[b], %[a]\n\t" LODGE_SAVE_FLAGS : [a] "+&q"(a), "=&a"(f) : [b] "q"(b) : "cc");
  else if constexpr (A == Alu::sub)
    asm("sub %[b], %[a]\n\t" LODGE_SAVE_FLAGS : [a] "+&q"(a), "=&a"(f) : [b] "q"(b) : "cc");
  else if constexpr (A == Alu::bit_xor)
    asm("xor %[b], %[a]\n\t" LODGE_SAVE_FLAGS : [a] "+&q"(a), "=&a"(f) : [b] "q"(b) : "cc");
  else if constexpr (A == Alu::cmp)
    asm("cmp %[b], %[a]\n\t" LODGE_SAVE_FLAGS : "=&a"(f) : [a] "q"(a), [b] "q"(b) : "cc");
  else
    asm("test %[b], %[a]\n\t" LODGE_SAVE_FLAGS : "=&a"(f) : [a] "q"(a), [b] "q"(b) : "cc");
  return a;
}

enum class Unary : uint8_t { inc, dec, neg, bit_not };

template <Unary U, class T>
[[gnu::always_inline]] inline T unary(T a, uint16_t& f) noexcept {
  if constexpr (U == Unary::inc)
    asm("btl $8, %%eax\n\tinc %[a]\n\t" LODGE_SAVE_FLAGS : [a] "+&q"(a), "+&a"(f) : : "cc");
  else if constexpr (U == Unary::dec)
    asm("btl $8, %%eax\n\tdec %[a]\n\t" LODGE_SAVE_FLAGS : [a] "+&q"(a), "+&a"(f) : : "cc");
  else if constexpr (U == Unary::neg)
    asm("neg %[a]\n\t" LODGE_SAVE_FLAGS : [a] "+&q"(a), "=&a"(f) : : "cc");
  else
    a = static_cast<T>(~a);
  return a;
}

enum class Shift : uint8_t { rol, ror, rcl, rcr, shl, shr, sal, sar };

// The host masks `count` as the guest does (5 bits, 6 for 64-bit operands) and leaves the flags alone for 0.
template <Shift S, class T>
[[gnu::always_inline]] inline T shift(T a, uint8_t count, uint16_t& f) noexcept {
#define LODGE_SHIFT(insn) \
  asm(LODGE_LOAD_FLAGS insn " %%cl, %[a]\n\t" LODGE_SAVE_FLAGS : [a] "+&q"(a), "+&a"(f) : "c"(count) : "cc")
  if constexpr (S == Shift::rol)
    LODGE_SHIFT("rol");
  else if constexpr (S == Shift::ror)
    LODGE_SHIFT("ror");
  else if constexpr (S == Shift::rcl)
    LODGE_SHIFT("rcl");
  else if constexpr (S == Shift::rcr)
    LODGE_SHIFT("rcr");
  else if constexpr (S == Shift::shr)
    LODGE_SHIFT("shr");
  else if constexpr (S == Shift::sar)
    LODGE_SHIFT("sar");
  else
    LODGE_SHIFT("shl");
#undef LODGE_SHIFT
  return a;
}

// Condition codes as the low four bits of Jcc, SETcc and CMOVcc.
template <unsigned C>
[[gnu::always_inline]] inline bool condition(uint16_t f) noexcept {
  constexpr uint16_t c = 0x100, p = 0x400, z = 0x4000, s = 0x8000, o = 1;
  bool r;
  switch (C >> 1) {
    case 0: r = (f & o) != 0; break;
    case 1: r = (f & c) != 0; break;
    case 2: r = (f & z) != 0; break;
    case 3: r = (f & (c | z)) != 0; break;
    case 4: r = (f & s) != 0; break;
    case 5: r = (f & p) != 0; break;
    case 6: r = ((f >> 15 ^ f) & 1) != 0; break;
    default: r = (f & z) != 0 || ((f >> 15 ^ f) & 1) != 0; break;
  }
  return (C & 1) != 0 ? !r : r;
}

inline bool condition(unsigned code, uint16_t f) noexcept {
  bool r = false;
  switch (code >> 1) {
    case 0: r = condition<0>(f); break;
    case 1: r = condition<2>(f); break;
    case 2: r = condition<4>(f); break;
    case 3: r = condition<6>(f); break;
    case 4: r = condition<8>(f); break;
    case 5: r = condition<10>(f); break;
    case 6: r = condition<12>(f); break;
    default: r = condition<14>(f); break;
  }
  return (code & 1) != 0 ? !r : r;
}

}  // namespace lodge::kvm::soft
