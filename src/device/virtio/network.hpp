// The network card: pairs of queues and a control queue over a net::Backend.
#pragma once

#include <memory>
#include <vector>

#include "device/virtio/device.hpp"
#include "device/virtio/network_filter.hpp"
#include "device/virtio/network_receive.hpp"
#include "net/backend.hpp"

namespace lodge::device::virtio {

class Network final : public Device, private net::Card {
 public:
  struct Config {
    Mac mac;
    uint16_t mtu = 0;  // 0: the back end's proposal, or else the guest's own choice
  };
  // The backend outlives machine resets, so it may be shared with the device that comes after this one. The
  // card has as many pairs of queues as it.
  Network(machine::GuestMemory& memory, std::shared_ptr<net::Backend> backend, const Config& config,
          const RingFeatures& rings = {});
  // Nothing arrives any more.
  ~Network() override;

  // Connects the back end, served by `loop`; attach_loop() does it.
  void plug_in(EventLoop& loop) noexcept { backend_->connect(*this, loop); }

  // What has passed since the device was made; dropped is also what its network had to. Packets that the
  // driver's filters leave out are in none of the counts. Any thread.
  struct Counters {
    Mac mac;
    net::Traffic to_guest, from_guest;
  };
  Counters counters() const noexcept;

 private:
  // --- net::Card
  Received receive(unsigned pair, net::Source& source) noexcept override;
  void transmit_ready(unsigned pair) noexcept override;
  void set_link(bool up) noexcept override;

  // --- Device
  void process(unsigned queue) noexcept override;
  unsigned config_size() const noexcept override;
  void config_bytes(std::span<uint8_t> out) const noexcept override;
  void attached(EventLoop& loop) override { plug_in(loop); }
  void started() noexcept override;
  void quiesce(std::unique_lock<std::mutex>& lock, int queue) noexcept override;
  void was_reset() noexcept override;
  void save_device(nlohmann::json& json) const override;
  void load_device(const nlohmann::json& json) override;

  void transmit(unsigned pair) noexcept;
  bool send(unsigned pair, const Chain& chain) noexcept;
  void control(unsigned index) noexcept;
  bool command(uint8_t group, uint8_t command, std::span<const uint8_t> data) noexcept;
  bool use_pairs(std::span<const uint8_t> data) noexcept;
  bool use_offloads(std::span<const uint8_t> data) noexcept;
  void accept(uint64_t offloads) noexcept;
  unsigned control_queue() const noexcept;
  size_t header_size() const noexcept;

  std::shared_ptr<net::Backend> backend_;
  Config config_;
  Mac mac_;
  unsigned max_pairs_;
  unsigned pairs_ = 1;     // in use
  uint64_t offloads_ = 0;  // what the driver copes with now, as feature bits
  ReceiveFilter filter_;
  bool link_ = true;
  bool announce_ = false;                  // the driver is to tell the network where it is
  bool announce_at_start_ = false;         // and will be told so when it runs here
  std::vector<PacketReceiver> receivers_;  // of each pair
  Chain chain_;
  std::vector<Segment> segments_;
  std::vector<iovec> pieces_;
  std::vector<uint8_t> command_;
  std::vector<uint8_t> lost_;  // where packets go while there is no link
  uint64_t lost_packets_ = 0;
  net::Traffic sent_;
};

}  // namespace lodge::device::virtio
