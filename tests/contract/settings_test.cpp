// What a VMM settles by KVM_ENABLE_CAP and its like: MSR exits and filters, quirks, the LAPIC's bus clock;
// and what it may ask for: the TSC's offset, memory made present, counters.
#include <sys/mman.h>
#include <unistd.h>
#include <x86intrin.h>

#include <chrono>
#include <cstring>

#include "harness.hpp"
#include "kvm/list.hpp"

namespace lodge::contract {
namespace {

CONTRACT_SUITE(Settings);

constexpr uint32_t lstar = 0xc0000082, sfmask = 0xc0000084, nowhere = 0x474f4f00;
constexpr uint32_t platform_info = 0xce, misc_features = 0x140;

void enable(kvm::Vm& vm, uint32_t capability, uint64_t argument) {
  kvm_enable_cap cap{};
  cap.cap = capability;
  cap.args[0] = argument;
  vm.enable_cap(cap);
}

// Denies one MSR and allows all others.
kvm_msr_filter deny(uint32_t index, uint32_t directions) {
  static uint8_t none = 0;
  kvm_msr_filter filter{};
  filter.ranges[0] = {.flags = directions, .nmsrs = 1, .base = index, .bitmap = &none};
  return filter;
}

std::unique_ptr<Guest> guest_with_msr_exits(Contract& test, std::span<const uint8_t> code, uint64_t reasons) {
  test.needs_capability(KVM_CAP_X86_USER_SPACE_MSR, "KVM_CAP_X86_USER_SPACE_MSR");
  test.needs_capability(KVM_CAP_X86_MSR_FILTER, "KVM_CAP_X86_MSR_FILTER");
  auto guest = test.guest();
  guest->load(code);
  guest->enter(Mode::long64);
  enable(guest->vm(), KVM_CAP_X86_USER_SPACE_MSR, reasons);
  return guest;
}

GUEST_CODE(
    settings_msr, 64,
    "mov $0xc0000082, %ecx; rdmsr; mov %eax, %ebx; mov %edx, %esi; mov $0x12345678, %eax; mov $0x9abc, %edx;"
    "wrmsr; out %al, $0xe0");
CONTRACT_TEST(Settings, AFilteredMsrIsTheVmms) {
  auto guest = guest_with_msr_exits(test, settings_msr, KVM_MSR_EXIT_REASON_FILTER);
  guest->vm().set_msr_filter(deny(lstar, KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE));
  auto exit = guest->run();
  ASSERT_EQ(exit.reason(), KVM_EXIT_X86_RDMSR) << guest->describe(exit);
  EXPECT_EQ(exit.raw().msr.index, lstar);
  EXPECT_EQ(exit.raw().msr.reason, KVM_MSR_EXIT_REASON_FILTER);
  exit.raw().msr.data = 0x1122334455667788;
  exit = guest->run();
  ASSERT_EQ(exit.reason(), KVM_EXIT_X86_WRMSR) << guest->describe(exit);
  EXPECT_EQ(exit.raw().msr.index, lstar);
  EXPECT_EQ(exit.raw().msr.data, 0x9abc12345678u);
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rbx, 0x55667788u);
  EXPECT_EQ(guest->vcpu().regs().rsi, 0x11223344u);
  kvm_msr_entry entry{.index = lstar};
  ASSERT_EQ(guest->vcpu().msrs({&entry, 1}), 1u);
  EXPECT_EQ(entry.data, 0u) << "a write that the VMM has answered does not reach the register";
}

CONTRACT_TEST(Settings, AnAccessThatTheVmmRefusesIsAGeneralProtection) {
  for (const bool write : {false, true}) {
    auto guest = guest_with_msr_exits(test, settings_msr, KVM_MSR_EXIT_REASON_FILTER);
    guest->vm().set_msr_filter(deny(lstar, write ? KVM_MSR_FILTER_WRITE : KVM_MSR_FILTER_READ));
    const auto exit = guest->run();
    ASSERT_EQ(exit.reason(), write ? KVM_EXIT_X86_WRMSR : KVM_EXIT_X86_RDMSR) << guest->describe(exit);
    exit.raw().msr.error = 1;
    const Trap trap = guest->trap();
    EXPECT_EQ(trap.vector, 13u);
    EXPECT_EQ(trap.rip, code_gpa + (write ? 21 : 5));
  }
}

CONTRACT_TEST(Settings, AFilterWithoutExitsIsAGeneralProtection) {
  auto guest = guest_with_msr_exits(test, settings_msr, 0);
  guest->vm().set_msr_filter(deny(lstar, KVM_MSR_FILTER_READ));
  EXPECT_EQ(guest->trap().vector, 13u);
}

GUEST_CODE(settings_unknown, 64,
           "mov $0x474f4f00, %ecx; rdmsr; mov %eax, %ebx; mov $0xc0000082, %ecx; xor %eax, %eax; mov "
           "$0x800000, %edx;"
           "wrmsr; out %al, $0xe0");
CONTRACT_TEST(Settings, AnUnknownMsrAndARefusedValueHaveReasonsOfTheirOwn) {
  auto guest =
      guest_with_msr_exits(test, settings_unknown, KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_INVAL);
  auto exit = guest->run();
  ASSERT_EQ(exit.reason(), KVM_EXIT_X86_RDMSR) << guest->describe(exit);
  EXPECT_EQ(exit.raw().msr.index, nowhere);
  EXPECT_EQ(exit.raw().msr.reason, KVM_MSR_EXIT_REASON_UNKNOWN);
  exit.raw().msr.data = 77;
  exit = guest->run();  // LSTAR takes canonical addresses
  ASSERT_EQ(exit.reason(), KVM_EXIT_X86_WRMSR) << guest->describe(exit);
  EXPECT_EQ(exit.raw().msr.reason, KVM_MSR_EXIT_REASON_INVAL);
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rbx, 77u);
}

