// VirtIO over PCI: one function, with the registers of VirtIO 1.0 and later and, as a transitional device,
// those of older drivers.
#pragma once

#include <memory>

#include "device/pci/function.hpp"
#include "device/pci/msix.hpp"
#include "device/virtio/device.hpp"
#include "machine/io.hpp"

namespace lodge::device::virtio {

struct PciState {
  static constexpr std::string_view name = "virtio-pci";
  static constexpr unsigned version = 1;
  uint32_t device_feature_select = 0, driver_feature_select = 0;
  uint16_t queue_select = 0;
  uint16_t config_vector = pci::Msix::NO_VECTOR;
  std::vector<uint8_t> queue_vectors;  // 2 bytes each
  uint64_t driver_features = 0;        // as written so far
  uint8_t isr = 0;
  template <class V>
  void visit(V& v) {
    v("device_feature_select", device_feature_select), v("driver_feature_select", driver_feature_select);
    v("queue_select", queue_select), v("config_vector", config_vector), v("queue_vectors", queue_vectors);
    v("driver_features", driver_features), v("isr", isr);
  }
};

// Threads: registers from any vCPU, interrupts from any thread. Locks: the device's before `register_mutex_`,
// before MSI-X's and the function's. No lock of this class is held while it calls the device.
class PciTransport final : public pci::Function, private Transport {
 public:
  struct Wiring {
    machine::MsiTarget& msi;
    machine::Doorbells& doorbells;
  };
  // Takes the device; kicks are served by whoever serves its kick_fd(). A transitional function has the
  // identity and the port registers that drivers older than VirtIO 1.0 look for.
  PciTransport(std::unique_ptr<Device> device, const Wiring& wiring, bool transitional);
  ~PciTransport() override;

  // Set-up, before it is plugged in: it sits behind a PCI Express port, and is an endpoint there.
  void become_express_endpoint();
  Device& device() noexcept { return *device_; }
  void reset() noexcept override;

  void save(nlohmann::json& json) const override;
  void load(const nlohmann::json& json) override;

 private:
  // The parts of the modern BAR, and where they are.
  enum class Part { common, isr, device, notify };
  class ModernWindow final : public machine::RegisterWindow {
   public:
    explicit ModernWindow(PciTransport& owner) : owner_(owner) {}
    uint64_t read(uint64_t offset, unsigned size) noexcept override {
      return owner_.modern_read(offset, size);
    }
    void write(uint64_t offset, unsigned size, uint64_t value) noexcept override {
      owner_.modern_write(offset, size, value);
    }

   private:
    PciTransport& owner_;
  };
  class LegacyWindow final : public machine::RegisterWindow {
   public:
    explicit LegacyWindow(PciTransport& owner) : owner_(owner) {}
    uint64_t read(uint64_t offset, unsigned size) noexcept override {
      return owner_.legacy_read(offset, size);
    }
    void write(uint64_t offset, unsigned size, uint64_t value) noexcept override {
      owner_.legacy_write(offset, size, value);
    }

   private:
    PciTransport& owner_;
  };

  void add_capabilities();
  void config_written(unsigned offset, unsigned size) noexcept override;
  void config_reading(unsigned offset, unsigned size) noexcept override;
  void bar_mapped(unsigned index, uint64_t address) noexcept override {
    ring_doorbells(index, address, true);
  }
  void bar_unmapped(unsigned index, uint64_t address) noexcept override {
    ring_doorbells(index, address, false);
  }
  void ring_doorbells(unsigned bar, uint64_t address, bool add) noexcept;
  void queue_interrupt(unsigned queue) noexcept override;
  void config_interrupt() noexcept override;
  void interrupt(uint16_t vector, uint8_t isr_bit) noexcept;
  uint8_t take_isr() noexcept;

  uint64_t modern_read(uint64_t offset, unsigned size) noexcept;
  void modern_write(uint64_t offset, unsigned size, uint64_t value) noexcept;
  uint64_t common_read(unsigned offset) noexcept;
  void common_write(unsigned offset, unsigned size, uint64_t value) noexcept;
  void queue_write(unsigned offset, unsigned size, uint64_t value) noexcept;
  uint64_t legacy_read(uint64_t offset, unsigned size) noexcept;
  void legacy_write(uint64_t offset, unsigned size, uint64_t value) noexcept;
  void legacy_queue_address(uint32_t page) noexcept;
  uint32_t legacy_config_offset() const noexcept { return msix_.enabled() ? 24 : 20; }

  bool cfg_access(machine::RegisterWindow*& window, uint64_t& offset, unsigned& size) noexcept;
  PciState registers() const noexcept;
  uint16_t queue_vector(unsigned queue) const noexcept;
  uint16_t checked_vector(uint64_t vector) const noexcept;
  void forget_registers() noexcept;

  machine::Doorbells& doorbells_;
  std::unique_ptr<Device> device_;
  pci::Msix msix_;
  ModernWindow modern_{*this};
  LegacyWindow legacy_{*this};
  unsigned cfg_capability_ = 0;
  mutable std::mutex register_mutex_;
  PciState registers_;
  std::vector<uint16_t> queue_vectors_;
  std::vector<machine::Doorbell> mounted_doorbells_;  // changed with the bus mappings locked
};

}  // namespace lodge::device::virtio
