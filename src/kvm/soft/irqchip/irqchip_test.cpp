#include "kvm/soft/irqchip/irqchip.hpp"

#include <gtest/gtest.h>

#include <cstring>

#include "kvm/soft/irqchip/test_support.hpp"

namespace lodge::kvm::soft {
namespace {

class IrqchipTest : public testing::Test {
 protected:
  void full() {
    chip.create_full();
    add_vcpus();
    for (const uint16_t port : {0x21, 0xa1}) out(port, 0xff);  // the 8259s stay out of it until programmed
  }
  void split(unsigned pins = 24) {
    chip.create_split(pins);
    add_vcpus();
  }
  void add_vcpus() {
    boot = &chip.add_vcpu(0, port0);
    other = &chip.add_vcpu(1, port1);
    for (auto* lapic : {boot, other}) lapic->mmio_write(0xf0, 0x1ff);
  }
  void out(uint16_t port, uint8_t value) { chip.port_write(port, &value, 1); }
  uint8_t in(uint16_t port) {
    uint8_t value = 0;
    chip.port_read(port, &value, 1);
    return value;
  }
  void ioapic_entry(unsigned pin, uint32_t low, uint8_t destination) {
    const std::pair<uint32_t, uint32_t> writes[] = {
        {0x11 + pin * 2, static_cast<uint32_t>(destination) << 24}, {0x10 + pin * 2, low}};
    for (const auto& [select, value] : writes) {
      chip.mmio_write(0xfec00000, &select, 4);
      chip.mmio_write(0xfec00010, &value, 4);
    }
  }
  void program_pics() {
    for (const uint16_t base : {0x20, 0xa0}) {
      out(base, 0x11);
      out(base + 1, base == 0x20 ? 0x20 : 0x28);
      out(base + 1, base == 0x20 ? 4 : 2);
      out(base + 1, 1);
    }
  }
  void route(std::initializer_list<kvm_irq_routing_entry> entries) {
    chip.set_gsi_routing({entries.begin(), entries.size()});
  }
  static void eoi(Lapic& lapic) { lapic.mmio_write(0xb0, 0); }

