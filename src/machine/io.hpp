// What a device sees of the machine: a register window to answer, and an interrupt to raise. Nothing else.
#pragma once

#include <cstdint>
#include <optional>

namespace lodge::machine {

// A window of registers on the port or the memory bus. Several vCPU threads may call at once: the device
// guards itself. Never throws, never blocks for long: this is the vCPU path.
class RegisterWindow {
 public:
  virtual ~RegisterWindow() = default;
  // `offset` from the window's base; `size` 1, 2, 4 or 8 (ports: at most 4), offset + size within the window.
  virtual uint64_t read(uint64_t offset, unsigned size) noexcept = 0;
  virtual void write(uint64_t offset, unsigned size, uint64_t value) noexcept = 0;
};

// An interrupt input of the machine: a line (level or edge) or an MSI. Any thread.
class Interrupt {
 public:
  virtual ~Interrupt() = default;
  virtual void set(bool level) noexcept = 0;
  void pulse() noexcept {
    set(true);
    set(false);
  }
};

// Where message-signalled interrupts go: a write of `data` to `address`. Any thread.
class MsiTarget {
 public:
  virtual ~MsiTarget() = default;
  virtual void signal(uint64_t address, uint32_t data) noexcept = 0;
};

// A guest's write that signals an eventfd instead of reaching a register window.
struct Doorbell {
  bool port;  // on the port bus, else on the memory bus
  uint64_t address;
  unsigned size;                  // 1, 2, 4; 0: a write of any size that starts at `address`
  std::optional<uint64_t> match;  // only writes of this value
  int fd;                         // not owned; open until remove()
};
// Any thread. What a doorbell covers must be registered on its bus as well: an accelerator may refuse it.
class Doorbells {
 public:
  virtual ~Doorbells() = default;
  // False when there is no room, or another one is there: the register window then sees the writes.
  virtual bool add(const Doorbell& doorbell) noexcept = 0;
  // What add() was given. No signal follows when it returns.
  virtual void remove(const Doorbell& doorbell) noexcept = 0;
  // Whether a write that reaches its register window, on the vCPU's thread, costs less than the wake-up of
  // another thread: a device that can do its work there does without a doorbell.
  virtual bool windows_are_cheaper() const noexcept { return false; }
};

// What a chip may ask of the machine as a whole. Any thread; takes effect soon after, not inside the call.
enum class PowerRequest { reset, power_off };
class Power {
 public:
  virtual ~Power() = default;
  virtual void request(PowerRequest request) noexcept = 0;
  // The guest ends the VM with this process exit status (isa-debug-exit, pvpanic).
  virtual void exit_with(int status) noexcept = 0;
};

}  // namespace lodge::machine
