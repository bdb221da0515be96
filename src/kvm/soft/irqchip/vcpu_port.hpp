// What the interrupt hardware needs of a vCPU.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <utility>

#include "base/clock.hpp"

namespace lodge::kvm::soft {

// Implemented by the vCPU, called by its LAPIC. Any thread may call, with locks of the interrupt hardware
// held: an implementation sets an atomic request and wakes the vCPU; it never blocks and never calls back
// into the irqchip.
class VcpuPort {
 public:
  virtual ~VcpuPort() = default;

  // Lapic::pending_vector() may have become >= 0. The vCPU asks again when it can take an interrupt; the call
  // is not repeated while the guest keeps IF clear.
  virtual void interrupt_changed() noexcept = 0;
  virtual void nmi() noexcept = 0;
  virtual void smi() noexcept = 0;
  // INIT: the vCPU resets itself on its own thread and calls Lapic::init_reset() there.
  virtual void init() noexcept = 0;
  // Start-up IPI: real-mode start at vector << 12, if the vCPU waits for it.
  virtual void sipi(uint8_t vector) noexcept = 0;
  // Ends a HLT, the present or the next one, whether interrupts are enabled or not (KVM_HC_KICK_CPU).
  virtual void unhalt() noexcept = 0;

  // The guest's TSC now, and the Clock::now() at which it reaches `guest_tsc` (0 when that lies in the past).
  virtual uint64_t guest_tsc() const noexcept = 0;
  virtual uint64_t tsc_deadline_to_clock_ns(uint64_t guest_tsc) const noexcept = 0;
  // The timer of the LAPIC: by default the clock's.
  virtual std::unique_ptr<Timer> make_timer(Clock& clock, std::function<void()> expired) {
    return clock.make_timer(std::move(expired));
  }
};

}  // namespace lodge::kvm::soft