  FakeClock clock;
  FakePort port0{clock}, port1{clock};
  Irqchip chip{clock};
  Lapic* boot = nullptr;
  Lapic* other = nullptr;
};

// --- Set-up rules ---

TEST_F(IrqchipTest, WithoutAnIrqchipCallsGiveKvmsErrors) {
  EXPECT_EQ(chip.irq_line(0, true), -ENXIO);
  EXPECT_EQ(chip.signal_msi({}), -EINVAL);
  EXPECT_EQ(error_of([&] { chip.chip(0); }), ENXIO);
  EXPECT_EQ(error_of([&] { chip.pit2(); }), ENXIO);
  EXPECT_EQ(error_of([&] { chip.create_pit({}); }), ENOENT);
  EXPECT_EQ(error_of([&] { chip.set_reinject({}); }), ENXIO);
  EXPECT_EQ(error_of([&] { chip.add_vcpu(0, port0); }), ENXIO);
  EXPECT_EQ(error_of([&] { route({}); }), EINVAL);
  EXPECT_FALSE(chip.handles_port(0x20));
  EXPECT_FALSE(chip.handles_gpa(0xfec00000));
}

TEST_F(IrqchipTest, IsCreatedOnce) {
  full();
  EXPECT_EQ(error_of([&] { chip.create_full(); }), EEXIST);
  EXPECT_EQ(error_of([&] { chip.create_split(24); }), EEXIST);
  chip.create_pit({});
  EXPECT_EQ(error_of([&] { chip.create_pit({}); }), EEXIST);
  EXPECT_EQ(error_of([&] { chip.add_vcpu(1, port1); }), EEXIST);
  chip.remove_vcpu(*other);
  EXPECT_EQ(error_of([&] { chip.add_vcpu(1, port1); }), 0);
  EXPECT_EQ(error_of([&] { chip.chip(3); }), EINVAL);
}

TEST_F(IrqchipTest, SplitHasOnlyLapics) {
  EXPECT_EQ(error_of([&] { chip.create_split(5000); }), EINVAL);
  split();
  EXPECT_FALSE(chip.handles_port(0x20));
  EXPECT_FALSE(chip.handles_gpa(0xfec00000));
  EXPECT_EQ(error_of([&] { chip.chip(0); }), ENXIO);
  EXPECT_EQ(error_of([&] { chip.create_pit({}); }), ENOENT);
  EXPECT_EQ(chip.irq_line(4, true), -1);
}

// --- Lines ---

TEST_F(IrqchipTest, ALineReachesTheIoapicAndTheLapicThatItsEntryNames) {
  full();
  ioapic_entry(4, 0x44, 1);
  EXPECT_GE(chip.irq_line(4, true), 1);
  EXPECT_EQ(other->pending_vector(), 0x44);
  EXPECT_EQ(chip.irq_line(200, true), -1);  // not routed
}

TEST_F(IrqchipTest, The8259InterruptsTheBootProcessorThroughLint0) {
  full();
  program_pics();
  const int before = port0.changes;
  chip.irq_line(12, true);
  EXPECT_GT(port0.changes, before);
  EXPECT_EQ(port1.changes, 0);
  EXPECT_TRUE(boot->maybe_pending());
  EXPECT_FALSE(other->maybe_pending());
  boot->set_cr8(15);
  EXPECT_EQ(boot->pending_vector(), 0x2c);
  EXPECT_EQ(boot->acknowledge(), 0x2c);
  EXPECT_EQ(boot->pending_vector(), -1);
}

TEST_F(IrqchipTest, OpeningLint0AnnouncesAWaiting8259) {
  full();
  program_pics();
  boot->mmio_write(0x350, 0x10700);
  chip.irq_line(1, true);
  EXPECT_EQ(boot->pending_vector(), -1);
  const int before = port0.changes;
  boot->mmio_write(0x350, 0x700);
  EXPECT_GT(port0.changes, before);
  EXPECT_EQ(boot->acknowledge(), 0x21);
}

TEST_F(IrqchipTest, ALevelLineInterruptsAgainAfterItsEoiWhileHigh) {
  full();
  ioapic_entry(10, 0x8051, 0);
  chip.irq_line(10, true);
  EXPECT_EQ(boot->acknowledge(), 0x51);
  EXPECT_EQ(boot->pending_vector(), -1);
  eoi(*boot);
  EXPECT_EQ(boot->acknowledge(), 0x51);
  chip.irq_line(10, false);
  eoi(*boot);
  EXPECT_EQ(boot->pending_vector(), -1);
}

TEST_F(IrqchipTest, RoutingCanBeReplaced) {
  full();
  ioapic_entry(2, 0x32, 0);
  route({chip_route(0, KVM_IRQCHIP_IOAPIC, 2), msi_route(30, 0x61, 0xfee01000)});
  chip.irq_line(0, true);
  EXPECT_EQ(boot->pending_vector(), 0x32);
  EXPECT_EQ(chip.irq_line(30, true), 1);
  EXPECT_EQ(chip.irq_line(30, false), -1);
  EXPECT_EQ(other->pending_vector(), 0x61);
  EXPECT_EQ(chip.irq_line(4, true), -1);
}

TEST_F(IrqchipTest, TheTableThatWasRefusedChangesNothing) {
  full();
  ioapic_entry(4, 0x44, 0);
  EXPECT_EQ(error_of([&] { route({msi_route(4, 0x31), msi_route(4, 0x32)}); }), EINVAL);
  chip.irq_line(4, true);
  EXPECT_EQ(boot->pending_vector(), 0x44);
}

// --- MSIs ---

TEST_F(IrqchipTest, MsisReachTheirDestination) {
  full();
  kvm_msi msi{};
  msi.address_lo = 0xfee01000;
  msi.data = 0x41;
  EXPECT_EQ(chip.signal_msi(msi), 1);
  EXPECT_EQ(other->pending_vector(), 0x41);
  EXPECT_EQ(chip.signal_msi(msi), 1);  // pending already
  msi.address_lo = 0xfeeff000;         // everybody
  msi.data = 0x51;
  EXPECT_EQ(chip.signal_msi(msi), 2);
  msi.address_lo = 0xfee07000;  // nobody
  EXPECT_EQ(chip.signal_msi(msi), 0);
  msi.address_lo = 0xfee00000;
  msi.data = 0x400;  // NMI
  EXPECT_EQ(chip.signal_msi(msi), 1);
  EXPECT_EQ(port0.nmis, 1);
  msi.flags = 1;
  EXPECT_EQ(chip.signal_msi(msi), -EINVAL);
}

TEST_F(IrqchipTest, ExtendedDestinationsReachHighIds) {
  full();
  EXPECT_EQ(error_of([&] { chip.set_x2apic_api(4); }), EINVAL);
  chip.set_x2apic_api(KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK);
  FakePort port{clock};
  Lapic& high = chip.add_vcpu(0x123, port);
  high.set_apic_base(high.apic_base() | Lapic::base_x2apic);
  high.msr_write(0x80f, 0x1ff);
  kvm_msi msi{};
  msi.address_lo = 0xfee23000;
  msi.address_hi = 0x100;
  msi.data = 0x41;
  EXPECT_EQ(chip.signal_msi(msi), 1);
  EXPECT_EQ(high.pending_vector(), 0x41);
  msi.address_hi = 0x101;
  EXPECT_EQ(chip.signal_msi(msi), -EINVAL);
  chip.remove_vcpu(high);
}

TEST_F(IrqchipTest, TheBroadcastQuirkDecidesWhat0xffMeansToX2apics) {
  full();
  other->set_apic_base(other->apic_base() | Lapic::base_x2apic);
  kvm_msi msi{};
  msi.address_lo = 0xfeeff000;
  msi.data = 0x41;
  EXPECT_EQ(chip.signal_msi(msi), 2);
  chip.set_x2apic_api(KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK);
  msi.data = 0x51;
  EXPECT_EQ(chip.signal_msi(msi), 1);
}

// --- Split: EOIs for the VMM's IOAPIC ---

TEST_F(IrqchipTest, SplitReportsTheEoiOfALevelTriggeredRoute) {
  split(2);
  route({msi_route(0, 0x8041), msi_route(1, 0x42), msi_route(2, 0x8043)});
  for (const uint32_t gsi : {0u, 1u, 2u}) chip.irq_line(gsi, true);
  EXPECT_EQ(boot->acknowledge(), 0x43);
  eoi(*boot);
  EXPECT_EQ(boot->take_eoi_exit(), -1);  // GSI 2 is beyond the IOAPIC's pins
  EXPECT_EQ(boot->acknowledge(), 0x42);
  eoi(*boot);
  EXPECT_EQ(boot->take_eoi_exit(), -1);  // edge
  EXPECT_EQ(boot->acknowledge(), 0x41);
  eoi(*boot);
  EXPECT_EQ(boot->take_eoi_exit(), 0x41);
  EXPECT_EQ(boot->take_eoi_exit(), -1);
}

TEST_F(IrqchipTest, SplitOffersEoiSuppression) {
  split();
  EXPECT_EQ(boot->mmio_read(0x30) >> 24, 1u);
  boot->mmio_write(0xf0, 0x11ff);
  route({msi_route(0, 0x8041)});
  chip.irq_line(0, true);
  boot->acknowledge();
  eoi(*boot);
  EXPECT_EQ(boot->take_eoi_exit(), -1);
}

// --- The 8254 ---

TEST_F(IrqchipTest, ThePitTicksOnGsi0AndReinjectsWhenTheGuestIsSlow) {
  full();
  chip.create_pit({});
  ioapic_entry(2, 0x30, 0);
  route({chip_route(0, KVM_IRQCHIP_PIC_MASTER, 0), chip_route(0, KVM_IRQCHIP_IOAPIC, 2)});
  out(0x21, 0xff);
  out(0x43, 0x34);
  out(0x40, 0x9c);
  out(0x40, 0x2e);  // 11932 clocks: 10 ms
  for (int i = 0; i < 4; ++i) clock.advance(10'000'154);
  int taken = 0;
  while (boot->acknowledge() == 0x30) {
    ++taken;
    eoi(*boot);
  }
  EXPECT_EQ(taken, 4);
}

TEST_F(IrqchipTest, ThePitReinjectsThroughThe8259AsWell) {
  full();
  chip.create_pit({});
  program_pics();
  out(0x43, 0x34);
  out(0x40, 0x9c);
  out(0x40, 0x2e);
  for (int i = 0; i < 3; ++i) clock.advance(10'000'154);
  int taken = 0;
  while (boot->acknowledge() == 0x20) {
    ++taken;
    out(0x20, 0x20);
  }
  EXPECT_EQ(taken, 3);
}

TEST_F(IrqchipTest, AnNmiWatchdogOnLint0TicksWithThePit) {
  full();
  chip.create_pit({});
  boot->mmio_write(0x350, 0x400);
  out(0x43, 0x34);
  out(0x40, 0x9c);
  out(0x40, 0x2e);
  clock.advance(10'000'154);
  EXPECT_EQ(port0.nmis, 1);
  EXPECT_EQ(port1.nmis, 0);
}

// --- Guest accesses and state ---

TEST_F(IrqchipTest, ClaimsThePortsAndPageOfItsChips) {
  full();
  for (const uint16_t port : {0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1}) EXPECT_TRUE(chip.handles_port(port));
  for (const uint16_t port : {0x40, 0x61, 0x22, 0x4d2, 0xa2, 0x80}) EXPECT_FALSE(chip.handles_port(port));
  kvm_pit_config config{};
  config.flags = 2;
  EXPECT_EQ(error_of([&] { chip.create_pit(config); }), EINVAL);
  config.flags = KVM_PIT_SPEAKER_DUMMY;
  chip.create_pit(config);
  for (const uint16_t port : {0x40, 0x43, 0x61}) EXPECT_TRUE(chip.handles_port(port));
  EXPECT_TRUE(chip.handles_gpa(0xfec00010));
  EXPECT_FALSE(chip.handles_gpa(0xfec00100));
  EXPECT_FALSE(chip.handles_gpa(0xfee00000));
}

TEST_F(IrqchipTest, AWideAccessIsOneToEachPort) {
  full();
  const uint16_t both = 0x5a0b;  // OCW3 to the command port, OCW1 to the data port
  chip.port_write(0x20, &both, 2);
  EXPECT_EQ(in(0x21), 0x5a);
  uint32_t value = 0;
  chip.port_read(0x20, &value, 4);
  EXPECT_EQ(value, 0xffff5a00u);
}

TEST_F(IrqchipTest, StateOfAllChipsRoundTrips) {
  full();
  chip.create_pit({});
  program_pics();
  out(0x21, 0x55);
  ioapic_entry(7, 0x8077, 1);
  out(0x43, 0xb6);
  out(0x42, 0x10);
  out(0x42, 0x20);
  Irqchip copy(clock);
  copy.create_full();
  copy.create_pit({});
  for (const uint32_t id : {KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC})
    copy.set_chip(chip.chip(id));
  copy.set_pit2(chip.pit2());
  for (const uint32_t id : {KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC}) {
    const kvm_irqchip a = chip.chip(id), b = copy.chip(id);
    EXPECT_EQ(std::memcmp(&a, &b, sizeof a), 0) << id;
  }
  EXPECT_EQ(copy.chip(KVM_IRQCHIP_PIC_MASTER).chip.pic.imr, 0x55);
  EXPECT_EQ(copy.chip(KVM_IRQCHIP_IOAPIC).chip.ioapic.redirtbl[7].fields.vector, 0x77);
  EXPECT_EQ(copy.pit2().channels[2].count, 0x2010u);
}

}  // namespace
}  // namespace lodge::kvm::soft
