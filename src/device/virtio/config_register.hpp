// A device's configuration as a transport's register window sees it: integers of 1 to 8 bytes.
#pragma once

#include <array>

#include "device/virtio/device.hpp"

namespace lodge::device::virtio {

inline uint64_t read_config_register(Device& device, uint64_t offset, unsigned size) noexcept {
  std::array<uint8_t, 8> bytes{};
  device.read_config(static_cast<unsigned>(offset), {bytes.data(), size});
  uint64_t value = 0;
  for (unsigned i = 0; i < size; i++) value |= uint64_t{bytes[i]} << (i * 8);
  return value;
}

inline void write_config_register(Device& device, uint64_t offset, unsigned size, uint64_t value) noexcept {
  std::array<uint8_t, 8> bytes{};
  for (unsigned i = 0; i < size; i++) bytes[i] = static_cast<uint8_t>(value >> (i * 8));
  device.write_config(static_cast<unsigned>(offset), {bytes.data(), size});
}

}  // namespace lodge::device::virtio