CONTRACT_TEST(Settings, AnAnsweredMsrIsCompleteBeforeTheStateIsTaken) {
  auto guest = guest_with_msr_exits(test, settings_unknown, KVM_MSR_EXIT_REASON_UNKNOWN);
  const auto exit = guest->run();
  ASSERT_EQ(exit.reason(), KVM_EXIT_X86_RDMSR) << guest->describe(exit);
  exit.raw().msr.data = 0x5500000066;
  guest->vcpu().shared().immediate_exit = 1;
  EXPECT_EQ(guest->vcpu().run().status(), -EINTR);
  guest->vcpu().shared().immediate_exit = 0;
  EXPECT_EQ(guest->vcpu().regs().rax, 0x66u);
  EXPECT_EQ(guest->vcpu().regs().rdx, 0x55u);
  EXPECT_EQ(guest->vcpu().regs().rip, code_gpa + 7);
}

CONTRACT_TEST(Settings, BadFiltersAndReasonsAreRefused) {
  auto guest = guest_with_msr_exits(test, settings_msr, 0);
  EXPECT_EQ(refusal([&] { enable(guest->vm(), KVM_CAP_X86_USER_SPACE_MSR, 1u << 20); }), EINVAL);
  auto filter = deny(lstar, 1u << 7);
  EXPECT_EQ(refusal([&] { guest->vm().set_msr_filter(filter); }), EINVAL) << "a direction";
  filter = deny(lstar, KVM_MSR_FILTER_READ);
  filter.ranges[0].nmsrs = KVM_MSR_FILTER_MAX_BITMAP_SIZE * 8 + 1;
  EXPECT_EQ(refusal([&] { guest->vm().set_msr_filter(filter); }), EINVAL) << "a bitmap";
  filter = {};
  filter.flags = KVM_MSR_FILTER_DEFAULT_DENY;
  EXPECT_EQ(refusal([&] { guest->vm().set_msr_filter(filter); }), EINVAL) << "nothing allowed";
}

