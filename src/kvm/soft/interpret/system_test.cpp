#include "kvm/soft/interpret/system.hpp"

#include <gtest/gtest.h>

#include "kvm/soft/cpu/cpuid_bits.hpp"
#include "kvm/soft/cpu/testing.hpp"

namespace lodge::kvm::soft {
namespace {

using namespace testing;

class SystemInstructions : public ::testing::Test {
 protected:
  bool undefined() {
    const bool out = cpu.pending.valid && cpu.pending.vector == Exception::ud;
    cpu.pending = {};
    return out;
  }
  bool refused() {
    const bool out = m.faulted(Exception::gp, 0);
    cpu.pending = {};
    return out;
  }
  Machine m;
  Cpu& cpu = m.cpu;
};

TEST_F(SystemInstructions, SyscallEntersAndSysretLeaves) {
  m.enter_long(3);
  cpu.msr.star = uint64_t{0x13} << 48 | uint64_t{code0_64} << 32;
  cpu.msr.lstar = handler_at;
  cpu.msr.sfmask = flag::if_ | flag::tf;
  cpu.set_rflags(flag::if_ | flag::cf | flag::fixed);
  ASSERT_TRUE(m.run({0x0f, 0x05}));
  EXPECT_EQ(cpu.cpl(), 0u);
  EXPECT_EQ(cpu.rip, handler_at);
  EXPECT_EQ(cpu.gpr[rcx], code_at + 2);
  EXPECT_EQ(cpu.gpr[r11], flag::if_ | flag::cf | flag::fixed);
  EXPECT_EQ(cpu.rflags(), flag::cf | flag::fixed);
  EXPECT_EQ(cpu.segment[seg_ss].selector, code0_64 + 8);
  ASSERT_TRUE(m.run({0x48, 0x0f, 0x07}));
  EXPECT_EQ(cpu.cpl(), 3u);
  EXPECT_EQ(cpu.rip, code_at + 2);
  EXPECT_EQ(cpu.segment[seg_cs].selector, 0x23u);
  EXPECT_EQ(cpu.segment[seg_ss].selector, 0x1bu);
  EXPECT_EQ(cpu.rflags(), flag::if_ | flag::cf | flag::fixed);
}

TEST_F(SystemInstructions, SyscallNeedsItsEnableBit) {
  m.enter_long(3);
  cpu.efer &= ~efer::sce;
  EXPECT_FALSE(m.run({0x0f, 0x05}));
  EXPECT_TRUE(undefined());
}

TEST_F(SystemInstructions, SysenterAndSysexitIn32BitMode) {
  m.enter_protected(3);
  EXPECT_FALSE(m.run({0x0f, 0x34}));
  EXPECT_TRUE(refused());
  cpu.msr.sysenter_cs = code0;
  cpu.msr.sysenter_esp = stack0;
  cpu.msr.sysenter_eip = handler_at;
  ASSERT_TRUE(m.run({0x0f, 0x34}));
  EXPECT_EQ(cpu.cpl(), 0u);
  EXPECT_EQ(cpu.rip, handler_at);
  EXPECT_EQ(cpu.gpr[rsp], stack0);
  cpu.gpr[rdx] = code_at;
  cpu.gpr[rcx] = stack3;
  ASSERT_TRUE(m.run({0x0f, 0x35}));
  EXPECT_EQ(cpu.cpl(), 3u);
  EXPECT_EQ(cpu.segment[seg_cs].selector, (code0 + 16) | 3);
  EXPECT_EQ(cpu.gpr[rsp], stack3);
}

TEST_F(SystemInstructions, StiShadowsOneInstructionWhenItEnables) {
  m.enter_long(0);
  ASSERT_TRUE(m.run({0xfb}));
  EXPECT_TRUE(cpu.interrupt_shadow);
  cpu.interrupt_shadow = false;
  ASSERT_TRUE(m.run({0xfb}));
  EXPECT_FALSE(cpu.interrupt_shadow);
}

TEST_F(SystemInstructions, InterruptFlagBelongsToIopl) {
  m.enter_long(3);
  EXPECT_FALSE(m.run({0xfa}));
  EXPECT_TRUE(refused());
  cpu.system_flags |= flag::iopl;
  EXPECT_TRUE(m.run({0xfa}));
}

TEST_F(SystemInstructions, PviGivesLevel3AVirtualInterruptFlag) {
  m.enter_protected(3);
  cpu.cr4 |= cr4::pvi;
  ASSERT_TRUE(m.run({0xfb}));
  EXPECT_NE(cpu.rflags() & flag::vif, 0u);
  cpu.system_flags |= flag::vip;
  EXPECT_FALSE(m.run({0xfb}));
  EXPECT_TRUE(refused());
}

TEST_F(SystemInstructions, VmePushfShowsTheVirtualFlag) {
  m.enter_v86(0);
  EXPECT_FALSE(m.run({0x9c}));
  EXPECT_TRUE(refused());
  cpu.cr4 |= cr4::vme;
  cpu.set_rflags((cpu.rflags() & ~flag::if_) | flag::vif);
  ASSERT_TRUE(m.run({0x9c}));
  EXPECT_EQ(m.get<uint16_t>(0x20000 + 0x7ffe) & (flag::if_ | flag::iopl), flag::if_ | flag::iopl);
  m.put<uint16_t>(0x20000 + 0x7ffe, 0x0002);
  ASSERT_TRUE(m.run({0x9d}));
  EXPECT_EQ(cpu.rflags() & flag::vif, 0u);
}

TEST_F(SystemInstructions, UserPopfKeepsIfAndIopl) {
  m.enter_long(3);
  cpu.set_rflags(flag::if_ | flag::fixed);
  cpu.gpr[rsp] -= 8;
  m.put<uint64_t>(cpu.gpr[rsp], flag::iopl | flag::zf | flag::id);
  ASSERT_TRUE(m.run({0x9d}));
  EXPECT_EQ(cpu.rflags(), flag::if_ | flag::zf | flag::id | flag::fixed);
}

TEST_F(SystemInstructions, HaltStopsAtTheNextInstruction) {
  m.enter_long(0);
  ASSERT_TRUE(m.run({0xf4}));
  EXPECT_TRUE(cpu.halted);
  EXPECT_EQ(cpu.rip, code_at + 1);
  m.enter_long(3);
  EXPECT_FALSE(m.run({0xf4}));
  EXPECT_TRUE(refused());
}

TEST_F(SystemInstructions, UmipHidesTheTablesFromUsers) {
  m.enter_long(3);
  EXPECT_TRUE(m.run({0x0f, 0x01, 0x04, 0x25, 0x00, 0x50, 0x00, 0x00}));  // SGDT
  EXPECT_EQ(m.get<uint16_t>(0x5000), 0xffu);
  EXPECT_EQ(m.get<uint64_t>(0x5002), gdt_at);
  cpu.cr4 |= cr4::umip;
  EXPECT_FALSE(m.run({0x0f, 0x01, 0x04, 0x25, 0x00, 0x50, 0x00, 0x00}));
  EXPECT_TRUE(refused());
  EXPECT_FALSE(m.run({0x0f, 0x00, 0xc8}));  // STR
  EXPECT_TRUE(refused());
}

TEST_F(SystemInstructions, LgdtTakes24BitsOfBaseWithA16BitOperand) {
  m.enter_real();
  m.put<uint16_t>(0x500, 0x1ff);
  m.put<uint32_t>(0x502, 0xff12'3456);
  ASSERT_TRUE(m.run({0x0f, 0x01, 0x16, 0x00, 0x05}));
  EXPECT_EQ(cpu.gdtr.base, 0x12'3456u);
  ASSERT_TRUE(m.run({0x66, 0x0f, 0x01, 0x16, 0x00, 0x05}));
  EXPECT_EQ(cpu.gdtr.base, 0xff12'3456u);
  EXPECT_EQ(cpu.gdtr.limit, 0x1ffu);
}

TEST_F(SystemInstructions, LarAndLslSeeWhatPrivilegePermits) {
  m.enter_protected(3);
  cpu.gpr[rcx] = data3;
  ASSERT_TRUE(m.run({0x0f, 0x02, 0xc1}));
  EXPECT_TRUE(cpu.zf());
  EXPECT_EQ(cpu.gpr[rax], 0xcff300u);
  ASSERT_TRUE(m.run({0x0f, 0x03, 0xd1}));
  EXPECT_EQ(cpu.gpr[rdx], 0xffff'ffffu);
  cpu.gpr[rcx] = data0;
  ASSERT_TRUE(m.run({0x0f, 0x02, 0xc1}));
  EXPECT_FALSE(cpu.zf());
}

TEST_F(SystemInstructions, VerrAndVerwTestAccess) {
  m.enter_protected(0);
  cpu.gpr[rax] = read_only;
  ASSERT_TRUE(m.run({0x0f, 0x00, 0xe0}));
  EXPECT_TRUE(cpu.zf());
  ASSERT_TRUE(m.run({0x0f, 0x00, 0xe8}));
  EXPECT_FALSE(cpu.zf());
}

TEST_F(SystemInstructions, ArplRaisesTheRequestedLevel) {
  m.enter_protected(0);
  cpu.gpr[rcx] = 0x20;
  cpu.gpr[rax] = 3;
  ASSERT_TRUE(m.run({0x63, 0xc1}));
  EXPECT_EQ(cpu.gpr[rcx], 0x23u);
  EXPECT_TRUE(cpu.zf());
  ASSERT_TRUE(m.run({0x63, 0xc1}));
  EXPECT_FALSE(cpu.zf());
}

TEST_F(SystemInstructions, ClearTaskSwitchedAndMachineStatusWord) {
  m.enter_protected(0);
  cpu.cr0 |= cr0::ts;
  ASSERT_TRUE(m.run({0x0f, 0x06}));
  EXPECT_EQ(cpu.cr0 & cr0::ts, 0u);
  cpu.gpr[rax] = 0x8;
  ASSERT_TRUE(m.run({0x0f, 0x01, 0xf0}));  // LMSW cannot leave protected mode
  EXPECT_EQ(cpu.cr0 & 0xf, cr0::pe | cr0::ts);
  ASSERT_TRUE(m.run({0x0f, 0x01, 0xe3}));
  EXPECT_EQ(static_cast<uint32_t>(cpu.gpr[rbx]), cpu.cr0);
}

TEST_F(SystemInstructions, BaseInstructionsNeedTheirEnableBit) {
  m.enter_long(3);
  cpu.gpr[rax] = 0x1234'5678'9abc;
  EXPECT_FALSE(m.run({0xf3, 0x48, 0x0f, 0xae, 0xd0}));
  EXPECT_TRUE(undefined());
  cpu.cr4 |= cr4::fsgsbase;
  ASSERT_TRUE(m.run({0xf3, 0x48, 0x0f, 0xae, 0xd0}));
  EXPECT_EQ(cpu.segment[seg_fs].base, 0x1234'5678'9abcu);
  ASSERT_TRUE(m.run({0xf3, 0x0f, 0xae, 0xc3}));
  EXPECT_EQ(cpu.gpr[rbx], 0x5678'9abcu);
  cpu.gpr[rax] = uint64_t{1} << 47;
  EXPECT_FALSE(m.run({0xf3, 0x48, 0x0f, 0xae, 0xd0}));
  EXPECT_TRUE(refused());
}

TEST_F(SystemInstructions, SwapgsExchangesTheBases) {
  m.enter_long(0);
  cpu.msr.kernel_gs_base = 0x1111;
  cpu.segment[seg_gs].base = 0x2222;
  ASSERT_TRUE(m.run({0x0f, 0x01, 0xf8}));
  EXPECT_EQ(cpu.segment[seg_gs].base, 0x1111u);
  EXPECT_EQ(cpu.msr.kernel_gs_base, 0x2222u);
}

TEST_F(SystemInstructions, TimeStampCanBeKeptFromUsers) {
  m.enter_long(3);
  m.platform.time = 0x1'2345'6789;
  ASSERT_TRUE(m.run({0x0f, 0x31}));
  EXPECT_EQ(cpu.gpr[rax], 0x2345'6789u);
  EXPECT_EQ(cpu.gpr[rdx], 1u);
  cpu.cr4 |= cr4::tsd;
  EXPECT_FALSE(m.run({0x0f, 0x31}));
  EXPECT_TRUE(refused());
}

TEST_F(SystemInstructions, XgetbvNeedsOsxsave) {
  m.enter_long(3);
  cpu.gpr[rcx] = 0;
  EXPECT_FALSE(m.run({0x0f, 0x01, 0xd0}));
  EXPECT_TRUE(undefined());
  cpu.cr4 |= cr4::osxsave;
  cpu.xcr0 = 3;
  ASSERT_TRUE(m.run({0x0f, 0x01, 0xd0}));
  EXPECT_EQ(cpu.gpr[rax], 3u);
  cpu.gpr[rcx] = 2;
  EXPECT_FALSE(m.run({0x0f, 0x01, 0xd0}));
  EXPECT_TRUE(refused());
}

TEST_F(SystemInstructions, HypercallsAnswerInRaxAndRefuseUsers) {
  m.enter_long(0);
  cpu.gpr[rax] = 5;
  cpu.gpr[rbx] = 6;
  ASSERT_TRUE(m.run({0x0f, 0x01, 0xc1}));
  EXPECT_EQ(cpu.gpr[rax], 11u);
  ASSERT_TRUE(m.run({0x0f, 0x01, 0xd9}));
  EXPECT_EQ(cpu.gpr[rax], 17u);
  m.enter_long(3);
  ASSERT_TRUE(m.run({0x0f, 0x01, 0xc1}));
  EXPECT_EQ(cpu.gpr[rax], ~uint64_t{0});
}

TEST_F(SystemInstructions, StacAndClacSteerTheAccessFlag) {
  m.enter_long(0);
  ASSERT_TRUE(m.run({0x0f, 0x01, 0xcb}));
  EXPECT_NE(cpu.rflags() & flag::ac, 0u);
  ASSERT_TRUE(m.run({0x0f, 0x01, 0xca}));
  EXPECT_EQ(cpu.rflags() & flag::ac, 0u);
  m.enter_long(3);
  EXPECT_FALSE(m.run({0x0f, 0x01, 0xcb}));
  EXPECT_TRUE(undefined());
}

TEST_F(SystemInstructions, InvpcidChecksItsDescriptor) {
  m.enter_long(0);
  cpu.gpr[rax] = 4;
  EXPECT_FALSE(m.run({0x66, 0x0f, 0x38, 0x82, 0x04, 0x25, 0x00, 0x50, 0x00, 0x00}));
  EXPECT_TRUE(refused());
  cpu.gpr[rax] = 0;
  m.put<uint64_t>(0x5000, 0x1000);
  EXPECT_FALSE(m.run({0x66, 0x0f, 0x38, 0x82, 0x04, 0x25, 0x00, 0x50, 0x00, 0x00}));
  EXPECT_TRUE(refused());
  m.put<uint64_t>(0x5000, 0);
  EXPECT_TRUE(m.run({0x66, 0x0f, 0x38, 0x82, 0x04, 0x25, 0x00, 0x50, 0x00, 0x00}));
}

TEST_F(SystemInstructions, RandomNumbersSetCarryOnly) {
  if ((cpu.features.leaf1_ecx & cpuid1_ecx::rdrand) == 0) GTEST_SKIP() << "the host has no RDRAND";
  m.enter_long(3);
  cpu.set_arith(flag::arithmetic);
  ASSERT_TRUE(m.run({0x48, 0x0f, 0xc7, 0xf0}));
  EXPECT_EQ(cpu.rflags() & flag::arithmetic & ~flag::cf, 0u);
}

TEST_F(SystemInstructions, VirtualizationAndUndefinedOpcodesAreRefused) {
  m.enter_long(0);
  EXPECT_FALSE(m.run({0x0f, 0x01, 0xc2}));  // VMLAUNCH
  EXPECT_TRUE(undefined());
  EXPECT_FALSE(m.run({0x0f, 0x01, 0xd8}));  // VMRUN
  EXPECT_TRUE(undefined());
  EXPECT_FALSE(m.run({0x0f, 0x0b}));  // UD2
  EXPECT_TRUE(undefined());
  EXPECT_FALSE(m.run({0x0f, 0xaa}));  // RSM
  EXPECT_TRUE(undefined());
  EXPECT_FALSE(m.run({0x0f, 0x01, 0xc8}));  // MONITOR is hidden
  EXPECT_TRUE(undefined());
}

TEST_F(SystemInstructions, ProtectedModeInstructionsAreUndefinedInRealMode) {
  m.enter_real();
  EXPECT_FALSE(m.run({0x0f, 0x00, 0xd8}));
  EXPECT_TRUE(undefined());
  m.enter_v86(3);
  EXPECT_FALSE(m.run({0x0f, 0x02, 0xc1}));
  EXPECT_TRUE(undefined());
}

TEST_F(SystemInstructions, Cr1DoesNotExist) {
  m.enter_long(0);
  EXPECT_FALSE(m.run({0x0f, 0x22, 0xc8}));
  EXPECT_TRUE(undefined());
}

}  // namespace
}  // namespace lodge::kvm::soft
