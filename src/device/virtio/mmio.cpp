// VirtIO over MMIO (VirtIO 1.2, section 4.2), register layout of version 2.
//
// Modelled: all registers of table 4.1, ring reset, kicks by doorbells where the accelerator takes them. Not
// modelled: the legacy layout of 4.2.4 (version 1): no guest that would need it finds its devices by ACPI;
// shared memory regions: every length reads as -1, "there is none" (4.2.2). What is not a 32-bit access to a
// control register has no effect (4.2.2.2), and reads as zero.
//
// A doorbell looks at the whole value written. Notification data (4.2.3.3) put the ring's position above the
// queue's number, so a device with several queues does not offer them: its kicks would all take the long way.
#include "device/virtio/mmio.hpp"

#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "device/virtio/config_register.hpp"

namespace lodge::device::virtio {

namespace {

// Table 4.1
constexpr uint64_t MAGIC_VALUE = 0x000, VERSION = 0x004, DEVICE_ID = 0x008, VENDOR_ID = 0x00c,
                   DEVICE_FEATURES = 0x010, DEVICE_FEATURES_SEL = 0x014, DRIVER_FEATURES = 0x020,
                   DRIVER_FEATURES_SEL = 0x024, QUEUE_SEL = 0x030, QUEUE_NUM_MAX = 0x034, QUEUE_NUM = 0x038,
                   QUEUE_READY = 0x044, QUEUE_NOTIFY = 0x050, INTERRUPT_STATUS = 0x060, INTERRUPT_ACK = 0x064,
                   STATUS = 0x070, QUEUE_DESC_LOW = 0x080, QUEUE_DESC_HIGH = 0x084, QUEUE_DRIVER_LOW = 0x090,
                   QUEUE_DRIVER_HIGH = 0x094, QUEUE_DEVICE_LOW = 0x0a0, QUEUE_DEVICE_HIGH = 0x0a4,
                   SHM_LEN_LOW = 0x0b0, SHM_BASE_HIGH = 0x0bc, QUEUE_RESET = 0x0c0, CONFIG_GENERATION = 0x0fc,
                   CONFIG = 0x100;
constexpr uint32_t magic = 0x7472'6976;  // "virt"
constexpr uint32_t version_2 = 2;
constexpr uint32_t vendor = 0x4744'4f4c;  // "LODG": anything will do
constexpr uint32_t INTERRUPT_QUEUE = 1, INTERRUPT_CONFIG = 2;

void set_low(uint64_t& field, uint32_t value) {
  field = (field & ~uint64_t{0xffff'ffff}) | value;
}
void set_high(uint64_t& field, uint32_t value) {
  field = (field & 0xffff'ffff) | uint64_t{value} << 32;
}

}  // namespace

MmioTransport::MmioTransport(std::unique_ptr<Device> device, machine::Interrupt& line,
                             machine::Doorbells& doorbells)
    : doorbells_(doorbells), line_(line), device_(std::move(device)) {
  if (device_->queues() > 1) device_->withhold(F_NOTIFICATION_DATA);
  device_->connect(*this);
}

MmioTransport::~MmioTransport() {
  for (const auto& doorbell : mounted_doorbells_) doorbells_.remove(doorbell);
  device_->detach_loop();
  line_.set(false);
}

void MmioTransport::mounted(uint64_t base) {
  if (device_->description().quick && doorbells_.windows_are_cheaper()) return;
  const bool only_queue = device_->queues() == 1;
  for (unsigned queue = 0; queue < device_->queues(); queue++) {
    machine::Doorbell doorbell{};
    doorbell.address = base + QUEUE_NOTIFY;
    doorbell.size = 4;
    if (!only_queue) doorbell.match = queue;
    doorbell.fd = device_->kick_fd(queue);
    if (doorbells_.add(doorbell)) mounted_doorbells_.push_back(doorbell);
  }
}

// --- Interrupts

void MmioTransport::queue_interrupt(unsigned) noexcept {
  raise(INTERRUPT_QUEUE);
}

void MmioTransport::config_interrupt() noexcept {
  raise(INTERRUPT_CONFIG);
}

void MmioTransport::raise(uint32_t bit) noexcept {
  const std::lock_guard lock(mutex_);
  registers_.interrupt_status |= bit;
  line_.set(true);
}

void MmioTransport::acknowledge(uint32_t bits) noexcept {
  const std::lock_guard lock(mutex_);
  registers_.interrupt_status &= ~bits;
  if (registers_.interrupt_status == 0) line_.set(false);
}

// --- Registers

MmioState MmioTransport::registers() const noexcept {
  const std::lock_guard lock(mutex_);
  return registers_;
}

uint64_t MmioTransport::read(uint64_t offset, unsigned size) noexcept {
  if (offset >= CONFIG) return read_config_register(*device_, offset - CONFIG, size);
  return size == 4 && offset % 4 == 0 ? register_value(offset) : 0;
}

uint32_t MmioTransport::register_value(uint64_t offset) noexcept {
  const MmioState now = registers();
  const bool selected = now.queue_select < device_->queues();
  switch (offset) {
    case MAGIC_VALUE: return magic;
    case VERSION: return version_2;
    case DEVICE_ID: return static_cast<uint32_t>(device_->description().type);
    case VENDOR_ID: return vendor;
    case DEVICE_FEATURES:
      return now.device_feature_select > 1
                 ? 0
                 : static_cast<uint32_t>(device_->features(false) >> (now.device_feature_select * 32));
    case QUEUE_NUM_MAX: return selected ? device_->queue_max_size(now.queue_select) : 0;
    case QUEUE_READY: return selected && device_->queue_enabled(now.queue_select);
    case INTERRUPT_STATUS: return now.interrupt_status;
    case STATUS: return device_->status();
    case CONFIG_GENERATION: return device_->config_generation();
    default: break;
  }
  // QUEUE_RESET reads as zero: a reset is complete as soon as it is written.
  return offset >= SHM_LEN_LOW && offset <= SHM_BASE_HIGH ? 0xffff'ffff : 0;
}

void MmioTransport::write(uint64_t offset, unsigned size, uint64_t value) noexcept {
  if (offset >= CONFIG) return write_config_register(*device_, offset - CONFIG, size, value);
  if (size != 4 || offset % 4 != 0) return;
  const auto word = static_cast<uint32_t>(value);
  switch (offset) {
    case QUEUE_NOTIFY: {
      const unsigned queue = word & 0xffff;  // what is above are notification data
      if (queue < device_->queues()) device_->notified(queue);
      break;
    }
    case INTERRUPT_ACK: acknowledge(word); break;
    case STATUS: {
      device_->set_status(static_cast<uint8_t>(word), false);
      if (static_cast<uint8_t>(word) != 0) break;
      const std::lock_guard lock(mutex_);
      registers_ = {};
      line_.set(false);
      break;
    }
    case DEVICE_FEATURES_SEL:
    case DRIVER_FEATURES:
    case DRIVER_FEATURES_SEL:
    case QUEUE_SEL: select_or_feature(offset, word); break;
    default: queue_write(offset, word); break;
  }
}

void MmioTransport::select_or_feature(uint64_t offset, uint32_t value) noexcept {
  std::unique_lock lock(mutex_);
  switch (offset) {
    case DEVICE_FEATURES_SEL: registers_.device_feature_select = value; break;
    case DRIVER_FEATURES_SEL: registers_.driver_feature_select = value; break;
    case QUEUE_SEL: registers_.queue_select = value; break;
    default: {
      if (registers_.driver_feature_select > 1) break;
      if (registers_.driver_feature_select == 0)
        set_low(registers_.driver_features, value);
      else
        set_high(registers_.driver_features, value);
      const uint64_t features = registers_.driver_features;
      lock.unlock();
      device_->set_driver_features(features);
      break;
    }
  }
}

void MmioTransport::queue_write(uint64_t offset, uint32_t value) noexcept {
  const uint32_t queue = registers().queue_select;
  if (queue >= device_->queues()) return;
  QueueSetup setup = device_->queue_setup(queue);
  switch (offset) {
    case QUEUE_READY:
      if (value & 1)
        device_->enable_queue(queue);
      else
        device_->stop_queue(queue);
      return;
    case QUEUE_RESET:
      if (value & 1) device_->reset_queue(queue);
      return;
    case QUEUE_NUM: setup.size = value > UINT16_MAX ? uint16_t{0} : static_cast<uint16_t>(value); break;
    case QUEUE_DESC_LOW: set_low(setup.descriptors, value); break;
    case QUEUE_DESC_HIGH: set_high(setup.descriptors, value); break;
    case QUEUE_DRIVER_LOW: set_low(setup.driver, value); break;
    case QUEUE_DRIVER_HIGH: set_high(setup.driver, value); break;
    case QUEUE_DEVICE_LOW: set_low(setup.device, value); break;
    case QUEUE_DEVICE_HIGH: set_high(setup.device, value); break;
    default: return;
  }
  device_->set_queue_setup(queue, setup);
}

// --- Saved state

void MmioTransport::save(nlohmann::json& json) const {
  nlohmann::json device;
  device_->save(device);
  save_state(registers(), json);
  json["virtio"] = std::move(device);
}

void MmioTransport::load(const nlohmann::json& json) {
  const auto state = load_state<MmioState>(json);
  if (!json.contains("virtio"))
    usage_error("saved state of {}: its device is missing", device_->description().name);
  device_->load(json["virtio"]);
  const std::lock_guard lock(mutex_);
  registers_ = state;
  registers_.interrupt_status &= INTERRUPT_QUEUE | INTERRUPT_CONFIG;
  line_.set(registers_.interrupt_status != 0);
}

}  // namespace lodge::device::virtio
