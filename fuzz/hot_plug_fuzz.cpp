// Slots into which devices come and out of which they go while a hostile driver works: two root ports, each
// with a VirtIO function that the host plugs in, asks back, pulls out by surprise or replaces, between
// configuration writes of the port and of what is behind it, registers of functions that may have gone, rings
// that are half set up and states that are loaded at the wrong moment. Devices are made and destroyed as
// vm::Machine does it, so that what outlives its owner is seen (AddressSanitizer). Whatever happened, what
// has left leaves no window and no doorbell behind.
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <vector>

#include "base/error.hpp"
#include "device/pci/allocate.hpp"
#include "device/pci/root.hpp"
#include "device/reset.hpp"
#include "device/virtio/balloon.hpp"
#include "device/virtio/entropy.hpp"
#include "device/virtio/pci.hpp"
#include "input.hpp"
#include "machine.hpp"
#include "machine/bus.hpp"
#include "machine/layout.hpp"

namespace {

using namespace lodge;
namespace layout = machine::layout;
namespace pci = device::pci;
namespace virtio = device::virtio;

constexpr unsigned slots = 2, command = 4, first_bar = 0x10, modern_bar = 4, express_capability = 0x10,
                   power_off = 0x400;

using Input = fuzz::Bytes;

// Takes messages and doorbells, and knows which doorbells there are.
class Platform final : public machine::MsiTarget, public machine::Doorbells {
 public:
  void signal(uint64_t, uint32_t) noexcept override {}
  bool add(const machine::Doorbell& doorbell) noexcept override {
    doorbells_.push_back(doorbell);
    return true;
  }
  void remove(const machine::Doorbell& doorbell) noexcept override {
    const auto known = std::ranges::find_if(doorbells_, [&](const machine::Doorbell& each) {
      return each.address == doorbell.address && each.fd == doorbell.fd;
    });
    if (known == doorbells_.end()) std::abort();
    doorbells_.erase(known);
  }
  size_t doorbells() const { return doorbells_.size(); }

 private:
  std::vector<machine::Doorbell> doorbells_;
};

class Machine {
 public:
  Machine(machine::GuestMemory& ram, Input& input) : ram_(ram), input_(input) {
    memory_.add(layout::ecam_base, layout::ecam_size, root_.ecam_window(), "ecam");
    ports_.add(pci::Root::ports_base, pci::Root::ports_size, root_.port_window(), "pci");
    for (unsigned i = 0; i < slots; i++) {
      root_.add_port(i + 1, ports_of_root_[i]);
      ports_of_root_[i].on_release([this] { released_ = true; });
    }
    pci::assign_resources(root_);
    for (unsigned i = 0; i < slots; i++) address_[i] = layout::pci_mmio64_base + i * 0x100'0000;
  }

  void run() {
    for (int step = 0; step < 400 && !input_.empty(); step++) {
      const uint8_t operation = input_.byte();
      act(operation >> 1 & 15, operation & 1);
    }
    for (unsigned i = 0; i < slots; i++) remove(i);
    // The machine's own two windows are what is left.
    if (memory_.describe().size() != 1 || ports_.describe().size() != 1 || platform_.doorbells())
      std::abort();
  }

 private:
  void act(unsigned what, unsigned slot) {
    switch (what) {
      case 0: return plug(slot);
      case 1: return static_cast<void>(ports_of_root_[slot].ask_to_let_go());
      case 2: return remove(slot);
      case 3: return take_released();
      case 4: return power(slot, input_.byte() & 1);
      case 5: return start(slot);
      case 6: return queue(slot);
      case 7: return notify(slot);
      case 8: return keep_state(slot);
      case 9: return load_state(slot);
      case 10: return pump();
      case 11: return reset();
      case 12: return configure(slot);
      case 13: return reach_through(slot);
      default: return touch(slot, what == 15);
    }
  }

  // --- The host

  std::unique_ptr<virtio::Device> make_device() {
    if (input_.byte() & 1) return std::make_unique<virtio::Balloon>(ram_);
    return std::make_unique<virtio::Entropy>(ram_, virtio::RingFeatures{}, [](std::span<uint8_t>) {});
  }

  void plug(unsigned slot) {
    auto function = std::make_unique<virtio::PciTransport>(
        make_device(), virtio::PciTransport::Wiring{platform_, platform_}, false);
    function->become_express_endpoint();
    try {
      ports_of_root_[slot].plug(*function, input_.byte() & 1);
    } catch (const UsageError&) {
      return;  // the slot is taken
    }
    // One that was let go and not yet taken away makes room.
    functions_[slot] = std::move(function);
  }

