// The places for VirtIO devices of a machine without PCI: windows on the memory bus and interrupt inputs, as
// the ACPI tables announce them.
#pragma once

#include <functional>
#include <vector>

#include "machine/io.hpp"

namespace lodge::device::virtio {

// Set-up only: not synchronised.
class MmioSlots {
 public:
  struct Place {
    uint64_t base;
    unsigned gsi;  // shared by every layout::virtio_mmio_gsis-th place
  };
  // `line` gives a new driver of an interrupt input, as DeviceContext's.
  explicit MmioSlots(std::function<machine::Interrupt&(unsigned gsi)> line) : line_(std::move(line)) {}

  // The number that the next take() gives a place to.
  unsigned next() const noexcept { return static_cast<unsigned>(taken_.size()); }
  // Throws UsageError when all are taken.
  Place take();
  machine::Interrupt& line(const Place& place) { return line_(place.gsi); }

  const std::vector<Place>& taken() const noexcept { return taken_; }

 private:
  std::function<machine::Interrupt&(unsigned gsi)> line_;
  std::vector<Place> taken_;
};

}  // namespace lodge::device::virtio
