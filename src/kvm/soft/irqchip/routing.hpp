// The GSI routing table (KVM_SET_GSI_ROUTING): which chip inputs or MSIs a global system interrupt reaches.
// Immutable once built; the Irqchip replaces it as a whole.
#pragma once

#include <linux/kvm.h>

#include <array>
#include <cstdint>
#include <span>
#include <vector>

namespace lodge::kvm::soft {

class GsiRouting {
 public:
  static constexpr uint32_t max_gsis = 4096;  // KVM_CAP_IRQ_ROUTING

  struct Route {
    enum class Kind : uint8_t { pic, ioapic, msi } kind;
    uint8_t pin;  // PIC: 0 to 15
    uint32_t address_lo, address_hi, data;
  };

  GsiRouting() = default;  // empty: what the split irqchip starts with
  // `chips`: the full irqchip, whose inputs may be named; `extended_msi`: KVM_X2APIC_API_USE_32BIT_IDS.
  // Throws std::system_error (EINVAL).
  GsiRouting(std::span<const kvm_irq_routing_entry> entries, bool chips, bool extended_msi);
  // KVM's default: GSI 0-15 to the 8259 and to the IOAPIC input of the same number, 16-23 to the IOAPIC.
  static GsiRouting standard();

  std::span<const Route> routes(uint32_t gsi) const noexcept {
    return gsi < routes_.size() ? std::span<const Route>(routes_[gsi]) : std::span<const Route>();
  }
  // The GSI that reaches an input, or -1.
  int gsi_of_pic(unsigned pin) const noexcept { return pin < pic_.size() ? pic_[pin] : -1; }
  int gsi_of_ioapic(unsigned pin) const noexcept { return pin < ioapic_.size() ? ioapic_[pin] : -1; }
  // Whether a level-triggered MSI of the first `pins` GSIs carries `vector`: its EOI concerns the VMM's
  // IOAPIC.
  bool level_msi(uint8_t vector, unsigned pins) const noexcept;

 private:
  void add_chip(const kvm_irq_routing_entry& entry);

  std::vector<std::vector<Route>> routes_;
  std::array<int16_t, 16> pic_ = [] {
    std::array<int16_t, 16> a{};
    a.fill(-1);
    return a;
  }();
  std::array<int16_t, KVM_IOAPIC_NUM_PINS> ioapic_ = [] {
    std::array<int16_t, KVM_IOAPIC_NUM_PINS> a{};
    a.fill(-1);
    return a;
  }();
};

}  // namespace lodge::kvm::soft
