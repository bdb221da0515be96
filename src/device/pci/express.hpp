// The PCI Express capability (PCI Express Base Specification 3.1, section 7.8): what ports and what sits
// behind them have in common. One lane at 2.5 GT/s: nothing here is any faster for a better one.
#pragma once

#include <cstdint>

#include "device/pci/config_space.hpp"

namespace lodge::device::pci {

// Offsets in the capability.
inline constexpr unsigned EXPRESS_FLAGS = 0x02, EXPRESS_DEVICE_CAP = 0x04, EXPRESS_DEVICE_CONTROL = 0x08,
                          EXPRESS_DEVICE_STATUS = 0x0a, EXPRESS_LINK_CAP = 0x0c, EXPRESS_LINK_CONTROL = 0x10,
                          EXPRESS_LINK_STATUS = 0x12, EXPRESS_LINK_CAP_2 = 0x2c,
                          EXPRESS_LINK_CONTROL_2 = 0x30;
// For the flags: the kind of function. A port also says that it has a slot.
inline constexpr uint16_t EXPRESS_ENDPOINT = 0x0000, EXPRESS_ROOT_PORT_WITH_SLOT = 0x0140;

// Set-up. Returns where the capability is.
inline unsigned add_express_capability(ConfigSpace& config, uint16_t kind) {
  constexpr uint8_t CAP_EXPRESS = 0x10;
  constexpr unsigned size = 60;
  constexpr uint16_t version = 2;
  constexpr uint32_t ROLE_BASED_ERRORS = 1u << 15, LINK_2_5_GT = 1, LINK_X1 = 1u << 4;
  const unsigned at = config.add_capability(CAP_EXPRESS, size);
  config.set(at + EXPRESS_FLAGS, 2, version | kind);
  config.set(at + EXPRESS_DEVICE_CAP, 4, ROLE_BASED_ERRORS);
  config.allow(at + EXPRESS_DEVICE_CONTROL, 2, 0x7fff);
  config.clear_by_ones(at + EXPRESS_DEVICE_STATUS, 2, 0xf);
  config.set(at + EXPRESS_LINK_CAP, 4, LINK_2_5_GT | LINK_X1);
  config.allow(at + EXPRESS_LINK_CONTROL, 2, 0x00d3);
  config.set(at + EXPRESS_LINK_STATUS, 2, LINK_2_5_GT | LINK_X1);
  config.set(at + EXPRESS_LINK_CAP_2, 4, LINK_2_5_GT << 1);
  config.set(at + EXPRESS_LINK_CONTROL_2, 2, LINK_2_5_GT);
  return at;
}

}  // namespace lodge::device::pci
