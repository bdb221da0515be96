// What KVM offers to guests that know that they are guests (kernel Documentation/virt/kvm/x86/cpuid.rst,
// msr.rst, hypercalls.rst): steal time, paravirtual EOI, TLB flush, IPIs, unhalt and yield. kvmclock is in
// time_test.cpp.
#include <fmt/format.h>
#include <linux/kvm_para.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <fstream>

#include "harness.hpp"

namespace lodge::contract {
namespace {

CONTRACT_SUITE(Paravirt);

#define APIC "mov $0xfee00000, %ebp; movl $0x1ff, 0xf0(%rbp);"
// Writes `value` to the MSR 0x4b564d00 + `number`.
#define KVM_MSR(number, value) \
  "mov $0x4b564d0" #number ", %ecx; mov $" #value ", %eax; xor %edx, %edx; wrmsr;"
#define ENABLE_STEAL KVM_MSR(3, 0x50001)
#define ENABLE_EOI KVM_MSR(4, 0x50101)

constexpr uint64_t steal_area = 0x50000, eoi_word = 0x50100, counter = 0x40000, real_eois = 0x40008,
                   handler = 0x48000;

struct StealArea {  // kvm_steal_time
  uint64_t steal;
  uint32_t version, flags;
  uint8_t preempted, pad8[3];
  uint32_t pad[11];
};

void needs(Contract& test, unsigned feature, const char* name) {
  test.needs_cpuid(KVM_CPUID_FEATURES, &kvm_cpuid_entry2::eax, feature, name);
}

// Only what CPUID tells is there: KVM is lenient unless it is told to be exact.
void hide_features(Contract& test, Guest& guest, unsigned index = 0) {
  if (test.system().check_extension(KVM_CAP_ENFORCE_PV_FEATURE_CPUID) <= 0)
    throw Unable("this accelerator does not enforce what CPUID tells of paravirtual features");
  kvm_enable_cap cap{};
  cap.cap = KVM_CAP_ENFORCE_PV_FEATURE_CPUID;
  cap.args[0] = 1;
  guest.vcpu(index).enable_cap(cap);
  auto cpuid = guest.vcpu(index).cpuid2();
  for (auto& leaf : cpuid)
    if (leaf.function == KVM_CPUID_FEATURES) leaf.eax = 0;
  guest.vcpu(index).set_cpuid2(cpuid);
}

void two_running(Guest& guest, std::span<const uint8_t> first, std::span<const uint8_t> second) {
  guest.load(first);
  guest.load(second, 0x9000);
  guest.enter(Mode::long64, 0);
  guest.enter(Mode::long64, 1, 0x9000);
  guest.vcpu(1).set_mp_state({.mp_state = KVM_MP_STATE_RUNNABLE});
}

GUEST_CODE(any_hypercall, 64, "vmcall; out %al, $0xe0");
void needs_hypercalls(Contract& test) {
  if (test.soft()) return;
  auto guest = test.guest({.irqchip = Irqchip::full, .seconds = 1});
  guest->load(any_hypercall);
  guest->enter(Mode::long64);
  const std::jthread kicker([&](const std::stop_token& stop) {
    for (int i = 0; i < 50 && !stop.stop_requested(); ++i)
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    guest->vcpu().kick();
  });
  if (!Guest::is_out(guest->vcpu().run(), done_port)) test.deviates("a hypercall does not end");
}

// Waits until the vCPU that has its area at `steal_area` is told to be out of the guest.
void await_preempted(Contract& test, Guest& guest, const char* why) {
  const std::atomic_ref preempted(guest.at<StealArea>(steal_area).preempted);
  for (int i = 0; i < 1000 && (preempted.load() & 1) == 0; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  if ((preempted.load() & 1) == 0) test.deviates(why);
}

// --- what CPUID hides

GUEST_CODE(write_steal, 64, ENABLE_STEAL "out %al, $0xe0");
GUEST_CODE(write_eoi, 64, ENABLE_EOI "out %al, $0xe0");
GUEST_CODE(read_steal, 64, "mov $0x4b564d03, %ecx; rdmsr; out %al, $0xe0");
GUEST_CODE(read_eoi, 64, "mov $0x4b564d04, %ecx; rdmsr; out %al, $0xe0");
CONTRACT_TEST(Paravirt, HiddenRegistersAreNotThere) {
  for (const auto code : {write_steal, write_eoi, read_steal, read_eoi}) {
    auto guest = test.guest({.irqchip = Irqchip::full});
    hide_features(test, *guest);
    EXPECT_EQ(guest->fault(Mode::long64, code).vector, 13u);
    EXPECT_EQ(guest->at<uint8_t>(steal_area + 16), 0u) << "and nothing is written anywhere";
  }
}

int64_t answer(Guest& guest, uint64_t number, uint64_t a0, uint64_t a1, uint64_t a2 = 0, uint64_t a3 = 0) {
  guest.load(any_hypercall);
  guest.enter(Mode::long64);
  kvm_regs regs = guest.vcpu().regs();
  regs.rax = number, regs.rbx = a0, regs.rcx = a1, regs.rdx = a2, regs.rsi = a3;
  guest.vcpu().set_regs(regs);
  guest.finish();
  return static_cast<int64_t>(guest.vcpu().regs().rax);
}
CONTRACT_TEST(Paravirt, HiddenHypercallsAreNotThere) {
  needs_hypercalls(test);
  auto guest = test.guest({.irqchip = Irqchip::full});
  hide_features(test, *guest);
  EXPECT_EQ(answer(*guest, KVM_HC_KICK_CPU, 0, 0), -KVM_ENOSYS);
  EXPECT_EQ(answer(*guest, KVM_HC_SEND_IPI, 1, 0, 0, 0x40), -KVM_ENOSYS);
  EXPECT_EQ(answer(*guest, KVM_HC_SCHED_YIELD, 0, 0), -KVM_ENOSYS);
}

CONTRACT_TEST(Paravirt, UserCodeHasNoHypercalls) {
  auto guest = test.guest({.irqchip = Irqchip::full});
  guest->load(any_hypercall);
  guest->enter(Mode::long64);
  guest->to_user();
  kvm_regs regs = guest->vcpu().regs();
  regs.rax = KVM_HC_VAPIC_POLL_IRQ;
  regs.rflags |= 0x3000;  // IOPL 3, for the OUT
  guest->vcpu().set_regs(regs);
  if (!Guest::is_out(guest->run(), done_port)) test.deviates("VMCALL in user code does not end");
  EXPECT_EQ(static_cast<int64_t>(guest->vcpu().regs().rax), -KVM_EPERM);
}

CONTRACT_TEST(Paravirt, AVcpuMayAskForItsInterrupts) {
  needs_hypercalls(test);
  auto guest = test.guest({.irqchip = Irqchip::full});
  EXPECT_EQ(answer(*guest, KVM_HC_VAPIC_POLL_IRQ, 0, 0), 0);
}

// --- steal time

// Runs until another thread kicks the vCPU out.
void run_a_while(Guest& guest) {
  std::thread kicker([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    guest.vcpu().kick();
  });
  EXPECT_TRUE(guest.vcpu().run().interrupted());
  kicker.join();
}

GUEST_CODE(look_at_itself, 64, ENABLE_STEAL "out %al, $0xe0; 1: movzbl 0x50010, %ebx; or %ebx, %edi; jmp 1b");
CONTRACT_TEST(Paravirt, PreemptedTellsWhetherTheVcpuIsInTheGuest) {
  needs(test, KVM_FEATURE_STEAL_TIME, "steal time");
  auto guest = test.guest({.irqchip = Irqchip::full});
  guest->load(look_at_itself);
  guest->enter(Mode::long64);
  guest->finish();
  EXPECT_EQ(guest->at<StealArea>(steal_area).preempted, 0) << "in the middle of an instruction it is not";
  for (int round = 0; round < 5; ++round) {
    run_a_while(*guest);
    await_preempted(test, *guest, "a vCPU outside the guest is not told to be preempted");
  }
  EXPECT_EQ(guest->vcpu().regs().rdi, 0u) << "as the guest sees itself";
  EXPECT_EQ(guest->at<StealArea>(steal_area).version % 2, 0u);
  EXPECT_EQ(guest->at<StealArea>(steal_area).flags, 0u);
}

GUEST_CODE(steal_halt, 64, ENABLE_STEAL APIC "sti; 1: hlt; jmp 1b");
GUEST_CODE(wake_other, 64, APIC "movl $0x1000000, 0x310(%rbp); movl $0x4077, 0x300(%rbp); out %al, $0xe0");
CONTRACT_TEST(Paravirt, AHaltedVcpuIsPreempted) {
  needs(test, KVM_FEATURE_STEAL_TIME, "steal time");
  auto guest = test.guest({.vcpus = 2, .irqchip = Irqchip::full});
  two_running(*guest, wake_other, steal_halt);
  guest->together(
      [&] {
        if (guest->trap(1).vector != 0x77) throw std::runtime_error("another vector");
      },
      [&] {
        await_preempted(test, *guest, "a halted vCPU is not told to be preempted");
        guest->finish(0);
      });
}

GUEST_CODE(busy, 64, ENABLE_STEAL "out %al, $0xe0; 1: jmp 1b");
CONTRACT_TEST(Paravirt, StealTimeIsNoMoreThanTheTimeThatPassed) {
  needs(test, KVM_FEATURE_STEAL_TIME, "steal time");
  auto guest = test.guest({.irqchip = Irqchip::full});
  guest->load(busy);
  guest->enter(Mode::long64);
  guest->at<StealArea>(steal_area).steal = 1000;  // what was stolen elsewhere stays
  guest->finish();
  const auto start = std::chrono::steady_clock::now();
  run_a_while(*guest);  // KVM's first update brings all that the thread has ever waited
  const uint64_t before = guest->at<StealArea>(steal_area).steal;
  EXPECT_GE(before, 1000u);
  for (int round = 0; round < 20; ++round) run_a_while(*guest);
  const auto passed = std::chrono::nanoseconds(std::chrono::steady_clock::now() - start).count();
  const uint64_t after = guest->at<StealArea>(steal_area).steal;
  EXPECT_GE(after, before);
  EXPECT_LE(after - before, static_cast<uint64_t>(passed));
}

// What the calling thread has waited for a processor; as the host tells everybody.
uint64_t waited_ns() {
  std::ifstream file("/proc/thread-self/schedstat");
  uint64_t ran = 0, waited = 0;
  file >> ran >> waited;
  return waited;
}

GUEST_CODE(steal_and_tell, 64, ENABLE_STEAL "1: out %al, $0xe0; jmp 1b");
CONTRACT_TEST(Paravirt, WhatIsStolenWhileTheVmmHasTheThreadIsToldAtTheNextEntry) {
  needs(test, KVM_FEATURE_STEAL_TIME, "steal time");
  auto guest = test.guest({.irqchip = Irqchip::full});
  guest->load(steal_and_tell);
  guest->enter(Mode::long64);
  guest->finish();
  guest->finish();
  const uint64_t before = guest->at<StealArea>(steal_area).steal;
  cpu_set_t everywhere, here;
  ASSERT_EQ(::sched_getaffinity(0, sizeof everywhere, &everywhere), 0);
  CPU_ZERO(&here);
  CPU_SET(::sched_getcpu(), &here);
  ASSERT_EQ(::sched_setaffinity(0, sizeof here, &here), 0);
  const uint64_t start = waited_ns();
  {
    const std::jthread thief([](const std::stop_token& stop) {  // on the same processor
      while (!stop.stop_requested())
        ;
    });
    while (waited_ns() - start < 200'000) ::sched_yield();
  }
  const uint64_t stolen = waited_ns() - start;
  guest->finish();
  ::sched_setaffinity(0, sizeof everywhere, &everywhere);
  const uint64_t told = guest->at<StealArea>(steal_area).steal - before;
  if (told < stolen) test.deviates(fmt::format("{} ns of {} are told", told, stolen));
}

GUEST_CODE(steal_reserved, 64, KVM_MSR(3, 0x50003) "out %al, $0xe0");
GUEST_CODE(eoi_reserved, 64, KVM_MSR(4, 0x50103) "out %al, $0xe0");
CONTRACT_TEST(Paravirt, ReservedBitsOfTheRegistersFault) {
  needs(test, KVM_FEATURE_STEAL_TIME, "steal time");
  needs(test, KVM_FEATURE_PV_EOI, "paravirtual EOI");
  for (const auto code : {steal_reserved, eoi_reserved}) {
    auto guest = test.guest({.irqchip = Irqchip::full});
    EXPECT_EQ(guest->fault(Mode::long64, code).vector, 13u);
  }
}

GUEST_CODE(steal_nowhere, 64,
           "mov $0x4b564d03, %ecx; mov $0xfffff001, %eax; mov $0x7fff, %edx; wrmsr; out %al, $0xe0; nop; out "
           "%al, $0xe0");
CONTRACT_TEST(Paravirt, AnAreaOutsideOfMemoryIsLeftAlone) {
  needs(test, KVM_FEATURE_STEAL_TIME, "steal time");
  auto guest = test.guest({.irqchip = Irqchip::full});
  guest->load(steal_nowhere);
  guest->enter(Mode::long64);
  guest->finish();
  guest->finish();
}

CONTRACT_TEST(Paravirt, TheRegistersAreSavedAndRestored) {
  needs(test, KVM_FEATURE_STEAL_TIME, "steal time");
  needs(test, KVM_FEATURE_PV_EOI, "paravirtual EOI");
  const auto list = test.system().msr_index_list();
  for (const uint32_t index : {uint32_t{MSR_KVM_STEAL_TIME}, uint32_t{MSR_KVM_PV_EOI_EN}}) {
    EXPECT_EQ(std::ranges::count(list, index), 1);
    auto guest = test.guest({.irqchip = Irqchip::full});
    kvm_msr_entry entry{.index = index};
    ASSERT_EQ(guest->vcpu().msrs({&entry, 1}), 1u);
    EXPECT_EQ(entry.data, 0u);
    entry.data = 0x50001;
    ASSERT_EQ(guest->vcpu().set_msrs({&entry, 1}), 1u);
    entry.data = 0;
    ASSERT_EQ(guest->vcpu().msrs({&entry, 1}), 1u);
    EXPECT_EQ(entry.data, 0x50001u);
  }
}

GUEST_CODE(look_on, 64, "movzbl 0x50010, %ebx; out %al, $0xe0; 1: jmp 1b");
CONTRACT_TEST(Paravirt, ARestoredStealTimeGoesOn) {
  needs(test, KVM_FEATURE_STEAL_TIME, "steal time");
  auto guest = test.guest({.irqchip = Irqchip::full});
  guest->load(look_on);
  guest->enter(Mode::long64);
  guest->at<StealArea>(steal_area).preempted = 1;  // as saved
  kvm_msr_entry entry{.index = MSR_KVM_STEAL_TIME, .data = steal_area | 1};
  ASSERT_EQ(guest->vcpu().set_msrs({&entry, 1}), 1u);
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rbx, 0u);
  run_a_while(*guest);
  await_preempted(test, *guest, "a vCPU outside the guest is not told to be preempted");
}

// --- TLB flush

void map_page(Guest& guest) {
  for (uint64_t i = 0; i < 512; ++i) guest.at<uint64_t>(0x30000 + i * 8) = (0x200000 + i * 0x1000) | 7;
  guest.at<uint64_t>(0x30000) = 0x60003;
  guest.at<uint64_t>(pd_gpa + 8) = 0x30007;
  guest.at<uint64_t>(0x60010) = 1;
  guest.at<uint64_t>(0x61010) = 2;
}

GUEST_CODE(
    look_at_page, 64,
    "mov %cr4, %rax; or $0x80, %rax; mov %rax, %cr4;" ENABLE_STEAL
    "mov 0x200010, %rbx; out %al, $0xe0; 1: cmpl $0, 0x40000; je 1b; mov 0x200010, %rcx; out %al, $0xe0");
CONTRACT_TEST(Paravirt, AVcpuOutsideTheGuestFlushesItsTlbBeforeItReturns) {
  needs(test, KVM_FEATURE_PV_TLB_FLUSH, "paravirtual TLB flush");
  auto guest = test.guest({.irqchip = Irqchip::full});
  guest->load(look_at_page);
  guest->enter(Mode::long64);
  map_page(*guest);
  guest->at<uint64_t>(0x30000) |= 0x100;  // global
  guest->finish();
  run_a_while(*guest);
  await_preempted(test, *guest, "a vCPU outside the guest is not told to be preempted");
  // What another vCPU does.
  guest->at<uint64_t>(0x30000) = 0x61103;
  std::atomic_ref(guest->at<StealArea>(steal_area).preempted).fetch_or(2);
  guest->at<uint32_t>(counter) = 1;
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rbx, 1u);
  EXPECT_EQ(guest->vcpu().regs().rcx, 2u);
}

GUEST_CODE(halt_and_look, 64, ENABLE_STEAL APIC "mov 0x200010, %rbx; sti; 1: hlt; jmp 1b");
GUEST_CODE(ipi_and_look, 64, "mov 0x200010, %rcx; out %al, $0xe0");
GUEST_CODE(flush_preempted, 64,
           APIC
           "movq $0x61003, 0x30000; mov $1, %eax; mov $3, %ebx;"
           "lock cmpxchg %bl, 0x50010; jne 1f; movl $0x1000000, 0x310(%rbp); movl $0x4077, 0x300(%rbp);"
           "out %al, $0xe0; 1: ud2");
CONTRACT_TEST(Paravirt, AHaltedVcpuFlushesItsTlbWhenItWakes) {
  needs(test, KVM_FEATURE_PV_TLB_FLUSH, "paravirtual TLB flush");
  auto guest = test.guest({.vcpus = 2, .irqchip = Irqchip::full});
  two_running(*guest, flush_preempted, halt_and_look);
  map_page(*guest);
  guest->load(ipi_and_look, handler);
  guest->set_gate(0x77, code64, handler);
  guest->together([&] { guest->finish(1); },
                  [&] {
                    await_preempted(test, *guest, "a halted vCPU is not told to be preempted");
                    guest->finish(0);
                  });
  EXPECT_EQ(guest->vcpu(1).regs().rbx, 1u);
  EXPECT_EQ(guest->vcpu(1).regs().rcx, 2u);
}

// --- EOI

// Counts, and ends the interrupt as the protocol wants: by the word, or else at the LAPIC, which it counts
// too.
#define END_OF_INTERRUPT "btrl $0, 0x50100; jc 7f; incl 0x40008; mov $0xfee000b0, %eax; movl $0, (%rax); 7:"
GUEST_CODE(pv_handler, 64, "push %rax; incl 0x40000;" END_OF_INTERRUPT "pop %rax; iretq");

std::unique_ptr<Guest> with_handler(Contract& test, std::span<const uint8_t> code,
                                    std::span<const uint8_t> body = pv_handler) {
  needs(test, KVM_FEATURE_PV_EOI, "paravirtual EOI");
  auto guest = test.guest({.irqchip = Irqchip::full});
  guest->load(code);
  guest->load(body, handler);
  guest->enter(Mode::long64);
  guest->set_gate(0x40, code64, handler);
  guest->set_gate(0x50, code64, handler);
  return guest;
}

uint32_t lapic_register(Guest& guest, unsigned offset) {
  uint32_t value = 0;
  std::memcpy(&value, guest.vcpu().lapic().regs + offset, sizeof value);
  return value;
}
constexpr unsigned isr_of_0x40 = 0x120, irr_of_0x40 = 0x220;  // their bit 0

// Ten times an IPI to itself.
GUEST_CODE(ten_ipis, 64,
           ENABLE_EOI APIC
           "sti; mov $10, %esi; 1: mov $11, %edi; sub %esi, %edi; movl $0x40040, 0x300(%rbp);"
           "2: cmp %edi, 0x40000; jne 2b; dec %esi; jnz 1b; cli; out %al, $0xe0");
CONTRACT_TEST(Paravirt, AnInterruptMayBeEndedInMemory) {
  auto guest = with_handler(test, ten_ipis);
  guest->finish();
  EXPECT_EQ(guest->at<uint32_t>(counter), 10u);
  EXPECT_EQ(lapic_register(*guest, isr_of_0x40) & 1, 0u);
  // KVM leaves the word alone where the processor's own APIC virtualization ends interrupts.
  if (test.soft()) {
    EXPECT_EQ(guest->at<uint32_t>(real_eois), 0u);
  }
}

GUEST_CODE(plain_handler, 64,
           "push %rax; incl 0x40000; mov $0xfee000b0, %eax; movl $0, (%rax); pop %rax; iretq");
CONTRACT_TEST(Paravirt, AnEoiAtTheLapicStillEndsTheInterrupt) {
  auto guest = with_handler(test, ten_ipis, plain_handler);
  guest->finish();
  EXPECT_EQ(guest->at<uint32_t>(counter), 10u);
  EXPECT_EQ(lapic_register(*guest, isr_of_0x40) & 1, 0u);
}

// The handler of 0x50 requests 0x40, of a lower class, which comes when 0x50 has ended; and 0x50 once more.
GUEST_CODE(two_classes, 64,
           ENABLE_EOI APIC
           "movl $0x40050, 0x300(%rbp); sti; 2: cmpl $3, 0x40000; jne 2b; cli; out %al, $0xe0");
GUEST_CODE(chain_handler, 64,
           "push %rax; incl 0x40000; cmpl $1, 0x40000; jne 1f; mov $0xfee00300, %eax; movl $0x40040, (%rax);"
           "movl $0x40050, (%rax); 1:" END_OF_INTERRUPT "pop %rax; iretq");
CONTRACT_TEST(Paravirt, WaitingInterruptsComeAfterAnEoiInMemory) {
  auto guest = with_handler(test, two_classes, chain_handler);
  guest->finish();
  EXPECT_EQ(guest->at<uint32_t>(counter), 3u);
  EXPECT_EQ(lapic_register(*guest, isr_of_0x40), 0u);
  EXPECT_EQ(lapic_register(*guest, irr_of_0x40), 0u);
}

// Another thread requests interrupts at any moment, so also between the handler's EOI in memory and the next
// look at it: none may be lost.
GUEST_CODE(endless_interrupts, 64,
           ENABLE_EOI APIC "sti; movl $1, 0x40018; 1: cmpl $0, 0x40010; je 1b; cli; out %al, $0xe0");
CONTRACT_TEST(Paravirt, NoInterruptIsLostToAnEoiInMemory) {
  auto guest = with_handler(test, endless_interrupts);
  constexpr uint32_t rounds = 500;
  guest->together([&] { guest->finish(); },
                  [&] {
                    const std::atomic_ref count(guest->at<uint32_t>(counter));
                    const std::atomic_ref ready(guest->at<uint32_t>(0x40018));
                    while (ready.load() == 0) std::this_thread::yield();
                    for (uint32_t i = 0; i < rounds; ++i) {
                      kvm_msi msi{};
                      msi.address_lo = 0xfee00000;
                      msi.data = (i & 1) != 0 ? 0x40 : 0x50;
                      guest->vm().signal_msi(msi);
                      const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(3);
                      while (count.load() <= i) {
                        if (std::chrono::steady_clock::now() > limit)
                          throw std::runtime_error("interrupt " + std::to_string(i) + " was lost");
                        std::this_thread::yield();
                      }
                    }
                    std::atomic_ref(guest->at<uint32_t>(0x40010)).store(1);
                  });
  EXPECT_EQ(guest->at<uint32_t>(counter), rounds);
}

// A level-triggered interrupt must be completed at the LAPIC: its line is looked at again then.
GUEST_CODE(
    pv_level_setup, 64,
    ENABLE_EOI APIC
    "mov $0xff, %al; out %al, $0x21; out %al, $0xa1; mov $0xfec00000, %edi; movl $0x25, (%rdi); movl $0, "
    "0x10(%rdi); movl $0x24, (%rdi); movl $0x8040, 0x10(%rdi); out %al, $0xe0; sti; 2: cmpl $1, 0x40000; jne "
    "2b; cli; out %al, $0xe0");
GUEST_CODE(pv_level_handler, 64,
           "push %rax; incl 0x40000; mov 0x50100, %ebx;" END_OF_INTERRUPT "cli; pop %rax; out %al, $0xe0");
CONTRACT_TEST(Paravirt, ALevelTriggeredInterruptIsEndedAtTheLapic) {
  auto guest = with_handler(test, pv_level_setup, pv_level_handler);
  guest->finish();
  EXPECT_GT(guest->vm().irq_line(10, true), 0);
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rbx & 1, 0u);
  EXPECT_EQ(guest->at<uint32_t>(real_eois), 1u);
  EXPECT_EQ(lapic_register(*guest, irr_of_0x40) & 1, 1u) << "the line is still high";
}

// The VMM sees the truth at every exit, before and after the EOI in memory.
GUEST_CODE(one_ipi, 64, ENABLE_EOI APIC "movl $0x40040, 0x300(%rbp); sti; 1: jmp 1b");
GUEST_CODE(telling_handler, 64, "out %al, $0xe0; btrl $0, 0x50100; setc %bl; out %al, $0xe0;");
GUEST_CODE(ended_handler, 64, "btrl $0, 0x50100; setc %bl; out %al, $0xe0;");
CONTRACT_TEST(Paravirt, TheVmmSeesWhatIsInService) {
  auto guest = with_handler(test, one_ipi, telling_handler);
  guest->finish();
  if ((lapic_register(*guest, isr_of_0x40) & 1) == 0)
    test.deviates("a vector in service is not in the ISR that the VMM sees");
  guest->finish();
  const bool ended = (guest->vcpu().regs().rbx & 1) != 0;
  EXPECT_EQ(lapic_register(*guest, isr_of_0x40) & 1, ended ? 0u : 1u);

  guest = with_handler(test, one_ipi, ended_handler);
  guest->finish();
  const bool skipped = (guest->vcpu().regs().rbx & 1) != 0;
  EXPECT_EQ(lapic_register(*guest, isr_of_0x40) & 1, skipped ? 0u : 1u);
  if (test.soft()) {
    EXPECT_TRUE(skipped);
  }
}

GUEST_CODE(eoi_nowhere, 64,
           "mov $0x4b564d04, %ecx; mov $0xfffff001, %eax; mov $0x7fff, %edx; wrmsr;" APIC
           "movl $0x40040, 0x300(%rbp); sti; 2: cmpl $1, 0x40000; jne 2b; cli; out %al, $0xe0");
CONTRACT_TEST(Paravirt, AnEoiWordOutsideOfMemoryIsLeftAlone) {
  auto guest = with_handler(test, eoi_nowhere);
  const kvm::Exit exit = guest->run();
  if (Guest::is_out(exit, trap_port)) return;  // KVM refuses the address with #GP
  EXPECT_TRUE(Guest::is_out(exit, done_port)) << guest->describe(exit);
  EXPECT_EQ(guest->at<uint32_t>(counter), 1u);
}

// --- IPIs

#define TWO_WAIT "1: pause; cmpl $1, 0x40040; jne 1b;"
GUEST_CODE(await_pv_ipi, 64, APIC "movl $1, 0x40040; sti; 1: hlt; jmp 1b");
// KVM_HC_SEND_IPI to the IDs 0 and 1 (and 127 others, which do not exist).
#define SEND_TO_ALL "mov $10, %eax; mov $-1, %rbx; mov $-1, %rcx; xor %edx, %edx; mov $0x40, %esi;"
GUEST_CODE(send_by_vmcall, 64,
           APIC TWO_WAIT SEND_TO_ALL "vmcall; mov %rax, %rdi; out %al, $0xe0; sti; 1: jmp 1b");
GUEST_CODE(send_by_vmmcall, 64,
           APIC TWO_WAIT SEND_TO_ALL "vmmcall; mov %rax, %rdi; out %al, $0xe0; sti; 1: jmp 1b");
CONTRACT_TEST(Paravirt, OneCallSendsManyIpis) {
  needs(test, KVM_FEATURE_PV_SEND_IPI, "paravirtual IPIs");
  needs_hypercalls(test);
  for (const auto code : {send_by_vmcall, send_by_vmmcall}) {
    auto guest = test.guest({.vcpus = 2, .irqchip = Irqchip::full});
    two_running(*guest, code, await_pv_ipi);
    guest->together(
        [&] {
          if (guest->trap(1).vector != 0x40) throw std::runtime_error("another vector");
        },
        [&] {
          guest->finish(0);
          if (guest->vcpu(0).regs().rdi != 2) throw std::runtime_error("the number of receivers is wrong");
          if (guest->trap(0).vector != 0x40) throw std::runtime_error("another vector at the sender");
        });
  }
}

CONTRACT_TEST(Paravirt, IpisGoToTheIdsOfTheBitmap) {
  needs(test, KVM_FEATURE_PV_SEND_IPI, "paravirtual IPIs");
  needs_hypercalls(test);
  auto guest = test.guest({.vcpus = 2, .irqchip = Irqchip::full});
  for (unsigned id = 0; id < 2; ++id) {
    kvm_lapic_state lapic = guest->vcpu(id).lapic();
    const uint32_t spurious = 0x1ff;
    std::memcpy(lapic.regs + 0xf0, &spurious, sizeof spurious);
    guest->vcpu(id).set_lapic(lapic);
  }
  EXPECT_EQ(answer(*guest, KVM_HC_SEND_IPI, 1, 0, 1, 0x41), 1) << "bit 0 is the lowest ID";
  EXPECT_EQ(answer(*guest, KVM_HC_SEND_IPI, 0, 1, 0, 0x42), 0) << "64: nobody";
  EXPECT_EQ(answer(*guest, KVM_HC_SEND_IPI, ~uint64_t{0}, ~uint64_t{0}, 0xffffffff, 0x43), 0);
  EXPECT_EQ(answer(*guest, KVM_HC_SEND_IPI, 3, 0, 0, 0x40000 | 0x44), -22) << "a shorthand";
  EXPECT_EQ(answer(*guest, KVM_HC_SEND_IPI, 3, 0, 0, 0x800 | 0x45), -22) << "a logical destination";
  uint32_t irr = 0;
  const auto page = guest->vcpu(1).lapic();
  std::memcpy(&irr, page.regs + irr_of_0x40, sizeof irr);
  EXPECT_EQ(irr, 2u) << "vector 0x41 and no other";
  EXPECT_EQ(lapic_register(*guest, irr_of_0x40), 0u);
}

// --- unhalt, yield

GUEST_CODE(halt_deaf, 64, "cli; movl $1, 0x40040; hlt; out %al, $0xe0");
GUEST_CODE(
    kick, 64,
    "1: pause; cmpl $1, 0x40040; jne 1b; mov $5, %eax; xor %ebx, %ebx; mov $1, %ecx; vmcall; out %al, $0xe0");
CONTRACT_TEST(Paravirt, AKickEndsAHaltWithoutInterrupts) {
  needs(test, KVM_FEATURE_PV_UNHALT, "paravirtual unhalt");
  needs_hypercalls(test);
  for (int round = 0; round < 50; ++round) {  // before the HLT as well as within
    auto guest = test.guest({.vcpus = 2, .irqchip = Irqchip::full});
    two_running(*guest, kick, halt_deaf);
    guest->together([&] { guest->finish(1); },
                    [&] {
                      if (round % 2 != 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
                      guest->finish(0);
                    });
    EXPECT_EQ(guest->vcpu(0).regs().rax, 0u);
  }
}

GUEST_CODE(kick_self, 64,
           "mov $5, %eax; xor %ebx, %ebx; xor %ecx, %ecx; vmcall; hlt; out %al, $0xe0; hlt; out %al, $0xe0");
CONTRACT_TEST(Paravirt, AKickEndsOneHaltOnly) {
  needs(test, KVM_FEATURE_PV_UNHALT, "paravirtual unhalt");
  needs_hypercalls(test);
  auto guest = test.guest({.irqchip = Irqchip::full});
  guest->load(kick_self);
  guest->enter(Mode::long64);
  guest->finish();
  std::thread kicker([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    guest->vcpu().kick();
  });
  const kvm::Exit exit = guest->vcpu().run();
  kicker.join();
  EXPECT_TRUE(exit.interrupted()) << guest->describe(exit);
  EXPECT_EQ(guest->vcpu().mp_state().mp_state, static_cast<uint32_t>(KVM_MP_STATE_HALTED));
}

CONTRACT_TEST(Paravirt, AVcpuMayYield) {
  needs(test, KVM_FEATURE_PV_SCHED_YIELD, "paravirtual yield");
  needs_hypercalls(test);
  auto guest = test.guest({.vcpus = 2, .irqchip = Irqchip::full});
  EXPECT_EQ(answer(*guest, KVM_HC_SCHED_YIELD, 1, 0), 0);
  EXPECT_EQ(answer(*guest, KVM_HC_SCHED_YIELD, 77, 0), 0) << "nobody there";
}

}  // namespace
}  // namespace lodge::contract
