// Delivery of exceptions and interrupts, and the processor's reset states. SDM volume 3 chapter 6 and
// section 9.1.
#pragma once

#include <cstdint>

#include "kvm/soft/cpu/cpu.hpp"

namespace lodge::kvm::soft {

enum class Delivery : uint8_t {
  done,      // state points at the handler; cpu.pending is clear
  shutdown,  // triple fault
  vmm,       // a table or a stack lies in memory that is not RAM: cpu.wants_exit
};

// Delivers cpu.pending, raised by the instruction at cpu.rip (for traps - #BP, #OF, #DB traps - cpu.rip is
// already behind it). Faults during delivery become #DF or shutdown by the rules of SDM table 6-5.
Delivery deliver_exception(Cpu& cpu) noexcept;
Delivery deliver_external_interrupt(Cpu& cpu, uint8_t vector) noexcept;
Delivery deliver_nmi(Cpu& cpu) noexcept;

// Power-up state (all of it) or INIT state (keeps FPU, XCR0..., cache bits of CR0, TSC, MTRRs and most MSRs).
void reset_cpu(Cpu& cpu, bool init) noexcept;
// Real-mode start at vector << 12.
void start_at_sipi(Cpu& cpu, uint8_t vector) noexcept;

// True when the instruction may access ports [port, port + size): CPL <= IOPL, or the TSS permits; raises
// #GP(0) (or a fault of the TSS access) otherwise.
bool check_io_permission(Cpu& cpu, uint16_t port, unsigned size) noexcept;

}  // namespace lodge::kvm::soft
