// The machine's interrupt inputs, between chips and the accelerator's irqchip.
#pragma once

#include <linux/kvm.h>

#include <cstdint>
#include <vector>

#include "device/shared_line.hpp"
#include "kvm/kvm.hpp"
#include "machine/io.hpp"

namespace lodge::vm {

// One input of the irqchip. Several chips may drive it (serial ports 1 and 3 share IRQ 4).
class InterruptInput {
 public:
  InterruptInput(kvm::Vm& vm, uint32_t gsi) noexcept : pin_(vm, gsi), line_(pin_) {}
  // A new driver of this input, alive as long as the input. Any thread.
  machine::Interrupt& add_driver() { return line_.add_input(); }

 private:
  class Pin final : public machine::Interrupt {
   public:
    Pin(kvm::Vm& vm, uint32_t gsi) noexcept : vm_(vm), gsi_(gsi) {}
    void set(bool level) noexcept override { vm_.irq_line(gsi_, level); }

   private:
    kvm::Vm& vm_;
    uint32_t gsi_;
  };

  Pin pin_;
  device::SharedLine line_;
};

// The PC's wiring: ISA interrupts reach both the 8259 pair and the IOAPIC, the timer IOAPIC pin 2 (as the
// MADT says); 16 to 23 are the IOAPIC's alone.
std::vector<kvm_irq_routing_entry> pc_routing();
// Every input to the IOAPIC's pin of the same number, and nothing to the 8259 pair.
std::vector<kvm_irq_routing_entry> ioapic_routing();

}  // namespace lodge::vm
