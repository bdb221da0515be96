// vCPU state: what is set is what is read back, and what the guest sees.
#include <atomic>
#include <cstring>
#include <system_error>

#include "harness.hpp"

namespace lodge::contract {
namespace {

CONTRACT_SUITE(State);

template <class T>
bool same(const T& a, const T& b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

CONTRACT_TEST(State, GeneralRegistersRoundTrip) {
  auto guest = test.guest();
  guest->enter(Mode::long64);
  kvm_regs regs{};
  auto* words = reinterpret_cast<uint64_t*>(&regs);
  for (unsigned i = 0; i < 16; ++i) words[i] = 0x0123456789abcdefull * (i + 1);
  regs.rip = 0x12345678;
  regs.rflags = 0x246;
  guest->vcpu().set_regs(regs);
  EXPECT_TRUE(same(guest->vcpu().regs(), regs));
}

GUEST_CODE(all_registers, 64,
           "inc %rax; inc %rbx; inc %rcx; inc %rdx; inc %rsi; inc %rdi; inc %rbp; inc %r8; inc %r9; inc "
           "%r10; inc %r11;"
           "inc %r12; inc %r13; inc %r14; inc %r15; lea 1(%rsp), %rsp; out %al, $0xe0");
CONTRACT_TEST(State, TheGuestSeesAndChangesEveryRegister) {
  auto guest = test.guest();
  guest->load(all_registers);
  guest->enter(Mode::long64);
  kvm_regs regs{};
  auto* words = reinterpret_cast<uint64_t*>(&regs);
  for (unsigned i = 0; i < 16; ++i) words[i] = 0x0123456789abcdefull * (i + 1);
  regs.rip = code_gpa;
  regs.rflags = 2;
  guest->vcpu().set_regs(regs);
  guest->finish();
  const kvm_regs after = guest->vcpu().regs();
  const auto* changed = reinterpret_cast<const uint64_t*>(&after);
  for (unsigned i = 0; i < 16; ++i) EXPECT_EQ(changed[i], words[i] + 1) << "register " << i;
}

CONTRACT_TEST(State, SystemRegistersRoundTrip) {
  auto guest = test.guest();
  guest->enter(Mode::long64);
  auto sregs = guest->vcpu().sregs();
  sregs.fs.base = 0x7fff12345678;
  sregs.gs.base = 0xffff888000000000;
  sregs.cr2 = 0xdeadb000;
  sregs.cr8 = 5;
  sregs.ldt = {.base = 0x40000, .limit = 0xff, .selector = 0x60, .type = 2, .present = 1};
  guest->vcpu().set_sregs(sregs);
  const auto after = guest->vcpu().sregs();
  EXPECT_EQ(after.fs.base, sregs.fs.base);
  EXPECT_EQ(after.gs.base, sregs.gs.base);
  EXPECT_EQ(after.cr0, sregs.cr0);
  EXPECT_EQ(after.cr2, sregs.cr2);
  EXPECT_EQ(after.cr3, sregs.cr3);
  EXPECT_EQ(after.cr4, sregs.cr4);
  EXPECT_EQ(after.cr8, 5u);
  EXPECT_EQ(after.efer, sregs.efer);
  EXPECT_EQ(after.ldt.base, 0x40000u);
  EXPECT_EQ(after.ldt.limit, 0xffu);
  EXPECT_EQ(after.gdt.base, gdt_gpa);
  EXPECT_EQ(after.idt.limit, 0xfff);
  EXPECT_EQ(after.cs.selector, code64);
  EXPECT_TRUE(after.cs.l);
  EXPECT_EQ(after.tr.base, tss_gpa);
}

CONTRACT_TEST(State, ImpossibleControlRegistersAreRefused) {
  auto guest = test.guest();
  guest->enter(Mode::long64);
  auto sregs = guest->vcpu().sregs();
  sregs.cr4 |= 1ull << 40;
  EXPECT_THROW(guest->vcpu().set_sregs(sregs), std::system_error);
}

CONTRACT_TEST(State, SystemRegistersTwoRoundTrip) {
  test.needs_capability(KVM_CAP_SREGS2, "KVM_CAP_SREGS2");
  auto guest = test.guest();
  guest->enter(Mode::long64);
  auto sregs = guest->vcpu().sregs2();
  EXPECT_EQ(sregs.cr3, pml4_gpa);
  sregs.gs.base = 0x123456789000;
  guest->vcpu().set_sregs2(sregs);
  EXPECT_EQ(guest->vcpu().sregs2().gs.base, 0x123456789000u);
}

CONTRACT_TEST(State, FpuRoundTrips) {
  auto guest = test.guest();
  kvm_fpu fpu = guest->vcpu().fpu();
  fpu.fcw = 0x27f;
  fpu.fsw = 0x3800;
  for (unsigned i = 0; i < 16; ++i)
    for (unsigned j = 0; j < 16; ++j) fpu.xmm[i][j] = static_cast<uint8_t>(i * 16 + j);
  for (unsigned i = 0; i < 8; ++i)
    for (unsigned j = 0; j < 10; ++j) fpu.fpr[i][j] = static_cast<uint8_t>(i + j);
  guest->vcpu().set_fpu(fpu);
  const kvm_fpu after = guest->vcpu().fpu();
  EXPECT_EQ(after.fcw, fpu.fcw);
  EXPECT_EQ(after.fsw, fpu.fsw);
  EXPECT_EQ(std::memcmp(after.xmm, fpu.xmm, sizeof fpu.xmm), 0);
  for (unsigned i = 0; i < 8; ++i) EXPECT_EQ(std::memcmp(after.fpr[i], fpu.fpr[i], 10), 0);
}

GUEST_CODE(save_vectors, 64, "fxsave 0x40000; out %al, $0xe0; fxrstor 0x40200; out %al, $0xe0");
CONTRACT_TEST(State, TheGuestSavesAndRestoresTheFpuItWasGiven) {
  auto guest = test.guest();
  guest->load(save_vectors);
  guest->enter(Mode::long64);
  kvm_fpu fpu = guest->vcpu().fpu();
  std::memset(fpu.xmm[15], 0x5a, 16);
  guest->vcpu().set_fpu(fpu);
  guest->finish();
  EXPECT_EQ(guest->at<uint32_t>(0x40000 + 24), 0x1f80u) << "MXCSR after reset; KVM_SET_FPU does not set it";
  if (guest->at<uint64_t>(0x40000 + 160 + 15 * 16) != 0x5a5a5a5a5a5a5a5a)
    test.deviates("FXSAVE does not store the XMM registers that KVM_SET_FPU set");
  std::memcpy(guest->memory(0x40200), guest->memory(0x40000), 512);
  guest->at<uint64_t>(0x40200 + 160) = 0x1122334455667788;
  guest->finish();
  uint64_t low = 0;
  std::memcpy(&low, guest->vcpu().fpu().xmm[0], 8);
  EXPECT_EQ(low, 0x1122334455667788u);
}

CONTRACT_TEST(State, ExtendedStateRoundTrips) {
  test.needs_capability(KVM_CAP_XSAVE, "KVM_CAP_XSAVE");
  auto guest = test.guest();
  kvm_xsave area = guest->vcpu().xsave();
  area.region[512 / 4] |= 3;  // XSTATE_BV: x87 and SSE
  area.region[24 / 4] = 0x1fa0;
  area.region[160 / 4] = 0xabcd1234;
  guest->vcpu().set_xsave(area);
  const kvm_xsave after = guest->vcpu().xsave();
  EXPECT_EQ(after.region[24 / 4], 0x1fa0u);
  EXPECT_EQ(after.region[160 / 4], 0xabcd1234u);
  uint32_t low = 0;
  std::memcpy(&low, guest->vcpu().fpu().xmm[0], 4);
  EXPECT_EQ(low, 0xabcd1234u) << "the same state as KVM_GET_FPU shows";
}

CONTRACT_TEST(State, ExtendedControlRegistersRoundTrip) {
  test.needs_capability(KVM_CAP_XCRS, "KVM_CAP_XCRS");
  test.needs_cpuid(1, &kvm_cpuid_entry2::ecx, 26, "XSAVE");
  auto guest = test.guest();
  kvm_xcrs xcrs = guest->vcpu().xcrs();
  EXPECT_EQ(xcrs.nr_xcrs, 1u);
  EXPECT_EQ(xcrs.xcrs[0].value, 1u);
  xcrs.xcrs[0].value = 3;
  guest->vcpu().set_xcrs(xcrs);
  EXPECT_EQ(guest->vcpu().xcrs().xcrs[0].value, 3u);
}

CONTRACT_TEST(State, DebugRegistersRoundTrip) {
  auto guest = test.guest();
  kvm_debugregs debug{};
  debug.db[0] = 0x1000;
  debug.db[3] = 0x4000;
  debug.dr6 = 0xffff0ff0;
  debug.dr7 = 0x455;
  guest->vcpu().set_debugregs(debug);
  const auto after = guest->vcpu().debugregs();
  EXPECT_EQ(after.db[0], 0x1000u);
  EXPECT_EQ(after.db[3], 0x4000u);
  EXPECT_EQ(after.dr7, 0x455u);
}

CONTRACT_TEST(State, MsrsRoundTrip) {
  auto guest = test.guest();
  kvm_msr_entry entries[] = {
      {.index = 0x174, .data = 0x8},                      // SYSENTER_CS
      {.index = 0x175, .data = 0xffff800000001000},       // SYSENTER_ESP
      {.index = 0x176, .data = 0xffff800000002000},       // SYSENTER_EIP
      {.index = 0x277, .data = 0x0007040600070406},       // PAT
      {.index = 0xc0000081, .data = 0x0023001000000000},  // STAR
      {.index = 0xc0000082, .data = 0xffffffff81000000},  // LSTAR
      {.index = 0xc0000083, .data = 0xffffffff81001000},  // CSTAR
      {.index = 0xc0000084, .data = 0x47700},             // SFMASK
      {.index = 0xc0000102, .data = 0xffff888000000000},  // KERNEL_GS_BASE
  };
  ASSERT_EQ(guest->vcpu().set_msrs(entries), std::size(entries));
  auto read = std::to_array(entries);
  for (auto& entry : read) entry.data = 0;
  ASSERT_EQ(guest->vcpu().msrs(read), read.size());
  for (size_t i = 0; i < read.size(); ++i)
    EXPECT_EQ(read[i].data, entries[i].data) << std::hex << read[i].index;
}

CONTRACT_TEST(State, EveryListedMsrCanBeRead) {
  auto guest = test.guest();
  unsigned unread = 0;
  for (const uint32_t index : test.system().msr_index_list()) {
    kvm_msr_entry entry{.index = index};
    if (guest->vcpu().msrs({&entry, 1}) != 1) ++unread;
  }
  // Some depend on CPUID bits that this guest may lack; most do not.
  EXPECT_LT(unread * 4, test.system().msr_index_list().size());
}

CONTRACT_TEST(State, AnUnknownMsrEndsTheTransfer) {
  auto guest = test.guest();
  kvm_msr_entry entries[] = {{.index = 0x174}, {.index = 0xdeadbeef}, {.index = 0x175}};
  EXPECT_EQ(guest->vcpu().msrs(entries), 1u);
  EXPECT_EQ(guest->vcpu().set_msrs(entries), 1u);
}

GUEST_CODE(read_msrs, 64,
           "mov $0xc0000102, %ecx; rdmsr; mov %eax, %ebx; mov %edx, %esi; mov $0xc0000080, %ecx; rdmsr; out "
           "%al, $0xe0");
CONTRACT_TEST(State, TheGuestReadsTheMsrsItWasGiven) {
  auto guest = test.guest();
  guest->load(read_msrs);
  guest->enter(Mode::long64);
  const kvm_msr_entry entry{.index = 0xc0000102, .data = 0xffff888012345678};
  ASSERT_EQ(guest->vcpu().set_msrs({&entry, 1}), 1u);
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rbx, 0x12345678u);
  EXPECT_EQ(guest->vcpu().regs().rsi, 0xffff8880u);
  EXPECT_EQ(guest->vcpu().regs().rax & 0xd00, 0xd00u) << "EFER: LME, LMA, NXE";
}

GUEST_CODE(ask_cpuid, 64, "mov $0x40000100, %eax; xor %ecx, %ecx; cpuid; out %al, $0xe0");
CONTRACT_TEST(State, TheGuestSeesTheCpuidItWasGiven) {
  auto guest = test.guest();
  auto cpuid = guest->vcpu().cpuid2();
  kvm_cpuid_entry2 own{};
  own.function = 0x40000100;
  own.eax = 0x11111111;
  own.ebx = 0x22222222;
  own.ecx = 0x33333333;
  own.edx = 0x44444444;
  cpuid.push_back(own);
  guest->vcpu().set_cpuid2(cpuid);
  const auto regs = guest->result(Mode::long64, ask_cpuid);
  EXPECT_EQ(regs.rax, 0x11111111u);
  EXPECT_EQ(regs.rbx, 0x22222222u);
  EXPECT_EQ(regs.rcx, 0x33333333u);
  EXPECT_EQ(regs.rdx, 0x44444444u);
}

CONTRACT_TEST(State, CpuidRoundTrips) {
  auto guest = test.guest();
  const auto given = test.system().supported_cpuid();
  guest->vcpu().set_cpuid2(given);
  const auto after = guest->vcpu().cpuid2();
  ASSERT_EQ(after.size(), given.size());
  for (size_t i = 0; i < given.size(); ++i) EXPECT_EQ(after[i].function, given[i].function);
}

CONTRACT_TEST(State, EventsRoundTrip) {
  auto guest = test.guest();
  auto events = guest->vcpu().vcpu_events();
  EXPECT_EQ(events.nmi.pending, 0);
  events.nmi.masked = 1;
  events.flags = KVM_VCPUEVENT_VALID_NMI_PENDING;
  guest->vcpu().set_vcpu_events(events);
  EXPECT_EQ(guest->vcpu().vcpu_events().nmi.masked, 1);
}

CONTRACT_TEST(State, MultiprocessingStateRoundTrips) {
  auto guest = test.guest({.irqchip = Irqchip::full});
  EXPECT_EQ(guest->vcpu().mp_state().mp_state, static_cast<uint32_t>(KVM_MP_STATE_RUNNABLE));
  guest->vcpu().set_mp_state({.mp_state = KVM_MP_STATE_HALTED});
  EXPECT_EQ(guest->vcpu().mp_state().mp_state, static_cast<uint32_t>(KVM_MP_STATE_HALTED));
}

CONTRACT_TEST(State, AVcpuStartsAtTheResetVector) {
  auto guest = test.guest();
  EXPECT_EQ(guest->vcpu().regs().rip, 0xfff0u);
  EXPECT_EQ(guest->vcpu().regs().rflags, 2u);
  const auto sregs = guest->vcpu().sregs();
  EXPECT_EQ(sregs.cs.base, 0xffff0000u);
  EXPECT_EQ(sregs.cs.selector, 0xf000);
  EXPECT_EQ(sregs.cr0 & 0x6000001f, 0x60000010u);
  EXPECT_EQ(sregs.idt.limit, 0xffff);
}

// --- Leaving and coming back
// ----------------------------------------------------------------------------------------

GUEST_CODE(endless, 64, "1: inc %rax; jmp 1b");
GUEST_CODE(counting, 64, "1: incl 0x40000; jmp 1b");
CONTRACT_TEST(State, AKickStopsASpinningGuest) {
  auto guest = test.guest();
  guest->load(counting);
  guest->enter(Mode::long64);
  int status = 0;
  std::thread thread([&] { status = guest->vcpu().run().status(); });
  // When it spins, however late a busy host lets it.
  const std::atomic_ref count(guest->at<uint32_t>(0x40000));
  for (int i = 0; i < 8000 && count.load() == 0; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  guest->vcpu().kick();
  thread.join();
  EXPECT_EQ(status, -EINTR);
  EXPECT_GT(count.load(), 0u);
}

CONTRACT_TEST(State, AKickBeforeTheRunStopsIt) {
  auto guest = test.guest();
  guest->load(endless);
  guest->enter(Mode::long64);
  guest->vcpu().kick();
  EXPECT_EQ(guest->vcpu().run().status(), -EINTR);
}

CONTRACT_TEST(State, ImmediateExitRunsNothing) {
  auto guest = test.guest();
  guest->load(endless);
  guest->enter(Mode::long64);
  guest->vcpu().shared().immediate_exit = 1;
  EXPECT_EQ(guest->vcpu().run().status(), -EINTR);
  EXPECT_EQ(guest->vcpu().regs().rax, 0u);
  guest->vcpu().shared().immediate_exit = 0;
}

GUEST_CODE(long_sum, 64, "xor %eax, %eax; 1: add %rcx, %rax; dec %rcx; jnz 1b; out %al, $0xe0");
CONTRACT_TEST(State, AGuestMovedBetweenVcpusGoesOn) {
  // Long enough to be stopped on the way, whether the accelerator runs a million or a billion instructions a
  // second; and late enough, when a busy host keeps the thread waiting.
  std::chrono::microseconds pause(500);
  for (uint64_t rounds = 2000; rounds < 1'000'000'000;) {
    auto guest = test.guest();
    guest->load(long_sum);
    guest->enter(Mode::long64);
    auto start = guest->vcpu().regs();
    start.rcx = rounds;
    guest->vcpu().set_regs(start);
    std::thread thread([&] { guest->vcpu().run(); });
    std::this_thread::sleep_for(pause);
    guest->vcpu().kick();
    thread.join();
    const auto regs = guest->vcpu().regs();
    if (regs.rcx == rounds) {
      ASSERT_LT(pause *= 2, std::chrono::seconds(10)) << "the guest does not start";
      continue;
    }
    if (regs.rcx == 0) {
      rounds *= 4;
      continue;
    }
    auto other = test.guest();
    other->load(long_sum);
    other->enter(Mode::long64);
    other->vcpu().set_sregs(guest->vcpu().sregs());
    other->vcpu().set_regs(regs);
    other->finish();
    EXPECT_EQ(other->vcpu().regs().rax, rounds * (rounds + 1) / 2);
    return;
  }
  FAIL() << "the guest could not be stopped on its way";
}

// --- Guest debugging
// ------------------------------------------------------------------------------------------------

GUEST_CODE(three_steps, 64, "nop; mov $5, %eax; push %rax; pop %rbx; out %al, $0xe0");
CONTRACT_TEST(State, SingleSteppingExitsAfterEveryInstruction) {
  auto guest = test.guest();
  guest->load(three_steps);
  guest->enter(Mode::long64);
  kvm_guest_debug debug{};
  debug.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP;
  guest->vcpu().set_guest_debug(debug);
  for (const uint64_t next : {1, 6, 7, 8}) {
    const auto exit = guest->run();
    ASSERT_EQ(exit.reason(), KVM_EXIT_DEBUG) << guest->describe(exit);
    EXPECT_EQ(exit.raw().debug.arch.exception, 1u);
    EXPECT_EQ(exit.raw().debug.arch.pc, code_gpa + next);
    EXPECT_NE(exit.raw().debug.arch.dr6 & 0x4000, 0u);
  }
  EXPECT_EQ(guest->vcpu().regs().rbx, 5u);
  EXPECT_EQ(guest->vcpu().regs().rflags & 0x100, 0u) << "the debugger's TF is not the guest's";
}

CONTRACT_TEST(State, AHardwareBreakpointStopsBeforeItsInstruction) {
  auto guest = test.guest();
  guest->load(three_steps);
  guest->enter(Mode::long64);
  kvm_guest_debug debug{};
  debug.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP;
  debug.arch.debugreg[0] = code_gpa + 6;
  debug.arch.debugreg[7] = 0x403;
  guest->vcpu().set_guest_debug(debug);
  const auto exit = guest->run();
  if (exit.reason() != KVM_EXIT_DEBUG) test.deviates("no hardware breakpoint: " + guest->describe(exit));
  EXPECT_EQ(exit.raw().debug.arch.pc, code_gpa + 6);
  EXPECT_NE(exit.raw().debug.arch.dr6 & 1, 0u);
  EXPECT_EQ(guest->vcpu().regs().rax, 5u);
}

GUEST_CODE(touch_watch, 64, "mov 0x40000, %rax; mov %rax, 0x40008; nop; nop; out %al, $0xe0");
CONTRACT_TEST(State, AWatchpointStopsAfterTheWrite) {
  auto guest = test.guest();
  guest->load(touch_watch);
  guest->enter(Mode::long64);
  kvm_guest_debug debug{};
  debug.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP;
  debug.arch.debugreg[1] = 0x40008;
  debug.arch.debugreg[7] = 0x400 | 1 << 2 | 0b1001 << 20;  // DR1: writes of 8 bytes
  guest->vcpu().set_guest_debug(debug);
  const auto exit = guest->run();
  if (exit.reason() != KVM_EXIT_DEBUG) test.deviates("no watchpoint: " + guest->describe(exit));
  EXPECT_EQ(exit.raw().debug.arch.pc, code_gpa + 16);
  EXPECT_NE(exit.raw().debug.arch.dr6 & 2, 0u);
}

GUEST_CODE(soft_break, 64, "nop; int3; nop; out %al, $0xe0");
CONTRACT_TEST(State, ASoftwareBreakpointExitsAtItsInstruction) {
  auto guest = test.guest();
  guest->load(soft_break);
  guest->enter(Mode::long64);
  kvm_guest_debug debug{};
  debug.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP;
  guest->vcpu().set_guest_debug(debug);
  const auto exit = guest->run();
  ASSERT_EQ(exit.reason(), KVM_EXIT_DEBUG) << guest->describe(exit);
  EXPECT_EQ(exit.raw().debug.arch.exception, 3u);
  EXPECT_EQ(exit.raw().debug.arch.pc, code_gpa + 1);
}

GUEST_CODE(touch_debug_registers, 64, "nop; mov %dr0, %rax; out %al, $0xe0");
CONTRACT_TEST(State, ADebuggerLearnsWhoTouchesTheDebugRegisters) {
  auto guest = test.guest();
  guest->load(touch_debug_registers);
  guest->enter(Mode::long64);
  kvm_guest_debug debug{};
  debug.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP;
  debug.arch.debugreg[7] = 0x2400;  // GD
  guest->vcpu().set_guest_debug(debug);
  const auto exit = guest->run();
  if (exit.reason() != KVM_EXIT_DEBUG) test.deviates("DR7.GD of the debugger: " + guest->describe(exit));
  EXPECT_EQ(exit.raw().debug.arch.exception, 1u);
  EXPECT_EQ(exit.raw().debug.arch.pc, code_gpa + 1) << "before the instruction";
  EXPECT_EQ(exit.raw().debug.arch.dr6, 0xffff2ff0u);
  guest->vcpu().set_guest_debug({});
  guest->finish();
}

GUEST_CODE(steps_with_interrupts, 64, "sti; nop; nop; nop; cli; out %al, $0xe0");
CONTRACT_TEST(State, ADebuggerCanKeepInterruptsOut) {
  if ((test.system().check_extension(KVM_CAP_SET_GUEST_DEBUG2) & KVM_GUESTDBG_BLOCKIRQ) == 0)
    throw Unable("no KVM_GUESTDBG_BLOCKIRQ");
  auto guest = test.guest();
  guest->load(steps_with_interrupts);
  guest->enter(Mode::long64);
  ASSERT_EQ(guest->vcpu().interrupt(0x50), 0);
  ASSERT_EQ(guest->vcpu().nmi(), 0);
  kvm_guest_debug debug{};
  debug.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_BLOCKIRQ;
  guest->vcpu().set_guest_debug(debug);
  for (const uint64_t next : {1, 2, 3}) {
    const auto exit = guest->run();
    if (exit.reason() != KVM_EXIT_DEBUG) test.deviates("no steps: " + guest->describe(exit));
    EXPECT_EQ(exit.raw().debug.arch.pc, code_gpa + next);
  }
  guest->vcpu().set_guest_debug({});
  EXPECT_EQ(guest->trap().vector, 2u) << "both have waited";
}

GUEST_CODE(
    own_breakpoint, 64,
    "lea 1f(%rip), %rax; mov %rax, %dr0; mov $0x401, %eax; mov %rax, %dr7; nop; 1: nop; out %al, $0xe0");
CONTRACT_TEST(State, TheGuestsOwnBreakpointIsADebugFault) {
  auto guest = test.guest();
  guest->load(own_breakpoint);
  guest->enter(Mode::long64);
  const auto exit = guest->run();
  if (!Guest::is_out(exit, trap_port))
    test.deviates("no hardware breakpoint for the guest: " + guest->describe(exit));
  EXPECT_EQ((guest->vcpu().regs().rip - stubs_gpa) / 16, 1u);
  EXPECT_EQ(guest->at<uint64_t>(guest->vcpu().regs().rsp), code_gpa + own_breakpoint.size() - 3);
}

GUEST_CODE(own_watch, 64,
           "mov $0x40000, %eax; mov %rax, %dr2; mov $0xf000420, %eax; mov %rax, %dr7; mov %rbx, 0x3fffc; 1: "
           "nop; nop; out %al, $0xe0");
CONTRACT_TEST(State, TheGuestsOwnWatchpointIsADebugTrap) {
  auto guest = test.guest();
  guest->load(own_watch);
  guest->enter(Mode::long64);
  const auto exit = guest->run();
  if (!Guest::is_out(exit, trap_port)) test.deviates("no watchpoint for the guest: " + guest->describe(exit));
  EXPECT_EQ((guest->vcpu().regs().rip - stubs_gpa) / 16, 1u);
  EXPECT_EQ(guest->at<uint64_t>(guest->vcpu().regs().rsp), code_gpa + own_watch.size() - 4);
}

}  // namespace
}  // namespace lodge::contract
