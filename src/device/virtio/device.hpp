// The base of all VirtIO devices: status, features, configuration, queues, reset, saved state. A transport
// (PCI, MMIO) turns registers into the calls of the first group; a device implements those of the last.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/event_loop.hpp"
#include "base/fd.hpp"
#include "base/state.hpp"
#include "device/virtio/constants.hpp"
#include "device/virtio/queue.hpp"

namespace lodge::device::virtio {

// How a device reaches its driver. Any thread, with the device's lock held.
class Transport {
 public:
  virtual ~Transport() = default;
  virtual void queue_interrupt(unsigned queue) noexcept = 0;
  virtual void config_interrupt() noexcept = 0;
};

// What an option may switch off for a driver that cannot cope.
struct RingFeatures {
  bool packed = true, event_index = true, indirect = true, in_order = true;
};

// Threads: the transport's calls from any vCPU; kicks on the loop's thread; a device's own events from
// wherever they come. One lock for all: calls of the last group have it, and the protected helpers want it.
class Device : public Savable {
 public:
  struct Description {
    std::string name;  // for messages and saved state
    DeviceType type;
    uint32_t pci_class;                 // class << 16 | subclass << 8 | programming interface
    uint64_t features;                  // of the type; those of rings and transport are added
    std::vector<uint16_t> queue_sizes;  // the largest that a driver may choose, a power of two
    // kick() takes little time and waits for nobody, so that a vCPU may do it itself where that is cheaper
    // than a doorbell.
    bool quick = false;
  };
  Device(Description description, machine::GuestMemory& memory, const RingFeatures& rings = {});
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  ~Device() override = default;

  const Description& description() const noexcept { return description_; }
  unsigned queues() const noexcept { return static_cast<unsigned>(queues_.size()); }

  // --- For the transport. Queue numbers are below queues().
  // Before any other call; `transport` outlives the device or its last call.
  void connect(Transport& transport) noexcept { transport_ = &transport; }
  // Set-up: what the transport cannot do well is not offered.
  void withhold(uint64_t features) noexcept { offered_ &= ~features; }
  // Features of a driver that knows VirtIO 1.0 and later, or of a legacy one.
  uint64_t features(bool legacy) const noexcept;
  uint64_t driver_features() noexcept;
  void set_driver_features(uint64_t features) noexcept;
  uint8_t status() noexcept;
  // 2.1: bits are only ever added; 0 resets, which is complete when the call returns. `legacy` drivers do not
  // negotiate FEATURES_OK.
  void set_status(uint8_t status, bool legacy) noexcept;
  void reset() noexcept { set_status(0, false); }

  uint8_t config_generation() const noexcept { return generation_; }
  // The device's configuration; bytes behind its end read as zero and are not written.
  void read_config(unsigned offset, std::span<uint8_t> out) noexcept;
  void write_config(unsigned offset, std::span<const uint8_t> data) noexcept;

  uint16_t queue_max_size(unsigned queue) const noexcept { return description_.queue_sizes[queue]; }
  QueueSetup queue_setup(unsigned queue) noexcept;
  // Ignored for a queue that is enabled, and after DRIVER_OK for any that was not reset: what a device runs
  // on does not change under it.
  void set_queue_setup(unsigned queue, const QueueSetup& setup) noexcept;
  bool queue_enabled(unsigned queue) noexcept;
  // 4.1.4.3: enabling only; a legacy driver also takes a queue back by `enabled` = false.
  void enable_queue(unsigned queue, bool enabled = true) noexcept;
  // 4.2.2.2 (QueueReady = 0): the driver takes a queue back, also while the device runs; what is out has come
  // back when the call returns. The queue may be set up again.
  void stop_queue(unsigned queue) noexcept;
  // 2.6.1 Ring reset, complete when the call returns; ignored when not negotiated.
  void reset_queue(unsigned queue) noexcept;

  // The descriptor whose signal is a kick of the queue, for ioeventfds.
  int kick_fd(unsigned queue) const noexcept { return kicks_[queue].get(); }
  // Serves kicks of those descriptors on `loop`, which outlives the device's watches (detach_loop()).
  void attach_loop(EventLoop& loop);
  void detach_loop() noexcept { watches_.clear(); }
  // What a kick does, at once.
  void kick(unsigned queue) noexcept;
  // The driver has written to the queue's notification register, and no doorbell took that.
  void notified(unsigned queue) noexcept {
    if (description_.quick && !hands_over(queue))
      kick(queue);
    else
      kick_later(queue);
  }

  // --- Saved state. While no vCPU runs; waits for requests that are out.
  void save(nlohmann::json& json) const override;
  void load(const nlohmann::json& json) override;

