// Control and debug registers, EFER and XCR0: every check, and what follows from a change. SDM volume 3,
// sections 2.5 and 4.1; AMD APM volume 2, section 3.1.
//
// Each raises #GP(0) (or what is said) and returns false when the value is refused; nothing has changed then.
#pragma once

#include <cstdint>

#include "kvm/soft/cpu/cpu.hpp"

namespace lodge::kvm::soft {

bool set_cr0(Cpu& cpu, uint64_t value) noexcept;
bool set_cr3(Cpu& cpu, uint64_t value) noexcept;
bool set_cr4(Cpu& cpu, uint64_t value) noexcept;
bool set_cr8(Cpu& cpu, uint64_t value) noexcept;
bool set_xcr0(Cpu& cpu, uint64_t value) noexcept;

// EFER by WRMSR. Raises nothing: false means #GP.
bool set_efer(Cpu& cpu, uint64_t value) noexcept;

// Debug registers by number; 4 and 5 are 6 and 7, or #UD with CR4.DE. The caller has checked CPL and DR7.GD.
bool read_dr(Cpu& cpu, unsigned number, uint64_t& value) noexcept;
bool write_dr(Cpu& cpu, unsigned number, uint64_t value) noexcept;

// Bits that the guest's CPUID allows.
uint64_t valid_cr4(const Features& features) noexcept;
uint64_t valid_efer(const Features& features) noexcept;
bool valid_xcr0(const Features& features, uint64_t value) noexcept;
// Bits of CR3 above the physical address width (long mode).
uint64_t reserved_cr3(const Features& features) noexcept;

}  // namespace lodge::kvm::soft
