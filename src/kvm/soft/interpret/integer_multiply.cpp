// Multiply and divide.
#include "kvm/soft/interpret/integer_operands.hpp"

namespace lodge::kvm::soft::integer {

template <bool Signed>
Step multiply(Cpu& cpu, const Op& op) noexcept {
  uint64_t source = 0;
  if (!load_source(cpu, op, op.size, source)) return Step::fault;
  uint16_t f = cpu.arith;
  // The flags travel through RBX here: the product needs RAX.
#define LODGE_MUL(T, insn)                                                  \
  {                                                                         \
    T low = cpu.reg<T>(rax * 8);                                            \
    T high = 0;                                                             \
    const T s = static_cast<T>(source);                                     \
    uint64_t saved = f;                                                     \
    asm("xchg %%rax, %[f]\n\t" LODGE_LOAD_FLAGS "xchg %%rax, %[f]\n\t" insn \
        " %[s]\n\t"                                                         \
        "mov %%rax, %[f]\n\t" LODGE_SAVE_FLAGS "\n\txchg %%rax, %[f]"       \
        : "+&a"(low), "=&d"(high), [f] "+&r"(saved)                         \
        : [s] "r"(s)                                                        \
        : "cc");                                                            \
    put<T>(cpu, rax * 8, low);                                              \
    put<T>(cpu, rdx * 8, high);                                             \
    f = static_cast<uint16_t>(saved);                                       \
  }
  switch (op.size) {
    case 1: {
      // AX = AL * source.
      uint16_t product = cpu.reg<uint8_t>(rax * 8);
      const auto s = static_cast<uint8_t>(source);
      uint64_t saved = f;
      if constexpr (Signed)
        asm("xchg %%rax, %[f]\n\t" LODGE_LOAD_FLAGS
            "xchg %%rax, %[f]\n\timulb %[s]\n\tmov %%rax, %[f]\n\t" LODGE_SAVE_FLAGS "\n\txchg %%rax, %[f]"
            : "+&a"(product), [f] "+&r"(saved)
            : [s] "q"(s)
            : "cc");
      else
        asm("xchg %%rax, %[f]\n\t" LODGE_LOAD_FLAGS
            "xchg %%rax, %[f]\n\tmulb %[s]\n\tmov %%rax, %[f]\n\t" LODGE_SAVE_FLAGS "\n\txchg %%rax, %[f]"
            : "+&a"(product), [f] "+&r"(saved)
            : [s] "q"(s)
            : "cc");
      cpu.reg<uint16_t>(rax * 8) = product;
      f = static_cast<uint16_t>(saved);
      break;
    }
    case 2:
      if constexpr (Signed) LODGE_MUL(uint16_t, "imul") else LODGE_MUL(uint16_t, "mul") break;
    case 4:
      if constexpr (Signed) LODGE_MUL(uint32_t, "imul") else LODGE_MUL(uint32_t, "mul") break;
    default:
      if constexpr (Signed) LODGE_MUL(uint64_t, "imul") else LODGE_MUL(uint64_t, "mul") break;
  }
#undef LODGE_MUL
  cpu.arith = f;
  return Step::next;
}

// imul r, r/m, with or without immediate, when the source is in memory.
template <bool Three>
Step imul_source(Cpu& cpu, const Op& op) noexcept {
  uint64_t source = 0;
  if (!load_source(cpu, op, op.size, source)) return Step::fault;
  const auto apply = [&]<class T>(T) {
    uint16_t f = cpu.arith;
    T a = static_cast<T>(source);
    const T b = Three ? static_cast<T>(op.imm) : cpu.reg<T>(op.dst);
    asm(LODGE_LOAD_FLAGS "imul %[b], %[a]\n\t" LODGE_SAVE_FLAGS : [a] "+&r"(a), "+&a"(f) : [b] "r"(b) : "cc");
    put<T>(cpu, op.dst, a);
    cpu.arith = f;
  };
  op.size == 2 ? apply(uint16_t{}) : op.size == 4 ? apply(uint32_t{}) : apply(uint64_t{});
  return Step::next;
}

// The flags after a division are undefined, and what processors leave differs: some keep CF and OF, some all.
// So they are this processor's, which takes the division itself.
template <class T, bool Signed>
void divide_here(Cpu& cpu, T divisor, T& low, T& high) noexcept {
  uint64_t saved = cpu.arith;
#define LODGE_DIV(insn, dividend)                                         \
  asm("xchg %%rax, %[f]\n\t" LODGE_LOAD_FLAGS "xchg %%rax, %[f]\n\t" insn \
      " %[s]\n\t"                                                         \
      "mov %%rax, %[f]\n\t" LODGE_SAVE_FLAGS "\n\txchg %%rax, %[f]"       \
      : "+&a"(dividend), "+&d"(high), [f] "+&r"(saved)                    \
      : [s] "q"(divisor)                                                  \
      : "cc")
  if constexpr (sizeof(T) == 1) {  // AX holds both
    auto both = static_cast<uint16_t>(high << 8 | low);
    if constexpr (Signed)
      LODGE_DIV("idiv", both);
    else
      LODGE_DIV("div", both);
    low = static_cast<T>(both);
    high = static_cast<T>(both >> 8);
  } else {
    if constexpr (Signed)
      LODGE_DIV("idiv", low);
    else
      LODGE_DIV("div", low);
  }
#undef LODGE_DIV
  cpu.arith = static_cast<uint16_t>(saved);
}

// Whether the quotient fits, so that the host's division does not fault.
template <class T, bool Signed>
bool quotient_fits(T divisor, T low, T high) noexcept {
  if (divisor == 0) return false;
  if constexpr (!Signed) {
    return high < divisor;
  } else {
    using S = std::make_signed_t<T>;
    using Wide = std::conditional_t<sizeof(T) == 8, i128, int64_t>;
    constexpr unsigned bits = sizeof(T) * 8;
    const Wide dividend =
        static_cast<Wide>(static_cast<S>(high)) * (Wide{1} << bits) + static_cast<Wide>(low);
    const auto by = static_cast<Wide>(static_cast<S>(divisor));  // NOLINT(bugprone-signed-char-misuse)
    // The one quotient that overflows the wide type itself (most negative / -1) is out of range anyway.
    if (by == -1 && high == T{1} << (bits - 1) && low == 0) return false;
    const Wide quotient = dividend / by;
    return static_cast<Wide>(static_cast<S>(quotient)) == quotient;
  }
}

template <class T, bool Signed>
bool divide_as(Cpu& cpu, uint64_t source) noexcept {
  const auto divisor = static_cast<T>(source);
  T low = cpu.reg<T>(rax * 8);
  T high = cpu.reg<T>(sizeof(T) == 1 ? rax * 8 + 1 : rdx * 8);
  if (!quotient_fits<T, Signed>(divisor, low, high)) return cpu.raise(Exception::de);
  divide_here<T, Signed>(cpu, divisor, low, high);
  put<T>(cpu, rax * 8, low);
  put<T>(cpu, sizeof(T) == 1 ? rax * 8 + 1 : rdx * 8, high);
  return true;
}

template <bool Signed>
Step divide(Cpu& cpu, const Op& op) noexcept {
  uint64_t source = 0;
  if (!load_source(cpu, op, op.size, source)) return Step::fault;
  switch (op.size) {
    case 1: return done(divide_as<uint8_t, Signed>(cpu, source));
    case 2: return done(divide_as<uint16_t, Signed>(cpu, source));
    case 4: return done(divide_as<uint32_t, Signed>(cpu, source));
    default: return done(divide_as<uint64_t, Signed>(cpu, source));
  }
}

Complex multiply_instruction(ZydisMnemonic mnemonic) noexcept {
  switch (mnemonic) {
    case ZYDIS_MNEMONIC_MUL: return multiply<false>;
    case ZYDIS_MNEMONIC_DIV: return divide<false>;
    case ZYDIS_MNEMONIC_IDIV: return divide<true>;
    default: return nullptr;
  }
}

Complex multiply_signed() noexcept {
  return multiply<true>;
}
Complex imul_memory(bool three) noexcept {
  return three ? imul_source<true> : imul_source<false>;
}

}  // namespace lodge::kvm::soft::integer
