#include "kvm/soft/translate/instruction.hpp"

#include <algorithm>

#include "kvm/soft/decode/decoder.hpp"
#include "kvm/soft/interpret/integer.hpp"
#include "kvm/soft/interpret/system.hpp"
#include "kvm/soft/interpret/vector/host.hpp"
#include "kvm/soft/interpret/vector/run.hpp"
#include "kvm/soft/translate/emitter.hpp"

namespace lodge::kvm::soft {
namespace {

bool is_gpr(ZydisRegister reg) noexcept {
  const ZydisRegisterClass c = ZydisRegisterGetClass(reg);
  return c >= ZYDIS_REGCLASS_GPR8 && c <= ZYDIS_REGCLASS_GPR64;
}

bool is_high_byte(ZydisRegister reg) noexcept {
  return reg >= ZYDIS_REGISTER_AH && reg <= ZYDIS_REGISTER_BH;
}

// Number of the whole register.
unsigned gpr_number(ZydisRegister reg) noexcept {
  return gpr_offset(reg) / 8;
}

// Integer instructions that do natively what the guest's processor would do.
bool is_plain_integer(ZydisMnemonic mnemonic) noexcept {
  switch (mnemonic) {
    case ZYDIS_MNEMONIC_ADD:
    case ZYDIS_MNEMONIC_OR:
    case ZYDIS_MNEMONIC_ADC:
    case ZYDIS_MNEMONIC_SBB:
    case ZYDIS_MNEMONIC_AND:
    case ZYDIS_MNEMONIC_SUB:
    case ZYDIS_MNEMONIC_XOR:
    case ZYDIS_MNEMONIC_CMP:
    case ZYDIS_MNEMONIC_TEST:
    case ZYDIS_MNEMONIC_MOV:
    case ZYDIS_MNEMONIC_MOVZX:
    case ZYDIS_MNEMONIC_MOVSX:
    case ZYDIS_MNEMONIC_MOVSXD:
    case ZYDIS_MNEMONIC_INC:
    case ZYDIS_MNEMONIC_DEC:
    case ZYDIS_MNEMONIC_NEG:
    case ZYDIS_MNEMONIC_NOT:
    case ZYDIS_MNEMONIC_ROL:
    case ZYDIS_MNEMONIC_ROR:
    case ZYDIS_MNEMONIC_RCL:
    case ZYDIS_MNEMONIC_RCR:
    case ZYDIS_MNEMONIC_SHL:
    case ZYDIS_MNEMONIC_SHR:
    case ZYDIS_MNEMONIC_SAR:
    case ZYDIS_MNEMONIC_SHLD:
    case ZYDIS_MNEMONIC_SHRD:
    case ZYDIS_MNEMONIC_IMUL:
    case ZYDIS_MNEMONIC_MUL:
    case ZYDIS_MNEMONIC_DIV:
    case ZYDIS_MNEMONIC_IDIV:
    case ZYDIS_MNEMONIC_BT:
    case ZYDIS_MNEMONIC_BTS:
    case ZYDIS_MNEMONIC_BTR:
    case ZYDIS_MNEMONIC_BTC:
    case ZYDIS_MNEMONIC_BSF:
    case ZYDIS_MNEMONIC_BSR:
    case ZYDIS_MNEMONIC_TZCNT:
    case ZYDIS_MNEMONIC_LZCNT:
    case ZYDIS_MNEMONIC_POPCNT:
    case ZYDIS_MNEMONIC_BSWAP:
    case ZYDIS_MNEMONIC_CBW:
    case ZYDIS_MNEMONIC_CWDE:
    case ZYDIS_MNEMONIC_CDQE:
    case ZYDIS_MNEMONIC_CWD:
    case ZYDIS_MNEMONIC_CDQ:
    case ZYDIS_MNEMONIC_CQO:
    case ZYDIS_MNEMONIC_XADD:
    case ZYDIS_MNEMONIC_CMPXCHG:
    case ZYDIS_MNEMONIC_CMPXCHG8B:
    case ZYDIS_MNEMONIC_CMPXCHG16B:
    case ZYDIS_MNEMONIC_XCHG:
    case ZYDIS_MNEMONIC_MOVBE:
    case ZYDIS_MNEMONIC_CRC32:
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
    case ZYDIS_MNEMONIC_BLSI:
    case ZYDIS_MNEMONIC_BLSMSK:
    case ZYDIS_MNEMONIC_BLSR:
    case ZYDIS_MNEMONIC_CLC:
    case ZYDIS_MNEMONIC_STC:
    case ZYDIS_MNEMONIC_CMC:
    case ZYDIS_MNEMONIC_LAHF:
    case ZYDIS_MNEMONIC_SAHF:
    case ZYDIS_MNEMONIC_MOVNTI:
    case ZYDIS_MNEMONIC_LFENCE:
    case ZYDIS_MNEMONIC_MFENCE:
    case ZYDIS_MNEMONIC_SFENCE: return true;
    default: return false;
  }
}

bool is_condition(const ZydisDecodedInstruction& insn) noexcept {
  return insn.meta.category == ZYDIS_CATEGORY_CMOV || insn.meta.category == ZYDIS_CATEGORY_SETCC;
}

bool is_prefetch(const ZydisDecodedInstruction& insn) noexcept {
  return insn.meta.category == ZYDIS_CATEGORY_PREFETCH || insn.mnemonic == ZYDIS_MNEMONIC_NOP;
}

// x87 instructions whose native execution, with all exceptions masked, needs nothing of the interpreter.
bool is_plain_x87(ZydisMnemonic mnemonic) noexcept {
  switch (mnemonic) {
    case ZYDIS_MNEMONIC_FLDCW:
    case ZYDIS_MNEMONIC_FLDENV:
    case ZYDIS_MNEMONIC_FNSTENV:
    case ZYDIS_MNEMONIC_FNSAVE:
    case ZYDIS_MNEMONIC_FRSTOR:
    case ZYDIS_MNEMONIC_FNINIT:
    case ZYDIS_MNEMONIC_FNCLEX:
    case ZYDIS_MNEMONIC_FWAIT:
    case ZYDIS_MNEMONIC_FENI8087_NOP:
    case ZYDIS_MNEMONIC_FDISI8087_NOP:
    case ZYDIS_MNEMONIC_FSETPM287_NOP:
    case ZYDIS_MNEMONIC_FXSAVE:
    case ZYDIS_MNEMONIC_FXSAVE64:
    case ZYDIS_MNEMONIC_FXRSTOR:
    case ZYDIS_MNEMONIC_FXRSTOR64: return false;
    default: return true;
  }
}

bool aligned_by_nature(const Instruction& i) noexcept {
  // Legacy SSE with 16-byte operands, and the aligned moves of every encoding.
  return i.memory_size >= 16 &&
         (i.insn.encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY || simd::is_aligned_move(i.insn.mnemonic));
}

// Level and suitability of an instruction of the vector family; 0: the interpreter's.
unsigned vector_level(const Cpu& cpu, const Instruction& i) noexcept {
  const Complex run = i.op->complex;
  const bool x87_control = run == simd::run_fldcw || run == simd::run_fnstcw || run == simd::run_fnstsw ||
                           run == simd::run_fnstsw_ax;
  const bool stub = run == simd::run_vector || run == simd::run_vector_fp || run == simd::run_mmx ||
                    run == simd::run_x87 || run == simd::run_vzeroupper || run == simd::run_ldmxcsr ||
                    run == simd::run_stmxcsr || x87_control;
  if (!stub || (cpu.decode_key & key::fp_unmasked) != 0 || (cpu.decode_key & (key::ts | key::em)) != 0)
    return 0;
  const ZydisDecodedInstruction& insn = i.insn;
  if (x87_control) return 3;
  if (run == simd::run_x87) return is_plain_x87(insn.mnemonic) ? 3 : 0;
  if ((cpu.decode_key & key::osfxsr) == 0) return 0;
  if (insn.mnemonic == ZYDIS_MNEMONIC_EMMS) return 0;
  bool mmx = run == simd::run_mmx;
  bool high = insn.encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX;
  for (unsigned n = 0; n < insn.operand_count; ++n) {
    const ZydisDecodedOperand& o = i.operands[n];
    if (o.type == ZYDIS_OPERAND_TYPE_MEMORY && o.mem.type == ZYDIS_MEMOP_TYPE_VSIB) return 0;
    if (o.type != ZYDIS_OPERAND_TYPE_REGISTER) continue;
    const ZydisRegisterClass c = ZydisRegisterGetClass(o.reg.value);
    high = high || c == ZYDIS_REGCLASS_MASK;
    mmx = mmx || c == ZYDIS_REGCLASS_MMX;
  }
  const bool vex = insn.encoding == ZYDIS_INSTRUCTION_ENCODING_VEX;
  if (vex && (cpu.decode_key & key::avx) == 0) return 0;
  if (high && (cpu.decode_key & key::avx512) == 0) return 0;
  // Outside 64-bit mode VZEROUPPER spares the upper eight.
  if (run == simd::run_vzeroupper && cpu.mode() != Mode::bits64) return 0;
  return mmx ? 3 : high ? 2 : 1;
}

void note_flags(Instruction& i) noexcept {
  const ZydisAccessedFlags* flags = i.insn.cpu_flags;
  if (flags == nullptr) return;
  const auto set = [](ZydisAccessedFlagsMask mask) { return static_cast<Flags>(mask & all_flags); };
  i.reads = set(flags->tested);
  const Flags certain = static_cast<Flags>(set(flags->modified) | set(flags->set_0) | set(flags->set_1));
  i.writes = static_cast<Flags>(certain | set(flags->undefined));
  i.replaces = certain;
  switch (i.insn.mnemonic) {
    // What the manuals leave undefined here, every processor defines.
    case ZYDIS_MNEMONIC_AND:
    case ZYDIS_MNEMONIC_OR:
    case ZYDIS_MNEMONIC_XOR:
    case ZYDIS_MNEMONIC_TEST: i.replaces = all_flags; break;
    // A count of zero changes nothing.
    case ZYDIS_MNEMONIC_SHL:
    case ZYDIS_MNEMONIC_SHR:
    case ZYDIS_MNEMONIC_SAR: {
      const ZydisDecodedOperand& count = i.operands[1];
      const unsigned mask = i.op->size == 8 ? 63 : 31;
      const bool fixed = count.type == ZYDIS_OPERAND_TYPE_IMMEDIATE && (count.imm.value.u & mask) != 0;
      i.replaces = fixed ? all_flags : no_flags;
      i.writes = all_flags;
      break;
    }
    case ZYDIS_MNEMONIC_ROL:
    case ZYDIS_MNEMONIC_ROR:
    case ZYDIS_MNEMONIC_RCL:
    case ZYDIS_MNEMONIC_RCR:
    case ZYDIS_MNEMONIC_SHLD:
    case ZYDIS_MNEMONIC_SHRD:
      i.replaces = no_flags;
      i.writes = all_flags;
      break;
    // All of the register, of which the low byte of RFLAGS.
    case ZYDIS_MNEMONIC_LAHF: i.reads = all_flags; break;
    default: break;
  }
}

void note_registers(Instruction& i) noexcept {
  for (unsigned n = 0; n < i.insn.operand_count; ++n) {
    const ZydisDecodedOperand& o = i.operands[n];
    if (o.type == ZYDIS_OPERAND_TYPE_MEMORY && o.visibility == ZYDIS_OPERAND_VISIBILITY_EXPLICIT) {
      if (o.mem.type == ZYDIS_MEMOP_TYPE_AGEN) continue;
      i.memory_size = static_cast<uint8_t>(std::min<unsigned>(o.size / 8, 255));
      i.memory_read = (o.actions & ZYDIS_OPERAND_ACTION_MASK_READ) != 0;
      i.memory_write = (o.actions & ZYDIS_OPERAND_ACTION_MASK_WRITE) != 0;
    }
    if (o.type != ZYDIS_OPERAND_TYPE_REGISTER || !is_gpr(o.reg.value)) continue;
    const unsigned reg = gpr_number(o.reg.value);
    if (o.visibility != ZYDIS_OPERAND_VISIBILITY_HIDDEN) i.operand_registers |= register_bit(reg);
    if ((o.actions & ZYDIS_OPERAND_ACTION_MASK_WRITE) != 0) i.written_registers |= register_bit(reg);
  }
  if ((i.op->flags & Op::has_memory) != 0) {
    if (i.op->base < 16) i.address_registers |= register_bit(i.op->base);
    if (i.op->index < 16) i.address_registers |= register_bit(i.op->index);
  }
}

// MOV of the accumulator with an address in place of ModRM.
bool is_absolute_move(const ZydisDecodedInstruction& insn) noexcept {
  return insn.mnemonic == ZYDIS_MNEMONIC_MOV && insn.opcode_map == ZYDIS_OPCODE_MAP_DEFAULT &&
         (insn.opcode & 0xfc) == 0xa0;
}

// Displacements that stay 32-bit ones when what RSP has moved by (at most 2 MiB in a block), or the block's
// place in its page, is added.
bool modest(int64_t disp) noexcept {
  constexpr int64_t limit = (int64_t{1} << 31) - (int64_t{1} << 22);
  return disp >= -limit && disp < limit;
}

// Whether the memory operand is one that translated code can reach; outside 64-bit mode also one off FS or
// GS, if their segments turn out to be as usual, else the instruction is interpreted (`checked`).
bool good_address(const Cpu& cpu, Instruction& i, bool checked = false) noexcept {
  const Op& op = *i.op;
  if ((op.flags & Op::has_memory) == 0 || i.memory_size == 0 || i.memory_size > 64) return false;
  const bool wide = cpu.mode() == Mode::bits64;
  const bool absolute = is_absolute_move(i.insn);
  if ((i.insn.attributes & ZYDIS_ATTRIB_HAS_MODRM) == 0 && !absolute) return false;
  if (!modest(wide ? op.disp : static_cast<int32_t>(op.disp))) return false;
  if (wide) {
    if (op.address_size == 2 || absolute) return false;
    i.narrow_address = op.address_size == 4;
    return true;
  }
  i.narrow_address = true;
  const bool thread = op.segment == seg_fs || op.segment == seg_gs;
  return op.address_size == 4 &&
         (op.segment == seg_ds || op.segment == seg_es || op.segment == seg_ss || (thread && checked));
}

// AH to BH cannot be named beside a REX prefix, which the patched memory operand needs.
bool names_high_byte(const Instruction& i) noexcept {
  return std::any_of(i.operands.begin(), i.operands.begin() + i.insn.operand_count, [](const auto& o) {
    return o.type == ZYDIS_OPERAND_TYPE_REGISTER && is_high_byte(o.reg.value);
  });
}

Kind data_kind(const Cpu& cpu, Instruction& i) noexcept {
  const ZydisDecodedInstruction& insn = i.insn;
  if (is_prefetch(insn)) return Kind::nothing;
  if (insn.mnemonic == ZYDIS_MNEMONIC_LEA) {
    const bool known = i.op->address_size >= 4 && i.op->size >= 4 && modest(i.op->disp);
    return known ? Kind::address : Kind::complex;
  }
  if (is_plain_integer(insn.mnemonic) || is_condition(insn)) {
    // The system's and the string instructions share mnemonics with these.
    if (i.op->handler == run_complex && i.op->complex == nullptr) return Kind::complex;
    for (unsigned n = 0; n < insn.operand_count; ++n) {
      const ZydisDecodedOperand& o = i.operands[n];
      if (o.type == ZYDIS_OPERAND_TYPE_REGISTER && !is_gpr(o.reg.value) &&
          ZydisRegisterGetClass(o.reg.value) != ZYDIS_REGCLASS_FLAGS &&
          ZydisRegisterGetClass(o.reg.value) != ZYDIS_REGCLASS_IP)
        return Kind::complex;
    }
    if ((insn.attributes & (ZYDIS_ATTRIB_HAS_REP | ZYDIS_ATTRIB_HAS_REPE | ZYDIS_ATTRIB_HAS_REPNE)) != 0)
      return Kind::complex;
    i.may_fault = insn.mnemonic == ZYDIS_MNEMONIC_DIV || insn.mnemonic == ZYDIS_MNEMONIC_IDIV ||
                  insn.mnemonic == ZYDIS_MNEMONIC_CMPXCHG16B;
    // A bit offset in a register reaches beyond the operand.
    const bool bits = insn.mnemonic == ZYDIS_MNEMONIC_BT || insn.mnemonic == ZYDIS_MNEMONIC_BTS ||
                      insn.mnemonic == ZYDIS_MNEMONIC_BTR || insn.mnemonic == ZYDIS_MNEMONIC_BTC;
    if (bits && i.has_memory() && i.operands[1].type == ZYDIS_OPERAND_TYPE_REGISTER) {
      const bool plain = i.op->size >= 4 && i.op->address_size == (cpu.mode() == Mode::bits64 ? 8 : 4) &&
                         i.op->src != rsp * 8;
      return plain && good_address(cpu, i) ? Kind::bit_test : Kind::complex;
    }
  } else {
    // What is masked cannot be pending.
    if (i.op->complex == simd::run_fwait && (cpu.decode_key & (key::fp_unmasked | key::ts)) == 0)
      return Kind::nothing;
    const unsigned level = vector_level(cpu, i);
    if (level == 0) return Kind::complex;
    i.level = static_cast<uint8_t>(level);
    if (i.op->complex == simd::run_ldmxcsr || i.op->complex == simd::run_fldcw)
      return good_address(cpu, i, true) ? Kind::load_control : Kind::complex;
    i.may_fault = i.has_memory() && aligned_by_nature(i);
  }
  if (!i.has_memory()) return Kind::copy;
  if (!good_address(cpu, i, true) || names_high_byte(i)) return Kind::complex;
  return Kind::memory;
}

Kind stack_kind(const Cpu& cpu, Instruction& i) noexcept {
  const bool wide = cpu.mode() == Mode::bits64;
  if (i.op->size != (wide ? 8 : 4)) return Kind::complex;
  const ZydisDecodedOperand& o = i.operands[0];
  switch (i.insn.mnemonic) {
    case ZYDIS_MNEMONIC_PUSH:
      if (o.type == ZYDIS_OPERAND_TYPE_IMMEDIATE) return Kind::push;
      if (o.type == ZYDIS_OPERAND_TYPE_MEMORY)
        return good_address(cpu, i) ? Kind::push_memory : Kind::complex;
      return o.type == ZYDIS_OPERAND_TYPE_REGISTER && is_gpr(o.reg.value) && gpr_number(o.reg.value) != rsp
                 ? Kind::push
                 : Kind::complex;
    case ZYDIS_MNEMONIC_POP:
      return o.type == ZYDIS_OPERAND_TYPE_REGISTER && is_gpr(o.reg.value) &&
                     (wide || gpr_number(o.reg.value) != rsp)
                 ? Kind::pop
                 : Kind::complex;
    case ZYDIS_MNEMONIC_LEAVE: return Kind::leave;
    default: return i.op->complex == system::pushf ? Kind::push_flags : Kind::pop_flags;
  }
}

// Other segments than flat ones, and other address sizes than the mode's, are the interpreter's.
Kind string_kind(const Cpu& cpu, const Instruction& i) noexcept {
  const bool wide = cpu.mode() == Mode::bits64;
  const bool flat = wide ? i.op->segment < seg_fs
                         : i.op->segment == seg_ds || i.op->segment == seg_es || i.op->segment == seg_ss;
  const bool repeats = (i.op->flags & (Op::rep | Op::repne)) != 0;
  return flat && !repeats && i.op->address_size == (wide ? 8 : 4) ? Kind::string : Kind::complex;
}

Kind branch_kind(const Cpu& cpu, Instruction& i) noexcept {
  const unsigned word = cpu.mode() == Mode::bits64 ? 8 : 4;
  const ZydisDecodedInstruction& insn = i.insn;
  if (i.op->size != word || insn.meta.branch_type == ZYDIS_BRANCH_TYPE_FAR) return Kind::complex;
  const ZydisDecodedOperand& o = i.operands[0];
  const bool relative = o.type == ZYDIS_OPERAND_TYPE_IMMEDIATE;
  if (!relative && insn.mnemonic != ZYDIS_MNEMONIC_RET) {
    if (o.type == ZYDIS_OPERAND_TYPE_MEMORY && !good_address(cpu, i)) return Kind::complex;
    if (o.type == ZYDIS_OPERAND_TYPE_REGISTER && gpr_number(o.reg.value) == rsp) return Kind::complex;
  }
  switch (insn.mnemonic) {
    case ZYDIS_MNEMONIC_CALL: return relative ? Kind::call : Kind::call_indirect;
    case ZYDIS_MNEMONIC_JMP: return relative ? Kind::jump : Kind::jump_indirect;
    case ZYDIS_MNEMONIC_RET: return Kind::ret;
    default: break;
  }
  if (insn.meta.category != ZYDIS_CATEGORY_COND_BR) return Kind::complex;
  if (insn.opcode_map == ZYDIS_OPCODE_MAP_DEFAULT && insn.opcode >= 0xe0)
    return i.op->address_size >= 4 ? Kind::loop : Kind::complex;  // of RCX or ECX
  return Kind::branch;
}

// System instructions that need no more than their own few host instructions.
Kind system_kind(const Cpu& cpu, const Instruction& i) noexcept {
  const bool kernel = (cpu.decode_key & key::kernel) != 0;
  switch (i.insn.mnemonic) {
    case ZYDIS_MNEMONIC_SWAPGS: return kernel && cpu.mode() == Mode::bits64 ? Kind::swap_gs : Kind::complex;
    case ZYDIS_MNEMONIC_CLI: return kernel ? Kind::clear_if : Kind::complex;
    case ZYDIS_MNEMONIC_STI: return kernel ? Kind::set_if : Kind::complex;
    case ZYDIS_MNEMONIC_CLD:
    case ZYDIS_MNEMONIC_STD: return Kind::set_df;
    // Zydis 4.0 takes F3 REX.B 90 for PAUSE, too.
    case ZYDIS_MNEMONIC_PAUSE: return i.op->complex == system::pause ? Kind::pause : Kind::complex;
    case ZYDIS_MNEMONIC_SERIALIZE: return Kind::serialize;
    case ZYDIS_MNEMONIC_RDTSC:
    case ZYDIS_MNEMONIC_RDTSCP:
      return (cpu.decode_key & key::tsc_direct) != 0 ? Kind::read_tsc : Kind::complex;
    case ZYDIS_MNEMONIC_MOV:
      return i.op->complex == system::mov_from_segment && !i.has_memory() && i.op->size >= 4
                 ? Kind::read_segment
                 : Kind::complex;
    default: return Kind::complex;
  }
}

Kind choose(const Cpu& cpu, Instruction& i) noexcept {
  if (i.op->complex == undefined_opcode) return Kind::complex;
  switch (i.insn.meta.category) {
    case ZYDIS_CATEGORY_CALL:
    case ZYDIS_CATEGORY_RET:
    case ZYDIS_CATEGORY_COND_BR:
    case ZYDIS_CATEGORY_UNCOND_BR: return branch_kind(cpu, i);
    case ZYDIS_CATEGORY_STRINGOP: return string_kind(cpu, i);
    default: break;
  }
  switch (i.insn.mnemonic) {
    case ZYDIS_MNEMONIC_PUSH:
    case ZYDIS_MNEMONIC_POP:
    case ZYDIS_MNEMONIC_LEAVE:
    case ZYDIS_MNEMONIC_PUSHF:
    case ZYDIS_MNEMONIC_PUSHFD:
    case ZYDIS_MNEMONIC_PUSHFQ:
    case ZYDIS_MNEMONIC_POPF:
    case ZYDIS_MNEMONIC_POPFD:
    case ZYDIS_MNEMONIC_POPFQ: return stack_kind(cpu, i);
    default: break;
  }
  const Kind system = system_kind(cpu, i);
  return system != Kind::complex ? system : data_kind(cpu, i);
}

// Whether the bytes of an instruction of 32-bit code say the same in 64-bit code, where they are copied to.
// What they ignore here counts there: VEX.B, VEX.W, the fourth bit of VEX.vvvv; 82 is no opcode at all.
bool same_in_64_bit_code(const Cpu& cpu, const Instruction& i) noexcept {
  ZydisDecoder decoder;
  ZydisDecoderInit(&decoder, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
  configure_decoder(decoder, cpu.features);
  ZydisDecodedInstruction insn;
  std::array<ZydisDecodedOperand, ZYDIS_MAX_OPERAND_COUNT> operands;
  const bool increment = i.insn.encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY &&
                         i.insn.opcode_map == ZYDIS_OPCODE_MAP_DEFAULT && (i.insn.opcode & 0xf0) == 0x40;
  if (increment || is_absolute_move(i.insn)) return true;  // copied in another form
  if (!ZYAN_SUCCESS(
          ZydisDecoderDecodeFull(&decoder, i.bytes.data(), i.insn.length, &insn, operands.data())) ||
      insn.length != i.insn.length || insn.mnemonic != i.insn.mnemonic ||
      insn.operand_count != i.insn.operand_count)
    return false;
  for (unsigned n = 0; n < insn.operand_count; ++n) {
    const ZydisDecodedOperand &wide = operands[n], &narrow = i.operands[n];
    if (wide.type != narrow.type) return false;
    const bool flags = wide.type == ZYDIS_OPERAND_TYPE_REGISTER &&
                       ZydisRegisterGetClass(wide.reg.value) == ZYDIS_REGCLASS_FLAGS;
    if (flags) continue;
    if (wide.size != narrow.size) return false;
    if (wide.type == ZYDIS_OPERAND_TYPE_REGISTER && wide.reg.value != narrow.reg.value) return false;
  }
  return true;
}

}  // namespace

bool translator_decoder(const Cpu& cpu, ZydisDecoder& decoder) noexcept {
  if (cpu.mode() == Mode::bits64)
    ZydisDecoderInit(&decoder, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
  else if (cpu.mode() == Mode::bits32 && cpu.flat && cpu.segment[seg_cs].base == 0)
    ZydisDecoderInit(&decoder,
                     cpu.long_mode() ? ZYDIS_MACHINE_MODE_LONG_COMPAT_32 : ZYDIS_MACHINE_MODE_LEGACY_32,
                     ZYDIS_STACK_WIDTH_32);
  else
    return false;
  configure_decoder(decoder, cpu.features);
  return true;
}

void analyse(const Cpu& cpu, const ZydisDecoder& decoder, const uint8_t* bytes, unsigned available,
             const Op& op, Instruction& out) noexcept {
  out.op = &op;
  out.kind = Kind::complex;
  out.reads = out.writes = out.replaces = no_flags;
  out.operand_registers = out.written_registers = out.address_registers = 0;
  out.memory_read = out.memory_write = out.narrow_address = out.may_fault = false;
  out.memory_size = out.level = 0;
  std::copy_n(bytes, available, out.bytes.begin());
  if (op.complex == undefined_opcode ||
      !ZYAN_SUCCESS(
          ZydisDecoderDecodeFull(&decoder, out.bytes.data(), available, &out.insn, out.operands.data())) ||
      out.insn.length != op.length) {
    out.insn = {};
    out.reads = all_flags;
    return;
  }
  note_flags(out);
  note_registers(out);
  out.kind = choose(cpu, out);
  // Two scratch registers stand in for operands; beside an address only one is left.
  const unsigned homeless = count_homeless(out.operand_registers);
  const bool crowded = out.kind == Kind::memory ? homeless > 1 : homeless > 2;
  const bool unnameable = homeless > 0 && names_high_byte(out);
  const bool copied = out.kind == Kind::copy || out.kind == Kind::memory;
  const bool foreign = copied && cpu.mode() != Mode::bits64 && !same_in_64_bit_code(cpu, out);
  if (crowded || unnameable || foreign) out.kind = Kind::complex;
  if (out.kind == Kind::nothing) out.reads = out.writes = out.replaces = no_flags;
  if (out.kind == Kind::swap_gs || out.kind == Kind::read_segment || out.kind == Kind::clear_if ||
      out.kind == Kind::set_if)
    out.writes = out.replaces = no_flags;
  if (out.kind == Kind::push_flags) out.reads = all_flags;
  if (out.kind == Kind::pop_flags) {  // they are stored
    out.reads = out.writes = no_flags;
    out.replaces = all_flags;
  }
  if (out.kind == Kind::set_if) out.reads = all_flags;  // the interpreter may have to do it
  if (out.kind == Kind::complex) {
    out.reads = all_flags;  // it may fault, and may look at all of them
    out.replaces = no_flags;
  }
}

}  // namespace lodge::kvm::soft
