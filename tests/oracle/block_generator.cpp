#include "block_generator.hpp"

#include <algorithm>
#include <cstring>

#include "compare.hpp"

namespace lodge::oracle {
namespace {

constexpr uint64_t arithmetic_flags = 0x8d5;
constexpr int64_t far_distance = 0x7fff'ff00;
constexpr size_t pool_size = 12'000;

bool is_gpr(ZydisRegister reg) {
  const ZydisRegisterClass c = ZydisRegisterGetClass(reg);
  return c >= ZYDIS_REGCLASS_GPR8 && c <= ZYDIS_REGCLASS_GPR64;
}

// Number of the whole register.
unsigned whole(ZydisRegister reg) {
  if (reg >= ZYDIS_REGISTER_AH && reg <= ZYDIS_REGISTER_BH) return reg - ZYDIS_REGISTER_AH;
  return static_cast<unsigned>(
      ZydisRegisterGetId(ZydisRegisterGetLargestEnclosing(ZYDIS_MACHINE_MODE_LONG_64, reg)));
}

// What makes up most of real programs.
bool is_common(ZydisMnemonic mnemonic) {
  switch (mnemonic) {
    case ZYDIS_MNEMONIC_MOV:
    case ZYDIS_MNEMONIC_ADD:
    case ZYDIS_MNEMONIC_SUB:
    case ZYDIS_MNEMONIC_CMP:
    case ZYDIS_MNEMONIC_TEST:
    case ZYDIS_MNEMONIC_AND:
    case ZYDIS_MNEMONIC_OR:
    case ZYDIS_MNEMONIC_XOR:
    case ZYDIS_MNEMONIC_ADC:
    case ZYDIS_MNEMONIC_SBB:
    case ZYDIS_MNEMONIC_INC:
    case ZYDIS_MNEMONIC_DEC:
    case ZYDIS_MNEMONIC_NEG:
    case ZYDIS_MNEMONIC_LEA:
    case ZYDIS_MNEMONIC_MOVZX:
    case ZYDIS_MNEMONIC_MOVSX:
    case ZYDIS_MNEMONIC_MOVSXD:
    case ZYDIS_MNEMONIC_XCHG:
    case ZYDIS_MNEMONIC_XADD:
    case ZYDIS_MNEMONIC_CMPXCHG:
    case ZYDIS_MNEMONIC_SHL:
    case ZYDIS_MNEMONIC_SHR:
    case ZYDIS_MNEMONIC_SAR:
    case ZYDIS_MNEMONIC_PUSH:
    case ZYDIS_MNEMONIC_POP: return true;
    default: return false;
  }
}

bool integer(const ZydisDecodedInstruction& insn) {
  return insn.encoding == ZYDIS_INSTRUCTION_ENCODING_LEGACY && insn.meta.isa_ext == ZYDIS_ISA_EXT_BASE;
}

bool repeated(const ZydisDecodedInstruction& insn) {
  return std::any_of(insn.raw.prefixes, insn.raw.prefixes + insn.raw.prefix_count,
                     [](const auto& prefix) { return prefix.value == 0xf2 || prefix.value == 0xf3; });
}

bool is_string(const ZydisDecodedInstruction& insn) {
  return insn.meta.category == ZYDIS_CATEGORY_STRINGOP;
}

uint64_t flags(ZydisAccessedFlagsMask mask) {
  return mask & arithmetic_flags;
}

bool keeps_flags_sometimes(ZydisMnemonic mnemonic) {
  switch (mnemonic) {
    case ZYDIS_MNEMONIC_SHL:
    case ZYDIS_MNEMONIC_SHR:
    case ZYDIS_MNEMONIC_SAR:
    case ZYDIS_MNEMONIC_SHLD:
    case ZYDIS_MNEMONIC_SHRD:
    case ZYDIS_MNEMONIC_ROL:
    case ZYDIS_MNEMONIC_ROR:
    case ZYDIS_MNEMONIC_RCL:
    case ZYDIS_MNEMONIC_RCR: return true;
    default: return false;
  }
}

}  // namespace

BlockGenerator::BlockGenerator(uint64_t seed, bool bits32) : g_(seed, Domain::all, bits32), bits32_(bits32) {
  fill_pool();
}

// ---- The pool

// Left out: what stores x87 pointers (the translator does not keep them), what the kernel or a debugger would
// see, targets and counts at random, and results that the manuals leave open.
bool BlockGenerator::wanted(const Instruction& instruction) const {
  const ZydisDecodedInstruction& insn = instruction.insn;
  if (insn.meta.branch_type != ZYDIS_BRANCH_TYPE_NONE) return false;
  if (is_string(insn) && repeated(insn)) return false;
  switch (insn.meta.category) {
    case ZYDIS_CATEGORY_GATHER:
    case ZYDIS_CATEGORY_AVX2GATHER:
    case ZYDIS_CATEGORY_SCATTER:
    case ZYDIS_CATEGORY_IO:
    case ZYDIS_CATEGORY_IOSTRINGOP: return false;
    default: break;
  }
  switch (insn.mnemonic) {
    case ZYDIS_MNEMONIC_FNSTENV:
    case ZYDIS_MNEMONIC_FNSAVE:
    case ZYDIS_MNEMONIC_FXSAVE:
    case ZYDIS_MNEMONIC_FXSAVE64:
    case ZYDIS_MNEMONIC_POPF:
    case ZYDIS_MNEMONIC_POPFD:
    case ZYDIS_MNEMONIC_POPFQ:
    case ZYDIS_MNEMONIC_ENTER:
    case ZYDIS_MNEMONIC_POPA:
    case ZYDIS_MNEMONIC_POPAD:
    case ZYDIS_MNEMONIC_HLT:
    case ZYDIS_MNEMONIC_CLI:
    case ZYDIS_MNEMONIC_STI:
    case ZYDIS_MNEMONIC_UD2:
    case ZYDIS_MNEMONIC_BOUND:
    case ZYDIS_MNEMONIC_INTO:
    case ZYDIS_MNEMONIC_MASKMOVQ:
    case ZYDIS_MNEMONIC_MASKMOVDQU:
    case ZYDIS_MNEMONIC_VMASKMOVDQU: return false;
    case ZYDIS_MNEMONIC_SHLD:
    case ZYDIS_MNEMONIC_SHRD: return instruction.operands[0].size > 16;
    default: return (insn.attributes & ZYDIS_ATTRIB_IS_PRIVILEGED) == 0;
  }
}

void BlockGenerator::fill_pool() {
  Case c;
  Instruction instruction;
  while (common_.size() + rest_.size() < pool_size) {
    const bool fresh = g_.invent(c, instruction);
    const bool common = common_.size() < pool_size / 3 && is_common(instruction.insn.mnemonic);
    if (!fresh && !(common && g_.decode(c.code, instruction))) continue;
    if (!wanted(instruction)) continue;
    g_.count(instruction);
    auto& pool = is_common(instruction.insn.mnemonic) ? common_ : rest_;
    Encoding& e = pool.emplace_back();
    std::copy_n(c.code.begin(), instruction.insn.length, e.bytes.begin());
    e.decoded = instruction;
  }
  mnemonics_ = g_.mnemonics();
}

// ---- Registers

unsigned BlockGenerator::favourite() {
  constexpr std::array<unsigned, 3> homeless = {4, 10, 11};
  if (bits32_) return static_cast<unsigned>(g_.chance(25) ? 4 : g_.below(8));
  return g_.chance(45) ? homeless[g_.below(3)] : static_cast<unsigned>(g_.below(16));
}

void BlockGenerator::choose_roles() {
  initial_.fill(Role::data);
  const unsigned pointers = 2 + static_cast<unsigned>(g_.below(4));
  for (unsigned i = 0; i < pointers; ++i) initial_[favourite()] = Role::pointer;
  for (unsigned i = 0; i < 2; ++i)
    if (const unsigned reg = favourite(); reg != sp) initial_[reg] = Role::index;
  if (const unsigned reg = favourite(); reg != sp && g_.chance(15)) initial_[reg] = Role::far_index;
  if (g_.chance(95)) initial_[sp] = Role::pointer;
  if (g_.chance(30)) initial_[6] = initial_[7] = Role::pointer;
  role_ = initial_;
}

std::optional<unsigned> BlockGenerator::any(Role role) {
  const auto first = static_cast<unsigned>(g_.below(16));
  for (unsigned i = 0; i < 16; ++i)
    if (role_[(first + i) % 16] == role) return (first + i) % 16;
  return std::nullopt;
}

// Somewhere in the window, its pages' ends preferred.
uint64_t BlockGenerator::address() {
  const uint64_t where = g_.below(100);
  const uint64_t align = g_.chance(88) ? 64 : g_.chance(50) ? 8 : 1;
  uint64_t at = 0;
  if (where < 70)
    at = window_base + 512 + g_.below(2 * page - 1024);
  else if (where < 90)
    at = window_base + page - 192 + g_.below(384);
  else if (where < 95)
    at = window_base + 2 * page - 256 + g_.below(320);
  else if (where < 97)
    at = window_base + 2 * page + g_.below(page);
  else if (where < 98)
    at = window_base - 64 + g_.below(320);
  else
    at = window_base + 3 * page - 256 + g_.below(320);
  return at & ~(align - 1);
}

void BlockGenerator::state(const Block& block, State& s) {
  g_.invent_state(s);
  s.rip = block.program.state.rip;
  constexpr uint64_t direction = 0x400, alignment = 0x4'0000;
  s.rflags &= ~(direction | alignment);
  if (block.integer_only && g_.chance(10)) s.rflags |= alignment;
  if (g_.chance(5)) s.rflags |= direction;
  for (unsigned i = 0; i < 16; ++i) {
    switch (initial_[i]) {
      case Role::data: break;
      case Role::pointer: s.gpr[i] = address(); break;
      case Role::index:
        s.gpr[i] = g_.below(128) - (g_.chance(50) ? 64 : 0);
        if (g_.chance(70)) s.gpr[i] &= ~uint64_t{15};
        break;
      case Role::far_index: s.gpr[i] = static_cast<uint64_t>(-far_distance); break;
    }
    if (bits32_ && i < 8) s.gpr[i] &= 0xffff'ffff;
  }
  // Masked floating-point exceptions more often than not: others are the interpreter's.
  if (g_.chance(94)) {
    s.xsave[0] |= 0x3f;
    s.xsave[2] &= 0x40;
    s.xsave[3] &= 0x7f;
  }
  uint32_t mxcsr = 0;
  std::memcpy(&mxcsr, &s.xsave[24], 4);
  mxcsr &= 0xffff;
  if (g_.chance(94)) mxcsr |= 0x1f80;
  std::memcpy(&s.xsave[24], &mxcsr, 4);
}

// ---- Instructions

bool BlockGenerator::add(Block& block, const uint8_t* bytes, unsigned length) {
  Case& c = block.program;
  if (c.length + length + 32u > code_room) return false;
  std::copy_n(bytes, length, &c.code[c.length]);
  Block::Part part;
  part.offset = c.length;
  ZydisDecoder decoder;
  ZydisDecoderInit(&decoder, bits32_ ? ZYDIS_MACHINE_MODE_LONG_COMPAT_32 : ZYDIS_MACHINE_MODE_LONG_64,
                   bits32_ ? ZYDIS_STACK_WIDTH_32 : ZYDIS_STACK_WIDTH_64);
  if (!ZYAN_SUCCESS(ZydisDecoderDecodeFull(&decoder, &c.code[c.length], length, &part.decoded.insn,
                                           part.decoded.operands.data())))
    return false;
  part.length = part.decoded.insn.length;
  c.length = static_cast<uint16_t>(c.length + part.length);
  block.parts.push_back(part);
  return true;
}

bool BlockGenerator::add(Block& block, std::initializer_list<unsigned> bytes) {
  std::array<uint8_t, 16> plain{};
  std::transform(bytes.begin(), bytes.end(), plain.begin(),
                 [](unsigned b) { return static_cast<uint8_t>(b); });
  return add(block, plain.data(), static_cast<unsigned>(bytes.size()));
}

// Replaces the ModRM memory operand by one off a register that holds an address. `at`: of the instruction.
bool BlockGenerator::aim_operand(const Encoding& from, Encoding& to, unsigned at) {
  const ZydisDecodedInstruction& insn = from.decoded.insn;
  const auto& raw = insn.raw;
  const unsigned modrm = raw.modrm.offset;
  const unsigned old_tail = modrm + 1u + (raw.modrm.rm == 4 ? 1u : 0u) + raw.disp.size / 8u;
  const bool legacy_rex = (insn.attributes & ZYDIS_ATTRIB_HAS_REX) != 0;
  const bool vex3 = insn.encoding == ZYDIS_INSTRUCTION_ENCODING_VEX && raw.vex.size == 3;
  const bool evex = insn.encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX;
  const bool extends = !bits32_ && (legacy_rex || vex3 || evex);
  const auto reachable = [&](unsigned reg) { return reg < 8 || extends; };

  std::optional<unsigned> base;
  if (role_[last_base_] == Role::pointer && g_.chance(60)) base = last_base_;
  if (!base) base = any(Role::pointer);
  const bool based = base && reachable(*base) && g_.chance(97);
  constexpr unsigned none = 16;
  unsigned index = none;
  bool far = false;
  if (based && g_.chance(25)) {
    index = any(Role::index).value_or(none);
    if (const auto f = any(Role::far_index); f && g_.chance(50)) index = *f, far = true;
    if (index != none && !reachable(index)) index = none, far = false;
  }
  unsigned n = modrm + 1;
  const auto put = [&](unsigned byte) { to.bytes[n++] = static_cast<uint8_t>(byte); };
  int64_t disp = static_cast<int64_t>(g_.below(160)) - 64;
  if (g_.chance(88)) disp &= ~int64_t{15};
  unsigned mod = g_.chance(30) ? 0 : g_.chance(60) ? 1 : 2;
  if (far) {
    mod = 2;
    disp = far_distance + static_cast<int64_t>(g_.below(256));
  }
  if (mod == 0 && based && (*base & 7) == 5) mod = 1;
  if (mod == 1) disp = static_cast<int8_t>(disp);
  if (mod == 1 && evex) disp &= 7;  // scaled
  if (based) {
    const bool sib = index != none || (*base & 7) == 4;
    to.bytes[modrm] = static_cast<uint8_t>(mod << 6 | (to.bytes[modrm] & 0x38u) | (sib ? 4u : *base & 7u));
    const unsigned scale = far ? 0 : static_cast<unsigned>(g_.below(4));
    if (sib) put((index != none ? scale << 6 | (index & 7u) << 3 : 0x20u) | (*base & 7u));
    last_base_ = *base;
  } else {  // absolute or relative to RIP
    mod = 2;
    const bool absolute = !bits32_ && g_.chance(40);
    to.bytes[modrm] = static_cast<uint8_t>((to.bytes[modrm] & 0x38u) | (absolute ? 4u : 5u));
    if (absolute) put(0x25);
    const unsigned tail = insn.length - std::min<unsigned>(old_tail, insn.length);
    const uint64_t end = code_base + at + n + 4 + tail;
    disp = static_cast<int64_t>(address() - (absolute || bits32_ ? 0 : end));
  }
  if (mod == 1) put(static_cast<unsigned>(disp));
  if (mod == 2) {
    const auto word = static_cast<uint32_t>(disp);
    std::memcpy(&to.bytes[n], &word, 4);
    n += 4;
  }
  if (old_tail > insn.length || n + insn.length - old_tail > 15) return false;
  std::copy(from.bytes.begin() + old_tail, from.bytes.begin() + insn.length, to.bytes.begin() + n);
  if (!extends) return true;
  const unsigned b = based ? *base >> 3 & 1 : 0;
  const unsigned x = index != none ? index >> 3 & 1 : 0;
  if (legacy_rex) {
    uint8_t& rex = to.bytes[raw.rex.offset];
    rex = static_cast<uint8_t>((rex & ~3u) | x << 1 | b);
  } else {
    uint8_t& prefix = to.bytes[(vex3 ? raw.vex.offset : raw.evex.offset) + 1u];
    prefix = static_cast<uint8_t>((prefix & ~0x60u) | (x ^ 1u) << 6 | (b ^ 1u) << 5);
  }
  return true;
}

bool BlockGenerator::retarget(const Encoding& from, Encoding& to, unsigned at) {
  const ZydisDecodedInstruction& insn = from.decoded.insn;
  to.bytes = from.bytes;
  if ((insn.attributes & ZYDIS_ATTRIB_HAS_MODRM) != 0) {
    const unsigned modrm = insn.raw.modrm.offset;
    const bool rex = (insn.attributes & ZYDIS_ATTRIB_HAS_REX) != 0;
    if (rex && g_.chance(40)) {  // the register operands
      const unsigned reg = favourite(), rm = favourite();
      uint8_t& prefix = to.bytes[insn.raw.rex.offset];
      prefix = static_cast<uint8_t>((prefix & ~5u) | (reg >> 3) << 2 | rm >> 3);
      to.bytes[modrm] = static_cast<uint8_t>((to.bytes[modrm] & 0xc0u) | (reg & 7u) << 3 | (rm & 7u));
      if (insn.raw.modrm.mod != 3)
        to.bytes[modrm] = static_cast<uint8_t>((to.bytes[modrm] & 0xf8u) | insn.raw.modrm.rm);
    }
    if (insn.raw.modrm.mod != 3 && !aim_operand(from, to, at)) return false;
  }
  return g_.decode(to.bytes, to.decoded) && wanted(to.decoded);
}

// Whether what the instruction uses without saying so holds what it should.
bool BlockGenerator::fits_roles(const Instruction& instruction) {
  const ZydisDecodedInstruction& insn = instruction.insn;
  for (unsigned i = 0; i < insn.operand_count; ++i) {
    const ZydisDecodedOperand& o = instruction.operands[i];
    const bool hidden = o.visibility != ZYDIS_OPERAND_VISIBILITY_EXPLICIT;
    if (o.type == ZYDIS_OPERAND_TYPE_MEMORY && hidden && is_gpr(o.mem.base) &&
        role_[whole(o.mem.base)] != Role::pointer)
      return false;
    if (o.type == ZYDIS_OPERAND_TYPE_REGISTER && is_gpr(o.reg.value) &&
        (o.actions & ZYDIS_OPERAND_ACTION_MASK_WRITE) != 0 &&
        o.visibility != ZYDIS_OPERAND_VISIBILITY_HIDDEN) {
      const unsigned reg = whole(o.reg.value);
      if (reg == sp && g_.chance(85)) return false;
      if (role_[reg] == Role::pointer && g_.chance(60)) return false;
    }
  }
  // A bit offset is part of the address.
  const bool bit_test = insn.mnemonic == ZYDIS_MNEMONIC_BT || insn.mnemonic == ZYDIS_MNEMONIC_BTS ||
                        insn.mnemonic == ZYDIS_MNEMONIC_BTR || insn.mnemonic == ZYDIS_MNEMONIC_BTC;
  if (bit_test && instruction.operands[0].type == ZYDIS_OPERAND_TYPE_MEMORY &&
      instruction.operands[1].type == ZYDIS_OPERAND_TYPE_REGISTER &&
      role_[whole(instruction.operands[1].reg.value)] != Role::index)
    return false;
  if (insn.mnemonic == ZYDIS_MNEMONIC_DIV || insn.mnemonic == ZYDIS_MNEMONIC_IDIV) return g_.chance(30);
  return true;
}

void BlockGenerator::note_written(const Instruction& instruction) {
  for (unsigned i = 0; i < instruction.insn.operand_count; ++i) {
    const ZydisDecodedOperand& o = instruction.operands[i];
    if (o.type == ZYDIS_OPERAND_TYPE_REGISTER && is_gpr(o.reg.value) &&
        (o.actions & ZYDIS_OPERAND_ACTION_MASK_WRITE) != 0 && o.visibility != ZYDIS_OPERAND_VISIBILITY_HIDDEN)
      role_[whole(o.reg.value)] = Role::data;
  }
}

// Flags that the manuals leave undefined must not be read: a comparison puts an end to them.
void BlockGenerator::define_flags(Block& block, const Instruction& instruction) {
  const ZydisAccessedFlags* f = instruction.insn.cpu_flags;
  if (f == nullptr || flags(f->undefined) == 0) return;
  switch (instruction.insn.mnemonic) {
    // AF is clear on every processor.
    case ZYDIS_MNEMONIC_AND:
    case ZYDIS_MNEMONIC_OR:
    case ZYDIS_MNEMONIC_XOR:
    case ZYDIS_MNEMONIC_TEST: return;
    default: break;
  }
  add(block, {0x83, 0xf8 | static_cast<unsigned>(g_.below(4)), static_cast<unsigned>(g_.below(256))});
}

void BlockGenerator::emit_from_pool(Block& block) {
  for (unsigned tries = 0; tries < 20; ++tries) {
    const auto& pool = g_.chance(60) ? common_ : rest_;
    const Encoding& from = pool[g_.below(pool.size())];
    if (block.integer_only && !integer(from.decoded.insn)) continue;
    Encoding to;
    const auto at = static_cast<unsigned>(block.program.state.rip - code_base) + block.program.length;
    if (!retarget(from, to, at) || !fits_roles(to.decoded)) continue;
    if (!add(block, to.bytes.data(), to.decoded.insn.length)) return;
    note_written(to.decoded);
    define_flags(block, to.decoded);
    return;
  }
}

void BlockGenerator::emit_pointer(Block& block) {
  const unsigned reg = favourite();
  const unsigned rex = reg >> 3;
  if (const auto from = any(Role::pointer); from && g_.chance(50)) {
    if (g_.chance(50)) {  // mov
      bits32_ ? add(block, {0x89, 0xc0 | *from << 3 | reg})
              : add(block, {0x48 | (*from >> 3) << 2 | rex, 0x89, 0xc0 | (*from & 7) << 3 | (reg & 7)});
    } else {  // lea with a displacement; of RSP too
      const auto disp = (static_cast<unsigned>(g_.below(128)) - 64) & 0xff;
      const bool narrow = g_.chance(20);
      const unsigned prefix = (narrow ? 0x40u : 0x48u) | (reg >> 3) << 2 | *from >> 3;
      std::array<uint8_t, 16> bytes{};
      unsigned n = 0;
      const auto put = [&](unsigned byte) { bytes[n++] = static_cast<uint8_t>(byte); };
      if (!bits32_ && g_.chance(10)) put(0x67);
      if (!bits32_) put(prefix);
      put(0x8d);
      put(0x40 | (reg & 7) << 3 | (*from & 7));
      if ((*from & 7) == 4) put(0x24);
      put(disp);
      add(block, bytes.data(), n);
    }
  } else {
    const auto value = static_cast<uint32_t>(address());
    std::array<unsigned, 4> v = {value & 0xff, value >> 8 & 0xff, value >> 16 & 0xff, value >> 24};
    bits32_ ? add(block, {0xb8 | reg, v[0], v[1], v[2], v[3]})
            : add(block, {0x40 | rex, 0xb8 | (reg & 7), v[0], v[1], v[2], v[3]});
  }
  role_[reg] = Role::pointer;
}

// What a POPF of user code may be made to change, the bits that it ignores included. No TF, whose trap comes
// behind one more instruction; DF seldom, because pointers then run out of the window.
unsigned BlockGenerator::changeable_flags(const Block& block) {
  constexpr unsigned ignored = 0x1b'3202;  // VIP, VIF, VM, RF, IOPL, IF, the fixed one
  return arithmetic_flags | 0x20'4000 | ignored | (g_.chance(10) ? 0x400 : 0) |
         (block.integer_only && g_.chance(20) ? 0x4'0000 : 0);
}

// MOV of the accumulator from and to an address in the instruction.
void BlockGenerator::emit_absolute(Block& block) {
  const auto opcode = 0xa0 | static_cast<unsigned>(g_.below(4));
  const auto at = static_cast<uint32_t>(address());
  const std::array<unsigned, 4> a = {at & 0xff, at >> 8 & 0xff, at >> 16 & 0xff, at >> 24};
  const bool added = !bits32_        ? add(block, {opcode, a[0], a[1], a[2], a[3], 0, 0, 0, 0})
                     : g_.chance(20) ? add(block, {0x66, opcode, a[0], a[1], a[2], a[3]})
                                     : add(block, {opcode, a[0], a[1], a[2], a[3]});
  if (added && (opcode & 2) == 0) role_[0] = Role::data;
}

// push value; LDMXCSR or FLDCW [rsp]: mostly with all exceptions masked, as programs have them.
void BlockGenerator::emit_control(Block& block) {
  if (block.integer_only || role_[sp] != Role::pointer) return emit_pointer(block);
  const bool x87 = g_.chance(50), masked = g_.chance(85);
  const auto any = static_cast<unsigned>(g_.random());
  const unsigned value = x87 ? (any & 0xf7f) | (masked ? 0x3f : 0) : (any & 0xffff) | (masked ? 0x1f80 : 0);
  if (!add(block, {0x68, value & 0xff, value >> 8 & 0xff, 0, 0})) return;
  x87 ? add(block, {0xd9, 0x2c, 0x24}) : add(block, {0x0f, 0xae, 0x14, 0x24});
}

// Pushes and pops, and adjustments of RSP in all the forms that compilers and others use.
void BlockGenerator::emit_stack(Block& block) {
  if (role_[sp] != Role::pointer) return emit_pointer(block);
  const auto small = static_cast<unsigned>(g_.below(12)) * (bits32_ ? 4 : 8);
  const unsigned rex = bits32_ || g_.chance(8) ? 0x40 : 0x48;  // ADD ESP clears the upper half
  const auto short_one = [&](unsigned opcode, unsigned reg) {
    bits32_ || reg < 8 ? add(block, {opcode | (reg & 7)}) : add(block, {0x41, opcode | (reg & 7)});
  };
  switch (g_.below(12)) {
    case 0:
    case 1:
    case 2:
    case 3: short_one(0x50, favourite()); return;
    case 4:
    case 5:
    case 6: {
      const unsigned reg = favourite();
      if (reg == sp && g_.chance(90)) return;
      short_one(0x58, reg);
      role_[reg] = Role::data;
      return;
    }
    case 7: add(block, {0x6a, static_cast<unsigned>(g_.below(256))}); return;
    case 8: bits32_ ? add(block, {0x83, 0xec, small}) : add(block, {rex, 0x83, 0xec, small}); return;
    case 9: bits32_ ? add(block, {0x83, 0xc4, small}) : add(block, {rex, 0x83, 0xc4, small}); return;
    case 10:
      bits32_ ? add(block, {0x8d, 0x64, 0x24, small}) : add(block, {rex, 0x8d, 0x64, 0x24, small});
      return;
    default:
      if (g_.chance(40)) {  // pushf; [xor dword [rsp], some;] popf
        add(block, {0x9c});
        if (g_.chance(60)) {
          const auto flags = static_cast<unsigned>(g_.random()) & changeable_flags(block);
          add(block, {0x81, 0x34, 0x24, flags & 0xff, flags >> 8 & 0xff, flags >> 16 & 0xff, flags >> 24});
        }
        add(block, {0x9d});
      } else if (role_[5] == Role::pointer) {
        add(block, {0xc9});
        role_[5] = Role::data;
      } else {  // mov ebp, esp
        bits32_ ? add(block, {0x89, 0xe5}) : add(block, {0x48, 0x89, 0xe5});
        role_[5] = Role::pointer;
      }
  }
}

// LOOPNE, LOOPE, LOOP or JRCXZ (`kind` 0 to 3), also with the other address size; without a distance to
// itself. A count of 64 bits and of 16 is not the one that a MOV to ECX has set.
void BlockGenerator::add_counted(Block& block, unsigned kind, std::optional<unsigned> distance) {
  role_[1] = Role::data;
  if ((distance || !bits32_) && g_.chance(20))
    add(block, {0x67, 0xe0 | kind, distance.value_or(0xfd)});
  else
    add(block, {0xe0 | kind, distance.value_or(0xfe)});
}

// Jumps over what follows, calls with their return, and loops that are counted in memory.
void BlockGenerator::emit_flow(Block& block) {
  const auto forward = [&](unsigned width) {
    forward_.push_back(
        {.displacement = block.program.length - width, .parts_left = 1 + static_cast<unsigned>(g_.below(5))});
  };
  const auto condition = static_cast<unsigned>(g_.below(16));
  switch (g_.below(10)) {
    case 0:
    case 1:
      if (add(block, {0x0f, 0x80 | condition, 0, 0, 0, 0})) forward(4);
      return;
    case 2:
      if (add(block, {0xe9, 0, 0, 0, 0})) forward(4);
      return;
    case 3:  // the return address is what follows: a pop, or the RET below
      if (role_[sp] == Role::pointer && add(block, {0xe8, 0, 0, 0, 0})) forward(4);
      return;
    case 4: {  // call; jmp over; ... ret
      if (role_[sp] != Role::pointer) return;
      if (!add(block, {0xe8, 5, 0, 0, 0}) || !add(block, {0xe9, 0, 0, 0, 0})) return;
      const auto jump = block.program.length;
      const auto body = g_.below(4);
      for (uint64_t i = 0; i < body; ++i) g_.chance(50) ? emit_from_pool(block) : emit_stack(block);
      const bool frees = g_.chance(20);
      frees ? add(block, {0xc2, 8, 0}) : add(block, {0xc3});
      const auto distance = static_cast<uint32_t>(block.program.length - jump);
      std::memcpy(&block.program.code[jump - 4], &distance, 4);
      return;
    }
    case 5: {  // a jump or a call through a register or memory, to what follows it
      const unsigned reg = bits32_ ? static_cast<unsigned>(g_.below(8)) : favourite();
      if (reg == sp) return;
      const bool call = role_[sp] == Role::pointer && g_.chance(40);
      const auto through = any(Role::pointer);
      const bool memory =
          through && g_.chance(50) && *through != reg && (*through & 7) != 4 && (*through & 7) != 5;
      // mov reg, target; [mov [p], reg;] jmp reg or [p]
      const unsigned size = (bits32_ ? 5 : 6) + (memory ? (bits32_ ? 2 : 3) : 0) + (bits32_ ? 2 : 3);
      const auto target = static_cast<uint32_t>(block.program.state.rip + block.program.length + size);
      const std::array<unsigned, 4> t = {target & 0xff, target >> 8 & 0xff, target >> 16 & 0xff,
                                         target >> 24};
      const unsigned high = reg >> 3, operation = call ? 0x10 : 0x20;
      bits32_ ? add(block, {0xb8 | reg, t[0], t[1], t[2], t[3]})
              : add(block, {0x40 | high, 0xb8 | (reg & 7), t[0], t[1], t[2], t[3]});
      if (memory) {
        const unsigned p = *through & 7, ph = *through >> 3;
        bits32_ ? add(block, {0x89, reg << 3 | p})
                : add(block, {0x48 | high << 2 | ph, 0x89, (reg & 7) << 3 | p});
        bits32_ ? add(block, {0xff, operation | p}) : add(block, {0x40 | ph, 0xff, operation | p});
      } else {
        bits32_ ? add(block, {0xff, 0xc0 | operation | reg})
                : add(block, {0x40 | high, 0xff, 0xc0 | operation | (reg & 7)});
      }
      role_[reg] = Role::data;
      return;
    }
    case 6:  // [mov ecx, few;] LOOP, LOOPE, LOOPNE or JRCXZ over a jump
      if (g_.chance(60)) add(block, {0xb9, static_cast<unsigned>(g_.below(3)), 0, 0, 0});
      add_counted(block, static_cast<unsigned>(g_.below(4)), 5);
      if (add(block, {0xe9, 0, 0, 0, 0})) forward(4);
      return;
    case 7:  // mov ecx, few; a LOOP to itself
      if (!add(block, {0xb9, 1 + static_cast<unsigned>(g_.below(5)), 0, 0, 0})) return;
      add_counted(block, static_cast<unsigned>(g_.below(3)), std::nullopt);
      return;
    default: {  // sub dword [counter], 1; jg back: a loop that is entered again runs once
      if (block.parts.empty() || counters_ > 2) return;
      const auto counter = static_cast<uint32_t>(counter_base + 64 * counters_++);
      const std::array<unsigned, 4> c = {counter & 0xff, counter >> 8 & 0xff, counter >> 16 & 0xff,
                                         counter >> 24};
      const Block::Part& target =
          block.parts[block.parts.size() - 1 - g_.below(std::min<size_t>(block.parts.size(), 12))];
      const auto& counted = target.decoded.insn;
      if (counted.raw.imm[0].value.s == -int64_t{counted.length} && counted.raw.imm[0].is_relative != 0)
        return;  // a LOOP to itself, whose count has been used up
      const auto back = target.offset;
      const bool added = bits32_ ? add(block, {0x83, 0x2d, c[0], c[1], c[2], c[3], 1})
                                 : add(block, {0x83, 0x2c, 0x25, c[0], c[1], c[2], c[3], 1});
      if (!added) return;
      const uint32_t distance = back - (block.program.length + 6u);
      add(block, {0x0f, 0x8f, distance & 0xff, distance >> 8 & 0xff, distance >> 16 & 0xff, distance >> 24});
    }
  }
}

// A store into an instruction that follows: its immediate, or all of it, by one that treats flags alike: the
// translator does not keep flags for a store that the code behind it, as it was, would not have read.
void BlockGenerator::emit_patch(Block& block) {
  constexpr std::array<unsigned, 3> plain = {0x90, 0x98, 0x99}, carry = {0xf8, 0xf9, 0xf8};
  const auto& bytes = g_.chance(50) ? plain : carry;
  const auto value = static_cast<unsigned>(g_.random());
  const bool immediate = g_.chance(60);
  const unsigned between = static_cast<unsigned>(g_.below(4));  // NOPs
  // mov byte [place], value
  const unsigned length = bits32_ ? 7 : 8;
  const unsigned place = block.program.length + length + between + (immediate ? 1 : 0);
  const auto linear = static_cast<uint32_t>(block.program.state.rip + place);
  const std::array<unsigned, 4> p = {linear & 0xff, linear >> 8 & 0xff, linear >> 16 & 0xff, linear >> 24};
  const unsigned byte = immediate ? value & 0xff : bytes[g_.below(bytes.size())];
  const bool added = bits32_ ? add(block, {0xc6, 0x05, p[0], p[1], p[2], p[3], byte})
                             : add(block, {0xc6, 0x04, 0x25, p[0], p[1], p[2], p[3], byte});
  if (!added) return;
  for (unsigned i = 0; i < between; ++i) add(block, {0x90});
  if (immediate)
    add(block, {0xb8 | 1, 0, 0, 0, 0});  // mov ecx, imm32
  else
    add(block, {bytes[g_.below(bytes.size())]});
  role_[0] = role_[1] = role_[2] = Role::data;
  block.changes_itself = true;
}

void BlockGenerator::emit(Block& block) {
  const uint64_t what = g_.below(100);
  if (!any(Role::pointer) || what < 6) return emit_pointer(block);
  if (what < 24) return emit_stack(block);
  if (what < 32) return emit_flow(block);
  if (what >= 98) return emit_absolute(block);
  if (what >= 96) return emit_control(block);
  if (block.changes_itself && what < 36) return emit_patch(block);
  emit_from_pool(block);
}

// Backwards from each branch, behind which every flag counts.
void BlockGenerator::find_live_flags(Block& block) const {
  uint64_t live = arithmetic_flags;
  for (auto part = block.parts.rbegin(); part != block.parts.rend(); ++part) {
    const ZydisDecodedInstruction& insn = part->decoded.insn;
    if (insn.meta.branch_type != ZYDIS_BRANCH_TYPE_NONE) live = arithmetic_flags;
    if (const ZydisAccessedFlags* f = insn.cpu_flags; f != nullptr) {
      const uint64_t changed = flags(f->modified) | flags(f->set_0) | flags(f->set_1) | flags(f->undefined);
      if (!keeps_flags_sometimes(insn.mnemonic)) live &= ~changed;
      live |= flags(f->tested);
    }
    part->live = block.changes_itself ? 0 : live;
  }
}

void BlockGenerator::next(Block& block) {
  do {
    block.parts.clear();
    Case& c = block.program;
    c.length = 0;
    c.bits32 = bits32_;
    c.whole = true;
    // Anywhere in the first page, and over its end.
    c.state.rip = code_base + g_.below(page);
    if (g_.chance(15)) c.state.rip = code_base + page - 1 - g_.below(160);
    block.integer_only = g_.chance(25);
    block.changes_itself = g_.chance(6);
    counters_ = 0;
    forward_.clear();
    choose_roles();
    const unsigned count = g_.chance(15) ? 1 : 1 + static_cast<unsigned>(g_.below(64));
    for (unsigned tries = 0; block.parts.size() < count && tries < 2 * count; ++tries) {
      const size_t before = block.parts.size();
      emit(block);
      for (Forward& f : forward_) {
        f.parts_left -= std::min<unsigned>(f.parts_left, static_cast<unsigned>(block.parts.size() - before));
        if (f.parts_left != 0) continue;
        const uint32_t distance = block.program.length - (f.displacement + 4);
        std::memcpy(&c.code[f.displacement], &distance, 4);
      }
      std::erase_if(forward_, [](const Forward& f) { return f.parts_left == 0; });
    }
    for (const Forward& f : forward_) {
      const uint32_t distance = c.length - (f.displacement + 4);
      std::memcpy(&c.code[f.displacement], &distance, 4);
    }
  } while (block.parts.empty());
  find_live_flags(block);
}

std::string describe(const Block& block) {
  ZydisFormatter formatter;
  ZydisFormatterInit(&formatter, ZYDIS_FORMATTER_STYLE_INTEL);
  ZydisDecoder decoder;
  ZydisDecoderInit(&decoder,
                   block.program.bits32 ? ZYDIS_MACHINE_MODE_LONG_COMPAT_32 : ZYDIS_MACHINE_MODE_LONG_64,
                   block.program.bits32 ? ZYDIS_STACK_WIDTH_32 : ZYDIS_STACK_WIDTH_64);
  std::string out;
  for (const Block::Part& part : block.parts) {
    const uint64_t rip = block.program.state.rip + part.offset;
    const uint8_t* bytes = &block.program.code[part.offset];
    Instruction now;
    char text[128] = "?";
    if (ZYAN_SUCCESS(ZydisDecoderDecodeFull(&decoder, bytes, part.length, &now.insn, now.operands.data())))
      ZydisFormatterFormatInstruction(&formatter, &now.insn, now.operands.data(),
                                      now.insn.operand_count_visible, text, sizeof text, rip, nullptr);
    out += format("  %lx ", rip);
    for (unsigned i = 0; i < part.length; ++i) out += format("%02x", bytes[i]);
    out += std::string("  ") + text + "\n";
  }
  return out;
}

}  // namespace lodge::oracle
