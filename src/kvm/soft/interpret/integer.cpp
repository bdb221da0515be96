// Integer instructions beyond the hot ones: one Complex handler each, over generic operands.
//
// Operand conventions: when Op::has_memory is set, the instruction's r/m operand is in memory; otherwise it is the
// register `dst` (destination forms) or `src` (source forms).
#include "kvm/soft/interpret/integer.hpp"

#include <utility>

#include "kvm/soft/cpu/platform.hpp"
#include "kvm/soft/interpret/alu.hpp"
#include "kvm/soft/interpret/threaded.hpp"

namespace lodge::kvm::soft::integer {
namespace {

__extension__ typedef __int128 i128;
__extension__ typedef unsigned __int128 u128;

bool in_memory(const Op& op) noexcept { return (op.flags & Op::has_memory) != 0; }

// Reads the r/m source of `size` bytes.
bool load_source(Cpu& cpu, const Op& op, unsigned size, uint64_t& value) noexcept {
  if (!in_memory(op)) {
    value = cpu.get_reg(op.src, size);
    return true;
  }
  uint64_t lin = 0;
  if (!cpu.linear(op, size, false, lin) || !cpu.load_slow(lin, size)) return false;
  value = cpu.scratch;
  return true;
}

bool load_destination(Cpu& cpu, const Op& op, unsigned size, uint64_t& value) noexcept {
  if (!in_memory(op)) {
    value = cpu.get_reg(op.dst, size);
    return true;
  }
  uint64_t lin = 0;
  if (!cpu.linear(op, size, false, lin) || !cpu.load_slow(lin, size)) return false;
  value = cpu.scratch;
  return true;
}

bool store_destination(Cpu& cpu, const Op& op, unsigned size, uint64_t value) noexcept {
  if (!in_memory(op)) {
    cpu.set_reg(op.dst, size, value);
    return true;
  }
  uint64_t lin = 0;
  return cpu.linear(op, size, true, lin) && cpu.store_slow(lin, size, value);
}

// destination = f(destination, flags), atomically when in RAM: unlocked instructions lose nothing by it. `f` may run
// more than once. Flags are committed only when the store succeeded.
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

template <class F>
bool modify(Cpu& cpu, const Op& op, F&& f) noexcept {
  return by_size(op.size, [&]<class T>(T) { return modify_as<T>(cpu, op, f); });
}

Step done(bool ok) noexcept { return ok ? Step::next : Step::fault; }

}  // namespace

template <Alu A>
Step alu_modify(Cpu& cpu, const Op& op) noexcept {
  return done(by_size(op.size, [&]<class T>(T) {
    const T b = op.src != no_register ? cpu.reg<T>(op.src) : static_cast<T>(op.imm);
    return modify_as<T>(cpu, op, [b](T a, uint16_t& f) { return alu<A, T>(a, b, f); });
  }));
}

template <Unary U>
Step unary_modify(Cpu& cpu, const Op& op) noexcept {
  return done(by_size(op.size, [&]<class T>(T) {
    return modify_as<T>(cpu, op, [](T a, uint16_t& f) { return unary<U, T>(a, f); });
  }));
}

template <Shift S>
Step shift_modify(Cpu& cpu, const Op& op) noexcept {
  const uint8_t count = op.src != no_register ? cpu.reg<uint8_t>(rcx * 8) : static_cast<uint8_t>(op.imm);
  return done(by_size(op.size, [&]<class T>(T) {
    return modify_as<T>(cpu, op, [count](T a, uint16_t& f) { return shift<S, T>(a, count, f); });
  }));
}

// SHLD, SHRD. For 16-bit operands and counts above 16 the silicon's own answer is taken, as for the flags.
template <bool Left>
Step double_shift(Cpu& cpu, const Op& op) noexcept {
  const uint8_t count = (op.flags & Op::count_in_cl) != 0 ? cpu.reg<uint8_t>(rcx * 8) : static_cast<uint8_t>(op.imm);
  const auto apply = [&]<class T>(T) {
    const T b = cpu.reg<T>(op.src);
    return modify_as<T>(cpu, op, [b, count](T a, uint16_t& f) {
      if constexpr (Left)
        asm(LODGE_LOAD_FLAGS "shld %%cl, %[b], %[a]\n\t" LODGE_SAVE_FLAGS
            : [a] "+&r"(a), "+&a"(f)
            : [b] "r"(b), "c"(count)
            : "cc");
      else
        asm(LODGE_LOAD_FLAGS "shrd %%cl, %[b], %[a]\n\t" LODGE_SAVE_FLAGS
            : [a] "+&r"(a), "+&a"(f)
            : [b] "r"(b), "c"(count)
            : "cc");
      return a;
    });
  };
  switch (op.size) {
    case 2: return done(apply(uint16_t{}));
    case 4: return done(apply(uint32_t{}));
    default: return done(apply(uint64_t{}));
  }
}

// --- bits -----------------------------------------------------------------------------------------------------------

enum class Bit : uint8_t { test, set, reset, complement };

template <Bit B, class T>
T bit_apply(T a, unsigned bit, uint16_t& f) noexcept {
  const T index = static_cast<T>(bit);
  if constexpr (B == Bit::test)
    asm(LODGE_LOAD_FLAGS "bt %[i], %[a]\n\t" LODGE_SAVE_FLAGS : [a] "+&r"(a), "+&a"(f) : [i] "r"(index) : "cc");
  else if constexpr (B == Bit::set)
    asm(LODGE_LOAD_FLAGS "bts %[i], %[a]\n\t" LODGE_SAVE_FLAGS : [a] "+&r"(a), "+&a"(f) : [i] "r"(index) : "cc");
  else if constexpr (B == Bit::reset)
    asm(LODGE_LOAD_FLAGS "btr %[i], %[a]\n\t" LODGE_SAVE_FLAGS : [a] "+&r"(a), "+&a"(f) : [i] "r"(index) : "cc");
  else
    asm(LODGE_LOAD_FLAGS "btc %[i], %[a]\n\t" LODGE_SAVE_FLAGS : [a] "+&r"(a), "+&a"(f) : [i] "r"(index) : "cc");
  return a;
}

// With a register bit offset and a memory operand the offset reaches beyond the operand (SDM volume 2, BT).
template <Bit B>
Step bit_op(Cpu& cpu, const Op& op) noexcept {
  const auto apply = [&]<class T>(T) -> bool {
    const bool by_register = op.src != no_register;
    const auto bit = by_register ? static_cast<std::make_signed_t<T>>(cpu.reg<T>(op.src))
                                 : static_cast<std::make_signed_t<T>>(op.imm);
    constexpr unsigned width = sizeof(T) * 8;
    const unsigned low = static_cast<unsigned>(bit) & (width - 1);
    uint16_t flags = cpu.arith;
    if (!in_memory(op)) {
      const T r = bit_apply<B, T>(cpu.reg<T>(op.dst), low, flags);
      if (B != Bit::test) put<T>(cpu, op.dst, r);
      cpu.arith = flags;
      return true;
    }
    uint64_t offset = cpu.effective_address(op);
    if (by_register) {
      const int64_t step = (int64_t{bit} >> (width == 64 ? 6 : width == 32 ? 5 : 4)) * int64_t{sizeof(T)};
      offset += static_cast<uint64_t>(step);
      if (op.address_size == 4) offset = static_cast<uint32_t>(offset);
      if (op.address_size == 2) offset = static_cast<uint16_t>(offset);
    }
    uint64_t lin = 0;
    if (!cpu.linear(static_cast<SegmentName>(op.segment), offset, sizeof(T), B != Bit::test, lin)) return false;
    if constexpr (B == Bit::test) {
      if (!cpu.load_slow(lin, sizeof(T))) return false;
      bit_apply<B, T>(static_cast<T>(cpu.scratch), low, flags);
      cpu.arith = flags;
      return true;
    } else {
      return modify_at<T>(cpu, lin, [low](T a, uint16_t& f) { return bit_apply<B, T>(a, low, f); });
    }
  };
  switch (op.size) {
    case 2: return done(apply(uint16_t{}));
    case 4: return done(apply(uint32_t{}));
    default: return done(apply(uint64_t{}));
  }
}

#define LODGE_SCAN(name, insn, keeps)                                                                                 \
  Step name(Cpu& cpu, const Op& op) noexcept {                                                                  \
    uint64_t source = 0;                                                                                        \
    if (!load_source(cpu, op, op.size, source)) return Step::fault;                                             \
    const auto apply = [&]<class T>(T) {                                                                        \
      uint16_t f = cpu.arith;                                                                                   \
      const T s = static_cast<T>(source);                                                                       \
      T d = cpu.reg<T>(op.dst);                                                                                 \
      asm(LODGE_LOAD_FLAGS insn " %[s], %[d]\n\t" LODGE_SAVE_FLAGS : [d] "+&r"(d), "+&a"(f) : [s] "r"(s) : "cc"); \
      /* Without a set bit BSF and BSR leave all of the destination alone, 32-bit forms included. */            \
      if (!(keeps) || s != 0) put<T>(cpu, op.dst, d);                                                           \
      cpu.arith = f;                                                                                            \
    };                                                                                                          \
    op.size == 2 ? apply(uint16_t{}) : op.size == 4 ? apply(uint32_t{}) : apply(uint64_t{});                    \
    return Step::next;                                                                                          \
  }
LODGE_SCAN(bsf, "bsf", true)
LODGE_SCAN(bsr, "bsr", true)
LODGE_SCAN(tzcnt, "tzcnt", false)
LODGE_SCAN(lzcnt, "lzcnt", false)
LODGE_SCAN(popcnt, "popcnt", false)
#undef LODGE_SCAN

// BMI1, BMI2 and ADX: 32- and 64-bit operands. dst, the r/m source, and for three operands the register `imm`.
#define LODGE_BMI2(name, insn)                                                                                      \
  Step name(Cpu& cpu, const Op& op) noexcept {                                                                      \
    uint64_t source = 0;                                                                                            \
    if (!load_source(cpu, op, op.size, source)) return Step::fault;                                                 \
    const auto apply = [&]<class T>(T) {                                                                            \
      uint16_t f = cpu.arith;                                                                                       \
      const T s = static_cast<T>(source);                                                                           \
      const T r = cpu.reg<T>(static_cast<uint8_t>(op.imm));                                                         \
      T d;                                                                                                          \
      asm(LODGE_LOAD_FLAGS insn "\n\t" LODGE_SAVE_FLAGS : [d] "=&r"(d), "+&a"(f) : [s] "r"(s), [r] "r"(r) : "cc"); \
      put<T>(cpu, op.dst, d);                                                                                       \
      cpu.arith = f;                                                                                                \
    };                                                                                                              \
    op.size == 4 ? apply(uint32_t{}) : apply(uint64_t{});                                                           \
    return Step::next;                                                                                              \
  }
LODGE_BMI2(andn, "andn %[s], %[r], %[d]")
LODGE_BMI2(bextr, "bextr %[r], %[s], %[d]")
LODGE_BMI2(bzhi, "bzhi %[r], %[s], %[d]")
LODGE_BMI2(pdep, "pdep %[s], %[r], %[d]")
LODGE_BMI2(pext, "pext %[s], %[r], %[d]")
LODGE_BMI2(sarx, "sarx %[r], %[s], %[d]")
LODGE_BMI2(shlx, "shlx %[r], %[s], %[d]")
LODGE_BMI2(shrx, "shrx %[r], %[s], %[d]")
LODGE_BMI2(blsi, "blsi %[s], %[d]")
LODGE_BMI2(blsmsk, "blsmsk %[s], %[d]")
LODGE_BMI2(blsr, "blsr %[s], %[d]")
#undef LODGE_BMI2

Step rorx(Cpu& cpu, const Op& op) noexcept {
  uint64_t source = 0;
  if (!load_source(cpu, op, op.size, source)) return Step::fault;
  const unsigned width = op.size * 8;
  const unsigned count = op.imm & (width - 1);
  if (op.size == 4) {
    const auto s = static_cast<uint32_t>(source);
    put<uint32_t>(cpu, op.dst, s >> count | s << (-count & 31));
  } else {
    cpu.reg<uint64_t>(op.dst) = source >> count | source << (-count & 63);
  }
  return Step::next;
}

// dst: high half (written last), register `imm`: low half; the multiplicand is RDX.
Step mulx(Cpu& cpu, const Op& op) noexcept {
  uint64_t source = 0;
  if (!load_source(cpu, op, op.size, source)) return Step::fault;
  if (op.size == 4) {
    const uint64_t product = uint64_t{cpu.reg<uint32_t>(rdx * 8)} * static_cast<uint32_t>(source);
    put<uint32_t>(cpu, static_cast<uint8_t>(op.imm), static_cast<uint32_t>(product));
    put<uint32_t>(cpu, op.dst, static_cast<uint32_t>(product >> 32));
  } else {
    const auto product = static_cast<u128>(cpu.gpr[rdx]) * source;
    cpu.reg<uint64_t>(static_cast<uint8_t>(op.imm)) = static_cast<uint64_t>(product);
    cpu.reg<uint64_t>(op.dst) = static_cast<uint64_t>(product >> 64);
  }
  return Step::next;
}

template <bool Overflow>
Step adx(Cpu& cpu, const Op& op) noexcept {
  uint64_t source = 0;
  if (!load_source(cpu, op, op.size, source)) return Step::fault;
  const bool carry = Overflow ? (cpu.arith & 1) != 0 : cpu.cf();
  bool out = false;
  if (op.size == 4) {
    const uint64_t sum = uint64_t{cpu.reg<uint32_t>(op.dst)} + static_cast<uint32_t>(source) + (carry ? 1 : 0);
    put<uint32_t>(cpu, op.dst, static_cast<uint32_t>(sum));
    out = sum >> 32 != 0;
  } else {
    const auto sum = static_cast<u128>(cpu.reg<uint64_t>(op.dst)) + source + (carry ? 1 : 0);
    cpu.reg<uint64_t>(op.dst) = static_cast<uint64_t>(sum);
    out = static_cast<uint64_t>(sum >> 64) != 0;
  }
  if (Overflow)
    cpu.arith = static_cast<uint16_t>((cpu.arith & 0xff00) | (out ? 1 : 0));
  else
    cpu.set_cf(out);
  return Step::next;
}

// CRC-32C: dst is 32 or 64 bits wide, the source has op.size bytes.
Step crc32(Cpu& cpu, const Op& op) noexcept {
  uint64_t source = 0;
  if (!load_source(cpu, op, op.size, source)) return Step::fault;
  uint64_t crc = cpu.reg<uint32_t>(op.dst);
  switch (op.size) {
    case 1: asm("crc32b %b1, %k0" : "+r"(crc) : "r"(source)); break;
    case 2: asm("crc32w %w1, %k0" : "+r"(crc) : "r"(source)); break;
    case 4: asm("crc32l %k1, %k0" : "+r"(crc) : "r"(source)); break;
    default: asm("crc32q %1, %0" : "+r"(crc) : "r"(source)); break;
  }
  cpu.reg<uint64_t>(op.dst) = static_cast<uint32_t>(crc);
  return Step::next;
}

uint64_t swap_bytes(uint64_t value, unsigned size) noexcept {
  return size == 2   ? __builtin_bswap16(static_cast<uint16_t>(value))
         : size == 4 ? __builtin_bswap32(static_cast<uint32_t>(value))
                     : __builtin_bswap64(value);
}

Step movbe_load(Cpu& cpu, const Op& op) noexcept {
  uint64_t source = 0;
  if (!load_source(cpu, op, op.size, source)) return Step::fault;
  cpu.set_reg(op.dst, op.size, swap_bytes(source, op.size));
  return Step::next;
}

Step movbe_store(Cpu& cpu, const Op& op) noexcept {
  return done(store_destination(cpu, op, op.size, swap_bytes(cpu.get_reg(op.src, op.size), op.size)));
}

// A 16-bit operand is undefined by the manuals; processors give 0.
Step bswap(Cpu& cpu, const Op& op) noexcept {
  const uint64_t value = cpu.get_reg(op.dst, op.size);
  cpu.set_reg(op.dst, op.size, op.size == 2 ? 0 : swap_bytes(value, op.size));
  return Step::next;
}

// --- multiply and divide --------------------------------------------------------------------------------------------

template <bool Signed>
Step multiply(Cpu& cpu, const Op& op) noexcept {
  uint64_t source = 0;
  if (!load_source(cpu, op, op.size, source)) return Step::fault;
  uint16_t f = cpu.arith;
  // The flags travel through RBX here: the product needs RAX.
#define LODGE_MUL(T, insn)                                                                                \
  {                                                                                                       \
    T low = cpu.reg<T>(rax * 8);                                                                          \
    T high = 0;                                                                                           \
    const T s = static_cast<T>(source);                                                                   \
    uint64_t saved = f;                                                                                   \
    asm("xchg %%rax, %[f]\n\t" LODGE_LOAD_FLAGS "xchg %%rax, %[f]\n\t" insn " %[s]\n\t"                   \
        "mov %%rax, %[f]\n\t" LODGE_SAVE_FLAGS "\n\txchg %%rax, %[f]"                                     \
        : "+&a"(low), "=&d"(high), [f] "+&r"(saved)                                                        \
        : [s] "r"(s)                                                                                      \
        : "cc");                                                                                          \
    put<T>(cpu, rax * 8, low);                                                                            \
    put<T>(cpu, rdx * 8, high);                                                                           \
    f = static_cast<uint16_t>(saved);                                                                     \
  }
  switch (op.size) {
    case 1: {
      // AX = AL * source.
      uint16_t product = cpu.reg<uint8_t>(rax * 8);
      const auto s = static_cast<uint8_t>(source);
      uint64_t saved = f;
      if constexpr (Signed)
        asm("xchg %%rax, %[f]\n\t" LODGE_LOAD_FLAGS "xchg %%rax, %[f]\n\timulb %[s]\n\tmov %%rax, %[f]\n\t" LODGE_SAVE_FLAGS
            "\n\txchg %%rax, %[f]"
            : "+&a"(product), [f] "+&r"(saved)
            : [s] "q"(s)
            : "cc");
      else
        asm("xchg %%rax, %[f]\n\t" LODGE_LOAD_FLAGS "xchg %%rax, %[f]\n\tmulb %[s]\n\tmov %%rax, %[f]\n\t" LODGE_SAVE_FLAGS
            "\n\txchg %%rax, %[f]"
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
    dividend = static_cast<Double>(static_cast<Double>(cpu.reg<T>(rdx * 8)) << sizeof(T) * 8 | cpu.reg<T>(rax * 8));
  Wide value;
  if constexpr (!Signed)
    value = dividend;
  else if constexpr (sizeof(T) == 8)
    value = static_cast<i128>(dividend);
  else
    value = static_cast<std::make_signed_t<Double>>(dividend);
  // The one quotient that overflows the wide type itself (most negative / -1) is out of range anyway.
  if constexpr (Signed)
    if (divisor == -1 && static_cast<Double>(value) == static_cast<Double>(Double{1} << (sizeof(Double) * 8 - 1)))
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

// --- moves and exchanges --------------------------------------------------------------------------------------------

Step cmov_source(Cpu& cpu, const Op& op) noexcept {
  uint64_t source = 0;
  if (!load_source(cpu, op, op.size, source)) return Step::fault;
  const bool take = condition(static_cast<unsigned>(op.imm), cpu.arith);
  cpu.set_reg(op.dst, op.size, take ? source : cpu.get_reg(op.dst, op.size));
  return Step::next;
}

Step setcc_memory(Cpu& cpu, const Op& op) noexcept {
  return done(store_destination(cpu, op, 1, condition(static_cast<unsigned>(op.imm), cpu.arith) ? 1 : 0));
}

// XCHG with memory is locked whether it says so or not.
Step xchg(Cpu& cpu, const Op& op) noexcept {
  return done(by_size(op.size, [&]<class T>(T) {
    const T mine = cpu.reg<T>(op.src);
    T theirs{};
    if (!modify_as<T>(cpu, op, [&](T a, uint16_t&) {
          theirs = a;
          return mine;
        }))
      return false;
    put<T>(cpu, op.src, theirs);
    return true;
  }));
}

Step xadd(Cpu& cpu, const Op& op) noexcept {
  return done(by_size(op.size, [&]<class T>(T) {
    const T mine = cpu.reg<T>(op.src);
    T old{};
    if (!modify_as<T>(cpu, op, [&](T a, uint16_t& f) {
          old = a;
          return alu<Alu::add, T>(a, mine, f);
        }))
      return false;
    // With twice the same register the sum stays.
    if (in_memory(op) || op.dst != op.src) put<T>(cpu, op.src, old);
    return true;
  }));
}

// The destination is written in both cases (with its old value when they differ), so it must be writable.
Step cmpxchg(Cpu& cpu, const Op& op) noexcept {
  return done(by_size(op.size, [&]<class T>(T) {
    const T accumulator = cpu.reg<T>(rax * 8);
    const T desired = cpu.reg<T>(op.src);
    T old{};
    if (in_memory(op)) {
      if (!modify_as<T>(cpu, op, [&](T a, uint16_t& f) {
            old = a;
            alu<Alu::cmp, T>(accumulator, a, f);
            return a == accumulator ? desired : a;
          }))
        return false;
    } else {
      old = cpu.reg<T>(op.dst);
      uint16_t f = cpu.arith;
      alu<Alu::cmp, T>(accumulator, old, f);
      cpu.arith = f;
      if (old == accumulator) put<T>(cpu, op.dst, desired);
    }
    if (old != accumulator) put<T>(cpu, rax * 8, old);
    return true;
  }));
}

// CMPXCHG8B and CMPXCHG16B.
Step cmpxchg_pair(Cpu& cpu, const Op& op) noexcept {
  uint64_t lin = 0;
  if (op.size == 4) {
    if (!cpu.linear(op, 8, true, lin)) return Step::fault;
    const uint64_t expected = uint64_t{cpu.reg<uint32_t>(rdx * 8)} << 32 | cpu.reg<uint32_t>(rax * 8);
    const uint64_t desired = uint64_t{cpu.reg<uint32_t>(rcx * 8)} << 32 | cpu.reg<uint32_t>(rbx * 8);
    uint64_t old = 0;
    const uint16_t flags = cpu.arith;
    if (!modify_at<uint64_t>(cpu, lin, [&](uint64_t a, uint16_t&) {
          old = a;
          return a == expected ? desired : a;
        }))
      return Step::fault;
    cpu.arith = flags;
    cpu.set_zf(old == expected);
    if (old != expected) {
      put<uint32_t>(cpu, rax * 8, static_cast<uint32_t>(old));
      put<uint32_t>(cpu, rdx * 8, static_cast<uint32_t>(old >> 32));
    }
    return Step::next;
  }
  if (!cpu.linear(op, 16, true, lin)) return Step::fault;
  if ((lin & 15) != 0) return done(cpu.raise(Exception::gp, 0));
  uint8_t* host = cpu.host_for_write(lin, 16);
  uint64_t low = cpu.gpr[rax];
  uint64_t high = cpu.gpr[rdx];
  bool equal = false;
  if (host != nullptr) {
    asm volatile("lock cmpxchg16b (%[host])"
                 : "=@ccz"(equal), "+a"(low), "+d"(high)
                 : [host] "r"(host), "b"(cpu.gpr[rbx]), "c"(cpu.gpr[rcx])
                 : "memory");
  } else {
    if (cpu.interrupted_access()) return Step::fault;
    uint64_t old[2];
    if (!cpu.read_bytes(lin, old, 16)) return Step::fault;
    equal = old[0] == low && old[1] == high;
    const uint64_t desired[2] = {equal ? cpu.gpr[rbx] : old[0], equal ? cpu.gpr[rcx] : old[1]};
    if (!cpu.write_bytes(lin, desired, 16)) return Step::fault;
    low = old[0], high = old[1];
  }
  cpu.set_zf(equal);
  if (!equal) cpu.gpr[rax] = low, cpu.gpr[rdx] = high;
  return Step::next;
}

Step xlat(Cpu& cpu, const Op& op) noexcept {
  uint64_t offset = cpu.gpr[rbx] + cpu.reg<uint8_t>(rax * 8);
  if (op.address_size == 4) offset = static_cast<uint32_t>(offset);
  if (op.address_size == 2) offset = static_cast<uint16_t>(offset);
  uint64_t lin = 0;
  if (!cpu.linear(static_cast<SegmentName>(op.segment), offset, 1, false, lin) || !cpu.load_slow(lin, 1))
    return Step::fault;
  cpu.reg<uint8_t>(rax * 8) = static_cast<uint8_t>(cpu.scratch);
  return Step::next;
}

// CBW, CWDE, CDQE.
Step widen_accumulator(Cpu& cpu, const Op& op) noexcept {
  switch (op.size) {
    case 2: cpu.reg<uint16_t>(0) = static_cast<uint16_t>(static_cast<int8_t>(cpu.gpr[rax])); break;
    case 4: put<uint32_t>(cpu, 0, static_cast<uint32_t>(static_cast<int16_t>(cpu.gpr[rax]))); break;
    default: cpu.gpr[rax] = static_cast<uint64_t>(int64_t{static_cast<int32_t>(cpu.gpr[rax])}); break;
  }
  return Step::next;
}

// CWD, CDQ, CQO.
Step sign_to_rdx(Cpu& cpu, const Op& op) noexcept {
  const uint64_t sign = cpu.get_reg(0, op.size) >> (op.size * 8 - 1) & 1;
  cpu.set_reg(rdx * 8, op.size, sign != 0 ? ~uint64_t{0} : 0);
  return Step::next;
}

Step lahf(Cpu& cpu, const Op&) noexcept {
  cpu.reg<uint8_t>(1) = static_cast<uint8_t>(cpu.arith >> 8);
  return Step::next;
}

Step sahf(Cpu& cpu, const Op&) noexcept {
  cpu.arith = static_cast<uint16_t>((cpu.reg<uint8_t>(1) & 0xd5) << 8 | 0x200 | (cpu.arith & 1));
  return Step::next;
}

Step clc(Cpu& cpu, const Op&) noexcept { return cpu.set_cf(false), Step::next; }
Step stc(Cpu& cpu, const Op&) noexcept { return cpu.set_cf(true), Step::next; }
Step cmc(Cpu& cpu, const Op&) noexcept { return cpu.set_cf(!cpu.cf()), Step::next; }
Step cld(Cpu& cpu, const Op&) noexcept { return cpu.system_flags &= ~flag::df, Step::next; }
Step std_(Cpu& cpu, const Op&) noexcept { return cpu.system_flags |= flag::df, Step::next; }

Step salc(Cpu& cpu, const Op&) noexcept {
  cpu.reg<uint8_t>(0) = cpu.cf() ? 0xff : 0;
  return Step::next;
}

// --- decimal adjustments (SDM volume 2; none of them exists in 64-bit mode) --------------------------------------------

namespace {
void set_szp(Cpu& cpu, uint8_t result, bool carry, bool adjust) noexcept {
  uint16_t f = 0;
  alu<Alu::test, uint8_t>(result, result, f);
  cpu.arith = static_cast<uint16_t>((f & ~0x1101) | (carry ? 0x100 : 0) | (adjust ? 0x1000 : 0));
}
}  // namespace

template <bool Subtract>
Step decimal(Cpu& cpu, const Op&) noexcept {
  const auto old = cpu.reg<uint8_t>(0);
  const bool old_carry = cpu.cf();
  const bool adjust = (old & 15) > 9 || (cpu.arith & 0x1000) != 0;
  const bool high = old > 0x99 || old_carry;
  auto al = old;
  bool carry = high;
  if (adjust) {
    if (Subtract) carry = carry || old < 6;
    al = static_cast<uint8_t>(Subtract ? al - 6 : al + 6);
  }
  if (high) al = static_cast<uint8_t>(Subtract ? al - 0x60 : al + 0x60);
  cpu.reg<uint8_t>(0) = al;
  set_szp(cpu, al, carry, adjust);
  return Step::next;
}

template <bool Subtract>
Step ascii(Cpu& cpu, const Op&) noexcept {
  auto ax = cpu.reg<uint16_t>(0);
  const bool adjust = (ax & 15) > 9 || (cpu.arith & 0x1000) != 0;
  if (adjust) ax = static_cast<uint16_t>(Subtract ? ax - 0x106 : ax + 0x106);
  ax &= 0xff0f;
  cpu.reg<uint16_t>(0) = ax;
  set_szp(cpu, static_cast<uint8_t>(ax), adjust, adjust);
  return Step::next;
}

Step aam(Cpu& cpu, const Op& op) noexcept {
  const auto base = static_cast<uint8_t>(op.imm);
  if (base == 0) return done(cpu.raise(Exception::de));
  const auto al = cpu.reg<uint8_t>(0);
  cpu.reg<uint8_t>(1) = al / base;
  cpu.reg<uint8_t>(0) = al % base;
  set_szp(cpu, al % base, false, false);
  return Step::next;
}

Step aad(Cpu& cpu, const Op& op) noexcept {
  const auto al = static_cast<uint8_t>(cpu.reg<uint8_t>(0) + cpu.reg<uint8_t>(1) * static_cast<uint8_t>(op.imm));
  cpu.reg<uint16_t>(0) = al;
  set_szp(cpu, al, false, false);
  return Step::next;
}

Step bound(Cpu& cpu, const Op& op) noexcept {
  uint64_t lin = 0;
  if (!cpu.linear(op, op.size * 2, false, lin)) return Step::fault;
  uint64_t pair = 0;
  if (!cpu.read_bytes(lin, &pair, op.size * 2)) return Step::fault;
  const bool outside =
      op.size == 2
          ? static_cast<int16_t>(cpu.reg<uint16_t>(op.dst)) < static_cast<int16_t>(pair) ||
                static_cast<int16_t>(cpu.reg<uint16_t>(op.dst)) > static_cast<int16_t>(pair >> 16)
          : static_cast<int32_t>(cpu.reg<uint32_t>(op.dst)) < static_cast<int32_t>(pair) ||
                static_cast<int32_t>(cpu.reg<uint32_t>(op.dst)) > static_cast<int32_t>(pair >> 32);
  return done(!outside || cpu.raise(Exception::br));
}

// --- stack ----------------------------------------------------------------------------------------------------------

Step push_register(Cpu& cpu, const Op& op) noexcept { return done(cpu.push(cpu.get_reg(op.dst, op.size), op.size)); }
Step push_immediate(Cpu& cpu, const Op& op) noexcept { return done(cpu.push(op.imm, op.size)); }

Step push_memory(Cpu& cpu, const Op& op) noexcept {
  uint64_t value = 0;
  return done(load_destination(cpu, op, op.size, value) && cpu.push(value, op.size));
}

Step pop_register(Cpu& cpu, const Op& op) noexcept {
  uint64_t value = 0;
  if (!cpu.pop(value, op.size)) return Step::fault;
  cpu.set_reg(op.dst, op.size, value);
  return Step::next;
}

// The address is computed with the incremented RSP.
Step pop_memory(Cpu& cpu, const Op& op) noexcept {
  const uint64_t old = cpu.gpr[rsp];
  uint64_t value = 0;
  if (!cpu.pop(value, op.size)) return Step::fault;
  if (store_destination(cpu, op, op.size, value)) return Step::next;
  cpu.gpr[rsp] = old;
  return Step::fault;
}

// PUSHA and POPA: all eight or none.
Step pusha(Cpu& cpu, const Op& op) noexcept {
  const uint64_t old = cpu.gpr[rsp];
  for (uint8_t i = 0; i < 8; ++i)
    if (!cpu.push(i == rsp ? old : cpu.gpr[i], op.size)) {
      cpu.gpr[rsp] = old;
      return Step::fault;
    }
  return Step::next;
}

Step popa(Cpu& cpu, const Op& op) noexcept {
  const uint64_t old = cpu.gpr[rsp];
  uint64_t values[8];
  for (unsigned i = 8; i-- > 0;)
    if (!cpu.pop(values[i], op.size)) {
      cpu.gpr[rsp] = old;
      return Step::fault;
    }
  for (uint8_t i = 0; i < 8; ++i)
    if (i != rsp) cpu.set_reg(i * 8, op.size, values[i]);
  return Step::next;
}

// imm: frame size, nesting level in bits 16-20.
Step enter(Cpu& cpu, const Op& op) noexcept {
  const uint64_t old_sp = cpu.gpr[rsp];
  const uint64_t frame_size = op.imm & 0xffff;
  const unsigned level = op.imm >> 16 & 31;
  const auto fail = [&] {
    cpu.gpr[rsp] = old_sp;
    return Step::fault;
  };
  if (!cpu.push(cpu.gpr[rbp], op.size)) return fail();
  const uint64_t frame = cpu.gpr[rsp];
  for (unsigned i = 1; i < level; ++i) {
    uint64_t lin = 0;
    const uint64_t from = (cpu.gpr[rbp] - uint64_t{i} * op.size) & cpu.stack_mask();
    if (!cpu.linear(seg_ss, from, op.size, false, lin) || !cpu.load_slow(lin, op.size)) return fail();
    if (!cpu.push(cpu.scratch, op.size)) return fail();
  }
  if (level > 0 && !cpu.push(frame, op.size)) return fail();
  const uint64_t top = cpu.gpr[rsp] - frame_size;
  // The new top of stack must be writable (SDM volume 2, ENTER).
  uint64_t lin = 0;
  if (!cpu.linear(seg_ss, top & cpu.stack_mask(), op.size, true, lin) || !cpu.probe_write(lin, 1)) return fail();
  cpu.set_reg(rbp * 8, op.size, frame);
  cpu.set_stack_pointer(top);
  return Step::next;
}

Step leave_frame(Cpu& cpu, const Op& op) noexcept {
  const uint64_t old = cpu.gpr[rsp];
  cpu.set_stack_pointer(cpu.gpr[rbp]);
  uint64_t value = 0;
  if (!cpu.pop(value, op.size)) {
    cpu.gpr[rsp] = old;
    return Step::fault;
  }
  cpu.set_reg(rbp * 8, op.size, value);
  return Step::next;
}

// --- near branches --------------------------------------------------------------------------------------------------

namespace {
// False (with #GP(0)) when a near branch would leave CS.
bool branch_to(Cpu& cpu, uint64_t target, unsigned size) noexcept {
  target = cpu.truncate_branch(target, size);
  if (cpu.mode() == Mode::bits64 ? !cpu.canonical(target) : target > cpu.segment[seg_cs].limit)
    return cpu.raise(Exception::gp, 0);
  cpu.rip = target;
  return true;
}
Step branched(bool ok) noexcept { return ok ? Step::branch : Step::fault; }

// The target is judged before the return address is written, but after its place is found to be writable.
Step call(Cpu& cpu, const Op& op, uint64_t target) noexcept {
  const uint64_t old = cpu.rip;
  if (!branch_to(cpu, target, op.size)) {
    uint64_t place = 0;
    const uint64_t top = (cpu.gpr[rsp] - op.size) & cpu.stack_mask();
    if (cpu.linear(seg_ss, top, op.size, true, place) && check_alignment(cpu, place, op.size) &&
        cpu.probe_write(place, op.size))
      cpu.raise(Exception::gp, 0);
    return Step::fault;
  }
  if (cpu.push(cpu.next_rip(op), op.size)) return Step::branch;
  cpu.rip = old;
  return Step::fault;
}
}  // namespace

Step jmp_indirect(Cpu& cpu, const Op& op) noexcept {
  uint64_t target = 0;
  return branched(load_destination(cpu, op, op.size, target) && branch_to(cpu, target, op.size));
}

Step call_indirect(Cpu& cpu, const Op& op) noexcept {
  uint64_t target = 0;
  if (!load_destination(cpu, op, op.size, target)) return Step::fault;
  return call(cpu, op, target);
}

Step call_relative(Cpu& cpu, const Op& op) noexcept {
  return call(cpu, op, cpu.gpr[gpr_rip] + op.imm);
}

Step jmp_relative(Cpu& cpu, const Op& op) noexcept {
  return branched(branch_to(cpu, cpu.gpr[gpr_rip] + op.imm, op.size));
}

// imm: target; src: condition code.
Step jcc_relative(Cpu& cpu, const Op& op) noexcept {
  if (!condition(op.src, cpu.arith)) return cpu.rip = cpu.next_rip(op), Step::branch;
  return jmp_relative(cpu, op);
}

Step ret_near(Cpu& cpu, const Op& op) noexcept {
  const uint64_t old = cpu.gpr[rsp];
  uint64_t target = 0;
  if (!cpu.pop(target, op.size)) return Step::fault;
  if (!branch_to(cpu, target, op.size)) {
    cpu.gpr[rsp] = old;
    return Step::fault;
  }
  cpu.set_stack_pointer((cpu.gpr[rsp] & cpu.stack_mask()) + op.imm);
  return Step::branch;
}

namespace {
uint64_t counter(Cpu& cpu, const Op& op) noexcept { return cpu.get_reg(rcx * 8, op.address_size); }
}  // namespace

Step jcxz(Cpu& cpu, const Op& op) noexcept {
  if (counter(cpu, op) != 0) return cpu.rip = cpu.next_rip(op), Step::branch;
  return jmp_relative(cpu, op);
}

// LOOP (kind 0), LOOPE (1), LOOPNE (2).
template <unsigned Kind>
Step loop(Cpu& cpu, const Op& op) noexcept {
  const uint64_t left = counter(cpu, op) - 1;
  const uint64_t mask = op.address_size == 8 ? ~uint64_t{0} : op.address_size == 4 ? 0xffffffff : 0xffff;
  const bool go = (left & mask) != 0 && (Kind == 0 || cpu.zf() == (Kind == 1));
  if (go) {
    if (!branch_to(cpu, cpu.gpr[gpr_rip] + op.imm, op.size)) return Step::fault;
  } else {
    cpu.rip = cpu.next_rip(op);
  }
  cpu.set_reg(rcx * 8, op.address_size, left);
  return Step::branch;
}

// --- ports ----------------------------------------------------------------------------------------------------------

Step in_port(Cpu& cpu, const Op& op) noexcept {
  const auto port = op.src != no_register ? cpu.reg<uint16_t>(rdx * 8) : static_cast<uint16_t>(op.imm & 0xff);
  if (!check_io_permission(cpu, port, op.size)) return Step::fault;
  uint64_t value = 0;
  if (!cpu.platform().io(port, &value, op.size, 1, false)) return Step::fault;
  cpu.set_reg(0, op.size, value);
  return Step::next;
}

Step out_port(Cpu& cpu, const Op& op) noexcept {
  const auto port = op.src != no_register ? cpu.reg<uint16_t>(rdx * 8) : static_cast<uint16_t>(op.imm & 0xff);
  if (!check_io_permission(cpu, port, op.size)) return Step::fault;
  uint64_t value = cpu.get_reg(0, op.size);
  return done(cpu.platform().io(port, &value, op.size, 1, true));
}

Step nothing(Cpu&, const Op&) noexcept { return Step::next; }

// --- tables ---------------------------------------------------------------------------------------------------------

Complex alu_memory(Alu a) noexcept {
  switch (a) {
    case Alu::add: return alu_modify<Alu::add>;
    case Alu::bit_or: return alu_modify<Alu::bit_or>;
    case Alu::adc: return alu_modify<Alu::adc>;
    case Alu::sbb: return alu_modify<Alu::sbb>;
    case Alu::bit_and: return alu_modify<Alu::bit_and>;
    case Alu::sub: return alu_modify<Alu::sub>;
    default: return alu_modify<Alu::bit_xor>;
  }
}

Complex unary_memory(Unary u) noexcept {
  switch (u) {
    case Unary::inc: return unary_modify<Unary::inc>;
    case Unary::dec: return unary_modify<Unary::dec>;
    case Unary::neg: return unary_modify<Unary::neg>;
    default: return unary_modify<Unary::bit_not>;
  }
}

Complex shift_memory(Shift s) noexcept {
  switch (s) {
    case Shift::rol: return shift_modify<Shift::rol>;
    case Shift::ror: return shift_modify<Shift::ror>;
    case Shift::rcl: return shift_modify<Shift::rcl>;
    case Shift::rcr: return shift_modify<Shift::rcr>;
    case Shift::shr: return shift_modify<Shift::shr>;
    case Shift::sar: return shift_modify<Shift::sar>;
    default: return shift_modify<Shift::shl>;
  }
}

Complex simple(ZydisMnemonic mnemonic) noexcept {
  switch (mnemonic) {
    case ZYDIS_MNEMONIC_AAA: return ascii<false>;
    case ZYDIS_MNEMONIC_AAS: return ascii<true>;
    case ZYDIS_MNEMONIC_AAD: return aad;
    case ZYDIS_MNEMONIC_AAM: return aam;
    case ZYDIS_MNEMONIC_DAA: return decimal<false>;
    case ZYDIS_MNEMONIC_DAS: return decimal<true>;
    case ZYDIS_MNEMONIC_ADCX: return adx<false>;
    case ZYDIS_MNEMONIC_ADOX: return adx<true>;
    case ZYDIS_MNEMONIC_ANDN: return andn;
    case ZYDIS_MNEMONIC_BEXTR: return bextr;
    case ZYDIS_MNEMONIC_BLSI: return blsi;
    case ZYDIS_MNEMONIC_BLSMSK: return blsmsk;
    case ZYDIS_MNEMONIC_BLSR: return blsr;
    case ZYDIS_MNEMONIC_BZHI: return bzhi;
    case ZYDIS_MNEMONIC_PDEP: return pdep;
    case ZYDIS_MNEMONIC_PEXT: return pext;
    case ZYDIS_MNEMONIC_MULX: return mulx;
    case ZYDIS_MNEMONIC_RORX: return rorx;
    case ZYDIS_MNEMONIC_SARX: return sarx;
    case ZYDIS_MNEMONIC_SHLX: return shlx;
    case ZYDIS_MNEMONIC_SHRX: return shrx;
    case ZYDIS_MNEMONIC_BOUND: return bound;
    case ZYDIS_MNEMONIC_BSF: return bsf;
    case ZYDIS_MNEMONIC_BSR: return bsr;
    case ZYDIS_MNEMONIC_TZCNT: return tzcnt;
    case ZYDIS_MNEMONIC_LZCNT: return lzcnt;
    case ZYDIS_MNEMONIC_POPCNT: return popcnt;
    case ZYDIS_MNEMONIC_BSWAP: return bswap;
    case ZYDIS_MNEMONIC_BT: return bit_op<Bit::test>;
    case ZYDIS_MNEMONIC_BTS: return bit_op<Bit::set>;
    case ZYDIS_MNEMONIC_BTR: return bit_op<Bit::reset>;
    case ZYDIS_MNEMONIC_BTC: return bit_op<Bit::complement>;
    case ZYDIS_MNEMONIC_CBW:
    case ZYDIS_MNEMONIC_CWDE:
    case ZYDIS_MNEMONIC_CDQE: return widen_accumulator;
    case ZYDIS_MNEMONIC_CWD:
    case ZYDIS_MNEMONIC_CDQ:
    case ZYDIS_MNEMONIC_CQO: return sign_to_rdx;
    case ZYDIS_MNEMONIC_CLC: return clc;
    case ZYDIS_MNEMONIC_STC: return stc;
    case ZYDIS_MNEMONIC_CMC: return cmc;
    case ZYDIS_MNEMONIC_CLD: return cld;
    case ZYDIS_MNEMONIC_STD: return std_;
    case ZYDIS_MNEMONIC_CMPXCHG: return cmpxchg;
    case ZYDIS_MNEMONIC_CMPXCHG8B:
    case ZYDIS_MNEMONIC_CMPXCHG16B: return cmpxchg_pair;
    case ZYDIS_MNEMONIC_CRC32: return crc32;
    case ZYDIS_MNEMONIC_MUL: return multiply<false>;
    case ZYDIS_MNEMONIC_DIV: return divide<false>;
    case ZYDIS_MNEMONIC_IDIV: return divide<true>;
    case ZYDIS_MNEMONIC_ENTER: return enter;
    case ZYDIS_MNEMONIC_LEAVE: return leave_frame;
    case ZYDIS_MNEMONIC_LAHF: return lahf;
    case ZYDIS_MNEMONIC_SAHF: return sahf;
    case ZYDIS_MNEMONIC_SALC: return salc;
    case ZYDIS_MNEMONIC_PUSHA:
    case ZYDIS_MNEMONIC_PUSHAD: return pusha;
    case ZYDIS_MNEMONIC_POPA:
    case ZYDIS_MNEMONIC_POPAD: return popa;
    case ZYDIS_MNEMONIC_SHLD: return double_shift<true>;
    case ZYDIS_MNEMONIC_SHRD: return double_shift<false>;
    case ZYDIS_MNEMONIC_XADD: return xadd;
    case ZYDIS_MNEMONIC_XCHG: return xchg;
    case ZYDIS_MNEMONIC_XLAT: return xlat;
    case ZYDIS_MNEMONIC_IN: return in_port;
    case ZYDIS_MNEMONIC_OUT: return out_port;
    case ZYDIS_MNEMONIC_JCXZ:
    case ZYDIS_MNEMONIC_JECXZ:
    case ZYDIS_MNEMONIC_JRCXZ: return jcxz;
    case ZYDIS_MNEMONIC_LOOP: return loop<0>;
    case ZYDIS_MNEMONIC_LOOPE: return loop<1>;
    case ZYDIS_MNEMONIC_LOOPNE: return loop<2>;
    default: return nullptr;
  }
}

Complex multiply_signed() noexcept { return multiply<true>; }
Complex imul_memory(bool three) noexcept { return three ? imul_source<true> : imul_source<false>; }

}  // namespace lodge::kvm::soft::integer
