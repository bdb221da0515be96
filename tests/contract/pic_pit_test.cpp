// The legacy chips in the accelerator: 8259 pair and 8254.
#include "chips.hpp"

namespace lodge::contract {
namespace {

CONTRACT_SUITE(LegacyChips);

// --- 8259

GUEST_CODE(pic_setup, 64,
           "mov $0x11, %al; out %al, $0x20; mov $0x20, %al; out %al, $0x21; mov $4, %al; out %al, $0x21; mov "
           "$1, %al;"
           "out %al, $0x21; mov $0x11, %al; out %al, $0xa0; mov $0x28, %al; out %al, $0xa1; mov $2, %al; out "
           "%al, $0xa1;"
           "mov $1, %al; out %al, $0xa1; mov $0xdb, %al; out %al, $0x21; mov $0xfd, %al; out %al, $0xa1;"
           "out %al, $0xe0;" WAIT);

CONTRACT_TEST(LegacyChips, ALineOfTheFirstPicInterrupts) {
  auto guest = started(test, pic_setup);
  guest->finish();
  EXPECT_GT(guest->vm().irq_line(5, true), 0);
  EXPECT_EQ(guest->trap().vector, 0x25u);
}

CONTRACT_TEST(LegacyChips, ALineOfTheSecondPicComesThroughTheCascade) {
  auto guest = started(test, pic_setup);
  guest->finish();
  EXPECT_GT(guest->vm().irq_line(9, true), 0);
  EXPECT_EQ(guest->trap().vector, 0x29u);
}

GUEST_CODE(pic_order, 64,
           "mov $0x11, %al; out %al, $0x20; mov $0x20, %al; out %al, $0x21; mov $4, %al; out %al, $0x21; mov "
           "$1, %al;"
           "out %al, $0x21; mov $0, %al; out %al, $0x21; out %al, $0xe0; mov $0x0a, %al; out %al, $0x20; in "
           "$0x20, %al;"
           "mov %al, %bl; mov $0x0b, %al; out %al, $0x20; in $0x20, %al; mov %al, %cl; out %al, $0xe0;" WAIT);
CONTRACT_TEST(LegacyChips, ThePicShowsItsRequestsAndServesTheHighestFirst) {
  auto guest = started(test, pic_order);
  guest->finish();
  guest->vm().irq_line(6, true);
  guest->vm().irq_line(3, true);
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rbx & 0xff, 0x48u) << "IRR";
  EXPECT_EQ(guest->vcpu().regs().rcx & 0xff, 0u) << "ISR";
  EXPECT_EQ(guest->trap().vector, 0x23u);
  kvm_irqchip chip = guest->vm().irqchip(KVM_IRQCHIP_PIC_MASTER);
  EXPECT_EQ(chip.chip.pic.isr, 0x08) << "in service after the acknowledge";
  EXPECT_EQ(chip.chip.pic.irr & 0x48, 0x40);
  EXPECT_EQ(chip.chip.pic.irq_base, 0x20);
}

CONTRACT_TEST(LegacyChips, PicStateRoundTrips) {
  auto guest = started(test, pic_order);
  guest->finish();
  kvm_irqchip chip = guest->vm().irqchip(KVM_IRQCHIP_PIC_MASTER);
  chip.chip.pic.imr = 0x5a;
  chip.chip.pic.irq_base = 0x70;
  guest->vm().set_irqchip(chip);
  const kvm_irqchip again = guest->vm().irqchip(KVM_IRQCHIP_PIC_MASTER);
  EXPECT_EQ(again.chip.pic.imr, 0x5a);
  EXPECT_EQ(again.chip.pic.irq_base, 0x70);
}

// --- 8254

GUEST_CODE(pit_ticks, 64,
           "mov $0x11, %al; out %al, $0x20; mov $0x20, %al; out %al, $0x21; mov $4, %al; out %al, $0x21; mov "
           "$1, %al;"
           "out %al, $0x21; mov $0xfe, %al; out %al, $0x21; mov $0x34, %al; out %al, $0x43; mov $0xa9, %al; "
           "out %al, $0x40;"
           "mov $4, %al; out %al, $0x40;" WAIT);
CONTRACT_TEST(LegacyChips, ThePitsFirstChannelInterrupts) {
  auto guest = test.guest({.irqchip = Irqchip::full});
  guest->vm().create_pit2({});
  guest->load(pit_ticks);
  guest->enter(Mode::long64);
  EXPECT_EQ(guest->trap().vector, 0x20u);
}

GUEST_CODE(
    pit_read, 64,
    "in $0x61, %al; and $0xfc, %al; or $1, %al; out %al, $0x61; mov $0xb0, %al; out %al, $0x43; mov $0xff, "
    "%al;"
    "out %al, $0x42; out %al, $0x42; mov $0xe8, %al; out %al, $0x43; in $0x42, %al; mov %al, %bl;"
    "mov $0x80, %al; out %al, $0x43; in $0x42, %al; mov %al, %cl; in $0x42, %al; mov %al, %ch;"
    "1: dec %esi; jnz 1b; mov $0xd8, %al; out %al, $0x43; in $0x42, %al; mov %al, %dl;"
    "in $0x42, %al; mov %al, %dh; out %al, $0xe0");
CONTRACT_TEST(LegacyChips, ThePitCountsDownAndIsReadByLatchAndReadBack) {
  // The counter goes round in 55 ms: whoever takes half of that between the two readings cannot tell which
  // way it went, so a slow accelerator has fewer steps to do there than a fast one.
  bool falls = false;
  for (const unsigned steps : {3000, 300, 30, 300, 3000, 30000}) {
    if (falls) break;
    auto guest = test.guest({.irqchip = Irqchip::full});
    guest->vm().create_pit2({.flags = KVM_PIT_SPEAKER_DUMMY});  // port 0x61 too
    guest->load(pit_read);
    guest->enter(Mode::long64);
    kvm_regs regs = guest->vcpu().regs();
    regs.rsi = steps;
    guest->vcpu().set_regs(regs);
    guest->finish();
    regs = guest->vcpu().regs();
    EXPECT_EQ(regs.rbx & 0x3f, 0x30u) << "status: low then high byte, mode 0, binary";
    const auto first = static_cast<uint16_t>(regs.rcx), second = static_cast<uint16_t>(regs.rdx);
    falls = first != second && static_cast<uint16_t>(first - second) < 0x8000;
  }
  EXPECT_TRUE(falls);
}

CONTRACT_TEST(LegacyChips, PitStateRoundTrips) {
  auto guest = test.guest({.irqchip = Irqchip::full});
  guest->vm().create_pit2({});
  auto state = guest->vm().pit2();
  state.channels[2].count = 0x1234;
  state.channels[2].mode = 3;
  guest->vm().set_pit2(state);
  EXPECT_EQ(guest->vm().pit2().channels[2].count, 0x1234u);
  EXPECT_EQ(guest->vm().pit2().channels[2].mode, 3);
}

}  // namespace
}  // namespace lodge::contract
