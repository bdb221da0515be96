// System-management mode: what it hides, what it saves, what it holds back.
#include <linux/kvm_para.h>

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "chips.hpp"

namespace lodge::contract {
namespace {

CONTRACT_SUITE(Smm);

constexpr uint32_t second_space = 1 << 16;  // of slot numbers: what system-management mode sees
constexpr uint32_t msr_smi_count = 0x34, msr_smbase = 0x9e;
// The guest has its own memory here, which SMRAM hides.
constexpr uint64_t smbase = 0x100000, smram_size = 0x40000;

uint64_t msr(kvm::Vcpu& vcpu, uint32_t index) {
  kvm_msr_entry entry{};
  entry.index = index;
  EXPECT_EQ(vcpu.msrs({&entry, 1}), 1u) << "MSR " << std::hex << index;
  return entry.data;
}
void set_msr(kvm::Vcpu& vcpu, uint32_t index, uint64_t value) {
  const kvm_msr_entry entry{.index = index, .reserved = 0, .data = value};
  ASSERT_EQ(vcpu.set_msrs({&entry, 1}), 1u) << "MSR " << std::hex << index;
}

// A guest with SMRAM: the low 1 MiB is the same memory in both address spaces.
struct Managed {
  Mapping smram = Mapping::anonymous(smram_size);  // outlives the VM
  std::unique_ptr<Guest> guest;

