// The balloon: memory that the guest gives back to the host.
#pragma once

#include <array>
#include <atomic>

#include "device/virtio/device.hpp"

namespace lodge::device::virtio {

class Balloon final : public Device {
 public:
  // What the driver has last told of its memory, by the specification's tags (5.5.6.3); UINT64_MAX: not told.
  static constexpr unsigned statistic_tags = 10;
  using Statistics = std::array<uint64_t, statistic_tags>;

  explicit Balloon(machine::GuestMemory& memory, const RingFeatures& rings = {});

  // How much the guest shall do without, in bytes; at most all of its memory. Takes effect as its driver
  // allows: a guest that runs out of memory takes it back (DEFLATE_ON_OOM).
  void set_target(uint64_t bytes) noexcept;
  uint64_t target() noexcept;
  // How much it does without now, by its own account.
  uint64_t actual() noexcept;
  // Asks for new statistics; false when the driver has not offered any since the last time.
  bool request_statistics() noexcept;
  Statistics statistics() noexcept;
  // Bytes given back to the host so far, by inflating and by reports of free pages.
  uint64_t released() const noexcept { return released_; }

 private:
  void process(unsigned queue) noexcept override;
  unsigned config_size() const noexcept override { return 16; }
  void config_bytes(std::span<uint8_t> out) const noexcept override;
  void config_written(unsigned offset, std::span<const uint8_t> data) noexcept override;
  void was_reset() noexcept override;
  void save_device(nlohmann::json& json) const override;
  void load_device(const nlohmann::json& json) override;

  void inflate() noexcept;
  void deflate() noexcept;
  void take_statistics() noexcept;
  void take_reports(unsigned queue) noexcept;

  uint32_t target_pages_ = 0, actual_pages_ = 0;
  Statistics statistics_{};
  std::atomic<uint64_t> released_ = 0;
  Chain chain_;
};

}  // namespace lodge::device::virtio
