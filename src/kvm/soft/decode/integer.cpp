// The integer family: from parsed operands to hot handlers where they exist, to Complex ones elsewhere.
#include "kvm/soft/interpret/integer.hpp"

#include "kvm/soft/interpret/hot.hpp"

namespace lodge::kvm::soft {
namespace {

bool is_register(const ZydisDecodedOperand& o) noexcept {
  return o.type == ZYDIS_OPERAND_TYPE_REGISTER;
}
bool is_memory(const ZydisDecodedOperand& o) noexcept {
  return o.type == ZYDIS_OPERAND_TYPE_MEMORY;
}
bool is_immediate(const ZydisDecodedOperand& o) noexcept {
  return o.type == ZYDIS_OPERAND_TYPE_IMMEDIATE;
}
bool is_general(const ZydisDecodedOperand& o) noexcept {
  if (!is_register(o)) return false;
  const ZydisRegisterClass c = ZydisRegisterGetClass(o.reg.value);
  return c >= ZYDIS_REGCLASS_GPR8 && c <= ZYDIS_REGCLASS_GPR64;
}

uint64_t immediate(const ZydisDecodedOperand& o) noexcept {
  return o.imm.is_signed != 0 ? static_cast<uint64_t>(o.imm.value.s) : o.imm.value.u;
}

bool by_handler(Op& op, Handler handler) noexcept {
  return op.handler = handler, true;
}
bool by_complex(Op& op, Complex complex) noexcept {
  return op.complex = complex, complex != nullptr;
}

bool wide(const DecodeContext& c, const Op& op) noexcept {
  return c.cpu.mode() == Mode::bits64 && op.size == 8;
}
// Branches and stack accesses that the hot handlers take: full-width operands, nothing to check but the
// pages.
bool plain(const DecodeContext& c, const Op& op) noexcept {
  return wide(c, op) || (c.cpu.mode() == Mode::bits32 && c.cpu.flat && op.size == 4);
}

// Fills dst, src and imm of an instruction whose first two operands are r/m, reg and imm in any combination.
Form fill_two(const DecodeContext& c, Op& op) noexcept {
  const ZydisDecodedOperand& a = c.operands[0];
  const ZydisDecodedOperand& b = c.operands[1];
  if (is_register(a)) op.dst = gpr_offset(a.reg.value);
  op.src = integer::no_register;
  if (is_register(b)) op.src = gpr_offset(b.reg.value);
  if (is_immediate(b)) op.imm = immediate(b);
  if (is_memory(a)) return is_register(b) ? Form::mem_reg : Form::mem_imm;
  return is_memory(b) ? Form::reg_mem : is_register(b) ? Form::reg_reg : Form::reg_imm;
}

bool decode_alu(const DecodeContext& c, Op& op, Alu a) noexcept {
  Form form = fill_two(c, op);
  const bool locked = (op.flags & Op::lock) != 0;
  if (locked && a != Alu::cmp && a != Alu::test) return by_complex(op, integer::alu_memory(a));
  // TEST r, [m] is encoded with the memory operand first or second; it is symmetric.
  return by_handler(op, hot::alu(a, op.size, form, ea_kind(c.cpu, op)));
}

bool decode_mov(const DecodeContext& c, Op& op) noexcept {
  for (unsigned i = 0; i < 2; ++i)  // segment, control and debug registers are the system family's
    if (is_register(c.operands[i]) && !is_general(c.operands[i])) return false;
  const Form form = fill_two(c, op);
  return by_handler(op, hot::mov(op.size, form, ea_kind(c.cpu, op)));
}

bool decode_extend(const DecodeContext& c, Op& op, bool is_signed) noexcept {
  const Form form = fill_two(c, op);
  const unsigned from = c.operands[1].size / 8;
  return by_handler(op, hot::extend(op.size, from, is_signed, form == Form::reg_mem, ea_kind(c.cpu, op)));
}

bool decode_unary(const DecodeContext& c, Op& op, Unary u) noexcept {
  if (is_memory(c.operands[0])) return by_complex(op, integer::unary_memory(u));
  op.dst = gpr_offset(c.operands[0].reg.value);
  return by_handler(op, hot::unary(u, op.size));
}

bool decode_shift(const DecodeContext& c, Op& op, Shift s) noexcept {
  const Form form = fill_two(c, op);
  if (form == Form::mem_reg || form == Form::mem_imm) return by_complex(op, integer::shift_memory(s));
  return by_handler(op, hot::shift(s, op.size, form == Form::reg_reg));
}

bool decode_double_shift(const DecodeContext& c, Op& op) noexcept {
  fill_two(c, op);
  if (is_immediate(c.operands[2]))
    op.imm = immediate(c.operands[2]);
  else
    op.flags |= Op::count_in_cl;
  return by_complex(op, integer::simple(c.insn.mnemonic));
}

// Instructions whose r/m operand is the source, and operand 0 a register; a third operand goes to imm (a
// register's offset or an immediate).
bool decode_source(const DecodeContext& c, Op& op) noexcept {
  unsigned source = 1;
  op.dst = gpr_offset(c.operands[0].reg.value);
  if (c.insn.operand_count_visible == 3) {
    // ANDN, PDEP, PEXT, MULX: reg, reg, r/m. BEXTR, BZHI, shifts: reg, r/m, reg. RORX: reg, r/m, imm.
    const bool vvvv_second = c.operands[1].encoding == ZYDIS_OPERAND_ENCODING_NDSNDD;
    source = vvvv_second ? 2 : 1;
    const ZydisDecodedOperand& other = c.operands[vvvv_second ? 1 : 2];
    op.imm = is_immediate(other) ? immediate(other) : gpr_offset(other.reg.value);
  }
  if (is_register(c.operands[source])) op.src = gpr_offset(c.operands[source].reg.value);
  return by_complex(op, integer::simple(c.insn.mnemonic));
}

bool decode_imul(const DecodeContext& c, Op& op) noexcept {
  switch (c.insn.operand_count_visible) {
    case 1:
      if (is_register(c.operands[0])) op.src = gpr_offset(c.operands[0].reg.value);
      return by_complex(op, integer::multiply_signed());
    case 2: {
      const Form form = fill_two(c, op);
      if (form == Form::reg_mem) return by_complex(op, integer::imul_memory(false));
      return by_handler(op, hot::imul(op.size, false));
    }
    default: {
      const Form form = fill_two(c, op);
      op.imm = immediate(c.operands[2]);
      if (form == Form::reg_mem) return by_complex(op, integer::imul_memory(true));
      return by_handler(op, hot::imul(op.size, true));
    }
  }
}

bool decode_push(const DecodeContext& c, Op& op) noexcept {
  const ZydisDecodedOperand& o = c.operands[0];
  if (is_register(o) && !is_general(o)) return false;
  if (is_immediate(o)) {
    op.imm = immediate(o);
    return by_complex(op, integer::push_immediate);
  }
  if (is_memory(o)) return by_complex(op, integer::push_memory);
  op.dst = gpr_offset(o.reg.value);
  return plain(c, op) ? by_handler(op, hot::push(wide(c, op))) : by_complex(op, integer::push_register);
}

bool decode_pop(const DecodeContext& c, Op& op) noexcept {
  const ZydisDecodedOperand& o = c.operands[0];
  if (is_register(o) && !is_general(o)) return false;
  if (is_memory(o)) {
    return by_complex(op, integer::pop_memory);
  }
  op.dst = gpr_offset(o.reg.value);
  return plain(c, op) ? by_handler(op, hot::pop(wide(c, op))) : by_complex(op, integer::pop_register);
}

bool is_far(const DecodeContext& c) noexcept {
  return c.insn.meta.branch_type == ZYDIS_BRANCH_TYPE_FAR;
}

// The target of a relative branch, from the block's RIP.
void fill_target(const DecodeContext& c, Op& op) noexcept {
  op.imm = immediate(c.operands[0]) + op.offset + op.length;
}

bool decode_jump(const DecodeContext& c, Op& op) noexcept {
  if (is_far(c)) return false;
  if (is_immediate(c.operands[0])) {
    fill_target(c, op);
    return plain(c, op) ? by_handler(op, hot::jmp(wide(c, op))) : by_complex(op, integer::jmp_relative);
  }
  if (is_register(c.operands[0])) op.dst = gpr_offset(c.operands[0].reg.value);
  return by_complex(op, integer::jmp_indirect);
}

bool decode_call(const DecodeContext& c, Op& op) noexcept {
  if (is_far(c)) return false;
  if (is_immediate(c.operands[0])) {
    fill_target(c, op);
    return plain(c, op) ? by_handler(op, hot::call(wide(c, op))) : by_complex(op, integer::call_relative);
  }
  if (is_register(c.operands[0])) op.dst = gpr_offset(c.operands[0].reg.value);
  return by_complex(op, integer::call_indirect);
}

bool decode_ret(const DecodeContext& c, Op& op) noexcept {
  if (is_far(c)) return false;
  op.imm = c.insn.operand_count_visible > 0 ? immediate(c.operands[0]) & 0xffff : 0;
  return plain(c, op) ? by_handler(op, hot::ret(wide(c, op))) : by_complex(op, integer::ret_near);
}

bool decode_condition(const DecodeContext& c, Op& op) noexcept {
  const unsigned code = c.insn.opcode & 15;
  switch (c.insn.meta.category) {
    case ZYDIS_CATEGORY_COND_BR:
      fill_target(c, op);
      op.src = static_cast<uint8_t>(code);
      return plain(c, op) ? by_handler(op, hot::jcc(code, wide(c, op)))
                          : by_complex(op, integer::jcc_relative);
    case ZYDIS_CATEGORY_SETCC:
      op.size = 1;
      op.imm = code;
      if (is_memory(c.operands[0])) return by_complex(op, integer::setcc_memory);
      op.dst = gpr_offset(c.operands[0].reg.value);
      return by_handler(op, hot::setcc(code));
    default: {
      const Form form = fill_two(c, op);
      op.imm = code;
      return form == Form::reg_mem ? by_complex(op, integer::cmov_source)
                                   : by_handler(op, hot::cmov(code, op.size));
    }
  }
}

bool decode_string(const DecodeContext& c, Op& op) noexcept {
  const Complex handler = integer::string_op(c.insn.mnemonic);
  // MOVSD and CMPSD name SSE2 instructions too.
  if (handler == nullptr ||
      (c.insn.meta.category != ZYDIS_CATEGORY_STRINGOP && c.insn.meta.category != ZYDIS_CATEGORY_IOSTRINGOP))
    return false;
  op.segment = seg_ds;
  for (unsigned i = 0; i < c.insn.operand_count; ++i) {
    const ZydisDecodedOperand& o = c.operands[i];
    if (!is_memory(o)) continue;
    op.size = static_cast<uint8_t>(o.size / 8);
    if (ZydisRegisterGetId(o.mem.base) == rsi)
      op.segment = static_cast<uint8_t>(ZydisRegisterGetId(o.mem.segment));
  }
  op.flags &= static_cast<uint8_t>(~Op::has_memory);
  return by_complex(op, handler);
}

bool decode_port(const DecodeContext& c, Op& op, unsigned port_operand) noexcept {
  const ZydisDecodedOperand& port = c.operands[port_operand];
  op.size = static_cast<uint8_t>(c.operands[1 - port_operand].size / 8);
  op.src = integer::no_register;
  if (is_register(port))
    op.src = rdx * 8;
  else
    op.imm = immediate(port);
  return by_complex(op, integer::simple(c.insn.mnemonic));
}

bool decode_enter(const DecodeContext& c, Op& op) noexcept {
  op.imm = (immediate(c.operands[0]) & 0xffff) | (immediate(c.operands[1]) & 0xff) << 16;
  return by_complex(op, integer::simple(c.insn.mnemonic));
}

bool decode_movbe(const DecodeContext& c, Op& op) noexcept {
  const Form form = fill_two(c, op);
  return by_complex(op, form == Form::mem_reg ? integer::movbe_store : integer::movbe_load);
}

bool decode_xchg(const DecodeContext& c, Op& op) noexcept {
  fill_two(c, op);
  if (is_memory(c.operands[1])) op.src = op.dst;  // the register is always src
  return by_complex(op, integer::simple(c.insn.mnemonic));
}

bool is_condition(const ZydisDecodedInstruction& insn) noexcept {
  if (insn.meta.category == ZYDIS_CATEGORY_COND_BR)
    return insn.opcode_map == ZYDIS_OPCODE_MAP_0F || insn.opcode < 0x80;
  if (insn.meta.category == ZYDIS_CATEGORY_SETCC) return true;
  return insn.meta.category == ZYDIS_CATEGORY_CMOV;
}

}  // namespace

bool decode_integer(const DecodeContext& c, Op& op) noexcept {
  if (is_condition(c.insn)) return decode_condition(c, op);
  switch (c.insn.mnemonic) {
    case ZYDIS_MNEMONIC_ADD: return decode_alu(c, op, Alu::add);
    case ZYDIS_MNEMONIC_OR: return decode_alu(c, op, Alu::bit_or);
    case ZYDIS_MNEMONIC_ADC: return decode_alu(c, op, Alu::adc);
    case ZYDIS_MNEMONIC_SBB: return decode_alu(c, op, Alu::sbb);
    case ZYDIS_MNEMONIC_AND: return decode_alu(c, op, Alu::bit_and);
    case ZYDIS_MNEMONIC_SUB: return decode_alu(c, op, Alu::sub);
    case ZYDIS_MNEMONIC_XOR: return decode_alu(c, op, Alu::bit_xor);
    case ZYDIS_MNEMONIC_CMP: return decode_alu(c, op, Alu::cmp);
    case ZYDIS_MNEMONIC_TEST: return decode_alu(c, op, Alu::test);
    case ZYDIS_MNEMONIC_MOV: return decode_mov(c, op);
    case ZYDIS_MNEMONIC_MOVZX: return decode_extend(c, op, false);
    case ZYDIS_MNEMONIC_MOVSX:
    case ZYDIS_MNEMONIC_MOVSXD: return decode_extend(c, op, true);
    case ZYDIS_MNEMONIC_LEA:
      op.dst = gpr_offset(c.operands[0].reg.value);
      return by_handler(op, hot::lea(op.size));
    case ZYDIS_MNEMONIC_INC: return decode_unary(c, op, Unary::inc);
    case ZYDIS_MNEMONIC_DEC: return decode_unary(c, op, Unary::dec);
    case ZYDIS_MNEMONIC_NEG: return decode_unary(c, op, Unary::neg);
    case ZYDIS_MNEMONIC_NOT: return decode_unary(c, op, Unary::bit_not);
    case ZYDIS_MNEMONIC_ROL: return decode_shift(c, op, Shift::rol);
    case ZYDIS_MNEMONIC_ROR: return decode_shift(c, op, Shift::ror);
    case ZYDIS_MNEMONIC_RCL: return decode_shift(c, op, Shift::rcl);
    case ZYDIS_MNEMONIC_RCR: return decode_shift(c, op, Shift::rcr);
    case ZYDIS_MNEMONIC_SHL: return decode_shift(c, op, Shift::shl);
    case ZYDIS_MNEMONIC_SHR: return decode_shift(c, op, Shift::shr);
    case ZYDIS_MNEMONIC_SAR: return decode_shift(c, op, Shift::sar);
    case ZYDIS_MNEMONIC_SHLD:
    case ZYDIS_MNEMONIC_SHRD: return decode_double_shift(c, op);
    case ZYDIS_MNEMONIC_IMUL: return decode_imul(c, op);
    case ZYDIS_MNEMONIC_PUSH: return decode_push(c, op);
    case ZYDIS_MNEMONIC_POP: return decode_pop(c, op);
    case ZYDIS_MNEMONIC_JMP: return decode_jump(c, op);
    case ZYDIS_MNEMONIC_CALL: return decode_call(c, op);
    case ZYDIS_MNEMONIC_RET: return decode_ret(c, op);
    case ZYDIS_MNEMONIC_JCXZ:
    case ZYDIS_MNEMONIC_JECXZ:
    case ZYDIS_MNEMONIC_JRCXZ:
    case ZYDIS_MNEMONIC_LOOP:
    case ZYDIS_MNEMONIC_LOOPE:
    case ZYDIS_MNEMONIC_LOOPNE: fill_target(c, op); return by_complex(op, integer::simple(c.insn.mnemonic));
    case ZYDIS_MNEMONIC_ENTER: return decode_enter(c, op);
    case ZYDIS_MNEMONIC_MOVBE: return decode_movbe(c, op);
    case ZYDIS_MNEMONIC_XCHG: return decode_xchg(c, op);
    case ZYDIS_MNEMONIC_NOP: return by_handler(op, hot::nop());
    case ZYDIS_MNEMONIC_IN: return decode_port(c, op, 1);
    case ZYDIS_MNEMONIC_OUT: return decode_port(c, op, 0);
    case ZYDIS_MNEMONIC_CRC32:
      op.size = static_cast<uint8_t>(c.operands[1].size / 8);
      return decode_source(c, op);
    case ZYDIS_MNEMONIC_MUL:
    case ZYDIS_MNEMONIC_DIV:
    case ZYDIS_MNEMONIC_IDIV:
      if (is_register(c.operands[0])) op.src = gpr_offset(c.operands[0].reg.value);
      return by_complex(op, integer::simple(c.insn.mnemonic));
    case ZYDIS_MNEMONIC_CMPXCHG8B: op.size = 4; return by_complex(op, integer::simple(c.insn.mnemonic));
    case ZYDIS_MNEMONIC_CMPXCHG16B: op.size = 8; return by_complex(op, integer::simple(c.insn.mnemonic));
    case ZYDIS_MNEMONIC_BT:
    case ZYDIS_MNEMONIC_BTS:
    case ZYDIS_MNEMONIC_BTR:
    case ZYDIS_MNEMONIC_BTC:
    case ZYDIS_MNEMONIC_XADD:
    case ZYDIS_MNEMONIC_CMPXCHG: fill_two(c, op); return by_complex(op, integer::simple(c.insn.mnemonic));
    case ZYDIS_MNEMONIC_BSWAP:
      op.dst = gpr_offset(c.operands[0].reg.value);
      return by_complex(op, integer::simple(c.insn.mnemonic));
    case ZYDIS_MNEMONIC_BOUND:
      op.dst = gpr_offset(c.operands[0].reg.value);
      op.size = static_cast<uint8_t>(c.operands[0].size / 8);
      return by_complex(op, integer::simple(c.insn.mnemonic));
    case ZYDIS_MNEMONIC_AAM:
    case ZYDIS_MNEMONIC_AAD:
      op.imm = immediate(c.operands[0]);
      return by_complex(op, integer::simple(c.insn.mnemonic));
    case ZYDIS_MNEMONIC_XLAT:
      op.segment = seg_ds;
      for (unsigned i = 0; i < c.insn.operand_count; ++i)
        if (is_memory(c.operands[i]))
          op.segment = static_cast<uint8_t>(ZydisRegisterGetId(c.operands[i].mem.segment));
      return by_complex(op, integer::simple(c.insn.mnemonic));
    case ZYDIS_MNEMONIC_ADCX:
    case ZYDIS_MNEMONIC_ADOX:
    case ZYDIS_MNEMONIC_ANDN:
    case ZYDIS_MNEMONIC_BEXTR:
    case ZYDIS_MNEMONIC_BZHI:
    case ZYDIS_MNEMONIC_PDEP:
    case ZYDIS_MNEMONIC_PEXT:
    case ZYDIS_MNEMONIC_MULX:
    case ZYDIS_MNEMONIC_RORX:
    case ZYDIS_MNEMONIC_SARX:
    case ZYDIS_MNEMONIC_SHLX:
    case ZYDIS_MNEMONIC_SHRX:
    case ZYDIS_MNEMONIC_BSF:
    case ZYDIS_MNEMONIC_BSR:
    case ZYDIS_MNEMONIC_TZCNT:
    case ZYDIS_MNEMONIC_LZCNT:
    case ZYDIS_MNEMONIC_POPCNT: return decode_source(c, op);
    case ZYDIS_MNEMONIC_BLSI:
    case ZYDIS_MNEMONIC_BLSMSK:
    case ZYDIS_MNEMONIC_BLSR: return decode_source(c, op);
    default: break;
  }
  if (decode_string(c, op)) return true;
  return by_complex(op, integer::simple(c.insn.mnemonic));
}

}  // namespace lodge::kvm::soft
