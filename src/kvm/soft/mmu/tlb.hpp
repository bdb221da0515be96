// The soft TLB: guest linear page to host address, direct mapped, one set for each privilege view. Only its
// vCPU's thread touches it.
#pragma once

#include <array>
#include <cstdint>

namespace lodge::kvm::soft {

inline constexpr unsigned page_shift = 12;
inline constexpr uint64_t page_size = 4096, page_mask = page_size - 1;

// Tags are linear page addresses. An empty tag names a page of *another* index, so no address that is looked
// up here can match it: one compare covers tag, validity and page crossing (hit()).
struct TlbEntry {
  uint64_t read = 0;
  uint64_t write =
      0;  // empty for read-only, clean-and-logged, and code pages: their writes take the slow path
  uint64_t fetch = 0;
  uint64_t host = 0;  // host address of the page
  uint64_t host_of(uint64_t linear) const noexcept { return host + (linear & page_mask); }
};

struct TlbSet {
  static constexpr unsigned entries = 4096;

  TlbSet() noexcept {
    for (unsigned i = 0; i < entries; ++i) clear(i);
  }
  static unsigned index(uint64_t linear) noexcept { return linear >> page_shift & (entries - 1); }
  static uint64_t empty(unsigned index) noexcept { return uint64_t{index ^ 1} << page_shift; }
  // True when [linear, linear + size) lies in the page of `tag`.
  static bool hit(uint64_t tag, uint64_t linear, unsigned size) noexcept {
    return linear - tag <= page_size - size;
  }

  TlbEntry& at(uint64_t linear) noexcept { return entry[index(linear)]; }
  void clear(unsigned i) noexcept {
    entry[i].read = entry[i].write = entry[i].fetch = empty(i);
    const uint64_t keep = ~(uint64_t{1} << i % 64);
    valid[i / 64] &= keep;
    global[i / 64] &= keep;
    large[i / 64] &= keep;
  }
  void mark(unsigned i, bool is_global, bool is_large) noexcept {
    const uint64_t bit = uint64_t{1} << i % 64;
    valid[i / 64] |= bit;
    global[i / 64] = is_global ? global[i / 64] | bit : global[i / 64] & ~bit;
    large[i / 64] = is_large ? large[i / 64] | bit : large[i / 64] & ~bit;
  }
  void flush(bool keep_global) noexcept {
    for (unsigned word = 0; word < entries / 64; ++word) {
      uint64_t bits = keep_global ? valid[word] & ~global[word] : valid[word];
      for (; bits != 0; bits &= bits - 1) clear(word * 64 + static_cast<unsigned>(__builtin_ctzll(bits)));
    }
  }

  std::array<TlbEntry, entries> entry;
  std::array<uint64_t, entries> page{};  // linear address of a valid entry
  std::array<uint64_t, entries / 64> valid{};
  std::array<uint64_t, entries / 64> global{};  // kept by a flush that keeps global pages
  std::array<uint64_t, entries / 64> large{};   // part of a 2 MiB, 4 MiB or 1 GiB page
};

}  // namespace lodge::kvm::soft
