// Resource assignment for direct kernel boot (PCI Local Bus Specification 3.0, section 6.2.5). A guest may
// move everything afterwards.
#include "device/pci/allocate.hpp"

#include <algorithm>
#include <optional>
#include <vector>

#include "base/error.hpp"
#include "machine/layout.hpp"

namespace lodge::device::pci {

namespace {

namespace layout = machine::layout;

class Window {
 public:
  Window(uint64_t first, uint64_t end) : next_(first), end_(end) {}
  // BARs lie at multiples of their size.
  std::optional<uint64_t> take(uint64_t size) {
    const uint64_t at = (next_ + size - 1) & ~(size - 1);
    if (at < next_ || at > end_ || size > end_ - at) return std::nullopt;
    next_ = at + size;
    return at;
  }

 private:
  uint64_t next_, end_;
};

struct Need {
  Function* function;
  Function::BarNeed bar;
};

bool is_64(BarKind kind) {
  return kind == BarKind::memory64 || kind == BarKind::memory64_prefetchable;
}

}  // namespace

void assign_resources(Root& root) {
  std::vector<Need> needs;
  root.for_each([&](unsigned slot, unsigned, Function& function) {
    for (const auto& bar : function.bar_needs()) needs.push_back({&function, bar});
    if (const unsigned pin = function.interrupt_pin())
      function.assign_interrupt_line(static_cast<uint8_t>(layout::pci_gsi(slot, pin - 1)));
  });
  // Without gaps for alignment, and 64-bit BARs last among equals: they have another place to go to.
  std::ranges::stable_sort(needs, [](const Need& a, const Need& b) {
    return a.bar.size != b.bar.size ? a.bar.size > b.bar.size : is_64(a.bar.kind) < is_64(b.bar.kind);
  });
  Window ports(layout::pci_ports_base, layout::pci_ports_end);
  Window low(layout::pci_mmio_base, layout::pci_mmio_end);
  Window high(layout::pci_mmio64_base, layout::pci_mmio64_base + layout::pci_mmio64_size);
  for (const Need& need : needs) {
    auto address = (need.bar.kind == BarKind::io ? ports : low).take(need.bar.size);
    if (!address && is_64(need.bar.kind)) address = high.take(need.bar.size);
    if (!address)
      usage_error("{}: no room for {:#x} bytes of PCI {}; remove a --device", need.function->name(),
                  need.bar.size, need.bar.kind == BarKind::io ? "ports" : "memory");
    need.function->assign_bar(need.bar.index, *address);
  }
  for (const Need& need : needs) need.function->enable_decoding();
}

}  // namespace lodge::device::pci
