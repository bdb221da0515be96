#include "device/pci/mount.hpp"

#include <array>

#include "base/error.hpp"
#include "device/pci/root.hpp"
#include "device/pci/root_port.hpp"

namespace lodge::device::pci {

namespace {

class MountedRootPort final : public MountedDevice {
 public:
  MountedRootPort(Root& root, unsigned slot, const std::string& id)
      : root_(root), slot_(slot), port_(id, root.next_port()) {
    root_.add_port(slot_, port_);
  }
  ~MountedRootPort() override { root_.remove(slot_, 0); }
  Savable* savable() noexcept override { return &port_; }

 private:
  Root& root_;
  unsigned slot_;
  RootPort port_;
};

std::unique_ptr<MountedDevice> make_root_port(const DeviceContext& context, const DeviceOptions& options) {
  if (!context.pci) usage_error("{}: --machine micro has no PCI; take --machine pc", options.spelled());
  const std::string& id = options.text("id");
  if (id.empty()) usage_error("{}: give it a name, for example id=port1", options.spelled());
  if (context.pci->port(id)) usage_error("{}: the name is given twice", options.spelled("id"));
  const unsigned slot = options.text("slot") == "auto"
                            ? context.pci->free_slot()
                            : static_cast<unsigned>(options.number("slot", 1, 0x1e));
  return std::make_unique<MountedRootPort>(*context.pci, slot, id);
}

constexpr std::array root_port_options{
    OptionSchema{"id", "", "", "a name, for bus= of the device behind it"},
    OptionSchema{"slot", "addr", "auto", "PCI slot, 1 to 0x1e"},
};

constexpr std::array table{
    DeviceDescriptor{"pcie-root-port", "a PCI Express port with a hot-plug slot for one device (bus=ID)",
                     root_port_options, make_root_port, true},
};

}  // namespace

std::span<const DeviceDescriptor> rows() noexcept {
  return table;
}

}  // namespace lodge::device::pci
