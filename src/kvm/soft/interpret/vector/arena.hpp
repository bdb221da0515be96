// Memory for native code that is never writable and executable at one address: a memfd mapped twice.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

namespace lodge::kvm::soft::simd {

// Grows by chunks up to a limit, so that a guest that invents encodings cannot eat the host's memory. Not
// synchronised: the owner locks.
class Arena {
 public:
  static constexpr size_t chunk_size = 1 << 20, limit = 64 * chunk_size;

  Arena() = default;
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Copies position-independent code and returns its executable address; nullptr when the arena is full or
  // the host gives no executable memory. The code stays until the arena dies.
  const void* add(std::span<const uint8_t> code) noexcept;
  // Forgets all code; for an arena that holds one piece at a time.
  void clear() noexcept { used_ = chunks_.empty() ? chunk_size : 0; }

 private:
  struct Chunk {
    uint8_t* writable = nullptr;
    uint8_t* executable = nullptr;
  };
  bool grow() noexcept;

  std::vector<Chunk> chunks_;
  size_t used_ = chunk_size;  // of the last chunk
};

}  // namespace lodge::kvm::soft::simd