GUEST_CODE(settings_platform, 64, "mov $0xce, %ecx; rdmsr; mov %eax, %ebx; out %al, $0xe0");
CONTRACT_TEST(Settings, PlatformInfoIsWhatTheVmmSaysOrHidden) {
  test.needs_capability(KVM_CAP_MSR_PLATFORM_INFO, "KVM_CAP_MSR_PLATFORM_INFO");
  auto guest = test.guest();
  guest->load(settings_platform);
  guest->enter(Mode::long64);
  const kvm_msr_entry entry{.index = platform_info, .data = 0x8000ff00};
  ASSERT_EQ(guest->vcpu().set_msrs({&entry, 1}), 1u);
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rbx, 0x8000ff00u);
  enable(guest->vm(), KVM_CAP_MSR_PLATFORM_INFO, 0);
  guest->enter(Mode::long64);
  EXPECT_EQ(guest->trap().vector, 13u);
}

GUEST_CODE(settings_cpuid, 64, "xor %eax, %eax; cpuid; int3");
CONTRACT_TEST(Settings, CpuidFaultsOutsideOfRing0WhenTheGuestWantsItTo) {
  if (!test.soft()) throw Unable("CPUID faulting is not asked of this accelerator");
  for (const bool faults : {false, true}) {
    auto guest = test.guest();
    guest->load(settings_cpuid);
    guest->set_gate(3, code64, stubs_gpa + 3 * 16, 0xee);
    guest->enter(Mode::long64);
    const kvm_msr_entry entry{.index = misc_features, .data = faults ? 1u : 0u};
    ASSERT_EQ(guest->vcpu().set_msrs({&entry, 1}), 1u);
    guest->to_user();
    const Trap trap = guest->trap();
    EXPECT_EQ(trap.rip, code_gpa + (faults ? 2 : trap.vector == 3 ? 5 : 4));
    if (faults) {
      EXPECT_EQ(trap.vector, 13u);
    }
  }
}

// The hypercall of the other vendor: number 1 (KVM_HC_VAPIC_POLL_IRQ) answers 0.
GUEST_CODE(settings_vmcall, 64, "mov $1, %eax; vmcall; out %al, $0xe0");
GUEST_CODE(settings_vmmcall, 64, "mov $1, %eax; vmmcall; out %al, $0xe0");
bool amd_like(kvm::Vcpu& vcpu) {
  for (const auto& entry : vcpu.cpuid2())
    if (entry.function == 0) return entry.ebx == 0x68747541 || entry.ebx == 0x6f677948;
  return false;
}
CONTRACT_TEST(Settings, AForeignHypercallIsReplacedUnlessTheQuirkIsOff) {
  if (!test.soft() && (test.system().check_extension(KVM_CAP_DISABLE_QUIRKS2) & 1 << 5) == 0)
    throw Unable("no quirk of hypercalls");
  if (!test.soft()) throw Unable("which instruction is foreign is the host's affair");
  for (const bool quirk : {true, false}) {
    auto guest = test.guest();
    const bool amd = amd_like(guest->vcpu());
    const auto& foreign = amd ? settings_vmcall : settings_vmmcall;
    const auto& native = amd ? settings_vmmcall : settings_vmcall;
    guest->load(foreign);
    guest->enter(Mode::long64);
    if (!quirk) enable(guest->vm(), KVM_CAP_DISABLE_QUIRKS2, 1u << 5);
    if (quirk)
      guest->finish();
    else
      EXPECT_EQ(guest->trap().vector, 6u);
    EXPECT_EQ(guest->vcpu().regs().rax, quirk ? 0u : 1u);
    EXPECT_EQ(std::memcmp(guest->memory(code_gpa), quirk ? native.data() : foreign.data(), 8), 0);
  }
}

