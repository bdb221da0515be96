#include "kvm/soft/mmu/memory_map.hpp"

#include <algorithm>

#include "kvm/soft/mmu/host_access.hpp"

namespace lodge::kvm::soft {

Slot::Slot(const kvm_userspace_memory_region& region, CodeWatch& watch, bool guards)
    : id(region.slot),
      gpa(region.guest_phys_addr),
      size(region.memory_size),
      host(reinterpret_cast<uint8_t*>(region.userspace_addr)),
      read_only((region.flags & KVM_MEM_READONLY) != 0),
      log_dirty((region.flags & KVM_MEM_LOG_DIRTY_PAGES) != 0),
      guards_(guards) {
  const uint64_t first = region.userspace_addr >> CodePages::shift;
  const uint64_t last = (region.userspace_addr + size - 1) >> CodePages::shift;
  for (uint64_t stretch = first; stretch <= last; ++stretch)
    pages_.push_back(watch.pages_of(stretch << CodePages::shift));
  if (log_dirty) dirty = std::make_unique<std::atomic<uint64_t>[]>((size >> page_shift) / 64 + 1);
}

bool Slot::mark_code(uint64_t page) noexcept {
  if (guards_) return pages_of(host_page(page)).mark_guarded(host_page(page), retired_);
  code(page).fetch_or(has_code);
  return true;
}

void Slot::retire() noexcept {
  retired_ = true;
  const uint64_t end = host_page(size >> page_shift);
  for (uint64_t address = host_page(0); address < end;) {
    const uint64_t next = std::min(end, ((address >> CodePages::shift) + 1) << CodePages::shift);
    pages_of(address).forget(address, next - address);
    address = next;
  }
}

namespace {

constexpr size_t most_of_a_piece = 128;  // about as many as there are pieces, of 32,764 slots

// Where the first slot behind `gpa` is.
auto behind(const std::vector<std::shared_ptr<Slot>>& slots, uint64_t gpa) noexcept {
  return std::upper_bound(slots.begin(), slots.end(), gpa,
                          [](uint64_t a, const auto& slot) { return a < slot->gpa; });
}

}  // namespace

std::vector<MemoryMap::Piece>::const_iterator MemoryMap::piece(uint64_t gpa) const noexcept {
  const auto after = std::upper_bound(pieces_.begin(), pieces_.end(), gpa,
                                      [](uint64_t a, const Piece& piece) { return a < piece.first; });
  return after == pieces_.begin() ? after : std::prev(after);
}

Slot* MemoryMap::find(uint64_t gpa) const noexcept {
  const auto at = piece(gpa);
  if (at == pieces_.end()) return nullptr;
  const auto after = behind(*at->slots, gpa);
  if (after == at->slots->begin()) return nullptr;
  Slot* slot = std::prev(after)->get();
  return gpa - slot->gpa < slot->size ? slot : nullptr;
}

Slot* MemoryMap::first_in(uint64_t gpa, uint64_t size) const noexcept {
  if (Slot* const slot = find(gpa); slot != nullptr) return slot;
  const auto at = piece(gpa);
  if (at == pieces_.end()) return nullptr;
  auto next = behind(*at->slots, gpa);
  if (next == at->slots->end()) {
    if (std::next(at) == pieces_.end()) return nullptr;
    next = std::next(at)->slots->begin();
  }
  return (*next)->gpa - gpa < size ? next->get() : nullptr;
}

MemoryMap::Piece MemoryMap::piece_of(Slots slots) {
  const uint64_t first = slots.front()->gpa;
  return {.first = first, .slots = std::make_shared<const Slots>(std::move(slots))};
}  // NOLINT(clang-analyzer-cplusplus.NewDeleteLeaks): the analyzer loses sight of the reference count

// By one piece, by two when they are too many, or by none.
void MemoryMap::replace(std::vector<Piece>::const_iterator old, Slots slots) {
  if (slots.empty()) {
    pieces_.erase(old);
    return;
  }
  const auto at = old - pieces_.cbegin();
  if (slots.size() > most_of_a_piece) {
    const auto middle = slots.begin() + static_cast<ptrdiff_t>(slots.size() / 2);
    pieces_.insert(std::next(old), piece_of(Slots(middle, slots.end())));
    slots.erase(middle, slots.end());
  }
  pieces_[static_cast<size_t>(at)] = piece_of(std::move(slots));
}

void MemoryMap::insert(std::shared_ptr<Slot> slot) {
  const uint64_t gpa = slot->gpa;
  const auto at = piece(gpa);
  if (at == pieces_.end()) {
    pieces_.push_back(piece_of({std::move(slot)}));
    return;
  }
  Slots slots = *at->slots;
  slots.insert(behind(slots, gpa), std::move(slot));
  replace(at, std::move(slots));
}

void MemoryMap::erase(const Slot& slot) {
  const auto at = piece(slot.gpa);
  Slots slots = *at->slots;
  std::erase_if(slots, [&](const auto& other) { return other.get() == &slot; });
  replace(at, std::move(slots));
}

bool MemoryMap::read(uint64_t gpa, void* out, unsigned size) const noexcept {
  for (auto* to = static_cast<uint8_t*>(out); size > 0;) {
    const Slot* slot = find(gpa);
    if (slot == nullptr) return false;
    const auto part = static_cast<unsigned>(std::min<uint64_t>(size, page_size - (gpa & page_mask)));
    host_read(reinterpret_cast<uint64_t>(slot->host) + (gpa - slot->gpa), to, part);
    to += part, gpa += part, size -= part;
  }
  return true;
}

bool MemoryMap::write(uint64_t gpa, const void* data, unsigned size) const noexcept {
  for (const auto* from = static_cast<const uint8_t*>(data); size > 0;) {
    Slot* slot = find(gpa);
    if (slot == nullptr || slot->read_only) return false;
    const auto part = static_cast<unsigned>(std::min<uint64_t>(size, page_size - (gpa & page_mask)));
    host_write(reinterpret_cast<uint64_t>(slot->host) + (gpa - slot->gpa), from, part);
    slot->invalidate(slot->page(gpa));
    if (slot->log_dirty) slot->mark_dirty(slot->page(gpa));
    from += part, gpa += part, size -= part;
  }
  return true;
}

bool MemoryMap::exchange(uint64_t gpa, uint8_t& value) const noexcept {
  Slot* slot = find(gpa);
  if (slot == nullptr || slot->read_only) return false;
  asm volatile("xchgb %0, (%1)" : "+q"(value) : "r"(slot->host + (gpa - slot->gpa)) : "memory");
  slot->invalidate(slot->page(gpa));
  if (slot->log_dirty) slot->mark_dirty(slot->page(gpa));
  return true;
}

}  // namespace lodge::kvm::soft
