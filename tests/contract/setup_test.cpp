// What a VMM sets up before the guest runs, what is refused, and what it may not change afterwards: numbers
// of vCPUs, CPUID, control registers and MSRs, exits that it does without (api.rst).
#include <linux/kvm_para.h>

#include <algorithm>

#include "harness.hpp"

namespace lodge::contract {
namespace {

CONTRACT_SUITE(Setup);

kvm_enable_cap capability(uint32_t number, uint64_t argument) {
  kvm_enable_cap cap{};
  cap.cap = number;
  cap.args[0] = argument;
  return cap;
}

CONTRACT_TEST(Setup, VcpuIdsEndWhereTheVmmHasSaid) {
  auto vm = test.system().create_vm();
  if (!test.soft() && vm->check_extension(KVM_CAP_MAX_VCPU_ID) == 0) throw Unable("no KVM_CAP_MAX_VCPU_ID");
  const auto highest = static_cast<uint64_t>(vm->check_extension(KVM_CAP_MAX_VCPU_ID));
  const auto limit = [&](uint64_t ids) {
    return refusal([&] { vm->enable_cap(capability(KVM_CAP_MAX_VCPU_ID, ids)); });
  };
  EXPECT_EQ(limit(highest + 1), EINVAL);
  vm->set_boot_cpu_id(2);
  EXPECT_EQ(limit(1), EINVAL) << "the boot processor would not be there";
  EXPECT_EQ(limit(4), 0);
  EXPECT_EQ(limit(4), 0) << "the same once more";
  EXPECT_EQ(limit(5), EINVAL) << "said once";
  EXPECT_EQ(refusal([&] { vm->create_vcpu(4); }), EINVAL);
  EXPECT_EQ(refusal([&] { vm->create_vcpu(3); }), 0);
}

CONTRACT_TEST(Setup, TheBootProcessorIsOneThatCanBe) {
  test.needs_capability(KVM_CAP_SET_BOOT_CPU_ID, "KVM_CAP_SET_BOOT_CPU_ID");
  auto vm = test.system().create_vm();
  const auto highest = static_cast<uint32_t>(vm->check_extension(KVM_CAP_MAX_VCPU_ID));
  EXPECT_EQ(refusal([&] { vm->set_boot_cpu_id(highest + 1); }), EINVAL);
  EXPECT_EQ(refusal([&] { vm->set_boot_cpu_id(highest - 1); }), 0);
}

CONTRACT_TEST(Setup, ThePagesOfRealModeLieBelowFourGigabytes) {
  test.needs_capability(KVM_CAP_SET_TSS_ADDR, "KVM_CAP_SET_TSS_ADDR");
  auto vm = test.system().create_vm();
  constexpr uint64_t last = 0xffff'd000;
  EXPECT_EQ(refusal([&] { vm->set_tss_addr(~uint64_t{0}); }), EINVAL);
  EXPECT_EQ(refusal([&] { vm->set_tss_addr(last + 1); }), EINVAL);
  EXPECT_EQ(refusal([&] { vm->set_tss_addr(last); }), 0);
}

CONTRACT_TEST(Setup, TheIdentityMapIsPlacedBeforeTheFirstVcpu) {
  test.needs_capability(KVM_CAP_SET_IDENTITY_MAP_ADDR, "KVM_CAP_SET_IDENTITY_MAP_ADDR");
  auto vm = test.system().create_vm();
  const auto place = [&] { return refusal([&] { vm->set_identity_map_addr(0xfffb'c000); }); };
  EXPECT_EQ(place(), 0);
  auto vcpu = vm->create_vcpu(0);
  EXPECT_EQ(place(), EINVAL);
}

CONTRACT_TEST(Setup, TheIrqchipComesBeforeTheFirstVcpu) {
  auto vm = test.system().create_vm();
  const auto split = [&] { return refusal([&] { vm->enable_cap(capability(KVM_CAP_SPLIT_IRQCHIP, 24)); }); };
  {
    auto vcpu = vm->create_vcpu(0);
    EXPECT_EQ(refusal([&] { vm->create_irqchip(); }), EINVAL);
    EXPECT_EQ(split(), EEXIST);
  }
  vm = test.system().create_vm();
  vm->create_irqchip();
  auto vcpu = vm->create_vcpu(0);
  EXPECT_EQ(refusal([&] { vm->create_irqchip(); }), EEXIST);
  EXPECT_EQ(split(), EEXIST);
}

// --- CPUID

const kvm_cpuid_entry2* leaf(const std::vector<kvm_cpuid_entry2>& entries, uint32_t function,
                             uint32_t index = 0) {
  const auto found = std::ranges::find_if(
      entries, [&](const auto& entry) { return entry.function == function && entry.index == index; });
  return found == entries.end() ? nullptr : &*found;
}

GUEST_CODE(enable_xsave, 64,
           "mov %cr4, %rax; or $0x40000, %eax; mov %rax, %cr4; mov $1, %eax; cpuid; mov %ecx, %esi; mov "
           "$0xd, %eax; xor "
           "%ecx, %ecx; cpuid; out %al, $0xe0");
CONTRACT_TEST(Setup, CpuidIsReadAsTheGuestSeesIt) {
  constexpr uint32_t osxsave = 1u << 27;
  test.needs_cpuid(1, &kvm_cpuid_entry2::ecx, 26, "XSAVE");
  auto guest = test.guest();
  const auto before = guest->vcpu().cpuid2();
  ASSERT_NE(leaf(before, 1), nullptr);
  EXPECT_EQ(leaf(before, 1)->ecx & osxsave, 0u);
  const auto regs = guest->result(Mode::long64, enable_xsave);
  const auto after = guest->vcpu().cpuid2();
  EXPECT_NE(regs.rsi & osxsave, 0u);
  EXPECT_EQ(leaf(after, 1)->ecx, regs.rsi) << "CR4.OSXSAVE";
  EXPECT_EQ(leaf(after, 0xd)->ebx, regs.rbx) << "the area for what XCR0 enables";
}

CONTRACT_TEST(Setup, CpuidIsFixedOnceTheVcpuHasRun) {
  auto guest = test.guest();
  guest->result(Mode::long64, enable_xsave);
  auto cpuid = guest->vcpu().cpuid2();
  EXPECT_EQ(refusal([&] { guest->vcpu().set_cpuid2(cpuid); }), 0) << "the same again";
  const auto seven =
      std::ranges::find_if(cpuid, [](auto& entry) { return entry.function == 7 && entry.index == 0; });
  ASSERT_NE(seven, cpuid.end());
  seven->ebx ^= 1;
  if (refusal([&] { guest->vcpu().set_cpuid2(cpuid); }) != EINVAL)
    test.deviates("CPUID changes under a guest");
}

// --- control registers and MSRs

CONTRACT_TEST(Setup, BeforeCpuidIsGivenCr4TakesAllThatTheProcessorHas) {
  auto vm = test.system().create_vm();
  auto vcpu = vm->create_vcpu(0);
  auto sregs = vcpu->sregs();
  constexpr uint64_t classic = 0x7ff;  // VME to OSXMMEXCPT
  sregs.cr4 |= classic;
  if (refusal([&] { vcpu->set_sregs(sregs); }) != 0) test.deviates("CR4 is refused");
  EXPECT_EQ(vcpu->sregs().cr4, sregs.cr4);
  const auto kept = vcpu->sregs();
  sregs.cr4 |= uint64_t{1} << 31;
  EXPECT_EQ(refusal([&] { vcpu->set_sregs(sregs); }), EINVAL);
  EXPECT_EQ(vcpu->sregs().cr4, kept.cr4) << "and nothing has changed";
}

CONTRACT_TEST(Setup, TheLapicsBaseHasReservedBitsWhoeverHasTheLapic) {
  for (const Irqchip irqchip : {Irqchip::none, Irqchip::full}) {
    auto guest = test.guest({.irqchip = irqchip});
    auto& vcpu = guest->vcpu();
    const auto kept = vcpu.sregs();
    // All, one of the low, one beyond every processor's addresses; x2APIC mode of a LAPIC that is off.
    const uint64_t was = kept.apic_base;
    for (const uint64_t base : std::initializer_list<uint64_t>{~uint64_t{0}, was | 1, was | uint64_t{1} << 52,
                                                               (was & ~uint64_t{0x800}) | 0x400}) {
      auto sregs = kept;
      sregs.apic_base = base;
      EXPECT_EQ(refusal([&] { vcpu.set_sregs(sregs); }), EINVAL) << std::hex << base;
      const kvm_msr_entry entry{.index = 0x1b, .reserved = 0, .data = base};
      EXPECT_EQ(vcpu.set_msrs({&entry, 1}), 0u) << std::hex << base;
      EXPECT_EQ(vcpu.sregs().apic_base, kept.apic_base);
    }
    auto sregs = kept;
    sregs.apic_base &= ~uint64_t{0x800};
    EXPECT_EQ(refusal([&] { vcpu.set_sregs(sregs); }), 0) << "off";
    EXPECT_EQ(vcpu.sregs().apic_base, sregs.apic_base);
  }
}

CONTRACT_TEST(Setup, HwcrKeepsTwoBitsAndTakesThreeMore) {
  constexpr uint32_t hwcr = 0xc001'0015;
  auto guest = test.guest();
  const auto write = [&](uint64_t value) {
    const kvm_msr_entry entry{.index = hwcr, .reserved = 0, .data = value};
    return guest->vcpu().set_msrs({&entry, 1}) == 1;
  };
  const auto read = [&] {
    kvm_msr_entry entry{.index = hwcr, .reserved = 0, .data = 0};
    EXPECT_EQ(guest->vcpu().msrs({&entry, 1}), 1u);
    return entry.data;
  };
  EXPECT_EQ(read(), 0u);
  if (!write(uint64_t{1} << 24)) {  // not before Linux 6.8
    if (test.soft()) ADD_FAILURE() << "TscFreqSel is refused";
    throw Unable("HWCR takes no TscFreqSel");
  }
  constexpr uint64_t kept = 1u << 18 | 1u << 24, taken = kept | 1u << 3 | 1u << 6 | 1u << 8;
  for (unsigned bit = 0; bit < 64; ++bit) {
    ASSERT_TRUE(write(0));
    const uint64_t value = uint64_t{1} << bit;
    EXPECT_EQ(write(value), (value & taken) != 0) << bit;
    EXPECT_EQ(read(), value & kept) << bit;
  }
}

GUEST_CODE(write_bank_status, 64,
           "mov $0x401, %ecx; mov $5, %eax; xor %edx, %edx; wrmsr; rdmsr; out %al, $0xe0");
CONTRACT_TEST(Setup, HwcrLetsAmdsGuestsWriteWhatABankSays) {
  test.needs_capability(KVM_CAP_MCE, "KVM_CAP_MCE");
  for (const bool allowed : {false, true}) {
    auto guest = test.guest();
    auto cpuid = guest->vcpu().cpuid2();
    for (auto& entry : cpuid)
      if (entry.function == 0) entry.ebx = 0x6874'7541, entry.edx = 0x6974'6e65, entry.ecx = 0x444d'4163;
    guest->vcpu().set_cpuid2(cpuid);
    guest->vcpu().setup_mce(uint64_t{1} << 8 | 4);
    const kvm_msr_entry entry{.index = 0xc001'0015, .reserved = 0, .data = allowed ? 1u << 18 : 0};
    ASSERT_EQ(guest->vcpu().set_msrs({&entry, 1}), 1u);
    if (allowed)
      EXPECT_EQ(guest->result(Mode::long64, write_bank_status).rax, 5u);
    else
      EXPECT_EQ(guest->fault(Mode::long64, write_bank_status).vector, 13u);
  }
}

// --- exits that the VMM does without

GUEST_CODE(halt, 64, "sti; hlt; out %al, $0xe0");
// Linux refuses since 6.14 once there is a vCPU; before, and on soft, it is never too late.
void keep_halts_in(Contract& test, Guest& guest) {
  if ((guest.vm().check_extension(KVM_CAP_X86_DISABLE_EXITS) & KVM_X86_DISABLE_EXITS_HLT) == 0)
    throw Unable("no KVM_X86_DISABLE_EXITS_HLT");
  const int refused = refusal(
      [&] { guest.vm().enable_cap(capability(KVM_CAP_X86_DISABLE_EXITS, KVM_X86_DISABLE_EXITS_HLT)); });
  if (refused != 0 && !test.soft()) throw Unable("too late for KVM_CAP_X86_DISABLE_EXITS");
  ASSERT_EQ(refused, 0);
}

CONTRACT_TEST(Setup, AHaltThatStaysInTheGuestEndsByAnInterrupt) {
  auto guest = test.guest();
  EXPECT_EQ(refusal([&] { guest->vm().enable_cap(capability(KVM_CAP_X86_DISABLE_EXITS, 1u << 30)); }),
            EINVAL);
  keep_halts_in(test, *guest);
  guest->load(halt);
  guest->enter(Mode::long64);
  const std::jthread kicker([&](const std::stop_token& stop) {
    while (!stop.stop_requested()) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      guest->vcpu().kick();
    }
  });
  const auto halted = guest->vcpu().run();
  if (halted.status() != -EINTR) test.deviates("the halt is told: " + guest->describe(halted));
  ASSERT_EQ(guest->vcpu().interrupt(0x50), 0);
  for (int i = 0; i < 1000; ++i) {
    const auto exit = guest->vcpu().run();
    if (exit.status() == -EINTR) continue;
    ASSERT_TRUE(Guest::is_out(exit, trap_port)) << guest->describe(exit);
    EXPECT_EQ((guest->vcpu().regs().rip - stubs_gpa) / 16, 0x50u);
    return;
  }
  ADD_FAILURE() << "the interrupt does not come";
}

CONTRACT_TEST(Setup, WhereHaltsStayInTheGuestNobodyIsWokenByAHypercall) {
  auto guest = test.guest({.irqchip = Irqchip::full});
  constexpr uint32_t unhalt = 1u << KVM_FEATURE_PV_UNHALT;
  auto cpuid = guest->vcpu().cpuid2();
  ASSERT_NE(leaf(cpuid, KVM_CPUID_FEATURES), nullptr);
  ASSERT_NE(leaf(cpuid, KVM_CPUID_FEATURES)->eax & unhalt, 0u);
  keep_halts_in(test, *guest);
  guest->vcpu().set_cpuid2(cpuid);
  EXPECT_EQ(leaf(guest->vcpu().cpuid2(), KVM_CPUID_FEATURES)->eax & unhalt, 0u);
}

}  // namespace
}  // namespace lodge::contract