CONTRACT_TEST(Settings, TheBusClockIsSetBeforeTheFirstVcpu) {
  test.needs_capability(kvm::cap_apic_bus_cycles_ns, "KVM_CAP_X86_APIC_BUS_CYCLES_NS");
  constexpr uint64_t period = 1000;
  auto vm = test.system().create_vm();
  EXPECT_EQ(refusal([&] { enable(*vm, kvm::cap_apic_bus_cycles_ns, period); }), ENXIO) << "no LAPICs";
  vm->create_irqchip();
  EXPECT_EQ(refusal([&] { enable(*vm, kvm::cap_apic_bus_cycles_ns, 0); }), EINVAL);
  enable(*vm, kvm::cap_apic_bus_cycles_ns, period);
  auto vcpu = vm->create_vcpu(0);
  EXPECT_EQ(refusal([&] { enable(*vm, kvm::cap_apic_bus_cycles_ns, period); }), EINVAL) << "after a vCPU";

  using Clock = std::chrono::steady_clock;
  auto state = vcpu->lapic();
  const auto reg = [&](unsigned offset) -> uint32_t& {
    return *reinterpret_cast<uint32_t*>(state.regs + offset);
  };
  reg(0xf0) = 0x1ff;     // SVR: on
  reg(0x320) = 0x10020;  // LVT timer: one-shot, masked
  reg(0x3e0) = 0xb;      // divide by 1
  reg(0x380) = reg(0x390) = 1u << 30;
  const auto before = Clock::now();
  vcpu->set_lapic(state);
  const auto set = Clock::now();
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  const auto slept = Clock::now();
  state = vcpu->lapic();
  const auto after = Clock::now();
  const auto counts = [](auto time) {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count() / 1000;
  };
  const int64_t counted = (1 << 30) - static_cast<int64_t>(reg(0x390));
  EXPECT_GE(counted, counts(slept - set) - 2);
  EXPECT_LE(counted, counts(after - before) + 2);
}

GUEST_CODE(settings_tsc, 64, "rdtsc; shl $32, %rdx; or %rdx, %rax; mov %rax, %rbx; out %al, $0xe0");
CONTRACT_TEST(Settings, TheTscHasTheOffsetThatTheVmmGives) {
  test.needs_capability(KVM_CAP_VCPU_ATTRIBUTES, "KVM_CAP_VCPU_ATTRIBUTES");
  for (const uint64_t offset : {uint64_t{0}, uint64_t{1} << 40, -(uint64_t{1} << 38)}) {
    auto guest = test.guest();
    guest->load(settings_tsc);
    guest->enter(Mode::long64);
    guest->vcpu().set_tsc_offset(offset);
    if (guest->vcpu().tsc_offset() != offset) test.deviates("the TSC's offset is not kept");
    const uint64_t before = __rdtsc();
    guest->finish();
    const uint64_t after = __rdtsc();
    const uint64_t seen = guest->vcpu().regs().rbx - offset;
    EXPECT_GE(seen, before);
    EXPECT_LE(seen, after);
  }
}

CONTRACT_TEST(Settings, MemoryIsMadePresentAsFarAsThereIsAny) {
  test.needs_capability(kvm::cap_pre_fault_memory, "KVM_CAP_PRE_FAULT_MEMORY");
  auto guest = test.guest({.ram = 4 << 20});
  uint64_t gpa = 0x200000;
  uint64_t size = 0x100000;
  ASSERT_EQ(guest->vcpu().pre_fault_memory(gpa, size), 0);
  EXPECT_EQ(size, 0u);
  EXPECT_EQ(gpa, 0x300000u);
  std::vector<unsigned char> present(0x100);
  ASSERT_EQ(::mincore(guest->memory(0x200000), 0x100000, present.data()), 0);
  for (const unsigned char page : present) EXPECT_EQ(page & 1, 1);
  gpa = (4 << 20) - 0x1000;
  size = 0x3000;
  EXPECT_EQ(guest->vcpu().pre_fault_memory(gpa, size), 0) << "a part was done";
  EXPECT_EQ(size, 0x2000u);
  EXPECT_EQ(guest->vcpu().pre_fault_memory(gpa, size), -ENOENT);
  gpa = 0x200001;
  EXPECT_EQ(guest->vcpu().pre_fault_memory(gpa, size), -EINVAL);
}

