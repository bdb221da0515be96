// PCI root: configuration mechanism #1 (PCI Local Bus Specification 3.0, section 3.2.2.3.2) and the
// memory-mapped mechanism ECAM (PCI Express Base Specification, section 7.2.2).
//
// Modelled: bus 0 with 32 slots of 8 functions. CONFIG_ADDRESS answers 32-bit accesses only, as the
// specification asks; port 0xCF9 in its middle is the reset control register. Not modelled: bridges and
// further buses: their functions read as absent. The PIRQ routers to the two 8259 are not wired: without an
// IOAPIC (Linux: noapic) a PCI pin reaches nobody.
#include "device/pci/root.hpp"

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
  if (Function* device = std::exchange(table_[slot * functions + function], nullptr)) device->detach();
}

Root::~Root() {
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

Function* Root::find(uint32_t address) const noexcept {
  return (address >> 16 & 0xff) == 0 ? table_[address >> 8 & 0xff] : nullptr;
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
  Function* function = root_.find(address);
  if (!function) return ones(size);
  return function->config_read((address & 0xfc) + static_cast<unsigned>(offset - CONFIG_DATA), size);
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
  if (Function* function = root_.find(address))
    function->config_write((address & 0xfc) + static_cast<unsigned>(offset - CONFIG_DATA), size,
                           static_cast<uint32_t>(value));
}

// --- ECAM
// ----------------------------------------------------------------------------------------------------

// Bits 27 to 12 of the offset are bus, slot and function, where CONFIG_ADDRESS has them in bits 23 to 8.
uint64_t Root::EcamWindow::read(uint64_t offset, unsigned size) noexcept {
  Function* function = root_.find(static_cast<uint32_t>(offset >> 4));
  if (!function) return ones(size);
  auto at = static_cast<unsigned>(offset & 0xfff);
  if (size <= 4) return function->config_read(at, size);
  return function->config_read(at, 4) | uint64_t{function->config_read(at + 4, 4)} << 32;
}

void Root::EcamWindow::write(uint64_t offset, unsigned size, uint64_t value) noexcept {
  Function* function = root_.find(static_cast<uint32_t>(offset >> 4));
  if (!function) return;
  auto at = static_cast<unsigned>(offset & 0xfff);
  if (size <= 4) return function->config_write(at, size, static_cast<uint32_t>(value));
  function->config_write(at, 4, static_cast<uint32_t>(value));
  function->config_write(at + 4, 4, static_cast<uint32_t>(value >> 32));
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
