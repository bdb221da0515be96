// A running guest moves to another virtual machine by nothing but the contract's state calls: of the same
// accelerator, and of the other one. This is what snapshots stand on.
#include <cstring>
#include <system_error>

#include "harness.hpp"

namespace lodge::contract {
namespace {

CONTRACT_SUITE(Transfer);

#define APIC "mov $0xfee00000, %ebp; movl $0x1ff, 0xf0(%rbp);"

constexpr uint64_t ram = 4 << 20, counter = 0x40000, handler = 0x48000;

// MSRs that hold a guest's state and that both accelerators know; time-stamp counters are not compared here.
constexpr uint32_t moved_msrs[] = {0x174,      0x175,      0x176,      0x277,      0xc0000081,
                                   0xc0000082, 0xc0000083, 0xc0000084, 0xc0000102, 0x6e0};

void copy_vcpu(kvm::Vcpu& from, kvm::Vcpu& to, bool irqchip) {
  // The access of the last exit is complete only when the vCPU is entered again (api.rst, KVM_RUN).
  from.shared().immediate_exit = 1;
  EXPECT_EQ(from.run().status(), -EINTR);
  from.shared().immediate_exit = 0;
  to.set_sregs(from.sregs());
  to.set_regs(from.regs());
  to.set_xsave(from.xsave());
  to.set_debugregs(from.debugregs());
  if (irqchip) to.set_lapic(from.lapic());
  for (const uint32_t index : moved_msrs) {
    kvm_msr_entry entry{.index = index};
    if (from.msrs({&entry, 1}) == 1) to.set_msrs({&entry, 1});
  }
  to.set_vcpu_events(from.vcpu_events());
  if (irqchip) to.set_mp_state(from.mp_state());
}

void copy_vm(Guest& from, Guest& to) {
  std::memcpy(to.memory(0), from.memory(0), ram);
  to.vm().note_write(0, ram);
  for (const uint32_t chip : {KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC})
    to.vm().set_irqchip(from.vm().irqchip(chip));
  to.vm().set_pit2(from.vm().pit2());
  kvm_clock_data clock{};
  clock.clock = from.vm().clock().clock;
  to.vm().set_clock(clock);
}

GUEST_CODE(count_ticks, 64,
           "push %rax; incl 0x40000; mov $0xfee000b0, %eax; movl $0, (%rax); pop %rax; iretq");

// Three sources at once: the LAPIC's periodic timer, an IOAPIC pin, and vector registers that must survive.
// EBX: the timer's period in ns.
GUEST_CODE(
    ticking, 64,
    "mov $0xff, %al; out %al, $0x21; out %al, $0xa1;" APIC
    "mov $0xfec00000, %edi; movl $0x25, (%rdi); movl $0, 0x10(%rdi); movl $0x24, (%rdi); movl $0x41, "
    "0x10(%rdi);"
    "movl $0x20050, 0x320(%rbp); movl $0xb, 0x3e0(%rbp); mov %ebx, 0x380(%rbp); mov $0x5eed, %r15d; sti;"
    "1: hlt; cmpl $3, 0x40000; jb 1b; out %al, $0xe0; add $1, %r15; 2: hlt; cmpl $6, 0x40000; jb 2b; cli; "
    "out %al, $0xe0;"
    "sti; 3: hlt; jmp 3b");

void move_and_go_on(Guest& first, Guest& second, uint64_t period) {
  first.load(ticking);
  first.load(count_ticks, handler);
  first.vm().create_pit2({});
  second.vm().create_pit2({});
  first.enter(Mode::long64);
  first.set_gate(0x50, code64, handler);
  kvm_regs regs = first.vcpu().regs();
  regs.rbx = period;
  first.vcpu().set_regs(regs);
  first.finish();
  copy_vcpu(first.vcpu(), second.vcpu(), true);
  copy_vm(first, second);
  second.enter_as(Mode::long64);
  second.finish();
  EXPECT_GE(second.at<uint32_t>(counter), 6u) << "the timer ticks on";
  EXPECT_EQ(second.vcpu().regs().r15, 0x5eeeu);
  // The timer off, the pin's interrupt comes through the redirection entry that was moved.
  auto lapic = second.vcpu().lapic();
  const uint32_t masked = 0x10050;
  std::memcpy(lapic.regs + 0x320, &masked, 4);
  second.vcpu().set_lapic(lapic);
  second.vm().irq_line(10, true);
  unsigned vector = second.trap().vector;
  EXPECT_EQ(vector, 0x41u);
}

CONTRACT_TEST(Transfer, ATickingGuestMovesToANewMachine) {
  const GuestConfig config{.ram = ram, .irqchip = Irqchip::full};
  auto first = test.guest(config), second = test.guest(config);
  move_and_go_on(*first, *second, 300'000);
}

CONTRACT_TEST(Transfer, ATickingGuestMovesToEveryOtherAccelerator) {
  const GuestConfig config{.ram = ram, .irqchip = Irqchip::full};
  bool moved = false;
  for (const Accelerator& other : accelerators()) {
    if (std::string_view(other.name) == (test.system().name() == "kvm" ? "kvm" : "soft")) continue;
    std::unique_ptr<kvm::System> system;
    try {
      system = other.open();
    } catch (const std::system_error&) {
      continue;
    }
    SCOPED_TRACE(other.name);
    auto first = test.guest(config);
    Guest second(*system, other.name, config);
    // A tick takes a nested or emulated /dev/kvm on a busy host longer than 300 us: the guest would do
    // nothing else.
    move_and_go_on(*first, second, 10'000'000);
    moved = true;
  }
  if (!moved) throw Unable("there is no other accelerator on this host");
}

GUEST_CODE(pending, 64, APIC "movl $0x40061, 0x300(%rbp); out %al, $0x90; sti; nop; 1: jmp 1b");
CONTRACT_TEST(Transfer, AnInterruptThatWaitsMovesToo) {
  const GuestConfig config{.ram = ram, .irqchip = Irqchip::full};
  auto first = test.guest(config), second = test.guest(config);
  first->vm().create_pit2({});
  second->vm().create_pit2({});
  first->load(pending);
  first->enter(Mode::long64);
  ASSERT_TRUE(Guest::is_out(first->run(), 0x90));
  copy_vcpu(first->vcpu(), second->vcpu(), true);
  copy_vm(*first, *second);
  second->enter_as(Mode::long64);
  EXPECT_EQ(second->trap().vector, 0x61u);
}

}  // namespace
}  // namespace lodge::contract
