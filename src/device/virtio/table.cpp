// The rows of the VirtIO devices.
#include "device/virtio/entropy.hpp"
#include "device/virtio/mount.hpp"

namespace lodge::device::virtio {

namespace {

constexpr auto entropy_options = options_with_common();

constexpr std::array table{
    DeviceDescriptor{
        "virtio-rng", "random numbers from the host (Linux: /dev/hwrng)", entropy_options,
        [](const DeviceContext& context, const DeviceOptions& options) -> std::unique_ptr<MountedDevice> {
          return mount(context, options, std::make_unique<Entropy>(context.ram, ring_features(options)));
        }},
};

}  // namespace

std::span<const DeviceDescriptor> rows() noexcept {
  return table;
}

}  // namespace lodge::device::virtio
