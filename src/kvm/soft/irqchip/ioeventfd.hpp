// ioeventfds (KVM_IOEVENTFD): guest writes that signal an eventfd instead of leaving the guest.
//
// Threads: any. signal() costs one load when the address has no ioeventfd (nearly always).
#pragma once

#include <linux/kvm.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <shared_mutex>
#include <vector>

#include "base/fd.hpp"

namespace lodge::kvm::soft {

class IoEventfds {
 public:
  // KVM_IOEVENTFD, also with KVM_IOEVENTFD_FLAG_DEASSIGN. The eventfd is duplicated. Throws
  // std::system_error: EINVAL (flags, length, wrapping range, not an eventfd), EBADF, EEXIST (another one
  // answers the same writes), ENOENT.
  void set(const kvm_ioeventfd& request);

  // A guest write of `size` bytes. True: an eventfd was signalled and the write is complete.
  bool signal(bool pio, uint64_t address, unsigned size, uint64_t value) noexcept {
    const uint64_t bit = filter_bit(address);
    return (filters_[pio ? 1 : 0].load(std::memory_order_relaxed) & bit) != 0 &&
           find(pio, address, size, value);
  }

 private:
  struct Entry {
    bool pio;
    bool match_any;  // any value
    uint32_t size;   // 0: any
    uint64_t address;
    uint64_t datamatch;
    uint64_t identity;
    Fd fd;
  };
  // One of 64 bits for an address. Notify registers are 4 bytes or a page apart: both parts count.
  static uint64_t filter_bit(uint64_t address) noexcept {
    return uint64_t{1} << ((address ^ address >> 2 ^ address >> 12) & 63);
  }
  bool find(bool pio, uint64_t address, unsigned size, uint64_t value) noexcept;
  void rebuild_filters() noexcept;

  std::shared_mutex mutex_;
  std::vector<Entry> entries_;                      // sorted by address
  std::array<std::atomic<uint64_t>, 2> filters_{};  // of MMIO and port addresses
};

}  // namespace lodge::kvm::soft
