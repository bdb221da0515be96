// The in-accelerator irqchip: 8259, IOAPIC, LAPIC and its timer, MSI, irqfd, PIT; and the split irqchip.
#include <chrono>
#include <cstring>

#include "base/fd.hpp"
#include "harness.hpp"

namespace lodge::contract {
namespace {

CONTRACT_SUITE(Chips);

// RBP -> LAPIC, enabled, spurious vector 0xff.
#define APIC "mov $0xfee00000, %ebp; movl $0x1ff, 0xf0(%rbp);"
// RDI -> IOAPIC; one redirection register (index, value).
#define IOAPIC_WRITE(index, value) \
  "mov $0xfec00000, %edi; movl $" #index ", (%rdi); movl $" #value ", 0x10(%rdi);"
#define WAIT "sti; 9: hlt; jmp 9b"
// Time for an interrupt to arrive, some thousand instructions: sent does not mean taken at the very next one.
#define SOON "mov $4000, %esi; 8: dec %esi; jnz 8b;"

constexpr uint64_t counter = 0x40000, handler = 0x48000;

// The PICs wake up unmasked at vector 0 and see the first 16 lines as well.
#define PICS_OFF "mov $0xff, %al; out %al, $0x21; out %al, $0xa1;"

// Counts at 0x40000, ends the interrupt at the LAPIC and returns.
GUEST_CODE(count_handler, 64,
           "push %rax; incl 0x40000; mov $0xfee000b0, %eax; movl $0, (%rax); pop %rax; iretq");

std::unique_ptr<Guest> started(Contract& test, std::span<const uint8_t> code,
                               Irqchip irqchip = Irqchip::full) {
  auto guest = test.guest({.irqchip = irqchip});
  guest->load(code);
  guest->load(count_handler, handler);
  guest->enter(Mode::long64);
  return guest;
}

kvm_irq_routing_entry msi_route(uint32_t gsi, uint32_t vector, bool level = false) {
  kvm_irq_routing_entry route{};
  route.gsi = gsi;
  route.type = KVM_IRQ_ROUTING_MSI;
  route.u.msi.address_lo = 0xfee00000;
  route.u.msi.data = vector | (level ? 0xc000 : 0);
  return route;
}

// --- 8259
// -----------------------------------------------------------------------------------------------------------

GUEST_CODE(pic_setup, 64,
           "mov $0x11, %al; out %al, $0x20; mov $0x20, %al; out %al, $0x21; mov $4, %al; out %al, $0x21; mov "
           "$1, %al;"
           "out %al, $0x21; mov $0x11, %al; out %al, $0xa0; mov $0x28, %al; out %al, $0xa1; mov $2, %al; out "
           "%al, $0xa1;"
           "mov $1, %al; out %al, $0xa1; mov $0xdb, %al; out %al, $0x21; mov $0xfd, %al; out %al, $0xa1;"
           "out %al, $0xe0;" WAIT);

CONTRACT_TEST(Chips, ALineOfTheFirstPicInterrupts) {
  auto guest = started(test, pic_setup);
  guest->finish();
  EXPECT_GT(guest->vm().irq_line(5, true), 0);
  EXPECT_EQ(guest->trap().vector, 0x25u);
}

CONTRACT_TEST(Chips, ALineOfTheSecondPicComesThroughTheCascade) {
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
CONTRACT_TEST(Chips, ThePicShowsItsRequestsAndServesTheHighestFirst) {
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

CONTRACT_TEST(Chips, PicStateRoundTrips) {
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

// --- IOAPIC
// ---------------------------------------------------------------------------------------------------------

GUEST_CODE(ioapic_edge, 64,
           PICS_OFF APIC IOAPIC_WRITE(0x25, 0) IOAPIC_WRITE(0x24, 0x40) "out %al, $0xe0;" WAIT);
CONTRACT_TEST(Chips, AnIoapicPinInterrupts) {
  auto guest = started(test, ioapic_edge);
  guest->finish();
  EXPECT_GT(guest->vm().irq_line(10, true), 0);
  EXPECT_EQ(guest->trap().vector, 0x40u);
}

GUEST_CODE(ioapic_masked, 64,
           PICS_OFF APIC IOAPIC_WRITE(0x25, 0)
               IOAPIC_WRITE(0x24, 0x10040) "out %al, $0xe0; sti; nop; nop; out %al, $0xe0");
CONTRACT_TEST(Chips, AMaskedIoapicPinDoesNotInterrupt) {
  auto guest = started(test, ioapic_masked);
  guest->finish();
  guest->vm().irq_line(10, true);
  guest->finish();
}

GUEST_CODE(ioapic_level, 64,
           PICS_OFF APIC IOAPIC_WRITE(0x25, 0) IOAPIC_WRITE(0x24, 0x8040) "out %al, $0xe0;" WAIT);
// Ends each interrupt and tells of the third before it returns: with the line high, nothing else need ever
// run.
GUEST_CODE(
    level_handler, 64,
    "incl 0x40000; movl $0, 0xb0(%rbp); cmpl $3, 0x40000; jne 1f; out %al, $0x90; 1: cmpl $5, 0x40000; jb 2f;"
    "out %al, $0x91; 2: iretq");
CONTRACT_TEST(Chips, ALevelInterruptRepeatsUntilTheLineFalls) {
  auto guest = started(test, ioapic_level);
  guest->load(level_handler, handler);
  guest->set_gate(0x40, code64, handler);
  guest->finish();
  guest->vm().irq_line(10, true);
  auto exit = guest->run();
  ASSERT_TRUE(Guest::is_out(exit, 0x90)) << guest->describe(exit);
  guest->vm().irq_line(10, false);
  // One more may have been accepted before the line fell, a fifth not: the guest halts until it is kicked.
  std::thread kicker([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    guest->vcpu().kick();
  });
  const auto last = guest->vcpu().run();
  kicker.join();
  EXPECT_EQ(last.status(), -EINTR) << guest->describe(last);
  EXPECT_LE(guest->at<uint32_t>(counter), 4u);
}

GUEST_CODE(ioapic_registers, 64,
           "mov $0xfec00000, %edi; movl $1, (%rdi); mov 0x10(%rdi), %eax; mov %eax, %ebx;" IOAPIC_WRITE(
               0x13,
               0x5000000) "mov 0x10(%rdi), %ecx; movl $0x12, (%rdi); mov 0x10(%rdi), %edx; out %al, $0xe0");
CONTRACT_TEST(Chips, TheIoapicHas24MaskedPins) {
  auto guest = started(test, ioapic_registers);
  guest->finish();
  const auto regs = guest->vcpu().regs();
  EXPECT_EQ(regs.rbx >> 16 & 0xff, 23u);
  EXPECT_EQ(regs.rcx, 0x5000000u);
  EXPECT_NE(regs.rdx & 0x10000, 0u);
}

CONTRACT_TEST(Chips, IoapicStateRoundTrips) {
  auto guest = started(test, ioapic_edge);
  guest->finish();
  kvm_irqchip chip = guest->vm().irqchip(KVM_IRQCHIP_IOAPIC);
  EXPECT_EQ(chip.chip.ioapic.redirtbl[10].bits & 0xff, 0x40u);
  chip.chip.ioapic.redirtbl[11].bits = 0x10055;
  guest->vm().set_irqchip(chip);
  EXPECT_EQ(guest->vm().irqchip(KVM_IRQCHIP_IOAPIC).chip.ioapic.redirtbl[11].bits & 0x100ff, 0x10055u);
}

// --- LAPIC
// ----------------------------------------------------------------------------------------------------------

GUEST_CODE(self_ipi, 64, APIC "sti; movl $0x40061, 0x300(%rbp);" SOON "out %al, $0xe0");
CONTRACT_TEST(Chips, ASelfIpiInterrupts) {
  auto guest = started(test, self_ipi);
  EXPECT_EQ(guest->trap().vector, 0x61u);
}

GUEST_CODE(apic_identity, 64,
           APIC "mov 0x20(%rbp), %ebx; mov 0x30(%rbp), %ecx; mov 0xf0(%rbp), %edx; out %al, $0xe0");
CONTRACT_TEST(Chips, TheLapicTellsItsIdAndVersion) {
  auto guest = started(test, apic_identity);
  guest->finish();
  const auto regs = guest->vcpu().regs();
  EXPECT_EQ(regs.rbx >> 24, 0u);
  EXPECT_GE(regs.rcx & 0xff, 0x10u);
  EXPECT_GE(regs.rcx >> 16 & 0xff, 5u) << "LVT entries less one";
  EXPECT_EQ(regs.rdx & 0x1ff, 0x1ffu);
}

GUEST_CODE(task_priority, 64,
           APIC "mov $6, %eax; mov %rax, %cr8; sti; movl $0x40055, 0x300(%rbp);" SOON
                "mov 0x80(%rbp), %ebx;"
                "mov 0x220(%rbp), %ecx; out %al, $0xe0; xor %eax, %eax; mov %rax, %cr8;" SOON
                "out %al, $0xe0");
CONTRACT_TEST(Chips, TheTaskPriorityHoldsBackLowerVectors) {
  auto guest = started(test, task_priority);
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rbx, 0x60u) << "CR8 is the upper half of the TPR";
  EXPECT_EQ(guest->vcpu().regs().rcx, 1u << 21) << "waiting in the IRR";
  EXPECT_EQ(guest->trap().vector, 0x55u);
}

// The first interrupt's handler sends itself two more, one of its own priority class and one of a higher
// class.
GUEST_CODE(nested, 64, APIC "sti; movl $0x40051, 0x300(%rbp);" SOON "out %al, $0xe0");
GUEST_CODE(open_handler, 64,
           "mov 0x120(%rbp), %ebx; mov 0xa0(%rbp), %ecx; sti; movl $0x40052, 0x300(%rbp);" SOON
           "movl $0x40065, 0x300(%rbp);" SOON "out %al, $0xe0");
CONTRACT_TEST(Chips, OnlyAHigherClassInterruptsAHandler) {
  auto guest = started(test, nested);
  guest->load(open_handler, handler);
  guest->set_gate(0x51, code64, handler);
  const unsigned vector = guest->trap().vector;
  if (guest->vcpu().regs().rbx == 0) test.deviates("the LAPIC shows no vector in service within a handler");
  EXPECT_EQ(vector, 0x65u) << "0x52 waits: it is of the class in service";
  EXPECT_EQ(guest->vcpu().regs().rbx, 1u << 17) << "ISR";
  EXPECT_EQ(guest->vcpu().regs().rcx, 0x50u) << "PPR";
}

GUEST_CODE(timer_once, 64,
           APIC "movl $0x50, 0x320(%rbp); movl $0xb, 0x3e0(%rbp); movl $100000, 0x380(%rbp);" WAIT);
CONTRACT_TEST(Chips, TheTimerFiresOnce) {
  auto guest = started(test, timer_once);
  const Trap trap = guest->trap();
  EXPECT_EQ(trap.vector, 0x50u);
  const auto lapic = guest->vcpu().lapic();
  uint32_t current = 1;
  std::memcpy(&current, lapic.regs + 0x390, 4);
  EXPECT_EQ(current, 0u);
}

GUEST_CODE(timer_periodic, 64,
           APIC
           "movl $0x20050, 0x320(%rbp); movl $0xb, 0x3e0(%rbp); movl $200000, 0x380(%rbp); sti;"
           "1: hlt; cmpl $5, 0x40000; jb 1b; out %al, $0xe0");
CONTRACT_TEST(Chips, ThePeriodicTimerFiresAgainAndAgain) {
  auto guest = started(test, timer_periodic);
  guest->set_gate(0x50, code64, handler);
  const auto start = std::chrono::steady_clock::now();
  guest->finish();
  // 200,000 ticks of the APIC's 1 GHz bus (KVM's) are 0.2 ms; five of them cannot take less than 0.8 ms.
  EXPECT_GE(std::chrono::steady_clock::now() - start, std::chrono::microseconds(800));
}

GUEST_CODE(timer_count, 64,
           APIC
           "movl $0x10050, 0x320(%rbp); movl $0xb, 0x3e0(%rbp); movl $0x7fffffff, 0x380(%rbp); mov "
           "0x390(%rbp), %ebx;"
           "mov $2000, %eax; 1: dec %eax; jnz 1b; mov 0x390(%rbp), %ecx; out %al, $0xe0");
CONTRACT_TEST(Chips, TheTimersCountFalls) {
  auto guest = started(test, timer_count);
  guest->finish();
  const auto regs = guest->vcpu().regs();
  EXPECT_GT(regs.rbx, regs.rcx);
  EXPECT_GT(regs.rcx, 0u);
}

GUEST_CODE(
    timer_deadline, 64,
    APIC
    "movl $0x40050, 0x320(%rbp); rdtsc; shl $32, %rdx; or %rdx, %rax; add $1000000, %rax; mov %rax, %rdx;"
    "shr $32, %rdx; mov %rax, %rbx; mov $0x6e0, %ecx; wrmsr;" WAIT);
CONTRACT_TEST(Chips, TheTscDeadlineTimerFiresAtItsTime) {
  if (test.system().check_extension(KVM_CAP_TSC_DEADLINE_TIMER) == 0) throw Unable("no TSC-deadline timer");
  auto guest = test.guest({.irqchip = Irqchip::full});
  // KVM leaves this CPUID bit to the VMM.
  auto cpuid = guest->vcpu().cpuid2();
  for (auto& leaf : cpuid)
    if (leaf.function == 1) leaf.ecx |= 1u << 24;
  guest->vcpu().set_cpuid2(cpuid);
  guest->load(timer_deadline);
  guest->enter(Mode::long64);
  EXPECT_EQ(guest->trap().vector, 0x50u);
  kvm_msr_entry tsc{.index = 0x10};
  ASSERT_EQ(guest->vcpu().msrs({&tsc, 1}), 1u);
  EXPECT_GE(tsc.data, guest->vcpu().regs().rbx);
}

GUEST_CODE(x2apic, 64,
           "mov $0x1b, %ecx; rdmsr; or $0xc00, %eax; wrmsr; mov $0x80f, %ecx; mov $0x1ff, %eax; xor %edx, "
           "%edx; wrmsr;"
           "mov $0x802, %ecx; rdmsr; mov %eax, %ebx; sti; mov $0x83f, %ecx; mov $0x62, %eax; xor %edx, %edx; "
           "wrmsr;" SOON "out %al, $0xe0");
CONTRACT_TEST(Chips, X2apicModeWorksThroughMsrs) {
  test.needs_cpuid(1, &kvm_cpuid_entry2::ecx, 21, "x2APIC");
  auto guest = started(test, x2apic);
  EXPECT_EQ(guest->trap().vector, 0x62u);
  EXPECT_EQ(guest->vcpu().regs().rbx, 0u);
}

GUEST_CODE(x2apic_without, 64, "mov $0x802, %ecx; rdmsr");
CONTRACT_TEST(Chips, X2apicRegistersNeedX2apicMode) {
  auto guest = started(test, x2apic_without);
  EXPECT_EQ(guest->trap().vector, 13u);
}

CONTRACT_TEST(Chips, LapicStateRoundTrips) {
  auto guest = started(test, apic_identity);
  guest->finish();
  auto state = guest->vcpu().lapic();
  const uint32_t priority = 0x30;
  std::memcpy(state.regs + 0x80, &priority, 4);
  guest->vcpu().set_lapic(state);
  uint32_t seen = 0;
  std::memcpy(&seen, guest->vcpu().lapic().regs + 0x80, 4);
  EXPECT_EQ(seen, priority);
}

// --- Shadows and NMI
// ------------------------------------------------------------------------------------------------

GUEST_CODE(sti_shadow, 64,
           APIC "movl $0x40061, 0x300(%rbp); sti; incl %ebx; incl %ebx; incl %ebx; 1: jmp 1b");
CONTRACT_TEST(Chips, StiHoldsInterruptsBackForOneInstruction) {
  auto guest = started(test, sti_shadow);
  EXPECT_EQ(guest->trap().vector, 0x61u);
  if (guest->vcpu().regs().rbx != 1) test.deviates("an interrupt came later than one instruction after STI");
}

GUEST_CODE(sti_halt, 64, APIC "movl $0x40061, 0x300(%rbp); sti; hlt; out %al, $0xe0");
CONTRACT_TEST(Chips, APendingInterruptEndsStiHltAfterTheHalt) {
  auto guest = started(test, sti_halt);
  const Trap trap = guest->trap();
  EXPECT_EQ(trap.vector, 0x61u);
  EXPECT_EQ(trap.rip, code_gpa + sti_halt.size() - 2);
}

GUEST_CODE(spin, 64, "1: jmp 1b");
GUEST_CODE(halted, 64, "2: hlt; jmp 2b");
CONTRACT_TEST(Chips, AnNmiInterruptsEvenWithInterruptsOff) {
  auto guest = started(test, halted);
  ASSERT_EQ(guest->vcpu().nmi(), 0);
  EXPECT_EQ(guest->trap().vector, 2u);
}

GUEST_CODE(nmi_ipi, 64, APIC "movl $0x40400, 0x300(%rbp);" SOON "out %al, $0xe0");
CONTRACT_TEST(Chips, AnNmiCanBeSentToOneself) {
  auto guest = started(test, nmi_ipi);
  EXPECT_EQ(guest->trap().vector, 2u);
}

GUEST_CODE(nmi_handler, 64,
           "incl 0x40000; cmpl $2, 0x40000; je 1f; out %al, $0x90; nop; nop; out %al, $0x91; iretq; 1: out "
           "%al, $0x92");
CONTRACT_TEST(Chips, ASecondNmiWaitsForIret) {
  auto guest = started(test, halted);
  guest->load(nmi_handler, handler);
  guest->set_gate(2, code64, handler);
  guest->vcpu().nmi();
  EXPECT_TRUE(Guest::is_out(guest->run(), 0x90));
  guest->vcpu().nmi();
  EXPECT_TRUE(Guest::is_out(guest->run(), 0x91)) << "the first handler goes on";
  EXPECT_TRUE(Guest::is_out(guest->run(), 0x92)) << "the second comes after IRET";
}

CONTRACT_TEST(Chips, AKickReachesAHaltedVcpu) {
  auto guest = started(test, halted);
  int status = 0;
  std::thread thread([&] { status = guest->vcpu().run().status(); });
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  guest->vcpu().kick();
  thread.join();
  EXPECT_EQ(status, -EINTR);
}

// --- Messages and event descriptors
// ---------------------------------------------------------------------------------

GUEST_CODE(apic_wait, 64, APIC "out %al, $0xe0;" WAIT);
CONTRACT_TEST(Chips, AMessageInterrupts) {
  auto guest = started(test, apic_wait);
  guest->finish();
  kvm_msi msi{};
  msi.address_lo = 0xfee00000;
  msi.data = 0x71;
  EXPECT_GT(guest->vm().signal_msi(msi), 0);
  EXPECT_EQ(guest->trap().vector, 0x71u);
}

CONTRACT_TEST(Chips, ARouteTurnsAnInterruptIntoAMessage) {
  auto guest = started(test, apic_wait);
  guest->finish();
  const auto route = msi_route(40, 0x72);
  guest->vm().set_gsi_routing({&route, 1});
  EXPECT_GT(guest->vm().irq_line(40, true), 0);
  EXPECT_EQ(guest->trap().vector, 0x72u);
}

CONTRACT_TEST(Chips, AnIrqfdInterruptsAWaitingVcpu) {
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

CONTRACT_TEST(Chips, ADeassignedIrqfdIsSilent) {
  auto guest = started(test, ioapic_masked);
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
CONTRACT_TEST(Chips, AResamplingIrqfdLowersTheLineAtTheEoi) {
  if (test.system().check_extension(KVM_CAP_IRQFD_RESAMPLE) == 0) throw Unable("no KVM_CAP_IRQFD_RESAMPLE");
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

GUEST_CODE(notify, 64,
           "mov $0x1234, %eax; out %ax, $0x50; mov $0x99, %eax; out %ax, $0x50; mov $0xd0000000, %ebx; movl "
           "$7, (%rbx);"
           "movl $8, (%rbx); out %al, $0xe0");
CONTRACT_TEST(Chips, IoeventfdsAnswerInsteadOfExits) {
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

CONTRACT_TEST(Chips, AnIoeventfdWithAValueTakesOnlyThatValue) {
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

CONTRACT_TEST(Chips, ADeassignedIoeventfdExitsAgain) {
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

// --- Split irqchip
// --------------------------------------------------------------------------------------------------

GUEST_CODE(split_wait, 64, APIC "out %al, $0xe0; sti; 1: cmpl $1, 0x40000; jb 1b;" SOON "out %al, $0xe0");
CONTRACT_TEST(Chips, WithASplitIrqchipTheEoiOfALevelInterruptExits) {
  auto guest = started(test, split_wait, Irqchip::split);
  guest->set_gate(0x45, code64, handler);
  const auto route = msi_route(10, 0x45, true);
  guest->vm().set_gsi_routing({&route, 1});
  guest->finish();
  EXPECT_GT(guest->vm().irq_line(10, true), 0);
  const auto exit = guest->run();
  ASSERT_EQ(exit.reason(), KVM_EXIT_IOAPIC_EOI) << guest->describe(exit);
  EXPECT_EQ(exit.raw().eoi.vector, 0x45);
  guest->finish();
}

CONTRACT_TEST(Chips, WithASplitIrqchipAnEdgeInterruptDoesNotExit) {
  auto guest = started(test, split_wait, Irqchip::split);
  guest->set_gate(0x45, code64, handler);
  guest->finish();
  kvm_msi msi{};
  msi.address_lo = 0xfee00000;
  msi.data = 0x45;
  EXPECT_GT(guest->vm().signal_msi(msi), 0);
  guest->finish();
}

GUEST_CODE(split_ports, 64, "in $0x21, %al; mov $0xfec00000, %ebx; mov 0x10(%rbx), %eax; out %al, $0xe0");
CONTRACT_TEST(Chips, WithASplitIrqchipPicAndIoapicAreTheVmms) {
  auto guest = started(test, split_ports, Irqchip::split);
  auto exit = guest->run();
  ASSERT_EQ(exit.reason(), KVM_EXIT_IO) << guest->describe(exit);
  EXPECT_EQ(exit.io().port, 0x21);
  exit = guest->run();
  ASSERT_EQ(exit.reason(), KVM_EXIT_MMIO) << guest->describe(exit);
  EXPECT_EQ(exit.mmio().gpa, 0xfec00010u);
}

// --- 8254
// -----------------------------------------------------------------------------------------------------------

GUEST_CODE(pit_ticks, 64,
           "mov $0x11, %al; out %al, $0x20; mov $0x20, %al; out %al, $0x21; mov $4, %al; out %al, $0x21; mov "
           "$1, %al;"
           "out %al, $0x21; mov $0xfe, %al; out %al, $0x21; mov $0x34, %al; out %al, $0x43; mov $0xa9, %al; "
           "out %al, $0x40;"
           "mov $4, %al; out %al, $0x40;" WAIT);
CONTRACT_TEST(Chips, ThePitsFirstChannelInterrupts) {
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
    "mov $3000, %edx; 1: dec %edx; jnz 1b; mov $0xd8, %al; out %al, $0x43; in $0x42, %al; mov %al, %dl;"
    "in $0x42, %al; mov %al, %dh; out %al, $0xe0");
CONTRACT_TEST(Chips, ThePitCountsDownAndIsReadByLatchAndReadBack) {
  auto guest = test.guest({.irqchip = Irqchip::full});
  guest->vm().create_pit2({.flags = KVM_PIT_SPEAKER_DUMMY});  // port 0x61 too
  guest->load(pit_read);
  guest->enter(Mode::long64);
  guest->finish();
  const auto regs = guest->vcpu().regs();
  EXPECT_EQ(regs.rbx & 0x3f, 0x30u) << "status: low then high byte, mode 0, binary";
  const auto first = static_cast<uint16_t>(regs.rcx), second = static_cast<uint16_t>(regs.rdx);
  EXPECT_LT(static_cast<uint16_t>(first - second), 0x8000) << "it falls (modulo 65536)";
  EXPECT_NE(first, second);
}

CONTRACT_TEST(Chips, PitStateRoundTrips) {
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
