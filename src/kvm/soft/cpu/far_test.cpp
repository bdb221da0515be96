// Far transfers, segment loads and task switches.
#include "kvm/soft/cpu/far.hpp"

#include <gtest/gtest.h>

#include "kvm/soft/cpu/testing.hpp"

namespace lodge::kvm::soft {
namespace {

using namespace testing;

class Far : public ::testing::Test {
 protected:
  void push32(uint32_t value) {
    cpu.gpr[rsp] -= 4;
    m.put(cpu.gpr[rsp], value);
  }
  void push64(uint64_t value) {
    cpu.gpr[rsp] -= 8;
    m.put(cpu.gpr[rsp], value);
  }
  Machine m;
  Cpu& cpu = m.cpu;
};

// --- segment registers -------------------------------------------------------------------------------------

TEST_F(Far, NullSelectorMakesADataSegmentUnusable) {
  m.enter_protected(0);
  cpu.gpr[rax] = 3;
  ASSERT_TRUE(m.run({0x8e, 0xd8}));
  EXPECT_EQ(cpu.segment[seg_ds].selector, 3u);
  EXPECT_FALSE(cpu.segment[seg_ds].present());
}

TEST_F(Far, StackSegmentRefusesNullAndReadOnlySegments) {
  m.enter_protected(0);
  cpu.gpr[rax] = 0;
  EXPECT_FALSE(m.run({0x8e, 0xd0}));
  EXPECT_TRUE(m.faulted(Exception::gp, 0));
  cpu.gpr[rax] = read_only;
  EXPECT_FALSE(m.run({0x8e, 0xd0}));
  EXPECT_TRUE(m.faulted(Exception::gp, read_only));
}

TEST_F(Far, AbsentSegmentsAreNotPresentOrStackFaults) {
  m.enter_protected(3);
  cpu.gpr[rax] = absent_data | 3;
  EXPECT_FALSE(m.run({0x8e, 0xd8}));
  EXPECT_TRUE(m.faulted(Exception::np, absent_data));
  EXPECT_FALSE(m.run({0x8e, 0xd0}));
  EXPECT_TRUE(m.faulted(Exception::ss, absent_data));
}

TEST_F(Far, UserCannotLoadKernelData) {
  m.enter_protected(3);
  cpu.gpr[rax] = data0;
  EXPECT_FALSE(m.run({0x8e, 0xd8}));
  EXPECT_TRUE(m.faulted(Exception::gp, data0));
}

TEST_F(Far, SelectorBeyondTheTableFaultsWithIt) {
  m.enter_protected(0);
  cpu.gpr[rax] = 0x200;
  EXPECT_FALSE(m.run({0x8e, 0xd8}));
  EXPECT_TRUE(m.faulted(Exception::gp, 0x200));
  cpu.gpr[rax] = 0x14;  // the LDT is not loaded
  EXPECT_FALSE(m.run({0x8e, 0xd8}));
  EXPECT_TRUE(m.faulted(Exception::gp, 0x14));
}

TEST_F(Far, LoadingASegmentSetsItsAccessedBit) {
  m.enter_protected(0);
  m.set_descriptor(data0, Machine::descriptor(0, 0xfffff, 0x92, 0xc));
  cpu.gpr[rax] = data0;
  ASSERT_TRUE(m.run({0x8e, 0xd8}));
  EXPECT_EQ(m.get_descriptor(data0) >> 40 & 0xff, 0x93u);
  EXPECT_EQ(cpu.segment[seg_ds].attributes & 0xff, 0x93);
}

TEST_F(Far, MovToSsShadowsInterrupts) {
  m.enter_protected(0);
  cpu.gpr[rax] = data0;
  ASSERT_TRUE(m.run({0x8e, 0xd0}));
  EXPECT_TRUE(cpu.interrupt_shadow);
  EXPECT_TRUE(cpu.shadow_is_mov_ss);
}

TEST_F(Far, PopOfABadSegmentLeavesTheStackPointer) {
  m.enter_protected(0);
  push32(0x200);
  const uint64_t sp = cpu.gpr[rsp];
  EXPECT_FALSE(m.run({0x1f}));
  EXPECT_EQ(cpu.gpr[rsp], sp);
}

TEST_F(Far, RealModeKeepsTheSegmentLimit) {
  m.enter_real();
  cpu.segment[seg_ds].limit = 0xffff'ffff;
  cpu.gpr[rax] = 0x1234;
  ASSERT_TRUE(m.run({0x8e, 0xd8}));
  EXPECT_EQ(cpu.segment[seg_ds].base, 0x12340u);
  EXPECT_EQ(cpu.segment[seg_ds].limit, 0xffff'ffffu);
}

TEST_F(Far, LongModeTakesANullStackSegmentBelowLevel3) {
  m.enter_long(0);
  cpu.gpr[rax] = 0;
  EXPECT_TRUE(m.run({0x8e, 0xd0}));
  m.enter_long(3);
  cpu.gpr[rax] = 3;
  EXPECT_FALSE(m.run({0x8e, 0xd0}));
  EXPECT_TRUE(m.faulted(Exception::gp, 0));
}

TEST_F(Far, LoadTaskRegisterMarksItBusyAndWantsItAvailable) {
  m.enter_protected(0);
  cpu.gpr[rax] = task2;
  ASSERT_TRUE(m.run({0x0f, 0x00, 0xd8}));
  EXPECT_EQ(cpu.tr.selector, task2);
  EXPECT_EQ(m.get_descriptor(task2) >> 40 & 0xf, 11u);
  EXPECT_FALSE(m.run({0x0f, 0x00, 0xd8}));
  EXPECT_TRUE(m.faulted(Exception::gp, task2));
}

TEST_F(Far, LocalTableIsUsedOnceLoaded) {
  m.enter_protected(0);
  cpu.gpr[rax] = table;
  ASSERT_TRUE(m.run({0x0f, 0x00, 0xd0}));
  m.put(0x14008, Machine::descriptor(0x5000, 0xfff, 0x93, 4));
  cpu.gpr[rax] = 0x0c;
  ASSERT_TRUE(m.run({0x8e, 0xc0}));
  EXPECT_EQ(cpu.segment[seg_es].base, 0x5000u);
}

// --- jumps, calls, returns ---------------------------------------------------------------------------------

TEST_F(Far, JumpEntersCompatibilityAndLongCode) {
  m.enter_long(0);
  push64(0);
  m.put<uint32_t>(0x5000, handler_at);
  m.put<uint16_t>(0x5004, code0);
  ASSERT_TRUE(m.run({0xff, 0x2c, 0x25, 0x00, 0x50, 0x00, 0x00}));
  EXPECT_EQ(cpu.mode(), Mode::bits32);
  EXPECT_EQ(cpu.rip, handler_at);
  ASSERT_TRUE(m.run({0xea, 0x00, 0x00, 0x03, 0x00, code0_64, 0x00}));
  EXPECT_EQ(cpu.mode(), Mode::bits64);
}

TEST_F(Far, JumpChecksPrivilegeAndLimit) {
  m.enter_protected(3);
  EXPECT_FALSE(m.run({0xea, 0, 0, 3, 0, code0, 0}));
  EXPECT_TRUE(m.faulted(Exception::gp, code0));
  EXPECT_FALSE(m.run({0xea, 0, 0, 3, 0, 0, 0}));
  EXPECT_TRUE(m.faulted(Exception::gp, 0));
  EXPECT_TRUE(m.run({0xea, 0, 0, 3, 0, conforming0, 0}));
  EXPECT_EQ(cpu.segment[seg_cs].selector, conforming0 | 3);
  m.enter_protected(0);
  EXPECT_FALSE(m.run({0xea, 0, 0, 1, 0, code0_16, 0}));
  EXPECT_TRUE(m.faulted(Exception::gp, 0));
}

TEST_F(Far, CallPushesTheReturnAddressAndFarReturnGoesBack) {
  m.enter_protected(0);
  const uint64_t sp = cpu.gpr[rsp];
  ASSERT_TRUE(m.run({0x9a, 0, 0, 3, 0, code0, 0}));
  EXPECT_EQ(m.get<uint32_t>(cpu.gpr[rsp]), code_at + 7);
  ASSERT_TRUE(m.run({0xcb}));
  EXPECT_EQ(cpu.rip, code_at + 7);
  EXPECT_EQ(cpu.gpr[rsp], sp);
}

TEST_F(Far, CallGateSwitchesStacksAndCopiesParameters) {
  m.enter_protected(3);
  m.set_gate(gdt_at + gate, code0, handler_at, 12, 3, 2);
  push32(0x1111);
  push32(0x2222);
  const uint64_t sp = cpu.gpr[rsp];
  ASSERT_TRUE(m.run({0x9a, 0, 0, 0, 0, gate, 0}));
  EXPECT_EQ(cpu.cpl(), 0u);
  EXPECT_EQ(cpu.rip, handler_at);
  EXPECT_EQ(cpu.gpr[rsp], stack0 - 24);
  EXPECT_EQ(m.get<uint32_t>(stack0 - 4), data3);
  EXPECT_EQ(m.get<uint32_t>(stack0 - 8), sp);
  EXPECT_EQ(m.get<uint32_t>(stack0 - 12), 0x1111u);
  EXPECT_EQ(m.get<uint32_t>(stack0 - 16), 0x2222u);
  EXPECT_EQ(m.get<uint32_t>(stack0 - 20), code3);
  EXPECT_EQ(m.get<uint32_t>(stack0 - 24), code_at + 7);
  ASSERT_TRUE(m.run({0xca, 8, 0}));
  EXPECT_EQ(cpu.cpl(), 3u);
  EXPECT_EQ(cpu.gpr[rsp], sp + 8);
}

TEST_F(Far, CallGateRefusesLowerPrivilege) {
  m.enter_protected(3);
  m.set_gate(gdt_at + gate, code0, handler_at, 12, 0);
  EXPECT_FALSE(m.run({0x9a, 0, 0, 0, 0, gate, 0}));
  EXPECT_TRUE(m.faulted(Exception::gp, gate));
}

TEST_F(Far, LongModeCallGateLoadsRspFromTheTss) {
  m.enter_long(3);
  m.set_gate(gdt_at + gate, code0_64, handler_at, 12, 3);
  m.set_descriptor(gate + 8, 0);
  m.put<uint32_t>(0x5000, 0);
  m.put<uint16_t>(0x5004, gate);
  ASSERT_TRUE(m.run({0xff, 0x1c, 0x25, 0x00, 0x50, 0x00, 0x00}));
  EXPECT_EQ(cpu.cpl(), 0u);
  EXPECT_EQ(cpu.gpr[rsp], stack0 - 32);
  EXPECT_EQ(cpu.segment[seg_ss].selector, 0u);
  EXPECT_EQ(m.get<uint64_t>(stack0 - 32), code_at + 7);
}

TEST_F(Far, OuterReturnDropsSegmentsOfTheInnerLevel) {
  m.enter_protected(0);
  cpu.segment[seg_fs] = m.load(data3);
  push32(data3);
  push32(stack3);
  push32(code3);
  push32(handler_at);
  ASSERT_TRUE(m.run({0xcb}));
  EXPECT_EQ(cpu.cpl(), 3u);
  EXPECT_EQ(cpu.gpr[rsp], stack3);
  EXPECT_EQ(cpu.segment[seg_ds].selector, 0u);
  EXPECT_EQ(cpu.segment[seg_fs].selector, data3);
}

TEST_F(Far, ReturnNeverRaisesPrivilege) {
  m.enter_protected(3);
  push32(code0);
  push32(handler_at);
  EXPECT_FALSE(m.run({0xcb}));
  EXPECT_TRUE(m.faulted(Exception::gp, code0));
}

TEST_F(Far, IretqReturnsToUserWithItsStack) {
  m.enter_long(0);
  push64(data3);
  push64(stack3);
  push64(flag::if_ | flag::iopl | flag::fixed);
  push64(code3_64);
  push64(handler_at);
  ASSERT_TRUE(m.run({0x48, 0xcf}));
  EXPECT_EQ(cpu.cpl(), 3u);
  EXPECT_EQ(cpu.rip, handler_at);
  EXPECT_EQ(cpu.gpr[rsp], stack3);
  EXPECT_EQ(cpu.rflags(), flag::if_ | flag::iopl | flag::fixed);
}

TEST_F(Far, IretqRefusesANonCanonicalTarget) {
  m.enter_long(0);
  push64(data3);
  push64(stack3);
  push64(flag::fixed);
  push64(code3_64);
  push64(uint64_t{1} << 47);
  EXPECT_FALSE(m.run({0x48, 0xcf}));
  EXPECT_TRUE(m.faulted(Exception::gp, 0));
  EXPECT_EQ(cpu.cpl(), 0u);
}

TEST_F(Far, UserIretCannotChangeIoplOrIf) {
  m.enter_protected(3);
  push32(flag::iopl | flag::if_ | flag::cf | flag::fixed);
  push32(code3);
  push32(handler_at);
  ASSERT_TRUE(m.run({0xcf}));
  EXPECT_EQ(cpu.rflags(), flag::cf | flag::fixed);
}

TEST_F(Far, NestedTaskFlagIsAFaultInLongMode) {
  m.enter_long(0);
  cpu.set_rflags(flag::nt | flag::fixed);
  EXPECT_FALSE(m.run({0x48, 0xcf}));
  EXPECT_TRUE(m.faulted(Exception::gp, 0));
}

// --- tasks -------------------------------------------------------------------------------------------------

class Task : public Far {
 protected:
  void SetUp() override {
    m.enter_protected(0);
    m.put<uint32_t>(tss2_at + 0x20, handler_at);
    m.put<uint32_t>(tss2_at + 0x24, flag::fixed);
    m.put<uint32_t>(tss2_at + 0x28, 0xaaaa);  // EAX
    m.put<uint32_t>(tss2_at + 0x38, 0x24000);
    for (unsigned i = 0; i < 6; ++i) m.put<uint32_t>(tss2_at + 0x48 + i * 4, i == seg_cs ? code0 : data0);
    cpu.gpr[rbx] = 0xbbbb;
  }
};

TEST_F(Task, JumpSavesTheOldTaskAndLoadsTheNew) {
  ASSERT_TRUE(m.run({0xea, 0, 0, 0, 0, task2, 0}));
  EXPECT_EQ(cpu.rip, handler_at);
  EXPECT_EQ(cpu.gpr[rax], 0xaaaau);
  EXPECT_EQ(cpu.gpr[rsp], 0x24000u);
  EXPECT_EQ(cpu.tr.selector, task2);
  EXPECT_EQ(m.get<uint32_t>(tss_at + 0x20), code_at + 7);
  EXPECT_EQ(m.get<uint32_t>(tss_at + 0x34), 0xbbbbu);
  EXPECT_EQ(m.get<uint16_t>(tss_at + 0x4c), code0);
  EXPECT_EQ(m.get_descriptor(task) >> 40 & 0xf, 9u);
  EXPECT_EQ(m.get_descriptor(task2) >> 40 & 0xf, 11u);
  EXPECT_NE(cpu.cr0 & cr0::ts, 0u);
}

TEST_F(Task, CallLinksBackAndIretReturns) {
  ASSERT_TRUE(m.run({0x9a, 0, 0, 0, 0, task2, 0}));
  EXPECT_EQ(m.get<uint16_t>(tss2_at), task);
  EXPECT_NE(cpu.rflags() & flag::nt, 0u);
  EXPECT_EQ(m.get_descriptor(task) >> 40 & 0xf, 11u);
  ASSERT_TRUE(m.run({0xcf}));
  EXPECT_EQ(cpu.tr.selector, task);
  EXPECT_EQ(cpu.rip, code_at + 7);
  EXPECT_EQ(cpu.gpr[rbx], 0xbbbbu);
  EXPECT_EQ(m.get_descriptor(task2) >> 40 & 0xf, 9u);
  EXPECT_EQ(m.get<uint32_t>(tss2_at + 0x24) & flag::nt, 0u);
}

TEST_F(Task, BusyTaskIsRefused) {
  EXPECT_FALSE(m.run({0xea, 0, 0, 0, 0, task, 0}));
  EXPECT_TRUE(m.faulted(Exception::gp, task));
}

TEST_F(Task, ShortTssIsRefused) {
  m.set_descriptor(task2, Machine::descriptor(tss2_at, 0x66, 0x89, 0));
  EXPECT_FALSE(m.run({0xea, 0, 0, 0, 0, task2, 0}));
  EXPECT_TRUE(m.faulted(Exception::ts, task2));
}

TEST_F(Task, BadStackSegmentFaultsInTheNewTask) {
  m.put<uint32_t>(tss2_at + 0x50, data3);
  m.set_vector(10, 14);
  ASSERT_TRUE(m.run({0xea, 0, 0, 0, 0, task2, 0}));
  EXPECT_TRUE(m.faulted(Exception::ts, data3 & 0xfffcu));
  EXPECT_EQ(cpu.rip, handler_at);
  EXPECT_EQ(cpu.tr.selector, task2);
}

TEST_F(Task, DebugTrapBitRaisesAfterTheSwitch) {
  m.put<uint16_t>(tss2_at + 0x64, 1);
  ASSERT_TRUE(m.run({0xea, 0, 0, 0, 0, task2, 0}));
  EXPECT_EQ(cpu.pending.vector, Exception::db);
  EXPECT_EQ(cpu.pending.payload, 0x8000u);
}

TEST_F(Task, TaskGateOfTheIdtPushesTheErrorCodeOnTheNewStack) {
  m.set_gate(idt_at + 13 * 8, task2, 0, 5, 0);
  cpu.raise(Exception::gp, 0x1238);
  ASSERT_EQ(deliver_exception(cpu), Delivery::done);
  EXPECT_EQ(cpu.tr.selector, task2);
  EXPECT_EQ(cpu.gpr[rsp], 0x24000u - 4);
  EXPECT_EQ(m.get<uint32_t>(cpu.gpr[rsp]), 0x1238u);
  EXPECT_NE(m.get<uint32_t>(tss_at + 0x24) & flag::rf, 0u);
  EXPECT_EQ(m.get<uint32_t>(tss_at + 0x20), code_at);
}

TEST_F(Task, SwitchIntoVirtual8086Mode) {
  m.put<uint32_t>(tss2_at + 0x20, 0x100);
  m.put<uint32_t>(tss2_at + 0x24, flag::vm | flag::fixed);
  ASSERT_TRUE(m.run({0xea, 0, 0, 0, 0, task2, 0}));
  EXPECT_TRUE(cpu.v86());
  EXPECT_EQ(cpu.cpl(), 3u);
  EXPECT_EQ(cpu.segment[seg_ds].base, uint64_t{data0} << 4);
}

TEST_F(Task, SixteenBitTaskHasItsOwnLayout) {
  m.set_descriptor(task2, Machine::descriptor(tss2_at, 0x2b, 0x81, 0));
  m.put<uint16_t>(tss2_at + 0x0e, 0x1000);
  m.put<uint16_t>(tss2_at + 0x10, flag::fixed);
  m.put<uint16_t>(tss2_at + 0x12, 0x7777);
  for (unsigned i = 0; i < 4; ++i) m.put<uint16_t>(tss2_at + 0x22 + i * 2, i == seg_cs ? code0 : data0);
  m.put<uint16_t>(tss2_at + 0x2a, 0);
  ASSERT_TRUE(m.run({0xea, 0, 0, 0, 0, task2, 0}));
  EXPECT_FALSE(cpu.pending.valid);
  EXPECT_EQ(cpu.rip, 0x1000u);
  EXPECT_EQ(cpu.gpr[rax] & 0xffff, 0x7777u);
}

TEST_F(Task, TasksAreFaultsInLongMode) {
  m.enter_long(0);
  m.set_descriptor(task2, Machine::descriptor(tss2_at, 0x67, 0x89, 0));
  m.put<uint32_t>(0x5000, 0);
  m.put<uint16_t>(0x5004, task2);
  EXPECT_FALSE(m.run({0xff, 0x2c, 0x25, 0x00, 0x50, 0x00, 0x00}));
  EXPECT_TRUE(m.faulted(Exception::gp, task2));
}

}  // namespace
}  // namespace lodge::kvm::soft
