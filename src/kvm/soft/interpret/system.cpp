// Chooses the handler of a system instruction and fills in what it wants to know. SDM volume 2.
#include "kvm/soft/interpret/system.hpp"

#include "kvm/soft/interpret/gate.hpp"

namespace lodge::kvm::soft {
namespace {

using namespace system;

ZydisRegisterClass operand_class(const DecodeContext& context, unsigned index) noexcept {
  if (index >= context.insn.operand_count) return ZYDIS_REGCLASS_INVALID;
  const ZydisDecodedOperand& operand = context.operands[index];
  if (operand.type != ZYDIS_OPERAND_TYPE_REGISTER) return ZYDIS_REGCLASS_INVALID;
  return ZydisRegisterGetClass(operand.reg.value);
}

uint8_t register_number(const ZydisDecodedOperand& operand) noexcept {
  return static_cast<uint8_t>(ZydisRegisterGetId(operand.reg.value));
}

bool is_general(const ZydisDecodedOperand& operand) noexcept {
  if (operand.type != ZYDIS_OPERAND_TYPE_REGISTER) return false;
  switch (ZydisRegisterGetClass(operand.reg.value)) {
    case ZYDIS_REGCLASS_GPR8:
    case ZYDIS_REGCLASS_GPR16:
    case ZYDIS_REGCLASS_GPR32:
    case ZYDIS_REGCLASS_GPR64: return true;
    default: return false;
  }
}

// First operand in dst, second in src, when they are visible general registers.
void fill_registers(const DecodeContext& context, Op& op) noexcept {
  const unsigned count = context.insn.operand_count_visible;
  if (count > 0 && is_general(context.operands[0])) op.dst = gpr_offset(context.operands[0].reg.value);
  if (count > 1 && is_general(context.operands[1])) op.src = gpr_offset(context.operands[1].reg.value);
}

bool use(Op& op, Complex handler) noexcept {
  op.complex = handler;
  return true;
}

// MOV with a segment, control or debug register.
bool decode_mov(const DecodeContext& context, Op& op) noexcept {
  const ZydisRegisterClass to = operand_class(context, 0), from = operand_class(context, 1);
  fill_registers(context, op);
  if (to == ZYDIS_REGCLASS_SEGMENT || to == ZYDIS_REGCLASS_CONTROL || to == ZYDIS_REGCLASS_DEBUG) {
    op.dst = register_number(context.operands[0]);
    if (to == ZYDIS_REGCLASS_CONTROL) return use(op, mov_to_cr);
    return use(op, to == ZYDIS_REGCLASS_DEBUG ? mov_to_dr : mov_to_segment);
  }
  if (from == ZYDIS_REGCLASS_SEGMENT || from == ZYDIS_REGCLASS_CONTROL || from == ZYDIS_REGCLASS_DEBUG) {
    op.src = register_number(context.operands[1]);
    if (from == ZYDIS_REGCLASS_CONTROL) return use(op, mov_from_cr);
    return use(op, from == ZYDIS_REGCLASS_DEBUG ? mov_from_dr : mov_from_segment);
  }
  return false;
}

bool decode_push_pop(const DecodeContext& context, Op& op) noexcept {
  if (operand_class(context, 0) != ZYDIS_REGCLASS_SEGMENT) return false;
  op.dst = register_number(context.operands[0]);
  // In 64-bit mode a stack slot is 8 bytes, or 2 with a prefix.
  if (context.insn.machine_mode == ZYDIS_MACHINE_MODE_LONG_64 && op.size != 2) op.size = 8;
  return use(op, context.insn.mnemonic == ZYDIS_MNEMONIC_PUSH ? push_segment : pop_segment);
}

bool decode_far(const DecodeContext& context, Op& op) noexcept {
  if (context.insn.meta.branch_type != ZYDIS_BRANCH_TYPE_FAR) return false;
  const ZydisDecodedOperand& operand = context.operands[0];
  // AMD has no 16:64 pointers: REX.W changes nothing.
  const bool amd = context.cpu.features.amd_like;
  if (context.insn.mnemonic == ZYDIS_MNEMONIC_RET) {
    const bool immediate =
        context.insn.operand_count_visible > 0 && operand.type == ZYDIS_OPERAND_TYPE_IMMEDIATE;
    op.imm = immediate ? operand.imm.value.u & 0xffff : 0;
    return use(op, return_far);
  }
  const bool jump = context.insn.mnemonic == ZYDIS_MNEMONIC_JMP;
  if (operand.type == ZYDIS_OPERAND_TYPE_POINTER) {
    op.imm = uint64_t{operand.ptr.segment} << 32 | operand.ptr.offset;
    return use(op, jump ? jump_far : call_far);
  }
  if (amd && op.size == 8) op.size = 4;
  return use(op, jump ? jump_far_memory : call_far_memory);
}

bool decode_load_far(const DecodeContext& context, Op& op, SegmentName name) noexcept {
  fill_registers(context, op);
  op.src = name;
  if (context.cpu.features.amd_like && op.size == 8) op.size = 4;
  return use(op, load_far_pointer);
}

// Instructions that need more of the decoder than their mnemonic.
bool decode_special(const DecodeContext& context, Op& op, bool& mine) noexcept {
  mine = true;
  switch (context.insn.mnemonic) {
    case ZYDIS_MNEMONIC_MOV: return mine = decode_mov(context, op);
    case ZYDIS_MNEMONIC_PUSH:
    case ZYDIS_MNEMONIC_POP: return mine = decode_push_pop(context, op);
    case ZYDIS_MNEMONIC_JMP:
    case ZYDIS_MNEMONIC_CALL:
    case ZYDIS_MNEMONIC_RET: return mine = decode_far(context, op);
    case ZYDIS_MNEMONIC_LDS: return decode_load_far(context, op, seg_ds);
    case ZYDIS_MNEMONIC_LES: return decode_load_far(context, op, seg_es);
    case ZYDIS_MNEMONIC_LSS: return decode_load_far(context, op, seg_ss);
    case ZYDIS_MNEMONIC_LFS: return decode_load_far(context, op, seg_fs);
    case ZYDIS_MNEMONIC_LGS: return decode_load_far(context, op, seg_gs);
    case ZYDIS_MNEMONIC_INT: op.imm = context.operands[0].imm.value.u & 0xff; return use(op, int_n);
    case ZYDIS_MNEMONIC_IRET: op.size = 2; return use(op, iret);
    case ZYDIS_MNEMONIC_IRETD: op.size = 4; return use(op, iret);
    case ZYDIS_MNEMONIC_IRETQ: op.size = 8; return use(op, iret);
    case ZYDIS_MNEMONIC_PUSHF:
    case ZYDIS_MNEMONIC_POPF: op.size = 2; break;
    case ZYDIS_MNEMONIC_PUSHFD:
    case ZYDIS_MNEMONIC_POPFD: op.size = 4; break;
    case ZYDIS_MNEMONIC_PUSHFQ:
    case ZYDIS_MNEMONIC_POPFQ: op.size = 8; break;
    // One source operand, read from a register or memory.
    case ZYDIS_MNEMONIC_LLDT:
    case ZYDIS_MNEMONIC_LTR:
    case ZYDIS_MNEMONIC_VERR:
    case ZYDIS_MNEMONIC_VERW:
    case ZYDIS_MNEMONIC_LMSW:
      fill_registers(context, op);
      op.src = op.dst;
      return mine = false;
    default: break;
  }
  mine = false;
  return false;
}

Complex tables_and_control(ZydisMnemonic mnemonic) noexcept {
  switch (mnemonic) {
    case ZYDIS_MNEMONIC_CLTS: return clts;
    case ZYDIS_MNEMONIC_LMSW: return lmsw;
    case ZYDIS_MNEMONIC_SMSW: return smsw;
    case ZYDIS_MNEMONIC_RDMSR: return rdmsr;
    case ZYDIS_MNEMONIC_WRMSR: return wrmsr;
    case ZYDIS_MNEMONIC_XGETBV: return xgetbv;
    case ZYDIS_MNEMONIC_XSETBV: return xsetbv;
    case ZYDIS_MNEMONIC_RDPKRU: return rdpkru;
    case ZYDIS_MNEMONIC_WRPKRU: return wrpkru;
    case ZYDIS_MNEMONIC_INVLPG: return invlpg;
    case ZYDIS_MNEMONIC_INVPCID: return invpcid;
    case ZYDIS_MNEMONIC_INVD:
    case ZYDIS_MNEMONIC_WBINVD: return invd;
    case ZYDIS_MNEMONIC_LGDT: return lgdt;
    case ZYDIS_MNEMONIC_LIDT: return lidt;
    case ZYDIS_MNEMONIC_SGDT: return sgdt;
    case ZYDIS_MNEMONIC_SIDT: return sidt;
    case ZYDIS_MNEMONIC_LLDT: return lldt;
    case ZYDIS_MNEMONIC_SLDT: return sldt;
    case ZYDIS_MNEMONIC_LTR: return ltr;
    case ZYDIS_MNEMONIC_STR: return str;
    case ZYDIS_MNEMONIC_LAR: return lar;
    case ZYDIS_MNEMONIC_LSL: return lsl;
    case ZYDIS_MNEMONIC_VERR: return verr;
    case ZYDIS_MNEMONIC_VERW: return verw;
    case ZYDIS_MNEMONIC_ARPL: return arpl;
    default: return nullptr;
  }
}

Complex transfers_and_flags(ZydisMnemonic mnemonic) noexcept {
  switch (mnemonic) {
    case ZYDIS_MNEMONIC_INT3: return int3;
    case ZYDIS_MNEMONIC_INT1: return int1;
    case ZYDIS_MNEMONIC_INTO: return into;
    case ZYDIS_MNEMONIC_RDFSBASE: return rdfsbase;
    case ZYDIS_MNEMONIC_RDGSBASE: return rdgsbase;
    case ZYDIS_MNEMONIC_WRFSBASE: return wrfsbase;
    case ZYDIS_MNEMONIC_WRGSBASE: return wrgsbase;
    case ZYDIS_MNEMONIC_SWAPGS: return swapgs;
    case ZYDIS_MNEMONIC_SYSCALL: return syscall;
    case ZYDIS_MNEMONIC_SYSRET: return sysret;
    case ZYDIS_MNEMONIC_SYSENTER: return sysenter;
    case ZYDIS_MNEMONIC_SYSEXIT: return sysexit;
    case ZYDIS_MNEMONIC_VMCALL: return vmcall;
    case ZYDIS_MNEMONIC_VMMCALL: return vmmcall;
    case ZYDIS_MNEMONIC_CLI: return cli;
    case ZYDIS_MNEMONIC_STI: return sti;
    case ZYDIS_MNEMONIC_PUSHF:
    case ZYDIS_MNEMONIC_PUSHFD:
    case ZYDIS_MNEMONIC_PUSHFQ: return pushf;
    case ZYDIS_MNEMONIC_POPF:
    case ZYDIS_MNEMONIC_POPFD:
    case ZYDIS_MNEMONIC_POPFQ: return popf;
    case ZYDIS_MNEMONIC_STAC: return stac;
    case ZYDIS_MNEMONIC_CLAC: return clac;
    case ZYDIS_MNEMONIC_HLT: return hlt;
    case ZYDIS_MNEMONIC_MONITOR: return monitor;
    case ZYDIS_MNEMONIC_MWAIT: return mwait;
    case ZYDIS_MNEMONIC_MONITORX: return monitorx;
    case ZYDIS_MNEMONIC_MWAITX: return mwaitx;
    default: return nullptr;
  }
}

Complex miscellaneous(ZydisMnemonic mnemonic) noexcept {
  switch (mnemonic) {
    case ZYDIS_MNEMONIC_CPUID: return cpuid_instruction;
    case ZYDIS_MNEMONIC_RDTSC: return rdtsc;
    case ZYDIS_MNEMONIC_RDTSCP: return rdtscp;
    case ZYDIS_MNEMONIC_RDPMC: return rdpmc;
    case ZYDIS_MNEMONIC_RDPID: return rdpid;
    case ZYDIS_MNEMONIC_RDRAND: return rdrand;
    case ZYDIS_MNEMONIC_RDSEED: return rdseed;
    case ZYDIS_MNEMONIC_PAUSE: return pause;
    case ZYDIS_MNEMONIC_MFENCE: return mfence;
    case ZYDIS_MNEMONIC_CLFLUSH:
    case ZYDIS_MNEMONIC_CLFLUSHOPT:
    case ZYDIS_MNEMONIC_CLWB: return clflush;
    case ZYDIS_MNEMONIC_CLZERO: return clzero;
    case ZYDIS_MNEMONIC_SERIALIZE: return serialize;
    // Hints, and encodings that are NOPs while CPUID hides their feature (CET, MPX).
    case ZYDIS_MNEMONIC_LFENCE:
    case ZYDIS_MNEMONIC_SFENCE:
    case ZYDIS_MNEMONIC_CLDEMOTE:
    case ZYDIS_MNEMONIC_PREFETCH:
    case ZYDIS_MNEMONIC_PREFETCHNTA:
    case ZYDIS_MNEMONIC_PREFETCHT0:
    case ZYDIS_MNEMONIC_PREFETCHT1:
    case ZYDIS_MNEMONIC_PREFETCHT2:
    case ZYDIS_MNEMONIC_PREFETCHW:
    case ZYDIS_MNEMONIC_PREFETCHWT1:
    case ZYDIS_MNEMONIC_ENDBR32:
    case ZYDIS_MNEMONIC_ENDBR64:
    case ZYDIS_MNEMONIC_RDSSPD:
    case ZYDIS_MNEMONIC_RDSSPQ:
    case ZYDIS_MNEMONIC_BNDCL:
    case ZYDIS_MNEMONIC_BNDCN:
    case ZYDIS_MNEMONIC_BNDCU:
    case ZYDIS_MNEMONIC_BNDLDX:
    case ZYDIS_MNEMONIC_BNDMK:
    case ZYDIS_MNEMONIC_BNDMOV:
    case ZYDIS_MNEMONIC_BNDSTX: return nop;
    case ZYDIS_MNEMONIC_UD0:
    case ZYDIS_MNEMONIC_UD1:
    case ZYDIS_MNEMONIC_UD2: return undefined_opcode;
    case ZYDIS_MNEMONIC_RSM: return rsm;
    default: return nullptr;
  }
}

// Whole categories that soft does not have: VMX, SVM, SGX, SMX, TDX, user interrupts, CET's real
// instructions, transactions.
bool never_offered(const ZydisDecodedInstruction& insn) noexcept {
  switch (insn.meta.isa_set) {
    case ZYDIS_ISA_SET_VTX:
    case ZYDIS_ISA_SET_VMFUNC:
    case ZYDIS_ISA_SET_SVM:
    case ZYDIS_ISA_SET_SGX:
    case ZYDIS_ISA_SET_SGX_ENCLV:
    case ZYDIS_ISA_SET_SMX:
    case ZYDIS_ISA_SET_SNP:
    case ZYDIS_ISA_SET_TDX:
    case ZYDIS_ISA_SET_UINTR:
    case ZYDIS_ISA_SET_CET:
    case ZYDIS_ISA_SET_RTM:
    case ZYDIS_ISA_SET_TSX_LDTRK:
    case ZYDIS_ISA_SET_WAITPKG:
    case ZYDIS_ISA_SET_PCONFIG:
    case ZYDIS_ISA_SET_ENQCMD:
    case ZYDIS_ISA_SET_HRESET:
    case ZYDIS_ISA_SET_PT:
    case ZYDIS_ISA_SET_RDPRU:
    case ZYDIS_ISA_SET_MCOMMIT:
    case ZYDIS_ISA_SET_AMD_INVLPGB:
    case ZYDIS_ISA_SET_KEYLOCKER:
    case ZYDIS_ISA_SET_KEYLOCKER_WIDE:
    case ZYDIS_ISA_SET_LWP:
    case ZYDIS_ISA_SET_PADLOCK_ACE:
    case ZYDIS_ISA_SET_PADLOCK_PHE:
    case ZYDIS_ISA_SET_PADLOCK_PMM:
    case ZYDIS_ISA_SET_PADLOCK_RNG: return true;
    default: return false;
  }
}

}  // namespace

bool decode_system(const DecodeContext& context, Op& op) noexcept {
  bool mine = false;
  decode_special(context, op, mine);
  if (!mine) {
    const ZydisMnemonic mnemonic = context.insn.mnemonic;
    Complex handler = tables_and_control(mnemonic);
    if (handler == nullptr) handler = transfers_and_flags(mnemonic);
    if (handler == nullptr) handler = miscellaneous(mnemonic);
    if (handler == nullptr) return never_offered(context.insn) && use(op, undefined_opcode);
    fill_registers(context, op);
    op.complex = handler;
  }
  if (!allowed_by_cpuid(context.cpu.features, context.insn)) op.complex = undefined_opcode;
  return true;
}

bool system::load16(Cpu& cpu, const Op& op, uint16_t& value) noexcept {
  if ((op.flags & Op::has_memory) == 0) {
    value = cpu.reg<uint16_t>(op.src);
    return true;
  }
  uint64_t address = 0;
  return cpu.linear(op, 2, false, address) && cpu.read(address, value);
}

}  // namespace lodge::kvm::soft
