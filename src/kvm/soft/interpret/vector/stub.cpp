#include "kvm/soft/interpret/vector/stub.hpp"

#include <xbyak/xbyak.h>

#include <cstddef>

#include "kvm/soft/interpret/vector/host.hpp"

namespace lodge::kvm::soft::simd {
namespace {

bool in_class(ZydisRegister reg, ZydisRegisterClass wanted) {
  return ZydisRegisterGetClass(reg) == wanted;
}

bool is_gpr(ZydisRegister reg) {
  return in_class(reg, ZYDIS_REGCLASS_GPR32) || in_class(reg, ZYDIS_REGCLASS_GPR64) ||
         in_class(reg, ZYDIS_REGCLASS_GPR16) || in_class(reg, ZYDIS_REGCLASS_GPR8);
}

bool is_vector(ZydisRegister reg) {
  return in_class(reg, ZYDIS_REGCLASS_XMM) || in_class(reg, ZYDIS_REGCLASS_YMM) ||
         in_class(reg, ZYDIS_REGCLASS_ZMM);
}

uint8_t number(ZydisRegister reg) {
  if (reg == ZYDIS_REGISTER_AX) return 0;
  return static_cast<uint8_t>(ZydisRegisterGetId(reg));
}

// ---- Rewriting
// ---------------------------------------------------------------------------------------------

// The fields of an encoding, gathered from operands.
struct Fields {
  uint8_t mod = 3, reg = 0, rm = 0, vvvv = 0;  // register numbers with all their bits
  bool wide = false;
  std::vector<uint8_t> immediate;
};

// False when an operand is of a kind no vector instruction has.
bool gather_fields(const DecodeContext& context, Fields& fields, Native& native) {
  const ZydisDecodedInstruction& insn = context.insn;
  fields.reg = insn.raw.modrm.reg;
  fields.rm = insn.raw.modrm.rm;
  for (const auto& imm : insn.raw.imm) {
    if (imm.size == 0) continue;
    if (imm.size != 8) return false;
    fields.immediate.push_back(static_cast<uint8_t>(imm.value.u));
  }
  for (unsigned i = 0; i < insn.operand_count; ++i) {
    const ZydisDecodedOperand& operand = context.operands[i];
    if (operand.type == ZYDIS_OPERAND_TYPE_MEMORY) {
      if (operand.encoding != ZYDIS_OPERAND_ENCODING_MODRM_RM) return false;
      fields.mod = 0;
      fields.rm = 6;
      continue;
    }
    if (operand.type != ZYDIS_OPERAND_TYPE_REGISTER) continue;
    const ZydisRegister reg = operand.reg.value;
    const bool general = is_gpr(reg);
    switch (operand.encoding) {
      case ZYDIS_OPERAND_ENCODING_MODRM_REG:
        if (general) native.gpr_reg = number(reg);
        fields.reg = general ? 0 : number(reg);
        break;
      case ZYDIS_OPERAND_ENCODING_MODRM_RM:
        if (general) native.gpr_rm = number(reg);
        fields.rm = general ? 1 : number(reg);
        break;
      case ZYDIS_OPERAND_ENCODING_NDSNDD:
        if (general) return false;
        fields.vvvv = number(reg);
        break;
      case ZYDIS_OPERAND_ENCODING_IS4:
        if (fields.immediate.empty()) fields.immediate.push_back(0);
        fields.immediate[0] =
            static_cast<uint8_t>((fields.immediate[0] & 0xf) | static_cast<uint8_t>(number(reg) << 4));
        break;
      case ZYDIS_OPERAND_ENCODING_MASK:
      case ZYDIS_OPERAND_ENCODING_NONE: break;
      default: return false;
    }
  }
  return true;
}

void put_legacy(const ZydisDecodedInstruction& insn, const Fields& f, std::vector<uint8_t>& out) {
  for (unsigned i = 0; i < insn.raw.prefix_count; ++i) {
    const auto& prefix = insn.raw.prefixes[i];
    const bool rex = prefix.value >= 0x40 && prefix.value <= 0x4f;
    if (prefix.type == ZYDIS_PREFIX_TYPE_MANDATORY && !rex) out.push_back(prefix.value);
  }
  const unsigned rex = 0x40u | (f.wide ? 8u : 0u) | (f.reg >> 3 & 1u) << 2 | (f.rm >> 3 & 1u);
  if (rex != 0x40) out.push_back(static_cast<uint8_t>(rex));
  if (insn.opcode_map != ZYDIS_OPCODE_MAP_DEFAULT) out.push_back(0x0f);
  if (insn.opcode_map == ZYDIS_OPCODE_MAP_0F38) out.push_back(0x38);
  if (insn.opcode_map == ZYDIS_OPCODE_MAP_0F3A) out.push_back(0x3a);
}

void put_vex(const ZydisDecodedInstruction& insn, const Fields& f, std::vector<uint8_t>& out) {
  const auto& vex = insn.raw.vex;
  out.push_back(0xc4);
  out.push_back(static_cast<uint8_t>((~f.reg >> 3 & 1) << 7 | 0x40 | (~f.rm >> 3 & 1) << 5 |
                                     static_cast<unsigned>(insn.opcode_map)));
  out.push_back(
      static_cast<uint8_t>((f.wide ? 0x80 : 0) | (~f.vvvv & 0xf) << 3 | (vex.L & 1) << 2 | (vex.pp & 3)));
}

void put_evex(const ZydisDecodedInstruction& insn, const Fields& f, std::vector<uint8_t>& out) {
  const auto& evex = insn.raw.evex;
  const unsigned x = f.mod == 3 ? ~f.rm >> 4 & 1 : 1;
  out.push_back(0x62);
  out.push_back(static_cast<uint8_t>((~f.reg >> 3 & 1) << 7 | x << 6 | (~f.rm >> 3 & 1) << 5 |
                                     (~f.reg >> 4 & 1) << 4 | (evex.mmm & 7)));
  out.push_back(static_cast<uint8_t>((f.wide ? 0x80 : 0) | (~f.vvvv & 0xf) << 3 | 4 | (evex.pp & 3)));
  out.push_back(static_cast<uint8_t>((evex.z & 1) << 7 | (evex.L2 & 1) << 6 | (evex.L & 1) << 5 |
                                     (evex.b & 1) << 4 | (~f.vvvv >> 4 & 1) << 3 | (evex.aaa & 7)));
}

std::vector<uint8_t> assemble(const ZydisDecodedInstruction& insn, const Fields& f) {
  std::vector<uint8_t> out;
  switch (insn.encoding) {
    case ZYDIS_INSTRUCTION_ENCODING_LEGACY:
      if (insn.opcode_map > ZYDIS_OPCODE_MAP_0F3A) return {};
      put_legacy(insn, f, out);
      break;
    case ZYDIS_INSTRUCTION_ENCODING_VEX: put_vex(insn, f, out); break;
    case ZYDIS_INSTRUCTION_ENCODING_EVEX: put_evex(insn, f, out); break;
    default: return {};
  }
  out.push_back(insn.opcode);
  if ((insn.attributes & ZYDIS_ATTRIB_HAS_MODRM) != 0)
    out.push_back(static_cast<uint8_t>(f.mod << 6 | (f.reg & 7) << 3 | (f.rm & 7)));
  out.insert(out.end(), f.immediate.begin(), f.immediate.end());
  return out;
}

bool same_operand(const ZydisDecodedOperand& a, const ZydisDecodedOperand& b) {
  if (a.type != b.type || a.encoding != b.encoding || a.visibility != b.visibility) return false;
  if (a.type == ZYDIS_OPERAND_TYPE_MEMORY)
    return a.size == b.size && b.mem.type == ZYDIS_MEMOP_TYPE_MEM && b.mem.base == ZYDIS_REGISTER_RSI &&
           b.mem.index == ZYDIS_REGISTER_NONE && b.mem.disp.value == 0;
  if (a.type == ZYDIS_OPERAND_TYPE_IMMEDIATE) return a.imm.value.u == b.imm.value.u && a.size == b.size;
  if (a.type != ZYDIS_OPERAND_TYPE_REGISTER) return false;
  const ZydisRegisterClass klass = ZydisRegisterGetClass(a.reg.value);
  // RFLAGS and EFLAGS are registers of their own in Zydis.
  if (klass == ZYDIS_REGCLASS_FLAGS) return ZydisRegisterGetClass(b.reg.value) == ZYDIS_REGCLASS_FLAGS;
  if (is_gpr(a.reg.value) && a.encoding != ZYDIS_OPERAND_ENCODING_NONE) {
    const unsigned wanted = a.encoding == ZYDIS_OPERAND_ENCODING_MODRM_REG ? 0 : 1;
    return ZydisRegisterGetClass(b.reg.value) == klass && number(b.reg.value) == wanted;
  }
  // Hidden ones by number: in 64-bit mode W makes PCMPESTRI's EAX and EDX RAX and RDX, elsewhere it does not.
  if (is_gpr(a.reg.value)) return is_gpr(b.reg.value) && number(a.reg.value) == number(b.reg.value);
  return a.reg.value == b.reg.value;
}

bool verify(const DecodeContext& context, Native& native) {
  ZydisDecoder decoder;
  ZydisDecoderInit(&decoder, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
  if (!ZYAN_SUCCESS(ZydisDecoderDecodeFull(&decoder, native.bytes.data(), native.bytes.size(), &native.insn,
                                           native.operands.data())))
    return false;
  const ZydisDecodedInstruction& a = context.insn;
  const ZydisDecodedInstruction& b = native.insn;
  if (b.length != native.bytes.size() || a.mnemonic != b.mnemonic || a.operand_count != b.operand_count ||
      a.encoding != b.encoding || a.meta.isa_set != b.meta.isa_set)
    return false;
  for (unsigned i = 0; i < a.operand_count; ++i)
    if (!same_operand(context.operands[i], native.operands[i])) return false;
  return true;
}

bool wide_bit(const ZydisDecodedInstruction& insn) {
  switch (insn.encoding) {
    case ZYDIS_INSTRUCTION_ENCODING_VEX: return insn.raw.vex.W != 0;
    case ZYDIS_INSTRUCTION_ENCODING_EVEX: return insn.raw.evex.W != 0;
    default: return (insn.attributes & ZYDIS_ATTRIB_HAS_REX) != 0 && insn.raw.rex.W != 0;
  }
}

}  // namespace

std::optional<Native> rewrite(const DecodeContext& context) {
  Native native;
  Fields fields;
  if (!gather_fields(context, fields, native)) return std::nullopt;
  const bool mode64 = context.insn.machine_mode == ZYDIS_MACHINE_MODE_LONG_64;
  const bool explicit_string = context.insn.meta.category == ZYDIS_CATEGORY_STTNI;
  fields.wide = wide_bit(context.insn) && (mode64 || !explicit_string);
  // Outside 64-bit mode W is ignored where it would widen a general register: a second try without it.
  for (const bool wide : {fields.wide, false}) {
    fields.wide = wide;
    native.bytes = assemble(context.insn, fields);
    if (!native.bytes.empty() && verify(context, native)) return native;
  }
  return std::nullopt;
}

// ---- Emission
// ----------------------------------------------------------------------------------------------

namespace {

namespace x = Xbyak;

// Offsets from the CpuState that a stub gets in RDI. `vector` comes last, so all but it fit a disp8 or
// disp32.
constexpr size_t zmm_offset = offsetof(CpuState, vector) + offsetof(VectorState, zmm);
constexpr size_t k_offset = offsetof(CpuState, vector) + offsetof(VectorState, k);
constexpr size_t fx_offset = offsetof(CpuState, vector) + offsetof(VectorState, fx);
constexpr size_t gpr_base = offsetof(CpuState, gpr);
constexpr size_t arith_offset = offsetof(CpuState, arith);

class Emitter : public x::CodeGenerator {
 public:
  explicit Emitter(const Native& native) : x::CodeGenerator(2048), native_(native) {
    const ZydisInstructionEncoding encoding = native.insn.encoding;
    level_ = encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY ? sse : host().avx512 ? avx512 : avx;
    for (unsigned i = 0; i < native.insn.operand_count; ++i) note(native.operands[i]);
  }

