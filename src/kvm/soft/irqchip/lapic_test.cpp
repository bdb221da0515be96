#include "kvm/soft/irqchip/lapic.hpp"

#include <gtest/gtest.h>

#include <cstring>

#include "kvm/soft/irqchip/irqchip.hpp"
#include "kvm/soft/irqchip/lapic_registers.hpp"
#include "kvm/soft/irqchip/test_support.hpp"

namespace lodge::kvm::soft {
namespace {

constexpr uint64_t xapic = Lapic::default_base | Lapic::base_enable;
constexpr uint64_t x2apic = xapic | Lapic::base_x2apic;

// Two vCPUs in an otherwise complete irqchip; both LAPICs enabled by software unless a test resets them.
class LapicTest : public testing::Test {
 protected:
  LapicTest() {
    chip.create_full();
    boot = &chip.add_vcpu(0, port0);
    other = &chip.add_vcpu(1, port1);
    for (auto* lapic : {boot, other}) lapic->mmio_write(0xf0, 0x1ff);
  }
  static void write(Lapic& lapic, uint32_t offset, uint32_t value) { lapic.mmio_write(offset, value); }
  static uint32_t read(Lapic& lapic, uint32_t offset) { return lapic.mmio_read(offset); }
  static void send(Lapic& lapic, uint32_t destination, uint32_t low) {
    write(lapic, 0x310, destination << 24);
    write(lapic, 0x300, low);
  }
  static void make_x2apic(Lapic& lapic) {
    ASSERT_TRUE(lapic.set_apic_base(lapic.apic_base() | Lapic::base_x2apic));
  }
  int deliver(uint8_t vector, uint32_t destination = 0) {
    kvm_msi msi{};
    msi.address_lo = 0xfee00000 | destination << 12;
    msi.data = vector;
    return chip.signal_msi(msi);
  }
  static uint64_t msr(Lapic& lapic, uint32_t index) {
    uint64_t value = 0;
    EXPECT_TRUE(lapic.msr_read(index, value)) << std::hex << index;
    return value;
  }

