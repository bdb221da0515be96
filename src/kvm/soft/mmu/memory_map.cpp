#include "kvm/soft/mmu/memory_map.hpp"

#include <algorithm>

namespace lodge::kvm::soft {

Slot::Slot(const kvm_userspace_memory_region& region, CodeWatch& watch)
    : id(region.slot),
      gpa(region.guest_phys_addr),
      size(region.memory_size),
      host(reinterpret_cast<uint8_t*>(region.userspace_addr)),
      read_only((region.flags & KVM_MEM_READONLY) != 0),
      log_dirty((region.flags & KVM_MEM_LOG_DIRTY_PAGES) != 0),
      code(std::make_unique<std::atomic<uint32_t>[]>(size >> page_shift)),
      watch_(watch) {
  if (log_dirty) dirty = std::make_unique<std::atomic<uint64_t>[]>((size >> page_shift) / 64 + 1);
}

void Slot::invalidate(uint64_t page) noexcept {
  uint32_t word = code[page].load();
  while ((word & has_code) != 0)
    if (code[page].compare_exchange_weak(word, (word & ~has_code) + 2)) {
      watch_.code_changed(reinterpret_cast<uint64_t>(host) + (page << page_shift));
      return;
    }
}

Slot* MemoryMap::find(uint64_t gpa) const noexcept {
  const auto after = std::upper_bound(slots.begin(), slots.end(), gpa,
                                      [](uint64_t a, const auto& slot) { return a < slot->gpa; });
  if (after == slots.begin()) return nullptr;
  Slot* slot = std::prev(after)->get();
  return gpa - slot->gpa < slot->size ? slot : nullptr;
}

}  // namespace lodge::kvm::soft
