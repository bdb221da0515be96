// Resource assignment for direct kernel boot (PCI Local Bus Specification 3.0, section 6.2.5). A guest may
// move everything afterwards.
#include "device/pci/allocate.hpp"

#include <algorithm>
#include <bit>
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

// Largest first: no gaps for alignment; and 64-bit BARs last among equals: they have another place to go to.
void sort(std::vector<Need>& needs) {
  std::ranges::stable_sort(needs, [](const Need& a, const Need& b) {
    return a.bar.size != b.bar.size ? a.bar.size > b.bar.size : is_64(a.bar.kind) < is_64(b.bar.kind);
  });
}

void set_line(Function& function, unsigned slot) {
  if (const unsigned pin = function.interrupt_pin())
    function.assign_interrupt_line(static_cast<uint8_t>(layout::pci_gsi(slot, pin - 1)));
}

[[noreturn]] void no_room(const Function& function, uint64_t size, bool ports) {
  usage_error("{}: no room for {:#x} bytes of PCI {}; remove a --device", function.name(), size,
              ports ? "ports" : "memory");
}

// At least this much for each kind, also for what is plugged in later.
constexpr uint64_t port_window = 2 * layout::MiB;

// The windows of a port, and what is behind it.
void assign_port(RootPort& port, unsigned slot, uint8_t bus, Window& low, Window& high) {
  std::vector<Need> needs;
  uint64_t plain_size = 0, wide_size = 0;
  port.with_child([&](Function& child) {
    for (const auto& bar : child.bar_needs()) {
      if (bar.kind == BarKind::io)
        usage_error("{}: a PCI Express port has no room for port registers; leave legacy=on out",
                    child.name());
      needs.push_back({&child, bar});
      (bar.kind == BarKind::memory64_prefetchable ? wide_size : plain_size) += bar.size;
    }
    set_line(child, slot);
  });
  plain_size = std::bit_ceil(std::max(plain_size, port_window));
  wide_size = std::bit_ceil(std::max(wide_size, port_window));
  const auto plain_at = low.take(plain_size);
  auto wide_at = low.take(wide_size);
  if (!wide_at) wide_at = high.take(wide_size);
  if (!plain_at || !wide_at) no_room(port, plain_size + wide_size, false);
  port.assign(bus, {*plain_at, plain_size}, {*wide_at, wide_size});
  Window plain(*plain_at, *plain_at + plain_size), wide(*wide_at, *wide_at + wide_size);
  sort(needs);
  for (const Need& need : needs) {
    Window& window = need.bar.kind == BarKind::memory64_prefetchable ? wide : plain;
    need.function->assign_bar(need.bar.index, *window.take(need.bar.size));  // the sums have been taken above
  }
  for (const Need& need : needs) need.function->enable_decoding();
}

}  // namespace

void assign_resources(Root& root) {
  std::vector<Need> needs;
  std::vector<std::pair<unsigned, RootPort*>> ports_behind;
  root.for_each([&](unsigned slot, unsigned, Function& function) {
    for (const auto& bar : function.bar_needs()) needs.push_back({&function, bar});
    set_line(function, slot);
    if (auto* port = dynamic_cast<RootPort*>(&function)) ports_behind.emplace_back(slot, port);
  });
  sort(needs);
  Window ports(layout::pci_ports_base, layout::pci_ports_end);
  Window low(layout::pci_mmio_base, layout::pci_mmio_end);
  Window high(layout::pci_mmio64_base, layout::pci_mmio64_base + layout::pci_mmio64_size);
  for (const Need& need : needs) {
    auto address = (need.bar.kind == BarKind::io ? ports : low).take(need.bar.size);
    if (!address && is_64(need.bar.kind)) address = high.take(need.bar.size);
    if (!address) no_room(*need.function, need.bar.size, need.bar.kind == BarKind::io);
    need.function->assign_bar(need.bar.index, *address);
  }
  for (const Need& need : needs) need.function->enable_decoding();
  for (uint8_t bus = 1; const auto& [slot, port] : ports_behind) assign_port(*port, slot, bus++, low, high);
}

}  // namespace lodge::device::pci
