// Every VirtIO device with a host's side that tests control, and a request that it must answer.
#pragma once

#include <linux/input-event-codes.h>
#include <unistd.h>

#include <chrono>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/temporary_directory.hpp"
#include "device/testing.hpp"
#include "device/virtio/balloon.hpp"
#include "device/virtio/block.hpp"
#include "device/virtio/console.hpp"
#include "device/virtio/entropy.hpp"
#include "device/virtio/file_system.hpp"
#include "device/virtio/input.hpp"
#include "device/virtio/network.hpp"
#include "device/virtio/testing.hpp"
#include "device/virtio/vsock.hpp"

namespace lodge::device::virtio::testing {

class Rig {
 public:
  virtual ~Rig() = default;
  virtual std::unique_ptr<Device> make(machine::GuestMemory& memory) = 0;
  virtual void plugged(Device& /*device*/) {}
  // A request by the rules: its queue and its buffers, of which the driver has `at` on to choose from.
  virtual unsigned request(machine::GuestMemory& memory, uint64_t at, std::vector<Buffer>& buffers) = 0;
  // What the host has for the guest.
  virtual void provoke(Device& /*device*/) {}
  // A kick of this queue makes the device look at what is in it.
  virtual bool takes(unsigned /*queue*/) const { return true; }
};

class EntropyRig final : public Rig {
  std::unique_ptr<Device> make(machine::GuestMemory& memory) override {
    return std::make_unique<Entropy>(memory);
  }
  unsigned request(machine::GuestMemory&, uint64_t at, std::vector<Buffer>& buffers) override {
    buffers = {{at, 16, true}};
    return 0;
  }
};

// A disk whose requests complete later, on another thread.
class LateDisk final : public block::Image {
 public:
  void read(std::span<const iovec>, uint64_t, block::Completion done) noexcept override {
    later(std::move(done));
  }
  void write(std::span<const iovec>, uint64_t, block::Completion done) noexcept override {
    later(std::move(done));
  }
  void flush(block::Completion done) noexcept override { later(std::move(done)); }
  void discard(uint64_t, uint64_t, block::Completion done) noexcept override { later(std::move(done)); }
  void write_zeroes(uint64_t, uint64_t, bool, block::Completion done) noexcept override {
    later(std::move(done));
  }
  void resize(uint64_t, block::Completion done) noexcept override { done(0); }
  uint64_t size() const noexcept override { return 1 << 20; }
  bool read_only() const noexcept override { return false; }
  std::string_view format() const noexcept override { return "late"; }
  int close() noexcept override { return 0; }

 private:
  void later(block::Completion done) {
    const std::lock_guard lock(mutex_);
    held_.push_back(std::move(done));
  }
  void work(const std::stop_token& stop) {
    while (!stop.stop_requested()) {
      std::vector<block::Completion> all;
      {
        const std::lock_guard lock(mutex_);
        all.swap(held_);
      }
      for (auto& done : all) done(0);
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
  }
  std::mutex mutex_;
  std::vector<block::Completion> held_;
  std::jthread thread_{[this](const std::stop_token& stop) { work(stop); }};
};

class BlockRig final : public Rig {
  std::unique_ptr<Device> make(machine::GuestMemory& memory) override {
    return std::make_unique<Block>(memory, std::make_shared<LateDisk>(), Block::Config{"", 2});
  }
  unsigned request(machine::GuestMemory& memory, uint64_t at, std::vector<Buffer>& buffers) override {
    memory.write(at, std::vector<uint8_t>(16));  // read sector 0
    buffers = {{at, 16, false}, {at + 512, 512, true}, {at + 1024, 1, true}};
    return 1;
  }
};

class Terminal final : public device::testing::FakeBackend {
 public:
  void connect(CharPort& port) override { port_ = &port; }
  void disconnect() noexcept override { port_ = nullptr; }
  void type() {
    const std::array<uint8_t, 100> text{};
    if (port_) port_->receive(text), port_->resized(80, 25);
  }

