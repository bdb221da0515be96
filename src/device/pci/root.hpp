// The PCI root: finds the function that a configuration access names, and wires interrupt pins to the IOAPIC.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string_view>
#include <vector>

#include "base/state.hpp"
#include "device/pci/function.hpp"
#include "device/pci/root_port.hpp"
#include "device/shared_line.hpp"
#include "machine/bus.hpp"
#include "machine/io.hpp"

namespace lodge::device::pci {

struct RootState {
  static constexpr std::string_view name = "pci-root";
  static constexpr unsigned version = 1;
  uint32_t config_address = 0;
  template <class V>
  void visit(V& v) {
    v("config_address", config_address);
  }
};

class Root final : public Savable {
 public:
  static constexpr uint64_t ports_base = 0xcf8, ports_size = 8;  // CONFIG_ADDRESS and CONFIG_DATA
  static constexpr unsigned slots = 32, functions = 8;

  // BARs appear on `ports` and `memory`. `line` gives the interrupt inputs 16 to 23 (layout::pci_gsi). Byte
  // accesses to 0xCF9 go to `reset_control`. All outlive the root.
  Root(machine::Bus& ports, machine::Bus& memory,
       const std::function<machine::Interrupt&(unsigned gsi)>& line, machine::RegisterWindow& reset_control);

  machine::RegisterWindow& port_window() noexcept { return port_window_; }
  // layout::ecam_size bytes at layout::ecam_base.
  machine::RegisterWindow& ecam_window() noexcept { return ecam_window_; }

  Root(const Root&) = delete;
  Root& operator=(const Root&) = delete;
  ~Root() override;

  // Plugs a function in, before any vCPU runs; it outlives the root or is removed before it dies. Throws
  // UsageError when the place is taken.
  void add(unsigned slot, unsigned function, Function& device);
  // While no vCPU runs.
  void remove(unsigned slot, unsigned function) noexcept;
  // The first slot from 1 on without a function. Throws UsageError when the bus is full.
  unsigned free_slot() const;

  // The same as add() for a port, whose bus is found from then on. A port that is removed lets its child go.
  void add_port(unsigned slot, RootPort& port);
  // Null when no port has this id.
  RootPort* port(std::string_view id) const noexcept;
  const std::vector<RootPort*>& ports() const noexcept { return port_list_; }
  unsigned next_port() const noexcept { return static_cast<unsigned>(port_list_.size()) + 1; }
  // Takes the function out of the port that it is behind; nothing when it is behind none.
  void unplug(Function& child, bool announce) noexcept;

  // Every function of bus 0 that is plugged in, by slot and function. Set-up.
  void for_each(const std::function<void(unsigned slot, unsigned function, Function& device)>& visit);

  // Resets CONFIG_ADDRESS and every function.
  void reset() noexcept;

  void save(nlohmann::json& json) const override;
  void load(const nlohmann::json& json) override;

 private:
  class PortWindow final : public machine::RegisterWindow {
   public:
    explicit PortWindow(Root& root) : root_(root) {}
    uint64_t read(uint64_t offset, unsigned size) noexcept override;
    void write(uint64_t offset, unsigned size, uint64_t value) noexcept override;

   private:
    Root& root_;
  };
  class EcamWindow final : public machine::RegisterWindow {
   public:
    explicit EcamWindow(Root& root) : root_(root) {}
    uint64_t read(uint64_t offset, unsigned size) noexcept override;
    void write(uint64_t offset, unsigned size, uint64_t value) noexcept override;

   private:
    Root& root_;
  };

  // Calls `visit` with the function at `address` (bus << 16 | slot << 11 | function << 8), if there is one; a
  // function behind a port cannot leave meanwhile. False: there is none.
  template <class Visit>
  bool with_function(uint32_t address, Visit visit) const;
  uint32_t selected() const noexcept;

  machine::Bus& ports_;
  machine::Bus& memory_;
  machine::RegisterWindow& reset_control_;
  std::array<Function*, slots * functions> table_{};
  std::vector<RootPort*> port_list_;                  // does not change while vCPUs run
  std::array<std::unique_ptr<SharedLine>, 8> lines_;  // GSI 16 to 23
  mutable std::mutex mutex_;
  RootState state_;
  PortWindow port_window_{*this};
  EcamWindow ecam_window_{*this};
};

}  // namespace lodge::device::pci