 protected:
  // --- What a device is. All with the lock held.
  // Requests may be waiting in `queue`, which is active.
  virtual void process(unsigned /*queue*/) noexcept {}
  // The same for a device that works without the lock, which it takes again before it returns: then several
  // threads may be in here, for one queue or for several. Instead of process().
  virtual void serve(unsigned queue, std::unique_lock<std::mutex>& /*lock*/) noexcept { process(queue); }
  virtual void config_bytes(std::span<uint8_t> /*all of config_size()*/) const noexcept {}
  virtual unsigned config_size() const noexcept { return 0; }
  virtual void config_written(unsigned /*offset*/, std::span<const uint8_t> /*data*/) noexcept {}
  // The driver is ready: queues are active. Kicks follow for each.
  virtual void started() noexcept {}
  // Of a quick device, without the lock: the vCPU that has kicked `queue` shall leave it to the loop.
  virtual bool hands_over(unsigned /*queue*/) noexcept { return false; }
  // `loop` serves the queues from now on; without the lock.
  virtual void attached(EventLoop& /*loop*/) {}
  // Everything that is out must come back, or be forgotten: returns when nothing will touch guest memory for
  // `queue` (or -1: for any) again. May release the lock to wait.
  virtual void quiesce(std::unique_lock<std::mutex>& /*lock*/, int /*queue*/) noexcept {}
  // After quiesce(), queues are inactive: the device forgets what its driver has told it.
  virtual void was_reset() noexcept {}
  // What the device itself remembers; loading throws UsageError.
  virtual void save_device(nlohmann::json& /*json*/) const {}
  virtual void load_device(const nlohmann::json& /*json*/) {}

  // --- Helpers, with the lock held.
  bool has_feature(uint64_t feature) const noexcept { return (driver_features_ & feature) == feature; }
  bool running() const noexcept {
    return (status_ & DRIVER_OK) && !(status_ & DEVICE_NEEDS_RESET) && !resetting_;
  }
  bool serving(unsigned index) const noexcept {
    return running() && queues_[index].enabled && queues_[index].queue.active();
  }
  Queue& queue(unsigned index) noexcept { return queues_[index].queue; }
  // Takes all requests of a queue, a bounded number a call so that a busy driver does not keep the loop from
  // others, and hands each to `handle(chain)`, which pushes it or keeps it. Interrupts as the driver wishes.
  // `handle` returns false to leave the chain, and all behind it, where it is.
  template <class Handle>
  void drain(unsigned index, Chain& chain, Handle handle) noexcept;
  // Interrupts for what was pushed, when the driver wants that.
  void notify(unsigned index) noexcept;
  // The driver has broken a rule: nothing more is processed until it resets the device (2.1.2).
  void needs_reset(std::string_view why) noexcept;
  // The configuration has changed by itself.
  void config_changed() noexcept;
  // As if the driver had kicked, from the loop.
  void kick_later(unsigned index) noexcept { signal_event(kicks_[index].get()); }

  machine::GuestMemory& memory_;
  mutable std::mutex mutex_;

  // A busy driver does not keep a thread from others for longer.
  static constexpr unsigned requests_a_turn = 256;

 private:
  struct Slot {
    QueueSetup setup;
    bool enabled = false;
    bool was_reset = false;  // by reset_queue(): may be set up again after DRIVER_OK
    Queue queue;
  };
  bool features_acceptable(uint64_t features) const noexcept;
  void start() noexcept;
  void reset_locked(std::unique_lock<std::mutex>& lock) noexcept;
  bool may_set_up(const Slot& slot) const noexcept;
  void take_back(std::unique_lock<std::mutex>& lock, unsigned index) noexcept;
  void activate(Slot& slot) noexcept;

  Description description_;
  uint64_t offered_;
  std::vector<Slot> queues_;
  std::vector<Fd> kicks_;
  std::vector<EventLoop::Watch> watches_;
  Transport* transport_ = nullptr;
  uint64_t driver_features_ = 0;
  uint8_t status_ = 0;
  bool resetting_ = false;  // quiesce() waits without the lock: what other vCPUs write meanwhile is ignored
  std::atomic<uint8_t> generation_ = 0;
};

template <class Handle>
void Device::drain(unsigned index, Chain& chain, Handle handle) noexcept {
  Queue& from = queue(index);
  unsigned taken = 0;
  bool waits = false, broken = false;
  do {
    from.want_kicks(false);
    while (!waits && taken < requests_a_turn) {
      const Pop result = from.pop(chain);
      broken = result == Pop::broken;
      if (result != Pop::chain) break;
      taken++;
      if (!handle(chain)) {
        from.undo_pop(chain);
        waits = true;
      }
    }
    // A device that waits for something of its own looks again by itself then.
    if (waits || broken || taken >= requests_a_turn) break;
    from.want_kicks(true);
  } while (from.has_available());
  notify(index);
  if (broken) return needs_reset("a descriptor chain that breaks the rules");
  if (taken >= requests_a_turn && !waits) kick_later(index);
}

}  // namespace lodge::device::virtio
