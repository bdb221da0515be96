// PCI Express root port with the identity of the ICH9's first (PCI Express Base Specification 3.1: 7.5.1.3
// type 1 header, 7.8 PCI Express capability, 6.7 hot-plug; PCI-to-PCI Bridge Architecture Specification 1.2).
//
// Modelled: bus numbers; windows that read back as written; secondary bus reset; the slot: presence detect,
// link status, power controller, attention button, hot-plug events by the interrupt pin, "no command
// completed", surprise removal allowed; a power indicator that nobody sees, because drivers that wait for the
// end of its blinking want one. Not modelled: filtering by the windows and by the port's own
// COMMAND: what lies behind decodes what its own BARs and COMMAND say; MSI of the port; error reporting
// (nothing here has errors to report); port I/O windows: functions behind a port have no port BARs.
#include "device/pci/root_port.hpp"

#include <nlohmann/json.hpp>
#include <utility>

#include "base/error.hpp"
#include "device/pci/express.hpp"

namespace lodge::device::pci {

namespace {

// Type 1 header
constexpr unsigned PRIMARY_BUS = 0x18, SECONDARY_BUS = 0x19, SUBORDINATE_BUS = 0x1a, SECONDARY_STATUS = 0x1e,
                   MEMORY_BASE = 0x20, MEMORY_LIMIT = 0x22, PREFETCHABLE_BASE = 0x24,
                   PREFETCHABLE_LIMIT = 0x26, PREFETCHABLE_BASE_UPPER = 0x28, PREFETCHABLE_LIMIT_UPPER = 0x2c,
                   BRIDGE_CONTROL = 0x3e;
constexpr uint8_t type_1 = 1;
constexpr uint16_t BRIDGE_CONTROL_RESET = 0x40, BRIDGE_CONTROL_WRITABLE = 0x0043;  // parity, SERR, reset
constexpr uint16_t WINDOW_64 = 1;
constexpr uint16_t SECONDARY_STATUS_ERRORS = 0xf900;

// PCI Express capability
constexpr unsigned LINK_CAP = EXPRESS_LINK_CAP, LINK_STATUS = EXPRESS_LINK_STATUS, SLOT_CAP = 0x14,
                   SLOT_CONTROL = 0x18, SLOT_STATUS = 0x1a, ROOT_CONTROL = 0x1c;
constexpr uint32_t LINK_ACTIVE_REPORTING = 1u << 20;
constexpr uint16_t LINK_STATUS_ACTIVE = 1u << 13;
constexpr uint32_t SLOT_BUTTON = 1u << 0, SLOT_POWER_CONTROLLER = 1u << 1, SLOT_POWER_INDICATOR = 1u << 4,
                   SLOT_SURPRISE = 1u << 5, SLOT_HOT_PLUG = 1u << 6, SLOT_NO_COMMAND_COMPLETED = 1u << 18;
constexpr unsigned slot_number_shift = 19, port_number_shift = 24;
constexpr uint16_t SLOT_CONTROL_BUTTON = 1u << 0, SLOT_CONTROL_PRESENCE = 1u << 3,
                   SLOT_CONTROL_INTERRUPT = 1u << 5, SLOT_CONTROL_POWER_OFF = 1u << 10,
                   SLOT_CONTROL_LINK = 1u << 12, SLOT_CONTROL_WRITABLE = 0x1fff;
constexpr uint16_t SLOT_BUTTON_PRESSED = 1u << 0, SLOT_PRESENCE_CHANGED = 1u << 3, SLOT_PRESENT = 1u << 6,
                   SLOT_LINK_CHANGED = 1u << 8, SLOT_EVENTS = 0x011f;

constexpr std::chrono::seconds pause_between_presses(10);

}  // namespace

RootPort::RootPort(std::string id, unsigned number)
    : Function("PCI Express root port " + id, {0x8086, 0x2940, 2, 0x060400}, 4096),
      id_(std::move(id)),
      number_(number) {
  config().set(HEADER_TYPE, 1, type_1);
  for (const unsigned at : {PRIMARY_BUS, SECONDARY_BUS, SUBORDINATE_BUS}) config().allow(at, 1, 0xff);
  config().clear_by_ones(SECONDARY_STATUS, 2, SECONDARY_STATUS_ERRORS);
  for (const unsigned at : {MEMORY_BASE, MEMORY_LIMIT, PREFETCHABLE_BASE, PREFETCHABLE_LIMIT})
    config().allow(at, 2, 0xfff0);
  for (const unsigned at : {PREFETCHABLE_BASE, PREFETCHABLE_LIMIT}) config().set(at, 2, WINDOW_64);
  for (const unsigned at : {PREFETCHABLE_BASE_UPPER, PREFETCHABLE_LIMIT_UPPER})
    config().allow(at, 4, 0xffff'ffff);
  config().allow(BRIDGE_CONTROL, 2, BRIDGE_CONTROL_WRITABLE);
  use_interrupt_pin(1);
  add_express_capability(number);
}

RootPort::~RootPort() {
  unplug(false);
}

void RootPort::add_express_capability(unsigned number) {
  express_ = pci::add_express_capability(config(), EXPRESS_ROOT_PORT_WITH_SLOT);
  config().set(express_ + LINK_CAP, 4,
               config().get(express_ + LINK_CAP, 4) | LINK_ACTIVE_REPORTING | number << port_number_shift);
  config().set(express_ + SLOT_CAP, 4,
               SLOT_BUTTON | SLOT_POWER_CONTROLLER | SLOT_POWER_INDICATOR | SLOT_SURPRISE | SLOT_HOT_PLUG |
                   SLOT_NO_COMMAND_COMPLETED | number << slot_number_shift);
  config().allow(express_ + SLOT_CONTROL, 2, SLOT_CONTROL_WRITABLE);
  config().clear_by_ones(express_ + SLOT_STATUS, 2, SLOT_EVENTS);
  config().allow(express_ + ROOT_CONTROL, 2, 0x000f);
}

// --- The slot

void RootPort::attach_child_buses(machine::Bus& ports, machine::Bus& memory,
                                  const std::function<machine::Interrupt&(unsigned pin)>& line) {
  child_ports_ = &ports;
  child_memory_ = &memory;
  for (unsigned pin = 0; pin < child_lines_.size(); pin++) child_lines_[pin] = &line(pin);
}

void RootPort::plug(Function& child, bool announce) {
  const std::lock_guard lock(slot_mutex_);
  if (child_)
    usage_error("{}: the slot of PCI root port {} is taken by {}; choose another", child.name(), id_,
                child_->name());
  const unsigned pin = child.interrupt_pin();
  child.attach(*child_ports_, *child_memory_, pin == 0 ? nullptr : child_lines_[pin - 1]);
  child_ = &child;
  show_slot(announce);
}

void RootPort::unplug(bool announce) noexcept {
  const std::lock_guard lock(slot_mutex_);
  if (child_) take_out(announce);
}

void RootPort::take_out(bool announce) noexcept {
  std::exchange(child_, nullptr)->detach();
  leaving_ = false;
  show_slot(announce);
}

bool RootPort::ask_to_let_go() noexcept {
  const std::lock_guard lock(slot_mutex_);
  if (!child_) return false;
  const auto now = std::chrono::steady_clock::now();
  if (leaving_ && now - pressed_ < pause_between_presses) return true;
  leaving_ = true;
  pressed_ = now;
  change_config(express_ + SLOT_STATUS, 2, 0, SLOT_BUTTON_PRESSED);
  update_interrupt();
  return true;
}

bool RootPort::leaving() const noexcept {
  const std::lock_guard lock(slot_mutex_);
  return leaving_;
}

bool RootPort::occupied() const noexcept {
  const std::lock_guard lock(slot_mutex_);
  return child_ != nullptr;
}

bool RootPort::holds(const Function& child) const noexcept {
  const std::lock_guard lock(slot_mutex_);
  return child_ == &child;
}

bool RootPort::powered() const noexcept {
  return !(config_value(express_ + SLOT_CONTROL, 2) & SLOT_CONTROL_POWER_OFF);
}

// What the status registers say of the slot; with `announce`, changes are events. Who plugs something in also
// presses the button: a driver listens to that one rather than to presence, and switches the power on.
void RootPort::show_slot(bool announce) noexcept {
  powered_ = powered();
  const bool was_present = config_value(express_ + SLOT_STATUS, 2) & SLOT_PRESENT;
  const bool was_active = config_value(express_ + LINK_STATUS, 2) & LINK_STATUS_ACTIVE;
  const bool present = child_ != nullptr, active = present && powered_;
  uint16_t events = 0;
  if (announce && present != was_present) events |= SLOT_PRESENCE_CHANGED;
  if (announce && present && !was_present) events |= SLOT_BUTTON_PRESSED;
  if (announce && active != was_active) events |= SLOT_LINK_CHANGED;
  change_config(express_ + SLOT_STATUS, 2, SLOT_PRESENT, (present ? SLOT_PRESENT : 0u) | events);
  change_config(express_ + LINK_STATUS, 2, LINK_STATUS_ACTIVE, active ? LINK_STATUS_ACTIVE : 0u);
  update_interrupt();
}

// The guest may have switched the slot on or off. A child that was asked to leave goes with the power; any
// other forgets what it was told and waits for the power to come back.
void RootPort::follow_power() noexcept {
  bool released = false;
  {
    const std::lock_guard lock(slot_mutex_);
    const bool off = !powered();
    if (restoring_ || off == !powered_) return;
    if (child_ && off && leaving_) {
      take_out(true);
      released = true;
    } else {
      if (child_ && off) child_->reset();
      show_slot(true);
    }
  }
  if (released && released_) released_();
}

// 6.7.3.4: the pin is high while an enabled event waits.
void RootPort::update_interrupt() noexcept {
  const std::lock_guard lock(event_mutex_);
  const uint32_t control = config_value(express_ + SLOT_CONTROL, 2);
  const uint32_t status = config_value(express_ + SLOT_STATUS, 2);
  const bool event = (status & SLOT_BUTTON_PRESSED && control & SLOT_CONTROL_BUTTON) ||
                     (status & SLOT_PRESENCE_CHANGED && control & SLOT_CONTROL_PRESENCE) ||
                     (status & SLOT_LINK_CHANGED && control & SLOT_CONTROL_LINK);
  set_intx(event && control & SLOT_CONTROL_INTERRUPT);
}

// --- Configuration

void RootPort::assign(uint8_t bus, Window memory, Window prefetchable) noexcept {
  assign_register(SECONDARY_BUS, 1, bus);
  assign_register(SUBORDINATE_BUS, 1, bus);
  // A window whose base lies above its limit is closed.
  const auto set = [this](unsigned base_at, unsigned limit_at, const Window& window) {
    const uint64_t base = window.size ? window.base : 0xfff0'0000;
    const uint64_t limit = window.size ? window.base + window.size - 1 : 0;
    assign_register(base_at, 2, static_cast<uint32_t>(base >> 16 & 0xfff0));
    assign_register(limit_at, 2, static_cast<uint32_t>(limit >> 16 & 0xfff0));
    return std::pair(base >> 32, limit >> 32);
  };
  set(MEMORY_BASE, MEMORY_LIMIT, memory);
  const auto [base, limit] = set(PREFETCHABLE_BASE, PREFETCHABLE_LIMIT, prefetchable);
  assign_register(PREFETCHABLE_BASE_UPPER, 4, static_cast<uint32_t>(base));
  assign_register(PREFETCHABLE_LIMIT_UPPER, 4, static_cast<uint32_t>(limit));
  enable_decoding();
}

bool RootPort::owns_bus(unsigned bus) const noexcept {
  return bus != 0 && bus == config_value(SECONDARY_BUS, 1);
}

void RootPort::config_written(unsigned offset, unsigned size) noexcept {
  const auto touches = [=](unsigned first, unsigned length) {
    return offset < first + length && first < offset + size;
  };
  if (touches(BRIDGE_CONTROL, 2) && config_value(BRIDGE_CONTROL, 2) & BRIDGE_CONTROL_RESET)
    with_child([](Function& child) { child.reset(); });
  if (touches(express_ + SLOT_CONTROL, 2)) follow_power();
  if (touches(express_ + SLOT_CONTROL, 4)) update_interrupt();
}

void RootPort::reset() noexcept {
  Function::reset();
  const std::lock_guard lock(slot_mutex_);
  if (child_) child_->reset();
  leaving_ = false;
  show_slot(false);
}

// --- Saved state: what is plugged in belongs to the configuration.

void RootPort::save(nlohmann::json& json) const {
  nlohmann::json function;
  Function::save(function);
  save_state(RootPortState{.leaving = leaving()}, json);
  json["function"] = std::move(function);
}

void RootPort::load(const nlohmann::json& json) {
  const auto state = load_state<RootPortState>(json);
  if (!json.contains("function")) usage_error("saved state of {}: its configuration is missing", name());
  const auto restoring = [this](bool begin) {
    const std::lock_guard lock(slot_mutex_);
    restoring_ = begin;
  };
  restoring(true);
  try {
    Function::load(json["function"]);
  } catch (const UsageError&) {
    restoring(false);
    throw;
  }
  const std::lock_guard lock(slot_mutex_);
  restoring_ = false;
  leaving_ = state.leaving && child_;
  show_slot(false);
}

}  // namespace lodge::device::pci