  void vector_stub(bool uses_mxcsr) {
    if (uses_mxcsr) ldmxcsr(ptr[rsi + offsetof(Bounce, mxcsr_in)]);
    load();
    for (const uint8_t code : native_.bytes) db(code);
    store();
    if (uses_mxcsr) {
      stmxcsr(ptr[rsi + offsetof(Bounce, mxcsr_out)]);
      // This program runs with the default control word.
      mov(dword[rsi + offsetof(Bounce, mxcsr_in)], 0x1f80);
      ldmxcsr(ptr[rsi + offsetof(Bounce, mxcsr_in)]);
    }
    if (mmx_ != 0) emms();
    if (level_ != sse && vectors_ != 0) vzeroupper();
    ret();
  }

  // The image's MXCSR is the host's own, and all XMM registers are the callee's to change: nothing else to
  // save.
  void x87_stub() {
    if (flags_read_) {
      mov(ax, word[rdi + arith_offset]);
      add(al, 127);
      sahf();
    }
    // Keep the flags: FXRSTOR does not touch them.
    fxrstor64(ptr[rsi + offsetof(Bounce, fx)]);
    // The memory operand is at [RSI], where Bounce::memory lies.
    static_assert(offsetof(Bounce, memory) == 0);
    for (const uint8_t code : native_.bytes) db(code);
    if (flags_written_) {
      lahf();
      seto(al);
      mov(word[rdi + arith_offset], ax);
    }
    fxsave64(ptr[rsi + offsetof(Bounce, fx)]);
    fninit();
    ret();
  }

