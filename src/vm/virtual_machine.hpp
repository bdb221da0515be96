// The life of one VM: runs its processors, resets, pauses and ends it. No state is shared between VMs, so
// several can live in one process.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "base/clock.hpp"
#include "kvm/kvm.hpp"
#include "vm/config.hpp"
#include "vm/ending.hpp"
#include "vm/machine.hpp"
#include "vm/statistics.hpp"

namespace lodge::vm {

class VirtualMachine final : public machine::Power {
 public:
  // Builds the machine and loads the kernel. `backends` has a stream for each of config.serial. Throws
  // UsageError or std::system_error.
  VirtualMachine(VmConfig config, std::unique_ptr<kvm::System> system, std::unique_ptr<Backends> backends);
  ~VirtualMachine() override;

  // Runs until the VM ends. Once; from one thread. Throws std::system_error when the host has no threads
  // left.
  Ending run();

  // From any thread, also before run().
  // False when the guest has no driver that would notice.
  bool press_power_button() noexcept;
  void reset() noexcept;
  void end() noexcept;  // at once, whatever the guest does
  // The processors stand still, and so does the watchdog; the clocks of the other devices go on. Takes effect
  // soon after.
  void pause() noexcept;
  void resume() noexcept;
  // The user's terminal has this size now.
  void resize_terminal(uint16_t columns, uint16_t rows) noexcept;
  // Makes a disk larger while the guest uses it (Machine::disk() names it). Returns 0 or a positive errno:
  // ENODEV (no such disk) and those of device::Disk::resize(). Blocks meanwhile.
  int resize_disk(std::string_view name, uint64_t bytes) noexcept;

  // --- Devices that come and go in the slots of root ports (Machine::slots()). What is plugged in stays over
  // resets of the machine.
  // Puts it into the slot that its option `bus` names or, without one, into the first that is empty, and
  // returns that port's id. Throws UsageError.
  std::string plug(DeviceConfig device);
  // Asks the guest to let the device in the slot of `port` go, which it does later or, without a driver for
  // such slots, not before the machine's next reset. False: nothing is there.
  bool unplug(std::string_view port) noexcept;

  // How the kernel was entered, for logs.
  const std::string& protocol() const noexcept { return machine_->protocol(); }
  // Any thread. While the machine runs its vCPUs are asked, which takes them out of the guest for a moment.
  Statistics statistics();
  bool paused() noexcept;
  // Calls `use` while no reset can replace the machine; false when there is none. Not from its own threads.
  bool with_machine(const std::function<void(Machine&)>& use);
  const VmConfig& config() const noexcept { return config_; }
  std::string_view accelerator() const noexcept { return system_->name(); }
  const Backends& backends() const noexcept { return *backends_; }

  // What chips ask for (machine::Power); the vCPU that asked executes nothing more.
  void request(machine::PowerRequest request) noexcept override;
  void exit_with(int status) noexcept override;

 private:
  struct Event {
    bool restart = false;
    Ending ending;
  };

  void build_machine();
  std::optional<Ending> rebuild();
  Event wait_for_event();
  void drop_released();
  Ending end_with(Ending ending);
  void post(Event event) noexcept;
  void restart_or(Ending::Cause cause, std::string message = {}) noexcept;
  void start_vcpus();
  void stop_vcpus() noexcept;
  void collect_statistics();
  void ask_vcpus(std::unique_lock<std::mutex>& lock) noexcept;
  void hand_over(unsigned index, uint64_t request) noexcept;
  void kick_all() noexcept;
  void run_vcpu(unsigned index) noexcept;
  void drive(unsigned index) noexcept;
  bool wait_while_paused(unsigned index) noexcept;
  // False when the vCPU cannot go on.
  bool handle(kvm::Vcpu& vcpu, const kvm::Exit& exit) noexcept;
  void handle_io(const kvm::Exit::Io& io) noexcept;
  void handle_mmio(const kvm::Exit::Mmio& mmio) noexcept;
  void handle_system_event(uint32_t type) noexcept;
  void fail(kvm::Vcpu& vcpu, const kvm::Exit& exit) noexcept;

  VmConfig config_;
  std::unique_ptr<kvm::System> system_;
  RealClock clock_;
  std::unique_ptr<Backends> backends_;

  // Lock order: machine_mutex_, a chip's own lock, mutex_ (a chip may call request() with its lock held).
  std::mutex machine_mutex_;  // held to replace machine_, and to use it from outside the VM's own threads
  std::unique_ptr<Machine> machine_;  // replaced while no vCPU thread exists

  // What a vCPU has counted, as its thread has last handed it over: while it runs nobody else may look.
  struct Counted {
    bool running = false;
    uint64_t answered = 0;  // the request that this answers
    std::vector<kvm::Statistic> accelerator;
    uint64_t cpu_ns = 0;
  };

  std::mutex mutex_;
  std::condition_variable changed_;
  std::optional<Event> event_;  // what run() has to act on
  bool released_ = false;       // so is this: the guest has let a device go
  bool paused_ = false;
  std::atomic<bool> stop_ = false;  // vCPU threads look at this after every exit
  std::vector<std::thread> threads_;

  std::atomic<uint64_t> port_exits_ = 0, memory_exits_ = 0, other_exits_ = 0;
  // With mutex_ held.
  unsigned resets_ = 0;
  std::optional<std::chrono::steady_clock::time_point> started_, ended_;
  std::vector<Counted> counted_;  // by vCPU
  uint64_t request_ = 0;          // numbers the times that vCPUs were asked
  uint64_t past_vcpu_ns_ = 0;     // of threads that have ended, and so what they had counted
  std::vector<kvm::Statistic> past_accelerator_;
};

}  // namespace lodge::vm
