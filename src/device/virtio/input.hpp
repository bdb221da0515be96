// The input device: a keyboard, or a tablet whose pointer is where the host says.
#pragma once

#include <array>
#include <deque>
#include <span>
#include <string_view>

#include "device/virtio/device.hpp"

namespace lodge::device::virtio {

// As Linux's input subsystem numbers them (linux/input-event-codes.h), which VirtIO takes over (5.8).
struct InputEvent {
  uint16_t type = 0, code = 0;
  uint32_t value = 0;
  bool operator==(const InputEvent&) const = default;
};

class Input final : public Device {
 public:
  enum class Kind { keyboard, tablet };
  // A tablet's axes go from 0 to this.
  static constexpr uint32_t largest_axis = 0x7fff;
  // Events that wait for a driver which has no buffers; more are refused.
  static constexpr size_t max_waiting = 1024;

  Input(machine::GuestMemory& memory, Kind kind, const RingFeatures& rings = {});

  Kind kind() const noexcept { return kind_; }
  // Any thread. What belongs together: all of it arrives, or nothing. An end of report (SYN_REPORT) is added.
  // False: there is no driver, or it has taken nothing for long.
  bool send(std::span<const InputEvent> events) noexcept;
  // A driver is there.
  bool listened_to() noexcept;
  // A bit for each light that the driver has on, by its number: LED_NUML, LED_CAPSL, ...
  uint32_t lights() noexcept;

 private:
  void process(unsigned queue) noexcept override;
  unsigned config_size() const noexcept override;
  void config_bytes(std::span<uint8_t> out) const noexcept override;
  void config_written(unsigned offset, std::span<const uint8_t> data) noexcept override;
  void was_reset() noexcept override;
  void save_device(nlohmann::json& json) const override;
  void load_device(const nlohmann::json& json) override;

  void deliver() noexcept;
  void take_status() noexcept;

  Kind kind_;
  uint8_t select_ = 0, subselect_ = 0;  // which part of the configuration the driver looks at
  uint32_t lights_ = 0;
  std::deque<InputEvent> waiting_;
  Chain chain_;
};

}  // namespace lodge::device::virtio
