// Machine checks that interrupt instead of raising an exception: corrected ones, and those that need no
// action (CMCI).
#include "harness.hpp"

namespace lodge::contract {
namespace {

CONTRACT_SUITE(MachineChecks);

constexpr uint64_t ctl_p = 1u << 8, cmci_p = 1u << 10;
constexpr uint64_t valid = uint64_t{1} << 63, uncorrected = uint64_t{1} << 61;
constexpr uint32_t bank = 7, ctl2 = 0x280 + bank, bank_status = 0x401 + 4 * bank,
                   bank_address = 0x402 + 4 * bank;
constexpr uint64_t cmci_enable = 1u << 30;
constexpr unsigned vector = 0xa9;

uint32_t& lapic_register(kvm_lapic_state& state, unsigned offset) {
  return *reinterpret_cast<uint32_t*>(state.regs + offset);
}

std::unique_ptr<Guest> guest_with_banks(Contract& test, uint64_t capabilities) {
  if ((test.system().mce_capabilities() & capabilities) != capabilities) throw Unable("no CMCI");
  auto guest = test.guest({.irqchip = Irqchip::full});
  guest->vcpu().setup_mce(capabilities | 10);
  return guest;
}

// An error in the bank, with the LAPIC's entry for it open; whether it interrupts.
bool interrupts(kvm::Vcpu& vcpu, uint64_t status, uint64_t address) {
  auto state = vcpu.lapic();
  lapic_register(state, 0xf0) = 0x1ff;
  lapic_register(state, 0x2f0) = vector;
  for (unsigned i = 0; i < 8; ++i) lapic_register(state, 0x200 + 16 * i) = 0;
  vcpu.set_lapic(state);
  kvm_x86_mce event{};
  event.status = valid | status;
  event.addr = address;
  event.bank = bank;
  vcpu.set_mce(event);
  state = vcpu.lapic();
  return (lapic_register(state, 0x200 + vector / 32 * 16) >> vector % 32 & 1) != 0;
}

uint64_t msr(kvm::Vcpu& vcpu, uint32_t index) {
  kvm_msr_entry entry{.index = index};
  EXPECT_EQ(vcpu.msrs({&entry, 1}), 1u);
  return entry.data;
}

CONTRACT_TEST(MachineChecks, AnErrorWithoutActionInterruptsIfItsBankIsToldTo) {
  auto guest = guest_with_banks(test, ctl_p | cmci_p);
  auto& vcpu = guest->vcpu();
  for (const uint64_t severity : {uint64_t{0}, uncorrected})
    for (const bool enabled : {true, false}) {
      const kvm_msr_entry entry{.index = ctl2, .data = enabled ? cmci_enable | 1 : 0};
      ASSERT_EQ(vcpu.set_msrs({&entry, 1}), 1u);
      EXPECT_EQ(msr(vcpu, ctl2), entry.data);
      EXPECT_EQ(interrupts(vcpu, severity, 0x1000 + enabled), enabled);
      EXPECT_EQ(msr(vcpu, bank_status) & (valid | uncorrected), valid | severity);
      EXPECT_EQ(msr(vcpu, bank_address), 0x1000u + enabled);
      const kvm_msr_entry clear{.index = bank_status, .data = 0};
      ASSERT_EQ(vcpu.set_msrs({&clear, 1}), 1u);
    }
  EXPECT_EQ(vcpu.vcpu_events().exception.injected, 0);
}

GUEST_CODE(
    cmci_registers, 64,
    "mov $0x287, %ecx; rdmsr; mov $0x40000001, %eax; wrmsr; mov $0x20000000, %eax; wrmsr; out %al, $0xe0");
CONTRACT_TEST(MachineChecks, TheGuestHasTheRegistersWithTheCapabilityOnly) {
  auto guest = guest_with_banks(test, ctl_p | cmci_p);
  guest->load(cmci_registers);
  guest->enter(Mode::long64);
  Trap trap = guest->trap();
  EXPECT_EQ(trap.vector, 13u);
  EXPECT_EQ(trap.rip, code_gpa + 0x13) << "a reserved bit";
  auto state = guest->vcpu().lapic();
  EXPECT_EQ(lapic_register(state, 0x30) >> 16 & 0xff, 6u);

  guest = guest_with_banks(test, ctl_p);
  guest->load(cmci_registers);
  guest->enter(Mode::long64);
  trap = guest->trap();
  EXPECT_EQ(trap.vector, 13u);
  EXPECT_EQ(trap.rip, code_gpa + 5);
  state = guest->vcpu().lapic();
  EXPECT_EQ(lapic_register(state, 0x30) >> 16 & 0xff, 5u);
}

CONTRACT_TEST(MachineChecks, TheLapicsEntryIsSavedAndLoaded) {
  auto guest = guest_with_banks(test, ctl_p | cmci_p);
  auto state = guest->vcpu().lapic();
  EXPECT_EQ(lapic_register(state, 0x2f0), 0x10000u) << "masked after the set-up";
  lapic_register(state, 0xf0) = 0x1ff;
  lapic_register(state, 0x2f0) = vector;
  guest->vcpu().set_lapic(state);
  state = guest->vcpu().lapic();
  EXPECT_EQ(lapic_register(state, 0x2f0), vector);
}

}  // namespace
}  // namespace lodge::contract
