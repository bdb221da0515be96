// MSI-X: the capability, its table and its pending bits.
#pragma once

#include <cstdint>
#include <mutex>
#include <nlohmann/json_fwd.hpp>
#include <vector>

#include "device/pci/config_space.hpp"
#include "machine/io.hpp"

namespace lodge::device::pci {

// Any thread. The function that owns it gives window() a memory BAR and passes on its configuration writes.
class Msix {
 public:
  static constexpr uint16_t NO_VECTOR = 0xffff;
  static constexpr uint64_t window_size = 0x1000;  // the table, and the pending bits in its second half

  // `vectors` from 1 to 128. `target` outlives this object.
  Msix(unsigned vectors, machine::MsiTarget& target);

  // Set-up: adds the capability to `config`; the window is at `offset` of BAR `bar`.
  void add_capability(ConfigSpace& config, unsigned bar, uint32_t offset);
  // After a write to the configuration space: takes enable and mask from the capability's message control.
  void control_written(uint16_t control) noexcept;
  unsigned capability() const noexcept { return capability_; }

  machine::RegisterWindow& window() noexcept { return window_; }
  unsigned vectors() const noexcept { return static_cast<unsigned>(entries_.size()); }
  bool enabled() const noexcept;
  // Sends the message, or marks it pending while masked. Ignored when disabled or for NO_VECTOR.
  void signal(unsigned vector) noexcept;
  void reset() noexcept;

  void save(nlohmann::json& json) const;
  void load(const nlohmann::json& json);  // throws UsageError

 private:
  struct Entry {
    uint64_t address = 0;
    uint32_t data = 0;
    uint32_t control = 1;  // masked after reset
    bool pending = false;
  };
  class Window final : public machine::RegisterWindow {
   public:
    explicit Window(Msix& msix) : msix_(msix) {}
    uint64_t read(uint64_t offset, unsigned size) noexcept override;
    void write(uint64_t offset, unsigned size, uint64_t value) noexcept override;

   private:
    Msix& msix_;
  };
  uint32_t read_word(uint64_t offset) const noexcept;
  void write_word(uint64_t offset, uint32_t value) noexcept;
  void deliver(Entry& entry) noexcept;
  void deliver_pending() noexcept;

  machine::MsiTarget& target_;
  unsigned capability_ = 0;
  mutable std::mutex mutex_;
  bool enabled_ = false, masked_ = false;
  std::vector<Entry> entries_;
  Window window_{*this};
};

}  // namespace lodge::device::pci