  Managed(Contract& test, const GuestConfig& config = {}) : guest(test.guest(config)) {
    if (guest->vm().check_extension(KVM_CAP_X86_SMM) == 0) throw Unable("there is no KVM_CAP_X86_SMM");
    slot(0, 0, guest->memory(0), smbase);
    slot(1, smbase, smram.data(), smram_size);
    for (unsigned i = 0; i < config.vcpus; ++i) set_msr(guest->vcpu(i), msr_smbase, smbase);
  }
  void slot(uint32_t number, uint64_t gpa, uint8_t* memory, uint64_t size) {
    guest->vm().set_user_memory_region({.slot = second_space | number,
                                        .flags = 0,
                                        .guest_phys_addr = gpa,
                                        .memory_size = size,
                                        .userspace_addr = reinterpret_cast<uint64_t>(memory)});
  }
  void handle(std::span<const uint8_t> code, uint64_t base = smbase) {
    std::memcpy(smram.data() + (base - smbase) + 0x8000, code.data(), code.size());
  }
  template <class T>
  T saved(unsigned offset) {
    T value;
    std::memcpy(&value, smram.data() + offset, sizeof value);
    return value;
  }
  template <class T>
  void save(unsigned offset, T value) {
    std::memcpy(smram.data() + offset, &value, sizeof value);
  }
  void start(Mode mode, std::span<const uint8_t> code) {
    guest->load(code);
    guest->enter(mode);
  }
  kvm::Vcpu& vcpu() { return guest->vcpu(); }
};

// The same bytes in every mode.
GUEST_CODE(two_outs, 64, "out %al, $0x90; out %al, $0xe0");
// Leaves nothing as it was.
GUEST_CODE(
    clobber, 16,
    "mov $0x11111111, %eax; mov %eax, %ebx; mov %eax, %ecx; mov %eax, %edx; mov %eax, %esi; mov %eax, "
    "%edi; mov %eax, %ebp; mov $0x100, %esp; push %ss; pop %ds; mov $0x2000, %ax; mov %ax, %es; mov %ax, "
    "%fs; mov %ax, %gs; sti; cli; std; out %al, $0x91; rsm");

CONTRACT_TEST(Smm, AnSmiStartsTheHandlerInRealMode) {
  Managed m(test);
  m.handle(clobber);
  m.start(Mode::long64, two_outs);
  ASSERT_EQ(m.vcpu().smi(), 0);
  const auto exit = m.guest->run();
  ASSERT_TRUE(Guest::is_out(exit, 0x91)) << m.guest->describe(exit);
  EXPECT_NE(m.vcpu().shared().flags & KVM_RUN_X86_SMM, 0);
  const auto sregs = m.vcpu().sregs();
  EXPECT_EQ(sregs.cs.base, smbase);
  EXPECT_EQ(sregs.cs.selector, smbase >> 4 & 0xffff);
  EXPECT_EQ(sregs.ss.limit, 0xffffffffu);
  EXPECT_EQ(sregs.cr0 & 0x80000001, 0u);
  EXPECT_EQ(sregs.cr4, 0u);
  EXPECT_EQ(sregs.efer, 0u);
  EXPECT_EQ(m.vcpu().vcpu_events().smi.smm, 1);
  m.guest->run();
  EXPECT_EQ(m.vcpu().shared().flags & KVM_RUN_X86_SMM, 0);
  EXPECT_EQ(m.vcpu().vcpu_events().smi.smm, 0);
  EXPECT_EQ(msr(m.vcpu(), msr_smi_count), 1u);
}

void expect_same(const kvm_segment& a, const kvm_segment& b, const char* name) {
  EXPECT_EQ(a.base, b.base) << name;
  EXPECT_EQ(a.limit, b.limit) << name;
  EXPECT_EQ(a.selector, b.selector) << name;
  EXPECT_EQ(a.type, b.type) << name;
  EXPECT_EQ(a.dpl, b.dpl) << name;
  EXPECT_EQ(a.db, b.db) << name;
  EXPECT_EQ(a.l, b.l) << name;
  EXPECT_EQ(a.unusable, b.unusable) << name;
}

void expect_all_restored(Contract& test, Mode mode, bool long_mode_cpu) {
  test.needs(mode);
  Managed m(test);
  if (!long_mode_cpu) {
    auto cpuid = m.vcpu().cpuid2();
    for (auto& entry : cpuid)
      if (entry.function == 0x80000001) entry.edx &= ~(1u << 29);
    m.vcpu().set_cpuid2(cpuid);
  }
  m.handle(clobber);
  m.start(mode, two_outs);
  auto before = m.vcpu().regs();
  before.rax = 0x12345670, before.rbx = 0x23456701, before.rcx = 0x34567012, before.rdx = 0x45670123;
  before.rsi = 0x56701234, before.rdi = 0x67012345, before.rbp = 0x70123456;
  if (mode == Mode::long64)
    before.r8 = ~uint64_t{8}, before.r15 = ~uint64_t{15}, before.rax |= uint64_t{7} << 60;
  before.rflags = 0x8d7;
  m.vcpu().set_regs(before);
  const auto special = m.vcpu().sregs();
  ASSERT_TRUE(Guest::is_out(m.guest->run(), 0x90));
  m.vcpu().smi();
  ASSERT_TRUE(Guest::is_out(m.guest->run(), 0x91));
  EXPECT_EQ(m.saved<uint32_t>(0xfefc), long_mode_cpu ? 0x20064u : 0x20000u) << "revision";
  EXPECT_EQ(m.saved<uint32_t>(long_mode_cpu ? 0xff00 : 0xfef8), smbase);
  m.guest->finish();
  const auto after = m.vcpu().regs();
  EXPECT_EQ(after.rip, before.rip + 2);  // the second OUT is completed by the next run
  before.rip = after.rip;
  EXPECT_EQ(std::memcmp(&before, &after, sizeof before), 0);
  const auto restored = m.vcpu().sregs();
  EXPECT_EQ(restored.cr0, special.cr0);
  EXPECT_EQ(restored.cr3, special.cr3);
  EXPECT_EQ(restored.cr4, special.cr4);
  EXPECT_EQ(restored.efer, special.efer);
  EXPECT_EQ(restored.gdt.base, special.gdt.base);
  EXPECT_EQ(restored.gdt.limit, special.gdt.limit);
  EXPECT_EQ(restored.idt.base, special.idt.base);
  EXPECT_EQ(restored.idt.limit, special.idt.limit);
  expect_same(restored.cs, special.cs, "cs");
  expect_same(restored.ds, special.ds, "ds");
  expect_same(restored.es, special.es, "es");
  expect_same(restored.fs, special.fs, "fs");
  expect_same(restored.gs, special.gs, "gs");
  expect_same(restored.ss, special.ss, "ss");
  expect_same(restored.tr, special.tr, "tr");
  expect_same(restored.ldt, special.ldt, "ldt");
}

CONTRACT_TEST(Smm, RsmRestoresRealMode) {
  expect_all_restored(test, Mode::real, true);
}
CONTRACT_TEST(Smm, RsmRestoresProtectedMode) {
  expect_all_restored(test, Mode::prot32, true);
}
CONTRACT_TEST(Smm, RsmRestores32BitPaging) {
  expect_all_restored(test, Mode::paged32, true);
}
CONTRACT_TEST(Smm, RsmRestoresPaePaging) {
  expect_all_restored(test, Mode::pae32, true);
}
CONTRACT_TEST(Smm, RsmRestoresLongMode) {
  expect_all_restored(test, Mode::long64, true);
}
CONTRACT_TEST(Smm, AProcessorWithoutLongModeHasThe32BitSaveArea) {
  for (const Mode mode : {Mode::real, Mode::prot32, Mode::pae32}) expect_all_restored(test, mode, false);
}

GUEST_CODE(relocate, 16, "movl $0x120000, %cs:0xff00; movl $0x77, %cs:0xfff8; out %al, $0x91; rsm");
GUEST_CODE(relocated, 16, "out %al, $0x92; rsm");
CONTRACT_TEST(Smm, TheHandlerMovesSmramAndChangesWhatIsSaved) {
  Managed m(test);
  m.handle(relocate);
  m.handle(relocated, 0x120000);
  m.start(Mode::long64, two_outs);
  m.vcpu().smi();
  ASSERT_TRUE(Guest::is_out(m.guest->run(), 0x91));
  ASSERT_TRUE(Guest::is_out(m.guest->run(), 0x90));
  EXPECT_EQ(m.vcpu().regs().rax, 0x77u);
  EXPECT_EQ(msr(m.vcpu(), msr_smbase), 0x120000u);
  m.vcpu().smi();
  EXPECT_TRUE(Guest::is_out(m.guest->run(), 0x92));
  m.guest->finish();
}

GUEST_CODE(read_hidden, 64, "mov 0x110000, %al; out %al, $0x90; mov 0x110000, %al; out %al, $0xe0");
GUEST_CODE(handler_reads, 16, "addr32 mov 0x110000, %al; addr32 incb 0x40000; out %al, $0x91; rsm");
CONTRACT_TEST(Smm, SmramIsSeenInTheModeOnly) {
  Managed m(test);
  m.handle(handler_reads);
  m.guest->at<uint8_t>(0x110000) = 1;
  m.smram.data()[0x10000] = 2;
  m.start(Mode::long64, read_hidden);
  ASSERT_TRUE(Guest::is_out(m.guest->run(), 0x90));
  EXPECT_EQ(m.vcpu().regs().rax & 0xff, 1u);
  m.vcpu().smi();
  ASSERT_TRUE(Guest::is_out(m.guest->run(), 0x91));
  EXPECT_EQ(m.vcpu().regs().rax & 0xff, 2u);
  m.guest->finish();
  EXPECT_EQ(m.vcpu().regs().rax & 0xff, 1u);
  EXPECT_EQ(m.guest->at<uint8_t>(0x40000), 1) << "memory of both address spaces";
}

// Calls a function 64 times, lets the handler change its constant, and calls it again.
GUEST_CODE(
    call_changing, 64,
    "mov $0x40000, %ebx; xor %edx, %edx; mov $64, %ecx; 1: call *%rbx; add %eax, %edx; loop 1b; out %al, "
    "$0x90; mov $64, %ecx; 2: call *%rbx; add %eax, %edx; loop 2b; out %al, $0xe0");
GUEST_CODE(handler_changes, 16, "addr32 movb $3, 0x40001; out %al, $0x91; rsm");
CONTRACT_TEST(Smm, CodeThatTheHandlerChangesIsNotRunAsItWas) {
  Managed m(test);
  m.handle(handler_changes);
  const uint8_t function[] = {0xb8, 1, 0, 0, 0, 0xc3};  // mov $1, %eax; ret
  std::memcpy(m.guest->memory(0x40000), function, sizeof function);
  m.start(Mode::long64, call_changing);
  ASSERT_TRUE(Guest::is_out(m.guest->run(), 0x90));
  m.vcpu().smi();
  ASSERT_TRUE(Guest::is_out(m.guest->run(), 0x91));
  m.guest->finish();
  EXPECT_EQ(m.vcpu().regs().rdx, 64u * 1 + 64u * 3);
}

// The other way round: the handler's code, in memory that the guest sees as well, is changed by the guest.
GUEST_CODE(change_handler, 64, "xor %eax, %eax; 1: movb %al, 0x48001; out %al, $0x90; inc %al; jmp 1b");
GUEST_CODE(shared_handler, 16, "mov $0, %al; out %al, $0x91; rsm");
CONTRACT_TEST(Smm, HandlersInOpenMemoryAreSeenAsTheGuestWritesThem) {
  Managed m(test);
  std::memcpy(m.guest->memory(0x48000), shared_handler.data(), shared_handler.size());
  set_msr(m.vcpu(), msr_smbase, 0x40000);
  m.start(Mode::long64, change_handler);
  for (unsigned i = 0; i < 40; ++i) {
    ASSERT_TRUE(Guest::is_out(m.guest->run(), 0x90));
    m.vcpu().smi();
    const auto exit = m.guest->run();
    ASSERT_TRUE(Guest::is_out(exit, 0x91)) << m.guest->describe(exit);
    EXPECT_EQ(exit.io().data[0], i);
  }
}

GUEST_CODE(rsm_outside, 64, "rsm");
CONTRACT_TEST(Smm, RsmIsUndefinedOutside) {
  Managed m(test);
  EXPECT_EQ(m.guest->fault(Mode::long64, rsm_outside).vector, 6u);
}

GUEST_CODE(self_smi, 64, APIC "movl $0x40200, 0x300(%rbp);" SOON "out %al, $0xe0");
CONTRACT_TEST(Smm, AnSmiCanBeSentToOneself) {
  Managed m(test, {.irqchip = Irqchip::full});
  m.handle(clobber);
  m.start(Mode::long64, self_smi);
  ASSERT_TRUE(Guest::is_out(m.guest->run(), 0x91));
  m.guest->finish();
}

CONTRACT_TEST(Smm, AnSmiIsDroppedWhereTheModeHasNoMemory) {
  if (!test.soft()) throw Unable("KVM ends the VM");
  auto guest = test.guest({.irqchip = Irqchip::full});
  guest->load(self_smi);
  guest->enter(Mode::long64);
  guest->finish();
  EXPECT_EQ(guest->vcpu().vcpu_events().smi.pending, 0);
  EXPECT_EQ(msr(guest->vcpu(), msr_smi_count), 0u);
}

GUEST_CODE(jumps_high, 16, "mov $0x18000, %ebp; jmpl *%ebp");
GUEST_CODE(runs_high, 16, "xor %eax, %eax; jnz 1f; cpuid; nop; 1: out %al, $0x92; rsm");
CONTRACT_TEST(Smm, HandlersRunAbove64KiB) {
  Managed m(test);
  m.handle(jumps_high);
  m.handle(runs_high, smbase + 0x10000);
  m.start(Mode::long64, two_outs);
  m.vcpu().smi();
  const auto exit = m.guest->run();
  ASSERT_TRUE(Guest::is_out(exit, 0x92)) << m.guest->describe(exit);
  EXPECT_GT(m.vcpu().regs().rip, 0x18000u);
  EXPECT_TRUE(Guest::is_out(m.guest->run(), 0x90));
}

GUEST_CODE(handler_waits, 16, "out %al, $0x91; nop; out %al, $0x92; rsm");
CONTRACT_TEST(Smm, NmisWaitForRsm) {
  Managed m(test);
  m.handle(handler_waits);
  m.start(Mode::long64, two_outs);
  m.vcpu().smi();
  ASSERT_TRUE(Guest::is_out(m.guest->run(), 0x91));
  m.vcpu().nmi();
  ASSERT_TRUE(Guest::is_out(m.guest->run(), 0x92));
  EXPECT_EQ(m.vcpu().vcpu_events().nmi.masked, 1);
  const Trap trap = m.guest->trap();
  EXPECT_EQ(trap.vector, 2u);
  EXPECT_EQ(trap.rip, code_gpa);
}

CONTRACT_TEST(Smm, OneMoreSmiWaitsForRsm) {
  Managed m(test);
  m.handle(handler_waits);
  m.start(Mode::long64, two_outs);
  m.vcpu().smi();
  ASSERT_TRUE(Guest::is_out(m.guest->run(), 0x91));
  m.vcpu().smi();
  m.vcpu().smi();
  ASSERT_TRUE(Guest::is_out(m.guest->run(), 0x92));
  EXPECT_EQ(m.vcpu().vcpu_events().smi.pending, 1);
  ASSERT_TRUE(Guest::is_out(m.guest->run(), 0x91)) << "the second";
  ASSERT_TRUE(Guest::is_out(m.guest->run(), 0x92));
  EXPECT_TRUE(Guest::is_out(m.guest->run(), 0x90)) << "and no third";
}

CONTRACT_TEST(Smm, AnSmiComesBeforeAnNmi) {
  Managed m(test);
  m.handle(handler_waits);
  m.start(Mode::long64, two_outs);
  m.vcpu().nmi();
  m.vcpu().smi();
  EXPECT_TRUE(Guest::is_out(m.guest->run(), 0x91));
  EXPECT_TRUE(Guest::is_out(m.guest->run(), 0x92));
  EXPECT_EQ(m.guest->trap().vector, 2u);
}

CONTRACT_TEST(Smm, InitWaitsForRsm) {
  Managed m(test, {.irqchip = Irqchip::full});
  m.handle(handler_waits);
  m.start(Mode::long64, two_outs);
  m.vcpu().smi();
  ASSERT_TRUE(Guest::is_out(m.guest->run(), 0x91));
  auto events = m.vcpu().vcpu_events();
  EXPECT_NE(events.flags & KVM_VCPUEVENT_VALID_SMM, 0u);
  events.smi.latched_init = 1;
  m.vcpu().set_vcpu_events(events);
  events.exception = {.injected = 1, .nr = 2, .has_error_code = 0, .pending = 0, .error_code = 0};
  events.smi.latched_init = 0;
  EXPECT_EQ(refusal([&] { m.vcpu().set_vcpu_events(events); }), EINVAL);
  EXPECT_EQ(m.vcpu().vcpu_events().smi.latched_init, 1) << "what is refused changes nothing";
  ASSERT_TRUE(Guest::is_out(m.guest->run(), 0x92));
  EXPECT_EQ(m.vcpu().vcpu_events().smi.latched_init, 1);
  try {
    m.guest->run();  // there is no firmware at the reset vector
  } catch (const Unable&) {
  }
  EXPECT_EQ(m.vcpu().vcpu_events().smi.smm, 0);
  EXPECT_EQ(m.vcpu().regs().rip, 0xfff0u);
  EXPECT_EQ(m.vcpu().sregs().cs.base, 0xffff0000u);
}

// KVM_SMI waits for the end of KVM_RUN, as all ioctls of a vCPU do.
void run_until_halted(kvm::Vcpu& vcpu) {
  for (unsigned i = 0; i < 100 && vcpu.mp_state().mp_state != unsigned{KVM_MP_STATE_HALTED}; ++i) {
    const std::jthread kicker([&] {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      vcpu.kick();
    });
    EXPECT_EQ(vcpu.run().status(), -EINTR);
  }
  EXPECT_EQ(vcpu.mp_state().mp_state, unsigned{KVM_MP_STATE_HALTED});
}
GUEST_CODE(halts, 64, "hlt; out %al, $0xe0");
CONTRACT_TEST(Smm, AnSmiEndsAHaltForTheTimeOfTheHandler) {
  if (!test.soft()) throw Unable("KVM does not halt again after RSM");
  Managed m(test, {.irqchip = Irqchip::full});
  m.handle(handler_waits);
  m.start(Mode::long64, halts);
  run_until_halted(m.vcpu());
  m.vcpu().smi();
  EXPECT_TRUE(Guest::is_out(m.guest->run(), 0x91));
  EXPECT_EQ(m.saved<uint8_t>(0xfec9), 1);
  EXPECT_TRUE(Guest::is_out(m.guest->run(), 0x92));
  run_until_halted(m.vcpu());
  EXPECT_EQ(m.vcpu().regs().rip, code_gpa + 1);
}

CONTRACT_TEST(Smm, TheModeMovesToAnotherVm) {
  Managed from(test);
  from.handle(handler_waits);
  from.start(Mode::long64, two_outs);
  from.vcpu().smi();
  ASSERT_TRUE(Guest::is_out(from.guest->run(), 0x91));
  from.vcpu().smi();
  from.vcpu().shared().immediate_exit = 1;  // completes the OUT
  EXPECT_EQ(from.vcpu().run().status(), -EINTR);

  Managed to(test);
  std::memcpy(to.guest->memory(0), from.guest->memory(0), 4 << 20);
  std::memcpy(to.smram.data(), from.smram.data(), smram_size);
  to.guest->enter_as(Mode::long64);
  auto events = from.vcpu().vcpu_events();
  EXPECT_EQ(events.smi.smm, 1);
  EXPECT_EQ(events.smi.pending, 1);
  to.vcpu().set_sregs(from.vcpu().sregs());
  to.vcpu().set_regs(from.vcpu().regs());
  to.vcpu().set_vcpu_events(events);
  ASSERT_TRUE(Guest::is_out(to.guest->run(), 0x92));
  ASSERT_TRUE(Guest::is_out(to.guest->run(), 0x91)) << "the SMI that waited";
  ASSERT_TRUE(Guest::is_out(to.guest->run(), 0x92));
  ASSERT_TRUE(Guest::is_out(to.guest->run(), 0x90));
  to.guest->finish();
}

CONTRACT_TEST(Smm, WithoutMemoryForItsStateTheProcessorShutsDown) {
  Managed m(test);
  set_msr(m.vcpu(), msr_smbase, 0x8000000);
  m.start(Mode::long64, two_outs);
  m.vcpu().smi();
  EXPECT_EQ(m.guest->run().reason(), unsigned{KVM_EXIT_SHUTDOWN});
}

CONTRACT_TEST(Smm, RsmToAnImpossibleStateShutsDown) {
  Managed m(test);
  m.handle(handler_waits);
  m.start(Mode::long64, two_outs);
  m.vcpu().smi();
  ASSERT_TRUE(Guest::is_out(m.guest->run(), 0x91));
  m.save<uint64_t>(0xff58, 0x80000000);  // CR0: paging without protection
  ASSERT_TRUE(Guest::is_out(m.guest->run(), 0x92));
  EXPECT_EQ(m.guest->run().reason(), unsigned{KVM_EXIT_SHUTDOWN});
}

// RSM from 64-bit code that runs often: the handler enters long mode with the guest's page tables.
GUEST_CODE(
    handler_long, 16,
    "data32 addr32 lgdt %cs:(gdt_pointer - guest_handler_long + 0x8000); mov $0x20, %eax; mov %eax, %cr4;"
    "mov $0x20000, %eax; mov %eax, %cr3; mov $0xc0000080, %ecx; mov $0x100, %eax; xor %edx, %edx; wrmsr;"
    "mov %cr0, %eax; or $0x80000001, %eax; mov %eax, %cr0;"
    "ljmpl $8, $(0x108000 + wide - guest_handler_long);"
    ".code64; wide: mov $2000, %ecx; 1: addl $1, 0x41000; dec %ecx; jnz 1b; out %al, $0x91; rsm;"
    ".balign 8; gdt_table: .quad 0, 0x00af9b000000ffff; gdt_pointer: .word 15; .long 0x108000 + gdt_table - "
    "guest_handler_long");
GUEST_CODE(many_outs, 64, "1: out %al, $0x90; jmp 1b");
CONTRACT_TEST(Smm, HandlersIn64BitModeRunAndReturn) {
  Managed m(test);
  m.handle(handler_long);
  m.start(Mode::long64, many_outs);
  for (unsigned i = 1; i <= 30; ++i) {
    m.vcpu().smi();
    const auto exit = m.guest->run();
    ASSERT_TRUE(Guest::is_out(exit, 0x91)) << m.guest->describe(exit);
    EXPECT_EQ(m.guest->at<uint32_t>(0x41000), 2000 * i);
    ASSERT_TRUE(Guest::is_out(m.guest->run(), 0x90));
  }
}

// The guest's kernel may choose addresses that SMRAM hides: what KVM tells it is never written there.
constexpr uint64_t hidden = 0x110000, smram_of_hidden = hidden - smbase;
constexpr uint8_t untouched = 0x5a;
void expect_untouched(const Managed& m) {
  const auto* const area = m.smram.data() + smram_of_hidden;
  EXPECT_TRUE(std::all_of(area, area + 256, [](uint8_t byte) { return byte == untouched; }));
}

CONTRACT_TEST(Smm, ClockAndStealTimeAreWrittenOutsideOfSmram) {
  test.needs_cpuid(KVM_CPUID_FEATURES, &kvm_cpuid_entry2::eax, KVM_FEATURE_CLOCKSOURCE2, "kvmclock");
  test.needs_cpuid(KVM_CPUID_FEATURES, &kvm_cpuid_entry2::eax, KVM_FEATURE_STEAL_TIME, "steal time");
  Managed m(test, {.irqchip = Irqchip::full});
  std::memset(m.smram.data() + smram_of_hidden, untouched, 256);
  m.handle(handler_waits);
  m.start(Mode::long64, two_outs);
  m.vcpu().smi();
  ASSERT_TRUE(Guest::is_out(m.guest->run(), 0x91));
  set_msr(m.vcpu(), MSR_KVM_STEAL_TIME, hidden | KVM_MSR_ENABLED);
  set_msr(m.vcpu(), MSR_KVM_SYSTEM_TIME_NEW, (hidden + 64) | KVM_MSR_ENABLED);
  set_msr(m.vcpu(), MSR_KVM_WALL_CLOCK_NEW, hidden + 96);
  m.vcpu().shared().immediate_exit = 1;  // completes the OUT
  EXPECT_EQ(m.vcpu().run().status(), -EINTR);
  if (test.soft()) {
    EXPECT_EQ(m.guest->at<uint8_t>(hidden + offsetof(kvm_steal_time, preempted)), KVM_VCPU_PREEMPTED);
  }
  m.vcpu().shared().immediate_exit = 0;
  ASSERT_TRUE(Guest::is_out(m.guest->run(), 0x92));
  expect_untouched(m);
  EXPECT_NE(m.guest->at<uint32_t>(hidden + 64), 0u) << "the clock's version";
  EXPECT_NE(m.guest->at<uint32_t>(hidden + 96), 0u) << "the wall clock's version";
}

// An interrupt within the mode, whose handler returns from it.
constexpr uint64_t real_mode_table = 0x60000, interrupt_handler = 0x70000;
GUEST_CODE(handler_interrupts_itself, 16,
           "data32 addr32 lidt %cs:(idt_pointer - guest_handler_interrupts_itself + 0x8000);"
           "mov $0xfee00000, %ebp; addr32 movl $0x1ff, 0xf0(%ebp); addr32 movl $0x40040, 0x300(%ebp); sti;"
           "1: jmp 1b; idt_pointer: .word 0x3ff; .long 0x60000");
GUEST_CODE(returns_from_the_mode, 16, "rsm");
GUEST_CODE(ends_in_memory, 64, "btrl $0, 0x110000; setc %bl; out %al, $0xe0");
CONTRACT_TEST(Smm, AnEoiThatIsOfferedInTheModeIsSettledOutside) {
  test.needs_cpuid(KVM_CPUID_FEATURES, &kvm_cpuid_entry2::eax, KVM_FEATURE_PV_EOI, "paravirtual EOI");
  Managed m(test, {.irqchip = Irqchip::full});
  std::memset(m.smram.data() + smram_of_hidden, untouched, 256);
  m.handle(handler_interrupts_itself);
  m.guest->at<uint32_t>(real_mode_table + 4 * 0x40) = interrupt_handler >> 4 << 16;
  m.start(Mode::long64, ends_in_memory);
  m.guest->load(returns_from_the_mode, interrupt_handler);
  set_msr(m.vcpu(), MSR_KVM_PV_EOI_EN, hidden | KVM_MSR_ENABLED);
  m.vcpu().smi();
  m.guest->finish();
  expect_untouched(m);
  const bool ended = (m.vcpu().regs().rbx & 1) != 0;
  uint32_t in_service = 0;
  std::memcpy(&in_service, m.vcpu().lapic().regs + 0x120, sizeof in_service);
  EXPECT_EQ(in_service & 1, ended ? 0u : 1u);
}

}  // namespace
}  // namespace lodge::contract
