// The machine-check architecture (SDM volume 3, chapter 15): registers that the VMM turns on and fills; the
// soft accelerator itself never reports an error.
#pragma once

#include <linux/kvm.h>

#include <array>
#include <cstdint>

namespace lodge::kvm::soft {

class Cpu;

struct MachineCheck {
  static constexpr unsigned max_banks = 32;  // KVM_CAP_MCE
  static constexpr uint64_t ctl_p = uint64_t{1} << 8, cmci_p = uint64_t{1} << 10, ser_p = uint64_t{1} << 24;
  static constexpr uint64_t supported = ctl_p | cmci_p | ser_p;  // KVM_X86_GET_MCE_CAP_SUPPORTED
  struct Bank {
    uint64_t ctl = 0, status = 0, address = 0, misc = 0;
    uint64_t ctl2 = 0;  // with cmci_p: whether an error of the bank interrupts
  };
  uint64_t cap = 0, status = 0, ctl = 0;  // IA32_MCG_*; without bits in `cap` there are no banks
  std::array<Bank, max_banks> banks{};

  unsigned count() const noexcept { return cap & 0xff; }
};

// IA32_MCG_CAP, _STATUS, _CTL and the banks' MSRs.
bool is_machine_check_msr(uint32_t index) noexcept;
bool is_machine_check_bank_status(uint32_t index) noexcept;  // one of IA32_MCi_STATUS
bool read_machine_check(const MachineCheck& mc, uint32_t index, uint64_t& value,
                        bool host_initiated) noexcept;
bool write_machine_check(MachineCheck& mc, uint32_t index, uint64_t value, bool host_initiated) noexcept;

// KVM_X86_SETUP_MCE: 0 or EINVAL.
int setup_machine_check(MachineCheck& mc, uint64_t cap) noexcept;

// What an error asks for beside what it leaves in its bank.
struct MachineCheckEffect {
  bool shutdown = false;   // an uncorrected error met a processor that cannot take it
  bool interrupt = false;  // the LAPIC's entry for corrected machine checks
};

// KVM_X86_SET_MCE: 0 or EINVAL.
int inject_machine_check(Cpu& cpu, const kvm_x86_mce& event, MachineCheckEffect& effect) noexcept;

}  // namespace lodge::kvm::soft