  FakeClock clock;
  FakePort port0{clock}, port1{clock};
  Irqchip chip{clock};
  Lapic* boot = nullptr;
  Lapic* other = nullptr;
};

// --- Reset and identification ---

TEST_F(LapicTest, ComesUpDisabledBySoftwareWithMaskedLvtsAndLint0OpenOnTheBootProcessor) {
  boot->reset();
  other->reset();
  EXPECT_EQ(boot->apic_base(), xapic | Lapic::base_bsp);
  EXPECT_EQ(other->apic_base(), xapic);
  EXPECT_EQ(read(*other, 0x20), 1u << 24);
  EXPECT_EQ(read(*boot, 0x30), 0x00050014u);
  EXPECT_EQ(read(*boot, 0xf0), 0xffu);
  EXPECT_EQ(read(*boot, 0xe0), 0xffffffffu);
  EXPECT_EQ(read(*boot, 0x320), 0x10000u);
  EXPECT_EQ(read(*boot, 0x350), 0x700u);
  EXPECT_EQ(read(*other, 0x350), 0x10000u);
  EXPECT_EQ(deliver(0x40), 0);
}

TEST_F(LapicTest, SoftwareDisableMasksEveryLvtEntryAndRefusesUnmasking) {
  write(*boot, 0x320, 0x31);
  write(*boot, 0xf0, 0xff);
  EXPECT_EQ(read(*boot, 0x320), 0x10031u);
  write(*boot, 0x320, 0x31);
  EXPECT_EQ(read(*boot, 0x320), 0x10031u);
}

// --- Priorities ---

TEST_F(LapicTest, TakesTheHighestVectorFirstAndHoldsLowerClassesUntilEoi) {
  EXPECT_EQ(deliver(0x41), 1);
  EXPECT_EQ(deliver(0x52), 1);
  EXPECT_GT(port0.changes, 0);
  EXPECT_TRUE(boot->maybe_pending());
  EXPECT_EQ(boot->pending_vector(), 0x52);
  EXPECT_EQ(boot->acknowledge(), 0x52);
  EXPECT_EQ(read(*boot, 0xa0), 0x50u);
  EXPECT_EQ(boot->pending_vector(), -1);
  EXPECT_FALSE(boot->maybe_pending());
  EXPECT_EQ(boot->acknowledge(), -1);
  const int before = port0.changes;
  write(*boot, 0xb0, 0);
  EXPECT_GT(port0.changes, before);
  EXPECT_EQ(boot->acknowledge(), 0x41);
}

TEST_F(LapicTest, AnInterruptOfAHigherClassInterruptsTheHandler) {
  deliver(0x41);
  EXPECT_EQ(boot->acknowledge(), 0x41);
  deliver(0x4f);
  EXPECT_EQ(boot->pending_vector(), -1);  // same class
  deliver(0x51);
  EXPECT_EQ(boot->acknowledge(), 0x51);
  write(*boot, 0xb0, 0);
  EXPECT_EQ(read(*boot, 0x100 + 0x20), 1u << 1);  // ISR: 0x41 is still served
}

TEST_F(LapicTest, ASecondRequestOfAPendingVectorIsCoalescedAndOneDuringServiceIsKept) {
  EXPECT_EQ(deliver(0x41), 1);
  EXPECT_EQ(deliver(0x41), 1);
  EXPECT_EQ(boot->acknowledge(), 0x41);
  EXPECT_EQ(deliver(0x41), 1);
  EXPECT_EQ(boot->pending_vector(), -1);
  write(*boot, 0xb0, 0);
  EXPECT_EQ(boot->acknowledge(), 0x41);
}

TEST_F(LapicTest, TaskPriorityHoldsItsClassAndIsCr8) {
  deliver(0x45);
  boot->set_cr8(4);
  EXPECT_EQ(read(*boot, 0x80), 0x40u);
  EXPECT_EQ(boot->pending_vector(), -1);
  write(*boot, 0x80, 0x3f);
  EXPECT_EQ(boot->cr8(), 3);
  EXPECT_EQ(read(*boot, 0xa0), 0x3fu);
  EXPECT_EQ(boot->pending_vector(), 0x45);
}

TEST_F(LapicTest, AnEoiWithNothingInServiceIsHarmless) {
  write(*boot, 0xb0, 0);
  EXPECT_EQ(boot->pending_vector(), -1);
}

// --- IPIs and destinations ---

TEST_F(LapicTest, PhysicalDestinationReachesOneAndBroadcastReachesAll) {
  send(*boot, 1, 0x4041);
  EXPECT_EQ(other->pending_vector(), 0x41);
  EXPECT_EQ(boot->pending_vector(), -1);
  send(*boot, 0xff, 0x4042);
  EXPECT_EQ(other->pending_vector(), 0x42);
  EXPECT_EQ(boot->pending_vector(), 0x42);
}

TEST_F(LapicTest, ShorthandsChooseSelfAllAndOthers) {
  send(*boot, 0, 0x44041);
  EXPECT_EQ(boot->acknowledge(), 0x41);
  EXPECT_EQ(other->pending_vector(), -1);
  send(*boot, 0, 0x84051);
  EXPECT_EQ(boot->acknowledge(), 0x51);
  EXPECT_EQ(other->acknowledge(), 0x51);
  send(*boot, 0, 0xc4061);
  EXPECT_EQ(boot->pending_vector(), -1);
  EXPECT_EQ(other->pending_vector(), 0x61);
}

TEST_F(LapicTest, FlatLogicalDestinationMatchesAnyCommonBit) {
  write(*boot, 0xd0, 0x01000000);
  write(*other, 0xd0, 0x02000000);
  send(*boot, 2, 0x4841);
  EXPECT_EQ(boot->pending_vector(), -1);
  EXPECT_EQ(other->pending_vector(), 0x41);
  send(*boot, 3, 0x4842);
  EXPECT_EQ(boot->pending_vector(), 0x42);
  EXPECT_EQ(other->pending_vector(), 0x42);
}

TEST_F(LapicTest, ClusterLogicalDestinationMatchesWithinTheCluster) {
  for (auto* lapic : {boot, other}) write(*lapic, 0xe0, 0x0fffffff);
  write(*boot, 0xd0, 0x11000000);
  write(*other, 0xd0, 0x21000000);
  send(*boot, 0x21, 0x4841);
  EXPECT_EQ(boot->pending_vector(), -1);
  EXPECT_EQ(other->pending_vector(), 0x41);
}

TEST_F(LapicTest, LowestPriorityGoesToExactlyOne) {
  write(*boot, 0xd0, 0x01000000);
  write(*other, 0xd0, 0x02000000);
  for (uint8_t vector = 0x40; vector < 0x50; ++vector) {
    send(*boot, 3, 0x4900u | vector);
    const int taken =
        (boot->pending_vector() == vector ? 1 : 0) + (other->pending_vector() == vector ? 1 : 0);
    EXPECT_EQ(taken, 1) << int{vector};
  }
}

TEST_F(LapicTest, NmiSmiInitAndStartupReachThePort) {
  send(*boot, 1, 0x4400);
  EXPECT_EQ(port1.nmis, 1);
  send(*boot, 1, 0x4200);
  EXPECT_EQ(port1.smis, 1);
  send(*boot, 1, 0xc500);
  EXPECT_EQ(port1.inits, 1);
  send(*boot, 1, 0x8500);  // level de-assert
  EXPECT_EQ(port1.inits, 1);
  send(*boot, 1, 0x4698);
  EXPECT_EQ(port1.sipi_vector, 0x98);
  EXPECT_EQ(port0.nmis + port0.inits, 0);
}

TEST_F(LapicTest, NmiInitAndStartupReachALapicThatSoftwareHasDisabled) {
  other->reset();
  send(*boot, 1, 0x4400);
  send(*boot, 1, 0xc500);
  send(*boot, 1, 0x4610);
  EXPECT_EQ(port1.nmis, 1);
  EXPECT_EQ(port1.inits, 1);
  EXPECT_EQ(port1.sipi_vector, 0x10);
}

TEST_F(LapicTest, InitResetKeepsBaseAndIdAndForgetsTheRest) {
  write(*other, 0x20, 5u << 24);
  write(*other, 0x80, 0x20);
  deliver(0x41, 5);
  other->init_reset();
  EXPECT_EQ(other->apic_base(), xapic);
  EXPECT_EQ(read(*other, 0x20), 5u << 24);
  EXPECT_EQ(read(*other, 0x80), 0u);
  EXPECT_EQ(read(*other, 0xf0), 0xffu);
  EXPECT_EQ(other->pending_vector(), -1);
}

TEST_F(LapicTest, ALapicWhoseVcpuHasGoneTakesNothing) {
  chip.remove_vcpu(*other);
  send(*boot, 1, 0x4400);
  send(*boot, 1, 0x4041);
  EXPECT_EQ(port1.nmis, 0);
  EXPECT_EQ(port1.changes, 0);
}

// --- Errors ---

TEST_F(LapicTest, IllegalVectorsAreReportedByEsrAndTheErrorInterrupt) {
  write(*boot, 0x370, 0x33);
  send(*boot, 1, 0x4005);  // sends vector 5
  EXPECT_EQ(boot->acknowledge(), 0x33);
  EXPECT_EQ(read(*boot, 0x280), 0u);  // visible only after a write
  write(*boot, 0x280, 0);
  EXPECT_EQ(read(*boot, 0x280), 0x20u);
  write(*boot, 0x280, 0);
  EXPECT_EQ(read(*boot, 0x280), 0u);
  EXPECT_EQ(deliver(3, 1), 0);  // receives one
  write(*other, 0x280, 0);
  EXPECT_EQ(read(*other, 0x280), 0x40u);
}

TEST_F(LapicTest, AnIllegalErrorVectorDoesNotReportItselfForever) {
  write(*boot, 0x370, 0x05);
  send(*boot, 1, 0x4005);
  write(*boot, 0x280, 0);
  EXPECT_EQ(read(*boot, 0x280), 0x60u);
}

TEST_F(LapicTest, ReservedRegistersSetIllegalRegisterAndReadZero) {
  EXPECT_EQ(read(*boot, 0x40), 0u);
  write(*boot, 0x3f0, 1);
  write(*boot, 0x280, 0);
  EXPECT_EQ(read(*boot, 0x280), 0x80u);
  write(*boot, 0xa0, 5);  // read-only: ignored
  write(*boot, 0x280, 0);
  EXPECT_EQ(read(*boot, 0x280), 0u);
}

TEST_F(LapicTest, OnlyAlignedDoublewordsAreWritten) {
  const uint32_t value = 0x55;
  boot->mmio(0x81, true, const_cast<uint32_t*>(&value), 4);
  boot->mmio(0x80, true, const_cast<uint32_t*>(&value), 2);
  EXPECT_EQ(read(*boot, 0x80), 0u);
  boot->mmio(0x80, true, const_cast<uint32_t*>(&value), 4);
  EXPECT_EQ(read(*boot, 0x80), 0x55u);
  uint8_t bytes[8];
  std::memset(bytes, 0xee, sizeof bytes);
  boot->mmio(0x32, false, bytes, 8);  // upper half of the version register, then nothing
  EXPECT_EQ(bytes[0], 5);
  EXPECT_EQ(bytes[2], 0);
  EXPECT_EQ(bytes[7], 0);
}

// --- Local interrupts ---

TEST_F(LapicTest, Lint1AsNmiAndPerformanceCounterAsFixedInterrupt) {
  write(*boot, 0x360, 0x400);
  boot->local_interrupt(Lapic::Local::lint1);
  EXPECT_EQ(port0.nmis, 1);
  write(*boot, 0x340, 0x44);
  boot->local_interrupt(Lapic::Local::performance);
  EXPECT_EQ(boot->acknowledge(), 0x44);
  EXPECT_EQ(read(*boot, 0x340), 0x10044u);  // masks itself
  write(*boot, 0x330, 0x10045);
  boot->local_interrupt(Lapic::Local::thermal);
  EXPECT_EQ(boot->pending_vector(), -1);
}

// --- x2APIC ---

TEST_F(LapicTest, ModeTransitionsFollowTheStateDiagram) {
  EXPECT_FALSE(boot->set_apic_base(Lapic::default_base | Lapic::base_x2apic));  // EXTD without EN
  EXPECT_TRUE(boot->set_apic_base(x2apic | Lapic::base_bsp));
  EXPECT_FALSE(boot->set_apic_base(xapic | Lapic::base_bsp));  // x2APIC to xAPIC
  EXPECT_TRUE(boot->set_apic_base(Lapic::default_base | Lapic::base_bsp));
  EXPECT_FALSE(boot->set_apic_base(x2apic | Lapic::base_bsp));  // disabled to x2APIC
  EXPECT_TRUE(boot->set_apic_base(xapic | Lapic::base_bsp));
  EXPECT_TRUE(boot->set_apic_base(Lapic::default_base, true));
  EXPECT_TRUE(boot->set_apic_base(x2apic, true));  // the VMM may
  EXPECT_FALSE(boot->set_apic_base(xapic | 1, true));
  boot->set_cpuid(false, 40);
  EXPECT_FALSE(boot->set_apic_base(x2apic, true));
  EXPECT_FALSE(boot->set_apic_base(xapic | uint64_t{1} << 40, true));
}

TEST_F(LapicTest, ADisabledLapicForgetsItsRegistersAndHidesItsPage) {
  write(*boot, 0x80, 0x20);
  EXPECT_TRUE(boot->handles_gpa(0xfee00080));
  boot->set_apic_base(Lapic::default_base | Lapic::base_bsp);
  EXPECT_FALSE(boot->handles_gpa(0xfee00080));
  EXPECT_EQ(deliver(0x41), 0);
  EXPECT_TRUE(boot->accepts_extint());
  boot->set_apic_base(xapic | Lapic::base_bsp);
  EXPECT_EQ(read(*boot, 0x80), 0u);
  EXPECT_EQ(read(*boot, 0xf0), 0xffu);
  EXPECT_FALSE(boot->accepts_extint());
}

TEST_F(LapicTest, ThePageMoves) {
  boot->set_apic_base((xapic & 0xfff) | 0xd0000000);
  EXPECT_TRUE(boot->handles_gpa(0xd0000fff));
  EXPECT_FALSE(boot->handles_gpa(0xd0001000));
  EXPECT_FALSE(boot->handles_gpa(0xfee00000));
}

TEST_F(LapicTest, X2apicMsrsWorkOnlyInX2apicModeAndThePageOnlyOutsideOfIt) {
  uint64_t value = 0;
  EXPECT_FALSE(boot->msr_read(0x802, value));
  EXPECT_FALSE(boot->msr_write(0x808, 0));
  make_x2apic(*other);
  EXPECT_EQ(msr(*other, 0x802), 1u);
  EXPECT_EQ(msr(*other, 0x80d), 2u);  // cluster 0, bit 1
  EXPECT_EQ(msr(*other, 0x803), 0x00050014u);
  EXPECT_EQ(read(*other, 0x20), 0xffffffffu);
  write(*other, 0x80, 0x50);
  EXPECT_EQ(other->cr8(), 0);
}

TEST_F(LapicTest, X2apicRefusesReadOnlyMissingAndReservedAccesses) {
  make_x2apic(*boot);
  uint64_t value = 0;
  EXPECT_FALSE(boot->msr_read(0x80e, value));  // DFR
  EXPECT_FALSE(boot->msr_read(0x80b, value));  // EOI
  EXPECT_FALSE(boot->msr_read(0x831, value));  // ICR high
  EXPECT_FALSE(boot->msr_read(0x83f, value));  // SELF IPI
  EXPECT_FALSE(boot->msr_read(0x800, value));
  EXPECT_FALSE(boot->msr_write(0x802, 0));      // ID
  EXPECT_FALSE(boot->msr_write(0x80d, 0));      // LDR
  EXPECT_FALSE(boot->msr_write(0x80b, 1));      // EOI takes only 0
  EXPECT_FALSE(boot->msr_write(0x828, 1));      // ESR takes only 0
  EXPECT_FALSE(boot->msr_write(0x808, 0x100));  // TPR: 8 bits
  EXPECT_FALSE(boot->msr_write(0x838, uint64_t{1} << 32));
  EXPECT_FALSE(boot->msr_write(0x830, 1u << 13));
  EXPECT_TRUE(boot->msr_write(0x80b, 0));
  EXPECT_TRUE(boot->msr_write(0x808, 0x20));
  EXPECT_EQ(boot->cr8(), 2);
}

TEST_F(LapicTest, X2apicIcrIsOne64BitWriteWith32BitDestinations) {
  make_x2apic(*boot);
  make_x2apic(*other);
  EXPECT_TRUE(boot->msr_write(0x830, uint64_t{1} << 32 | 0x4041));
  EXPECT_EQ(other->pending_vector(), 0x41);
  EXPECT_EQ(msr(*boot, 0x830), uint64_t{1} << 32 | 0x4041);
  EXPECT_TRUE(boot->msr_write(0x830, uint64_t{0xffffffff} << 32 | 0x4051));
  EXPECT_EQ(boot->pending_vector(), 0x51);
  EXPECT_EQ(other->pending_vector(), 0x51);
  EXPECT_TRUE(boot->msr_write(0x830, uint64_t{0xff} << 32 | 0x4061));  // no broadcast: nobody has this ID
  EXPECT_EQ(other->pending_vector(), 0x51);
  EXPECT_TRUE(boot->msr_write(0x830, uint64_t{2} << 32 | 0x4871));  // logical: cluster 0, bit 1
  EXPECT_EQ(other->pending_vector(), 0x71);
  EXPECT_EQ(boot->pending_vector(), 0x51);
  EXPECT_TRUE(boot->msr_write(0x83f, 0x81));
  EXPECT_EQ(boot->pending_vector(), 0x81);
}

// --- ExtINT ---

TEST_F(LapicTest, TheUserspacePicInjectsOneVectorAtATimeThroughLint0) {
  EXPECT_TRUE(boot->accepts_extint());
  EXPECT_FALSE(other->accepts_extint());
  EXPECT_TRUE(boot->inject_extint(0x08));
  EXPECT_FALSE(boot->inject_extint(0x09));
  EXPECT_GT(port0.changes, 0);
  EXPECT_EQ(boot->injected_extint(), 0x08);
  boot->set_cr8(15);  // INTR knows no priority
  EXPECT_EQ(boot->pending_vector(), 0x08);
  write(*boot, 0x350, 0x10700);
  EXPECT_EQ(boot->pending_vector(), -1);
  write(*boot, 0x350, 0x700);
  EXPECT_EQ(boot->acknowledge(), 0x08);
  EXPECT_EQ(boot->acknowledge(), -1);
}

// --- State ---

TEST_F(LapicTest, StateRoundTripsWithATimerUnderWay) {
  write(*boot, 0x80, 0x10);
  write(*boot, 0xd0, 0x04000000);
  write(*boot, 0x3e0, 0xb);
  write(*boot, 0x320, 0x20041);
  write(*boot, 0x380, 1'000'000);
  deliver(0x61);
  boot->acknowledge();
  deliver(0x71);
  clock.advance(300'000);
  const kvm_lapic_state saved = boot->state(true);

  FakePort port2{clock};
  Irqchip chip2{clock};
  chip2.create_full();
  Lapic& copy = chip2.add_vcpu(0, port2);
  ASSERT_TRUE(copy.set_state(saved, true));
  const kvm_lapic_state again = copy.state(true);
  EXPECT_EQ(std::memcmp(&saved, &again, sizeof saved), 0);
  EXPECT_EQ(read(copy, 0x390), 700'000u);
  EXPECT_EQ(copy.acknowledge(), 0x71);
  write(copy, 0xb0, 0);
  write(copy, 0xb0, 0);
  clock.advance(700'000);
  EXPECT_EQ(copy.acknowledge(), 0x41);
  write(copy, 0xb0, 0);
  clock.advance(1'000'000);
  EXPECT_EQ(copy.acknowledge(), 0x41);
}

TEST_F(LapicTest, StateHasTheIdInTheFormatThatTheVmmChose) {
  make_x2apic(*other);
  uint32_t id = 0;
  kvm_lapic_state page = other->state(true);
  std::memcpy(&id, page.regs + 0x20, 4);
  EXPECT_EQ(id, 1u);
  page.regs[0x20] = 7;
  EXPECT_FALSE(other->set_state(page, true));
  page = other->state(false);
  std::memcpy(&id, page.regs + 0x20, 4);
  EXPECT_EQ(id, 1u << 24);
  EXPECT_TRUE(other->set_state(page, false));
  EXPECT_EQ(msr(*other, 0x802), 1u);
}

TEST_F(LapicTest, HostileStateIsBroughtIntoRange) {
  kvm_lapic_state page;
  std::memset(&page, 0xff, sizeof page);
  EXPECT_TRUE(boot->set_state(page, false));
  EXPECT_EQ(read(*boot, 0x80), 0xffu);
  EXPECT_EQ(read(*boot, 0x200), 0xffffffffu) << "vectors 0-15 as well, which are never taken";
  clock.advance(10'000'000'000);
  EXPECT_EQ(boot->pending_vector(), -1);
}

}  // namespace
}  // namespace lodge::kvm::soft
