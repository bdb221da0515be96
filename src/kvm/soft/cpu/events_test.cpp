#include "kvm/soft/cpu/events.hpp"

#include <gtest/gtest.h>

#include "kvm/soft/cpu/testing.hpp"

namespace lodge::kvm::soft {
namespace {

using namespace testing;

class Events : public ::testing::Test {
 protected:
  Machine m;
  Cpu& cpu = m.cpu;
};

// --- long mode ---------------------------------------------------------------------------------------------

TEST_F(Events, LongModeFaultPushesAnAlignedFrameWithErrorCode) {
  m.enter_long(0);
  m.set_vector64(13, 14);
  cpu.gpr[rsp] = 0x1fff7;
  cpu.set_rflags(flag::if_ | flag::fixed);
  cpu.raise(Exception::gp, 0x1230);
  ASSERT_EQ(deliver_exception(cpu), Delivery::done);
  EXPECT_EQ(cpu.rip, handler_at);
  EXPECT_EQ(cpu.gpr[rsp], 0x1fff0u - 48);
  EXPECT_EQ(m.get<uint64_t>(cpu.gpr[rsp]), 0x1230u);
  EXPECT_EQ(m.get<uint64_t>(cpu.gpr[rsp] + 8), code_at);
  EXPECT_EQ(m.get<uint64_t>(cpu.gpr[rsp] + 16), code0_64);
  EXPECT_EQ(m.get<uint64_t>(cpu.gpr[rsp] + 24), flag::if_ | flag::fixed | flag::rf);
  EXPECT_EQ(m.get<uint64_t>(cpu.gpr[rsp] + 32), 0x1fff7u);
  EXPECT_EQ(cpu.rflags() & flag::if_, 0u);
}

TEST_F(Events, TrapGateKeepsInterruptsEnabled) {
  m.enter_long(0);
  m.set_vector64(0, 15);
  cpu.set_rflags(flag::if_ | flag::tf | flag::fixed);
  cpu.raise(Exception::de);
  ASSERT_EQ(deliver_exception(cpu), Delivery::done);
  EXPECT_EQ(cpu.rflags() & (flag::if_ | flag::tf), flag::if_);
}

TEST_F(Events, LongModeInterruptFromUserTakesRsp0AndANullStackSegment) {
  m.enter_long(3);
  m.set_vector64(0x40, 14);
  ASSERT_EQ(deliver_external_interrupt(cpu, 0x40), Delivery::done);
  EXPECT_EQ(cpu.cpl(), 0u);
  EXPECT_EQ(cpu.segment[seg_ss].selector, 0u);
  EXPECT_EQ(cpu.gpr[rsp], stack0 - 40);
  EXPECT_EQ(m.get<uint64_t>(stack0 - 8), data3);
  EXPECT_EQ(m.get<uint64_t>(stack0 - 24), flag::fixed);  // RF stays clear for interrupts
  EXPECT_EQ(m.get<uint64_t>(stack0 - 32), code3_64);
}

TEST_F(Events, InterruptStackTableIsUsedAtTheSameLevel) {
  m.enter_long(0);
  m.set_vector64(2, 14, 0, 1);
  ASSERT_EQ(deliver_nmi(cpu), Delivery::done);
  EXPECT_EQ(cpu.gpr[rsp], ist_stack - 40);
  EXPECT_EQ(cpu.segment[seg_ss].selector, data0);
  EXPECT_TRUE(cpu.nmi_blocked);
}

TEST_F(Events, IretUnblocksNmis) {
  m.enter_long(0);
  m.set_vector64(2, 14, 0, 1);
  ASSERT_EQ(deliver_nmi(cpu), Delivery::done);
  const uint64_t sp = stack0 - 0x100;
  ASSERT_TRUE(m.run({0x48, 0xcf}));
  EXPECT_FALSE(cpu.nmi_blocked);
  EXPECT_EQ(cpu.rip, code_at);
  EXPECT_EQ(cpu.gpr[rsp], sp);
}

TEST_F(Events, PageFaultSetsCr2) {
  m.enter_long(0);
  m.set_vector64(14, 14);
  cpu.raise_page_fault(0x1234'5678, 2);
  ASSERT_EQ(deliver_exception(cpu), Delivery::done);
  EXPECT_EQ(cpu.cr2, 0x1234'5678u);
  EXPECT_EQ(m.get<uint64_t>(cpu.gpr[rsp]), 2u);
}

TEST_F(Events, FaultOnAPageFaultsDeliveryIsADoubleFault) {
  m.enter_long(0);
  m.set_vector64(8, 14);
  cpu.raise_page_fault(0x1000, 0);  // its gate is absent: #GP, and #PF then #GP doubles
  ASSERT_EQ(deliver_exception(cpu), Delivery::done);
  EXPECT_EQ(m.get<uint64_t>(cpu.gpr[rsp]), 0u);
  EXPECT_EQ(m.get<uint64_t>(cpu.gpr[rsp] + 8), code_at);
}

TEST_F(Events, MissingDoubleFaultHandlerShutsDown) {
  m.enter_long(0);
  cpu.raise(Exception::gp, 0);
  EXPECT_EQ(deliver_exception(cpu), Delivery::shutdown);
  EXPECT_EQ(cpu.rip, code_at);
}

TEST_F(Events, ContributoryAfterBenignIsDeliveredInTurn) {
  m.enter_long(0);
  m.set_vector64(11, 14);
  m.set_vector64(6, 14);
  m.put<uint8_t>(idt_at + 6 * 16 + 5, 0x0e);  // not present
  cpu.raise(Exception::ud);
  ASSERT_EQ(deliver_exception(cpu), Delivery::done);
  EXPECT_EQ(m.get<uint64_t>(cpu.gpr[rsp]), 6u * 8 + 2 + 1);  // #NP, IDT and EXT
}

TEST_F(Events, PageFaultAfterContributoryIsDeliveredInTurn) {
  m.enter_long(3);
  m.set_vector64(13, 14, 0, 2);  // IST 2 is not mapped
  m.set_vector64(14, 14);
  m.put<uint64_t>(tss_at + 0x2c, 0x8000'0000);
  cpu.raise(Exception::gp, 0);
  ASSERT_EQ(deliver_exception(cpu), Delivery::done);
  EXPECT_EQ(cpu.cr2, 0x7fff'fff8u);
  EXPECT_EQ(m.get<uint64_t>(stack0 - 48), 2u);  // a supervisor write to an absent page
}

TEST_F(Events, NonCanonicalStackIsAStackFault) {
  m.enter_long(3);
  m.put<uint64_t>(tss_at + 4, uint64_t{1} << 47);
  m.set_vector64(0x40, 14);
  m.set_vector64(12, 14, 0, 1);
  m.put<uint64_t>(tss_at + 4, (uint64_t{1} << 47) + 64);
  ASSERT_EQ(deliver_external_interrupt(cpu, 0x40), Delivery::done);
  EXPECT_EQ(m.get<uint64_t>(cpu.gpr[rsp]), 1u);  // #SS(EXT)
  EXPECT_EQ(cpu.rip, handler_at);
}

TEST_F(Events, SoftwareInterruptNeedsTheGatesPrivilege) {
  m.enter_long(3);
  m.set_vector64(0x80, 14, 0);
  EXPECT_FALSE(m.run({0xcd, 0x80}));
  EXPECT_TRUE(m.faulted(Exception::gp, 0x80 * 8 + 2));
  EXPECT_EQ(cpu.rip, code_at);
  EXPECT_EQ(cpu.cpl(), 3u);
}

TEST_F(Events, SoftwareInterruptReturnsBehindItself) {
  m.enter_long(3);
  m.set_vector64(0x80, 15, 3);
  ASSERT_TRUE(m.run({0xcd, 0x80}));
  EXPECT_EQ(cpu.rip, handler_at);
  EXPECT_EQ(m.get<uint64_t>(stack0 - 40), code_at + 2);
}

TEST_F(Events, BreakpointIsATrapAndItsRefusalAFault) {
  m.enter_long(3);
  m.set_vector64(3, 15, 3);
  ASSERT_TRUE(m.run({0xcc}));
  ASSERT_EQ(deliver_exception(cpu), Delivery::done);
  EXPECT_EQ(m.get<uint64_t>(stack0 - 40), code_at + 1);

  m.enter_long(3);
  m.set_vector64(3, 15, 0);
  m.set_vector64(13, 15, 0);
  ASSERT_TRUE(m.run({0xcc}));
  ASSERT_EQ(deliver_exception(cpu), Delivery::done);
  EXPECT_EQ(m.get<uint64_t>(stack0 - 40), code_at);
  EXPECT_EQ(m.get<uint64_t>(stack0 - 48), 3u * 8 + 2);
}

TEST_F(Events, InterruptOfCompatibilityCodeUsesTablesAndStackAbove4GiB) {
  m.enter_long(3);
  constexpr uint64_t high = 0xffff'ff80'0000'0000;
  m.put<uint64_t>(0x1000 + 511 * 8, 0x2007);
  cpu.segment[seg_cs] = m.load(code3);
  cpu.set_cpl(3);
  cpu.gdtr.base += high;
  cpu.idtr.base += high;
  cpu.tr.base += high;
  m.put<uint64_t>(tss_at + 4, high + stack0);
  m.set_vector64(0x80, 14, 3);
  ASSERT_TRUE(m.run({0xcd, 0x80}));
  EXPECT_EQ(cpu.mode(), Mode::bits64);
  EXPECT_EQ(cpu.gpr[rsp], high + stack0 - 40);
  EXPECT_EQ(m.get<uint64_t>(stack0 - 32), code3);
}

TEST_F(Events, CompatibilityCodeSegmentIsNoHandlerInLongMode) {
  m.enter_long(0);
  m.set_vector64(0x40, 14);
  m.set_gate(idt_at + 0x40 * 16, code0, handler_at, 14, 0);
  m.set_vector64(13, 14);
  ASSERT_EQ(deliver_external_interrupt(cpu, 0x40), Delivery::done);
  EXPECT_EQ(m.get<uint64_t>(cpu.gpr[rsp]), code0 + 1u);
}

TEST_F(Events, DebugExceptionRecordsItsCauseAndClearsGeneralDetect) {
  m.enter_long(0);
  m.set_vector64(1, 14);
  cpu.dr6 = 0xffff'0ff1;
  cpu.dr7 = 0x2400;
  cpu.raise_debug(0x4000);
  ASSERT_EQ(deliver_exception(cpu), Delivery::done);
  EXPECT_EQ(cpu.dr6, 0xffff'4ff0u);
  EXPECT_EQ(cpu.dr7, 0x400u);
  EXPECT_EQ(m.get<uint64_t>(cpu.gpr[rsp] + 16) & flag::rf, 0u);
}

// --- protected mode ----------------------------------------------------------------------------------------

TEST_F(Events, ProtectedModeFaultAtTheSameLevelPushesThreeWords) {
  m.enter_protected(0);
  m.set_vector(13, 14);
  cpu.raise(Exception::gp, 0x50);
  const uint64_t sp = cpu.gpr[rsp];
  ASSERT_EQ(deliver_exception(cpu), Delivery::done);
  EXPECT_EQ(cpu.gpr[rsp], sp - 16);
  EXPECT_EQ(m.get<uint32_t>(sp - 16), 0x50u);
  EXPECT_EQ(m.get<uint32_t>(sp - 12), code_at);
  EXPECT_EQ(m.get<uint32_t>(sp - 8), code0);
}

TEST_F(Events, ProtectedModeInterruptFromUserSwitchesStacks) {
  m.enter_protected(3);
  m.set_vector(0x40, 14);
  ASSERT_EQ(deliver_external_interrupt(cpu, 0x40), Delivery::done);
  EXPECT_EQ(cpu.cpl(), 0u);
  EXPECT_EQ(cpu.segment[seg_ss].selector, data0);
  EXPECT_EQ(cpu.gpr[rsp], stack0 - 20);
  EXPECT_EQ(m.get<uint32_t>(stack0 - 4), data3);
  EXPECT_EQ(m.get<uint32_t>(stack0 - 8), stack3);
}

TEST_F(Events, SixteenBitGatePushesWordsAlsoFromUser) {
  m.enter_protected(3);
  m.set_vector(0x40, 6, 3, code0);
  cpu.gpr[rsp] = 0x28000;
  ASSERT_TRUE(m.run({0xcd, 0x40}));
  EXPECT_EQ(cpu.gpr[rsp], stack0 - 10);
  EXPECT_EQ(m.get<uint16_t>(stack0 - 10), (code_at + 2) & 0xffff);
  EXPECT_EQ(m.get<uint16_t>(stack0 - 4), 0x8000);
  EXPECT_EQ(cpu.rip, handler_at & 0xffff);
}

TEST_F(Events, BadStackSegmentInTheTssIsAnInvalidTssFault) {
  m.enter_protected(3);
  m.set_vector(0x40, 14);
  m.set_vector(10, 14, 0, conforming0);  // at the present level: the inner stack is bad
  m.put<uint16_t>(tss_at + 8, data3);
  ASSERT_EQ(deliver_external_interrupt(cpu, 0x40), Delivery::done);
  EXPECT_EQ(cpu.cpl(), 3u);
  EXPECT_EQ(m.get<uint32_t>(cpu.gpr[rsp]), (data3 & 0xfffcu) | 1);
}

TEST_F(Events, VectorBeyondTheIdtIsAGeneralProtectionFault) {
  m.enter_protected(0);
  cpu.idtr.limit = 0x7f;
  m.set_vector(13, 14);
  EXPECT_FALSE(m.run({0xcd, 0x10}));
  EXPECT_TRUE(m.faulted(Exception::gp, 0x10 * 8 + 2));
}

// --- virtual-8086 mode -------------------------------------------------------------------------------------

TEST_F(Events, InterruptLeavesVirtual8086ModeWithAllSegmentsSaved) {
  m.enter_v86(3);
  m.set_vector(0x40, 14);
  cpu.segment[seg_gs] = v86_segment(0x1234);
  ASSERT_EQ(deliver_external_interrupt(cpu, 0x40), Delivery::done);
  EXPECT_FALSE(cpu.v86());
  EXPECT_EQ(cpu.cpl(), 0u);
  EXPECT_EQ(cpu.gpr[rsp], stack0 - 36);
  EXPECT_EQ(m.get<uint32_t>(stack0 - 4), 0x1234u);
  EXPECT_EQ(m.get<uint32_t>(stack0 - 20), 0x2000u);
  EXPECT_EQ(m.get<uint32_t>(stack0 - 28) & flag::vm, flag::vm);
  EXPECT_EQ(cpu.segment[seg_ds].selector, 0u);
  EXPECT_FALSE(cpu.segment[seg_ds].present());
}

TEST_F(Events, IretReturnsToVirtual8086Mode) {
  m.enter_v86(3);
  m.set_vector(0x40, 14);
  ASSERT_EQ(deliver_external_interrupt(cpu, 0x40), Delivery::done);
  ASSERT_TRUE(m.run({0xcf}));
  EXPECT_TRUE(cpu.v86());
  EXPECT_EQ(cpu.cpl(), 3u);
  EXPECT_EQ(cpu.segment[seg_cs].base, code_at);
  EXPECT_EQ(cpu.gpr[rsp], 0x8000u);
  EXPECT_EQ(cpu.segment[seg_ds].selector, 0x2000u);
}

TEST_F(Events, SoftwareInterruptInVirtual8086ModeNeedsIopl3) {
  m.enter_v86(0);
  EXPECT_FALSE(m.run({0xcd, 0x10}));
  EXPECT_TRUE(m.faulted(Exception::gp, 0));
  EXPECT_TRUE(cpu.v86());
}

TEST_F(Events, VmeRedirectsSoftwareInterruptsThroughTheVectorTable) {
  m.enter_v86(0);
  cpu.cr4 |= cr4::vme;
  m.put<uint16_t>(tss_at + 0x66, 0x88);  // the bitmap lies 32 bytes below, all clear
  m.put<uint32_t>(0x10 * 4, 0x4000'0123);
  cpu.set_rflags(cpu.rflags() | flag::vif);
  ASSERT_TRUE(m.run({0xcd, 0x10}));
  EXPECT_EQ(cpu.segment[seg_cs].selector, 0x4000u);
  EXPECT_EQ(cpu.rip, 0x123u);
  EXPECT_EQ(cpu.gpr[rsp], 0x7ffau);
  EXPECT_EQ(m.get<uint16_t>(0x27ffa), 2u);
  EXPECT_EQ(m.get<uint16_t>(0x27ffe) & (flag::if_ | flag::iopl), flag::if_ | flag::iopl);
  EXPECT_EQ(cpu.rflags() & flag::vif, 0u);
  EXPECT_TRUE(cpu.v86());
}

// --- real mode ---------------------------------------------------------------------------------------------

TEST_F(Events, RealModeUsesTheVectorTable) {
  m.enter_real();
  cpu.set_rflags(flag::if_ | flag::fixed);
  m.put<uint32_t>(0x21 * 4, 0x1000'0456);
  ASSERT_TRUE(m.run({0xcd, 0x21}));
  EXPECT_EQ(cpu.segment[seg_cs].base, 0x10000u);
  EXPECT_EQ(cpu.rip, 0x456u);
  EXPECT_EQ(m.get<uint16_t>(0x7ffa), 2u);
  EXPECT_EQ(m.get<uint16_t>(0x7ffc), code_at >> 4);
  EXPECT_EQ(m.get<uint16_t>(0x7ffe), flag::if_ | flag::fixed);
  EXPECT_EQ(cpu.rflags() & flag::if_, 0u);
}

TEST_F(Events, RealModeExceptionsPushNoErrorCode) {
  m.enter_real();
  m.put<uint32_t>(13 * 4, 0x1000'0000);
  cpu.raise(Exception::gp, 0);
  ASSERT_EQ(deliver_exception(cpu), Delivery::done);
  EXPECT_EQ(cpu.gpr[rsp], 0x7ffau);
}

TEST_F(Events, TinyVectorTableShutsDown) {
  m.enter_real();
  cpu.idtr.limit = 3;
  cpu.raise(Exception::ud);
  EXPECT_EQ(deliver_exception(cpu), Delivery::shutdown);
}

// --- ports and reset ---------------------------------------------------------------------------------------

TEST_F(Events, PortsFollowIoplAndTheBitmap) {
  m.enter_protected(3);
  m.put<uint16_t>(tss_at + 0x66, 0x68);
  m.put<uint8_t>(tss_at + 0x68 + 0x60 / 8, 0x02);  // port 0x61 closed
  EXPECT_TRUE(check_io_permission(cpu, 0x60, 1));
  EXPECT_FALSE(check_io_permission(cpu, 0x60, 2));
  EXPECT_TRUE(m.faulted(Exception::gp, 0));
  cpu.system_flags |= flag::iopl;
  EXPECT_TRUE(check_io_permission(cpu, 0x60, 2));
}

TEST_F(Events, PortsBeyondTheTssAreClosed) {
  m.enter_protected(3);
  m.put<uint16_t>(tss_at + 0x66, 0x20f0);
  EXPECT_TRUE(check_io_permission(cpu, 0, 1));
  EXPECT_FALSE(check_io_permission(cpu, 0x78, 1));
}

TEST_F(Events, PowerUpStateIsTheManuals) {
  reset_cpu(cpu, false);
  EXPECT_EQ(cpu.cr0, 0x6000'0010u);
  EXPECT_EQ(cpu.segment[seg_cs].base + cpu.rip, 0xffff'fff0u);
  EXPECT_EQ(cpu.rflags(), 2u);
  EXPECT_EQ(cpu.dr6, 0xffff'0ff0u);
  EXPECT_EQ(cpu.mode(), Mode::bits16);
}

TEST_F(Events, InitKeepsVectorStateAndMsrs) {
  m.enter_long(0);
  cpu.msr.pat = 0x0606'0606'0606'0606;
  cpu.vector.zmm[3][5] = 42;
  reset_cpu(cpu, true);
  EXPECT_EQ(cpu.msr.pat, 0x0606'0606'0606'0606u);
  EXPECT_EQ(cpu.vector.zmm[3][5], 42);
  EXPECT_EQ(cpu.efer, 0u);
  EXPECT_FALSE(cpu.protected_mode());
}

TEST_F(Events, SipiStartsAtItsPage) {
  reset_cpu(cpu, true);
  start_at_sipi(cpu, 0x9a);
  EXPECT_EQ(cpu.segment[seg_cs].base + cpu.rip, 0x9a000u);
  EXPECT_EQ(cpu.segment[seg_cs].selector, 0x9a00u);
}

}  // namespace
}  // namespace lodge::kvm::soft
