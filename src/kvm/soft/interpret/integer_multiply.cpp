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

// Flags after a division are undefined; they are left alone, as AMD's processors do.
template <class T, class Double, bool Signed>
bool divide_as(Cpu& cpu, uint64_t source) noexcept {
  using S = std::conditional_t<Signed, std::make_signed_t<T>, T>;
  using Wide = std::conditional_t<sizeof(T) == 8, std::conditional_t<Signed, i128, u128>,
                                  std::conditional_t<Signed, int64_t, uint64_t>>;
  const auto divisor = static_cast<S>(static_cast<T>(source));
  if (divisor == 0) return cpu.raise(Exception::de);
  Double dividend;
  if constexpr (sizeof(T) == 1)
    dividend = cpu.reg<uint16_t>(rax * 8);
  else
    dividend =
        static_cast<Double>(static_cast<Double>(cpu.reg<T>(rdx * 8)) << sizeof(T) * 8 | cpu.reg<T>(rax * 8));
  Wide value;
  if constexpr (!Signed)
    value = dividend;
  else if constexpr (sizeof(T) == 8)
    value = static_cast<i128>(dividend);
  else
    value = static_cast<std::make_signed_t<Double>>(dividend);
  // The one quotient that overflows the wide type itself (most negative / -1) is out of range anyway.
  if constexpr (Signed)
    if (divisor == -1 &&
        static_cast<Double>(value) == static_cast<Double>(Double{1} << (sizeof(Double) * 8 - 1)))
      return cpu.raise(Exception::de);
  const Wide quotient = value / divisor;
  const Wide remainder = value % divisor;
  if (static_cast<Wide>(static_cast<S>(quotient)) != quotient) return cpu.raise(Exception::de);
  if constexpr (sizeof(T) == 1) {
    cpu.reg<uint8_t>(rax * 8) = static_cast<uint8_t>(quotient);
    cpu.reg<uint8_t>(rax * 8 + 1) = static_cast<uint8_t>(remainder);
  } else {
    put<T>(cpu, rax * 8, static_cast<T>(quotient));
    put<T>(cpu, rdx * 8, static_cast<T>(remainder));
  }
  return true;
}

template <bool Signed>
Step divide(Cpu& cpu, const Op& op) noexcept {
  uint64_t source = 0;
  if (!load_source(cpu, op, op.size, source)) return Step::fault;
  switch (op.size) {
    case 1: return done(divide_as<uint8_t, uint16_t, Signed>(cpu, source));
    case 2: return done(divide_as<uint16_t, uint32_t, Signed>(cpu, source));
    case 4: return done(divide_as<uint32_t, uint64_t, Signed>(cpu, source));
    default: return done(divide_as<uint64_t, u128, Signed>(cpu, source));
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
