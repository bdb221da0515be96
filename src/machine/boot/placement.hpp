// Where boot data may lie: guest RAM minus what is already taken.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "machine/boot/bytes.hpp"
#include "machine/memory.hpp"

namespace lodge::machine::boot {

struct E820Entry {
  uint64_t address;
  uint64_t size;
  uint32_t type;  // 1 RAM, 2 reserved
};
inline constexpr uint32_t e820_ram = 1, e820_reserved = 2;

// The machine's memory map as a firmware would report it, ascending, without overlaps.
std::vector<E820Entry> e820_map(const GuestMemory& memory);

// Keeps loaded things apart. Everything a loader puts into the guest goes through store() or zero().
class Placement {
 public:
  explicit Placement(GuestMemory& memory);

  GuestMemory& memory() const noexcept { return memory_; }
  // The end of RAM below the PCI hole.
  uint64_t low_end() const noexcept { return low_end_; }

  // Takes [gpa, gpa + size) whatever lies there: kernels are loaded where they want to be.
  void take(uint64_t gpa, uint64_t size);
  // True when the range is RAM that the memory map reports as usable.
  bool usable(uint64_t gpa, uint64_t size) const noexcept;

  // The lowest place for a small structure, conventional memory first (16-bit pointers and old kernels like
  // that). Throws UsageError when there is none: then --memory is too small.
  uint64_t allocate(uint64_t size, uint64_t alignment, const std::string& what);
  // The highest place that ends at or below `limit`, above 1 MiB. Nothing when there is none.
  std::optional<uint64_t> allocate_high(uint64_t size, uint64_t alignment, uint64_t limit);

  // Copies into the guest; throws UsageError with `what` when the range is no RAM.
  void store(uint64_t gpa, Bytes data, const std::string& what);
  void zero(uint64_t gpa, uint64_t size, const std::string& what);

 private:
  struct Range {
    uint64_t begin, end;
  };
  std::optional<uint64_t> find_low(uint64_t size, uint64_t alignment, Range within) const;

  GuestMemory& memory_;
  uint64_t low_end_ = 0;
  std::vector<Range> taken_;
};

}  // namespace lodge::machine::boot