  void remove(unsigned slot) {
    if (!functions_[slot]) return;
    root_.unplug(*functions_[slot], input_.byte() & 1);
    functions_[slot].reset();
    if (ports_of_root_[slot].occupied()) std::abort();
  }

  void take_released() {
    if (!std::exchange(released_, false)) return;
    for (unsigned i = 0; i < slots; i++)
      if (!ports_of_root_[i].occupied()) functions_[i].reset();
  }

  void pump() {
    for (const auto& function : functions_) {
      if (!function) continue;
      virtio::Device& device = function->device();
      for (unsigned i = 0; i < device.queues(); i++) {
        uint64_t count = 0;
        if (::read(device.kick_fd(i), &count, sizeof count) == sizeof count) device.kick(i);
      }
    }
  }

  void reset() {
    for (auto& port : ports_of_root_) port.unplug(false);
    root_.reset();
    released_ = true;
    take_released();
  }

  void keep_state(unsigned slot) {
    nlohmann::json port;
    ports_of_root_[slot].save(port);
    port_state_ = std::move(port);
    if (!functions_[slot]) return;
    nlohmann::json function;
    functions_[slot]->save(function);
    function_state_ = std::move(function);
  }

  // Also of the other slot, and of a device of another kind.
  void load_state(unsigned slot) {
    try {
      if (port_state_) ports_of_root_[slot].load(*port_state_);
      if (function_state_ && functions_[slot]) functions_[slot]->load(*function_state_);
    } catch (const UsageError&) {
    }
  }

  // --- The guest

  static uint64_t ecam(unsigned bus, unsigned slot, unsigned offset) {
    return layout::ecam_base + (uint64_t{bus} << 20 | slot << 15 | offset);
  }
  uint64_t port_register(unsigned slot, unsigned offset) const { return ecam(0, slot + 1, offset); }
  uint64_t child_register(unsigned slot, unsigned offset) {
    return ecam(static_cast<unsigned>(memory_.read(port_register(slot, 0x19), 1)), 0, offset);
  }
  uint64_t bar(unsigned slot, unsigned index) {
    return memory_.read(child_register(slot, first_bar + index * 4), index == modern_bar ? 8 : 4) &
           ~uint64_t{15};
  }

  // Where a capability is in the configuration space at `space`, found as a driver does; `type`: of VirtIO's.
  uint64_t capability(uint64_t space, unsigned id, unsigned type = 0) {
    uint64_t at = 0x34;
    for (int hops = 0; hops < 48; hops++) {
      at = memory_.read(space + at, 1);
      if (at < 0x40) break;
      if (memory_.read(space + at, 1) == id && (type == 0 || memory_.read(space + at + 3, 1) == type)) break;
      at++;
    }
    return space + at;
  }

  void power(unsigned slot, bool off) {
    const uint64_t at = capability(port_register(slot, 0), express_capability) + 0x18;  // Slot Control
    const uint64_t control = memory_.read(at, 2);
    memory_.write(at, 2, off ? control | power_off : control & ~uint64_t{power_off});
  }

