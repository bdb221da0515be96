#include "kvm/soft/mmu/memory_map.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cerrno>

namespace lodge::kvm::soft {

Slot::Slot(const kvm_userspace_memory_region& region, CodeWatch& watch, bool guards)
    : id(region.slot),
      gpa(region.guest_phys_addr),
      size(region.memory_size),
      host(reinterpret_cast<uint8_t*>(region.userspace_addr)),
      read_only((region.flags & KVM_MEM_READONLY) != 0),
      log_dirty((region.flags & KVM_MEM_LOG_DIRTY_PAGES) != 0),
      code(std::make_unique<std::atomic<uint32_t>[]>(size >> page_shift)),
      watch_(watch),
      guards_(guards) {
  if (log_dirty) dirty = std::make_unique<std::atomic<uint64_t>[]>((size >> page_shift) / 64 + 1);
}

bool Slot::mark_code(uint64_t page) noexcept {
  if (!guards_) {
    code[page].fetch_or(has_code);
    return true;
  }
  const std::lock_guard lock(guard_mutex_);
  if (!retired_) {
    if (watch_.guarded.load() >= CodeWatch::max_guarded) return false;
    if (!guarded_) guarded_ = std::make_unique<std::atomic<uint64_t>[]>((size >> page_shift) / 64 + 1);
    if (::mprotect(host + (page << page_shift), page_size, PROT_READ) == 0) {
      guarded_[page / 64].fetch_or(uint64_t{1} << page % 64);
      watch_.guarded.fetch_add(1);
    } else if (errno == ENOMEM && watch_.guarded.load() > 0) {
      return false;
    }
    // Otherwise it is memory that cannot be protected by the page (huge pages of hugetlbfs): left open.
  }
  code[page].fetch_or(has_code);
  return true;
}

void Slot::unguard(uint64_t page) noexcept {
  const uint64_t bit = uint64_t{1} << page % 64;
  if (!guarded_ || (guarded_[page / 64].fetch_and(~bit) & bit) == 0) return;
  ::mprotect(host + (page << page_shift), page_size, PROT_READ | PROT_WRITE);
  watch_.guarded.fetch_sub(1);
}

void Slot::invalidate(uint64_t page) noexcept {
  uint32_t word = code[page].load();
  if ((word & has_code) == 0) return;
  std::unique_lock<std::mutex> lock;
  if (guards_) lock = std::unique_lock(guard_mutex_);
  while ((word & has_code) != 0)
    if (code[page].compare_exchange_weak(word, (word & ~has_code) + 2)) {
      if (guards_) unguard(page);
      watch_.code_changed(reinterpret_cast<uint64_t>(host) + (page << page_shift));
      return;
    }
}

bool Slot::admit_write(uint64_t page) noexcept {
  if ((code[page].load() & has_code) == 0) return false;
  invalidate(page);
  return true;
}

void Slot::retire() noexcept {
  if (!guards_) return;
  const std::lock_guard lock(guard_mutex_);
  retired_ = true;
  if (!guarded_) return;
  uint32_t lifted = 0;
  for (uint64_t word = 0; word <= (size >> page_shift) / 64; ++word)
    lifted += static_cast<uint32_t>(std::popcount(guarded_[word].exchange(0)));
  // At once: the pieces grow together again.
  if (lifted > 0) ::mprotect(host, size, PROT_READ | PROT_WRITE);
  watch_.guarded.fetch_sub(lifted);
}

Slot* MemoryMap::find(uint64_t gpa) const noexcept {
  const auto after = std::upper_bound(slots.begin(), slots.end(), gpa,
                                      [](uint64_t a, const auto& slot) { return a < slot->gpa; });
  if (after == slots.begin()) return nullptr;
  Slot* slot = std::prev(after)->get();
  return gpa - slot->gpa < slot->size ? slot : nullptr;
}

}  // namespace lodge::kvm::soft
