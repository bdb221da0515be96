// The processor that a VM's guest sees: the accelerator's CPUID, cut down to the chosen model, with each
// vCPU's place in the machine. The same for every accelerator.
#pragma once

#include <linux/kvm.h>

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kvm/kvm.hpp"

namespace lodge::vm {

using CpuidEntries = std::vector<kvm_cpuid_entry2>;

// What every vCPU of the VM has in common. `model` is a name of cpu_models(): "host" keeps all that the
// accelerator offers, save nested virtualization; the others keep what the x86-64 psABI names for the level,
// and what any PC has. Throws UsageError when the accelerator lacks a feature of the level.
CpuidEntries model_cpuid(const kvm::System& system, std::string_view model);
// The same from a list: `tsc_deadline` as KVM_CAP_TSC_DEADLINE_TIMER says (api.rst: the list itself never has
// it).
CpuidEntries model_cpuid(CpuidEntries supported, bool tsc_deadline, std::string_view model);

// One package with a core for each vCPU, no hyper-threads: APIC IDs in leaves 1, 0xb, 0x1f and 0x8000001e,
// core counts and cache sharing in leaves 4, 0x80000008 and 0x8000001d (Intel SDM volume 2 CPUID; AMD APM
// volume 3 appendix E).
CpuidEntries vcpu_cpuid(const CpuidEntries& model, unsigned apic_id, unsigned cpus);

// Tells the guest the frequencies of its TSC and of its APIC's timer, whose bus runs at 1 GHz on every
// accelerator: leaf 0x40000010, which VMware has introduced and KVM leaves to the VMM. Nothing for `tsc_khz`
// 0, or where the hypervisor's leaves are absent.
void add_frequencies(CpuidEntries& entries, uint32_t tsc_khz);

// The processor's name as leaves 0x80000002 to 4 give it, without padding; empty when they are absent.
std::string brand_string(const CpuidEntries& entries);

}  // namespace lodge::vm
