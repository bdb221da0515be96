// Control, debug and model-specific registers, CPUID, kvmclock and the exchange with the contract's types.
#include <gtest/gtest.h>

#include <cerrno>
#include <set>

#include "kvm/soft/cpu/control.hpp"
#include "kvm/soft/cpu/cpuid_bits.hpp"
#include "kvm/soft/cpu/exchange.hpp"
#include "kvm/soft/cpu/kvmclock.hpp"
#include "kvm/soft/cpu/msr.hpp"
#include "kvm/soft/cpu/testing.hpp"

namespace lodge::kvm::soft {
namespace {

using namespace testing;

class Registers : public ::testing::Test {
 protected:
  bool refused() {
    const bool out = m.faulted(Exception::gp, 0);
    cpu.pending = {};
    return out;
  }
  uint64_t msr(uint32_t index) {
    uint64_t value = 0xdead;
    EXPECT_TRUE(read_msr(cpu, index, value, false)) << std::hex << index;
    return value;
  }
  Machine m;
  Cpu& cpu = m.cpu;
};

// --- control registers -------------------------------------------------------------------------------------

TEST_F(Registers, Cr0RefusesContradictions) {
  EXPECT_FALSE(set_cr0(cpu, cr0::pg));
  EXPECT_TRUE(refused());
  EXPECT_FALSE(set_cr0(cpu, cr0::nw));
  EXPECT_TRUE(refused());
  EXPECT_FALSE(set_cr0(cpu, uint64_t{1} << 32));
  EXPECT_TRUE(refused());
  EXPECT_TRUE(set_cr0(cpu, cr0::pe));
  EXPECT_EQ(cpu.cr0, cr0::pe | cr0::et);
}

TEST_F(Registers, LongModeBeginsWithPagingAndEndsInCompatibilityMode) {
  m.enter_protected(0);
  ASSERT_TRUE(set_efer(cpu, efer::lme));
  EXPECT_FALSE(set_cr0(cpu, cpu.cr0 | cr0::pg));  // PAE is missing
  EXPECT_TRUE(refused());
  ASSERT_TRUE(set_cr4(cpu, cr4::pae));
  ASSERT_TRUE(set_cr0(cpu, cpu.cr0 | cr0::pg));
  EXPECT_EQ(cpu.efer, efer::lme | efer::lma);
  EXPECT_FALSE(set_efer(cpu, 0));  // LME is frozen
  EXPECT_FALSE(set_cr4(cpu, 0));
  EXPECT_TRUE(refused());
  ASSERT_TRUE(set_cr0(cpu, cpu.cr0 & ~cr0::pg));
  EXPECT_EQ(cpu.efer, efer::lme);
  m.enter_long(0);
  EXPECT_FALSE(set_cr0(cpu, cpu.cr0 & ~cr0::pg));
  EXPECT_TRUE(refused());
}

TEST_F(Registers, PcideNeedsLongModeAndAClearPcid) {
  m.enter_protected(0);
  EXPECT_FALSE(set_cr4(cpu, cr4::pcide));
  EXPECT_TRUE(refused());
  m.enter_long(0);
  cpu.cr3 = 0x1001;
  EXPECT_FALSE(set_cr4(cpu, cpu.cr4 | cr4::pcide));
  EXPECT_TRUE(refused());
  cpu.cr3 = 0x1000;
  ASSERT_TRUE(set_cr4(cpu, cpu.cr4 | cr4::pcide));
  ASSERT_TRUE(set_cr3(cpu, uint64_t{1} << 63 | 0x1005));
  EXPECT_EQ(cpu.cr3, 0x1005u);
}

TEST_F(Registers, Cr3RefusesBitsAboveThePhysicalWidth) {
  m.enter_long(0);
  EXPECT_FALSE(set_cr3(cpu, uint64_t{1} << 52));
  EXPECT_TRUE(refused());
  EXPECT_FALSE(set_cr3(cpu, uint64_t{1} << 63));
  EXPECT_TRUE(refused());
}

TEST_F(Registers, Cr4OffersWhatCpuidOffers) {
  m.enter_long(0);
  EXPECT_TRUE(set_cr4(cpu, cpu.cr4 | cr4::smep | cr4::smap | cr4::umip));
  EXPECT_FALSE(set_cr4(cpu, cpu.cr4 | cr4::la57));
  EXPECT_TRUE(refused());
  EXPECT_FALSE(set_cr4(cpu, cpu.cr4 | 1 << 13));  // VMXE
  EXPECT_TRUE(refused());
}

TEST_F(Registers, Cr8IsTheTaskPriority) {
  m.enter_long(0);
  cpu.gpr[rax] = 7;
  ASSERT_TRUE(m.run({0x44, 0x0f, 0x22, 0xc0}));
  EXPECT_EQ(m.platform.priority, 7);
  cpu.gpr[rax] = 16;
  EXPECT_FALSE(m.run({0x44, 0x0f, 0x22, 0xc0}));
  EXPECT_TRUE(refused());
}

TEST_F(Registers, Xcr0KeepsItsDependencies) {
  EXPECT_TRUE(set_xcr0(cpu, 1));
  EXPECT_FALSE(set_xcr0(cpu, 2));
  EXPECT_FALSE(set_xcr0(cpu, 5));
  EXPECT_FALSE(set_xcr0(cpu, 0x27));
  EXPECT_FALSE(set_xcr0(cpu, uint64_t{1} << 62 | 1));
}

TEST_F(Registers, DebugRegistersKeepTheirFixedBits) {
  ASSERT_TRUE(write_dr(cpu, 6, 0));
  EXPECT_EQ(cpu.dr6, 0xffff'0ff0u);
  ASSERT_TRUE(write_dr(cpu, 7, 0xffff'ffff));
  EXPECT_EQ(cpu.dr7, 0xffff'27ffu);
  EXPECT_FALSE(write_dr(cpu, 7, uint64_t{1} << 32));
  cpu.dr7 = 0x400;
  uint64_t value = 0;
  EXPECT_TRUE(read_dr(cpu, 5, value));
  EXPECT_EQ(value, 0x400u);
  cpu.cr4 |= cr4::de;
  EXPECT_FALSE(read_dr(cpu, 5, value));
  EXPECT_EQ(cpu.pending.vector, Exception::ud);
}

TEST_F(Registers, GeneralDetectStopsDebugRegisterAccesses) {
  m.enter_long(0);
  cpu.dr7 = 0x2400;
  EXPECT_FALSE(m.run({0x0f, 0x21, 0xc0}));
  EXPECT_EQ(cpu.pending.vector, Exception::db);
  EXPECT_EQ(cpu.pending.payload, 0x2000u);
}

// --- model-specific registers ------------------------------------------------------------------------------

TEST_F(Registers, UnknownMsrIsAFault) {
  m.enter_long(0);
  cpu.gpr[rcx] = 0x1234'5678;
  EXPECT_FALSE(m.run({0x0f, 0x32}));
  EXPECT_TRUE(refused());
  EXPECT_FALSE(m.run({0x0f, 0x30}));
  EXPECT_TRUE(refused());
}

TEST_F(Registers, MsrsNeedLevel0) {
  m.enter_long(3);
  cpu.gpr[rcx] = 0x10;
  EXPECT_FALSE(m.run({0x0f, 0x32}));
  EXPECT_TRUE(refused());
}

TEST_F(Registers, AddressMsrsWantCanonicalValues) {
  EXPECT_TRUE(write_msr(cpu, 0xc000'0082, 0xffff'8000'0000'0000, false));
  EXPECT_FALSE(write_msr(cpu, 0xc000'0082, uint64_t{1} << 47, false));
  EXPECT_FALSE(write_msr(cpu, 0xc000'0102, uint64_t{1} << 47, false));
  EXPECT_TRUE(write_msr(cpu, 0xc000'0101, 0x1234, false));
  EXPECT_EQ(cpu.segment[seg_gs].base, 0x1234u);
}

TEST_F(Registers, PatAndMtrrsRefuseUnknownMemoryTypes) {
  EXPECT_FALSE(write_msr(cpu, 0x277, 2, false));
  EXPECT_TRUE(write_msr(cpu, 0x277, 0x0007'0406'0007'0401, false));
  EXPECT_FALSE(write_msr(cpu, 0x250, 7, false));
  EXPECT_TRUE(write_msr(cpu, 0x26f, 0x0505'0505'0606'0606, false));
  EXPECT_EQ(msr(0x26f), 0x0505'0505'0606'0606u);
  EXPECT_FALSE(write_msr(cpu, 0x2ff, 0x1000, false));
  EXPECT_TRUE(write_msr(cpu, 0x200, 0x8000'0000, false));
  EXPECT_FALSE(write_msr(cpu, 0x201, uint64_t{1} << 60, false));
  EXPECT_EQ(msr(0xfe) & 0xff, 8u);
}

TEST_F(Registers, EferReservedBitsAreRefused) {
  EXPECT_FALSE(write_msr(cpu, 0xc000'0080, 1 << 12, false));  // SVME
  EXPECT_TRUE(write_msr(cpu, 0xc000'0080, efer::sce | efer::nxe, false));
}

TEST_F(Registers, TscAdjustFollowsTheTscAndMovesIt) {
  ASSERT_TRUE(write_msr(cpu, 0x10, 5'000'000, false));
  EXPECT_EQ(msr(0x3b), 4'000'000u);
  ASSERT_TRUE(write_msr(cpu, 0x3b, 4'000'100, false));
  EXPECT_EQ(msr(0x10), 5'000'100u);
}

TEST_F(Registers, EveryListedMsrCanBeReadAndWrittenBack) {
  m.enter_long(0);
  for (const uint32_t index : msr_index_list()) {
    if (index == 0x6e0) continue;  // the platform's, which this test's has not
    uint64_t value = 0;
    EXPECT_TRUE(read_msr(cpu, index, value, true)) << std::hex << index;
    EXPECT_TRUE(write_msr(cpu, index, value, true)) << std::hex << index;
  }
}

TEST_F(Registers, KvmclockPageDescribesTheTsc) {
  ASSERT_TRUE(write_msr(cpu, 0x4b56'4d01, 0x6000 | 1, false));
  EXPECT_EQ(m.get<uint32_t>(0x6000) & 1, 0u);
  EXPECT_NE(m.get<uint32_t>(0x6000), 0u);
  EXPECT_EQ(m.get<uint64_t>(0x6008), m.platform.time);
  EXPECT_EQ(m.get<uint64_t>(0x6010), 5'000'000'000u);
  const auto mul = m.get<uint32_t>(0x6018);
  const auto shift = m.get<int8_t>(0x601c);
  EXPECT_EQ(m.get<uint8_t>(0x601d), 1);
  // One second of a 2 GHz TSC.
  const double shifted = shift < 0 ? 2e9 / (1 << -shift) : 2e9 * (1 << shift);
  EXPECT_NEAR(shifted * mul / 4294967296.0, 1e9, 2);
}

TEST_F(Registers, WallClockIsTheBootTime) {
  ASSERT_TRUE(write_msr(cpu, 0x4b56'4d00, 0x6000, false));
  EXPECT_EQ(m.get<uint32_t>(0x6004), 1'700'000'000u);
  EXPECT_EQ(m.get<uint32_t>(0x6008), 123u);
}

TEST_F(Registers, ClockScaleCoversSlowAndFastCounters) {
  for (const uint32_t khz : {1000u, 999'999u, 1'000'000u, 2'596'123u, 9'000'000u}) {
    const ClockScale scale = clock_scale(khz);
    const double ns = static_cast<double>(scale.mul) / 4294967296.0 *
                      (scale.shift < 0 ? 1.0 / (1 << -scale.shift) : 1 << scale.shift);
    EXPECT_NEAR(ns * khz, 1e6, 1.0) << khz;
  }
}

TEST_F(Registers, PagesWrittenAtDifferentTimesAgree) {
  const ClockScale scale = clock_scale(2'596'166);
  const uint64_t base = 0x1234'5678'9abc, later = base + 26'000'000'000;
  const uint64_t line = scale.nanoseconds(later) - scale.nanoseconds(base);
  EXPECT_NEAR(static_cast<double>(line), static_cast<double>(scale.nanoseconds(later - base)), 2);
}

// --- CPUID -------------------------------------------------------------------------------------------------

TEST_F(Registers, HostCpuidIsASubsetOfTheHostAndHasABasis) {
  const Features f(host_cpuid());
  const uint32_t needed =
      cpuid1_edx::fpu | cpuid1_edx::sse2 | cpuid1_edx::apic | cpuid1_edx::pge | cpuid1_edx::pae;
  EXPECT_EQ(f.leaf1_edx & needed, needed);
  EXPECT_EQ(f.leaf1_ecx & (cpuid1_ecx::vmx | cpuid1_ecx::monitor), 0u);
  EXPECT_EQ(f.ext1_ecx & cpuid_ext_ecx::svm, 0u);
  EXPECT_EQ(f.leaf7_ecx & cpuid7_ecx::la57, 0u);
  const Features::Result kvm = f.query(0x4000'0000, 0);
  EXPECT_EQ(kvm.ebx, 0x4b4d'564bu);
  EXPECT_EQ(__builtin_cpu_supports("avx2") != 0, (f.leaf7_ebx & cpuid7_ebx::avx2) != 0);
}

TEST_F(Registers, CpuidFollowsControlRegisters) {
  EXPECT_EQ(cpuid(cpu, 1, 0).ecx & cpuid1_ecx::osxsave, 0u);
  cpu.cr4 |= cr4::osxsave;
  EXPECT_NE(cpuid(cpu, 1, 0).ecx & cpuid1_ecx::osxsave, 0u);
  EXPECT_NE(cpuid(cpu, 1, 0).edx & cpuid1_edx::apic, 0u);
  m.platform.apic_base = 0xfee0'0000;
  EXPECT_EQ(cpuid(cpu, 1, 0).edx & cpuid1_edx::apic, 0u);
  EXPECT_EQ(cpuid(cpu, 0xd, 0).ebx, 576u);
  if ((cpu.features.xcr0_valid & 4) != 0) {
    cpu.xcr0 = 7;
    EXPECT_EQ(cpuid(cpu, 0xd, 0).ebx, 832u);
    EXPECT_EQ(cpuid(cpu, 0xd, 1).ebx, 832u);
  }
}

TEST_F(Registers, LeavesBeyondTheLastFollowTheVendor) {
  auto entries = host_cpuid();
  const Features host(entries);
  const Features::Result beyond = host.query(0x1234, 0);
  if (host.amd_like) {
    EXPECT_EQ(beyond.eax | beyond.ebx | beyond.ecx | beyond.edx, 0u);
  } else {
    EXPECT_EQ(beyond.eax, host.query(0xd, 0).eax);
  }
}

// --- exchange ----------------------------------------------------------------------------------------------

TEST_F(Registers, SregsRoundTrip) {
  m.enter_long(3);
  const kvm_sregs before = get_sregs(cpu);
  m.enter_protected(0);
  ASSERT_EQ(set_sregs(cpu, before), 0);
  EXPECT_EQ(cpu.cpl(), 3u);
  EXPECT_EQ(cpu.mode(), Mode::bits64);
  const kvm_sregs after = get_sregs(cpu);
  EXPECT_EQ(std::memcmp(&before, &after, sizeof before), 0);
}

TEST_F(Registers, SregsRefuseImpossibleModes) {
  m.enter_long(0);
  kvm_sregs sregs = get_sregs(cpu);
  sregs.cr4 &= ~cr4::pae;
  EXPECT_EQ(set_sregs(cpu, sregs), EINVAL);
  sregs = get_sregs(cpu);
  sregs.cr0 &= ~cr0::pe;
  EXPECT_EQ(set_sregs(cpu, sregs), EINVAL);
  sregs = get_sregs(cpu);
  sregs.efer &= ~efer::lma;
  EXPECT_EQ(set_sregs(cpu, sregs), EINVAL);
  sregs = get_sregs(cpu);
  sregs.cr4 |= 1 << 13;
  EXPECT_EQ(set_sregs(cpu, sregs), EINVAL);
}

TEST_F(Registers, RegsRoundTrip) {
  kvm_regs regs{};
  regs.rax = 1;
  regs.r15 = 15;
  regs.rip = 0x1000;
  regs.rflags = 0x246;
  set_regs(cpu, regs);
  const kvm_regs after = get_regs(cpu);
  EXPECT_EQ(std::memcmp(&regs, &after, sizeof regs), 0);
}

TEST_F(Registers, EventsRoundTrip) {
  cpu.raise(Exception::gp, 0x18);
  cpu.nmi_blocked = true;
  cpu.interrupt_shadow = true;
  const kvm_vcpu_events events = get_events(cpu);
  cpu.pending = {};
  cpu.nmi_blocked = cpu.interrupt_shadow = false;
  ASSERT_TRUE(valid_events(events));
  set_events(cpu, events);
  EXPECT_TRUE(m.faulted(Exception::gp, 0x18));
  EXPECT_TRUE(cpu.nmi_blocked);
  EXPECT_TRUE(cpu.interrupt_shadow);
  kvm_vcpu_events bad = events;
  bad.exception.nr = 40;
  EXPECT_FALSE(valid_events(bad));
}

TEST_F(Registers, XcrsAndDebugRegistersAreValidated) {
  kvm_xcrs xcrs = get_xcrs(cpu);
  xcrs.xcrs[0].value = 2;
  EXPECT_EQ(set_xcrs(cpu, xcrs), EINVAL);
  kvm_debugregs debug = get_debugregs(cpu);
  debug.dr7 = uint64_t{1} << 40;
  EXPECT_EQ(set_debugregs(cpu, debug), EINVAL);
}

}  // namespace
}  // namespace lodge::kvm::soft
