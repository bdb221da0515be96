// The instructions that make up nearly all of a guest's run time, as threaded handlers specialised by
// operation, size, form and addressing.
#include "kvm/soft/interpret/hot.hpp"

#include "kvm/soft/interpret/alu.hpp"
#include "kvm/soft/interpret/threaded.hpp"

namespace lodge::kvm::soft {
namespace {

// reg_reg: dst OP src. reg_imm: dst OP imm. reg_mem: dst OP [memory]. mem_reg: [memory] OP src. mem_imm.
template <Alu A, class T, Form F, Ea E>
void alu_op(Cpu& cpu, const Op* op) noexcept {
  uint16_t f = cpu.arith;
  constexpr bool writes = A != Alu::cmp && A != Alu::test;
  if constexpr (F == Form::reg_reg || F == Form::reg_imm) {
    const T b = F == Form::reg_reg ? cpu.reg<T>(op->src) : static_cast<T>(op->imm);
    const T r = alu<A, T>(cpu.reg<T>(op->dst), b, f);
    if constexpr (writes) put<T>(cpu, op->dst, r);
  } else {
    if (!address<E>(cpu, op, sizeof(T), F != Form::reg_mem && writes)) return;
    const uint64_t lin = linear_of<E>(cpu, op);
    if constexpr (F == Form::reg_mem) {
      LODGE_LOAD(T, b, lin);
      const T r = alu<A, T>(cpu.reg<T>(op->dst), b, f);
      if constexpr (writes) put<T>(cpu, op->dst, r);
    } else {
      const T b = F == Form::mem_reg ? cpu.reg<T>(op->src) : static_cast<T>(op->imm);
      if constexpr (writes) {
        const TlbEntry& e = cpu.tlb->at(lin);
        if (__builtin_expect(TlbSet::hit(e.write, lin, sizeof(T)), 1)) {
          host_store<T>(e.host_of(lin), alu<A, T>(host_load<T>(e.host_of(lin)), b, f));
        } else {
          if (!slow_load_for_write(cpu, op, lin, sizeof(T))) return;
          const T r = alu<A, T>(static_cast<T>(cpu.scratch), b, f);
          if (!slow_store(cpu, op, lin, sizeof(T), r)) return;
        }
      } else {
        LODGE_LOAD(T, a, lin);
        alu<A, T>(a, b, f);
      }
    }
  }
  cpu.arith = f;
  LODGE_NEXT;
}

template <class T, Form F, Ea E>
void mov_op(Cpu& cpu, const Op* op) noexcept {
  if constexpr (F == Form::reg_reg) {
    put<T>(cpu, op->dst, cpu.reg<T>(op->src));
  } else if constexpr (F == Form::reg_imm) {
    put<T>(cpu, op->dst, static_cast<T>(op->imm));
  } else {
    if (!address<E>(cpu, op, sizeof(T), F != Form::reg_mem)) return;
    const uint64_t lin = linear_of<E>(cpu, op);
    if constexpr (F == Form::reg_mem) {
      LODGE_LOAD(T, v, lin);
      put<T>(cpu, op->dst, v);
    } else {
      const T v = F == Form::mem_reg ? cpu.reg<T>(op->src) : static_cast<T>(op->imm);
      LODGE_STORE(T, v, lin);
    }
  }
  LODGE_NEXT;
}

// D from S: MOVZX when S is unsigned, MOVSX and MOVSXD when signed.
template <class D, class S, Form F, Ea E>
void extend_op(Cpu& cpu, const Op* op) noexcept {
  using U = std::make_unsigned_t<S>;
  if constexpr (F == Form::reg_reg) {
    put<D>(cpu, op->dst, static_cast<D>(static_cast<S>(cpu.reg<U>(op->src))));
  } else {
    if (!address<E>(cpu, op, sizeof(S), false)) return;
    const uint64_t lin = linear_of<E>(cpu, op);
    LODGE_LOAD(U, v, lin);
    put<D>(cpu, op->dst, static_cast<D>(static_cast<S>(v)));
  }
  LODGE_NEXT;
}

template <class T>
void lea_op(Cpu& cpu, const Op* op) noexcept {
  const uint64_t sum =
      cpu.gpr[op->base] + (cpu.gpr[op->index] << op->scale) + static_cast<uint64_t>(op->disp);
  put<T>(cpu, op->dst, static_cast<T>(op->address_size == 8 ? sum : cpu.effective_address(*op)));
  LODGE_NEXT;
}

template <Unary U, class T>
void unary_op(Cpu& cpu, const Op* op) noexcept {
  uint16_t f = cpu.arith;
  put<T>(cpu, op->dst, unary<U, T>(cpu.reg<T>(op->dst), f));
  cpu.arith = f;
  LODGE_NEXT;
}

template <Shift S, class T, bool ByCl>
void shift_op(Cpu& cpu, const Op* op) noexcept {
  uint16_t f = cpu.arith;
  const uint8_t count = ByCl ? cpu.reg<uint8_t>(rcx * 8) : static_cast<uint8_t>(op->imm);
  put<T>(cpu, op->dst, shift<S, T>(cpu.reg<T>(op->dst), count, f));
  cpu.arith = f;
  LODGE_NEXT;
}

template <unsigned C, bool Wide>
void jcc_op(Cpu& cpu, const Op* op) noexcept {
  const uint64_t target = condition<C>(cpu.arith) ? op->imm : uint64_t{op->offset} + op->length;
  const uint64_t rip = cpu.gpr[gpr_rip] + target;
  cpu.rip = Wide ? rip : cpu.truncate_branch(rip, op->size);
}

template <bool Wide>
void jmp_op(Cpu& cpu, const Op* op) noexcept {
  const uint64_t rip = cpu.gpr[gpr_rip] + op->imm;
  cpu.rip = Wide ? rip : cpu.truncate_branch(rip, op->size);
}

// Near calls and stack accesses: 64-bit code, or 32-bit code with flat segments (Word is 4 bytes then, and
// addresses wrap at 4 GiB).
template <class Word>
void call_op(Cpu& cpu, const Op* op) noexcept {
  const uint64_t lin = static_cast<Word>(cpu.gpr[rsp] - sizeof(Word));
  const auto back = static_cast<Word>(cpu.gpr[gpr_rip] + op->offset + op->length);
  LODGE_STACK_STORE(Word, back, lin);
  cpu.gpr[rsp] = lin;
  cpu.rip = static_cast<Word>(cpu.gpr[gpr_rip] + op->imm);
}

template <class Word>
void ret_op(Cpu& cpu, const Op* op) noexcept {
  const uint64_t lin = static_cast<Word>(cpu.gpr[rsp]);
  LODGE_STACK_LOAD(Word, target, lin);
  if constexpr (sizeof(Word) == 8) {
    // A target that is not canonical faults here, with RSP unchanged. The common width first.
    constexpr uint64_t lower_half = uint64_t{1} << 47;
    if (__builtin_expect((target + lower_half) >> 48 != 0, 0) && !cpu.canonical(target)) {
      cpu.raise(Exception::gp, 0);
      leave(cpu, op);
      return;
    }
  }
  cpu.gpr[rsp] = static_cast<Word>(lin + sizeof(Word) + op->imm);
  cpu.rip = target;
}

template <class Word>
void push_op(Cpu& cpu, const Op* op) noexcept {
  const uint64_t lin = static_cast<Word>(cpu.gpr[rsp] - sizeof(Word));
  const Word value = cpu.reg<Word>(op->dst);
  LODGE_STACK_STORE(Word, value, lin);
  cpu.gpr[rsp] = lin;
  LODGE_NEXT;
}

template <class Word>
void pop_op(Cpu& cpu, const Op* op) noexcept {
  const uint64_t lin = static_cast<Word>(cpu.gpr[rsp]);
  LODGE_STACK_LOAD(Word, value, lin);
  cpu.gpr[rsp] = static_cast<Word>(lin + sizeof(Word));
  put<Word>(cpu, op->dst, value);
  LODGE_NEXT;
}

template <unsigned C>
void setcc_op(Cpu& cpu, const Op* op) noexcept {
  cpu.reg<uint8_t>(op->dst) = condition<C>(cpu.arith) ? 1 : 0;
  LODGE_NEXT;
}

template <unsigned C, class T>
void cmov_op(Cpu& cpu, const Op* op) noexcept {
  put<T>(cpu, op->dst, condition<C>(cpu.arith) ? cpu.reg<T>(op->src) : cpu.reg<T>(op->dst));
  LODGE_NEXT;
}

template <class T, bool Three>
void imul_op(Cpu& cpu, const Op* op) noexcept {
  uint16_t f = cpu.arith;
  T a = cpu.reg<T>(Three ? op->src : op->dst);
  const T b = Three ? static_cast<T>(op->imm) : cpu.reg<T>(op->src);
  asm(LODGE_LOAD_FLAGS "imul %[b], %[a]\n\t" LODGE_SAVE_FLAGS : [a] "+&r"(a), "+&a"(f) : [b] "r"(b) : "cc");
  put<T>(cpu, op->dst, a);
  cpu.arith = f;
  LODGE_NEXT;
}

void nop_op(Cpu& cpu, const Op* op) noexcept {
  LODGE_NEXT;
}

// --- choosing
// -------------------------------------------------------------------------------------------------------

template <class Choose>
Handler choose_size(unsigned size, Choose choose) noexcept {
  return by_size(size, [&]<class T>(T) -> Handler { return choose.template operator()<T>(); });
}

template <Alu A, class T>
Handler choose_alu_form(Form form, Ea ea) noexcept {
  const auto memory = [&]<Form F>() -> Handler {
    switch (ea) {
      case Ea::flat64: return alu_op<A, T, F, Ea::flat64>;
      case Ea::flat32: return alu_op<A, T, F, Ea::flat32>;
      default: return alu_op<A, T, F, Ea::general>;
    }
  };
  switch (form) {
    case Form::reg_reg: return alu_op<A, T, Form::reg_reg, Ea::flat64>;
    case Form::reg_imm: return alu_op<A, T, Form::reg_imm, Ea::flat64>;
    case Form::reg_mem: return memory.template operator()<Form::reg_mem>();
    case Form::mem_reg: return memory.template operator()<Form::mem_reg>();
    default: return memory.template operator()<Form::mem_imm>();
  }
}

template <Alu A>
Handler choose_alu(unsigned size, Form form, Ea ea) noexcept {
  return choose_size(size, [&]<class T>() { return choose_alu_form<A, T>(form, ea); });
}

template <class T>
Handler choose_mov(Form form, Ea ea) noexcept {
  const auto memory = [&]<Form F>() -> Handler {
    switch (ea) {
      case Ea::flat64: return mov_op<T, F, Ea::flat64>;
      case Ea::flat32: return mov_op<T, F, Ea::flat32>;
      default: return mov_op<T, F, Ea::general>;
    }
  };
  switch (form) {
    case Form::reg_reg: return mov_op<T, Form::reg_reg, Ea::flat64>;
    case Form::reg_imm: return mov_op<T, Form::reg_imm, Ea::flat64>;
    case Form::reg_mem: return memory.template operator()<Form::reg_mem>();
    case Form::mem_reg: return memory.template operator()<Form::mem_reg>();
    default: return memory.template operator()<Form::mem_imm>();
  }
}

template <class D, class S>
Handler choose_extend(bool memory, Ea ea) noexcept {
  if (!memory) return extend_op<D, S, Form::reg_reg, Ea::flat64>;
  switch (ea) {
    case Ea::flat64: return extend_op<D, S, Form::reg_mem, Ea::flat64>;
    case Ea::flat32: return extend_op<D, S, Form::reg_mem, Ea::flat32>;
    default: return extend_op<D, S, Form::reg_mem, Ea::general>;
  }
}

template <Shift S>
Handler choose_shift(unsigned size, bool by_cl) noexcept {
  return choose_size(
      size, [&]<class T>() -> Handler { return by_cl ? shift_op<S, T, true> : shift_op<S, T, false>; });
}

template <unsigned... C>
Handler choose_jcc(unsigned code, bool wide, std::integer_sequence<unsigned, C...>) noexcept {
  static constexpr Handler narrow_table[] = {jcc_op<C, false>...};
  static constexpr Handler wide_table[] = {jcc_op<C, true>...};
  return wide ? wide_table[code] : narrow_table[code];
}

template <unsigned... C>
Handler choose_setcc(unsigned code, std::integer_sequence<unsigned, C...>) noexcept {
  static constexpr Handler table[] = {setcc_op<C>...};
  return table[code];
}

template <class T, unsigned... C>
Handler choose_cmov(unsigned code, std::integer_sequence<unsigned, C...>) noexcept {
  static constexpr Handler table[] = {cmov_op<C, T>...};
  return table[code];
}

using Codes = std::make_integer_sequence<unsigned, 16>;

}  // namespace

namespace hot {

Handler alu(Alu a, unsigned size, Form form, Ea ea) noexcept {
  switch (a) {
    case Alu::add: return choose_alu<Alu::add>(size, form, ea);
    case Alu::bit_or: return choose_alu<Alu::bit_or>(size, form, ea);
    case Alu::adc: return choose_alu<Alu::adc>(size, form, ea);
    case Alu::sbb: return choose_alu<Alu::sbb>(size, form, ea);
    case Alu::bit_and: return choose_alu<Alu::bit_and>(size, form, ea);
    case Alu::sub: return choose_alu<Alu::sub>(size, form, ea);
    case Alu::bit_xor: return choose_alu<Alu::bit_xor>(size, form, ea);
    case Alu::cmp: return choose_alu<Alu::cmp>(size, form, ea);
    default: return choose_alu<Alu::test>(size, form, ea);
  }
}

Handler mov(unsigned size, Form form, Ea ea) noexcept {
  return choose_size(size, [&]<class T>() { return choose_mov<T>(form, ea); });
}

Handler extend(unsigned to, unsigned from, bool is_signed, bool memory, Ea ea) noexcept {
  return choose_size(to, [&]<class D>() -> Handler {
    if (is_signed) {
      if (from == 1) return choose_extend<D, int8_t>(memory, ea);
      if (from == 2) return choose_extend<D, int16_t>(memory, ea);
      return choose_extend<D, int32_t>(memory, ea);
    }
    if (from == 1) return choose_extend<D, uint8_t>(memory, ea);
    if (from == 2) return choose_extend<D, uint16_t>(memory, ea);
    return choose_extend<D, uint32_t>(memory, ea);
  });
}

Handler lea(unsigned size) noexcept {
  return choose_size(size, []<class T>() -> Handler { return lea_op<T>; });
}

Handler unary(Unary u, unsigned size) noexcept {
  return choose_size(size, [&]<class T>() -> Handler {
    switch (u) {
      case Unary::inc: return unary_op<Unary::inc, T>;
      case Unary::dec: return unary_op<Unary::dec, T>;
      case Unary::neg: return unary_op<Unary::neg, T>;
      default: return unary_op<Unary::bit_not, T>;
    }
  });
}

Handler shift(Shift s, unsigned size, bool by_cl) noexcept {
  switch (s) {
    case Shift::rol: return choose_shift<Shift::rol>(size, by_cl);
    case Shift::ror: return choose_shift<Shift::ror>(size, by_cl);
    case Shift::rcl: return choose_shift<Shift::rcl>(size, by_cl);
    case Shift::rcr: return choose_shift<Shift::rcr>(size, by_cl);
    case Shift::shr: return choose_shift<Shift::shr>(size, by_cl);
    case Shift::sar: return choose_shift<Shift::sar>(size, by_cl);
    default: return choose_shift<Shift::shl>(size, by_cl);
  }
}

Handler jcc(unsigned code, bool wide) noexcept {
  return choose_jcc(code, wide, Codes{});
}
Handler jmp(bool wide) noexcept {
  return wide ? jmp_op<true> : jmp_op<false>;
}
Handler setcc(unsigned code) noexcept {
  return choose_setcc(code, Codes{});
}
Handler cmov(unsigned code, unsigned size) noexcept {
  return size == 2   ? choose_cmov<uint16_t>(code, Codes{})
         : size == 4 ? choose_cmov<uint32_t>(code, Codes{})
                     : choose_cmov<uint64_t>(code, Codes{});
}
Handler imul(unsigned size, bool three) noexcept {
  if (size == 2) return three ? imul_op<uint16_t, true> : imul_op<uint16_t, false>;
  if (size == 4) return three ? imul_op<uint32_t, true> : imul_op<uint32_t, false>;
  return three ? imul_op<uint64_t, true> : imul_op<uint64_t, false>;
}

Handler call(bool wide) noexcept {
  return wide ? call_op<uint64_t> : call_op<uint32_t>;
}
Handler ret(bool wide) noexcept {
  return wide ? ret_op<uint64_t> : ret_op<uint32_t>;
}
Handler push(bool wide) noexcept {
  return wide ? push_op<uint64_t> : push_op<uint32_t>;
}
Handler pop(bool wide) noexcept {
  return wide ? pop_op<uint64_t> : pop_op<uint32_t>;
}
Handler nop() noexcept {
  return nop_op;
}

}  // namespace hot
}  // namespace lodge::kvm::soft
