#include "kvm/soft/translate/copy.hpp"

namespace lodge::kvm::soft {
namespace {

bool is_gpr(ZydisRegister reg) noexcept {
  const ZydisRegisterClass c = ZydisRegisterGetClass(reg);
  return c >= ZYDIS_REGCLASS_GPR8 && c <= ZYDIS_REGCLASS_GPR64;
}

// The register fields of an encoding with all their bits, replaced.
struct Fields {
  unsigned reg = 0, rm = 0, vvvv = 0;
};

Fields fields_of(const Instruction& i, const Standins& standins, bool memory) noexcept {
  Fields f;
  const ZydisDecodedInstruction& insn = i.insn;
  f.reg = insn.raw.modrm.reg;
  f.rm = insn.raw.modrm.rm;
  for (unsigned n = 0; n < insn.operand_count; ++n) {
    const ZydisDecodedOperand& o = i.operands[n];
    if (o.type != ZYDIS_OPERAND_TYPE_REGISTER) continue;
    const bool gpr = is_gpr(o.reg.value);
    // High bytes keep their numbers 4 to 7; everything else has its register's.
    const bool high = o.reg.value >= ZYDIS_REGISTER_AH && o.reg.value <= ZYDIS_REGISTER_BH;
    unsigned number =
        gpr ? gpr_offset(o.reg.value) / 8u : static_cast<unsigned>(ZydisRegisterGetId(o.reg.value));
    if (high)
      number += 4;
    else if (gpr)
      number = standins.host(number);
    switch (o.encoding) {
      case ZYDIS_OPERAND_ENCODING_MODRM_REG: f.reg = number; break;
      case ZYDIS_OPERAND_ENCODING_MODRM_RM:
        if (!memory) f.rm = number;
        break;
      case ZYDIS_OPERAND_ENCODING_NDSNDD: f.vvvv = number; break;
      case ZYDIS_OPERAND_ENCODING_OPCODE: f.rm = number; break;
      default: break;
    }
  }
  return f;
}

// Byte registers 4 to 7 are SPL to DIL only with a REX prefix; the guest's instruction has one then.
bool has_rex(const ZydisDecodedInstruction& insn) noexcept {
  return (insn.attributes & ZYDIS_ATTRIB_HAS_REX) != 0;
}

void legacy_prefixes(Emitter& e, const ZydisDecodedInstruction& insn) noexcept {
  for (unsigned n = 0; n < insn.raw.prefix_count; ++n) {
    const uint8_t prefix = insn.raw.prefixes[n].value;
    if (prefix == 0x66 || prefix == 0xf2 || prefix == 0xf3 || prefix == 0xf0) e.u8(prefix);
  }
}

void rex_and_opcode(Emitter& e, const ZydisDecodedInstruction& insn, unsigned reg, unsigned rm,
                    unsigned opcode) noexcept {
  const bool wide = has_rex(insn) && insn.raw.rex.W != 0;
  const unsigned rex = 0x40u | (wide ? 8u : 0u) | (reg >> 3 & 1) << 2 | (rm >> 3 & 1);
  if (rex != 0x40 || has_rex(insn)) e.u8(rex);
  if (insn.opcode_map != ZYDIS_OPCODE_MAP_DEFAULT) e.u8(0x0f);
  if (insn.opcode_map == ZYDIS_OPCODE_MAP_0F38) e.u8(0x38);
  if (insn.opcode_map == ZYDIS_OPCODE_MAP_0F3A) e.u8(0x3a);
  e.u8(opcode);
}

void vex_prefix(Emitter& e, const ZydisDecodedInstruction& insn, const Fields& f) noexcept {
  const auto& vex = insn.raw.vex;
  e.u8(0xc4);
  e.u8((~f.reg >> 3 & 1) << 7 | 0x40u | (~f.rm >> 3 & 1) << 5 | static_cast<unsigned>(insn.opcode_map));
  e.u8((vex.W != 0 ? 0x80u : 0u) | (~f.vvvv & 0xf) << 3 | (vex.L & 1u) << 2 | (vex.pp & 3u));
  e.u8(insn.opcode);
}

void evex_prefix(Emitter& e, const ZydisDecodedInstruction& insn, const Fields& f, bool memory) noexcept {
  const auto& evex = insn.raw.evex;
  const unsigned x = memory ? 1 : ~f.rm >> 4 & 1;
  e.u8(0x62);
  e.u8((~f.reg >> 3 & 1) << 7 | x << 6 | (~f.rm >> 3 & 1) << 5 | (~f.reg >> 4 & 1) << 4 | (evex.mmm & 7u));
  e.u8((evex.W != 0 ? 0x80u : 0u) | (~f.vvvv & 0xf) << 3 | 4u | (evex.pp & 3u));
  e.u8((evex.z & 1u) << 7 | (evex.L2 & 1u) << 6 | (evex.L & 1u) << 5 | (evex.b & 1u) << 4 |
       (~f.vvvv >> 4 & 1) << 3 | (evex.aaa & 7u));
  e.u8(insn.opcode);
}

void immediates(Emitter& e, const Instruction& i) noexcept {
  const auto& imm = i.insn.raw.imm;
  // The rest of the instruction behind ModRM, SIB and displacement; VEX's register in an immediate too.
  const unsigned from = imm[0].size != 0 ? imm[0].offset : i.insn.length;
  e.bytes(i.bytes.data() + from, i.insn.length - from);
}

bool same_registers(const Instruction& i) noexcept {
  return (i.operand_registers & (1u << 4 | 1u << scratch0 | 1u << scratch1)) == 0;
}

}  // namespace

void copy_registers(Emitter& e, const Instruction& i, const Standins& standins) noexcept {
  const ZydisDecodedInstruction& insn = i.insn;
  const bool short_increment = insn.encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY &&
                               insn.opcode_map == ZYDIS_OPCODE_MAP_DEFAULT && (insn.opcode & 0xf0) == 0x40;
  if (same_registers(i) && !short_increment) {
    e.bytes(i.bytes.data(), insn.length);
    return;
  }
  const Fields f = fields_of(i, standins, false);
  switch (insn.encoding) {
    case ZYDIS_INSTRUCTION_ENCODING_VEX: vex_prefix(e, insn, f); break;
    case ZYDIS_INSTRUCTION_ENCODING_EVEX: evex_prefix(e, insn, f, false); break;
    default:
      legacy_prefixes(e, insn);
      if (short_increment) {  // 40 to 4F are REX prefixes in 64-bit code
        const unsigned reg = standins.host(insn.opcode & 7u);
        rex_and_opcode(e, insn, 0, reg, 0xff);
        e.u8(0xc0 | (insn.opcode & 8u) | (reg & 7));
        return;
      }
      if ((insn.attributes & ZYDIS_ATTRIB_HAS_MODRM) == 0) {  // the register is in the opcode
        rex_and_opcode(e, insn, 0, f.rm, (insn.opcode & 0xf8u) | (f.rm & 7));
        immediates(e, i);
        return;
      }
      rex_and_opcode(e, insn, f.reg, f.rm, insn.opcode);
      break;
  }
  e.u8(0xc0 | (f.reg & 7) << 3 | (f.rm & 7));
  immediates(e, i);
}

void copy_memory(Emitter& e, const Instruction& i, const Standins& standins, int64_t disp) noexcept {
  const ZydisDecodedInstruction& insn = i.insn;
  if ((insn.attributes & ZYDIS_ATTRIB_HAS_MODRM) == 0) {  // MOV of the accumulator, A0 to A3
    const int size = (insn.opcode & 1) == 0 ? 1 : insn.operand_width / 8;
    e.at_scratch((insn.opcode & 2) == 0 ? 0x8b : 0x89, 0, disp, size);
    return;
  }
  Fields f = fields_of(i, standins, true);
  f.rm = scratch0;
  const bool evex = insn.encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX;
  switch (insn.encoding) {
    case ZYDIS_INSTRUCTION_ENCODING_VEX: vex_prefix(e, insn, f); break;
    case ZYDIS_INSTRUCTION_ENCODING_EVEX: evex_prefix(e, insn, f, true); break;
    default:
      legacy_prefixes(e, insn);
      rex_and_opcode(e, insn, f.reg, f.rm, insn.opcode);
      break;
  }
  e.scratch_operand(f.reg, scratch0, disp, evex);
  immediates(e, i);
}

}  // namespace lodge::kvm::soft
