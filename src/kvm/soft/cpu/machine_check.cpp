#include "kvm/soft/cpu/machine_check.hpp"

#include <cerrno>

#include "kvm/soft/cpu/cpu.hpp"

namespace lodge::kvm::soft {
namespace {

constexpr uint32_t mcg_cap = 0x179, mcg_status = 0x17a, mcg_ctl = 0x17b;
constexpr uint32_t first_bank = 0x400, end_of_banks = first_bank + 4 * MachineCheck::max_banks;
constexpr uint64_t all = ~uint64_t{0};
// IA32_MCi_STATUS
constexpr uint64_t valid = uint64_t{1} << 63, overflow = uint64_t{1} << 62, uncorrected = uint64_t{1} << 61;
constexpr uint64_t context_corrupt = uint64_t{1} << 57, signalled = uint64_t{1} << 56,
                   action_required = uint64_t{1} << 55;
constexpr uint64_t in_progress = 4;  // IA32_MCG_STATUS.MCIP
// IA32_MCi_CTL2: its enable bit and the threshold of corrected errors, which is not counted against.
constexpr uint32_t first_ctl2 = 0x280, end_of_ctl2 = first_ctl2 + MachineCheck::max_banks;
constexpr uint64_t cmci_enable = 1u << 30, cmci_threshold = 0x7fff;

enum Register : unsigned { ctl = 0, status = 1, address = 2, misc = 3 };

template <class Bank>
auto& part(Bank& bank, unsigned which) noexcept {
  switch (which) {
    case ctl: return bank.ctl;
    case status: return bank.status;
    case address: return bank.address;
    default: return bank.misc;
  }
}

// Old Linux clears bit 10 of bank 4 (AMD's north bridge) and bit 0 of others.
bool acceptable_ctl(uint64_t value) noexcept {
  return value == 0 || (value | 1u << 10 | 1) == all;
}

bool write_bank(MachineCheck& mc, uint32_t index, uint64_t value, bool host_initiated) noexcept {
  const unsigned bank = (index - first_bank) / 4;
  const unsigned which = (index - first_bank) % 4;
  if (bank >= mc.count()) return false;
  if (which == ctl && !acceptable_ctl(value)) return false;
  if (which == status && value != 0 && !host_initiated) return false;
  part(mc.banks[bank], which) = value;
  return true;
}

bool is_ctl2(uint32_t index) noexcept {
  return index >= first_ctl2 && index < end_of_ctl2;
}
// The guest has the registers with the capability only.
bool has_ctl2(const MachineCheck& mc, uint32_t index, bool host_initiated) noexcept {
  return index - first_ctl2 < mc.count() && (host_initiated || (mc.cap & MachineCheck::cmci_p) != 0);
}

// Uncorrected, but no action is required: software may go on, and is told by the interrupt (SDM, 15.6.3).
bool needs_no_action(const kvm_x86_mce& event) noexcept {
  return event.mcg_status == 0 && (event.status & uncorrected) != 0 &&
         (event.status & (context_corrupt | signalled | action_required)) == 0;
}

void record(MachineCheck::Bank& bank, const kvm_x86_mce& event) noexcept {
  const bool occupied = (bank.status & valid) != 0;
  bank.status = event.status | (occupied ? overflow : 0);
  bank.address = event.addr;
  bank.misc = event.misc;
}

}  // namespace

bool is_machine_check_msr(uint32_t index) noexcept {
  return (index >= mcg_cap && index <= mcg_ctl) || (index >= first_bank && index < end_of_banks) ||
         is_ctl2(index);
}

bool is_machine_check_bank_status(uint32_t index) noexcept {
  return index >= first_bank && index < end_of_banks && (index - first_bank) % 4 == status;
}

bool read_machine_check(const MachineCheck& mc, uint32_t index, uint64_t& value,
                        bool host_initiated) noexcept {
  switch (index) {
    case mcg_cap: value = mc.cap; return true;
    case mcg_status: value = mc.status; return true;
    case mcg_ctl: value = mc.ctl; return host_initiated || (mc.cap & MachineCheck::ctl_p) != 0;
    default: break;
  }
  if (is_ctl2(index)) {
    if (!has_ctl2(mc, index, host_initiated)) return false;
    value = mc.banks[index - first_ctl2].ctl2;
    return true;
  }
  const unsigned bank = (index - first_bank) / 4;
  if (bank >= mc.count()) return false;
  value = part(mc.banks[bank], (index - first_bank) % 4);
  return true;
}

bool write_machine_check(MachineCheck& mc, uint32_t index, uint64_t value, bool host_initiated) noexcept {
  switch (index) {
    case mcg_cap: return host_initiated && value == mc.cap;
    case mcg_status:
      if (value != 0 && !host_initiated) return false;
      mc.status = value;
      return true;
    case mcg_ctl:
      if ((mc.cap & MachineCheck::ctl_p) == 0) return host_initiated && value == 0;
      if (value != 0 && value != all) return false;
      mc.ctl = value;
      return true;
    default: break;
  }
  if (!is_ctl2(index)) return write_bank(mc, index, value, host_initiated);
  if (!has_ctl2(mc, index, host_initiated) || (value & ~(cmci_enable | cmci_threshold)) != 0) return false;
  mc.banks[index - first_ctl2].ctl2 = value;
  return true;
}

int setup_machine_check(MachineCheck& mc, uint64_t cap) noexcept {
  constexpr uint64_t counts = 0xff'00ff;  // banks, and those with extended state
  const unsigned banks = cap & 0xff;
  if (banks == 0 || banks > MachineCheck::max_banks || (cap & ~(MachineCheck::supported | counts)) != 0)
    return EINVAL;
  mc.cap = cap;
  if ((cap & MachineCheck::ctl_p) != 0) mc.ctl = all;
  for (unsigned bank = 0; bank < banks; ++bank) mc.banks[bank].ctl = all;
  return 0;
}

int inject_machine_check(Cpu& cpu, const kvm_x86_mce& event, MachineCheckEffect& effect) noexcept {
  MachineCheck& mc = cpu.msr.machine_check;
  if (event.bank >= mc.count() || (event.status & valid) == 0) return EINVAL;
  MachineCheck::Bank& bank = mc.banks[event.bank];
  const bool has_cmci = (mc.cap & MachineCheck::cmci_p) != 0;
  if ((event.status & uncorrected) == 0) {
    effect.interrupt = has_cmci && (bank.ctl2 & cmci_enable) != 0;
    // A corrected error does not displace an uncorrected one.
    if ((bank.status & valid) != 0 && (bank.status & uncorrected) != 0)
      bank.status |= overflow;
    else
      record(bank, event);
    return 0;
  }
  if (has_cmci && needs_no_action(event)) {
    record(bank, event);
    effect.interrupt = (bank.ctl2 & cmci_enable) != 0;
    return 0;
  }
  // Reporting may be off, for all or for the bank.
  if (((mc.cap & MachineCheck::ctl_p) != 0 && mc.ctl != all) || bank.ctl != all) return 0;
  if ((mc.status & in_progress) != 0 || (cpu.cr4 & cr4::mce) == 0) {
    effect.shutdown = true;
    return 0;
  }
  record(bank, event);
  mc.status = event.mcg_status;
  cpu.raise(Exception::mc);
  return 0;
}

}  // namespace lodge::kvm::soft
