#include "device/virtio/mount.hpp"

#include <fmt/format.h>

#include "base/error.hpp"
#include "device/pci/root.hpp"
#include "device/virtio/mmio.hpp"
#include "device/virtio/mmio_slots.hpp"
#include "device/virtio/pci.hpp"
#include "machine/layout.hpp"

namespace lodge::device::virtio {

namespace {

// What --device says about legacy drivers; devices that never had a legacy interface have no such option.
std::string_view legacy_wish(const Device& device, const DeviceOptions& options) {
  return has_legacy_interface(device.description().type) ? std::string_view(options.text("legacy")) : "off";
}

// A loop for one device, or none.
std::unique_ptr<EventLoop> own_loop(const Device& device, Served served) {
  if (served == Served::by_machine) return nullptr;
  return std::make_unique<EventLoop>(fmt::format("lodge-{}", device.description().name.substr(7)));
}

class MountedPci final : public MountedDevice {
 public:
  // Behind `port` or, where that is null, in a slot of the root bus.
  MountedPci(const DeviceContext& context, pci::RootPort* port, unsigned slot, std::unique_ptr<Device> device,
             bool transitional, Served served)
      : root_(*context.pci),
        slot_(slot),
        own_loop_(own_loop(*device, served)),
        transport_(std::move(device), {context.msi, context.doorbells}, transitional) {
    transport_.device().attach_loop(own_loop_ ? *own_loop_ : context.loop);
    if (port) {
      transport_.become_express_endpoint();
      port->plug(transport_, context.running);
    } else {
      root_.add(slot_, 0, transport_);
    }
  }
  ~MountedPci() override {
    if (slot_ == behind_port)
      root_.unplug(transport_, false);  // the port itself may have gone before
    else
      root_.remove(slot_, 0);
  }
  Savable* savable() noexcept override { return &transport_; }
  Device* virtio_device() noexcept override { return &transport_.device(); }
  static constexpr unsigned behind_port = pci::Root::slots;

 private:
  pci::Root& root_;
  unsigned slot_;
  std::unique_ptr<EventLoop> own_loop_;  // outlives the watches of the device
  PciTransport transport_;
};

class MountedMmio final : public MountedDevice {
 public:
  MountedMmio(const DeviceContext& context, const MmioSlots::Place& place, std::unique_ptr<Device> device,
              Served served)
      : own_loop_(own_loop(*device, served)),
        transport_(std::move(device), context.virtio_mmio->line(place), context.doorbells),
        window_(context.memory, place.base, MmioTransport::window_size, transport_,
                transport_.device().description().name) {
    transport_.device().attach_loop(own_loop_ ? *own_loop_ : context.loop);
    transport_.mounted(place.base);
  }
  Savable* savable() noexcept override { return &transport_; }
  Device* virtio_device() noexcept override { return &transport_.device(); }

 private:
  std::unique_ptr<EventLoop> own_loop_;  // outlives the watches of the device
  MmioTransport transport_;
  machine::Registration window_;
};

std::unique_ptr<MountedDevice> mount_mmio(const DeviceContext& context, const DeviceOptions& options,
                                          std::unique_ptr<Device> device, Served served) {
  const auto refuse = [&](std::string_view option) {
    usage_error("{}: --machine micro has no PCI; leave the option out, or take --machine pc",
                options.spelled(option));
  };
  if (options.text("slot") != "auto") refuse("slot");
  if (!options.text("bus").empty()) refuse("bus");
  if (legacy_wish(*device, options) == "on") refuse("legacy");
  return std::make_unique<MountedMmio>(context, context.virtio_mmio->take(), std::move(device), served);
}

std::unique_ptr<MountedDevice> mount_behind_port(const DeviceContext& context, const DeviceOptions& options,
                                                 std::unique_ptr<Device> device, Served served) {
  const auto& bus = options.text("bus");
  pci::RootPort* port = context.pci->port(bus);
  if (!port) usage_error("{}: no such port; add --device pcie-root-port,id={}", options.spelled("bus"), bus);
  if (options.text("slot") != "auto")
    usage_error("{}: the port has one slot; leave slot={} out", options.spelled("bus"), options.text("slot"));
  if (legacy_wish(*device, options) == "on")
    usage_error("{}: a PCI Express port has no room for port registers; leave legacy=on out",
                options.spelled("bus"));
  return std::make_unique<MountedPci>(context, port, MountedPci::behind_port, std::move(device), false,
                                      served);
}

}  // namespace

// Slots of the root bus are 0 to 31; what is behind ports comes after them.
unsigned place_of(const DeviceContext& context, const DeviceOptions& options) {
  if (!context.pci) return context.virtio_mmio->next();
  if (const pci::RootPort* port = context.pci->port(options.text("bus")))
    return pci::Root::slots + port->number();
  if (options.text("slot") == "auto") return context.pci->free_slot();
  return static_cast<unsigned>(options.number("slot", 1, 0x1e));
}

RingFeatures ring_features(const DeviceOptions& options) {
  return {.packed = options.flag("packed")};
}

std::unique_ptr<MountedDevice> mount(const DeviceContext& context, const DeviceOptions& options,
                                     std::unique_ptr<Device> device, Served served) {
  const std::string_view legacy = legacy_wish(*device, options);
  const bool transitional = legacy == "auto" || (legacy != "off" && options.flag("legacy"));
  if (!context.pci) return mount_mmio(context, options, std::move(device), served);
  if (!options.text("bus").empty()) return mount_behind_port(context, options, std::move(device), served);
  const bool automatic = options.text("slot") == "auto";
  const unsigned slot =
      automatic ? context.pci->free_slot() : static_cast<unsigned>(options.number("slot", 1, 0x1e));
  return std::make_unique<MountedPci>(context, nullptr, slot, std::move(device), transitional, served);
}

}  // namespace lodge::device::virtio
