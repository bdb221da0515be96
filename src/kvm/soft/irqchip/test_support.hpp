// What the tests of the interrupt hardware share: a vCPU that only records what reaches it.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "base/clock.hpp"
#include "kvm/soft/irqchip/vcpu_port.hpp"

namespace lodge::kvm::soft {

// TSC: 2 GHz, 0 at the clock's `start`.
class FakePort final : public VcpuPort {
 public:
  explicit FakePort(Clock& clock) : clock_(clock), start_(clock.now()) {}
  void interrupt_changed() noexcept override { ++changes; }
  void nmi() noexcept override { ++nmis; }
  void smi() noexcept override { ++smis; }
  void init() noexcept override { ++inits; }
  void sipi(uint8_t vector) noexcept override { sipi_vector = vector; }
  uint64_t guest_tsc() const noexcept override { return (clock_.now() - start_) * 2 + tsc_offset; }
  uint64_t tsc_deadline_to_clock_ns(uint64_t guest_tsc) const noexcept override {
    const uint64_t target = guest_tsc - tsc_offset;
    return start_ + (target + 1) / 2;
  }

  std::atomic<int> changes{0}, nmis{0}, smis{0}, inits{0}, sipi_vector{-1};
  std::atomic<uint64_t> tsc_offset{0};

 private:
  Clock& clock_;
  uint64_t start_;
};

}  // namespace lodge::kvm::soft
