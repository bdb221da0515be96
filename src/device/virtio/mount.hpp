// Puts a VirtIO device into the machine: the options that all of them have, and the transport.
#pragma once

#include <algorithm>
#include <array>
#include <memory>

#include "device/table.hpp"
#include "device/virtio/device.hpp"

namespace lodge::device::virtio {

// The options that follow a device's own: where it sits, and what an old or odd driver needs to be kept from.
inline constexpr std::array common_options{
    OptionSchema{"slot", "addr", "auto", "PCI slot, 1 to 0x1e"},
    OptionSchema{"bus", "", "", "id of the pcie-root-port that it is behind; empty: the root bus"},
    OptionSchema{"legacy", "", "auto", "also drivers older than VirtIO 1.0: on, off or auto: on PCI"},
    OptionSchema{"packed", "", "on", "offer packed queues: on or off"},
};

template <class... Own>
constexpr auto options_with_common(Own... own) {
  std::array<OptionSchema, sizeof...(own) + common_options.size()> all{own...};
  std::copy(common_options.begin(), common_options.end(), all.begin() + sizeof...(own));
  return all;
}

// For devices that never had a legacy interface.
template <class... Own>
constexpr auto options_of_modern(Own... own) {
  std::array<OptionSchema, sizeof...(own) + 3> all{own..., common_options[0], common_options[1],
                                                   common_options[3]};
  return all;
}

RingFeatures ring_features(const DeviceOptions& options);

// Who serves the queues: the machine's loop, or a thread of the device's own.
enum class Served { by_machine, by_itself };

// `device` in a PCI function of its own or, on a machine without PCI, in a window of registers. Throws
// UsageError when the slot is taken, or when an option needs PCI and there is none.
std::unique_ptr<MountedDevice> mount(const DeviceContext& context, const DeviceOptions& options,
                                     std::unique_ptr<Device> device, Served served = Served::by_machine);

// The number of the place that a device with these options gets: differs between those of a machine.
unsigned place_of(const DeviceContext& context, const DeviceOptions& options);

// The rows of this folder.
std::span<const DeviceDescriptor> rows() noexcept;

}  // namespace lodge::device::virtio
