// The rows of --device that are PCI functions of the machine itself.
#pragma once

#include "device/table.hpp"

namespace lodge::device::pci {

std::span<const DeviceDescriptor> rows() noexcept;

}  // namespace lodge::device::pci
