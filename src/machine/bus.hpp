// A bus: which register window answers an address. The machine has two, ports (64 KiB) and memory (gpa space
// outside RAM).
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <utility>
#include <vector>

#include "machine/io.hpp"

namespace lodge::machine {

// Any thread. An access holds no lock of the bus while it is inside a window, so a window may itself add and
// remove *other* windows (a PCI base address register being moved).
class Bus {
 public:
  // `name` appears in messages; `size` is the end of the address space, exclusive.
  Bus(std::string name, uint64_t size) : name_(std::move(name)), size_(size) {}

  // Registers [base, base + size). Throws UsageError naming both owners when ranges overlap, or when the
  // range leaves the bus. The window must outlive its registration.
  void add(uint64_t base, uint64_t size, RegisterWindow& window, std::string owner);
  // The same for the vCPU path, where the guest chooses the address: false, and nothing changed, where add()
  // throws.
  bool try_add(uint64_t base, uint64_t size, RegisterWindow& window, const std::string& owner) noexcept;
  // Removes what was registered at exactly `base`, if anything; when it returns no access is inside the
  // window any more. The caller must not hold a lock that the window takes, and must not be inside that same
  // window.
  void remove(uint64_t base) noexcept;

  // One access of 1 to 8 bytes. Parts that nobody claims read as all ones and swallow writes. An access that
  // leaves a window, or whose size is no power of two, is split into bytes.
  uint64_t read(uint64_t address, unsigned size) noexcept;
  void write(uint64_t address, unsigned size, uint64_t value) noexcept;

  // "0x3f8-0x3ff serial0": what is registered, in order of address, for logs and `lodge` diagnostics.
  std::vector<std::string> describe() const;

 private:
  struct Entry {
    uint64_t base;
    uint64_t size;
    RegisterWindow* window;
    std::string owner;
    std::atomic<uint32_t> users{0};  // accesses inside the window; bit 31: being removed
  };
  class Access;

  const Entry* overlapping(uint64_t base, uint64_t size) const noexcept;
  void insert(uint64_t base, uint64_t size, RegisterWindow& window, std::string owner);
  void leave(Entry& entry) noexcept;

  std::string name_;
  uint64_t size_;
  mutable std::shared_mutex mutex_;              // guards entries_, held for the look-up only
  std::vector<std::unique_ptr<Entry>> entries_;  // by base
  std::mutex removal_mutex_;
  std::condition_variable left_;  // the last access has left an entry that is being removed
};

// One registration with one owner: removed when this object goes. The window must outlive it.
class Registration {
 public:
  Registration(Bus& bus, uint64_t base, uint64_t size, RegisterWindow& window, std::string owner)
      : bus_(&bus), base_(base) {
    bus.add(base, size, window, std::move(owner));
  }
  Registration(Registration&& other) noexcept
      : bus_(std::exchange(other.bus_, nullptr)), base_(other.base_) {}
  Registration(const Registration&) = delete;
  Registration& operator=(const Registration&) = delete;
  ~Registration() {
    if (bus_) bus_->remove(base_);
  }

 private:
  Bus* bus_;
  uint64_t base_;
};

}  // namespace lodge::machine