 private:
  CharPort* port_ = nullptr;
};

class ConsoleRig final : public Rig {
  std::unique_ptr<Device> make(machine::GuestMemory& memory) override {
    auto console = std::make_unique<Console>(
        memory, std::vector<Console::PortConfig>{{"", terminal_}, {"agent", std::make_shared<Terminal>()}});
    console->connect_backends();
    return console;
  }
  unsigned request(machine::GuestMemory&, uint64_t at, std::vector<Buffer>& buffers) override {
    buffers = {{at, 3, false}};
    return 1;
  }
  void provoke(Device&) override { terminal_->type(); }
  bool takes(unsigned queue) const override { return queue == 1 || queue == 3; }
  std::shared_ptr<Terminal> terminal_ = std::make_shared<Terminal>();
};

class Wire final : public net::Backend, public net::Source {
 public:
  unsigned queues() const noexcept override { return 2; }
  net::Offloads transmit_offloads() const noexcept override { return {true, true, true, true}; }
  net::Offloads receive_offloads() const noexcept override { return {true, true, true, true}; }
  void connect(net::Card& card, EventLoop&) noexcept override { card_ = &card; }
  void disconnect() noexcept override { card_ = nullptr; }
  bool send(unsigned, const net::PacketHeader&, std::span<const iovec>) noexcept override { return true; }
  size_t largest() noexcept override { return waiting_ ? 60 : 0; }
  size_t read(net::PacketHeader& header, std::span<const iovec> room) noexcept override {
    if (!std::exchange(waiting_, false)) return 0;
    header = {};
    return net::scatter(std::vector<uint8_t>(60), room);
  }
  void bring() {
    waiting_ = true;
    if (card_) card_->receive(0, *this);
  }

 private:
  net::Card* card_ = nullptr;
  bool waiting_ = false;
};

class NetworkRig final : public Rig {
  std::unique_ptr<Device> make(machine::GuestMemory& memory) override {
    auto network = std::make_unique<Network>(memory, wire_, Network::Config{});
    network->plug_in(loop_);
    return network;
  }
  unsigned request(machine::GuestMemory& memory, uint64_t at, std::vector<Buffer>& buffers) override {
    memory.write(at, std::vector<uint8_t>(12 + 60));
    buffers = {{at, 12 + 60, false}};
    return 1;
  }
  void provoke(Device&) override { wire_->bring(); }
  bool takes(unsigned queue) const override { return queue == 1; }  // which is what depends on features
  std::shared_ptr<Wire> wire_ = std::make_shared<Wire>();
  EventLoop loop_{"test"};
};

class BalloonRig final : public Rig {
  std::unique_ptr<Device> make(machine::GuestMemory& memory) override {
    return std::make_unique<Balloon>(memory);
  }
  unsigned request(machine::GuestMemory& memory, uint64_t at, std::vector<Buffer>& buffers) override {
    memory.write(at, std::array<uint8_t, 4>{0x10, 0, 0, 0});  // page 0x10: inflated
    buffers = {{at, 4, false}};
    return 0;
  }
  void provoke(Device& device) override { static_cast<Balloon&>(device).set_target(machine::layout::MiB); }
  bool takes(unsigned queue) const override { return queue < 2; }
};

class VsockRig final : public Rig {
  std::unique_ptr<Device> make(machine::GuestMemory& memory) override {
    return std::make_unique<Vsock>(memory, 3, directory_ / "socket");
  }
  unsigned request(machine::GuestMemory& memory, uint64_t at, std::vector<Buffer>& buffers) override {
    memory.write(at, std::vector<uint8_t>(44));  // fits no connection
    buffers = {{at, 44, false}};
    return 1;
  }
  bool takes(unsigned queue) const override { return queue == 1; }
  TemporaryDirectory directory_;
};

class FileSystemRig final : public Rig {
  std::unique_ptr<Device> make(machine::GuestMemory& memory) override {
    return std::make_unique<FileSystem>(
        memory, std::make_shared<share::Folder>(directory_.path()), "tag",
        share::FuseServer::Config{false, share::owners_of_process("", "0:0"), 16});
  }
  unsigned request(machine::GuestMemory& memory, uint64_t at, std::vector<Buffer>& buffers) override {
    memory.write(at, std::vector<uint8_t>(40));
    buffers = {{at, 40, false}, {at + 64, 64, true}};
    return 1;
  }
  TemporaryDirectory directory_;
};

class InputRig final : public Rig {
  std::unique_ptr<Device> make(machine::GuestMemory& memory) override {
    return std::make_unique<Input>(memory, Input::Kind::keyboard);
  }
  unsigned request(machine::GuestMemory& memory, uint64_t at, std::vector<Buffer>& buffers) override {
    memory.write(at, std::array<uint8_t, 8>{EV_LED, 0, LED_CAPSL, 0, 1, 0, 0, 0});
    buffers = {{at, 8, false}};
    return 1;
  }
  void provoke(Device& device) override {
    static_cast<Input&>(device).send(std::array{InputEvent{EV_KEY, KEY_A, 1}, InputEvent{EV_KEY, KEY_A, 0}});
  }
  bool takes(unsigned queue) const override { return queue == 1; }
};

}  // namespace lodge::device::virtio::testing
