// Time: TSC, its offset and frequency, the VM's clock and kvmclock.
#include <chrono>
#include <cstring>
#include <string_view>
#include <thread>

#include "harness.hpp"

namespace lodge::contract {
namespace {

CONTRACT_SUITE(Time);

GUEST_CODE(
    two_stamps, 64,
    "rdtsc; shl $32, %rdx; lea (%rdx,%rax), %rbx; mov $100, %ecx; 1: dec %ecx; jnz 1b; rdtsc; shl $32, %rdx;"
    "lea (%rdx,%rax), %rcx; out %al, $0xe0");
CONTRACT_TEST(Time, TheTscRises) {
  auto guest = test.guest();
  const auto regs = guest->result(Mode::long64, two_stamps);
  EXPECT_GT(regs.rcx, regs.rbx);
}

CONTRACT_TEST(Time, TheTscIsWhereTheVmmSetsIt) {
  auto guest = test.guest();
  guest->load(two_stamps);
  guest->enter(Mode::long64);
  kvm_msr_entry tsc{.index = 0x10};
  ASSERT_EQ(guest->vcpu().msrs({&tsc, 1}), 1u);
  const uint64_t value = tsc.data + (1ull << 50);  // days ahead of the host, whatever its uptime
  tsc.data = value;
  ASSERT_EQ(guest->vcpu().set_msrs({&tsc, 1}), 1u);
  guest->finish();
  if (guest->vcpu().regs().rbx < value)
    test.deviates("the guest's RDTSC shows the host's TSC, not the one that was set");
  EXPECT_LT(guest->vcpu().regs().rbx, value + 60ull * 6'000'000'000) << "less than a minute later";
}

GUEST_CODE(write_tsc, 64, "mov $0x10, %ecx; xor %eax, %eax; mov $0x5000, %edx; wrmsr; rdtsc; out %al, $0xe0");
CONTRACT_TEST(Time, TheGuestMaySetItsTsc) {
  auto guest = test.guest();
  const uint64_t high = guest->result(Mode::long64, write_tsc).rdx;
  if (high != 0x5000) test.deviates("the guest's RDTSC does not show the TSC that it wrote");
}

GUEST_CODE(adjust_tsc, 64,
           "rdtsc; mov %edx, %ebx; mov $0x3b, %ecx; xor %eax, %eax; mov $0x100, %edx; wrmsr; rdtsc; sub "
           "%ebx, %edx; out %al, $0xe0");
CONTRACT_TEST(Time, TscAdjustMovesTheTsc) {
  test.needs_cpuid(7, &kvm_cpuid_entry2::ebx, 1, "TSC_ADJUST");
  auto guest = test.guest();
  const auto regs = guest->result(Mode::long64, adjust_tsc);
  if (regs.rdx < 0x100) test.deviates("the guest's RDTSC does not follow TSC_ADJUST");
  EXPECT_LE(regs.rdx, 0x101u);
}

CONTRACT_TEST(Time, TheTscsFrequencyIsItsMeasuredOne) {
  auto guest = test.guest();
  const double khz = guest->vcpu().tsc_khz();
  ASSERT_GT(khz, 0);
  const auto stamp = [&] {
    kvm_msr_entry tsc{.index = 0x10};
    guest->vcpu().msrs({&tsc, 1});
    return tsc.data;
  };
  // Each stamp lies between two readings of the clock, so that a busy host widens the bounds and breaks
  // nothing.
  using Clock = std::chrono::steady_clock;
  const auto outer_start = Clock::now();
  const uint64_t first = stamp();
  const auto inner_start = Clock::now();
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  const auto inner_end = Clock::now();
  const uint64_t last = stamp();
  const auto outer_end = Clock::now();
  const auto ticks = static_cast<double>(last - first);
  const auto milliseconds = [](auto time) { return std::chrono::duration<double, std::milli>(time).count(); };
  EXPECT_GE(ticks, khz * 0.98 * milliseconds(inner_end - inner_start));
  EXPECT_LE(ticks, khz * 1.02 * milliseconds(outer_end - outer_start));
}

// A TSC of one vCPU, of the other, of the first again: in order, if they are one and the same.
bool one_tsc(kvm::Vcpu& one, kvm::Vcpu& other) {
  const auto read = [](kvm::Vcpu& vcpu) {
    kvm_msr_entry tsc{.index = 0x10};
    EXPECT_EQ(vcpu.msrs({&tsc, 1}), 1u);
    return tsc.data;
  };
  for (unsigned i = 0; i < 10; ++i) {
    const uint64_t before = read(one), middle = read(other), after = read(one);
    if (middle < before || after < middle) return false;
  }
  return true;
}
bool one_tsc(Guest& guest) {
  return one_tsc(guest.vcpu(0), guest.vcpu(1));
}

CONTRACT_TEST(Time, VcpusHaveOneTsc) {
  auto guest = test.guest({.vcpus = 2});
  EXPECT_TRUE(one_tsc(*guest));
}

// As after a migration: what was one TSC is written vCPU by vCPU, and is one TSC again. QEMU tells each its
// frequency before.
CONTRACT_TEST(Time, TscsThatAreWrittenOneAfterTheOtherStayOne) {
  auto guest = test.guest({.vcpus = 2});
  for (const uint64_t start : {uint64_t{1} << 50, uint64_t{1} << 51}) {
    for (unsigned index = 0; index < 2; ++index) {
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
      if (test.soft()) guest->vcpu(index).set_tsc_khz(guest->vcpu(index).tsc_khz());
      const kvm_msr_entry tsc{.index = 0x10, .data = start + index};
      ASSERT_EQ(guest->vcpu(index).set_msrs({&tsc, 1}), 1u);
    }
    if (!one_tsc(*guest)) test.deviates("TSCs that are written one after the other differ");
    kvm_msr_entry tsc{.index = 0x10};
    guest->vcpu().msrs({&tsc, 1});
    if (tsc.data < start) test.deviates("a TSC is not where the VMM has set it");
  }
}

CONTRACT_TEST(Time, VcpusOfOneFrequencyHaveOneTsc) {
  test.needs_capability(KVM_CAP_TSC_CONTROL, "KVM_CAP_TSC_CONTROL");
  auto guest = test.guest({.vcpus = 2});
  const uint32_t khz = guest->vcpu().tsc_khz() / 2;
  for (unsigned index = 0; index < 2; ++index) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    guest->vcpu(index).set_tsc_khz(khz);
  }
  if (!one_tsc(*guest)) test.deviates("vCPUs that are given one frequency differ in their TSC");
  for (unsigned index = 0; index < 2; ++index) {
    guest->vcpu(index).set_tsc_khz(khz);
    const kvm_msr_entry tsc{.index = 0x10, .data = uint64_t{1} << 50};
    ASSERT_EQ(guest->vcpu(index).set_msrs({&tsc, 1}), 1u);
  }
  if (!one_tsc(*guest)) test.deviates("TSCs of one frequency that are written one after the other differ");
}

CONTRACT_TEST(Time, AFrequencyThatNoTscCanHaveIsRefused) {
  auto guest = test.guest();
  auto& vcpu = guest->vcpu();
  const uint32_t before = vcpu.tsc_khz();
  const bool control = test.system().check_extension(KVM_CAP_TSC_CONTROL) > 0;
  if (!test.soft() && control) throw Unable("how far this processor scales its TSC is its own affair");
  EXPECT_EQ(refusal([&] { vcpu.set_tsc_khz(1); }), EINVAL);
  if (!control) return;
  for (const uint32_t khz : {1u, 999u, uint32_t{INT32_MAX}, UINT32_MAX}) {
    EXPECT_EQ(refusal([&] { vcpu.set_tsc_khz(khz); }), EINVAL) << khz;
    EXPECT_EQ(refusal([&] { guest->vm().set_default_tsc_khz(khz); }), EINVAL) << khz;
  }
  EXPECT_EQ(vcpu.tsc_khz(), before);
  for (const uint32_t khz : {1'000u, uint32_t{INT32_MAX} - 1, before}) {
    vcpu.set_tsc_khz(khz);
    EXPECT_EQ(vcpu.tsc_khz(), khz);
  }
}

GUEST_CODE(disabled_tsc, 64, "rdtsc; out %al, $0xe0");
CONTRACT_TEST(Time, Cr4TsdForbidsTheTscToUserCode) {
  auto guest = test.guest();
  guest->load(disabled_tsc);
  guest->enter(Mode::long64);
  auto sregs = guest->vcpu().sregs();
  sregs.cr4 |= 4;
  guest->vcpu().set_sregs(sregs);
  guest->to_user();
  const Trap trap = guest->trap();
  if (trap.rip != code_gpa) test.deviates("RDTSC at CPL 3 runs although CR4.TSD is set");
  EXPECT_EQ(trap.vector, 13u);
}

CONTRACT_TEST(Time, TheClockRunsFromWhereItIsSet) {
  auto guest = test.guest();
  kvm_clock_data clock{};
  clock.clock = 1'000'000'000'000;
  guest->vm().set_clock(clock);
  const uint64_t now = guest->vm().clock().clock;
  EXPECT_GE(now, clock.clock);
  EXPECT_LT(now, clock.clock + 5'000'000'000);
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  EXPECT_GE(guest->vm().clock().clock, now + 5'000'000);
}

CONTRACT_TEST(Time, VcpusBeginWithTheVmsFrequency) {
  auto vm = test.system().create_vm();
  if (vm->check_extension(KVM_CAP_VM_TSC_CONTROL) <= 0) throw Unable("no KVM_CAP_VM_TSC_CONTROL");
  const uint32_t host = vm->default_tsc_khz(), chosen = 1'234'567;
  vm->set_default_tsc_khz(chosen);
  EXPECT_EQ(vm->default_tsc_khz(), chosen);
  auto vcpu = vm->create_vcpu(0);
  EXPECT_EQ(vcpu->tsc_khz(), chosen);
  kvm_msr_entry tsc{.index = 0x10};
  ASSERT_EQ(vcpu->msrs({&tsc, 1}), 1u);
  EXPECT_LT(tsc.data, uint64_t{chosen} * 1000 * 3600) << "it begins at 0";
  if (std::string_view(test.GetParam().name) != "lockstep") {  // of one vCPU
    auto second = vm->create_vcpu(1);
    EXPECT_EQ(second->tsc_khz(), chosen);
    if (!one_tsc(*vcpu, *second)) test.deviates("the second vCPU's TSC is another");
  }
  vm->set_default_tsc_khz(0);
  EXPECT_EQ(vm->default_tsc_khz(), host) << "0: the host's";
  EXPECT_EQ(vcpu->tsc_khz(), chosen) << "of those to come, not of those there are";
}

struct TimeInfo {  // pvclock_vcpu_time_info (kernel Documentation/virt/kvm/x86/msr.rst,
                   // MSR_KVM_SYSTEM_TIME_NEW)
  uint32_t version, pad0;
  uint64_t tsc_timestamp, system_time;
  uint32_t tsc_to_system_mul;
  int8_t tsc_shift;
  uint8_t flags, pad[2];
};

GUEST_CODE(kvmclock, 64,
           "mov $0x4b564d01, %ecx; mov $0x50001, %eax; xor %edx, %edx; wrmsr; nop; rdtsc; shl $32, %rdx; or "
           "%rdx, %rax; out %al, $0xe0");
CONTRACT_TEST(Time, KvmclockTellsTheVmsClock) {
  auto guest = test.guest();
  kvm_clock_data clock{};
  clock.clock = 5'000'000'000;
  guest->vm().set_clock(clock);
  guest->result(Mode::long64, kvmclock);
  const auto info = guest->at<TimeInfo>(0x50000);
  EXPECT_EQ(info.version % 2, 0u) << "no update under way";
  EXPECT_GT(info.version, 0u);
  EXPECT_NE(info.tsc_to_system_mul, 0u);
  // The guest's own reckoning, from its TSC.
  const uint64_t tsc = guest->vcpu().regs().rax;
  uint64_t delta = tsc - info.tsc_timestamp;
  delta = info.tsc_shift >= 0 ? delta << info.tsc_shift : delta >> -info.tsc_shift;
  // The product has up to 96 bits; 53 of them are enough here.
  const auto passed =
      static_cast<uint64_t>(static_cast<double>(delta) * info.tsc_to_system_mul / 4294967296.0);
  const uint64_t now = info.system_time + passed;
  EXPECT_GE(now, 5'000'000'000u);
  EXPECT_LT(now, 10'000'000'000u);
}

GUEST_CODE(kvmclock_of_another, 64,
           "mov $0x4b564d01, %ecx; mov $0x51001, %eax; xor %edx, %edx; wrmsr; out %al, $0xe0");
CONTRACT_TEST(Time, AClockThatIsSetIsInAllPagesBeforeAnyVcpuRuns) {
  if (!test.soft()) throw Unable("KVM writes each page when its vCPU runs next");
  auto guest = test.guest({.vcpus = 2});
  guest->load(kvmclock);
  guest->load(kvmclock_of_another, 0x9000);
  guest->enter(Mode::long64);
  guest->enter(Mode::long64, 1, 0x9000);
  guest->finish();
  guest->finish(1);
  kvm_clock_data clock{};
  clock.clock = 5'000'000'000'000;
  guest->vm().set_clock(clock);
  for (const uint64_t page : {0x50000, 0x51000}) {
    EXPECT_GE(guest->at<TimeInfo>(page).system_time, clock.clock);
    EXPECT_EQ(guest->at<TimeInfo>(page).version % 2, 0u);
  }
}

GUEST_CODE(wall_clock, 64,
           "mov $0x4b564d00, %ecx; mov $0x50100, %eax; xor %edx, %edx; wrmsr; nop; out %al, $0xe0");
CONTRACT_TEST(Time, TheWallClockOfTheBootIsTold) {
  auto guest = test.guest();
  guest->result(Mode::long64, wall_clock);
  const auto seconds = static_cast<int64_t>(guest->at<uint32_t>(0x50104));
  const auto now =
      std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch());
  // Wall time at which the VM's clock was 0, which a fresh VM's was just now.
  EXPECT_NEAR(static_cast<double>(seconds), static_cast<double>(now.count()), 5);
}

}  // namespace
}  // namespace lodge::contract
