// Integer instructions beyond the hot ones: one Complex handler each, over generic operands.
#include "kvm/soft/cpu/platform.hpp"
#include "kvm/soft/interpret/alu.hpp"
#include "kvm/soft/interpret/integer_operands.hpp"

namespace lodge::kvm::soft::integer {

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
  const uint8_t count =
      (op.flags & Op::count_in_cl) != 0 ? cpu.reg<uint8_t>(rcx * 8) : static_cast<uint8_t>(op.imm);
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

// --- moves and exchanges
// --------------------------------------------------------------------------------------------

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
    case 2: cpu.reg<uint16_t>(0) = static_cast<uint16_t>(int16_t{static_cast<int8_t>(cpu.gpr[rax])}); break;
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

Step clc(Cpu& cpu, const Op&) noexcept {
  return cpu.set_cf(false), Step::next;
}
Step stc(Cpu& cpu, const Op&) noexcept {
  return cpu.set_cf(true), Step::next;
}
Step cmc(Cpu& cpu, const Op&) noexcept {
  return cpu.set_cf(!cpu.cf()), Step::next;
}
Step cld(Cpu& cpu, const Op&) noexcept {
  return cpu.system_flags &= ~flag::df, Step::next;
}
Step std_(Cpu& cpu, const Op&) noexcept {
  return cpu.system_flags |= flag::df, Step::next;
}

Step salc(Cpu& cpu, const Op&) noexcept {
  cpu.reg<uint8_t>(0) = cpu.cf() ? 0xff : 0;
  return Step::next;
}

// --- ports
// ----------------------------------------------------------------------------------------------------------

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

Step nothing(Cpu&, const Op&) noexcept {
  return Step::next;
}

// --- tables
// ---------------------------------------------------------------------------------------------------------

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
    case ZYDIS_MNEMONIC_LAHF: return lahf;
    case ZYDIS_MNEMONIC_SAHF: return sahf;
    case ZYDIS_MNEMONIC_SALC: return salc;
    case ZYDIS_MNEMONIC_SHLD: return double_shift<true>;
    case ZYDIS_MNEMONIC_SHRD: return double_shift<false>;
    case ZYDIS_MNEMONIC_XADD: return xadd;
    case ZYDIS_MNEMONIC_XCHG: return xchg;
    case ZYDIS_MNEMONIC_XLAT: return xlat;
    case ZYDIS_MNEMONIC_IN: return in_port;
    case ZYDIS_MNEMONIC_OUT: return out_port;
    default: break;
  }
  for (const auto part : {bit_instruction, multiply_instruction, decimal_instruction, branch_instruction})
    if (const Complex handler = part(mnemonic); handler != nullptr) return handler;
  return nullptr;
}

}  // namespace lodge::kvm::soft::integer
