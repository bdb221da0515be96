// Memory back to the host.
#pragma once

#include <sys/mman.h>

#include <cstdint>

#include "kvm/soft/mmu/tlb.hpp"

namespace lodge::kvm::soft {

// The whole pages of [begin, end) read as zero from now on and take no memory until they are written to.
inline void discard(void* begin, void* end) noexcept {
  const uint64_t first = (reinterpret_cast<uint64_t>(begin) + page_mask) & ~page_mask;
  const uint64_t last = reinterpret_cast<uint64_t>(end) & ~page_mask;
  if (first < last) ::madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

}  // namespace lodge::kvm::soft
