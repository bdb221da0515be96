// The VM's memory slots as one immutable snapshot. Changing a slot makes a new snapshot; SoftVm hands it to
// every vCPU and waits until the old one is out of use.
#pragma once

#include <linux/kvm.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "kvm/soft/mmu/tlb.hpp"

namespace lodge::kvm::soft {

// Counts the times that pages of code were written to, in all slots of a VM, and tells who runs code.
class CodeWatch {
 public:
  CodeWatch() = default;
  CodeWatch(const CodeWatch&) = delete;
  CodeWatch& operator=(const CodeWatch&) = delete;
  std::atomic<uint32_t> epoch{0};
  // Pages that are write-protected in the VMM's mapping (Options::guard_code). Each may take two of the
  // process's mappings (vm.max_map_count: 65530 unless configured), of which the VMM needs some too.
  static constexpr uint32_t max_guarded = 24'000;
  std::atomic<uint32_t> guarded{0};
  virtual ~CodeWatch() = default;
  // Advances `epoch`. Any thread; `host_page`: host address of the page that was written to.
  virtual void code_changed([[maybe_unused]] uint64_t host_page) noexcept { epoch.fetch_add(1); }
};

// One memory slot with what the accelerator keeps about each of its pages.
class Slot {
 public:
  // `watch`: of the VM; outlives the slot. `guards`: Options::guard_code.
  Slot(const kvm_userspace_memory_region& region, CodeWatch& watch, bool guards = false);

  const uint32_t id;
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

  // Decoded code, one word a page: bit 0 says that some vCPU holds decoded instructions of the page, the rest
  // counts the times that they became stale. A block is valid while the word is what it was when the block
  // was decoded.
  static constexpr uint32_t has_code = 1;
  std::unique_ptr<std::atomic<uint32_t>[]> code;
  // The page becomes code. False: it could not be guarded, because as many are as the process may have.
  bool mark_code(uint64_t page) noexcept;
  // Makes all decoded instructions of the page stale.
  void invalidate(uint64_t page) noexcept;
  // Guards nothing from now on and lifts all guards: before another slot, or nobody, has the memory.
  void retire() noexcept;
  // Makes a page writable for the VMM again, whose write has faulted or would. False: nothing was in its way.
  bool admit_write(uint64_t page) noexcept;

 private:
  // A page's guard: under guard_mutex_, so that it agrees with has_code.
  void unguard(uint64_t page) noexcept;

  CodeWatch& watch_;
  const bool guards_;
  std::mutex guard_mutex_;
  std::unique_ptr<std::atomic<uint64_t>[]> guarded_;  // one bit a page; null until the first
  bool retired_ = false;
};

class MemoryMap {
 public:
  std::vector<std::shared_ptr<Slot>> slots;  // by gpa

  // The slot that holds `gpa`, or null.
  Slot* find(uint64_t gpa) const noexcept;
};

}  // namespace lodge::kvm::soft
