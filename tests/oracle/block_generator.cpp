#include "block_generator.hpp"

#include <algorithm>
#include <cstring>

#include "compare.hpp"

namespace lodge::oracle {
namespace {

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