 private:
  enum Level : uint8_t { sse, avx, avx512 };

  void fxrstor64(const x::Address& address) { fx(1, address); }
  void fxsave64(const x::Address& address) { fx(0, address); }
  // REX.W 0F AE /n with a disp32 off RSI; Xbyak only knows the 32-bit format.
  void fx(uint8_t n, const x::Address& address) {
    db(0x48);
    db(0x0f);
    db(0xae);
    db(static_cast<uint8_t>(0x80 | n << 3 | 6));
    dd(static_cast<uint32_t>(address.getDisp()));
  }

  void note(const ZydisDecodedOperand& operand) {
    if (operand.type != ZYDIS_OPERAND_TYPE_REGISTER) return;
    const ZydisRegister reg = operand.reg.value;
    const bool writes = (operand.actions & ZYDIS_OPERAND_ACTION_MASK_WRITE) != 0;
    const bool reads = (operand.actions & ZYDIS_OPERAND_ACTION_MASK_READ) != 0;
    const uint32_t bit = uint32_t{1} << (number(reg) & 31);
    if (is_vector(reg)) {
      vectors_ |= bit;
      if (writes) vectors_written_ |= bit;
    } else if (in_class(reg, ZYDIS_REGCLASS_MASK)) {
      masks_ |= bit;
      if (writes) masks_written_ |= bit;
    } else if (in_class(reg, ZYDIS_REGCLASS_MMX)) {
      mmx_ |= bit;
      if (writes) mmx_written_ |= bit;
    } else if (in_class(reg, ZYDIS_REGCLASS_FLAGS)) {
      flags_written_ = flags_written_ || writes;
      flags_read_ = flags_read_ || reads;
    } else if (is_gpr(reg)) {
      const bool hidden = operand.encoding == ZYDIS_OPERAND_ENCODING_NONE;
      const uint8_t guest = hidden                                                 ? number(reg)
                            : operand.encoding == ZYDIS_OPERAND_ENCODING_MODRM_REG ? native_.gpr_reg
                                                                                   : native_.gpr_rm;
      gprs_.push_back({number(reg), guest, writes});
    }
  }

