// Messages, irqfd and ioeventfd.
#include <array>
#include <chrono>

#include "base/fd.hpp"
#include "chips.hpp"

namespace lodge::contract {
namespace {

CONTRACT_SUITE(Events);

// --- Messages and irqfd

GUEST_CODE(apic_wait, 64, APIC "out %al, $0xe0;" WAIT);
CONTRACT_TEST(Events, AMessageInterrupts) {
  auto guest = started(test, apic_wait);
  guest->finish();
  kvm_msi msi{};
  msi.address_lo = 0xfee00000;
  msi.data = 0x71;
  EXPECT_GT(guest->vm().signal_msi(msi), 0);
  EXPECT_EQ(guest->trap().vector, 0x71u);
}

CONTRACT_TEST(Events, ARouteTurnsAnInterruptIntoAMessage) {
  auto guest = started(test, apic_wait);
  guest->finish();
  const auto route = msi_route(40, 0x72);
  guest->vm().set_gsi_routing({&route, 1});
  EXPECT_GT(guest->vm().irq_line(40, true), 0);
  EXPECT_EQ(guest->trap().vector, 0x72u);
}

CONTRACT_TEST(Events, AnIrqfdInterruptsAWaitingVcpu) {
  auto guest = started(test, apic_wait);
  guest->finish();
  const auto route = msi_route(40, 0x73);
  guest->vm().set_gsi_routing({&route, 1});
  const Fd event = Fd::event();
  guest->vm().irqfd({.fd = static_cast<uint32_t>(event.get()), .gsi = 40});
  guest->together(
      [&] {
        if (guest->trap().vector != 0x73) throw std::runtime_error("another vector");
      },
      [&] {
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
        signal_event(event.get());
      });
}

// A driver moves a vector while the irqfd stays.
CONTRACT_TEST(Events, AnIrqfdFollowsTheRouteWhenItChanges) {
  for (const auto& vectors : {std::array{0x73, 0x74}, std::array{0x74, 0x73}}) {
    auto guest = started(test, apic_wait);
    guest->finish();
    const Fd event = Fd::event();
    auto route = msi_route(40, vectors[0]);
    guest->vm().set_gsi_routing({&route, 1});
    guest->vm().irqfd({.fd = static_cast<uint32_t>(event.get()), .gsi = 40});
    route = msi_route(40, vectors[1]);
    guest->vm().set_gsi_routing({&route, 1});
    signal_event(event.get());
    EXPECT_EQ(guest->trap().vector, static_cast<unsigned>(vectors[1]));
  }
}

GUEST_CODE(apic_look, 64, PICS_OFF APIC "out %al, $0xe0; sti; nop; nop; out %al, $0xe0");
CONTRACT_TEST(Events, ADeassignedIrqfdIsSilent) {
  auto guest = started(test, apic_look);
  guest->finish();
  const auto route = msi_route(40, 0x73);
  guest->vm().set_gsi_routing({&route, 1});
  const Fd event = Fd::event();
  kvm_irqfd irqfd{.fd = static_cast<uint32_t>(event.get()), .gsi = 40};
  guest->vm().irqfd(irqfd);
  irqfd.flags = KVM_IRQFD_FLAG_DEASSIGN;
  guest->vm().irqfd(irqfd);
  signal_event(event.get());
  std::this_thread::sleep_for(std::chrono::milliseconds(2));
  guest->finish();
}

GUEST_CODE(resample_wait, 64,
           PICS_OFF APIC IOAPIC_WRITE(0x25, 0)
               IOAPIC_WRITE(0x24, 0x8040) "out %al, $0xe0; sti; 1: cmpl $1, 0x40000; jb 1b; out %al, $0xe0");
CONTRACT_TEST(Events, AResamplingIrqfdLowersTheLineAtTheEoi) {
  test.needs_capability(KVM_CAP_IRQFD_RESAMPLE, "KVM_CAP_IRQFD_RESAMPLE");
  auto guest = started(test, resample_wait);
  guest->set_gate(0x40, code64, handler);
  guest->finish();
  const Fd trigger = Fd::event(), resample = Fd::event();
  guest->vm().irqfd({.fd = static_cast<uint32_t>(trigger.get()),
                     .gsi = 10,
                     .flags = KVM_IRQFD_FLAG_RESAMPLE,
                     .resamplefd = static_cast<uint32_t>(resample.get())});
  signal_event(trigger.get());
  guest->finish();
  EXPECT_GE(take_event(resample.get()), 1u);
}

// --- ioeventfd

GUEST_CODE(notify, 64,
           "mov $0x1234, %eax; out %ax, $0x50; mov $0x99, %eax; out %ax, $0x50; mov $0xd0000000, %ebx; movl "
           "$7, (%rbx);"
           "movl $8, (%rbx); out %al, $0xe0");
CONTRACT_TEST(Events, IoeventfdsAnswerInsteadOfExits) {
  auto guest = test.guest();
  guest->load(notify);
  guest->enter(Mode::long64);
  const Fd port = Fd::event(), memory = Fd::event();
  kvm_ioeventfd event{};
  event.addr = 0x50;
  event.len = 2;
  event.fd = port.get();
  event.flags = KVM_IOEVENTFD_FLAG_PIO;
  guest->vm().ioeventfd(event);
  event.addr = 0xd0000000;
  event.len = 4;
  event.fd = memory.get();
  event.flags = 0;
  guest->vm().ioeventfd(event);
  guest->finish();
  EXPECT_EQ(take_event(port.get()), 2u);
  EXPECT_EQ(take_event(memory.get()), 2u);
}

CONTRACT_TEST(Events, AnIoeventfdWithAValueTakesOnlyThatValue) {
  auto guest = test.guest();
  guest->load(notify);
  guest->enter(Mode::long64);
  const Fd port = Fd::event(), memory = Fd::event();
  kvm_ioeventfd event{};
  event.datamatch = 0x1234;
  event.addr = 0x50;
  event.len = 2;
  event.fd = port.get();
  event.flags = KVM_IOEVENTFD_FLAG_PIO | KVM_IOEVENTFD_FLAG_DATAMATCH;
  guest->vm().ioeventfd(event);
  event.datamatch = 8;
  event.addr = 0xd0000000;
  event.len = 4;
  event.fd = memory.get();
  event.flags = KVM_IOEVENTFD_FLAG_DATAMATCH;
  guest->vm().ioeventfd(event);
  auto exit = guest->run();
  ASSERT_TRUE(Guest::is_out(exit, 0x50)) << guest->describe(exit);
  EXPECT_EQ(exit.io().data[0], 0x99);
  exit = guest->run();
  ASSERT_EQ(exit.reason(), KVM_EXIT_MMIO) << guest->describe(exit);
  EXPECT_EQ(exit.mmio().data[0], 7);
  guest->finish();
  EXPECT_EQ(take_event(port.get()), 1u);
  EXPECT_EQ(take_event(memory.get()), 1u);
}

CONTRACT_TEST(Events, ADeassignedIoeventfdExitsAgain) {
  auto guest = test.guest();
  guest->load(notify);
  guest->enter(Mode::long64);
  const Fd port = Fd::event();
  kvm_ioeventfd event{};
  event.addr = 0x50;
  event.len = 2;
  event.fd = port.get();
  event.flags = KVM_IOEVENTFD_FLAG_PIO;
  guest->vm().ioeventfd(event);
  event.flags |= KVM_IOEVENTFD_FLAG_DEASSIGN;
  guest->vm().ioeventfd(event);
  EXPECT_TRUE(Guest::is_out(guest->run(), 0x50));
}

}  // namespace
}  // namespace lodge::contract
