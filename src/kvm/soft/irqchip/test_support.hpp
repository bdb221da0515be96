// What the tests of the interrupt hardware share: a vCPU that only records what reaches it, and requests.
#pragma once

#include <linux/kvm.h>
#include <poll.h>

#include <atomic>
#include <cstdint>
#include <system_error>

#include "base/clock.hpp"
#include "base/fd.hpp"
#include "kvm/soft/irqchip/vcpu_port.hpp"

namespace lodge::kvm::soft {

// TSC: 2 GHz, 0 at the clock's `start`.
class FakePort final : public VcpuPort {
 public:
  explicit FakePort(Clock& clock) : clock_(clock), start_(clock.now()) {}
  void interrupt_changed() noexcept override {
    ++changes;
    signal_event(wake_.get());
  }
  int event() const { return wake_.get(); }
  // Waits until interrupt_changed() was called since the last wait. False after 20 seconds.
  bool wait() {
    pollfd poll{wake_.get(), POLLIN, 0};
    return ::poll(&poll, 1, 20'000) == 1 && take_event(wake_.get()) != 0;
  }
  void nmi() noexcept override { ++nmis; }
  void smi() noexcept override { ++smis; }
  void init() noexcept override { ++inits; }
  void sipi(uint8_t vector) noexcept override { sipi_vector = vector; }
  void unhalt() noexcept override { ++unhalts; }
  uint64_t guest_tsc() const noexcept override { return (clock_.now() - start_) * 2 + tsc_offset; }
  uint64_t tsc_deadline_to_clock_ns(uint64_t guest_tsc) const noexcept override {
    const uint64_t target = guest_tsc - tsc_offset;
    return start_ + (target + 1) / 2;
  }

  std::atomic<int> changes{0}, nmis{0}, smis{0}, inits{0}, unhalts{0}, sipi_vector{-1};
  std::atomic<uint64_t> tsc_offset{0};

 private:
  Clock& clock_;
  uint64_t start_;
  Fd wake_ = Fd::event();
};

inline kvm_irq_routing_entry chip_route(uint32_t gsi, uint32_t chip, uint32_t pin) {
  kvm_irq_routing_entry entry{};
  entry.gsi = gsi;
  entry.type = KVM_IRQ_ROUTING_IRQCHIP;
  entry.u.irqchip.irqchip = chip;
  entry.u.irqchip.pin = pin;
  return entry;
}

inline kvm_irq_routing_entry msi_route(uint32_t gsi, uint32_t data, uint32_t address_lo = 0xfee00000,
                                       uint32_t address_hi = 0) {
  kvm_irq_routing_entry entry{};
  entry.gsi = gsi;
  entry.type = KVM_IRQ_ROUTING_MSI;
  entry.u.msi.address_lo = address_lo;
  entry.u.msi.address_hi = address_hi;
  entry.u.msi.data = data;
  return entry;
}

// The errno that `call` throws, or 0.
template <class Call>
int error_of(Call&& call) {
  try {
    call();
  } catch (const std::system_error& error) {
    return error.code().value();
  }
  return 0;
}

}  // namespace lodge::kvm::soft
