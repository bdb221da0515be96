// One PCI function with a type 0 header: identity, base address registers, interrupt pin, capabilities.
// Devices derive from it.
#pragma once

#include <array>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/state.hpp"
#include "device/pci/config_space.hpp"
#include "machine/bus.hpp"
#include "machine/io.hpp"

namespace lodge::device::pci {

struct Identity {
  uint16_t vendor, device;
  uint8_t revision;
  uint32_t class_code;  // class << 16 | subclass << 8 | programming interface
  uint16_t subsystem_vendor = 0, subsystem = 0;
};

enum class BarKind { io, memory32, memory64, memory64_prefetchable };

struct FunctionState {
  static constexpr std::string_view name = "pci-function";
  static constexpr unsigned version = 1;
  std::vector<uint8_t> config;
  bool intx = false;
  template <class V>
  void visit(V& v) {
    v("config", config), v("intx", intx);
  }
};

// Threads: configuration accesses and set_intx() from any. Locks: `map_mutex_` orders changes of the bus
// mappings and is never taken by a register access; `mutex_` guards the bytes for a moment only and is free
// while a bus changes. A BAR's window may therefore read this function's configuration, but must not write
// it.
class Function : public Savable {
 public:
  Function(std::string name, const Identity& identity, unsigned config_size = 256);
  Function(const Function&) = delete;
  Function& operator=(const Function&) = delete;
  // The windows of a derived class are gone by now: no vCPU may run any more, or detach() was called before.
  ~Function() override { detach(); }

  const std::string& name() const noexcept { return name_; }

  // Called by the root when the function is plugged in: where its BARs appear, and what its interrupt pin
  // drives (null: no pin). All outlive the function or detach() is called before.
  void attach(machine::Bus& ports, machine::Bus& memory, machine::Interrupt* pin);
  void detach() noexcept;
  // 0: none, 1 to 4: INTA to INTD.
  unsigned interrupt_pin() const noexcept;
  // The BARs in the order of their indexes.
  struct BarNeed {
    unsigned index;
    BarKind kind;
    uint64_t size;
  };
  std::vector<BarNeed> bar_needs() const;
  // Set-up, as firmware does it: puts a BAR at `address`, also after every reset(), and writes the interrupt
  // line.
  void assign_bar(unsigned index, uint64_t address) noexcept;
  void assign_interrupt_line(uint8_t line) noexcept;
  // Set-up: lets the function decode its BARs.
  void enable_decoding() noexcept;
  // Marks the header of a slot that has more than function 0.
  void set_multifunction() noexcept;

  uint32_t config_read(unsigned offset, unsigned size) noexcept;
  void config_write(unsigned offset, unsigned size, uint32_t value) noexcept;

  // The level of the interrupt pin; the guest may have disabled it in COMMAND.
  void set_intx(bool level) noexcept;

  // The reset of the bus: the guest's configuration goes, so do the mappings.
  virtual void reset() noexcept;

  void save(nlohmann::json& json) const override;
  void load(const nlohmann::json& json) override;

 protected:
  // --- Set-up, from the constructor of a derived class.
  ConfigSpace& config() noexcept { return config_; }
  // `size` is a power of two (at least 4 for ports, 16 for memory) and `window`, a member of the derived
  // class, answers. A 64-bit BAR takes `index` and `index + 1`.
  void add_bar(unsigned index, BarKind kind, uint64_t size, machine::RegisterWindow& window);
  void use_interrupt_pin(unsigned pin);

  // --- Run time.
  // After the guest has written [offset, offset + size), without any lock held: what a derived class does
  // about its own registers and capabilities (MSI-X enable, ...).
  virtual void config_written(unsigned /*offset*/, unsigned /*size*/) noexcept {}
  // Before the guest reads [offset, offset + size), without any lock held: for registers that are computed.
  virtual void config_reading(unsigned /*offset*/, unsigned /*size*/) noexcept {}
  // A BAR's window has appeared on its bus at `address`, or is about to leave it. The bus mappings are
  // locked: no configuration write from here. A class that overrides them calls detach() in its destructor.
  virtual void bar_mapped(unsigned /*index*/, uint64_t /*address*/) noexcept {}
  virtual void bar_unmapped(unsigned /*index*/, uint64_t /*address*/) noexcept {}
  // Set-up: a value that reset() returns to as well.
  void assign_register(unsigned offset, unsigned size, uint32_t value) noexcept {
    set_initial(offset, size, value);
  }
  // Bytes of the configuration space as they are, without masks and without the calls above.
  uint32_t config_value(unsigned offset, unsigned size) const noexcept;
  void set_config_value(unsigned offset, unsigned size, uint32_t value) noexcept;
  // The same for some bits, while a guest may be changing others: first `clear`, then `set`.
  void change_config(unsigned offset, unsigned size, uint32_t clear, uint32_t set) noexcept;
  bool bus_master() noexcept { return config_read(COMMAND, 2) & COMMAND_BUS_MASTER; }

 private:
  struct Bar {
    BarKind kind;
    uint64_t size;
    machine::RegisterWindow* window;
    std::optional<uint64_t> mapped;  // where it is on its bus; guarded by map_mutex_
  };
  machine::Bus& bus_of(const Bar& bar) const noexcept;
  std::optional<uint64_t> wanted_address(unsigned index) const noexcept;
  void update_mappings() noexcept;
  void unmap(unsigned index) noexcept;
  void set_initial(unsigned offset, unsigned size, uint32_t value) noexcept;
  void update_pin() noexcept;

  std::string name_;
  mutable std::mutex mutex_;
  ConfigSpace config_;
  bool intx_ = false;
  std::vector<uint8_t> initial_;  // of attach(): what reset() returns to
  std::mutex map_mutex_;
  std::array<std::optional<Bar>, 6> bars_;
  machine::Bus* ports_ = nullptr;
  machine::Bus* memory_ = nullptr;
  machine::Interrupt* pin_ = nullptr;
};

}  // namespace lodge::device::pci
