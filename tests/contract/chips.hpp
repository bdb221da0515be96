// What the tests of the interrupt controllers share.
#pragma once

#include "harness.hpp"

namespace lodge::contract {

// RBP -> LAPIC, enabled, spurious vector 0xff.
#define APIC "mov $0xfee00000, %ebp; movl $0x1ff, 0xf0(%rbp);"
// RDI -> IOAPIC; one redirection register (index, value).
#define IOAPIC_WRITE(index, value) \
  "mov $0xfec00000, %edi; movl $" #index ", (%rdi); movl $" #value ", 0x10(%rdi);"
#define WAIT "sti; 9: hlt; jmp 9b"
// Time for an interrupt to arrive, some thousand instructions: sent does not mean taken at the very next one.
#define SOON "mov $4000, %esi; 8: dec %esi; jnz 8b;"
// The PICs wake up unmasked at vector 0 and see the first 16 lines as well.
#define PICS_OFF "mov $0xff, %al; out %al, $0x21; out %al, $0xa1;"

constexpr uint64_t counter = 0x40000, handler = 0x48000;

// A guest of one vCPU with `code`, ready to run in 64-bit mode. At `handler`, for a gate, lies code that
// counts at `counter`, ends the interrupt at the LAPIC and returns.
std::unique_ptr<Guest> started(Contract& test, std::span<const uint8_t> code,
                               Irqchip irqchip = Irqchip::full);

kvm_irq_routing_entry msi_route(uint32_t gsi, uint32_t vector, bool level = false);

}  // namespace lodge::contract
