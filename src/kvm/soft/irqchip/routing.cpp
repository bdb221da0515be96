// KVM_SET_GSI_ROUTING by the kernel's Documentation/virt/kvm/api.rst, section 4.52.
#include "kvm/soft/irqchip/routing.hpp"

#include <algorithm>

#include "base/error.hpp"

namespace lodge::kvm::soft {

GsiRouting::GsiRouting(std::span<const kvm_irq_routing_entry> entries, bool chips, bool extended_msi) {
  if (entries.size() > max_gsis) throw_errno(EINVAL, "too many GSI routes");
  for (const kvm_irq_routing_entry& entry : entries) {
    if (entry.gsi >= max_gsis) throw_errno(EINVAL, "a routed GSI is out of range");
    if (entry.gsi >= routes_.size()) routes_.resize(entry.gsi + 1);
    if (entry.type == KVM_IRQ_ROUTING_IRQCHIP && chips) {
      if (entry.flags != 0) throw_errno(EINVAL, "unknown flags of a GSI route");
      add_chip(entry);
    } else if (entry.type == KVM_IRQ_ROUTING_MSI) {
      // An MSI shares its GSI with nothing.
      if (!routes_[entry.gsi].empty()) throw_errno(EINVAL, "a GSI is routed twice");
      if ((entry.flags & ~static_cast<uint32_t>(KVM_MSI_VALID_DEVID)) != 0)
        throw_errno(EINVAL, "unknown flags of a GSI route");
      if (extended_msi && (entry.u.msi.address_hi & 0xff) != 0)
        throw_errno(EINVAL, "an MSI route's upper address has reserved bits");
      routes_[entry.gsi].push_back({.kind = Route::Kind::msi,
                                    .pin = 0,
                                    .address_lo = entry.u.msi.address_lo,
                                    .address_hi = entry.u.msi.address_hi,
                                    .data = entry.u.msi.data});
    } else {
      throw_errno(EINVAL, "this kind of GSI route needs another irqchip");
    }
  }
}

void GsiRouting::add_chip(const kvm_irq_routing_entry& entry) {
  const uint32_t chip = entry.u.irqchip.irqchip;
  const bool pic = chip == KVM_IRQCHIP_PIC_MASTER || chip == KVM_IRQCHIP_PIC_SLAVE;
  if (!pic && chip != KVM_IRQCHIP_IOAPIC) throw_errno(EINVAL, "a GSI route names an unknown chip");
  if (entry.u.irqchip.pin >= (pic ? 8u : KVM_IOAPIC_NUM_PINS))
    throw_errno(EINVAL, "a GSI route's pin is out of range");
  const auto pin = static_cast<uint8_t>(entry.u.irqchip.pin + (chip == KVM_IRQCHIP_PIC_SLAVE ? 8 : 0));
  const auto kind = pic ? Route::Kind::pic : Route::Kind::ioapic;
  auto& routes = routes_[entry.gsi];
  // One input of each chip for a GSI; the two 8259 are two chips here.
  const bool twice = std::ranges::any_of(routes, [&](const Route& route) {
    return route.kind == Route::Kind::msi || (route.kind == kind && (!pic || route.pin / 8 == pin / 8));
  });
  if (twice) throw_errno(EINVAL, "a GSI is routed twice");
  routes.push_back({.kind = kind, .pin = pin, .address_lo = 0, .address_hi = 0, .data = 0});
  (pic ? pic_[pin] : ioapic_[pin]) = static_cast<int16_t>(entry.gsi);
}

GsiRouting GsiRouting::standard() {
  std::vector<kvm_irq_routing_entry> entries;
  const auto add = [&](uint32_t gsi, uint32_t chip, uint32_t pin) {
    kvm_irq_routing_entry entry{};
    entry.gsi = gsi;
    entry.type = KVM_IRQ_ROUTING_IRQCHIP;
    entry.u.irqchip.irqchip = chip;
    entry.u.irqchip.pin = pin;
    entries.push_back(entry);
  };
  for (uint32_t gsi = 0; gsi < KVM_IOAPIC_NUM_PINS; ++gsi) {
    if (gsi < 16) add(gsi, gsi < 8 ? KVM_IRQCHIP_PIC_MASTER : KVM_IRQCHIP_PIC_SLAVE, gsi % 8);
    add(gsi, KVM_IRQCHIP_IOAPIC, gsi);
  }
  return {entries, true, false};
}

bool GsiRouting::level_msi(uint8_t vector, unsigned pins) const noexcept {
  for (unsigned gsi = 0; gsi < std::min<size_t>(pins, routes_.size()); ++gsi)
    for (const Route& route : routes_[gsi])
      if (route.kind == Route::Kind::msi && (route.data & 0x8000) != 0 &&
          static_cast<uint8_t>(route.data) == vector)
        return true;
  return false;
}

}  // namespace lodge::kvm::soft
