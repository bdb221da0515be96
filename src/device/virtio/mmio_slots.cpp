#include "device/virtio/mmio_slots.hpp"

#include "base/error.hpp"
#include "machine/layout.hpp"

namespace lodge::device::virtio {

namespace layout = machine::layout;

MmioSlots::Place MmioSlots::take() {
  const unsigned index = next();
  if (index >= layout::virtio_mmio_max)
    usage_error("--machine micro: there are places for {} VirtIO devices; remove a --device, or take pc",
                layout::virtio_mmio_max);
  return taken_.emplace_back(Place{layout::virtio_mmio_base + index * layout::virtio_mmio_size,
                                   layout::virtio_mmio_gsi + index % layout::virtio_mmio_gsis});
}

}  // namespace lodge::device::virtio
