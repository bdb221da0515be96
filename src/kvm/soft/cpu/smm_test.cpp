#include "kvm/soft/cpu/smm.hpp"

#include <gtest/gtest.h>

#include "kvm/soft/cpu/cpuid_bits.hpp"
#include "kvm/soft/cpu/testing.hpp"

namespace lodge::kvm::soft {
namespace {

using namespace testing;

class SystemManagement : public ::testing::Test {
 protected:
  static constexpr uint64_t smbase = 0x100000;
  SystemManagement() {
    m.enter_long(3);
    cpu.msr.smbase = smbase;
  }
  void without_long_mode() {
    auto cpuid = host_cpuid();
    for (auto& entry : cpuid)
      if (entry.function == 0x80000001) entry.edx &= ~cpuid_ext_edx::lm;
    m.set_features(cpuid);
    reset_cpu(cpu, false);
    m.enter_real();
    cpu.msr.smbase = smbase;
  }
  Machine m;
  Cpu& cpu = m.cpu;
};

TEST_F(SystemManagement, EntryAndReturnLeaveNoTraceInUserMode) {
  cpu.gpr[r12] = 0x1234'5678'9abc'def0;
  cpu.set_rflags(flag::fixed | flag::if_ | flag::cf | flag::of);
  const CpuState before = cpu;
  ASSERT_TRUE(enter_smm(cpu));
  EXPECT_TRUE(cpu.smm);
  EXPECT_EQ(cpu.cpl(), 0u);
  EXPECT_EQ(cpu.mode(), Mode::bits16);
  EXPECT_EQ(cpu.rflags(), flag::fixed);
  EXPECT_EQ(m.get<uint64_t>(smbase + 0xff98), 0x1234'5678'9abc'def0u) << "R12";
  cpu.gpr.fill(0);
  ASSERT_TRUE(leave_smm(cpu));
  EXPECT_FALSE(cpu.smm);
  EXPECT_EQ(cpu.cpl(), 3u);
  EXPECT_EQ(cpu.mode(), Mode::bits64);
  EXPECT_EQ(cpu.gpr[r12], before.gpr[r12]);
  EXPECT_EQ(cpu.rflags(), flag::fixed | flag::if_ | flag::cf | flag::of);
  EXPECT_EQ(cpu.rip, before.rip);
  for (unsigned i = 0; i < 6; ++i) {
    EXPECT_EQ(cpu.segment[i].base, before.segment[i].base) << i;
    EXPECT_EQ(cpu.segment[i].attributes, before.segment[i].attributes) << i;
  }
  EXPECT_EQ(cpu.msr.smi_count, 1u);
}

TEST_F(SystemManagement, NmisStayBlockedForWhomTheyWere) {
  for (const bool blocked : {false, true}) {
    cpu.nmi_blocked = blocked;
    ASSERT_TRUE(enter_smm(cpu));
    EXPECT_TRUE(cpu.nmi_blocked);
    cpu.nmi_blocked = false;  // the handler has used IRET
    ASSERT_TRUE(leave_smm(cpu));
    EXPECT_EQ(cpu.nmi_blocked, blocked);
  }
}

TEST_F(SystemManagement, The32BitLayoutIsThatOfProcessorsWithoutLongMode) {
  without_long_mode();
  cpu.gpr[rax] = 0x1111'2222;
  cpu.gpr[rdi] = 0x3333'4444;
  cpu.halted = true;
  ASSERT_TRUE(enter_smm(cpu));
  EXPECT_FALSE(cpu.halted);
  EXPECT_EQ(m.get<uint32_t>(smbase + 0xfefc), 0x2'0000u);
  EXPECT_EQ(m.get<uint32_t>(smbase + 0xfef8), smbase);
  EXPECT_EQ(m.get<uint32_t>(smbase + 0xffd0), 0x1111'2222u);
  EXPECT_EQ(m.get<uint32_t>(smbase + 0xffec), 0x3333'4444u);
  EXPECT_EQ(m.get<uint16_t>(smbase + 0xff02), 1) << "auto HALT restart";
  m.put<uint16_t>(smbase + 0xff02, 0);
  m.put<uint32_t>(smbase + 0xfef8, 0x20'0000);
  ASSERT_TRUE(leave_smm(cpu));
  EXPECT_FALSE(cpu.halted);
  EXPECT_EQ(cpu.msr.smbase, 0x20'0000u);
}

TEST_F(SystemManagement, StatesThatCannotBeAreRefused) {
  constexpr struct {
    unsigned offset;
    uint64_t value;
  } bad[] = {
      {0xff58, cr0::pg},                // without PE
      {0xff58, uint64_t{1} << 32},      //
      {0xff48, ~uint64_t{0}},           // CR4
      {0xfed0, efer::lma},              // without LME
      {0xfed0, uint64_t{1} << 40},      //
      {0xff50, uint64_t{0xfff} << 52},  // CR3
  };
  for (const auto& [offset, value] : bad) {
    m.enter_long(0);
    ASSERT_TRUE(enter_smm(cpu));
    m.put<uint64_t>(smbase + offset, value);
    EXPECT_FALSE(leave_smm(cpu)) << std::hex << offset;
    EXPECT_FALSE(cpu.pending.valid);
    cpu.msr.smbase = smbase;
  }
}

TEST_F(SystemManagement, RsmIsAnInstructionOfTheModeOnly) {
  EXPECT_FALSE(m.run({0x0f, 0xaa}));
  EXPECT_EQ(cpu.pending.vector, Exception::ud);
  cpu.pending.valid = false;
  m.enter_long(0);
  const uint64_t rip = cpu.rip;
  ASSERT_TRUE(enter_smm(cpu));
  ASSERT_TRUE(m.run({0x0f, 0xaa}));
  EXPECT_FALSE(cpu.smm);
  EXPECT_EQ(cpu.rip, rip);
}

TEST_F(SystemManagement, ASaveAreaOutsideMemoryIsNoneToEnterWith) {
  cpu.msr.smbase = Machine::size;
  EXPECT_FALSE(enter_smm(cpu));
}

}  // namespace
}  // namespace lodge::kvm::soft
