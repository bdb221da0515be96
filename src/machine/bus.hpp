// A bus: which register window answers an address. The machine has two, ports (64 KiB) and memory (gpa space
// outside RAM).
#pragma once

#include <cstdint>
#include <map>
#include <shared_mutex>
#include <string>

#include "machine/io.hpp"

namespace lodge::machine {

class Bus {
 public:
  // `name` appears in messages; `size` is the end of the address space, exclusive.
  Bus(std::string name, uint64_t size) : name_(std::move(name)), size_(size) {}

  // Registers [base, base + size). Throws UsageError naming both owners when ranges overlap, or when the range leaves
  // the bus. The window must outlive its registration.
  void add(uint64_t base, uint64_t size, RegisterWindow& window, std::string owner);
  // Removes what was registered at exactly `base`; when it returns no access is inside the window any more.
  void remove(uint64_t base) noexcept;

  // One access of any size up to 8 bytes. Parts that nobody claims read as all ones and swallow writes. An access that
  // leaves a window is split into bytes.
  uint64_t read(uint64_t address, unsigned size) noexcept;
  void write(uint64_t address, unsigned size, uint64_t value) noexcept;

 private:
  struct Entry {
    uint64_t size;
    RegisterWindow* window;
    std::string owner;
  };
  const Entry* find(uint64_t address, uint64_t& base) const noexcept;

  std::string name_;
  uint64_t size_;
  mutable std::shared_mutex mutex_;  // shared while an access is inside a window, exclusive to change the map
  std::map<uint64_t, Entry> entries_;
};

}  // namespace lodge::machine
