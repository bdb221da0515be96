// What firmware does before a kernel starts: gives every BAR its address and every pin its line.
#pragma once

#include "device/pci/root.hpp"

namespace lodge::device::pci {

// All functions that are plugged in, largest BARs first, inside the windows that the ACPI tables announce
// (machine/layout.hpp): ports from pci_ports_base on; memory below 4 GiB, where 32-bit systems reach it, and
// 64-bit BARs that do not fit there from pci_mmio64_base on. Root ports get bus numbers and windows, with
// room for what is plugged in later. Decoding is enabled. Before any vCPU runs. Throws UsageError when the
// windows are too small.
void assign_resources(Root& root);

}  // namespace lodge::device::pci
