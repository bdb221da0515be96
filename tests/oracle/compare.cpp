#include "compare.hpp"

#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "kvm/soft/interpret/vector/host.hpp"

namespace lodge::oracle {
namespace {

namespace component = kvm::soft::simd::component;

constexpr const char* gpr_names[16] = {"rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
                                       "r8",  "r9",  "r10", "r11", "r12", "r13", "r14", "r15"};
constexpr uint64_t cf = 1, pf = 4, af = 0x10, zf = 0x40, sf = 0x80, tf = 0x100, of = 0x800;

}  // namespace

std::string format(const char* text, ...) {
  char buffer[256];
  va_list arguments;
  va_start(arguments, text);
  vsnprintf(buffer, sizeof(buffer), text, arguments);
  va_end(arguments);
  return buffer;
}

namespace {

std::string hex(const uint8_t* bytes, size_t size) {
  std::string out;
  for (size_t i = size; i-- > 0;) out += format("%02x", bytes[i]);
  return out;
}

// Shift and rotate counts decide which flags are defined.
unsigned shift_count(const Case& c, const Instruction& instruction) {
  const unsigned width = instruction.operands[0].size;
  uint64_t count = 1;
  const auto& last = instruction.operands[instruction.insn.operand_count_visible - 1u];
  if (last.type == ZYDIS_OPERAND_TYPE_IMMEDIATE) {
    count = last.imm.value.u;
  } else if (last.type == ZYDIS_OPERAND_TYPE_REGISTER) {
    count = c.state.gpr[1];
  }
  return static_cast<unsigned>(count & (width == 64 ? 63 : 31));
}

uint64_t undefined_flags(const Case& c, const Instruction& instruction) {
  const ZydisDecodedInstruction& insn = instruction.insn;
  uint64_t mask = insn.cpu_flags != nullptr ? insn.cpu_flags->undefined & (cf | pf | af | zf | sf | of) : 0;
  switch (insn.mnemonic) {
    case ZYDIS_MNEMONIC_SHL:
    case ZYDIS_MNEMONIC_SHR:
    case ZYDIS_MNEMONIC_SAR:
    case ZYDIS_MNEMONIC_SHLD:
    case ZYDIS_MNEMONIC_SHRD: {
      const unsigned count = shift_count(c, instruction), width = instruction.operands[0].size;
      mask = count == 0 ? 0 : af | (count == 1 ? 0 : of);
      // Beyond the operand's width CF is undefined, and for SHLD and SHRD everything.
      if (count >= width && insn.mnemonic != ZYDIS_MNEMONIC_SAR) mask |= cf;
      if (count > width && (insn.mnemonic == ZYDIS_MNEMONIC_SHLD || insn.mnemonic == ZYDIS_MNEMONIC_SHRD))
        mask |= cf | pf | zf | sf | of;
      return mask;
    }
    case ZYDIS_MNEMONIC_ROL:
    case ZYDIS_MNEMONIC_ROR:
    case ZYDIS_MNEMONIC_RCL:
    case ZYDIS_MNEMONIC_RCR: return shift_count(c, instruction) <= 1 ? 0 : of;
    // The processor divides in both.
    case ZYDIS_MNEMONIC_DIV:
    case ZYDIS_MNEMONIC_IDIV: return 0;
    default: return mask;
  }
}

// SHLD and SHRD of 16-bit operands by more than 16 have an undefined result. A POPA that faults halfway may
// have changed registers: it starts anew.
bool undefined_result(const Case& c, const Instruction& instruction, bool faulted) {
  const ZydisMnemonic mnemonic = instruction.insn.mnemonic;
  if (faulted && (mnemonic == ZYDIS_MNEMONIC_POPA || mnemonic == ZYDIS_MNEMONIC_POPAD)) return true;
  return (mnemonic == ZYDIS_MNEMONIC_SHLD || mnemonic == ZYDIS_MNEMONIC_SHRD) &&
         shift_count(c, instruction) > instruction.operands[0].size;
}

// Which of its two operands CMPS reads first is not said.
bool is_compare_string(ZydisMnemonic mnemonic) {
  return mnemonic == ZYDIS_MNEMONIC_CMPSB || mnemonic == ZYDIS_MNEMONIC_CMPSW ||
         mnemonic == ZYDIS_MNEMONIC_CMPSD || mnemonic == ZYDIS_MNEMONIC_CMPSQ;
}

// The manuals leave it to the processor whether AC concerns masked operands and those of more than 8 bytes.
bool free_alignment(const Case& c, const Instruction& instruction) {
  constexpr uint64_t alignment = 0x4'0000;
  if ((c.state.rflags & alignment) == 0) return false;
  const ZydisMnemonic mnemonic = instruction.insn.mnemonic;
  // Nor is the order of the checks on several operands said.
  if (mnemonic == ZYDIS_MNEMONIC_MASKMOVQ || mnemonic == ZYDIS_MNEMONIC_ENTER || is_compare_string(mnemonic))
    return true;
  const bool masked = instruction.insn.encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX &&
                      instruction.insn.avx.mask.reg != ZYDIS_REGISTER_NONE &&
                      instruction.insn.avx.mask.reg != ZYDIS_REGISTER_K0;
  if (masked) return true;
  for (unsigned i = 0; i < instruction.insn.operand_count; ++i)
    if (instruction.operands[i].type == ZYDIS_OPERAND_TYPE_MEMORY &&
        (instruction.operands[i].size > 64 || instruction.operands[i].mem.type == ZYDIS_MEMOP_TYPE_VSIB))
      return true;
  return false;
}

// With MXCSR.MM an operand may straddle a page; unpack and shift instructions need its low half only, and may
// or may not touch the rest.
bool free_length(const Case& c, const Outcome& native, const Outcome& interpreted) {
  constexpr uint8_t misaligned_mode = 2;  // byte 2 of MXCSR
  constexpr int page_fault = 14;
  return (c.state.xsave[26] & misaligned_mode) != 0 && native.exception < 0 &&
         interpreted.exception == page_fault;
}

}  // namespace

bool has_large_area(ZydisMnemonic mnemonic) {
  switch (mnemonic) {
    case ZYDIS_MNEMONIC_FXSAVE:
    case ZYDIS_MNEMONIC_FXSAVE64:
    case ZYDIS_MNEMONIC_FXRSTOR:
    case ZYDIS_MNEMONIC_FXRSTOR64:
    case ZYDIS_MNEMONIC_FNSAVE:
    case ZYDIS_MNEMONIC_FRSTOR:
    case ZYDIS_MNEMONIC_FNSTENV:
    case ZYDIS_MNEMONIC_FLDENV: return true;
    default: return false;
  }
}

namespace {

struct Areas {
  std::array<uint8_t, xsave_size> a, b;
};

void normalise(std::array<uint8_t, xsave_size>& area) {
  uint64_t present = 0;
  std::memcpy(&present, &area[512], 8);
  const auto& host = kvm::soft::simd::host();
  if ((present & 1) == 0) {
    std::memset(&area[0], 0, 24);
    std::memset(&area[32], 0, 128);
    area[0] = 0x7f;
    area[1] = 3;
  }
  if ((present & 2) == 0) std::memset(&area[160], 0, 256);
  for (unsigned i = 2; i < component::count; ++i)
    if ((present >> i & 1) == 0 && host.size[i] != 0 && host.offset[i] + host.size[i] <= xsave_size)
      std::memset(&area[host.offset[i]], 0, host.size[i]);
}

void compare_bytes(std::string& out, const char* what, unsigned index, const uint8_t* a, const uint8_t* b,
                   size_t size) {
  if (std::memcmp(a, b, size) == 0) return;
  out += format("  %s%u: native ", what, index) + hex(a, size) + ", interpreted " + hex(b, size) + "\n";
}

Freedom freedom_of(const Case& c, const Instruction& instruction, const Outcome& native) {
  constexpr int alignment_check = 17, simd_exception = 19;
  constexpr uint32_t overflow_underflow = 0x18, inexact = 0x20;
  if (native.exception != simd_exception && native.exception != alignment_check) return {};
  uint32_t mxcsr = 0;
  std::memcpy(&mxcsr, &c.state.xsave[24], 4);
  Freedom freedom;
  if ((~(mxcsr >> 7) & overflow_underflow) != 0) freedom.mxcsr = inexact;
  // Dot products round several times: flags of an early stage stand beside a fault of a later one.
  switch (instruction.insn.mnemonic) {
    case ZYDIS_MNEMONIC_DPPS:
    case ZYDIS_MNEMONIC_DPPD:
    case ZYDIS_MNEMONIC_VDPPS:
    case ZYDIS_MNEMONIC_VDPPD: freedom.mxcsr = 0x3f; break;
    default: break;
  }
  for (unsigned i = 0; i < instruction.insn.operand_count_visible; ++i) {
    const auto& operand = instruction.operands[i];
    freedom.x87 = freedom.x87 || (operand.type == ZYDIS_OPERAND_TYPE_REGISTER &&
                                  ZydisRegisterGetClass(operand.reg.value) == ZYDIS_REGCLASS_MMX);
  }
  return freedom;
}

}  // namespace

void compare_vectors(std::string& out, const Outcome& native, const Outcome& interpreted, Freedom freedom,
                     bool bits32) {
  Areas x = {native.state.xsave, interpreted.state.xsave};
  normalise(x.a);
  normalise(x.b);
  const auto field = [&](const char* name, unsigned at, unsigned size) {
    if (std::memcmp(&x.a[at], &x.b[at], size) != 0)
      out +=
          format("  %s: native ", name) + hex(&x.a[at], size) + ", interpreted " + hex(&x.b[at], size) + "\n";
  };
  x.a[24] &= static_cast<uint8_t>(~freedom.mxcsr);
  x.b[24] &= static_cast<uint8_t>(~freedom.mxcsr);
  if (freedom.x87) std::memcpy(&x.b[0], &x.a[0], 24), std::memcpy(&x.b[32], &x.a[32], 128);
  field("fcw", 0, 2);
  field("fsw", 2, 2);
  field("ftw", 4, 1);
  // In 32-bit code the upper halves are selectors, which the kernel's 64-bit format does not show. Elsewhere
  // a processor keeps as many bits as its linear addresses have.
  const unsigned pointer_size = bits32 ? 4 : 6;
  if (!freedom.x87_pointers) {
    field("fop", 6, 2);
    field("fip", 8, pointer_size);
    field("fdp", 16, pointer_size);
  }
  field("mxcsr", 24, 4);
  for (unsigned i = 0; i < 8; ++i) compare_bytes(out, "st", i, &x.a[32 + 16 * i], &x.b[32 + 16 * i], 10);
  for (unsigned i = 0; i < 16; ++i) compare_bytes(out, "xmm", i, &x.a[160 + 16 * i], &x.b[160 + 16 * i], 16);
  const auto& host = kvm::soft::simd::host();
  const auto bank = [&](const char* name, unsigned which, unsigned first, unsigned count, unsigned size) {
    if ((host.components >> which & 1) == 0) return;
    for (unsigned i = 0; i < count; ++i)
      compare_bytes(out, name, first + i, &x.a[host.offset[which] + size * i],
                    &x.b[host.offset[which] + size * i], size);
  };
  bank("ymm_high", component::avx, 0, 16, 16);
  bank("k", component::opmask, 0, 8, 8);
  bank("zmm_high", component::zmm_hi256, 0, 16, 32);
  bank("zmm", component::hi16_zmm, 16, 16, 64);
}

void compare_registers(std::string& out, const Outcome& native, const Outcome& other, bool bits32) {
  const uint64_t mask = bits32 ? 0xffff'ffff : ~uint64_t{0};
  for (unsigned i = 0; i < (bits32 ? 8 : 16); ++i)
    if (((native.state.gpr[i] ^ other.state.gpr[i]) & mask) != 0)
      out += format("  %s: native %lx, here %lx\n", gpr_names[i], native.state.gpr[i], other.state.gpr[i]);
}

void compare_memory(std::string& out, const Outcome& native, const Outcome& other) {
  unsigned shown = 0;
  for (size_t i = 0; i < window_size && shown < 8; ++i)
    if (native.memory[i] != other.memory[i]) {
      out += format("  memory %lx: native %02x, here %02x\n", window_base + i, native.memory[i],
                    other.memory[i]);
      ++shown;
    }
}

std::string differences(const Case& c, const Instruction& instruction, const Outcome& native,
                        const Outcome& interpreted) {
  std::string out;
  if (free_length(c, native, interpreted)) return out;
  if (free_alignment(c, instruction) && (native.exception == 17) != (interpreted.exception == 17)) return out;
  // Which end of a large area is touched first is the processor's own business.
  constexpr int page_fault = 14;
  const bool both_page_faults = native.exception == page_fault && interpreted.exception == page_fault;
  if ((has_large_area(instruction.insn.mnemonic) || is_compare_string(instruction.insn.mnemonic)) &&
      both_page_faults)
    return out;
  if (native.exception != interpreted.exception || native.error != interpreted.error ||
      native.cr2 != interpreted.cr2)
    out += format("  exception: native %d error %lx cr2 %lx, interpreted %d error %lx cr2 %lx\n",
                  native.exception, native.error, native.cr2, interpreted.exception, interpreted.error,
                  interpreted.cr2);
  if (native.state.rip != interpreted.state.rip)
    out += format("  rip: native %lx, interpreted %lx\n", native.state.rip, interpreted.state.rip);
  const bool faulted = native.exception >= 0;
  const uint64_t mask = (faulted ? 0 : undefined_flags(c, instruction)) | tf;
  if (((native.state.rflags ^ interpreted.state.rflags) & ~mask) != 0)
    out += format("  rflags: native %lx, interpreted %lx (undefined %lx)\n", native.state.rflags & ~tf,
                  interpreted.state.rflags & ~tf, mask & ~tf);
  if (!undefined_result(c, instruction, faulted)) {
    compare_registers(out, native, interpreted, c.bits32);
    compare_memory(out, native, interpreted);
  }
  compare_vectors(out, native, interpreted, freedom_of(c, instruction, native), c.bits32);
  return out;
}

std::string describe(const Case& c, const Instruction& instruction) {
  ZydisFormatter formatter;
  ZydisFormatterInit(&formatter, ZYDIS_FORMATTER_STYLE_INTEL);
  char text[128];
  ZydisFormatterFormatInstruction(&formatter, &instruction.insn, instruction.operands.data(),
                                  instruction.insn.operand_count_visible, text, sizeof(text), c.state.rip,
                                  nullptr);
  std::string out;
  for (unsigned i = 0; i < c.length; ++i) out += format("%02x", c.code[i]);
  return out + "  " + text + "\n" + describe_state(c.state);
}

std::string describe_state(const State& state) {
  std::string out = format("  rflags %lx", state.rflags);
  for (unsigned i = 0; i < 16; ++i) out += format(" %s %lx", gpr_names[i], state.gpr[i]);
  uint32_t mxcsr = 0;
  std::memcpy(&mxcsr, &state.xsave[24], 4);
  return out + format("\n  fcw %s fsw %s ftw %02x mxcsr %x\n", hex(&state.xsave[0], 2).c_str(),
                      hex(&state.xsave[2], 2).c_str(), state.xsave[4], mxcsr);
}

}  // namespace lodge::oracle
