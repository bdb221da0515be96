#include "device/virtio/mount.hpp"

#include <fmt/format.h>

#include "device/pci/root.hpp"
#include "device/virtio/pci.hpp"

namespace lodge::device::virtio {

namespace {

class MountedPci final : public MountedDevice {
 public:
  MountedPci(const DeviceContext& context, unsigned slot, std::unique_ptr<Device> device, bool transitional,
             Served served)
      : root_(context.pci),
        slot_(slot),
        own_loop_(served == Served::by_itself ? std::make_unique<EventLoop>(fmt::format(
                                                    "lodge-{}", device->description().name.substr(7)))
                                              : nullptr),
        transport_(std::move(device), {context.msi, context.doorbells}, transitional) {
    transport_.device().attach_loop(own_loop_ ? *own_loop_ : context.loop);
    root_.add(slot_, 0, transport_);
  }
  ~MountedPci() override { root_.remove(slot_, 0); }
  Savable* savable() noexcept override { return &transport_; }

 private:
  pci::Root& root_;
  unsigned slot_;
  std::unique_ptr<EventLoop> own_loop_;  // outlives the watches of the device
  PciTransport transport_;
};

}  // namespace

RingFeatures ring_features(const DeviceOptions& options) {
  return {.packed = options.flag("packed")};
}

std::unique_ptr<MountedDevice> mount(const DeviceContext& context, const DeviceOptions& options,
                                     std::unique_ptr<Device> device, Served served) {
  const bool automatic = options.text("slot") == "auto";
  const unsigned slot =
      automatic ? context.pci.free_slot() : static_cast<unsigned>(options.number("slot", 1, 0x1e));
  const bool transitional = has_legacy_interface(device->description().type) && options.flag("legacy");
  return std::make_unique<MountedPci>(context, slot, std::move(device), transitional, served);
}

}  // namespace lodge::device::virtio
