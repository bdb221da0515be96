#include "kvm/soft/decode/decoder.hpp"

#include <algorithm>

#include "kvm/soft/interpret/gate.hpp"
#include "kvm/soft/interpret/hot.hpp"
#include "kvm/soft/interpret/integer.hpp"

namespace lodge::kvm::soft {
namespace {

void end_handler(Cpu& cpu, const Op* op) noexcept {
  cpu.rip = cpu.this_rip(*op);
}

unsigned machine_mode(const Cpu& cpu) noexcept {
  switch (cpu.mode()) {
    case Mode::bits64: return 0;
    case Mode::bits32: return cpu.long_mode() ? 1 : 2;
    default: return cpu.protected_mode() && !cpu.v86() ? 3 : 4;
  }
}

void fill_memory(const DecodeContext& context, const ZydisDecodedOperand& operand, Op& op) noexcept {
  const auto number = [](ZydisRegister reg) -> uint8_t {
    if (reg == ZYDIS_REGISTER_NONE) return gpr_zero;
    if (reg == ZYDIS_REGISTER_RIP || reg == ZYDIS_REGISTER_EIP) return gpr_rip;
    switch (ZydisRegisterGetClass(reg)) {
      case ZYDIS_REGCLASS_GPR16:
      case ZYDIS_REGCLASS_GPR32:
      case ZYDIS_REGCLASS_GPR64: return static_cast<uint8_t>(ZydisRegisterGetId(reg));
      default: return gpr_zero;  // a vector index (VSIB): its family looks at the operand itself
    }
  };
  op.flags |= Op::has_memory;
  op.base = number(operand.mem.base);
  op.index = number(operand.mem.index);
  op.scale = operand.mem.scale <= 1 ? 0 : static_cast<uint8_t>(__builtin_ctz(operand.mem.scale));
  op.disp = operand.mem.disp.value;
  // SIB.base = 101 with ModRM.mod = 00 means no base, whatever REX.B says; Zydis 4.0 takes it for R13D when
  // the address size is 32.
  const auto& raw = context.insn.raw;
  if (raw.modrm.mod == 0 && raw.modrm.rm == 4 && (raw.sib.base & 7) == 5 && context.insn.address_width > 16) {
    op.base = gpr_zero;
    op.disp = static_cast<int32_t>(raw.disp.value);
  }
  if (op.base == gpr_rip) op.disp += op.offset + op.length;
  op.address_size = context.insn.address_width / 8;
  op.segment = operand.mem.segment == ZYDIS_REGISTER_NONE
                   ? uint8_t{seg_ds}
                   : static_cast<uint8_t>(ZydisRegisterGetId(operand.mem.segment));
  op.flat_segment =
      context.cpu.mode() == Mode::bits64 && op.segment >= seg_fs ? op.segment : uint8_t{seg_none};
}

void fill_common(const DecodeContext& context, Op& op) noexcept {
  const ZydisDecodedInstruction& insn = context.insn;
  op.length = insn.length;
  op.size = insn.operand_width / 8;
  op.address_size = insn.address_width / 8;
  if ((insn.attributes & ZYDIS_ATTRIB_HAS_LOCK) != 0) op.flags |= Op::lock;
  if ((insn.attributes & (ZYDIS_ATTRIB_HAS_REP | ZYDIS_ATTRIB_HAS_REPE)) != 0) op.flags |= Op::rep;
  if ((insn.attributes & ZYDIS_ATTRIB_HAS_REPNE) != 0) op.flags |= Op::repne;
  for (unsigned i = 0; i < insn.operand_count; ++i) {
    const ZydisDecodedOperand& operand = context.operands[i];
    if (operand.type != ZYDIS_OPERAND_TYPE_MEMORY || operand.visibility != ZYDIS_OPERAND_VISIBILITY_EXPLICIT)
      continue;
    fill_memory(context, operand, op);
    break;
  }
}

// F3 90 with REX.B is XCHG of R8 and rAX, not PAUSE, for which Zydis 4.0 takes it.
bool is_exchange(const ZydisDecodedInstruction& insn) noexcept {
  return insn.mnemonic == ZYDIS_MNEMONIC_PAUSE && (insn.attributes & ZYDIS_ATTRIB_HAS_REX) != 0 &&
         insn.raw.rex.B != 0;
}

Step exchange_r8(Cpu& cpu, const Op& op) noexcept {
  const uint64_t a = cpu.get_reg(rax * 8, op.size);
  cpu.set_reg(rax * 8, op.size, cpu.get_reg(r8 * 8, op.size));
  cpu.set_reg(r8 * 8, op.size, a);
  return Step::next;
}

// System instructions behind which a block goes on, unless they say otherwise when they run.
bool goes_on(ZydisMnemonic mnemonic) noexcept {
  switch (mnemonic) {
    case ZYDIS_MNEMONIC_CLI:
    case ZYDIS_MNEMONIC_STI:
    case ZYDIS_MNEMONIC_SWAPGS:
    case ZYDIS_MNEMONIC_RDTSC:
    case ZYDIS_MNEMONIC_RDTSCP:
    case ZYDIS_MNEMONIC_PUSHF:
    case ZYDIS_MNEMONIC_PUSHFD:
    case ZYDIS_MNEMONIC_PUSHFQ:
    case ZYDIS_MNEMONIC_POPF:
    case ZYDIS_MNEMONIC_POPFD:
    case ZYDIS_MNEMONIC_POPFQ:
    case ZYDIS_MNEMONIC_PAUSE: return true;
    default: return false;
  }
}

bool ends_block(const ZydisDecodedInstruction& insn) noexcept {
  switch (insn.meta.category) {
    case ZYDIS_CATEGORY_CALL:
    case ZYDIS_CATEGORY_RET:
    case ZYDIS_CATEGORY_COND_BR:
    case ZYDIS_CATEGORY_UNCOND_BR:
    case ZYDIS_CATEGORY_INTERRUPT:
    case ZYDIS_CATEGORY_SYSCALL:
    case ZYDIS_CATEGORY_SYSRET: return true;
    default: return false;
  }
}

}  // namespace

uint8_t gpr_offset(ZydisRegister reg) noexcept {
  if (reg >= ZYDIS_REGISTER_AH && reg <= ZYDIS_REGISTER_BH)
    return static_cast<uint8_t>((reg - ZYDIS_REGISTER_AH) * 8 + 1);
  if (reg >= ZYDIS_REGISTER_AL && reg <= ZYDIS_REGISTER_BL)
    return static_cast<uint8_t>((reg - ZYDIS_REGISTER_AL) * 8);
  if (reg >= ZYDIS_REGISTER_SPL && reg <= ZYDIS_REGISTER_R15B)
    return static_cast<uint8_t>((reg - ZYDIS_REGISTER_SPL + 4) * 8);
  return static_cast<uint8_t>(ZydisRegisterGetId(reg) * 8);
}

uint32_t decode_key(const Cpu& cpu) noexcept {
  uint32_t k = machine_mode(cpu) | (cpu.flat ? key::flat : 0u) | (cpu.cpl() == 3 ? key::user : 0u) |
               (cpu.cpl() == 0 ? key::kernel : 0u);
  if (cpu.smm) k |= key::smm;
  k |= cpu.tlb_set() << key::tlb_shift;
  if ((cpu.cr0 & cr0::ts) != 0) k |= key::ts;
  if ((cpu.cr0 & cr0::em) != 0) k |= key::em;
  if ((cpu.cr4 & cr4::osfxsr) != 0) k |= key::osfxsr;
  if ((cpu.cr4 & cr4::osxsave) != 0) {
    if ((cpu.xcr0 & 6) == 6) k |= key::avx;
    if ((cpu.xcr0 & 0xe6) == 0xe6) k |= key::avx512;
  }
  if (cpu.tsc_is_direct && ((cpu.cr4 & cr4::tsd) == 0 || cpu.cpl() == 0)) k |= key::tsc_direct;
  uint16_t fcw = 0;
  std::memcpy(&fcw, cpu.vector.fx.data(), sizeof fcw);
  uint32_t mxcsr = 0;
  std::memcpy(&mxcsr, cpu.vector.fx.data() + 24, sizeof mxcsr);
  if ((fcw & 0x3f) != 0x3f || (mxcsr & 0x1f80) != 0x1f80) k |= key::fp_unmasked;
  return k;
}

void configure_decoder(ZydisDecoder& d, const Features& features) noexcept {
  ZydisDecoderEnableMode(&d, ZYDIS_DECODER_MODE_AMD_BRANCHES, features.amd_like);
  ZydisDecoderEnableMode(&d, ZYDIS_DECODER_MODE_MPX, ZYAN_FALSE);
  ZydisDecoderEnableMode(&d, ZYDIS_DECODER_MODE_CET, ZYAN_FALSE);
  ZydisDecoderEnableMode(&d, ZYDIS_DECODER_MODE_LZCNT, (features.ext1_ecx & 1u << 5) != 0);
  ZydisDecoderEnableMode(&d, ZYDIS_DECODER_MODE_TZCNT, (features.leaf7_ebx & 1u << 3) != 0);
  ZydisDecoderEnableMode(&d, ZYDIS_DECODER_MODE_WBNOINVD, (features.ext8_ebx & 1u << 9) != 0);
  ZydisDecoderEnableMode(&d, ZYDIS_DECODER_MODE_CLDEMOTE, (features.leaf7_ecx & 1u << 25) != 0);
}

void Decoder::configure(const Features& features) noexcept {
  constexpr ZydisMachineMode modes[] = {ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_MACHINE_MODE_LONG_COMPAT_32,
                                        ZYDIS_MACHINE_MODE_LEGACY_32, ZYDIS_MACHINE_MODE_LEGACY_16,
                                        ZYDIS_MACHINE_MODE_REAL_16};
  constexpr ZydisStackWidth widths[] = {ZYDIS_STACK_WIDTH_64, ZYDIS_STACK_WIDTH_32, ZYDIS_STACK_WIDTH_32,
                                        ZYDIS_STACK_WIDTH_16, ZYDIS_STACK_WIDTH_16};
  for (unsigned i = 0; i < 5; ++i) {
    ZydisDecoder& d = decoders_[i];
    ZydisDecoderInit(&d, modes[i], widths[i]);
    configure_decoder(d, features);
  }
}

Decoder::Result Decoder::decode(Cpu& cpu, uint64_t block_rip, const uint8_t* bytes, unsigned available,
                                Op& op) noexcept {
  ZydisDecodedInstruction insn;
  ZydisDecodedOperand operands[ZYDIS_MAX_OPERAND_COUNT];
  const ZyanStatus status = ZydisDecoderDecodeFull(&decoders_[machine_mode(cpu)], bytes,
                                                   available > 15 ? 15 : available, &insn, operands);
  op.handler = run_complex;
  if (status == ZYDIS_STATUS_NO_MORE_DATA && available < 15) return Result::more;
  if (status == ZYDIS_STATUS_INSTRUCTION_TOO_LONG || status == ZYDIS_STATUS_NO_MORE_DATA) {
    op.complex = [](Cpu& c, const Op&) noexcept { return c.raise(Exception::gp, 0), Step::fault; };
    op.length = 1;
    return Result::undefined;
  }
  if (!ZYAN_SUCCESS(status)) {
    op.complex = undefined_opcode;
    op.length = 1;
    return Result::undefined;
  }
  const DecodeContext context{cpu, block_rip + op.offset, bytes, insn, operands};
  fill_common(context, op);
  if (!allowed_by_cpuid(cpu.features, insn)) {
    op.complex = undefined_opcode;
    return Result::undefined;
  }
  if (is_exchange(insn)) {
    op.size = insn.raw.rex.W != 0 ? 8
              : std::any_of(insn.raw.prefixes, insn.raw.prefixes + insn.raw.prefix_count,
                            [](const auto& prefix) { return prefix.value == 0x66; })
                  ? 2
                  : 4;
    op.complex = exchange_r8;
    return Result::ok;
  }
  if (decode_integer(context, op)) {
    const bool port =
        insn.meta.category == ZYDIS_CATEGORY_IO || insn.meta.category == ZYDIS_CATEGORY_IOSTRINGOP;
    if (port) op.flags |= Op::outside;
    return ends_block(insn) ? Result::last : Result::ok;
  }
  if (decode_system(context, op)) {
    if (!goes_on(insn.mnemonic) || insn.mnemonic == ZYDIS_MNEMONIC_RDTSC ||
        insn.mnemonic == ZYDIS_MNEMONIC_RDTSCP)
      op.flags |= Op::outside;
    return goes_on(insn.mnemonic) ? Result::ok : Result::last;
  }
  if (decode_vector(context, op)) return Result::ok;
  op.complex = undefined_opcode;
  return Result::undefined;
}

Op Decoder::end_of_block(unsigned offset) noexcept {
  Op op;
  op.handler = end_handler;
  op.offset = static_cast<uint16_t>(offset);
  return op;
}

}  // namespace lodge::kvm::soft
