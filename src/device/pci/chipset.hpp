// The two functions of the chipset that guests expect to find: host bridge at 00.0 and LPC bridge at 1f.0.
#pragma once

#include "device/pci/function.hpp"

namespace lodge::device::pci {

class HostBridge final : public Function {
 public:
  static constexpr unsigned slot = 0;
  HostBridge();
};

class LpcBridge final : public Function {
 public:
  static constexpr unsigned slot = 0x1f;
  LpcBridge();
};

}  // namespace lodge::device::pci
