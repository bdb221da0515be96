// The network card: one pair of queues and a control queue over a net::Backend.
#pragma once

#include <array>
#include <memory>
#include <vector>

#include "device/virtio/device.hpp"
#include "net/backend.hpp"

namespace lodge::device::virtio {

class Network final : public Device, private net::Card {
 public:
  using Mac = std::array<uint8_t, 6>;
  struct Config {
    Mac mac;
    uint16_t mtu = 0;  // 0: the guest's own choice
  };
  // The backend outlives machine resets, so it may be shared with the device that comes after this one.
  Network(machine::GuestMemory& memory, std::shared_ptr<net::Backend> backend, const Config& config,
          const RingFeatures& rings = {});
  // Nothing arrives any more.
  ~Network() override;

 private:
  bool receive(std::span<const uint8_t> frame) noexcept override;
  bool place(std::span<const uint8_t> frame) noexcept;

  void process(unsigned queue) noexcept override;
  unsigned config_size() const noexcept override;
  void config_bytes(std::span<uint8_t> out) const noexcept override;

  void transmit() noexcept;
  void control() noexcept;
  size_t header_size() const noexcept;

  std::shared_ptr<net::Backend> backend_;
  Config config_;
  Chain chain_;
  std::vector<Chain> taken_;    // receive buffers of the frame that is being placed
  std::vector<uint8_t> frame_;  // a frame of the guest, copied
};

}  // namespace lodge::device::virtio
