// A PCI Express root port: a bridge at bus 0 whose secondary bus has one slot, into which a function may be
// plugged, and out of which it may be taken, also while the guest runs.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>

#include "device/pci/function.hpp"
#include "device/shared_line.hpp"

namespace lodge::device::pci {

struct RootPortState {
  static constexpr std::string_view name = "pcie-root-port";
  static constexpr unsigned version = 1;
  bool leaving = false;
  template <class V>
  void visit(V& v) {
    v("leaving", leaving);
  }
};

// Threads: as Function; plug(), unplug() and ask_to_let_go() from any thread. Locks: `slot_mutex_`, then
// `event_mutex_` or the child's. `slot_mutex_` is held while the child is found and used, so a function that
// leaves is used by nobody when unplug() returns.
class RootPort final : public Function {
 public:
  // `number`: the port's and its slot's, 1 to 255; what a guest shows people. `id`: what `bus=` of a device
  // names.
  RootPort(std::string id, unsigned number);
  ~RootPort() override;

  const std::string& id() const noexcept { return id_; }
  unsigned number() const noexcept { return number_; }

  // Called by the root: where BARs of the child appear, and what its INTA to INTD drive.
  void attach_child_buses(machine::Bus& ports, machine::Bus& memory,
                          const std::function<machine::Interrupt&(unsigned pin)>& line);
  // Puts `child` into the slot. `announce`: the guest is told by a hot-plug event; otherwise it was there
  // from the start. Throws UsageError when the slot is full. The child outlives its stay.
  void plug(Function& child, bool announce);
  void unplug(bool announce) noexcept;
  // Asks the guest to let the child go, as the button at the slot does. It does so by switching the slot's
  // power off; the child is unplugged then, and `released` called on that vCPU's thread, without a lock.
  // Until then, or when the guest does not listen, nothing changes. Not again for a while after it was asked:
  // drivers take a second press within five seconds as a change of mind. False: there is no child.
  bool ask_to_let_go() noexcept;
  // The guest was asked and has not done it yet.
  bool leaving() const noexcept;
  // Set-up.
  void on_release(std::function<void()> released) { released_ = std::move(released); }
  bool occupied() const noexcept;
  // The guest may switch the slot off: what is in it does not answer then.
  bool powered() const noexcept;

  // Set-up, as firmware does it: the bus behind the port, and windows for it (`size` 0: closed).
  struct Window {
    uint64_t base = 0, size = 0;
  };
  void assign(uint8_t bus, Window memory, Window prefetchable) noexcept;
  bool holds(const Function& child) const noexcept;
  // Calls `visit` with the child while it cannot leave; false when there is none.
  template <class Visit>
  bool with_child(Visit visit) const {
    const std::lock_guard lock(slot_mutex_);
    if (child_) visit(*child_);
    return child_;
  }

  // Configuration accesses of another bus than 0: false when they are not for this port's side.
  bool owns_bus(unsigned bus) const noexcept;

  void reset() noexcept override;

  void save(nlohmann::json& json) const override;
  void load(const nlohmann::json& json) override;

 private:
  void config_written(unsigned offset, unsigned size) noexcept override;
  void add_express_capability(unsigned number);
  void follow_power() noexcept;
  // With slot_mutex_ held.
  void take_out(bool announce) noexcept;
  void show_slot(bool announce) noexcept;
  void update_interrupt() noexcept;

  std::string id_;
  unsigned number_;
  unsigned express_ = 0;  // offset of the PCI Express capability
  machine::Bus* child_ports_ = nullptr;
  machine::Bus* child_memory_ = nullptr;
  std::array<machine::Interrupt*, 4> child_lines_{};
  mutable std::mutex slot_mutex_;
  Function* child_ = nullptr;
  bool leaving_ = false;
  std::chrono::steady_clock::time_point pressed_;
  bool powered_ = true;     // as the slot was shown last
  bool restoring_ = false;  // the guest has switched nothing: a saved state is loaded
  std::function<void()> released_;
  std::mutex event_mutex_;  // the pin follows the last event or the last acknowledgement, not an older one
};

}  // namespace lodge::device::pci
