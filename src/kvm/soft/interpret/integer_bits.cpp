// Bits: BT and kin, scans, BMI1, BMI2, ADX, CRC32, byte swaps.
#include "kvm/soft/interpret/integer_operands.hpp"

namespace lodge::kvm::soft::integer {

enum class Bit : uint8_t { test, set, reset, complement };

template <Bit B, class T>
T bit_apply(T a, unsigned bit, uint16_t& f) noexcept {
  const T index = static_cast<T>(bit);
  if constexpr (B == Bit::test)
    asm(LODGE_LOAD_FLAGS "bt %[i], %[a]\n\t" LODGE_SAVE_FLAGS
        : [a] "+&r"(a), "+&a"(f)
        : [i] "r"(index)
        : "cc");
  else if constexpr (B == Bit::set)
    asm(LODGE_LOAD_FLAGS "bts %[i], %[a]\n\t" LODGE_SAVE_FLAGS
        : [a] "+&r"(a), "+&a"(f)
        : [i] "r"(index)
        : "cc");
  else if constexpr (B == Bit::reset)
    asm(LODGE_LOAD_FLAGS "btr %[i], %[a]\n\t" LODGE_SAVE_FLAGS
        : [a] "+&r"(a), "+&a"(f)
        : [i] "r"(index)
        : "cc");
  else
    asm(LODGE_LOAD_FLAGS "btc %[i], %[a]\n\t" LODGE_SAVE_FLAGS
        : [a] "+&r"(a), "+&a"(f)
        : [i] "r"(index)
        : "cc");
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
    if (!cpu.linear(static_cast<SegmentName>(op.segment), offset, sizeof(T), B != Bit::test, lin))
      return false;
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

#define LODGE_SCAN(name, insn, keeps)                                                                \
  Step name(Cpu& cpu, const Op& op) noexcept {                                                       \
    uint64_t source = 0;                                                                             \
    if (!load_source(cpu, op, op.size, source)) return Step::fault;                                  \
    const auto apply = [&]<class T>(T) {                                                             \
      uint16_t f = cpu.arith;                                                                        \
      const T s = static_cast<T>(source);                                                            \
      T d = cpu.reg<T>(op.dst);                                                                      \
      asm(LODGE_LOAD_FLAGS insn " %[s], %[d]\n\t" LODGE_SAVE_FLAGS                                   \
          : [d] "+&r"(d), "+&a"(f)                                                                   \
          : [s] "r"(s)                                                                               \
          : "cc");                                                                                   \
      /* Without a set bit BSF and BSR leave all of the destination alone, 32-bit forms included. */ \
      if (!(keeps) || s != 0) put<T>(cpu, op.dst, d);                                                \
      cpu.arith = f;                                                                                 \
    };                                                                                               \
    op.size == 2 ? apply(uint16_t{}) : op.size == 4 ? apply(uint32_t{}) : apply(uint64_t{});         \
    return Step::next;                                                                               \
  }
LODGE_SCAN(bsf, "bsf", true)
LODGE_SCAN(bsr, "bsr", true)
LODGE_SCAN(tzcnt, "tzcnt", false)
LODGE_SCAN(lzcnt, "lzcnt", false)
LODGE_SCAN(popcnt, "popcnt", false)
#undef LODGE_SCAN

// BMI1, BMI2 and ADX: 32- and 64-bit operands. dst, the r/m source, and for three operands the register
// `imm`.
#define LODGE_BMI2(name, insn)                                      \
  Step name(Cpu& cpu, const Op& op) noexcept {                      \
    uint64_t source = 0;                                            \
    if (!load_source(cpu, op, op.size, source)) return Step::fault; \
    const auto apply = [&]<class T>(T) {                            \
      uint16_t f = cpu.arith;                                       \
      const T s = static_cast<T>(source);                           \
      const T r = cpu.reg<T>(static_cast<uint8_t>(op.imm));         \
      T d;                                                          \
      asm(LODGE_LOAD_FLAGS insn "\n\t" LODGE_SAVE_FLAGS             \
          : [d] "=&r"(d), "+&a"(f)                                  \
          : [s] "r"(s), [r] "r"(r)                                  \
          : "cc");                                                  \
      put<T>(cpu, op.dst, d);                                       \
      cpu.arith = f;                                                \
    };                                                              \
    op.size == 4 ? apply(uint32_t{}) : apply(uint64_t{});           \
    return Step::next;                                              \
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
    const uint64_t sum =
        uint64_t{cpu.reg<uint32_t>(op.dst)} + static_cast<uint32_t>(source) + (carry ? 1 : 0);
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

Complex bit_instruction(ZydisMnemonic mnemonic) noexcept {
  switch (mnemonic) {
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
    case ZYDIS_MNEMONIC_CRC32: return crc32;
    default: return nullptr;
  }
}

}  // namespace lodge::kvm::soft::integer
