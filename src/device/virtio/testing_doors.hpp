// The ways by which a driver reaches a device, for tests: the registers of MMIO, of modern and of legacy PCI.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <array>
#include <deque>
#include <memory>

#include "device/pci/allocate.hpp"
#include "device/pci/root.hpp"
#include "device/reset.hpp"
#include "device/testing.hpp"
#include "device/virtio/mmio.hpp"
#include "device/virtio/pci.hpp"
#include "device/virtio/testing.hpp"

namespace lodge::device::virtio::testing {

class Door {
 public:
  virtual ~Door() = default;
  virtual Device& device() = 0;
  virtual void set_status(uint8_t status) = 0;
  virtual uint8_t status() = 0;
  virtual void negotiate(uint64_t features) = 0;
  // Everything that says where a queue is, and that it is ready.
  virtual void set_up(unsigned queue, const QueueSetup& setup) = 0;
  virtual void notify(unsigned queue) = 0;
  virtual bool reset_queue(unsigned /*queue*/) { return false; }  // false: there is no such register
  virtual void write_config(unsigned offset, unsigned size, uint64_t value) = 0;
  virtual void write_any(uint64_t offset, unsigned size, uint64_t value) = 0;
  // Where a driver of this age has the parts of its queue.
  virtual void arrange(DriverQueue& /*queue*/) const {}
  virtual bool legacy() const { return false; }
  // The loop's part: kicks that no vCPU has served.
  void pump() {
    for (unsigned i = 0; i < device().queues(); i++) {
      uint64_t count = 0;
      if (::read(device().kick_fd(i), &count, sizeof count) == sizeof count) device().kick(i);
    }
  }
};

class MmioDoor final : public Door {
 public:
  explicit MmioDoor(std::unique_ptr<Device> device) : transport_(std::move(device), line_, platform_) {
    transport_.mounted(machine::layout::virtio_mmio_base);
  }
  Device& device() override { return transport_.device(); }
  void set_status(uint8_t status) override { put(0x70, status); }
  uint8_t status() override { return static_cast<uint8_t>(transport_.read(0x70, 4)); }
  void negotiate(uint64_t features) override {
    for (uint32_t half = 0; half < 2; half++)
      put(0x24, half), put(0x20, features >> (32 * half) & 0xffff'ffff);
  }
  void set_up(unsigned queue, const QueueSetup& setup) override {
    put(0x30, queue), put(0x38, setup.size);
    put(0x80, setup.descriptors & 0xffff'ffff), put(0x84, setup.descriptors >> 32);
    put(0x90, setup.driver & 0xffff'ffff), put(0x94, setup.driver >> 32);
    put(0xa0, setup.device & 0xffff'ffff), put(0xa4, setup.device >> 32);
    put(0x44, 1);
  }
  void notify(unsigned queue) override { put(0x50, queue); }
  bool reset_queue(unsigned queue) override { return put(0x30, queue), put(0xc0, 1), true; }
  void write_config(unsigned offset, unsigned size, uint64_t value) override {
    transport_.write(0x100 + offset, size, value);
  }
  void write_any(uint64_t offset, unsigned size, uint64_t value) override {
    transport_.write(offset % MmioTransport::window_size & ~uint64_t{size - 1}, size, value);
  }

 private:
  void put(uint64_t at, uint64_t value) { transport_.write(at, 4, value); }
  device::testing::FakeInterrupt line_;
  device::testing::FakePlatform platform_;
  MmioTransport transport_;
};

// The modern or the legacy registers of a PCI function.
class PciDoor final : public Door {
 public:
  PciDoor(std::unique_ptr<Device> device, bool legacy)
      : legacy_(legacy),
        function_(with_pin(std::move(device))),
        bar_(function_->config_read(legacy ? 0x10 : 0x20, 4) & ~15u) {
    for (unsigned i = 0; i < bars_.size(); i++) bars_[i] = function_->config_read(0x10 + 4 * i, 4);
  }
  ~PciDoor() override { root_.remove(2, 0); }
  Device& device() override { return function_->device(); }
  void set_status(uint8_t status) override { put(legacy_ ? 18 : 20, 1, status); }
  uint8_t status() override { return static_cast<uint8_t>(bus().read(bar_ + (legacy_ ? 18 : 20), 1)); }
  void negotiate(uint64_t features) override {
    if (legacy_) return put(4, 4, features & 0xffff'ffff);
    for (uint32_t half = 0; half < 2; half++)
      put(8, 4, half), put(12, 4, features >> (32 * half) & 0xffff'ffff);
  }
  void set_up(unsigned queue, const QueueSetup& setup) override {
    if (legacy_) return put(14, 2, queue), put(8, 4, setup.descriptors / 4096);
    put(22, 2, queue), put(24, 2, setup.size);
    put(32, 8, setup.descriptors), put(40, 8, setup.driver), put(48, 8, setup.device);
    put(28, 2, 1);
  }
  void notify(unsigned queue) override {
    if (legacy_)
      put(16, 2, queue);
    else
      put(0x3000 + uint64_t{queue} * 4 % 0x1000, 2, queue);
  }
  bool reset_queue(unsigned queue) override {
    if (!legacy_) put(22, 2, queue), put(58, 2, 1);
    return !legacy_;
  }
  void write_config(unsigned offset, unsigned size, uint64_t value) override {
    if (!legacy_)
      put(0x2000 + offset, size, value);
    else if (offset + size <= 100)
      put(20 + offset, size, value);
  }
  void write_any(uint64_t offset, unsigned size, uint64_t value) override {
    put(offset % (legacy_ ? 128 : 0x4000) & ~uint64_t{size - 1}, size, value);
    function_->config_write(static_cast<unsigned>(offset % 256) & ~(size - 1), std::min(size, 4u),
                            static_cast<uint32_t>(value));
    // All where they were: a driver that loses its own registers, or lays others over them, proves nothing.
    function_->config_write(4, 2, 0);
    for (unsigned i = 0; i < bars_.size(); i++) function_->config_write(0x10 + 4 * i, 4, bars_[i]);
    function_->config_write(4, 2, 7);
  }
  // 2.7.2: the size is the device's choice, the used ring is on the next page.
  void arrange(DriverQueue& queue) const override {
    if (legacy_) queue.setup.device = (queue.setup.driver + 2u * queue.size() + 6 + 4095) & ~uint64_t{4095};
  }
  bool legacy() const override { return legacy_; }

 private:
  std::unique_ptr<PciTransport> with_pin(std::unique_ptr<Device> device) {
    const bool transitional = has_legacy_interface(device->description().type);
    auto function = std::make_unique<PciTransport>(std::move(device),
                                                   PciTransport::Wiring{platform_, platform_}, transitional);
    root_.add(2, 0, *function);
    pci::assign_resources(root_);
    return function;
  }
  machine::Bus& bus() { return legacy_ ? ports_ : memory_; }
  void put(uint64_t at, unsigned size, uint64_t value) { bus().write(bar_ + at, size, value); }

  bool legacy_;
  machine::Bus ports_{"port", 0x10000}, memory_{"memory", uint64_t{1} << 52};
  std::deque<device::testing::FakeInterrupt> lines_{24};
  device::testing::FakePower power_;
  ResetControl reset_{power_};
  device::testing::FakePlatform platform_;
  pci::Root root_{ports_, memory_, [this](unsigned gsi) -> machine::Interrupt& { return lines_.at(gsi); },
                  reset_};
  std::unique_ptr<PciTransport> function_;
  uint64_t bar_;
  std::array<uint32_t, 6> bars_{};
};

}  // namespace lodge::device::virtio::testing
