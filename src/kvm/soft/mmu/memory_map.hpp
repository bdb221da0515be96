// The VM's memory slots as one immutable snapshot. Changing a slot makes a new snapshot; SoftVm hands it to
// every vCPU and waits until the old one is out of use.
#pragma once

#include <linux/kvm.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "kvm/soft/mmu/code_pages.hpp"
#include "kvm/soft/mmu/tlb.hpp"

namespace lodge::kvm::soft {

// One memory slot with what the accelerator keeps about each of its pages.
class Slot {
 public:
  // `watch`: of the VM; outlives the slot. `guards`: Options::guard_code.
  Slot(const kvm_userspace_memory_region& region, CodeWatch& watch, bool guards = false);

  const uint32_t id;  // upper half: the address space
  const uint64_t gpa, size;
  uint8_t* const host;
  const bool read_only;
  const bool log_dirty;

  uint64_t page(uint64_t address) const noexcept { return (address - gpa) >> page_shift; }

  // Dirty log, one bit a page.
  bool is_dirty(uint64_t page) const noexcept {
    return dirty[page / 64].load(std::memory_order_relaxed) >> page % 64 & 1;
  }
  void mark_dirty(uint64_t page) noexcept {
    dirty[page / 64].fetch_or(uint64_t{1} << page % 64, std::memory_order_relaxed);
  }
  std::unique_ptr<std::atomic<uint64_t>[]> dirty;  // null without log_dirty

  // The page's word (CodePages::word); lives as long as the slot.
  static constexpr uint32_t has_code = CodePages::has_code;
  std::atomic<uint32_t>& code(uint64_t page) const noexcept {
    const uint64_t address = host_page(page);
    return pages_of(address).word[CodePages::index(address)];
  }
  // The page becomes code. False: it could not be guarded, because as many are as the process may have.
  bool mark_code(uint64_t page) noexcept;
  // Makes all decoded instructions of the page stale. False: there were none.
  bool invalidate(uint64_t page) noexcept { return pages_of(host_page(page)).invalidate(host_page(page)); }
  // Also makes it writable for the VMM again, whose write has faulted or would. False: nothing is in its way.
  bool admit(uint64_t page) noexcept { return pages_of(host_page(page)).admit(host_page(page)); }
  // Guards nothing from now on and lifts all guards: before another slot, or nobody, has the memory. Code
  // that other slots know of the same memory is stale.
  void retire() noexcept;

 private:
  uint64_t host_page(uint64_t page) const noexcept {
    return reinterpret_cast<uint64_t>(host) + (page << page_shift);
  }
  CodePages& pages_of(uint64_t address) const noexcept {
    return *pages_[(address >> CodePages::shift) - (reinterpret_cast<uint64_t>(host) >> CodePages::shift)];
  }

  const bool guards_;
  std::vector<std::shared_ptr<CodePages>> pages_;  // from the stretch that holds `host` on
  std::atomic<bool> retired_{false};
};

// A VM may have 32,764 slots, and each change makes a new map: the slots lie in pieces that maps share, of
// which a change copies one.
class MemoryMap {
 public:
  bool empty() const noexcept { return pieces_.empty(); }
  // The slot that holds `gpa`, or null.
  Slot* find(uint64_t gpa) const noexcept;
  // Reads and writes guest-physical memory, whatever is mapped there: code becomes stale and pages dirty.
  // False: no RAM, or a read-only slot; what lies before it is done.
  bool read(uint64_t gpa, void* out, unsigned size) const noexcept;
  bool write(uint64_t gpa, const void* data, unsigned size) const noexcept;
  bool exchange(uint64_t gpa, uint8_t& value) const noexcept;  // atomically
  // The lowest slot that has some of these addresses, or null.
  Slot* first_in(uint64_t gpa, uint64_t size) const noexcept;
  // Every slot, by gpa.
  template <class Visit>
  void for_each(const Visit& visit) const {
    for (const Piece& piece : pieces_)
      for (const auto& slot : *piece.slots) visit(*slot);
  }

  void insert(std::shared_ptr<Slot> slot);  // must overlap none
  void erase(const Slot& slot);             // must be there

 private:
  using Slots = std::vector<std::shared_ptr<Slot>>;
  struct Piece {
    uint64_t first;                      // gpa of its first slot
    std::shared_ptr<const Slots> slots;  // never empty
  };
  static Piece piece_of(Slots slots);  // which are not empty
  // The last piece that begins at or below `gpa`; the first when none does.
  std::vector<Piece>::const_iterator piece(uint64_t gpa) const noexcept;
  void replace(std::vector<Piece>::const_iterator old, Slots slots);

  std::vector<Piece> pieces_;  // by gpa
};

// What processors see, and what they see in system-management mode (KVM_CAP_MULTI_ADDRESS_SPACE).
struct AddressSpaces {
  static constexpr unsigned count = 2;
  std::array<MemoryMap, count> space;

  // Calls visit(slot) for each slot of each space.
  template <class Visit>
  void for_each(const Visit& visit) const {
    for (const MemoryMap& map : space) map.for_each(visit);
  }
};

}  // namespace lodge::kvm::soft
