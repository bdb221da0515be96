// VirtIO over PCI (VirtIO 1.2, section 4.1).
//
// Modelled: common, notification, ISR and device-specific structures in BAR 4 (4.1.4.3 to 4.1.4.6), the
// configuration access capability (4.1.4.9), MSI-X with a vector for each queue and one for changes of the
// configuration in BAR 1, INTx otherwise; ring reset (4.1.4.3.1). Notifications are doorbells where the
// accelerator takes them; the queue is told by the address, so what is written (4.1.5.2, also with
// notification data) does not matter. Transitional functions have the legacy registers (4.1.4.10) in BAR 0,
// ports. Not modelled: shared memory regions (no device here has one), NOTIF_CONFIG_DATA.
#include "device/virtio/pci.hpp"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "device/pci/express.hpp"
#include "device/virtio/config_register.hpp"

namespace lodge::device::virtio {

namespace {

constexpr uint16_t virtio_vendor = 0x1af4;
constexpr unsigned LEGACY_BAR = 0, MSIX_BAR = 1, MODERN_BAR = 4;

// Where the structures are in MODERN_BAR: a page each, so that a hypervisor in the guest could map them
// apart.
constexpr uint32_t COMMON = 0x0000, ISR = 0x1000, DEVICE = 0x2000, NOTIFY = 0x3000, part_size = 0x1000,
                   modern_size = 0x4000;
constexpr uint32_t notify_multiplier = 4;

// 4.1.4 Capabilities
constexpr uint8_t CAP_VENDOR = 0x09;
enum CfgType : uint8_t { COMMON_CFG = 1, NOTIFY_CFG = 2, ISR_CFG = 3, DEVICE_CFG = 4, PCI_CFG = 5 };
constexpr unsigned CAP_LENGTH = 2, CAP_TYPE = 3, CAP_BAR = 4, CAP_OFFSET = 8, CAP_SIZE = 12, CAP_EXTRA = 16;

// 4.1.4.3 Common configuration
constexpr unsigned DEVICE_FEATURE_SELECT = 0, DEVICE_FEATURE = 4, DRIVER_FEATURE_SELECT = 8,
                   DRIVER_FEATURE = 12, CONFIG_VECTOR = 16, NUM_QUEUES = 18, DEVICE_STATUS = 20,
                   CONFIG_GENERATION = 21, QUEUE_SELECT = 22, QUEUE_SIZE = 24, QUEUE_VECTOR = 26,
                   QUEUE_ENABLE = 28, QUEUE_NOTIFY_OFF = 30, QUEUE_DESC = 32, QUEUE_DRIVER = 40,
                   QUEUE_DEVICE = 48, QUEUE_NOTIFY_DATA = 56, QUEUE_RESET = 58;

// 4.1.4.10 Legacy interface
constexpr unsigned LEGACY_DEVICE_FEATURES = 0, LEGACY_DRIVER_FEATURES = 4, LEGACY_QUEUE_ADDRESS = 8,
                   LEGACY_QUEUE_SIZE = 12, LEGACY_QUEUE_SELECT = 14, LEGACY_QUEUE_NOTIFY = 16,
                   LEGACY_STATUS = 18, LEGACY_ISR = 19, LEGACY_CONFIG_VECTOR = 20, LEGACY_QUEUE_VECTOR = 22;
constexpr uint64_t legacy_size = 128;
constexpr uint64_t legacy_page = 4096;  // 2.7.2: alignment of the used ring and unit of addresses

constexpr uint8_t ISR_QUEUE = 1, ISR_CONFIG = 2;

// The field of the common configuration that byte `at` belongs to: its offset and its width.
std::pair<unsigned, unsigned> field_at(unsigned at) {
  if (at < CONFIG_VECTOR) return {at & ~3u, 4};
  if (at == DEVICE_STATUS || at == CONFIG_GENERATION) return {at, 1};
  if (at >= QUEUE_DESC && at < QUEUE_NOTIFY_DATA) return {at & ~7u, 8};
  return {at & ~1u, 2};
}

pci::Identity identity_of(const Device& device, bool transitional) {
  const auto type = static_cast<uint16_t>(device.description().type);
  // 4.1.2.1, with the table of transitional device IDs.
  constexpr std::array<uint16_t, 6> transitional_ids = {0, 0x1000, 0x1001, 0x1003, 0x1005, 0x1002};
  if (transitional)
    return {virtio_vendor, transitional_ids[type], 0, device.description().pci_class, virtio_vendor, type};
  const auto id = static_cast<uint16_t>(0x1040 + type);
  return {virtio_vendor, id, 1, device.description().pci_class, virtio_vendor, id};
}

}  // namespace

PciTransport::PciTransport(std::unique_ptr<Device> device, const Wiring& wiring, bool transitional)
    : Function(device->description().name, identity_of(*device, transitional)),
      doorbells_(wiring.doorbells),
      device_(std::move(device)),
      msix_(device_->queues() + 1, wiring.msi),
      queue_vectors_(device_->queues(), pci::Msix::NO_VECTOR) {
  if (transitional) add_bar(LEGACY_BAR, pci::BarKind::io, legacy_size, legacy_);
  add_bar(MSIX_BAR, pci::BarKind::memory32, pci::Msix::window_size, msix_.window());
  add_bar(MODERN_BAR, pci::BarKind::memory64_prefetchable, modern_size, modern_);
  use_interrupt_pin(1);
  add_capabilities();
  device_->connect(*this);
}

void PciTransport::become_express_endpoint() {
  pci::add_express_capability(config(), pci::EXPRESS_ENDPOINT);
}

PciTransport::~PciTransport() {
  detach();
  device_->detach_loop();
  device_->reset();  // what still happens on threads of the device's own interrupts nobody
}

void PciTransport::add_capabilities() {
  const auto add = [this](uint8_t type, uint32_t offset, uint32_t size, unsigned extra) {
    const unsigned at = config().add_capability(CAP_VENDOR, CAP_EXTRA + extra);
    config().set(at + CAP_LENGTH, 1, CAP_EXTRA + extra);
    config().set(at + CAP_TYPE, 1, type);
    config().set(at + CAP_BAR, 1, MODERN_BAR);
    config().set(at + CAP_OFFSET, 4, offset);
    config().set(at + CAP_SIZE, 4, size);
    return at;
  };
  add(COMMON_CFG, COMMON, part_size, 0);
  add(ISR_CFG, ISR, part_size, 0);
  add(DEVICE_CFG, DEVICE, part_size, 0);
  const unsigned notify = add(NOTIFY_CFG, NOTIFY, part_size, 4);
  config().set(notify + CAP_EXTRA, 4, notify_multiplier);
  cfg_capability_ = add(PCI_CFG, 0, 0, 4);
  config().allow(cfg_capability_ + CAP_BAR, 1, 0xff);
  config().allow(cfg_capability_ + CAP_OFFSET, 4, 0xffff'ffff);
  config().allow(cfg_capability_ + CAP_SIZE, 4, 0xffff'ffff);
  config().allow(cfg_capability_ + CAP_EXTRA, 4, 0xffff'ffff);
  msix_.add_capability(config(), MSIX_BAR, 0);
}

// --- Configuration space

// 4.1.4.9: the window that the capability names now, when the access is possible.
bool PciTransport::cfg_access(machine::RegisterWindow*& window, uint64_t& offset, unsigned& size) noexcept {
  const auto bar = config_value(cfg_capability_ + CAP_BAR, 1);
  offset = config_value(cfg_capability_ + CAP_OFFSET, 4);
  size = config_value(cfg_capability_ + CAP_SIZE, 4);
  if ((size != 1 && size != 2 && size != 4) || offset % size != 0) return false;
  if (bar != MODERN_BAR || offset + size > modern_size) return false;
  window = &modern_;
  return true;
}

void PciTransport::config_written(unsigned offset, unsigned size) noexcept {
  const auto touches = [=](unsigned first, unsigned length) {
    return offset < first + length && first < offset + size;
  };
  if (touches(msix_.capability() + 2, 2))
    msix_.control_written(static_cast<uint16_t>(config_value(msix_.capability() + 2, 2)));
  const unsigned data = cfg_capability_ + CAP_EXTRA;
  machine::RegisterWindow* window = nullptr;
  uint64_t at = 0;
  unsigned width = 0;
  // Only an access to the data itself: a restored configuration space repeats no register write.
  if (offset == data && size <= 4 && cfg_access(window, at, width))
    window->write(at, width, config_value(data, 4));
}

void PciTransport::config_reading(unsigned offset, unsigned size) noexcept {
  const unsigned data = cfg_capability_ + CAP_EXTRA;
  machine::RegisterWindow* window = nullptr;
  uint64_t at = 0;
  unsigned width = 0;
  if (offset < data + 4 && data < offset + size && cfg_access(window, at, width))
    set_config_value(data, 4, static_cast<uint32_t>(window->read(at, width)));
}

void PciTransport::ring_doorbells(unsigned bar, uint64_t address, bool add) noexcept {
  if (!add) {
    std::erase_if(mounted_doorbells_, [&](const machine::Doorbell& doorbell) {
      if (doorbell.port != (bar == LEGACY_BAR) || bar == MSIX_BAR) return false;
      doorbells_.remove(doorbell);
      return true;
    });
    return;
  }
  if (device_->description().quick && doorbells_.windows_are_cheaper()) return;
  for (unsigned queue = 0; queue < device_->queues(); queue++) {
    machine::Doorbell doorbell{};
    doorbell.fd = device_->kick_fd(queue);
    if (bar == LEGACY_BAR) {
      doorbell.port = true;
      doorbell.address = address + LEGACY_QUEUE_NOTIFY;
      doorbell.size = 2;
      doorbell.match = queue;
    } else if (bar == MODERN_BAR) {
      doorbell.address = address + NOTIFY + uint64_t{queue} * notify_multiplier;
    } else {
      return;
    }
    if (doorbells_.add(doorbell)) mounted_doorbells_.push_back(doorbell);
  }
}

// --- Interrupts

uint16_t PciTransport::queue_vector(unsigned queue) const noexcept {
  const std::lock_guard lock(register_mutex_);
  return queue_vectors_[queue];
}

void PciTransport::queue_interrupt(unsigned queue) noexcept {
  interrupt(queue_vector(queue), ISR_QUEUE);
}

void PciTransport::config_interrupt() noexcept {
  interrupt(registers().config_vector, ISR_CONFIG);
}

void PciTransport::interrupt(uint16_t vector, uint8_t isr_bit) noexcept {
  if (msix_.enabled()) return msix_.signal(vector);
  const std::lock_guard lock(register_mutex_);
  registers_.isr |= isr_bit;
  set_intx(true);
}

// 4.1.4.5: reading acknowledges, and takes the line down.
uint8_t PciTransport::take_isr() noexcept {
  const std::lock_guard lock(register_mutex_);
  const uint8_t isr = std::exchange(registers_.isr, uint8_t{0});
  set_intx(false);
  return isr;
}

uint16_t PciTransport::checked_vector(uint64_t vector) const noexcept {
  // 4.1.5.1.2.1: a vector that does not exist reads back as none.
  return vector < msix_.vectors() ? static_cast<uint16_t>(vector) : pci::Msix::NO_VECTOR;
}

PciState PciTransport::registers() const noexcept {
  const std::lock_guard lock(register_mutex_);
  return registers_;
}

// --- Modern registers

uint64_t PciTransport::modern_read(uint64_t offset, unsigned size) noexcept {
  const uint64_t within = offset % part_size;
  switch (offset - within) {
    case ISR: return within == 0 ? take_isr() : 0;
    case COMMON: {
      // Fields are read whole; a narrower or wider access sees the bytes that lie there.
      uint64_t value = 0;
      for (unsigned i = 0; i < size;) {
        const auto at = static_cast<unsigned>(within + i);
        const auto [first, width] = field_at(at);
        const uint64_t field = first < QUEUE_RESET + 2 ? common_read(first) : 0;
        for (unsigned byte = at - first; byte < width && i < size; byte++, i++)
          value |= (field >> (byte * 8) & 0xff) << (i * 8);
      }
      return value;
    }
    case DEVICE: return read_config_register(*device_, within, size);
    default: return 0;
  }
}

void PciTransport::modern_write(uint64_t offset, unsigned size, uint64_t value) noexcept {
  const uint64_t within = offset % part_size;
  switch (offset - within) {
    case COMMON: common_write(static_cast<unsigned>(within), size, value); break;
    case DEVICE: write_config_register(*device_, within, size, value); break;
    case NOTIFY:
      if (within / notify_multiplier < device_->queues())
        device_->notified(static_cast<unsigned>(within / notify_multiplier));
      break;
    default: break;
  }
}

uint64_t PciTransport::common_read(unsigned offset) noexcept {
  const PciState now = registers();
  const bool selected = now.queue_select < device_->queues();
  switch (offset) {
    case DEVICE_FEATURE_SELECT: return now.device_feature_select;
    case DEVICE_FEATURE:
      return now.device_feature_select > 1
                 ? 0
                 : static_cast<uint32_t>(device_->features(false) >> (now.device_feature_select * 32));
    case DRIVER_FEATURE_SELECT: return now.driver_feature_select;
    case DRIVER_FEATURE:
      return now.driver_feature_select > 1
                 ? 0
                 : static_cast<uint32_t>(now.driver_features >> (now.driver_feature_select * 32));
    case CONFIG_VECTOR: return now.config_vector;
    case NUM_QUEUES: return device_->queues();
    case DEVICE_STATUS: return device_->status();
    case CONFIG_GENERATION: return device_->config_generation();
    case QUEUE_SELECT: return now.queue_select;
    default: break;
  }
  if (!selected) return 0;  // 4.1.4.3.1: size 0 says that there is no such queue
  const QueueSetup setup = device_->queue_setup(now.queue_select);
  switch (offset) {
    case QUEUE_SIZE: return setup.size;
    case QUEUE_VECTOR: return queue_vector(now.queue_select);
    case QUEUE_ENABLE: return device_->queue_enabled(now.queue_select);
    case QUEUE_NOTIFY_OFF:
    case QUEUE_NOTIFY_DATA: return now.queue_select;
    case QUEUE_DESC: return setup.descriptors;
    case QUEUE_DRIVER: return setup.driver;
    case QUEUE_DEVICE: return setup.device;
    default: return 0;  // QUEUE_RESET: complete as soon as it is written
  }
}

void PciTransport::common_write(unsigned offset, unsigned size, uint64_t value) noexcept {
  const auto word = static_cast<uint32_t>(value);
  if (offset == DEVICE_STATUS) {
    device_->set_status(static_cast<uint8_t>(value), false);
    if (static_cast<uint8_t>(value) == 0) forget_registers();
    return;
  }
  if (offset >= QUEUE_SIZE) return queue_write(offset, size, value);
  std::unique_lock lock(register_mutex_);
  switch (offset) {
    case DEVICE_FEATURE_SELECT: registers_.device_feature_select = word; break;
    case DRIVER_FEATURE_SELECT: registers_.driver_feature_select = word; break;
    case DRIVER_FEATURE: {
      if (registers_.driver_feature_select > 1) break;
      const unsigned shift = registers_.driver_feature_select * 32;
      registers_.driver_features &= ~(uint64_t{0xffff'ffff} << shift);
      registers_.driver_features |= uint64_t{word} << shift;
      const uint64_t features = registers_.driver_features;
      lock.unlock();
      device_->set_driver_features(features);
      break;
    }
    case CONFIG_VECTOR: registers_.config_vector = checked_vector(value); break;
    case QUEUE_SELECT: registers_.queue_select = static_cast<uint16_t>(value); break;
    default: break;
  }
}

void PciTransport::queue_write(unsigned offset, unsigned size, uint64_t value) noexcept {
  const unsigned queue = registers().queue_select;
  if (queue >= device_->queues()) return;
  QueueSetup setup = device_->queue_setup(queue);
  // 64-bit registers are written whole or by halves (4.1.3.1).
  const auto change = [&](uint64_t& field, unsigned at) {
    if (size == 8)
      field = value;
    else if (offset == at)
      field = (field & ~uint64_t{0xffff'ffff}) | static_cast<uint32_t>(value);
    else
      field = (field & 0xffff'ffff) | value << 32;
    device_->set_queue_setup(queue, setup);
  };
  switch (offset) {
    case QUEUE_SIZE:
      setup.size = static_cast<uint16_t>(value);
      device_->set_queue_setup(queue, setup);
      break;
    case QUEUE_VECTOR: {
      const std::lock_guard lock(register_mutex_);
      queue_vectors_[queue] = checked_vector(value);
      break;
    }
    case QUEUE_ENABLE:
      if (value & 1) device_->enable_queue(queue);
      break;
    case QUEUE_RESET:
      if (value & 1) device_->reset_queue(queue);
      break;
    case QUEUE_DESC:
    case QUEUE_DESC + 4: change(setup.descriptors, QUEUE_DESC); break;
    case QUEUE_DRIVER:
    case QUEUE_DRIVER + 4: change(setup.driver, QUEUE_DRIVER); break;
    case QUEUE_DEVICE:
    case QUEUE_DEVICE + 4: change(setup.device, QUEUE_DEVICE); break;
    default: break;
  }
}

void PciTransport::forget_registers() noexcept {
  const std::lock_guard lock(register_mutex_);
  registers_ = {};
  std::ranges::fill(queue_vectors_, pci::Msix::NO_VECTOR);
  set_intx(false);
}

void PciTransport::reset() noexcept {
  device_->reset();
  forget_registers();
  msix_.reset();
  Function::reset();
}

// --- Legacy registers

uint64_t PciTransport::legacy_read(uint64_t offset, unsigned size) noexcept {
  const PciState now = registers();
  const bool selected = now.queue_select < device_->queues();
  const uint32_t config_at = legacy_config_offset();
  if (offset >= config_at) return read_config_register(*device_, offset - config_at, size);
  switch (offset) {
    case LEGACY_DEVICE_FEATURES: return device_->features(true);
    case LEGACY_DRIVER_FEATURES: return now.driver_features;
    case LEGACY_QUEUE_ADDRESS:
      return selected && device_->queue_enabled(now.queue_select)
                 ? device_->queue_setup(now.queue_select).descriptors / legacy_page
                 : 0;
    case LEGACY_QUEUE_SIZE: return selected ? device_->queue_max_size(now.queue_select) : 0;
    case LEGACY_QUEUE_SELECT: return now.queue_select;
    case LEGACY_STATUS: return device_->status();
    case LEGACY_ISR: return take_isr();
    case LEGACY_CONFIG_VECTOR: return now.config_vector;
    case LEGACY_QUEUE_VECTOR: return selected ? queue_vector(now.queue_select) : pci::Msix::NO_VECTOR;
    default: return 0;
  }
}

void PciTransport::legacy_write(uint64_t offset, unsigned size, uint64_t value) noexcept {
  const uint32_t config_at = legacy_config_offset();
  if (offset >= config_at) return write_config_register(*device_, offset - config_at, size, value);
  switch (offset) {
    case LEGACY_QUEUE_ADDRESS: return legacy_queue_address(static_cast<uint32_t>(value));
    case LEGACY_QUEUE_NOTIFY:
      if (value < device_->queues()) device_->notified(static_cast<unsigned>(value));
      return;
    case LEGACY_STATUS:
      device_->set_status(static_cast<uint8_t>(value), true);
      if (static_cast<uint8_t>(value) == 0) forget_registers();
      return;
    case LEGACY_DRIVER_FEATURES: device_->set_driver_features(static_cast<uint32_t>(value)); break;
    default: break;
  }
  const std::lock_guard lock(register_mutex_);
  switch (offset) {
    case LEGACY_DRIVER_FEATURES: registers_.driver_features = static_cast<uint32_t>(value); break;
    case LEGACY_QUEUE_SELECT: registers_.queue_select = static_cast<uint16_t>(value); break;
    case LEGACY_CONFIG_VECTOR: registers_.config_vector = checked_vector(value); break;
    case LEGACY_QUEUE_VECTOR:
      if (registers_.queue_select < queue_vectors_.size())
        queue_vectors_[registers_.queue_select] = checked_vector(value);
      break;
    default: break;
  }
}

// 2.7.2: descriptor table, available ring and, from the next page boundary on, the used ring. Zero takes it
// back.
void PciTransport::legacy_queue_address(uint32_t page) noexcept {
  const unsigned queue = registers().queue_select;
  if (queue >= device_->queues()) return;
  device_->enable_queue(queue, false);
  if (page == 0) return;
  QueueSetup setup{.size = device_->queue_max_size(queue)};
  setup.descriptors = page * legacy_page;
  setup.driver = setup.descriptors + uint64_t{setup.size} * 16;
  setup.device = (setup.driver + uint64_t{setup.size} * 2 + 6 + legacy_page - 1) & ~(legacy_page - 1);
  device_->set_queue_setup(queue, setup);
  device_->enable_queue(queue);
}

// --- Saved state

void PciTransport::save(nlohmann::json& json) const {
  nlohmann::json function, msix, device;
  Function::save(function);
  msix_.save(msix);
  device_->save(device);
  PciState state = registers();
  {
    const std::lock_guard lock(register_mutex_);
    for (const uint16_t vector : queue_vectors_) {
      state.queue_vectors.push_back(static_cast<uint8_t>(vector));
      state.queue_vectors.push_back(static_cast<uint8_t>(vector >> 8));
    }
  }
  save_state(std::move(state), json);
  json["function"] = std::move(function);
  json["msix"] = std::move(msix);
  json["virtio"] = std::move(device);
}

void PciTransport::load(const nlohmann::json& json) {
  PciState state = load_state<PciState>(json);
  if (state.queue_vectors.size() != queue_vectors_.size() * 2 || !json.contains("function") ||
      !json.contains("msix") || !json.contains("virtio"))
    usage_error("saved state of {}: its parts are missing or of another device", name());
  nlohmann::json before;  // each part leaves itself unchanged when it is wrong; the parts before it go back
  save(before);
  try {
    device_->load(json["virtio"]);
    msix_.load(json["msix"]);
    Function::load(json["function"]);
  } catch (const UsageError&) {
    device_->load(before["virtio"]);
    msix_.load(before["msix"]);
    throw;
  }
  const std::lock_guard lock(register_mutex_);
  for (size_t i = 0; i < queue_vectors_.size(); i++)
    queue_vectors_[i] =
        checked_vector(state.queue_vectors[i * 2] | unsigned{state.queue_vectors[i * 2 + 1]} << 8);
  state.queue_vectors.clear();
  state.config_vector = checked_vector(state.config_vector);
  registers_ = std::move(state);
}

}  // namespace lodge::device::virtio
