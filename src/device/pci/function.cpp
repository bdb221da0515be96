// PCI function, type 0 header (PCI Local Bus Specification 3.0, section 6.2).
//
// Modelled: identity, COMMAND (I/O, memory, bus master, INTx disable), STATUS (INTx, capability list), sizing
// and moving of BARs with immediate effect on the machine's buses, interrupt line and pin. A BAR that the
// guest puts where something else is, or outside the bus, is simply not decoded; it is tried again at the
// function's next configuration write. So is address 0, which means "unassigned". Not modelled: parity and
// error reporting (nothing here has errors to report), expansion ROMs.
#include "device/pci/function.hpp"

#include <bit>
#include <nlohmann/json.hpp>
#include <stdexcept>

#include "base/error.hpp"

namespace lodge::device::pci {

namespace {

constexpr uint16_t COMMAND_WRITABLE = 0x0547;  // I/O, memory, master, parity, SERR, INTx disable
constexpr uint32_t BAR_IO = 0x1, BAR_64 = 0x4, BAR_PREFETCHABLE = 0x8;

bool is_64(BarKind kind) {
  return kind == BarKind::memory64 || kind == BarKind::memory64_prefetchable;
}
unsigned bar_offset(unsigned index) {
  return BAR0 + index * 4;
}

}  // namespace

Function::Function(std::string name, const Identity& identity, unsigned config_size)
    : name_(std::move(name)), config_(config_size) {
  config_.set(VENDOR_ID, 2, identity.vendor);
  config_.set(DEVICE_ID, 2, identity.device);
  config_.set(REVISION_ID, 1, identity.revision);
  config_.set(CLASS_CODE, 3, identity.class_code);
  config_.set(SUBSYSTEM_VENDOR_ID, 2, identity.subsystem_vendor);
  config_.set(SUBSYSTEM_ID, 2, identity.subsystem);
  config_.allow(COMMAND, 2, COMMAND_WRITABLE);
  config_.allow(CACHE_LINE_SIZE, 1, 0xff);
  config_.allow(INTERRUPT_LINE, 1, 0xff);
}

void Function::add_bar(unsigned index, BarKind kind, uint64_t size, machine::RegisterWindow& window) {
  bool wide = is_64(kind);
  if (index + (wide ? 1 : 0) >= bars_.size() || bars_[index] || !std::has_single_bit(size) ||
      size < (kind == BarKind::io ? 4u : 16u) || (!wide && size > 0x8000'0000))
    throw std::logic_error("PCI function " + name_ + ": impossible BAR");
  bars_[index] = Bar{kind, size, &window, std::nullopt};
  uint64_t mask = ~(size - 1);
  uint32_t type = kind == BarKind::io ? BAR_IO : wide ? BAR_64 : 0;
  if (kind == BarKind::memory64_prefetchable) type |= BAR_PREFETCHABLE;
  config_.set(bar_offset(index), 4, type);
  config_.allow(bar_offset(index), 4, static_cast<uint32_t>(mask));
  if (wide) config_.allow(bar_offset(index + 1), 4, static_cast<uint32_t>(mask >> 32));
}

void Function::use_interrupt_pin(unsigned pin) {
  config_.set(INTERRUPT_PIN, 1, pin);
}
unsigned Function::interrupt_pin() const noexcept {
  return config_.get(INTERRUPT_PIN, 1);
}

void Function::set_multifunction() noexcept {
  std::lock_guard lock(mutex_);
  config_.set(HEADER_TYPE, 1, config_.get(HEADER_TYPE, 1) | 0x80);
  if (!initial_.empty()) initial_[HEADER_TYPE] |= 0x80;
}

void Function::attach(machine::Bus& ports, machine::Bus& memory, machine::Interrupt* pin) {
  std::lock_guard lock(mutex_);
  ports_ = &ports;
  memory_ = &memory;
  pin_ = pin;
  initial_.assign(config_.bytes().begin(), config_.bytes().end());
}

void Function::detach() noexcept {
  std::lock_guard map_lock(map_mutex_);
  for (unsigned i = 0; i < bars_.size(); i++) unmap(i);
  std::lock_guard lock(mutex_);
  if (pin_) pin_->set(false);
  ports_ = memory_ = nullptr;
  pin_ = nullptr;
}

// --- Base address registers
// ----------------------------------------------------------------------------------

machine::Bus& Function::bus_of(const Bar& bar) const noexcept {
  return bar.kind == BarKind::io ? *ports_ : *memory_;
}

// Where the registers say the BAR is. With mutex_ held.
std::optional<uint64_t> Function::wanted_address(unsigned index) const noexcept {
  const Bar& bar = *bars_[index];
  uint32_t enable = bar.kind == BarKind::io ? COMMAND_IO : COMMAND_MEMORY;
  if (!(config_.get(COMMAND, 2) & enable)) return std::nullopt;
  uint64_t address = config_.get(bar_offset(index), 4);
  if (is_64(bar.kind)) address |= uint64_t{config_.get(bar_offset(index + 1), 4)} << 32;
  address &= ~(bar.size - 1);  // the type bits lie below the smallest size
  if (address == 0) return std::nullopt;
  return address;
}

// Everything that moves leaves its old place before anything takes a new one: two BARs may swap.
void Function::update_mappings() noexcept {
  std::lock_guard map_lock(map_mutex_);
  std::array<std::optional<uint64_t>, 6> wanted;
  {
    std::lock_guard lock(mutex_);
    if (!ports_) return;
    for (unsigned i = 0; i < bars_.size(); i++)
      if (bars_[i]) wanted[i] = wanted_address(i);
  }
  for (unsigned i = 0; i < bars_.size(); i++)
    if (bars_[i] && bars_[i]->mapped != wanted[i]) unmap(i);
  for (unsigned i = 0; i < bars_.size(); i++) {
    auto& bar = bars_[i];
    if (bar && wanted[i] && !bar->mapped &&
        bus_of(*bar).try_add(*wanted[i], bar->size, *bar->window, name_)) {
      bar->mapped = wanted[i];
      bar_mapped(i, *wanted[i]);
    }
  }
}

// With map_mutex_ held.
void Function::unmap(unsigned index) noexcept {
  auto& bar = bars_[index];
  if (!bar || !bar->mapped) return;
  bar_unmapped(index, *bar->mapped);
  bus_of(*bar).remove(*bar->mapped);
  bar->mapped.reset();
}

// --- What firmware sets up
// -----------------------------------------------------------------------------------

std::vector<Function::BarNeed> Function::bar_needs() const {
  std::vector<BarNeed> needs;
  for (unsigned i = 0; i < bars_.size(); i++)
    if (bars_[i]) needs.push_back({i, bars_[i]->kind, bars_[i]->size});
  return needs;
}

// A value that reset() returns to as well: there is no firmware that would run again.
void Function::set_initial(unsigned offset, unsigned size, uint32_t value) noexcept {
  config_write(offset, size, value);
  std::lock_guard lock(mutex_);
  for (unsigned i = offset; i < offset + size && i < initial_.size(); i++)
    initial_[i] = static_cast<uint8_t>(config_.get(i, 1));
}

void Function::assign_bar(unsigned index, uint64_t address) noexcept {
  set_initial(bar_offset(index), 4, static_cast<uint32_t>(address));
  if (is_64(bars_[index]->kind)) set_initial(bar_offset(index + 1), 4, static_cast<uint32_t>(address >> 32));
}

void Function::assign_interrupt_line(uint8_t line) noexcept {
  set_initial(INTERRUPT_LINE, 1, line);
}

void Function::enable_decoding() noexcept {
  set_initial(COMMAND, 2, config_read(COMMAND, 2) | COMMAND_IO | COMMAND_MEMORY);
}

// --- Configuration accesses and the pin
// ----------------------------------------------------------------------

uint32_t Function::config_read(unsigned offset, unsigned size) noexcept {
  config_reading(offset, size);
  std::lock_guard lock(mutex_);
  return config_.read(offset, size);
}

uint32_t Function::config_value(unsigned offset, unsigned size) const noexcept {
  std::lock_guard lock(mutex_);
  return config_.get(offset, size);
}

void Function::set_config_value(unsigned offset, unsigned size, uint32_t value) noexcept {
  std::lock_guard lock(mutex_);
  config_.set(offset, size, value);
}

void Function::change_config(unsigned offset, unsigned size, uint32_t clear, uint32_t set) noexcept {
  std::lock_guard lock(mutex_);
  config_.set(offset, size, (config_.get(offset, size) & ~clear) | set);
}

void Function::config_write(unsigned offset, unsigned size, uint32_t value) noexcept {
  {
    std::lock_guard lock(mutex_);
    config_.write(offset, size, value);
    update_pin();
  }
  auto touches = [=](unsigned first, unsigned length) {
    return offset < first + length && first < offset + size;
  };
  if (touches(COMMAND, 2) || touches(BAR0, 24)) update_mappings();
  config_written(offset, size);
}

// With mutex_ held.
void Function::update_pin() noexcept {
  auto status = static_cast<uint16_t>(config_.get(STATUS, 2));
  config_.set(STATUS, 2, intx_ ? status | STATUS_INTX : status & ~STATUS_INTX);
  if (pin_) pin_->set(intx_ && !(config_.get(COMMAND, 2) & COMMAND_INTX_DISABLE));
}

void Function::set_intx(bool level) noexcept {
  std::lock_guard lock(mutex_);
  if (level == intx_) return;
  intx_ = level;
  update_pin();
}

void Function::reset() noexcept {
  {
    std::lock_guard lock(mutex_);
    if (!initial_.empty()) config_.restore(initial_);
    intx_ = false;
    update_pin();
  }
  update_mappings();
}

// --- Saved state
// ---------------------------------------------------------------------------------------------

void Function::save(nlohmann::json& json) const {
  std::lock_guard lock(mutex_);
  FunctionState state;
  state.config.assign(config_.bytes().begin(), config_.bytes().end());
  state.intx = intx_;
  save_state(std::move(state), json);
}

void Function::load(const nlohmann::json& json) {
  auto state = load_state<FunctionState>(json);
  {
    std::lock_guard lock(mutex_);
    if (!config_.restore(state.config))
      usage_error("saved state of {}: configuration space of {} bytes, expected {}", name_,
                  state.config.size(), config_.size());
    intx_ = state.intx;
    update_pin();
  }
  update_mappings();
  config_written(0, config_.size());
}

}  // namespace lodge::device::pci
