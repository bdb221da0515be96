// Coalesced I/O (KVM_CAP_COALESCED_MMIO and _PIO, api.rst section 4.116): guest writes to registered zones
// wait in a ring that the VMM empties before it looks at any exit, so such a write costs no exit.
//
// One ring for the VM, a page in a file of its own, so that it can be mapped behind each vCPU's shared
// structure.
//
// Threads: any. A VM without zones pays one load for a write.
#pragma once

#include <linux/kvm.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <vector>

#include "base/fd.hpp"
#include "base/mapping.hpp"

namespace lodge::kvm::soft {

class CoalescedIo {
 public:
  // The page of a vCPU's mapping that the ring is (KVM_COALESCED_MMIO_PAGE_OFFSET of x86).
  static constexpr unsigned page_offset = 2;
  // KVM_COALESCED_MMIO_MAX; one entry stays free, so that a full ring is not an empty one.
  static constexpr uint32_t entries = (4096 - 8) / sizeof(kvm_coalesced_mmio);

  // Throws std::system_error.
  CoalescedIo();

  int fd() const noexcept { return file_.get(); }

  // KVM_REGISTER_COALESCED_MMIO. Throws std::system_error: EINVAL (neither MMIO nor ports).
  void add(const kvm_coalesced_mmio_zone& zone);
  // KVM_UNREGISTER_COALESCED_MMIO: all registered zones that contain `zone`.
  void remove(const kvm_coalesced_mmio_zone& zone);

  bool any() const noexcept { return count_.load(std::memory_order_relaxed) != 0; }
  // Whether the write, of 1 to 8 bytes, lies in a zone.
  bool covers(bool pio, uint64_t address, unsigned size) noexcept;
  // False: not in a zone, or the ring is full and the VMM has to be left to.
  bool put(bool pio, uint64_t address, const void* data, unsigned size) noexcept;

 private:
  // kvm_coalesced_mmio_ring, whose flexible array has a size in C++.
  struct Ring {
    uint32_t first, last;
    kvm_coalesced_mmio entry[entries];
  };
  static_assert(sizeof(kvm_coalesced_mmio) == 24 && sizeof(Ring) <= 4096);

  bool find(bool pio, uint64_t address, unsigned size) const noexcept;

  const Fd file_;
  const Mapping page_;
  Ring& ring_;
  std::atomic<size_t> count_{0};
  std::mutex mutex_;  // zones and the ring's end
  std::vector<kvm_coalesced_mmio_zone> zones_;
};

}  // namespace lodge::kvm::soft
