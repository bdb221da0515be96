// From a decoded instruction to a handler: what must be done by hand by mnemonic, all else as a stub whose
// form follows from the operands that Zydis describes. Only instruction sets listed in host.cpp pass, and
// only those that the guest's CPUID offers.
#include <algorithm>
#include <bit>
#include <exception>

#include "kvm/soft/interpret/gate.hpp"
#include "kvm/soft/interpret/vector/gather.hpp"
#include "kvm/soft/interpret/vector/host.hpp"
#include "kvm/soft/interpret/vector/run.hpp"
#include "kvm/soft/interpret/vector/stub.hpp"

namespace lodge::kvm::soft {
namespace {

using namespace simd;

const ZydisDecodedOperand* memory_operand(const DecodeContext& c) {
  for (unsigned i = 0; i < c.insn.operand_count; ++i)
    if (c.operands[i].type == ZYDIS_OPERAND_TYPE_MEMORY) return &c.operands[i];
  return nullptr;
}

bool has_register(const DecodeContext& c, ZydisRegisterClass wanted) {
  return std::any_of(c.operands, c.operands + c.insn.operand_count, [&](const ZydisDecodedOperand& operand) {
    return operand.type == ZYDIS_OPERAND_TYPE_REGISTER && ZydisRegisterGetClass(operand.reg.value) == wanted;
  });
}

uint8_t number(ZydisRegister reg) {
  return static_cast<uint8_t>(ZydisRegisterGetId(reg));
}

bool mine(const ZydisDecodedInstruction& insn) {
  switch (insn.meta.isa_set) {
    case ZYDIS_ISA_SET_PPRO:  // FCOMI and relatives, among integer instructions
      return insn.meta.isa_ext == ZYDIS_ISA_EXT_X87;
    case ZYDIS_ISA_SET_SSE42: return insn.mnemonic != ZYDIS_MNEMONIC_CRC32;
    case ZYDIS_ISA_SET_XSAVE:
      return insn.mnemonic != ZYDIS_MNEMONIC_XGETBV && insn.mnemonic != ZYDIS_MNEMONIC_XSETBV;
    default: return host().runs[insn.meta.isa_set];
  }
}

// ---- By hand
// -----------------------------------------------------------------------------------------------

struct ByHand {
  ZydisMnemonic mnemonic;
  Complex run;
};

constexpr ByHand by_hand[] = {
    {ZYDIS_MNEMONIC_FNINIT, run_fninit},
    {ZYDIS_MNEMONIC_FNCLEX, run_fnclex},
    {ZYDIS_MNEMONIC_FWAIT, run_fwait},
    {ZYDIS_MNEMONIC_FNSTCW, run_fnstcw},
    {ZYDIS_MNEMONIC_FLDCW, run_fldcw},
    {ZYDIS_MNEMONIC_FNSTENV, run_fnstenv},
    {ZYDIS_MNEMONIC_FLDENV, run_fldenv},
    {ZYDIS_MNEMONIC_FNSAVE, run_fnsave},
    {ZYDIS_MNEMONIC_FRSTOR, run_frstor},
    {ZYDIS_MNEMONIC_FENI8087_NOP, run_x87_nop},
    {ZYDIS_MNEMONIC_FDISI8087_NOP, run_x87_nop},
    {ZYDIS_MNEMONIC_FSETPM287_NOP, run_x87_nop},
    {ZYDIS_MNEMONIC_EMMS, run_emms},
    {ZYDIS_MNEMONIC_LFENCE, run_fence},
    {ZYDIS_MNEMONIC_MFENCE, run_fence},
    {ZYDIS_MNEMONIC_SFENCE, run_fence},
    {ZYDIS_MNEMONIC_FXSAVE, run_fxsave},
    {ZYDIS_MNEMONIC_FXSAVE64, run_fxsave},
    {ZYDIS_MNEMONIC_FXRSTOR, run_fxrstor},
    {ZYDIS_MNEMONIC_FXRSTOR64, run_fxrstor},
    {ZYDIS_MNEMONIC_XSAVE, run_xsave},
    {ZYDIS_MNEMONIC_XSAVE64, run_xsave},
    {ZYDIS_MNEMONIC_XSAVEOPT, run_xsaveopt},
    {ZYDIS_MNEMONIC_XSAVEOPT64, run_xsaveopt},
    {ZYDIS_MNEMONIC_XSAVEC, run_xsavec},
    {ZYDIS_MNEMONIC_XSAVEC64, run_xsavec},
    {ZYDIS_MNEMONIC_XSAVES, run_xsaves},
    {ZYDIS_MNEMONIC_XSAVES64, run_xsaves},
    {ZYDIS_MNEMONIC_XRSTOR, run_xrstor},
    {ZYDIS_MNEMONIC_XRSTOR64, run_xrstor},
    {ZYDIS_MNEMONIC_XRSTORS, run_xrstors},
    {ZYDIS_MNEMONIC_XRSTORS64, run_xrstors},
};

// MASKMOVDQU and MASKMOVQ: the memory operand is DS:rDI, in no ModRM.
void decode_maskmov(const DecodeContext& c, Op& op) {
  const ZydisDecodedOperand& memory = *memory_operand(c);
  op.base = rdi;
  op.index = gpr_zero;
  op.scale = 0;
  op.disp = 0;
  op.flags |= Op::has_memory;
  op.address_size = static_cast<uint8_t>(c.insn.address_width / 8);
  const ZydisRegister segment = memory.mem.segment;
  const bool flat64 = c.insn.machine_mode == ZYDIS_MACHINE_MODE_LONG_64 && segment != ZYDIS_REGISTER_FS &&
                      segment != ZYDIS_REGISTER_GS;
  op.segment = flat64 ? uint8_t{seg_none} : number(segment);
  op.size = c.insn.mnemonic == ZYDIS_MNEMONIC_MASKMOVQ ? 8 : 16;
  op.dst = number(c.operands[0].reg.value);
  op.src = number(c.operands[1].reg.value);
  op.complex = c.insn.mnemonic == ZYDIS_MNEMONIC_MASKMOVQ      ? run_maskmovq
               : c.insn.mnemonic == ZYDIS_MNEMONIC_VMASKMOVDQU ? run_vmaskmov
                                                               : run_maskmov;
}

bool decode_by_hand(const DecodeContext& c, Op& op) {
  const ZydisDecodedInstruction& insn = c.insn;
  switch (insn.mnemonic) {
    case ZYDIS_MNEMONIC_FNSTSW:
      op.complex = memory_operand(c) != nullptr ? run_fnstsw : run_fnstsw_ax;
      return true;
    case ZYDIS_MNEMONIC_LDMXCSR:
    case ZYDIS_MNEMONIC_VLDMXCSR:
      op.src = insn.mnemonic == ZYDIS_MNEMONIC_VLDMXCSR;
      op.complex = run_ldmxcsr;
      return true;
    case ZYDIS_MNEMONIC_STMXCSR:
    case ZYDIS_MNEMONIC_VSTMXCSR:
      op.src = insn.mnemonic == ZYDIS_MNEMONIC_VSTMXCSR;
      op.complex = run_stmxcsr;
      return true;
    case ZYDIS_MNEMONIC_VZEROUPPER:
    case ZYDIS_MNEMONIC_VZEROALL:
      op.dst = insn.mnemonic == ZYDIS_MNEMONIC_VZEROALL ? 0 : 16;
      op.complex = run_vzeroupper;
      return true;
    case ZYDIS_MNEMONIC_MASKMOVDQU:
    case ZYDIS_MNEMONIC_VMASKMOVDQU:
    case ZYDIS_MNEMONIC_MASKMOVQ: decode_maskmov(c, op); return true;
    default: break;
  }
  for (const ByHand& entry : by_hand) {
    if (entry.mnemonic != insn.mnemonic) continue;
    op.complex = entry.run;
    op.dst = (insn.attributes & ZYDIS_ATTRIB_HAS_REX) != 0 && insn.raw.rex.W != 0;
    // The environment's width follows the operand size, which is never 64 here.
    op.size = insn.operand_width == 16 ? 2 : 4;
    return true;
  }
  return false;
}

// ---- Gathers and scatters
// ----------------------------------------------------------------------------------

bool decode_gather(const DecodeContext& c, Op& op) {
  const ZydisDecodedOperand* const memory = memory_operand(c);
  if (memory == nullptr || memory->mem.type != ZYDIS_MEMOP_TYPE_VSIB) return false;
  const bool evex = c.insn.encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX;
  const bool scatter = memory == &c.operands[0];
  const ZydisDecodedOperand& data = scatter ? c.operands[c.insn.operand_count_visible - 1u] : c.operands[0];
  Gather g;
  g.evex = evex;
  g.data = number(data.reg.value);
  g.index = number(memory->mem.index);
  g.mask = evex ? number(c.insn.avx.mask.reg) : number(c.operands[2].reg.value);
  // ...DD, DPS: 32-bit indices, 32-bit elements. The opcode's low bit is the index' width, W the element's.
  const bool wide = evex ? c.insn.raw.evex.W != 0 : c.insn.raw.vex.W != 0;
  g.element_log = wide ? 3 : 2;
  g.index_log = (c.insn.opcode & 1) != 0 ? 3 : 2;
  const unsigned bytes = c.insn.avx.vector_length / 8u;
  g.count = static_cast<uint8_t>(bytes >> std::max(g.element_log, g.index_log));
  g.vector_size = static_cast<uint8_t>(bytes);
  op.index = gpr_zero;
  op.scale = static_cast<uint8_t>(std::countr_zero(static_cast<unsigned>(memory->mem.scale)));
  op.imm = std::bit_cast<uint64_t>(g);
  op.complex = scatter ? run_scatter : run_gather;
  return true;
}

// ---- Stubs
// -------------------------------------------------------------------------------------------------

bool unaligned_sse(ZydisMnemonic mnemonic) {
  switch (mnemonic) {
    case ZYDIS_MNEMONIC_MOVUPS:
    case ZYDIS_MNEMONIC_MOVUPD:
    case ZYDIS_MNEMONIC_MOVDQU:
    case ZYDIS_MNEMONIC_LDDQU:
    case ZYDIS_MNEMONIC_PCMPESTRI:
    case ZYDIS_MNEMONIC_PCMPESTRM:
    case ZYDIS_MNEMONIC_PCMPISTRI:
    case ZYDIS_MNEMONIC_PCMPISTRM: return true;
    default: return false;
  }
}

bool is_float(ZydisElementType type) {
  return type == ZYDIS_ELEMENT_TYPE_FLOAT16 || type == ZYDIS_ELEMENT_TYPE_FLOAT32 ||
         type == ZYDIS_ELEMENT_TYPE_FLOAT64;
}

// Whether MXCSR may matter: exception classes 2, 3 and 11, and all else on floating-point elements but moves
// (VRCP14 and VFPCLASS heed DAZ). Too often costs a little time
// only.
bool uses_mxcsr(const DecodeContext& c) {
  switch (c.insn.meta.exception_class) {
    case ZYDIS_EXCEPTION_CLASS_SSE2:
    case ZYDIS_EXCEPTION_CLASS_SSE3:
    case ZYDIS_EXCEPTION_CLASS_AVX2:
    case ZYDIS_EXCEPTION_CLASS_AVX3:
    case ZYDIS_EXCEPTION_CLASS_AVX11:
    case ZYDIS_EXCEPTION_CLASS_E2:
    case ZYDIS_EXCEPTION_CLASS_E2NF:
    case ZYDIS_EXCEPTION_CLASS_E3:
    case ZYDIS_EXCEPTION_CLASS_E3NF:
    case ZYDIS_EXCEPTION_CLASS_E11:
    case ZYDIS_EXCEPTION_CLASS_E11NF: return true;
    default: break;
  }
  switch (c.insn.meta.category) {
    case ZYDIS_CATEGORY_DATAXFER:
    case ZYDIS_CATEGORY_LOGICAL_FP:
    case ZYDIS_CATEGORY_BROADCAST:
    case ZYDIS_CATEGORY_X87_ALU:
    case ZYDIS_CATEGORY_FCMOV: return false;
    default:
      return std::any_of(c.operands, c.operands + c.insn.operand_count,
                         [](const ZydisDecodedOperand& operand) { return is_float(operand.element_type); });
  }
}

Need need_of(const DecodeContext& c) {
  const ZydisDecodedInstruction& insn = c.insn;
  if (insn.mnemonic == ZYDIS_MNEMONIC_MOVNTI) return Need::nothing;
  switch (insn.encoding) {
    case ZYDIS_INSTRUCTION_ENCODING_EVEX: return Need::avx512;
    case ZYDIS_INSTRUCTION_ENCODING_VEX:
      return has_register(c, ZYDIS_REGCLASS_MASK) ? Need::avx512 : Need::avx;
    default: break;
  }
  // FISTTP is listed under SSE3.
  if (insn.meta.isa_ext == ZYDIS_ISA_EXT_X87 || insn.mnemonic == ZYDIS_MNEMONIC_FISTTP) return Need::x87;
  const bool mmx = has_register(c, ZYDIS_REGCLASS_MMX);
  if (mmx) return has_register(c, ZYDIS_REGCLASS_XMM) ? Need::sse_mmx : Need::mmx;
  return Need::sse;
}

// Instructions of exception classes "NF" read all of their operand; the others leave masked elements alone.
bool suppresses_faults(const ZydisDecodedInstruction& insn) {
  // Masked by bytes, but each result needs a whole matrix of 8 bytes (class E4NF, which Zydis 4.0 has as E4).
  if (insn.mnemonic == ZYDIS_MNEMONIC_VGF2P8AFFINEQB || insn.mnemonic == ZYDIS_MNEMONIC_VGF2P8AFFINEINVQB ||
      insn.mnemonic == ZYDIS_MNEMONIC_VDBPSADBW || insn.mnemonic == ZYDIS_MNEMONIC_VCVTNE2PS2BF16)
    return false;
  switch (insn.meta.exception_class) {
    case ZYDIS_EXCEPTION_CLASS_E1NF:
    case ZYDIS_EXCEPTION_CLASS_E2NF:
    case ZYDIS_EXCEPTION_CLASS_E3NF:
    case ZYDIS_EXCEPTION_CLASS_E4NF:
    case ZYDIS_EXCEPTION_CLASS_E5NF:
    case ZYDIS_EXCEPTION_CLASS_E6NF:
    case ZYDIS_EXCEPTION_CLASS_E9NF:
    case ZYDIS_EXCEPTION_CLASS_E10NF:
    case ZYDIS_EXCEPTION_CLASS_E11NF: return false;
    default: return true;
  }
}

unsigned broadcast_elements(ZydisBroadcastMode mode) {
  switch (mode) {
    case ZYDIS_BROADCAST_MODE_1_TO_2: return 2;
    case ZYDIS_BROADCAST_MODE_1_TO_4:
    case ZYDIS_BROADCAST_MODE_2_TO_4: return 4;
    case ZYDIS_BROADCAST_MODE_1_TO_8:
    case ZYDIS_BROADCAST_MODE_2_TO_8:
    case ZYDIS_BROADCAST_MODE_4_TO_8: return 8;
    case ZYDIS_BROADCAST_MODE_1_TO_16:
    case ZYDIS_BROADCAST_MODE_2_TO_16:
    case ZYDIS_BROADCAST_MODE_4_TO_16:
    case ZYDIS_BROADCAST_MODE_8_TO_16: return 16;
    case ZYDIS_BROADCAST_MODE_1_TO_32: return 32;
    case ZYDIS_BROADCAST_MODE_1_TO_64: return 64;
    default: return 0;
  }
}

// Accumulating dot products: their mask goes by the elements of the result, wider than those of the sources.
bool is_dot_product(const ZydisDecodedInstruction& insn) {
  switch (insn.mnemonic) {
    case ZYDIS_MNEMONIC_VPDPBUSD:
    case ZYDIS_MNEMONIC_VPDPBUSDS:
    case ZYDIS_MNEMONIC_VPDPWSSD:
    case ZYDIS_MNEMONIC_VPDPWSSDS:
    case ZYDIS_MNEMONIC_VDPBF16PS: return true;
    default: return false;
  }
}

bool compresses(const ZydisDecodedInstruction& insn) {
  return insn.meta.category == ZYDIS_CATEGORY_COMPRESS || insn.meta.category == ZYDIS_CATEGORY_EXPAND ||
         insn.mnemonic == ZYDIS_MNEMONIC_VPCOMPRESSB || insn.mnemonic == ZYDIS_MNEMONIC_VPCOMPRESSW ||
         insn.mnemonic == ZYDIS_MNEMONIC_VPEXPANDB || insn.mnemonic == ZYDIS_MNEMONIC_VPEXPANDW;
}

void set_masking(const DecodeContext& c, const ZydisDecodedOperand& memory, Form& form) {
  const ZydisDecodedInstruction& insn = c.insn;
  switch (insn.mnemonic) {
    case ZYDIS_MNEMONIC_VMASKMOVPS:
    case ZYDIS_MNEMONIC_VMASKMOVPD:
    case ZYDIS_MNEMONIC_VPMASKMOVD:
    case ZYDIS_MNEMONIC_VPMASKMOVQ:
      form.masking = Masking::vector;
      form.mask = number(c.operands[1].reg.value);
      return;
    default: break;
  }
  if (insn.encoding != ZYDIS_INSTRUCTION_ENCODING_EVEX || insn.avx.mask.reg == ZYDIS_REGISTER_NONE ||
      insn.avx.mask.reg == ZYDIS_REGISTER_K0 ||
      (form.direction == Direction::read && !suppresses_faults(insn)))
    return;
  form.whole = !suppresses_faults(insn);
  form.masking = compresses(insn) ? Masking::compress : Masking::mask;
  form.mask = number(insn.avx.mask.reg);
  const unsigned broadcast = broadcast_elements(insn.avx.broadcast.mode);
  form.mask_elements = form.elements;
  if (broadcast != 0) {
    form.mask_elements = static_cast<uint8_t>(broadcast);
  } else if (is_dot_product(insn)) {
    form.mask_elements = static_cast<uint8_t>(memory.size / 32);
  }
}

bool set_memory(const DecodeContext& c, Form& form) {
  const ZydisDecodedOperand* const memory = memory_operand(c);
  if (memory == nullptr) return true;
  const unsigned bytes = memory->size / 8u;
  if (bytes == 0 || bytes > sizeof(Bounce::memory) || memory->element_size == 0) return false;
  const bool writes = (memory->actions & ZYDIS_OPERAND_ACTION_MASK_WRITE) != 0;
  const bool reads = (memory->actions & ZYDIS_OPERAND_ACTION_MASK_READ) != 0;
  if (writes == reads) return false;
  form.direction = writes ? Direction::write : Direction::read;
  form.memory_size = static_cast<uint8_t>(bytes);
  form.element_size = static_cast<uint8_t>(std::max(1, memory->element_size / 8));
  form.elements = static_cast<uint8_t>(bytes / form.element_size);
  if (is_aligned_move(c.insn.mnemonic)) {
    form.alignment = form.memory_size;
  } else if (c.insn.encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY && bytes == 16 &&
             !unaligned_sse(c.insn.mnemonic) &&
             !(c.insn.meta.isa_set == ZYDIS_ISA_SET_SHA && host().sha_unaligned)) {
    form.alignment = 16;
    form.relaxed_by_mm = true;
  }
  set_masking(c, *memory, form);
  return true;
}

}  // namespace

bool simd::is_aligned_move(ZydisMnemonic mnemonic) noexcept {
  switch (mnemonic) {
    case ZYDIS_MNEMONIC_MOVAPS:
    case ZYDIS_MNEMONIC_MOVAPD:
    case ZYDIS_MNEMONIC_MOVDQA:
    case ZYDIS_MNEMONIC_MOVNTPS:
    case ZYDIS_MNEMONIC_MOVNTPD:
    case ZYDIS_MNEMONIC_MOVNTDQ:
    case ZYDIS_MNEMONIC_MOVNTDQA:
    case ZYDIS_MNEMONIC_VMOVAPS:
    case ZYDIS_MNEMONIC_VMOVAPD:
    case ZYDIS_MNEMONIC_VMOVDQA:
    case ZYDIS_MNEMONIC_VMOVDQA32:
    case ZYDIS_MNEMONIC_VMOVDQA64:
    case ZYDIS_MNEMONIC_VMOVNTPS:
    case ZYDIS_MNEMONIC_VMOVNTPD:
    case ZYDIS_MNEMONIC_VMOVNTDQ:
    case ZYDIS_MNEMONIC_VMOVNTDQA: return true;
    default: return false;
  }
}

std::optional<Plan> simd::plan_stub(const DecodeContext& c, Op& op) {
  Form form;
  form.need = need_of(c);
  if (!set_memory(c, form)) return std::nullopt;
  const bool x87 = form.need == Need::x87;
  form.uses_mxcsr = !x87 && uses_mxcsr(c);
  form.silent = c.insn.avx.has_sae || c.insn.avx.rounding.mode != ZYDIS_ROUNDING_MODE_INVALID;
  switch (c.insn.mnemonic) {
    case ZYDIS_MNEMONIC_VREDUCEPS:
    case ZYDIS_MNEMONIC_VREDUCEPD:
    case ZYDIS_MNEMONIC_VREDUCESS:
    case ZYDIS_MNEMONIC_VREDUCESD: form.never_tiny = true; break;
    default: break;
  }
  if (x87) {
    // FOP shows the guest's own ModRM, which the stub's differs from: it does not belong to the shared form.
    const auto& modrm = c.insn.raw.modrm;
    op.dst = c.insn.opcode & 7;
    op.src = static_cast<uint8_t>(modrm.mod << 6 | modrm.reg << 3 | modrm.rm);
  }
  std::optional<Native> native = rewrite(c);
  if (!native) return std::nullopt;
  const Complex run = x87                                   ? run_x87
                      : has_register(c, ZYDIS_REGCLASS_MMX) ? run_mmx
                      : form.uses_mxcsr                     ? run_vector_fp
                                                            : run_vector;
  return Plan{*std::move(native), form, x87 ? StubKind::x87 : StubKind::vector, run};
}

namespace {

bool decode_stub(const DecodeContext& c, Op& op) {
  const std::optional<Plan> plan = plan_stub(c, op);
  if (!plan) return false;
  const Form* const form = stub_cache().get(plan->native, plan->kind, plan->form);
  op.complex = form != nullptr ? plan->run : run_uncached;
  if (form != nullptr) op.aux = form;
  return true;
}

}  // namespace

bool decode_vector(const DecodeContext& context, Op& op) noexcept {
  const ZydisDecodedInstruction& insn = context.insn;
  if (!host().runs[insn.meta.isa_set] || !mine(insn)) return false;
  // VPINSRQ and VPEXTRQ do not become their 32-bit relatives outside 64-bit mode, as VMOVQ does.
  const bool no_quadword =
      context.cpu.mode() != Mode::bits64 && insn.encoding == ZYDIS_INSTRUCTION_ENCODING_VEX &&
      insn.raw.vex.W != 0 &&
      (insn.mnemonic == ZYDIS_MNEMONIC_VPINSRD || insn.mnemonic == ZYDIS_MNEMONIC_VPEXTRD);
  if (no_quadword || (insn.attributes & ZYDIS_ATTRIB_HAS_LOCK) != 0 ||
      !allowed_by_cpuid(context.cpu.features, insn)) {
    op.complex = undefined_opcode;
    return true;
  }
  // Nothing may throw past here; memory shortage makes the instruction unknown.
  try {
    return decode_by_hand(context, op) || decode_gather(context, op) || decode_stub(context, op);
  } catch (const std::exception&) {
    return false;
  }
}

}  // namespace lodge::kvm::soft
