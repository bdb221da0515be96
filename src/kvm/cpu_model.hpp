// Named processor models: pure functions over CPUID entries, the same for every accelerator. The levels are
// those of the System V psABI for x86-64, section 3.1.1 (micro-architecture levels).
#pragma once

#include <linux/kvm.h>

#include <span>
#include <string_view>
#include <vector>

namespace lodge::kvm {

// "host", "x86-64-v1" to "x86-64-v4".
std::span<const std::string_view> cpu_model_names() noexcept;

// What `model` leaves of an accelerator's supported_cpuid(). "host" leaves all. A level keeps its own
// instruction sets and the supervisor features (SMEP, x2APIC, NX, ...); vendor and family stay the host's,
// whose behaviour the guest meets. Throws UsageError for an unknown name, and when `supported` lacks a
// feature of the level.
std::vector<kvm_cpuid_entry2> cpu_model(std::span<const kvm_cpuid_entry2> supported, std::string_view model);

}  // namespace lodge::kvm
