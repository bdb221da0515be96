// The console device: hvc0 for people, and named ports for programs (/dev/virtio-ports/NAME).
#pragma once

#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "device/character.hpp"
#include "device/virtio/device.hpp"

namespace lodge::device::virtio {

// Locks, as everywhere: a back end's port lock, then the device's lock, then a back end's buffer.
class Console final : public Device {
 public:
  struct PortConfig {
    std::string name;  // empty: a console
    std::shared_ptr<CharBackend> backend;
  };
  // The first port is the console hvc0. At most max_ports.
  static constexpr unsigned max_ports = 8;
  Console(machine::GuestMemory& memory, std::vector<PortConfig> ports, const RingFeatures& rings = {});
  // Nothing arrives from the back ends any more.
  ~Console() override;

  // Connects the back ends: input may flow. Once.
  void connect_backends();

 private:
  struct Control {
    uint32_t id;
    uint16_t event, value;
    bool operator==(const Control&) const = default;
  };
  // The back end's view of a port.
  class Port final : public CharPort {
   public:
    Port(Console& console, unsigned index, PortConfig wanted)
        : config(std::move(wanted)), console_(console), index_(index) {}
    size_t receive(std::span<const uint8_t> bytes) noexcept override {
      return console_.receive(index_, bytes);
    }
    void transmit_ready() noexcept override { console_.transmit_ready(index_); }
    void resized(uint16_t columns, uint16_t rows) noexcept override {
      if (index_ == 0) console_.resize(columns, rows);
    }

    PortConfig config;
    bool guest_open = false;
    uint32_t sent = 0;  // bytes of the oldest waiting output that the back end has taken

   private:
    Console& console_;
    unsigned index_;
  };

  size_t receive(unsigned port, std::span<const uint8_t> bytes) noexcept;
  void transmit_ready(unsigned port) noexcept;
  void resize(uint16_t columns, uint16_t rows) noexcept;

  void process(unsigned queue) noexcept override;
  unsigned config_size() const noexcept override;
  void config_bytes(std::span<uint8_t> out) const noexcept override;
  void config_written(unsigned offset, std::span<const uint8_t> data) noexcept override;
  void was_reset() noexcept override;
  void save_device(nlohmann::json& json) const override;
  void load_device(const nlohmann::json& json) override;

  bool listening(unsigned port) const noexcept;
  void transmit(unsigned port) noexcept;
  void take_control() noexcept;
  void handle(const Control& message) noexcept;
  void tell(const Control& message) noexcept;
  void send_control() noexcept;

  std::vector<std::unique_ptr<Port>> ports_;
  std::deque<Control> to_driver_;  // each message at most once
  uint16_t columns_ = 80, rows_ = 25;
  bool connected_ = false;
  Chain chain_;
};

}  // namespace lodge::device::virtio