// One counter of a statistics file, by its name.
uint64_t counter(int fd, const char* name) {
  kvm_stats_header header{};
  EXPECT_EQ(::pread(fd, &header, sizeof header, 0), static_cast<ssize_t>(sizeof header));
  for (uint32_t i = 0; i < header.num_desc; ++i) {
    std::vector<char> text(16 + header.name_size);
    const auto at = static_cast<off_t>(header.desc_offset + i * text.size());
    EXPECT_EQ(::pread(fd, text.data(), text.size(), at), static_cast<ssize_t>(text.size()));
    if (std::strcmp(text.data() + 16, name) != 0) continue;
    uint32_t offset = 0;
    std::memcpy(&offset, text.data() + 8, sizeof offset);
    uint64_t value = 0;
    EXPECT_EQ(::pread(fd, &value, sizeof value, header.data_offset + offset),
              static_cast<ssize_t>(sizeof value));
    return value;
  }
  ADD_FAILURE() << "no counter " << name;
  return 0;
}

GUEST_CODE(settings_exits, 64, "out %al, $0x10; out %al, $0x10; out %al, $0xe0");
CONTRACT_TEST(Settings, CountersAreReadFromAFileThatOutlivesTheVm) {
  test.needs_capability(KVM_CAP_BINARY_STATS_FD, "KVM_CAP_BINARY_STATS_FD");
  auto guest = test.guest();
  guest->load(settings_exits);
  guest->enter(Mode::long64);
  guest->run();
  const Fd fd = guest->vcpu().statistics_fd();
  const uint64_t before = counter(fd.get(), "exits");
  guest->run();
  guest->finish();
  EXPECT_GE(counter(fd.get(), "exits"), before + 2);
  char id[4] = {};
  EXPECT_EQ(::pread(fd.get(), id, 3, sizeof(kvm_stats_header)), 3);
  EXPECT_STREQ(id, "kvm");
  const Fd vm_fd = guest->vm().statistics_fd();
  guest.reset();
  EXPECT_GE(counter(fd.get(), "exits"), before + 2);
  counter(vm_fd.get(), "remote_tlb_flush");
}

CONTRACT_TEST(Settings, TheClockGoesOnByTheTimeThatHasPassed) {
  if ((test.system().check_extension(KVM_CAP_ADJUST_CLOCK) & KVM_CLOCK_REALTIME) == 0)
    throw Unable("no KVM_CLOCK_REALTIME");
  auto guest = test.guest();
  constexpr uint64_t hour = 3'600'000'000'000;
  kvm_clock_data data = guest->vm().clock();
  constexpr uint32_t wanted = KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC;
  // The kernel gives them while its own clock follows the TSC.
  if (!test.soft() && (data.flags & wanted) == 0) throw Unable("KVM's clock does not follow the TSC");
  ASSERT_EQ(data.flags & wanted, wanted);
  EXPECT_LE(data.host_tsc, __rdtsc());
  data.flags = KVM_CLOCK_REALTIME;
  data.realtime -= hour;
  guest->vm().set_clock(data);
  EXPECT_GE(guest->vm().clock().clock, data.clock + hour);
  data.realtime += 2 * hour;  // of the future: the clock does not go back
  guest->vm().set_clock(data);
  const uint64_t now = guest->vm().clock().clock;
  EXPECT_GE(now, data.clock);
  EXPECT_LT(now, data.clock + hour);
  data.flags = 1u << 20;
  EXPECT_EQ(refusal([&] { guest->vm().set_clock(data); }), EINVAL);
}

}  // namespace
}  // namespace lodge::contract
