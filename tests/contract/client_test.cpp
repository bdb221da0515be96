// What clients of /dev/kvm rely on beside the guest itself: the shared structure's file, its registers, the
// task priority of a LAPIC of their own, machine checks, which vCPU boots.
#include <sys/mman.h>

#include <cstring>

#include "base/mapping.hpp"
#include "harness.hpp"

namespace lodge::contract {
namespace {

CONTRACT_SUITE(Client);

CONTRACT_TEST(Client, AnotherMappingOfTheSharedStructureIsTheSame) {
  auto guest = test.guest();
  kvm::Vcpu& vcpu = guest->vcpu();
  const Mapping again(test.system().shared_size(), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu.shared_fd(), 0,
                      "map");
  auto* run = reinterpret_cast<kvm_run*>(again.data());
  ASSERT_NE(run, &vcpu.shared());
  run->cr8 = 7;
  EXPECT_EQ(vcpu.shared().cr8, 7u);
  EXPECT_GE(test.system().shared_size(), sizeof(kvm_run));
}

GUEST_CODE(add_and_tell, 64, "add $1, %rax; out %al, $0x90; add $1, %rax; out %al, $0xe0");
CONTRACT_TEST(Client, RegistersComeAndGoInTheSharedStructure) {
  test.needs_capability(KVM_CAP_SYNC_REGS, "KVM_CAP_SYNC_REGS");
  auto guest = test.guest();
  guest->load(add_and_tell);
  guest->enter(Mode::long64);
  kvm_run& run = guest->vcpu().shared();
  run.kvm_valid_regs = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS;
  run.s.regs.regs = guest->vcpu().regs();
  run.s.regs.regs.rax = 40;
  run.kvm_dirty_regs = KVM_SYNC_X86_REGS;
  const auto exit = guest->run();
  ASSERT_TRUE(Guest::is_out(exit, 0x90)) << guest->describe(exit);
  EXPECT_EQ(run.kvm_dirty_regs, 0u);
  EXPECT_EQ(run.s.regs.regs.rax, 41u);
  EXPECT_EQ(run.s.regs.sregs.cs.selector, code64);
  guest->finish();
  EXPECT_EQ(run.s.regs.regs.rax, 42u);
}

CONTRACT_TEST(Client, UnknownSharedRegistersAreRefused) {
  test.needs_capability(KVM_CAP_SYNC_REGS, "KVM_CAP_SYNC_REGS");
  auto guest = test.guest();
  guest->enter(Mode::long64);
  guest->vcpu().shared().kvm_valid_regs = uint64_t{1} << 40;
  EXPECT_EQ(guest->vcpu().run().status(), -EINVAL);
  guest->vcpu().shared().kvm_valid_regs = 0;
  guest->vcpu().shared().kvm_dirty_regs = uint64_t{1} << 40;
  EXPECT_EQ(guest->vcpu().run().status(), -EINVAL);
}

GUEST_CODE(read_priority, 64, "mov %cr8, %rbx; out %al, $0xe0");
CONTRACT_TEST(Client, WithoutALapicTheTaskPriorityIsTheVmms) {
  auto guest = test.guest();
  guest->load(read_priority);
  guest->enter(Mode::long64);
  guest->vcpu().shared().cr8 = 6;
  guest->finish();
  EXPECT_EQ(guest->vcpu().regs().rbx, 6u);
}

CONTRACT_TEST(Client, WithoutALapicItsBaseIsKept) {
  auto guest = test.guest();
  guest->load(read_priority);
  guest->enter(Mode::long64);
  auto sregs = guest->vcpu().sregs();
  sregs.apic_base = 0xfee00900;
  guest->vcpu().set_sregs(sregs);
  guest->finish();
  EXPECT_EQ(guest->vcpu().shared().apic_base, 0xfee00900u);
  EXPECT_EQ(guest->vcpu().sregs().apic_base, 0xfee00900u);
}

constexpr uint32_t mcg_cap = 0x179, mcg_ctl = 0x17b, mc3_status = 0x400 + 4 * 3 + 1;
uint64_t read_msr(kvm::Vcpu& vcpu, uint32_t index) {
  kvm_msr_entry entry{.index = index, .reserved = 0, .data = 0};
  EXPECT_EQ(vcpu.msrs({&entry, 1}), 1u) << std::hex << index;
  return entry.data;
}

CONTRACT_TEST(Client, MachineCheckBanksAreTheVmmsToSetUp) {
  test.needs_capability(KVM_CAP_MCE, "KVM_CAP_MCE");
  auto guest = test.guest();
  kvm::Vcpu& vcpu = guest->vcpu();
  const uint64_t ctl_p = uint64_t{1} << 8;
  ASSERT_NE(test.system().mce_capabilities() & ctl_p, 0u);
  EXPECT_EQ(refusal([&] { vcpu.setup_mce(ctl_p); }), EINVAL);        // no bank
  EXPECT_EQ(refusal([&] { vcpu.setup_mce(ctl_p | 255); }), EINVAL);  // too many
  vcpu.setup_mce(ctl_p | 10);
  EXPECT_EQ(read_msr(vcpu, mcg_cap), ctl_p | 10);
  EXPECT_EQ(read_msr(vcpu, mcg_ctl), ~uint64_t{0});
  kvm_msr_entry beyond{.index = 0x400 + 4 * 32, .reserved = 0, .data = 0};
  EXPECT_EQ(vcpu.msrs({&beyond, 1}), 0u);
}

GUEST_CODE(spin, 64, "1: jmp 1b");
CONTRACT_TEST(Client, AnUncorrectedErrorIsAMachineCheck) {
  test.needs_capability(KVM_CAP_MCE, "KVM_CAP_MCE");
  auto guest = test.guest();
  guest->load(spin);
  guest->enter(Mode::long64);
  kvm::Vcpu& vcpu = guest->vcpu();
  vcpu.setup_mce(uint64_t{1} << 8 | 10);
  auto sregs = vcpu.sregs();
  sregs.cr4 |= 0x40;  // MCE
  vcpu.set_sregs(sregs);
  kvm_x86_mce event{};
  event.bank = 3;
  event.status = uint64_t{1} << 63 | uint64_t{1} << 61 | 0x134;  // VAL, UC
  event.mcg_status = 5;                                          // RIPV, MCIP
  event.addr = 0x1234000;
  vcpu.set_mce(event);
  EXPECT_EQ(read_msr(vcpu, mc3_status), event.status);
  EXPECT_EQ(guest->trap().vector, 18u);
  event.bank = 12;
  EXPECT_EQ(refusal([&] { vcpu.set_mce(event); }), EINVAL);
}

CONTRACT_TEST(Client, AMachineCheckThatCannotBeTakenShutsDown) {
  if (!test.soft()) throw Unable("this /dev/kvm runs on");  // kvm_pvm, measured
  test.needs_capability(KVM_CAP_MCE, "KVM_CAP_MCE");
  auto guest = test.guest();
  guest->load(spin);
  guest->enter(Mode::long64);
  guest->vcpu().setup_mce(uint64_t{1} << 8 | 10);
  kvm_x86_mce event{};
  event.status = uint64_t{1} << 63 | uint64_t{1} << 61;
  guest->vcpu().set_mce(event);  // CR4.MCE is clear
  const auto exit = guest->run();
  EXPECT_EQ(exit.reason(), uint32_t{KVM_EXIT_SHUTDOWN}) << guest->describe(exit);
}

CONTRACT_TEST(Client, TheBootProcessorCanBeAnother) {
  test.needs_capability(KVM_CAP_SET_BOOT_CPU_ID, "KVM_CAP_SET_BOOT_CPU_ID");
  // One vCPU each, which is as many as the lockstep engine has.
  constexpr uint64_t bsp = 1 << 8;
  for (const unsigned id : {0u, 1u}) {
    auto vm = test.system().create_vm();
    vm->set_boot_cpu_id(1);
    vm->create_irqchip();
    const auto vcpu = vm->create_vcpu(id);
    EXPECT_EQ((vcpu->sregs().apic_base & bsp) != 0, id == 1);
    const uint32_t waits = KVM_MP_STATE_UNINITIALIZED;
    EXPECT_EQ(vcpu->mp_state().mp_state == waits, id != 1);
    EXPECT_EQ(refusal([&] { vm->set_boot_cpu_id(0); }), EBUSY);
  }
}

}  // namespace
}  // namespace lodge::contract
