// VirtIO devices, common part (VirtIO 1.2: 2.1 status, 2.2 features, 2.5 configuration space, 2.6 virtqueues,
// 3.1 initialization; 3.1.2 and 6.3 legacy drivers).
//
// Modelled: all of these. The device needs a reset (2.1.2) after anything that breaks a MUST of the driver in
// a ring: it stops, sets DEVICE_NEEDS_RESET and says so by a configuration change interrupt; requests that
// are out are still completed. Wrong order at registers has no effect. Not offered: ACCESS_PLATFORM (there is
// no IOMMU), SR_IOV, ORDER_PLATFORM, NOTIF_CONFIG_DATA.
#include "device/virtio/device.hpp"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>

#include "base/error.hpp"

namespace lodge::device::virtio {

namespace {

constexpr uint8_t known_status = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;

struct CommonState {
  static constexpr std::string_view name = "virtio";
  static constexpr unsigned version = 1;
  uint16_t type = 0;
  uint64_t features = 0;
  uint8_t status = 0, generation = 0;
  template <class V>
  void visit(V& v) {
    v("type", type), v("features", features), v("status", status), v("generation", generation);
  }
};

struct QueueState {
  static constexpr std::string_view name = "virtqueue";
  static constexpr unsigned version = 1;
  uint16_t size = 0;
  uint64_t descriptors = 0, driver = 0, device = 0;
  bool enabled = false, was_reset = false;
  uint32_t position = 0;
  template <class V>
  void visit(V& v) {
    v("size", size), v("descriptors", descriptors), v("driver_area", driver), v("device_area", device);
    v("enabled", enabled), v("was_reset", was_reset), v("position", position);
  }
};

}  // namespace

Device::Device(Description description, machine::GuestMemory& memory, const RingFeatures& rings)
    : memory_(memory), description_(std::move(description)), offered_(description_.features) {
  offered_ |= F_VERSION_1 | F_NOTIFICATION_DATA | F_RING_RESET | F_ANY_LAYOUT;
  if (rings.packed) offered_ |= F_RING_PACKED;
  if (rings.event_index) offered_ |= F_EVENT_IDX;
  if (rings.indirect) offered_ |= F_INDIRECT_DESC;
  if (rings.in_order) offered_ |= F_IN_ORDER;
  queues_.resize(description_.queue_sizes.size());
  for (size_t i = 0; i < queues_.size(); i++) {
    queues_[i].setup.size = description_.queue_sizes[i];
    kicks_.push_back(Fd::event());
  }
}

// --- Features and status

uint64_t Device::features(bool legacy) const noexcept {
  // 5.x.3 and 6.3: bit 27 is a legacy bit.
  return legacy ? offered_ & 0xffff'ffff : offered_ & ~F_ANY_LAYOUT;
}

uint64_t Device::driver_features() noexcept {
  const std::lock_guard lock(mutex_);
  return driver_features_;
}

void Device::set_driver_features(uint64_t features) noexcept {
  const std::lock_guard lock(mutex_);
  if (status_ & (FEATURES_OK | DRIVER_OK)) return;  // 2.2.1: not after negotiation
  driver_features_ = features;
}

bool Device::features_acceptable(uint64_t features) const noexcept {
  return (features & ~offered_) == 0 && (features & F_VERSION_1) != 0;
}

uint8_t Device::status() noexcept {
  const std::lock_guard lock(mutex_);
  return status_;
}

void Device::set_status(uint8_t status, bool legacy) noexcept {
  std::unique_lock lock(mutex_);
  if (resetting_) return;
  if (status == 0) return reset_locked(lock);
  uint8_t added = status & known_status & ~status_;
  if (legacy) {
    added &= ~FEATURES_OK;
    // What is not offered to a legacy driver does not exist for it.
    if (added & DRIVER_OK) driver_features_ &= features(true);
  } else {
    if ((added & FEATURES_OK) && !features_acceptable(driver_features_)) added &= ~FEATURES_OK;  // 2.2.2
    if ((added & DRIVER_OK) && !((status_ | added) & FEATURES_OK)) added &= ~DRIVER_OK;
  }
  status_ |= added;
  if (added & DRIVER_OK) start();
}

void Device::start() noexcept {
  for (Slot& slot : queues_)
    if (slot.enabled) activate(slot);
  if (!running()) return;
  started();
  // A driver may have filled its queues before it was ready, and legacy ones have kicked by then.
  for (unsigned i = 0; i < queues_.size(); i++) {
    queues_[i].queue.want_kicks(true);
    kick_later(i);
  }
}

void Device::activate(Slot& slot) noexcept {
  if (!slot.queue.activate(slot.setup, driver_features_, memory_)) needs_reset("a queue outside RAM");
}

void Device::reset_locked(std::unique_lock<std::mutex>& lock) noexcept {
  resetting_ = true;
  quiesce(lock, -1);
  resetting_ = false;
  for (size_t i = 0; i < queues_.size(); i++) {
    queues_[i].queue.deactivate();
    queues_[i] = {};
    queues_[i].setup.size = description_.queue_sizes[i];
    take_event(kicks_[i].get());
  }
  status_ = 0;
  driver_features_ = 0;
  was_reset();
}

void Device::needs_reset(std::string_view /*why*/) noexcept {
  if (status_ & DEVICE_NEEDS_RESET) return;
  status_ |= DEVICE_NEEDS_RESET;
  // 2.1.2: the driver is told only when it has said that it listens.
  if (status_ & DRIVER_OK) config_changed();
}

// --- Configuration

void Device::read_config(unsigned offset, std::span<uint8_t> out) noexcept {
  const std::lock_guard lock(mutex_);
  std::ranges::fill(out, uint8_t{0});
  std::array<uint8_t, 256> bytes{};
  const unsigned size = std::min<unsigned>(config_size(), bytes.size());
  config_bytes({bytes.data(), size});
  for (size_t i = 0; i < out.size() && offset + i < size; i++) out[i] = bytes[offset + i];
}

void Device::write_config(unsigned offset, std::span<const uint8_t> data) noexcept {
  const std::lock_guard lock(mutex_);
  if (offset >= config_size()) return;
  config_written(offset, data.first(std::min<size_t>(data.size(), config_size() - offset)));
}

void Device::config_changed() noexcept {
  generation_++;
  if (transport_ && (status_ & DRIVER_OK)) transport_->config_interrupt();
}

// --- Queues

QueueSetup Device::queue_setup(unsigned index) noexcept {
  const std::lock_guard lock(mutex_);
  return queues_[index].setup;
}

bool Device::may_set_up(const Slot& slot) const noexcept {
  return !resetting_ && !slot.enabled && (!(status_ & DRIVER_OK) || slot.was_reset);
}

void Device::set_queue_setup(unsigned index, const QueueSetup& setup) noexcept {
  const std::lock_guard lock(mutex_);
  if (!may_set_up(queues_[index])) return;
  queues_[index].setup = setup;
  // 4.1.4.3.2: a driver does not write more than it was offered, nor zero.
  if (setup.size == 0 || setup.size > queue_max_size(index))
    queues_[index].setup.size = queue_max_size(index);
}

bool Device::queue_enabled(unsigned index) noexcept {
  const std::lock_guard lock(mutex_);
  return queues_[index].enabled;
}

void Device::enable_queue(unsigned index, bool enabled) noexcept {
  const std::lock_guard lock(mutex_);
  Slot& slot = queues_[index];
  if (!enabled) {
    if (!(status_ & DRIVER_OK)) slot.enabled = false;
    return;
  }
  if (!may_set_up(slot)) return;
  slot.enabled = true;
  slot.was_reset = false;
  if (!(status_ & DRIVER_OK)) return;
  activate(slot);
  slot.queue.want_kicks(true);
  kick_later(index);
}

void Device::take_back(std::unique_lock<std::mutex>& lock, unsigned index) noexcept {
  Slot& slot = queues_[index];
  resetting_ = true;
  quiesce(lock, static_cast<int>(index));
  resetting_ = false;
  slot.enabled = false;
  slot.queue.deactivate();
  slot.setup = {.size = queue_max_size(index)};
  slot.was_reset = true;
}

void Device::stop_queue(unsigned index) noexcept {
  std::unique_lock lock(mutex_);
  if (!resetting_ && queues_[index].enabled) take_back(lock, index);
}

void Device::reset_queue(unsigned index) noexcept {
  std::unique_lock lock(mutex_);
  if (!resetting_ && has_feature(F_RING_RESET) && queues_[index].enabled) take_back(lock, index);
}

void Device::attach_loop(EventLoop& loop) {
  attached(loop);  // first: the loop's thread may come as soon as a doorbell is watched
  for (unsigned i = 0; i < queues(); i++)
    watches_.push_back(loop.watch_event(kicks_[i].get(), [this, i] { kick(i); }));
}

void Device::kick(unsigned index) noexcept {
  std::unique_lock lock(mutex_);
  if (serving(index)) serve(index, lock);
}

void Device::notify(unsigned index) noexcept {
  if (queues_[index].queue.interrupt_wanted() && transport_) transport_->queue_interrupt(index);
}

// --- Saved state

void Device::save(nlohmann::json& json) const {
  // Waiting for what is out changes no state that is saved, but needs the device's own means.
  auto& self = const_cast<Device&>(*this);
  std::unique_lock lock(mutex_);
  self.quiesce(lock, -1);
  save_state(CommonState{static_cast<uint16_t>(description_.type), driver_features_, status_, generation_},
             json);
  // A device that only waits for its reset uses no queue again, and may have one that cannot be used.
  const bool dead = status_ & DEVICE_NEEDS_RESET;
  json["queues"] = nlohmann::json::array();
  for (const Slot& slot : queues_) {
    nlohmann::json state;
    save_state(QueueState{slot.setup.size, slot.setup.descriptors, slot.setup.driver, slot.setup.device,
                          slot.enabled, slot.was_reset, dead ? 0 : slot.queue.position()},
               state);
    json["queues"].push_back(std::move(state));
  }
  save_device(json["model"]);
}

void Device::load(const nlohmann::json& json) {
  const auto common = load_state<CommonState>(json);
  const auto wrong = [this](const char* what) {
    usage_error("saved state of {}: {}", description_.name, what);
  };
  if (common.type != static_cast<uint16_t>(description_.type))
    wrong("it belongs to a device of another type");
  // Before the negotiation ends it may have written anything (2.2.1).
  if ((common.status & (FEATURES_OK | DRIVER_OK)) && (common.features & ~offered_))
    wrong("its driver uses features that this build does not have");
  if (!json.contains("queues") || !json["queues"].is_array() || json["queues"].size() != queues_.size())
    wrong("another number of queues");
  std::vector<Slot> slots(queues_.size());
  for (size_t i = 0; i < slots.size(); i++) {
    const auto state = load_state<QueueState>(json["queues"][i]);
    Slot& slot = slots[i];
    slot.setup = {state.size, state.descriptors, state.driver, state.device};
    if (state.size == 0 || state.size > queue_max_size(static_cast<unsigned>(i)))
      wrong("a queue's size is too large");
    slot.enabled = state.enabled;
    slot.was_reset = state.was_reset;
    if ((common.status & DRIVER_OK) && !(common.status & DEVICE_NEEDS_RESET) && slot.enabled &&
        (!slot.queue.activate(slot.setup, common.features, memory_) ||
         !slot.queue.set_position(state.position)))
      wrong("a queue lies outside RAM or its position outside the queue");
  }
  std::unique_lock lock(mutex_);
  quiesce(lock, -1);
  if (!json.contains("model")) wrong("field 'model' is missing");
  load_device(json["model"]);  // throws before anything has changed
  queues_ = std::move(slots);
  driver_features_ = common.features;
  status_ = common.status;
  generation_ = common.generation;
  // What the driver has kicked for before it was saved may not have been seen.
  for (unsigned i = 0; i < queues_.size(); i++) kick_later(i);
}

}  // namespace lodge::device::virtio
