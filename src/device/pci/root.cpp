// PCI root: configuration mechanism #1 (PCI Local Bus Specification 3.0, section 3.2.2.3.2) and the
// memory-mapped mechanism ECAM (PCI Express Base Specification, section 7.2.2).
//
// Modelled: bus 0 with 32 slots of 8 functions, and a bus of one function behind each root port.
// CONFIG_ADDRESS answers 32-bit accesses only, as the specification asks; port 0xCF9 in its middle is the
// reset control register. Not modelled: further bridges behind a port. The PIRQ routers to the two 8259 are
// not wired: without an IOAPIC (Linux: noapic) a PCI pin reaches nobody.
#include "device/pci/root.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "machine/layout.hpp"

namespace lodge::device::pci {

namespace {

constexpr uint32_t CONFIG_ENABLE = 0x8000'0000, CONFIG_ADDRESS_MASK = 0x80ff'fffc;
constexpr uint64_t CONFIG_DATA = 4, RESET_CONTROL = 1;

uint64_t ones(unsigned size) {
  return size >= 8 ? ~uint64_t{0} : (uint64_t{1} << (size * 8)) - 1;
}

}  // namespace

Root::Root(machine::Bus& ports, machine::Bus& memory,
           const std::function<machine::Interrupt&(unsigned gsi)>& line,
           machine::RegisterWindow& reset_control)
    : ports_(ports), memory_(memory), reset_control_(reset_control) {
  for (unsigned i = 0; i < lines_.size(); i++) lines_[i] = std::make_unique<SharedLine>(line(16 + i));
}

void Root::add(unsigned slot, unsigned function, Function& device) {
  if (slot >= slots || function >= functions)
    usage_error("{}: there is no PCI slot {:x}.{:x}; slots are 0 to 1f", device.name(), slot, function);
  Function*& place = table_[slot * functions + function];
  if (place)
    usage_error("{}: PCI slot {:02x}.{:x} is taken by {}; choose another", device.name(), slot, function,
                place->name());
  unsigned pin = device.interrupt_pin();
  machine::Interrupt* input =
      pin == 0 ? nullptr : &lines_[machine::layout::pci_gsi(slot, pin - 1) - 16]->add_input();
  device.attach(ports_, memory_, input);
  place = &device;
  // A guest looks at functions 1 to 7 only when function 0 says so.
  if (function != 0 && table_[slot * functions]) table_[slot * functions]->set_multifunction();
  if (function == 0)
    for (unsigned i = 1; i < functions; i++)
      if (table_[slot * functions + i]) device.set_multifunction();
}

void Root::remove(unsigned slot, unsigned function) noexcept {
  Function* device = std::exchange(table_[slot * functions + function], nullptr);
  if (!device) return;
  for (RootPort* port : port_list_)
    if (port == device) port->unplug(false);
  std::erase(port_list_, device);
  device->detach();
}

void Root::add_port(unsigned slot, RootPort& port) {
  add(slot, 0, port);
  // The pins of a bridge's slot 0 come out at the bridge's own slot (PCI-to-PCI Bridge Architecture, 9.1).
  port.attach_child_buses(ports_, memory_, [this, slot](unsigned pin) -> machine::Interrupt& {
    return lines_[machine::layout::pci_gsi(slot, pin) - 16]->add_input();
  });
  port_list_.push_back(&port);
}

RootPort* Root::port(std::string_view id) const noexcept {
  const auto found = std::ranges::find(port_list_, id, &RootPort::id);
  return found == port_list_.end() ? nullptr : *found;
}

void Root::unplug(Function& child, bool announce) noexcept {
  for (RootPort* port : port_list_)
    if (port->holds(child)) port->unplug(announce);
}

// Ports may live longer; what is behind them has the buses and interrupt lines from here.
Root::~Root() {
  for (RootPort* port : port_list_) port->unplug(false);
  for (Function* function : table_)
    if (function) function->detach();
}

unsigned Root::free_slot() const {
  for (unsigned slot = 1; slot < slots; slot++)
    if (!table_[slot * functions]) return slot;
  usage_error("all {} PCI slots are taken; remove a --device", slots);
}

void Root::for_each(const std::function<void(unsigned, unsigned, Function&)>& visit) {
  for (unsigned i = 0; i < table_.size(); i++)
    if (table_[i]) visit(i / functions, i % functions, *table_[i]);
}

template <class Visit>
bool Root::with_function(uint32_t address, Visit visit) const {
  const unsigned bus = address >> 16 & 0xff, place = address >> 8 & 0xff;
  if (bus == 0) {
    if (table_[place]) visit(*table_[place]);
    return table_[place];
  }
  const auto port = std::ranges::find_if(port_list_, [bus](RootPort* each) { return each->owns_bus(bus); });
  return place == 0 && port != port_list_.end() && (*port)->powered() && (*port)->with_child(visit);
}

uint32_t Root::selected() const noexcept {
  std::lock_guard lock(mutex_);
  return state_.config_address;
}

// --- Mechanism #1
// --------------------------------------------------------------------------------------------

uint64_t Root::PortWindow::read(uint64_t offset, unsigned size) noexcept {
  if (offset == 0 && size == 4) return root_.selected();
  if (offset == RESET_CONTROL && size == 1) return root_.reset_control_.read(0, 1);
  uint32_t address = root_.selected();
  if (offset < CONFIG_DATA || !(address & CONFIG_ENABLE)) return ones(size);
  uint64_t value = ones(size);
  root_.with_function(address, [&](Function& function) {
    value = function.config_read((address & 0xfc) + static_cast<unsigned>(offset - CONFIG_DATA), size);
  });
  return value;
}

void Root::PortWindow::write(uint64_t offset, unsigned size, uint64_t value) noexcept {
  if (offset == 0 && size == 4) {
    std::lock_guard lock(root_.mutex_);
    root_.state_.config_address = static_cast<uint32_t>(value) & CONFIG_ADDRESS_MASK;
    return;
  }
  if (offset == RESET_CONTROL && size == 1) return root_.reset_control_.write(0, 1, value);
  uint32_t address = root_.selected();
  if (offset < CONFIG_DATA || !(address & CONFIG_ENABLE)) return;
  root_.with_function(address, [&](Function& function) {
    function.config_write((address & 0xfc) + static_cast<unsigned>(offset - CONFIG_DATA), size,
                          static_cast<uint32_t>(value));
  });
}

// --- ECAM
// ----------------------------------------------------------------------------------------------------

// Bits 27 to 12 of the offset are bus, slot and function, where CONFIG_ADDRESS has them in bits 23 to 8.
uint64_t Root::EcamWindow::read(uint64_t offset, unsigned size) noexcept {
  uint64_t value = ones(size);
  const auto at = static_cast<unsigned>(offset & 0xfff);
  root_.with_function(static_cast<uint32_t>(offset >> 4), [&](Function& function) {
    value = function.config_read(at, std::min(size, 4u));
    if (size > 4) value |= uint64_t{function.config_read(at + 4, 4)} << 32;
  });
  return value;
}

void Root::EcamWindow::write(uint64_t offset, unsigned size, uint64_t value) noexcept {
  const auto at = static_cast<unsigned>(offset & 0xfff);
  root_.with_function(static_cast<uint32_t>(offset >> 4), [&](Function& function) {
    function.config_write(at, std::min(size, 4u), static_cast<uint32_t>(value));
    if (size > 4) function.config_write(at + 4, 4, static_cast<uint32_t>(value >> 32));
  });
}

// --- Reset and saved state
// -----------------------------------------------------------------------------------

void Root::reset() noexcept {
  {
    std::lock_guard lock(mutex_);
    state_ = {};
  }
  for (Function* function : table_)
    if (function) function->reset();
}

void Root::save(nlohmann::json& json) const {
  std::lock_guard lock(mutex_);
  save_state(state_, json);
}

void Root::load(const nlohmann::json& json) {
  auto state = load_state<RootState>(json);
  std::lock_guard lock(mutex_);
  state_.config_address = state.config_address & CONFIG_ADDRESS_MASK;
}

}  // namespace lodge::device::pci
