// VirtIO over MMIO: a window of registers and an interrupt line, for machines without PCI.
#pragma once

#include <memory>
#include <mutex>
#include <string_view>
#include <vector>

#include "base/state.hpp"
#include "device/virtio/device.hpp"
#include "machine/io.hpp"

namespace lodge::device::virtio {

struct MmioState {
  static constexpr std::string_view name = "virtio-mmio";
  static constexpr unsigned version = 1;
  uint32_t device_feature_select = 0, driver_feature_select = 0, queue_select = 0;
  uint64_t driver_features = 0;  // as written so far
  uint32_t interrupt_status = 0;
  template <class V>
  void visit(V& v) {
    v("device_feature_select", device_feature_select), v("driver_feature_select", driver_feature_select);
    v("queue_select", queue_select), v("driver_features", driver_features);
    v("interrupt_status", interrupt_status);
  }
};

// Threads: registers from any vCPU, interrupts from any thread. Locks: the device's before `mutex_`, before
// the line's. No lock of this class is held while it calls the device.
class MmioTransport final : public machine::RegisterWindow, public Savable, private Transport {
 public:
  static constexpr uint64_t window_size = 0x1000;

  // Takes the device; kicks are served by whoever serves its kick_fd(). `line` is driven as a level, and like
  // `doorbells` outlives the transport.
  MmioTransport(std::unique_ptr<Device> device, machine::Interrupt& line, machine::Doorbells& doorbells);
  MmioTransport(const MmioTransport&) = delete;
  MmioTransport& operator=(const MmioTransport&) = delete;
  ~MmioTransport() override;

  Device& device() noexcept { return *device_; }
  // The window is on the memory bus at `base`: kicks may take the short way. Once.
  void mounted(uint64_t base);

  uint64_t read(uint64_t offset, unsigned size) noexcept override;
  void write(uint64_t offset, unsigned size, uint64_t value) noexcept override;

  void save(nlohmann::json& json) const override;
  void load(const nlohmann::json& json) override;

 private:
  void queue_interrupt(unsigned queue) noexcept override;
  void config_interrupt() noexcept override;
  void raise(uint32_t bit) noexcept;
  void acknowledge(uint32_t bits) noexcept;

  MmioState registers() const noexcept;
  uint32_t register_value(uint64_t offset) noexcept;
  void select_or_feature(uint64_t offset, uint32_t value) noexcept;
  void queue_write(uint64_t offset, uint32_t value) noexcept;

  machine::Doorbells& doorbells_;
  machine::Interrupt& line_;
  std::unique_ptr<Device> device_;
  mutable std::mutex mutex_;
  MmioState registers_;
  std::vector<machine::Doorbell> mounted_doorbells_;
};

}  // namespace lodge::device::virtio
