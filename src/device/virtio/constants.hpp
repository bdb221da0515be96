// Numbers of the VirtIO specification 1.2 (OASIS Committee Specification 01, 2022-07-01), by section.
#pragma once

#include <cstdint>

namespace lodge::device::virtio {

// 2.1 Device status
inline constexpr uint8_t ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8, DEVICE_NEEDS_RESET = 64,
                         FAILED = 128;

constexpr uint64_t feature(unsigned bit) {
  return uint64_t{1} << bit;
}
// 6 Reserved feature bits
inline constexpr uint64_t F_INDIRECT_DESC = feature(28), F_EVENT_IDX = feature(29), F_VERSION_1 = feature(32),
                          F_RING_PACKED = feature(34), F_IN_ORDER = feature(35),
                          F_NOTIFICATION_DATA = feature(38), F_RING_RESET = feature(40);
// 6.3 Legacy interface: the only bits that a driver without F_VERSION_1 can see are 0 to 31. Bit 27 says that
// descriptors may be framed freely, which our devices allow.
inline constexpr uint64_t F_ANY_LAYOUT = feature(27);

// 2.7.5 and 2.8.1 Descriptor flags; the last two in packed rings only.
inline constexpr uint16_t DESC_NEXT = 1, DESC_WRITE = 2, DESC_INDIRECT = 4, DESC_AVAIL = 1 << 7,
                          DESC_USED = 1 << 15;

// 5 Device types
enum class DeviceType : uint16_t {
  network = 1,
  block = 2,
  console = 3,
  entropy = 4,
  balloon = 5,
  input = 18,
  socket = 19,
  file_system = 26,
};
// 4.1.2.1 Only the first devices have an identity that drivers older than VirtIO 1.0 know.
constexpr bool has_legacy_interface(DeviceType type) noexcept {
  return type <= DeviceType::balloon;
}

}  // namespace lodge::device::virtio
