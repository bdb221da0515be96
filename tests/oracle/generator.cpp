#include "generator.hpp"

#include <algorithm>
#include <bit>
#include <cstring>

#include "kvm/soft/cpu/cpuid.hpp"
#include "kvm/soft/interpret/gate.hpp"
#include "kvm/soft/interpret/vector/host.hpp"

namespace lodge::oracle {
namespace {

// ---- What may run in the child
// -----------------------------------------------------------------------------

// Integer instruction sets that every x86-64 processor of the last ten years has.
bool integer_set(ZydisISASet set) {
  switch (set) {
    case ZYDIS_ISA_SET_I86:
    case ZYDIS_ISA_SET_I186:
    case ZYDIS_ISA_SET_I286PROTECTED:
    case ZYDIS_ISA_SET_I286REAL:
    case ZYDIS_ISA_SET_I386:
    case ZYDIS_ISA_SET_I486:
    case ZYDIS_ISA_SET_I486REAL:
    case ZYDIS_ISA_SET_PENTIUMREAL:
    case ZYDIS_ISA_SET_PPRO:
    case ZYDIS_ISA_SET_CMOV:
    case ZYDIS_ISA_SET_LONGMODE:
    case ZYDIS_ISA_SET_LAHF:
    case ZYDIS_ISA_SET_CMPXCHG16B:
    case ZYDIS_ISA_SET_FAT_NOP:
    case ZYDIS_ISA_SET_PREFETCH_NOP:
    case ZYDIS_ISA_SET_SSE_PREFETCH:
    case ZYDIS_ISA_SET_PAUSE: return true;
    case ZYDIS_ISA_SET_ADOX_ADCX: return __builtin_cpu_supports("adx") != 0;
    case ZYDIS_ISA_SET_BMI1: return __builtin_cpu_supports("bmi") != 0;
    case ZYDIS_ISA_SET_BMI2: return __builtin_cpu_supports("bmi2") != 0;
    case ZYDIS_ISA_SET_LZCNT: return __builtin_cpu_supports("lzcnt") != 0;
    case ZYDIS_ISA_SET_POPCNT: return __builtin_cpu_supports("popcnt") != 0;
    case ZYDIS_ISA_SET_MOVBE: return __builtin_cpu_supports("movbe") != 0;
    default: return false;
  }
}

// Instructions whose result is not a function of the state, that the kernel emulates or turns into a system
// call, or that would change what the signal handler itself stands on (FS).
bool unpredictable(const ZydisDecodedInstruction& insn) {
  switch (insn.meta.category) {
    case ZYDIS_CATEGORY_SYSCALL:
    case ZYDIS_CATEGORY_SYSRET:
    case ZYDIS_CATEGORY_INTERRUPT:
    case ZYDIS_CATEGORY_SEGOP:
    case ZYDIS_CATEGORY_VTX:
    case ZYDIS_CATEGORY_XSAVE:
    case ZYDIS_CATEGORY_XSAVEOPT:
    case ZYDIS_CATEGORY_RDWRFSGS:
    case ZYDIS_CATEGORY_CET: return true;
    default: break;
  }
  switch (insn.mnemonic) {
    case ZYDIS_MNEMONIC_RDTSC:
    case ZYDIS_MNEMONIC_RDPMC:
    case ZYDIS_MNEMONIC_CPUID:
    case ZYDIS_MNEMONIC_IRET:
    case ZYDIS_MNEMONIC_IRETD:
    case ZYDIS_MNEMONIC_IRETQ:
    case ZYDIS_MNEMONIC_SGDT:
    case ZYDIS_MNEMONIC_SIDT:
    case ZYDIS_MNEMONIC_SLDT:
    case ZYDIS_MNEMONIC_STR:
    case ZYDIS_MNEMONIC_SMSW:
    case ZYDIS_MNEMONIC_LAR:
    case ZYDIS_MNEMONIC_LSL:
    case ZYDIS_MNEMONIC_VERR:
    case ZYDIS_MNEMONIC_VERW:
    case ZYDIS_MNEMONIC_RSM:
    case ZYDIS_MNEMONIC_UD0:  // length differs between vendors
    case ZYDIS_MNEMONIC_UD1:
    case ZYDIS_MNEMONIC_XSETBV:
    case ZYDIS_MNEMONIC_XGETBV: return true;
    default: return insn.meta.branch_type == ZYDIS_BRANCH_TYPE_FAR;
  }
}

bool is_string(const ZydisDecodedInstruction& insn) {
  return insn.meta.category == ZYDIS_CATEGORY_STRINGOP || insn.meta.category == ZYDIS_CATEGORY_IOSTRINGOP;
}

// F2 repeats any string instruction, also where Zydis sees no REPNE.
bool repeated(const ZydisDecodedInstruction& insn) {
  return std::any_of(insn.raw.prefixes, insn.raw.prefixes + insn.raw.prefix_count,
                     [](const auto& prefix) { return prefix.value == 0xf2 || prefix.value == 0xf3; });
}

bool has_prefix(const ZydisDecodedInstruction& insn, uint8_t value) {
  return std::any_of(insn.raw.prefixes, insn.raw.prefixes + insn.raw.prefix_count,
                     [&](const auto& prefix) { return prefix.value == value; });
}

// Encodings that Intel and AMD read differently, or that the manuals reserve.
bool vendor_specific(const ZydisDecodedInstruction& insn) {
  // An operand-size prefix on near branches in 64-bit mode: AMD truncates RIP.
  if (insn.meta.branch_type != ZYDIS_BRANCH_TYPE_NONE && has_prefix(insn, 0x66)) return true;
  switch (insn.mnemonic) {
    case ZYDIS_MNEMONIC_RET: return has_prefix(insn, 0x66);
    // Repeat prefixes replace the condition on AMD.
    case ZYDIS_MNEMONIC_LOOPE:
    case ZYDIS_MNEMONIC_LOOPNE: return repeated(insn);
    // PREFETCH with a register: #UD or a no-operation.
    case ZYDIS_MNEMONIC_NOP: return insn.opcode == 0x0d && insn.opcode_map == ZYDIS_OPCODE_MAP_0F;
    default: return false;
  }
}

bool is_bit_test(ZydisMnemonic mnemonic) {
  return mnemonic == ZYDIS_MNEMONIC_BT || mnemonic == ZYDIS_MNEMONIC_BTS || mnemonic == ZYDIS_MNEMONIC_BTR ||
         mnemonic == ZYDIS_MNEMONIC_BTC;
}

bool is_x87(const ZydisDecodedInstruction& insn) {
  return insn.meta.isa_ext == ZYDIS_ISA_EXT_X87 || insn.mnemonic == ZYDIS_MNEMONIC_FISTTP;
}

unsigned number(ZydisRegister reg) {
  return static_cast<unsigned>(ZydisRegisterGetId(reg));
}

template <class T>
void put(std::array<uint8_t, xsave_size>& area, size_t at, T value) {
  std::memcpy(&area[at], &value, sizeof(T));
}

constexpr unsigned longest = 16;  // bytes invented for one instruction

// Inverse of an odd number modulo 2^64, by Newton's iteration.
uint64_t inverse(uint64_t odd) {
  uint64_t x = odd;
  for (int i = 0; i < 5; ++i) x *= 2 - odd * x;
  return x;
}

}  // namespace

Generator::Generator(uint64_t seed, Domain domain, bool bits32)
    : engine_(seed), domain_(domain), bits32_(bits32), features_(kvm::soft::host_cpuid()) {
  ZydisDecoderInit(&decoder_, bits32 ? ZYDIS_MACHINE_MODE_LONG_COMPAT_32 : ZYDIS_MACHINE_MODE_LONG_64,
                   bits32 ? ZYDIS_STACK_WIDTH_32 : ZYDIS_STACK_WIDTH_64);
  ZydisDecoderEnableMode(&decoder_, ZYDIS_DECODER_MODE_AMD_BRANCHES, features_.amd_like);
  ZydisDecoderEnableMode(&decoder_, ZYDIS_DECODER_MODE_MPX, ZYAN_FALSE);
  ZydisDecoderEnableMode(&decoder_, ZYDIS_DECODER_MODE_CET, ZYAN_FALSE);
  ZydisDecoderEnableMode(&decoder_, ZYDIS_DECODER_MODE_CLDEMOTE, ZYAN_FALSE);
}

uint64_t Generator::interesting() {
  switch (below(8)) {
    case 0: return below(4);
    case 1: return ~below(4);
    case 2: return uint64_t{1} << below(64);
    case 3: return (uint64_t{1} << below(64)) - 1;
    case 4: return below(256) * 0x0101'0101'0101'0101;
    case 5: return random() & random();
    default: return random();
  }
}

// ---- Encodings
// ---------------------------------------------------------------------------------------------

void Generator::invent_bytes(Case& c) {
  std::generate_n(c.code.begin(), longest, [&] { return static_cast<uint8_t>(random()); });
  unsigned at = 0;
  const auto put_byte = [&](uint64_t byte) { c.code[at++] = static_cast<uint8_t>(byte); };
  const auto simd_prefix = [&] {
    constexpr std::array<uint8_t, 3> prefixes = {0x66, 0xf2, 0xf3};
    if (chance(60)) put_byte(prefixes[below(3)]);
  };
  unsigned kind = 0;
  switch (domain_) {
    case Domain::all: kind = static_cast<unsigned>(below(8)); break;
    case Domain::integer: kind = static_cast<unsigned>(below(3)); break;
    case Domain::vector: kind = 2 + static_cast<unsigned>(below(5)); break;
    case Domain::x87: kind = 7; break;
  }
  if (chance(4)) put_byte(0x67);
  // Outside 64-bit mode the prefixes C4, C5 and 62 are LES, LDS and BOUND unless these bits are set.
  const uint64_t registers = bits32_ ? 0xc0 : 0;
  if (kind <= 1) {
    if (chance(15)) put_byte(0x66);
    if (chance(8)) put_byte(chance(50) ? 0xf3 : 0xf2);
    if (chance(8)) put_byte(0xf0);
    if (!bits32_ && chance(50)) put_byte(0x40 + below(16));
    if (kind == 1 && chance(70)) put_byte(0x0f);
    return;
  }
  switch (kind) {
    case 2:
    case 3:  // legacy SSE and other two- and three-byte opcodes
      simd_prefix();
      if (!bits32_ && chance(40)) put_byte(0x40 + below(16));
      put_byte(0x0f);
      if (const uint64_t map = below(4); map < 2) put_byte(map == 0 ? 0x38 : 0x3a);
      return;
    case 4: {  // VEX
      if (chance(30)) {
        put_byte(0xc5);
        put_byte((chance(50) ? random() | 0x78 : random()) | registers);
      } else {
        put_byte(0xc4);
        put_byte((random() & 0xe0) | (1 + below(3)) | registers);
        put_byte(chance(50) ? random() | 0x78 : random());
      }
      return;
    }
    case 5:
    case 6: {  // EVEX
      put_byte(0x62);
      put_byte((random() & 0xf0) | (1 + below(3)) | registers);
      const bool two_operands = chance(50);
      put_byte((random() & (two_operands ? 0x83 : 0xfb)) | (two_operands ? 0x7c : 4));
      put_byte(two_operands ? random() | 8 : random());
      return;
    }
    default: put_byte(0xd8 + below(8)); return;
  }
}

bool Generator::known_to_processor(const Instruction& instruction) const {
  const ZydisISASet set = instruction.insn.meta.isa_set;
  return (integer_set(set) || kvm::soft::simd::host().runs[set]) &&
         kvm::soft::allowed_by_cpuid(features_, instruction.insn);
}

bool Generator::acceptable(const Instruction& instruction) const {
  const ZydisDecodedInstruction& insn = instruction.insn;
  if (!known_to_processor(instruction) || unpredictable(insn) || vendor_specific(insn)) return false;
  if (domain_ == Domain::integer && !integer_set(insn.meta.isa_set)) return false;
  if (domain_ == Domain::x87 && !is_x87(insn)) return false;
  if (domain_ == Domain::vector && (integer_set(insn.meta.isa_set) || is_x87(insn))) return false;
  for (unsigned i = 0; i < insn.operand_count; ++i) {
    const ZydisDecodedOperand& operand = instruction.operands[i];
    if (operand.type == ZYDIS_OPERAND_TYPE_REGISTER &&
        ZydisRegisterGetClass(operand.reg.value) == ZYDIS_REGCLASS_SEGMENT)
      return false;
    // The child's FS is its C library's.
    if (operand.type != ZYDIS_OPERAND_TYPE_MEMORY) continue;
    if (operand.mem.segment == ZYDIS_REGISTER_FS) return false;
    // GS holds a null selector, and 16-bit addresses do not reach the window.
    if (bits32_ && operand.mem.type != ZYDIS_MEMOP_TYPE_AGEN &&
        (operand.mem.segment == ZYDIS_REGISTER_GS || insn.address_width == 16))
      return false;
    if (operand.type == ZYDIS_OPERAND_TYPE_MEMORY && operand.mem.type == ZYDIS_MEMOP_TYPE_MIB) return false;
  }
  return true;
}

// ---- State
// -------------------------------------------------------------------------------------------------

void Generator::random_registers(State& state) {
  for (auto& reg : state.gpr) reg = interesting();
  state.rip = code_rip;
  constexpr uint64_t arithmetic = 0x8d5, interrupts = 0x202, direction = 0x400, alignment = 0x4'0000;
  state.rflags = interrupts | (random() & arithmetic);
  if (chance(20)) state.rflags |= direction;
  if (chance(3)) state.rflags |= alignment;
}

void Generator::random_vectors(State& state) {
  constexpr std::array<uint32_t, 16> singles = {
      0,          0x80000000, 0x3f800000, 0xbf800000, 0x7f800000, 0xff800000, 0x7fc00000, 0x7f800001,
      0x00000001, 0x807fffff, 0x00800000, 0x7f7fffff, 0x4f000000, 0x3f000000, 0x40490fdb, 0xcf000000};
  auto& area = state.xsave;
  // Mostly plain numbers: with a special one in every lane all instructions would fault alike.
  const unsigned specials = static_cast<unsigned>(below(3)) * 15;
  for (unsigned at = 160; at + 8 <= xsave_size; at += 8) {
    uint64_t value = interesting();
    if (chance(50)) {
      value = (uint64_t{0x3f000000u + static_cast<uint32_t>(below(0x02000000))} << 32) |
              (0xbf000000u + static_cast<uint32_t>(below(0x02000000)));
    } else if (chance(50)) {
      value = std::bit_cast<uint64_t>(static_cast<double>(static_cast<int64_t>(random())) / 65536.0);
    }
    if (chance(specials))
      value = chance(50)
                  ? uint64_t{singles[below(16)]} << 32 | singles[below(16)]
                  : std::bit_cast<uint64_t>(static_cast<double>(std::bit_cast<float>(singles[below(16)])));
    if (at == 416) at = 576;  // past the XMM registers: header and unused bytes stay zero
    put(area, at, value);
  }
  const auto& host = kvm::soft::simd::host();
  if (host.avx512) {
    for (unsigned i = 0; i < 8; ++i)
      put(area, host.offset[kvm::soft::simd::component::opmask] + 8 * i,
          chance(30) ? ~uint64_t{0} : interesting());
  }

  // x87: control with all exceptions masked more often than not, tags and TOP at random, ES as they imply.
  const auto fcw = static_cast<uint16_t>(chance(60) ? 0x37f : (random() & 0xf3f) | 0x40);
  auto fsw = static_cast<uint16_t>(random() & 0x7f00 & ~0x80u);
  if (chance(15)) fsw |= static_cast<uint16_t>(random() & 0x7f);
  if ((fsw & ~fcw & 0x3f) != 0) fsw |= 0x8080;
  put(area, 0, fcw);
  put(area, 2, fsw);
  area[4] = chance(50) ? 0xff : static_cast<uint8_t>(random());
  for (unsigned i = 0; i < 8; ++i) {
    constexpr std::array<uint16_t, 8> exponents = {0, 0x7fff, 0xffff, 0x3fff, 1, 0x7ffe, 0x8000, 0x4000};
    const uint16_t exponent =
        chance(30) ? exponents[below(8)] : static_cast<uint16_t>((0x3fc0 + below(128)) | (random() & 0x8000));
    uint64_t fraction = chance(85) ? interesting() | uint64_t{1} << 63 : interesting();
    if (exponent == 0 && chance(50)) fraction = 0;
    put(area, 32 + 16 * i, fraction);
    put(area, 32 + 16 * i + 8, exponent);
    put(area, 32 + 16 * i + 10, uint32_t{0});
    put(area, 32 + 16 * i + 14, uint16_t{0});
  }
  uint32_t mxcsr = 0x1f80;
  if (chance(40)) mxcsr = static_cast<uint32_t>(random() & 0xffc0) | 0x1f80;
  if (chance(15)) mxcsr = static_cast<uint32_t>(random() & 0xffff);
  if (chance(2)) mxcsr |= 0x2'0000 & host.mxcsr_mask;
  put(area, 24, mxcsr);
}

void Generator::fill_memory(std::array<uint8_t, window_size>& memory) {
  for (unsigned at = 0; at < window_size; at += 8) {
    uint64_t value = interesting();
    if (chance(40))
      value = std::bit_cast<uint64_t>(static_cast<double>(static_cast<int32_t>(random())) / 256.0);
    std::memcpy(&memory[at], &value, 8);
  }
}

// ---- Addresses
// ---------------------------------------------------------------------------------------------

// Where an operand goes: mostly the middle of the window, sometimes across a page, into the read-only page,
// or off either end.
uint64_t Generator::target(unsigned size, unsigned alignment) {
  const uint64_t where = below(100);
  const uint64_t reach = size == 0 ? 1 : size;
  const uint64_t offset = below(page) & ~uint64_t{alignment - 1u};
  if (where < 80) return window_base + page / 2 + offset;
  if (where < 87) return window_base + page - below(reach);
  if (where < 93) return window_base + window_writable + (below(page) & ~uint64_t{alignment - 1u});
  if (where < 95) return window_base + window_writable - below(reach);
  if (where < 98) return window_base - 1 - below(reach + 8);
  return window_base + window_size - below(reach);
}

bool Generator::aim(Case& c, const Instruction& instruction, const ZydisDecodedOperand& operand) {
  const ZydisDecodedInstruction& insn = instruction.insn;
  const auto& memory = operand.mem;
  const unsigned size = operand.size / 8u;
  const unsigned alignment = size >= 16   ? (chance(75) ? 64 : 1)
                             : chance(70) ? std::bit_floor(std::max(1u, size))
                                          : 1;
  uint64_t goal = target(size, alignment);
  const bool narrow = insn.address_width == 32 && !bits32_;
  const bool vsib = memory.type == ZYDIS_MEMOP_TYPE_VSIB;
  const auto disp = static_cast<uint64_t>(insn.raw.disp.size == 0 ? 0 : memory.disp.value);
  // Zydis 4.0 takes SIB.base = 101 with ModRM.mod = 00 for R13D when REX.B is set.
  const bool bare = insn.raw.modrm.mod == 0 && insn.raw.modrm.rm == 4 && (insn.raw.sib.base & 7) == 5;
  const bool has_base = memory.base != ZYDIS_REGISTER_NONE && !bare;
  const bool has_index = !vsib && memory.index != ZYDIS_REGISTER_NONE;
  const auto junk = [&](uint64_t value) { return narrow ? (value & 0xffff'ffff) | (random() << 32) : value; };
  const auto set_disp = [&](uint64_t value) {
    if (insn.raw.disp.size != 32) return false;
    const auto word = static_cast<uint32_t>(value);
    std::memcpy(&c.code[insn.raw.disp.offset], &word, 4);
    return true;
  };
  if (memory.base == ZYDIS_REGISTER_RIP || memory.base == ZYDIS_REGISTER_EIP)
    return set_disp(goal - (code_rip + insn.length));
  if (!has_base && !has_index) {
    // MOV with a 64-bit absolute address has no ModRM.
    if (insn.raw.disp.size == 64) return std::memcpy(&c.code[insn.raw.disp.offset], &goal, 8) != nullptr;
    return set_disp(goal);
  }
  auto& gpr = c.state.gpr;
  if (!has_index) {
    if (!vsib && !bits32_ && chance(1))
      goal = random() | 0x8000'0000'0000'0000 | window_base;  // not canonical
    gpr[number(memory.base)] = junk(goal - disp);
    return true;
  }
  const unsigned index = number(memory.index);
  const uint64_t scale = memory.scale;
  if (!has_base) {
    gpr[index] = junk(below(4096));
    return set_disp(goal - (gpr[index] & 0xffff'ffff) * scale);
  }
  const unsigned base = number(memory.base);
  if (base == index) {
    if (scale == 1 && ((goal - disp) & 1) != 0) --goal;
    gpr[base] = scale == 1 ? (goal - disp) / 2 : (goal - disp) * inverse(1 + scale);
    return true;
  }
  const bool hidden_memory = insn.operand_count > insn.operand_count_visible;
  gpr[index] = hidden_memory || chance(80) ? below(4096) : interesting();
  gpr[base] = junk(goal - disp - gpr[index] * scale);
  return true;
}

void Generator::place_implicit(Case& c, const Instruction& instruction) {
  const ZydisDecodedInstruction& insn = instruction.insn;
  auto& gpr = c.state.gpr;
  // Whatever uses them without saying so finds the window.
  for (const unsigned reg : {3u, 4u, 5u, 6u, 7u}) gpr[reg] = target(8, chance(80) ? 8 : 1);
  if (is_string(insn)) gpr[1] = chance(90) ? below(40) : below(2000);
  // Whether bytes that are masked off can fault is left to the implementation.
  if (insn.mnemonic == ZYDIS_MNEMONIC_MASKMOVDQU || insn.mnemonic == ZYDIS_MNEMONIC_VMASKMOVDQU ||
      insn.mnemonic == ZYDIS_MNEMONIC_MASKMOVQ)
    gpr[7] = window_base + below(window_writable - 16);
}

bool Generator::place_operand(Case& c, const Instruction& instruction) {
  const ZydisDecodedInstruction& insn = instruction.insn;
  for (unsigned i = 0; i < insn.operand_count_visible; ++i) {
    const ZydisDecodedOperand& operand = instruction.operands[i];
    if (operand.type != ZYDIS_OPERAND_TYPE_MEMORY || operand.mem.type == ZYDIS_MEMOP_TYPE_AGEN ||
        operand.visibility != ZYDIS_OPERAND_VISIBILITY_EXPLICIT)
      continue;
    if (!aim(c, instruction, operand)) return false;
    if (operand.mem.type == ZYDIS_MEMOP_TYPE_VSIB) {
      // Small indices of either width: 32-bit values whose high half is the sign, too.
      const unsigned reg = number(operand.mem.index);
      const auto& host = kvm::soft::simd::host();
      for (unsigned lane = 0; lane < 8; ++lane) {
        const bool wide = (insn.opcode & 1) != 0;
        const auto small = [&] { return static_cast<int64_t>(below(64)) - 32; };
        const auto value = wide ? static_cast<uint64_t>(small())
                                : (static_cast<uint64_t>(small()) << 32 |
                                   static_cast<uint32_t>(static_cast<int32_t>(small())));
        size_t at = 0;
        using namespace kvm::soft::simd;
        if (reg >= 16) {
          at = host.offset[component::hi16_zmm] + 64 * (reg - 16) + 8 * lane;
        } else if (lane < 2) {
          at = 160 + 16 * reg + 8 * lane;
        } else if (lane < 4) {
          at = host.offset[component::avx] + 16 * reg + 8 * (lane - 2);
        } else {
          at = host.offset[component::zmm_hi256] + 32 * reg + 8 * (lane - 4);
        }
        if (at + 8 <= xsave_size) put(c.state.xsave, at, value);
      }
    }
    if (is_bit_test(insn.mnemonic) && instruction.operands[1].type == ZYDIS_OPERAND_TYPE_REGISTER) {
      // The bit offset is part of the address.
      const unsigned reg = number(instruction.operands[1].reg.value);
      if ((operand.mem.base != ZYDIS_REGISTER_NONE && number(operand.mem.base) == reg) ||
          (operand.mem.index != ZYDIS_REGISTER_NONE && number(operand.mem.index) == reg))
        return false;
      c.state.gpr[reg] = below(8000) - 4000;
    }
  }
  return true;
}

bool Generator::decode(std::span<const uint8_t> bytes, Instruction& instruction) const {
  return ZYAN_SUCCESS(ZydisDecoderDecodeFull(&decoder_, bytes.data(), std::min<size_t>(bytes.size(), 15),
                                             &instruction.insn, instruction.operands.data())) &&
         acceptable(instruction);
}

bool Generator::invent(Case& c, Instruction& instruction) {
  invent_bytes(c);
  if (!decode(c.code, instruction)) return false;
  // An even spread over mnemonics: moves and the like would otherwise crowd out the rest.
  return counts_[instruction.insn.mnemonic] <= 8 + 3 * total_ / (counts_.size() + 1);
}

void Generator::count(const Instruction& instruction) {
  ++counts_[instruction.insn.mnemonic];
  ++total_;
}

void Generator::invent_state(State& state) {
  random_registers(state);
  random_vectors(state);
}

void Generator::next(Case& c, Instruction& instruction) {
  for (;;) {
    if (!invent(c, instruction)) continue;
    invent_state(c.state);
    place_implicit(c, instruction);
    if (!place_operand(c, instruction)) continue;
    if (bits32_)
      for (auto& reg : c.state.gpr) reg &= 0xffff'ffff;
    count(instruction);
    break;
  }
  c.length = instruction.insn.length;
  c.bits32 = bits32_;
  // Repeated strings trap at each repetition, gathers and scatters after some elements.
  c.whole = instruction.insn.meta.category == ZYDIS_CATEGORY_GATHER ||
            instruction.insn.meta.category == ZYDIS_CATEGORY_AVX2GATHER ||
            instruction.insn.meta.category == ZYDIS_CATEGORY_SCATTER;
  c.whole = c.whole || (is_string(instruction.insn) && repeated(instruction.insn));
  std::fill(c.code.begin() + c.length, c.code.begin() + longest, uint8_t{0xcc});
}

}  // namespace lodge::oracle