  // BARs, bus mastering, and a driver that has agreed on features.
  void set_up(unsigned slot) {
    memory_.write(child_register(slot, first_bar + 4), 4, layout::pci_mmio_base + slot * 0x10'0000);
    memory_.write(child_register(slot, first_bar + modern_bar * 4), 8, address_[slot]);
    memory_.write(child_register(slot, command), 2, 7);
    const uint64_t common = address_[slot];
    for (const uint8_t status : {0, 1, 3}) memory_.write(common + 20, 1, status);
    memory_.write(common + 8, 4, 1);  // the upper half, for VIRTIO_F_VERSION_1
    memory_.write(common + 12, 4, 1);
    memory_.write(common + 20, 1, 11);
  }

  // What a driver does that finds a new device, or only the beginning of it.
  void start(unsigned slot) {
    const uint8_t stages = input_.byte() & 3;
    set_up(slot);
    if (stages > 0) queue(slot);
    if (stages > 1) notify(slot);
    if (stages > 2) pump();
  }

  // A split ring of four that is nearly right.
  void queue(unsigned slot) {
    const uint64_t place = input_.number(1) << 8, available = place + 64, used = place + 128;
    std::array<uint8_t, 80> ring{};
    for (size_t i = 0; i < 4; i++) {
      uint8_t* const descriptor = &ring[i * 16];
      descriptor[1] = input_.byte();                             // address
      descriptor[8] = input_.byte();                             // length
      descriptor[12] = static_cast<uint8_t>(input_.byte() & 7);  // next, write, indirect
      descriptor[14] = static_cast<uint8_t>(input_.byte() & 7);
      ring[64 + 4 + i * 2] = static_cast<uint8_t>(i);
    }
    ring[64 + 2] = static_cast<uint8_t>(input_.byte() & 7);
    ram_.write(place, ring);
    const uint64_t common = address_[slot];
    memory_.write(common + 22, 2, input_.byte() & 3);
    memory_.write(common + 24, 2, 4);
    memory_.write(common + 32, 8, place);
    memory_.write(common + 40, 8, available);
    memory_.write(common + 48, 8, used);
    memory_.write(common + 28, 2, 1);
  }

  void notify(unsigned slot) {
    const uint8_t what = input_.byte();
    if (!(what & 4)) memory_.write(address_[slot] + 20, 1, 15);  // DRIVER_OK
    memory_.write(bar(slot, modern_bar) + 0x3000 + 4 * (what & 3), 2, 0);
  }

  // VirtIO's registers through the configuration space (VirtIO 1.2, 4.1.4.9).
  void reach_through(unsigned slot) {
    const uint64_t at = capability(child_register(slot, 0), 9, 5);
    const unsigned size = 1u << (input_.byte() & 3);
    memory_.write(at + 4, 1, input_.byte() & 7);
    memory_.write(at + 8, 4, input_.number(2) & ~uint64_t{size - 1});
    memory_.write(at + 12, 4, size);
    if (input_.byte() & 1) memory_.write(at + 16, 4, input_.number(4));
    memory_.read(at + 16, 4);
  }

  // The port or what is behind it, by either mechanism.
  void configure(unsigned slot) {
    const auto offset = static_cast<unsigned>(input_.number(2) & 0xfff);
    const uint8_t how = input_.byte();
    const unsigned size = 1u << (how & 3);
    const uint64_t at =
        (how & 4 ? child_register(slot, offset) : port_register(slot, offset)) & ~uint64_t{size - 1};
    if (how & 8) {
      const uint64_t place = at - layout::ecam_base;
      ports_.write(0xcf8, 4, 0x8000'0000 | (place >> 4 & 0xff'ff00) | (place & 0xfc));
      ports_.write(0xcfc + (place & 3), std::min(size, 4u), input_.number(4));
      ports_.read(0xcfc + (place & 3), std::min(size, 4u));
    } else {
      memory_.write(at, size, input_.number(size));
      memory_.read(at, size);
    }
  }

  // Registers where they are now, or where they were before.
  void touch(unsigned slot, bool write) {
    const uint8_t where = input_.byte();
    const unsigned size = 1u << (where & 3);
    const uint64_t base = where & 4 ? bar(slot, where & 8 ? 1 : modern_bar) : address_[slot];
    if (where & 0x10) address_[slot] = bar(slot, modern_bar);
    const uint64_t at = base + (input_.number(2) & 0x3fff & ~uint64_t{size - 1});
    if (write)
      memory_.write(at, size, input_.number(size));
    else
      memory_.read(at, size);
  }

  machine::GuestMemory& ram_;
  Input& input_;
  machine::Bus ports_{"port", 0x10000}, memory_{"memory", uint64_t{1} << 52};
  fuzz::NoPower power_;
  device::ResetControl reset_{power_};
  Platform platform_;
  std::deque<fuzz::Line> lines_{24};
  std::array<pci::RootPort, slots> ports_of_root_{pci::RootPort{"a", 1}, pci::RootPort{"b", 2}};
  pci::Root root_{ports_, memory_, [this](unsigned gsi) -> machine::Interrupt& { return lines_.at(gsi); },
                  reset_};
  std::array<std::unique_ptr<virtio::PciTransport>, slots> functions_;
  std::array<uint64_t, slots> address_{};  // where the driver believes the modern registers to be
  std::optional<nlohmann::json> port_state_, function_state_;
  bool released_ = false;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static machine::GuestMemory ram(layout::MiB);
  Input input({data, size});
  Machine(ram, input).run();
  return 0;
}
