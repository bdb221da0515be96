#include "kvm/soft/mmu/write_guard.hpp"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <mutex>
#include <new>
#include <vector>

#include "kvm/soft/mmu/memory_map.hpp"

namespace lodge::kvm::soft {
namespace {

// Signal handlers have no other way to their context.
struct Registry {
  std::atomic<unsigned> count{0};
  std::mutex mutex;
  std::vector<GuardedMemory*> memories;
};
Registry& registry() noexcept {
  // Never destroyed: a store may fault while the process exits.
  alignas(Registry) static std::byte home[sizeof(Registry)];
  static Registry* const one = new (home) Registry;
  return *one;
}

// So that a forked child does not inherit locks that are held: of the registry, and of who is in it.
void before_fork() noexcept {
  registry().mutex.lock();
  for (GuardedMemory* memory : registry().memories) memory->before_fork();
}
void after_fork() noexcept {
  for (GuardedMemory* memory : registry().memories) memory->after_fork();
  registry().mutex.unlock();
}

// Calls visit(slot, first page, last page) for the part of each slot that lies in the range.
template <class Visit>
void for_slots(uint64_t address, uint64_t size, const Visit& visit) noexcept {
  if (registry().count.load(std::memory_order_acquire) == 0 || size == 0) return;
  const std::lock_guard lock(registry().mutex);
  for (GuardedMemory* memory : registry().memories) {
    const auto map = memory->guarded_memory();
    map->for_each([&](Slot& slot) {
      const auto base = reinterpret_cast<uint64_t>(slot.host);
      if (address >= base + slot.size || address + size <= base) return;
      const uint64_t first = std::max(address, base) - base;
      const uint64_t last = std::min(address + size, base + slot.size) - 1 - base;
      visit(slot, first >> page_shift, last >> page_shift);
    });
  }
}

// Another thread may have opened the page between the fault and now; then the store has only to be tried
// again. When that does not help the page is protected by somebody else, and the fault is not ours.
bool worth_another_try(uint64_t address) noexcept {
  constexpr unsigned patience = 100;
  constexpr auto at_once = std::chrono::milliseconds(1);  // the same fault comes back in a few microseconds
  static thread_local uint64_t last = 0;
  static thread_local unsigned tries = 0;
  static thread_local std::chrono::steady_clock::time_point when;
  const auto now = std::chrono::steady_clock::now();
  if (address != last || now - when > at_once) tries = 0;
  last = address, when = now;
  return ++tries < patience;
}

}  // namespace

GuardRegistration::GuardRegistration(GuardedMemory& memory) : memory_(memory) {
  // Here and not in registry(), which a signal handler may be the first to call.
  [[maybe_unused]] static const int once = ::pthread_atfork(before_fork, after_fork, after_fork);
  const std::lock_guard lock(registry().mutex);
  registry().memories.push_back(&memory);
  registry().count.fetch_add(1);
}

GuardRegistration::~GuardRegistration() {
  const std::lock_guard lock(registry().mutex);
  std::erase(registry().memories, &memory_);
  registry().count.fetch_sub(1);
}

bool admit_fault(uint64_t address) noexcept {
  bool known = false;
  bool admitted = false;
  for_slots(address, 1, [&](Slot& slot, uint64_t page, uint64_t) {
    known = true;
    admitted |= slot.admit(page);
  });
  return admitted || (known && worth_another_try(address));
}

bool admit_write(uint64_t address, size_t size) noexcept {
  bool admitted = false;
  for_slots(address, size, [&](Slot& slot, uint64_t first, uint64_t last) {
    for (uint64_t page = first; page <= last; ++page) admitted |= slot.admit(page);
  });
  return admitted;
}

}  // namespace lodge::kvm::soft