  x::Address at(size_t offset) { return ptr[rdi + offset]; }

  void load() {
    for (int i = 0; i < 32; ++i) {
      if ((vectors_ >> i & 1) == 0) continue;
      const x::Address home = at(zmm_offset + 64 * static_cast<size_t>(i));
      if (level_ == sse) {
        movaps(x::Xmm(i), home);
      } else if (level_ == avx) {
        vmovaps(x::Ymm(i), home);
      } else {
        vmovdqa64(x::Zmm(i), home);
      }
    }
    for (int i = 0; i < 8; ++i) {
      if ((masks_ >> i & 1) != 0) kmovq(x::Opmask(i), at(k_offset + 8 * static_cast<size_t>(i)));
      // With TOP = 0, which the caller has seen to, MMi is ST(i) of the image.
      if ((mmx_ >> i & 1) != 0) movq(x::Mmx(i), at(fx_offset + 32 + 16 * static_cast<size_t>(i)));
    }
    for (const Gpr& gpr : gprs_) mov(x::Reg64(gpr.native), at(gpr_base + 8 * size_t{gpr.guest}));
  }

  void store() {
    for (const Gpr& gpr : gprs_)
      if (gpr.writes) mov(at(gpr_base + 8 * size_t{gpr.guest}), x::Reg64(gpr.native));
    for (int i = 0; i < 32; ++i) {
      if ((vectors_written_ >> i & 1) == 0) continue;
      const x::Address home = at(zmm_offset + 64 * static_cast<size_t>(i));
      if (level_ == sse) {
        movaps(home, x::Xmm(i));  // upper bits stay, as legacy SSE wants
      } else if (level_ == avx) {
        vmovaps(home, x::Ymm(i));
      } else {
        vmovdqa64(home, x::Zmm(i));
      }
    }
    for (int i = 0; i < 8; ++i) {
      if ((masks_written_ >> i & 1) != 0) kmovq(at(k_offset + 8 * static_cast<size_t>(i)), x::Opmask(i));
      if ((mmx_written_ >> i & 1) == 0) continue;
      const size_t home = fx_offset + 32 + 16 * static_cast<size_t>(i);
      movq(at(home), x::Mmx(i));
      mov(word[rdi + home + 8], 0xffff);  // sign and exponent of an MMX result
    }
    if (flags_written_) {
      lahf();
      seto(al);
      mov(word[rdi + arith_offset], ax);
    }
  }

