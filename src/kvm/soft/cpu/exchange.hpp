// The processor's state in the types of <linux/kvm.h>, as the contract exchanges it.
//
// Setters return 0, or EINVAL for what KVM refuses; the state is unchanged then. Call them while the vCPU
// does not run. What lies outside Cpu (the LAPIC, the interrupt waiting for injection, the MP state) is
// SoftVcpu's.
#pragma once

#include <linux/kvm.h>

#include <span>

#include "kvm/soft/cpu/cpu.hpp"

namespace lodge::kvm::soft {

kvm_regs get_regs(const Cpu& cpu) noexcept;
void set_regs(Cpu& cpu, const kvm_regs& regs) noexcept;

// interrupt_bitmap is left 0 and not looked at. CR8 and APIC_BASE go through the platform. What a guest's
// CPUID must offer for it is asked for once the VMM has given one.
kvm_sregs get_sregs(Cpu& cpu) noexcept;
int set_sregs(Cpu& cpu, const kvm_sregs& sregs);
kvm_sregs2 get_sregs2(Cpu& cpu) noexcept;
int set_sregs2(Cpu& cpu, const kvm_sregs2& sregs);

// Whether these control registers can go together under the guest's CPUID. `long_code`: CS.L.
struct ControlRegisters {
  uint64_t cr0, cr3, cr4, efer;
  bool long_code;
};
bool valid_control(const Cpu& cpu, const ControlRegisters& in);

kvm_debugregs get_debugregs(const Cpu& cpu) noexcept;
int set_debugregs(Cpu& cpu, const kvm_debugregs& regs) noexcept;

kvm_xcrs get_xcrs(const Cpu& cpu) noexcept;
int set_xcrs(Cpu& cpu, const kvm_xcrs& xcrs) noexcept;

// How many were read or written before the first that is refused.
unsigned get_msrs(Cpu& cpu, std::span<kvm_msr_entry> entries) noexcept;
unsigned set_msrs(Cpu& cpu, std::span<const kvm_msr_entry> entries) noexcept;

// The fields that Cpu knows: exception, shadow of interrupts, NMI pending and masked, whether in SMM.
// `interrupt.injected` and `sipi_vector` are SoftVcpu's.
kvm_vcpu_events get_events(const Cpu& cpu) noexcept;
// False: unknown flags, or an exception that does not exist; set_events() takes no such ones.
bool valid_events(const kvm_vcpu_events& events) noexcept;
void set_events(Cpu& cpu, const kvm_vcpu_events& events) noexcept;

}  // namespace lodge::kvm::soft
