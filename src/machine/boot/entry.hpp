// How the boot processor enters a kernel: register values for kvm::Vcpu, and the tables in guest memory they
// need.
#pragma once

#include <linux/kvm.h>

#include <string>

#include "kvm/kvm.hpp"
#include "machine/boot/placement.hpp"

namespace lodge::machine::boot {

struct BootState {
  enum class Mode { protected32, long64 };

  std::string protocol;  // what was recognized and how it is entered: one line for logs
  Mode mode = Mode::protected32;
  kvm_regs regs{};  // interrupts off; rip and the protocol's registers are set, the rest is 0
  uint64_t cr3 = 0;
  uint64_t gdt_base = 0;
  uint16_t gdt_limit = 0;
  uint64_t kernel_begin = 0,
           kernel_end = 0;  // guest-physical range of the kernel, for messages and debuggers

  // Changes what the protocol defines and leaves the rest (apic_base, interrupt bitmap) as the accelerator
  // set it.
  void apply(kvm_sregs& sregs) const noexcept;
  // set_sregs() and set_regs() of the boot processor. Throws what they throw.
  void apply(kvm::Vcpu& vcpu) const;
};

// Flat 4 GiB segments, paging off (boot.rst "32-bit boot protocol", multiboot, PVH). Selectors as Linux wants
// them: code 0x10, data 0x18.
BootState enter_protected(Placement& placement, uint64_t entry, std::string protocol);

// Long mode, the first 4 GiB mapped one to one by 2 MiB pages (boot.rst "64-bit boot protocol").
BootState enter_long(Placement& placement, uint64_t entry, std::string protocol);

}  // namespace lodge::machine::boot