  struct Gpr {
    uint8_t native, guest;
    bool writes;
  };
  const Native& native_;
  Level level_ = sse;
  uint32_t vectors_ = 0, vectors_written_ = 0, masks_ = 0, masks_written_ = 0, mmx_ = 0, mmx_written_ = 0;
  bool flags_read_ = false, flags_written_ = false;
  std::vector<Gpr> gprs_;
};

}  // namespace

std::vector<uint8_t> emit(const Native& native, StubKind kind, bool uses_mxcsr) {
  Emitter emitter(native);
  if (kind == StubKind::x87) {
    emitter.x87_stub();
  } else {
    emitter.vector_stub(uses_mxcsr);
  }
  return {emitter.getCode(), emitter.getCode() + emitter.getSize()};
}

const Form* StubCache::get(const Native& native, StubKind kind, const Form& form) {
  std::string key(native.bytes.begin(), native.bytes.end());
  key.push_back(static_cast<char>(native.gpr_reg));
  key.push_back(static_cast<char>(native.gpr_rm));
  const std::lock_guard lock(mutex_);
  const auto found = forms_.find(key);
  if (found != forms_.end()) return found->second.get();
  const std::vector<uint8_t> code = emit(native, kind, form.uses_mxcsr);
  const void* const stub = arena_.add(code);
  if (stub == nullptr) return nullptr;
  auto made = std::make_unique<Form>(form);
  made->stub = reinterpret_cast<Stub>(reinterpret_cast<uintptr_t>(stub));
  return forms_.emplace(std::move(key), std::move(made)).first->second.get();
}

StubCache& stub_cache() {
  static StubCache instance;
  return instance;
}

}  // namespace lodge::kvm::soft::simd
