// What the emitter and the copier write, read back by Zydis; and what the analysis says of an instruction.
#include <gtest/gtest.h>

#include <array>
#include <vector>

#include "kvm/soft/decode/decoder.hpp"
#include "kvm/soft/interpret/vector/test_support.hpp"
#include "kvm/soft/translate/copy.hpp"

namespace lodge::kvm::soft {
namespace {

using Bytes = std::vector<uint8_t>;

struct Decoded {
  ZydisDecodedInstruction insn{};
  std::array<ZydisDecodedOperand, ZYDIS_MAX_OPERAND_COUNT> operands{};
  std::string text;
};

// All instructions of [begin, end) as text, "; " between them. 64-bit code.
std::string disassemble(const uint8_t* begin, const uint8_t* end) {
  ZydisDecoder decoder;
  ZydisDecoderInit(&decoder, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
  ZydisFormatter formatter;
  ZydisFormatterInit(&formatter, ZYDIS_FORMATTER_STYLE_INTEL);
  ZydisFormatterSetProperty(&formatter, ZYDIS_FORMATTER_PROP_FORCE_SIZE, ZYAN_TRUE);
  std::string all;
  while (begin < end) {
    Decoded d;
    if (!ZYAN_SUCCESS(ZydisDecoderDecodeFull(&decoder, begin, static_cast<size_t>(end - begin), &d.insn,
                                             d.operands.data())))
      return all + "(bad)";
    char text[128];
    ZydisFormatterFormatInstruction(&formatter, &d.insn, d.operands.data(), d.insn.operand_count_visible,
                                    text, sizeof text, ZYDIS_RUNTIME_ADDRESS_NONE, nullptr);
    if (!all.empty()) all += "; ";
    all += text;
    begin += d.insn.length;
  }
  return all;
}

template <class Emit>
std::string emitted(Emit emit) {
  std::array<uint8_t, 256> code{};
  Emitter e(code.data(), code.data() + code.size());
  emit(e);
  return disassemble(code.data(), e.at());
}

TEST(Emitter, ReachesTheStateByShortAndLongDisplacements) {
  EXPECT_EQ(emitted([](Emitter& e) { e.load(10, 8); }), "mov r10, qword ptr [rsp+0x08]");
  EXPECT_EQ(emitted([](Emitter& e) { e.load(3, 0x1234); }), "mov rbx, qword ptr [rsp+0x1234]");
  EXPECT_EQ(emitted([](Emitter& e) { e.load(11, -128); }), "mov r11, qword ptr [rsp-0x80]");
  EXPECT_EQ(emitted([](Emitter& e) { e.load(11, 128); }), "mov r11, qword ptr [rsp+0x80]");
  EXPECT_EQ(emitted([](Emitter& e) { e.store(0x100, 11); }), "mov qword ptr [rsp+0x100], r11");
  EXPECT_EQ(emitted([](Emitter& e) { e.load32(11, 4); }), "mov r11d, dword ptr [rsp+0x04]");
  EXPECT_EQ(emitted([](Emitter& e) { e.state(0x0fb7, 0, 16, false); }), "movzx eax, word ptr [rsp+0x10]");
  EXPECT_EQ(emitted([](Emitter& e) { e.indexed(0x2b, 10, 11, 0, 64); }),
            "sub r10, qword ptr [rsp+r11*1+0x40]");
  EXPECT_EQ(emitted([](Emitter& e) { e.indexed(0x39, 10, 11, 3, 0x5000); }),
            "cmp qword ptr [rsp+r11*8+0x5000], r10");
}

TEST(Emitter, MovesImmediatesInTheShortestFormThatKeepsThem) {
  EXPECT_EQ(emitted([](Emitter& e) { e.move_immediate(1, 5); }), "mov ecx, 0x05");
  EXPECT_EQ(emitted([](Emitter& e) { e.move_immediate(10, 0xffffffff); }), "mov r10d, 0xFFFFFFFF");
  EXPECT_EQ(emitted([](Emitter& e) { e.move_immediate(10, ~uint64_t{1}); }), "mov r10, 0xFFFFFFFFFFFFFFFE");
  EXPECT_EQ(emitted([](Emitter& e) { e.move_immediate(11, 0x1'0000'0000); }), "mov r11, 0x100000000");
  EXPECT_EQ(emitted([](Emitter& e) { e.move(10, 3); }), "mov r10, rbx");
  EXPECT_EQ(emitted([](Emitter& e) { e.move(11, 10, false); }), "mov r11d, r10d");
}

// Every base, index and displacement has its special cases in the encoding: RSP, RBP, R12, R13, none.
TEST(Emitter, LeaNamesWhatItWasGiven) {
  for (unsigned base = 0; base <= 16; ++base)
    for (unsigned index = 0; index <= 16; ++index)
      for (const int64_t disp : {0L, 1L, -128L, 128L, 0x12345L}) {
        if (index == 4 || (base == 16 && index == 16)) continue;
        std::array<uint8_t, 32> code{};
        Emitter e(code.data(), code.data() + code.size());
        e.lea(11, base, index, 2, disp, true);
        ZydisDecoder decoder;
        ZydisDecoderInit(&decoder, ZYDIS_MACHINE_MODE_LONG_64, ZYDIS_STACK_WIDTH_64);
        Decoded d;
        ASSERT_TRUE(ZYAN_SUCCESS(
            ZydisDecoderDecodeFull(&decoder, code.data(), code.size(), &d.insn, d.operands.data())));
        EXPECT_EQ(code.data() + d.insn.length, e.at());
        EXPECT_EQ(d.insn.mnemonic, ZYDIS_MNEMONIC_LEA);
        EXPECT_EQ(d.operands[0].reg.value, ZYDIS_REGISTER_R11);
        const auto& m = d.operands[1].mem;
        const auto reg = [](unsigned n) {
          return n == 16 ? ZYDIS_REGISTER_NONE : static_cast<ZydisRegister>(ZYDIS_REGISTER_RAX + n);
        };
        EXPECT_EQ(m.base, reg(base)) << base << " " << index << " " << disp;
        EXPECT_EQ(m.index, reg(index)) << base << " " << index << " " << disp;
        EXPECT_EQ(m.scale, index == 16 ? 0 : 4);
        EXPECT_EQ(m.disp.value, disp) << base << " " << index;
      }
}

TEST(Emitter, PatchesJumps) {
  std::array<uint8_t, 32> code{};
  Emitter e(code.data(), code.data() + code.size());
  uint8_t* const place = e.jump_if(5);
  e.u8(0x90);
  Emitter::patch(place, e.at());
  e.jump_to(code.data());
  EXPECT_EQ(disassemble(code.data(), e.at()), "jnz +0x07; nop; jmp -0x07");
}

// --- copies

class Copies : public testing::Test {
 protected:
  // The guest's instruction as analysis would find it. Only what copying looks at is filled in.
  Instruction parse(std::initializer_list<uint8_t> bytes, bool long_mode = true) {
    ZydisDecoder decoder;
    ZydisDecoderInit(&decoder, long_mode ? ZYDIS_MACHINE_MODE_LONG_64 : ZYDIS_MACHINE_MODE_LEGACY_32,
                     long_mode ? ZYDIS_STACK_WIDTH_64 : ZYDIS_STACK_WIDTH_32);
    Instruction i;
    std::copy(bytes.begin(), bytes.end(), i.bytes.begin());
    EXPECT_TRUE(ZYAN_SUCCESS(
        ZydisDecoderDecodeFull(&decoder, i.bytes.data(), bytes.size(), &i.insn, i.operands.data())));
    EXPECT_EQ(i.insn.length, bytes.size());
    for (unsigned n = 0; n < i.insn.operand_count; ++n) {
      const ZydisDecodedOperand& o = i.operands[n];
      if (o.type != ZYDIS_OPERAND_TYPE_REGISTER || o.visibility == ZYDIS_OPERAND_VISIBILITY_HIDDEN) continue;
      const ZydisRegisterClass c = ZydisRegisterGetClass(o.reg.value);
      if (c >= ZYDIS_REGCLASS_GPR8 && c <= ZYDIS_REGCLASS_GPR64)
        i.operand_registers |= static_cast<uint16_t>(1u << gpr_offset(o.reg.value) / 8);
    }
    return i;
  }
  std::string registers(std::initializer_list<uint8_t> bytes, const Standins& standins = {},
                        bool long_mode = true) {
    const Instruction i = parse(bytes, long_mode);
    return emitted([&](Emitter& e) { copy_registers(e, i, standins); });
  }
  std::string memory(std::initializer_list<uint8_t> bytes, int64_t disp, const Standins& standins = {},
                     bool long_mode = true) {
    const Instruction i = parse(bytes, long_mode);
    return emitted([&](Emitter& e) { copy_memory(e, i, standins, disp); });
  }
};

TEST_F(Copies, ReplaceRegistersThatLiveInMemory) {
  const Standins rsp_as_r10{.for_rsp = 10}, r10_as_r11{.for_r10 = 11}, r11_as_r10{.for_r11 = 10};
  EXPECT_EQ(registers({0x48, 0x01, 0xd8}), "add rax, rbx");
  EXPECT_EQ(registers({0x48, 0x89, 0xe5}, rsp_as_r10), "mov rbp, r10");
  EXPECT_EQ(registers({0x48, 0x83, 0xe4, 0xf0}, rsp_as_r10), "and r10, 0xFFFFFFFFFFFFFFF0");
  EXPECT_EQ(registers({0x40, 0x88, 0xe0}, rsp_as_r10), "mov al, r10b");  // SPL
  EXPECT_EQ(registers({0x4d, 0x01, 0xd1}, r10_as_r11), "add r9, r11");
  EXPECT_EQ(registers({0x41, 0xba, 1, 2, 3, 4}, r10_as_r11), "mov r11d, 0x4030201");
  EXPECT_EQ(registers({0x49, 0x0f, 0xcb}, r11_as_r10), "bswap r10");
  EXPECT_EQ(registers({0x4d, 0x0f, 0xaf, 0xda}, {.for_r10 = 10, .for_r11 = 11}), "imul r11, r10");
  EXPECT_EQ(registers({0x66, 0x45, 0x0f, 0x3a, 0x16, 0xda, 1}, {.for_r10 = 11}), "pextrd r11d, xmm11, 0x01");
  EXPECT_EQ(registers({0xc4, 0x42, 0x28, 0xf2, 0xc3}, {.for_r10 = 11, .for_r11 = 10}),
            "andn r8d, r11d, r10d");
}

// 40 to 4F are INC and DEC in 32-bit code.
TEST_F(Copies, ReencodeShortIncrements) {
  EXPECT_EQ(registers({0x43}, {}, false), "inc ebx");
  EXPECT_EQ(registers({0x4c}, {.for_rsp = 10}, false), "dec r10d");
}

TEST_F(Copies, ReplaceTheMemoryOperand) {
  EXPECT_EQ(memory({0x48, 0x8b, 0x04, 0xcb}, 0), "mov rax, qword ptr [r10]");
  EXPECT_EQ(memory({0x48, 0x8b, 0x45, 0xf8}, 0x20), "mov rax, qword ptr [r10+0x20]");
  EXPECT_EQ(memory({0xc7, 0x05, 1, 0, 0, 0, 7, 0, 0, 0}, -200), "mov dword ptr [r10-0xC8], 0x07");
  EXPECT_EQ(memory({0x4c, 0x89, 0x1e}, 8, {.for_r11 = 11}), "mov qword ptr [r10+0x08], r11");
  EXPECT_EQ(memory({0xf0, 0x48, 0x0f, 0xb1, 0x0e}, 0), "lock cmpxchg qword ptr [r10], rcx");
  EXPECT_EQ(memory({0x66, 0xc1, 0x26, 3}, 4), "shl word ptr [r10+0x04], 0x03");
  EXPECT_EQ(memory({0x0f, 0xb6, 0x06}, 0), "movzx eax, byte ptr [r10]");
  EXPECT_EQ(memory({0xa1, 0, 0, 0, 0xc0}, 0, {}, false), "mov eax, dword ptr [r10]");
  EXPECT_EQ(memory({0xa2, 0, 0, 0, 0xc0}, 4, {}, false), "mov byte ptr [r10+0x04], al");
  EXPECT_EQ(memory({0x66, 0xa3, 0, 0, 0, 0xc0}, 0, {}, false), "mov word ptr [r10], ax");
  EXPECT_EQ(memory({0x66, 0x0f, 0x6f, 0x0e}, 16), "movdqa xmm1, xmmword ptr [r10+0x10]");
  EXPECT_EQ(memory({0xf3, 0x44, 0x0f, 0x6f, 0x3e}, 16), "movdqu xmm15, xmmword ptr [r10+0x10]");
  EXPECT_EQ(memory({0xc5, 0xf5, 0xfe, 0x06}, 32), "vpaddd ymm0, ymm1, ymmword ptr [r10+0x20]");
  // The displacement of EVEX forms is scaled when it is short.
  EXPECT_EQ(memory({0x62, 0xf1, 0xfd, 0x48, 0x6f, 0x4e, 1}, 64), "vmovdqa64 zmm1, zmmword ptr [r10+0x40]");
  EXPECT_EQ(memory({0xdd, 0x46, 8}, 8), "fld qword ptr [r10+0x08]");
}

// --- analysis

enum : Flags { CF = 1, PF = 4, AF = 0x10, ZF = 0x40, SF = 0x80, OF = 0x800 };

class Analysis : public testing::Test, protected simd::TestMachine {
 protected:
  Instruction analysed(const Bytes& bytes) {
    std::array<uint8_t, 16> padded{};
    std::copy(bytes.begin(), bytes.end(), padded.begin());
    op_ = {};
    decoder.decode(cpu, code, padded.data(), 15, op_);
    EXPECT_EQ(op_.length, bytes.size());
    ZydisDecoder zydis;
    EXPECT_TRUE(translator_decoder(cpu, zydis));
    Instruction i;
    analyse(cpu, zydis, padded.data(), op_.length, op_, i);
    return i;
  }

 private:
  Op op_;
};

struct Row {
  Bytes bytes;
  Kind kind;
  Flags reads, writes, replaces;
};

TEST_F(Analysis, KnowsTheFlagsOfIntegerInstructions) {
  const Flags all = all_flags;
  const Row rows[] = {
      {{0x48, 0x01, 0xd8}, Kind::copy, 0, all, all},                      // add
      {{0x48, 0x11, 0xd8}, Kind::copy, CF, all, all},                     // adc
      {{0x48, 0x31, 0xd8}, Kind::copy, 0, all, all},                      // xor
      {{0x48, 0x89, 0xd8}, Kind::copy, 0, 0, 0},                          // mov
      {{0x48, 0xff, 0xc0}, Kind::copy, 0, all & ~CF, all & ~CF},          // inc keeps CF
      {{0x48, 0xc1, 0xe0, 3}, Kind::copy, 0, all, all},                   // shl by 3
      {{0x48, 0xc1, 0xe0, 0}, Kind::copy, 0, all, 0},                     // shl by 0 changes nothing
      {{0x48, 0xd3, 0xe0}, Kind::copy, 0, all, 0},                        // shl by CL perhaps
      {{0xf8}, Kind::copy, 0, CF, CF},                                    // clc
      {{0x9f}, Kind::copy, all, 0, 0},                                    // lahf
      {{0x0f, 0x94, 0xc0}, Kind::copy, ZF, 0, 0},                         // sete
      {{0x48, 0x0f, 0x4f, 0xc3}, Kind::copy, Flags{ZF | SF | OF}, 0, 0},  // cmovg
      {{0x48, 0x8d, 0x04, 0x0b}, Kind::address, 0, 0, 0},                 // lea
      {{0x0f, 0x1f, 0x40, 0}, Kind::nothing, 0, 0, 0},                    // nop
  };
  for (const Row& row : rows) {
    const Instruction i = analysed(row.bytes);
    const auto name = ZydisMnemonicGetString(i.insn.mnemonic);
    EXPECT_EQ(i.kind, row.kind) << name;
    EXPECT_EQ(i.reads, row.reads) << name;
    EXPECT_EQ(i.writes, row.writes) << name;
    EXPECT_EQ(i.replaces, row.replaces) << name;
  }
}

TEST_F(Analysis, KnowsWhatKindAnInstructionIs) {
  const std::pair<Bytes, Kind> rows[] = {
      {{0x55}, Kind::push},
      {{0x6a, 1}, Kind::push},
      {{0x54}, Kind::complex},  // push rsp
      {{0x5d}, Kind::pop},
      {{0x5c}, Kind::pop},  // pop rsp
      {{0xff, 0x36}, Kind::push_memory},
      {{0x66, 0x55}, Kind::complex},  // push bp
      {{0xc9}, Kind::leave},
      {{0xe8, 0, 0, 0, 0}, Kind::call},
      {{0xff, 0xd0}, Kind::call_indirect},
      {{0xff, 0xd4}, Kind::complex},  // call rsp
      {{0xc3}, Kind::ret},
      {{0xeb, 0}, Kind::jump},
      {{0xff, 0xe0}, Kind::jump_indirect},
      {{0x75, 0}, Kind::branch},
      {{0xe2, 0}, Kind::loop},
      {{0xe3, 0}, Kind::loop},        // jrcxz
      {{0x67, 0xe1, 0}, Kind::loop},  // loope, by ECX
      {{0x48, 0x8b, 0x06}, Kind::memory},
      {{0x8a, 0x26}, Kind::complex},                     // mov ah, [rsi]: no REX beside AH
      {{0x48, 0x0f, 0xa3, 0x06}, Kind::bit_test},        // bt [rsi], rax reaches beyond
      {{0xf0, 0x48, 0x0f, 0xab, 0x06}, Kind::bit_test},  // lock bts [rsi], rax
      {{0x66, 0x0f, 0xab, 0x06}, Kind::complex},         // of 16 bits
      {{0xa4}, Kind::string},
      {{0x66, 0xa7}, Kind::string},
      {{0x48, 0xab}, Kind::string},
      {{0x67, 0xac}, Kind::complex},  // lodsb by ESI
      {{0x65, 0xa5}, Kind::complex},  // movsd from GS
      {{0x0f, 0x01, 0xf8}, Kind::swap_gs},
      {{0xfa}, Kind::clear_if},
      {{0x0f, 0x31}, Kind::read_tsc},
      {{0x8c, 0xd8}, Kind::read_segment},
      {{0x48, 0x0f, 0xba, 0x26, 3}, Kind::memory},
      {{0xf3, 0xa4}, Kind::complex},  // rep movsb
      {{0xf2, 0xae}, Kind::complex},  // repne scasb
      {{0x0f, 0xa2}, Kind::complex},  // cpuid
      {{0xf4}, Kind::complex},        // hlt
      {{0xf3, 0x90}, Kind::pause},
      {{0xf3, 0x41, 0x90}, Kind::complex},  // xchg r8d, eax
      {{0x9c}, Kind::push_flags},
      {{0x66, 0x9c}, Kind::complex},  // pushf of 16 bits
      {{0x9d}, Kind::pop_flags},
      {{0x66, 0x9d}, Kind::complex},  // popf of 16 bits
      {{0xfd}, Kind::set_df},
      {{0x0f, 0x0b}, Kind::complex},  // ud2
  };
  for (const auto& [bytes, kind] : rows) {
    const Instruction i = analysed(bytes);
    EXPECT_EQ(i.kind, kind) << ZydisMnemonicGetString(i.insn.mnemonic);
    if (kind == Kind::complex) {
      EXPECT_EQ(i.reads, all_flags) << ZydisMnemonicGetString(i.insn.mnemonic);
    }
  }
}

TEST_F(Analysis, KnowsRegistersAndMemory) {
  Instruction i = analysed({0x4c, 0x01, 0x54, 0xcc, 8});  // add [rsp + rcx * 8 + 8], r10
  EXPECT_EQ(i.kind, Kind::memory);
  EXPECT_TRUE(i.memory_read && i.memory_write);
  EXPECT_EQ(i.memory_size, 8);
  EXPECT_EQ(i.operand_registers, 1u << 10);
  EXPECT_EQ(i.written_registers, 0);
  EXPECT_EQ(i.address_registers, 1u << rsp | 1u << rcx);
  i = analysed({0x48, 0xf7, 0xe3});  // mul rbx
  EXPECT_EQ(i.written_registers, 1u << rax | 1u << rdx);
  EXPECT_FALSE(i.may_fault);
  i = analysed({0x48, 0xf7, 0xf3});  // div rbx
  EXPECT_TRUE(i.may_fault);
  i = analysed({0x67, 0x8b, 0x06});  // mov eax, [esi]
  EXPECT_TRUE(i.narrow_address);
}

TEST_F(Analysis, KnowsTheVectorLevel) {
  // After a reset x87 exceptions are unmasked, and such code is the interpreter's.
  EXPECT_EQ(analysed({0x66, 0x0f, 0xfe, 0xc1}).kind, Kind::complex);
  cpu.vector.fx[0] = 0x7f;
  cpu.state_changed();
  EXPECT_EQ(analysed({0x66, 0x0f, 0xfe, 0xc1}).level, 1);  // paddd xmm0, xmm1
  EXPECT_EQ(analysed({0xd9, 0xe8}).level, 3);              // fld1
  EXPECT_EQ(analysed({0x0f, 0xfe, 0xc1}).level, 3);        // paddd mm0, mm1
  EXPECT_EQ(analysed({0x0f, 0xae, 0x1e}).level, 1);        // stmxcsr [rsi]
  EXPECT_EQ(analysed({0xd9, 0x3e}).kind, Kind::memory);    // fnstcw [rsi]
  EXPECT_EQ(analysed({0xdf, 0xe0}).kind, Kind::copy);      // fnstsw ax
  EXPECT_EQ(analysed({0x0f, 0xae, 0x16}).kind, Kind::load_control);
  EXPECT_EQ(analysed({0xd9, 0x2e}).level, 3);  // fldcw [rsi]
  EXPECT_EQ(analysed({0x9b}).kind, Kind::nothing);
  EXPECT_EQ(analysed({0x48, 0x01, 0xd8}).level, 0);
  // Aligned by nature: a misaligned operand faults natively.
  EXPECT_TRUE(analysed({0x66, 0x0f, 0x6f, 0x06}).may_fault);   // movdqa
  EXPECT_FALSE(analysed({0x66, 0x0f, 0x7e, 0x06}).may_fault);  // movd
}

}  // namespace
}  // namespace lodge::kvm::soft
