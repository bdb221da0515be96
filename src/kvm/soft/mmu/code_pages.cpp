#include "kvm/soft/mmu/code_pages.hpp"

#include <sys/mman.h>

#include <cerrno>

namespace lodge::kvm::soft {
namespace {

void protect(uint64_t host, uint64_t size, int protection) noexcept {
  ::mprotect(reinterpret_cast<void*>(host), size, protection);
}

bool refuses_writes(uint64_t host) noexcept {
  return ::madvise(reinterpret_cast<void*>(host), page_size, MADV_POPULATE_WRITE) != 0 && errno == EINVAL;
}

// Whether the VMM's mapping lets the page be written to: what it does not, needs no guard, and must not be
// writable when that is lifted. Linux before 5.14 cannot tell: it refuses this for the stack, too.
bool writable(uint64_t host) noexcept {
  static const bool told =
      !refuses_writes(reinterpret_cast<uint64_t>(__builtin_frame_address(0)) & ~page_mask);
  return !told || !refuses_writes(host);
}

}  // namespace

bool CodePages::mark_guarded(uint64_t host, const std::atomic<bool>& retired) noexcept {
  host &= ~page_mask;
  const unsigned page = index(host);
  const std::lock_guard lock(mutex_);
  if (retired.load()) return true;
  if ((word[page].load() & has_code) != 0) return true;
  if (watch_.guarded.load() >= CodeWatch::max_guarded) return false;
  if (!writable(host)) {
    // Nothing to do: who makes it writable tells, as for every change of a mapping.
  } else if (::mprotect(reinterpret_cast<void*>(host), page_size, PROT_READ) == 0) {
    guarded_[page / 64] |= uint64_t{1} << page % 64;
    watch_.guarded.fetch_add(1);
  } else if (errno == ENOMEM && watch_.guarded.load() > 0) {
    return false;
  }
  // Otherwise it is memory that cannot be protected by the page (huge pages of hugetlbfs): left open.
  word[page].fetch_or(has_code);
  return true;
}

void CodePages::unguard(uint64_t host) noexcept {
  const unsigned page = index(host);
  const uint64_t bit = uint64_t{1} << page % 64;
  if ((guarded_[page / 64] & bit) == 0) return;
  guarded_[page / 64] &= ~bit;
  protect(host, page_size, PROT_READ | PROT_WRITE);
  watch_.guarded.fetch_sub(1);
}

bool CodePages::invalidate(uint64_t host) noexcept {
  if ((word[index(host)].load() & has_code) == 0) return false;
  admit(host);
  return true;
}

bool CodePages::admit(uint64_t host) noexcept {
  host &= ~page_mask;
  std::atomic<uint32_t>& one = word[index(host)];
  const std::lock_guard lock(mutex_);
  uint32_t value = one.load();
  while ((value & has_code) != 0)
    if (one.compare_exchange_weak(value, (value & ~has_code) + 2)) {
      unguard(host);
      watch_.code_changed(host);
      return true;
    }
  return false;
}

void CodePages::forget(uint64_t host, uint64_t size) noexcept {
  const std::lock_guard lock(mutex_);
  // Neighbours at once; what the VMM has protected itself stays so.
  uint64_t run = 0;
  const auto lift = [&](uint64_t end) {
    protect(end - run, run, PROT_READ | PROT_WRITE);
    watch_.guarded.fetch_sub(static_cast<uint32_t>(run >> page_shift));
    run = 0;
  };
  for (uint64_t at = host; at < host + size; at += page_size) {
    const unsigned page = index(at);
    const uint64_t bit = uint64_t{1} << page % 64;
    if ((guarded_[page / 64] & bit) != 0)
      run += page_size;
    else if (run != 0)
      lift(at);
    guarded_[page / 64] &= ~bit;
    uint32_t value = word[page].load();
    while ((value & has_code) != 0 && !word[page].compare_exchange_weak(value, (value & ~has_code) + 2)) {
    }
  }
  if (run != 0) lift(host + size);
}

std::shared_ptr<CodePages> CodeWatch::pages_of(uint64_t host) {
  const std::lock_guard lock(mutex_);
  if (pages_.size() >= sweep_at_) {
    std::erase_if(pages_, [](const auto& entry) { return entry.second.expired(); });
    sweep_at_ = 2 * pages_.size() + 64;
  }
  auto& known = pages_[host >> CodePages::shift];
  auto pages = known.lock();
  if (!pages) known = pages = std::make_shared<CodePages>(*this);
  return pages;
}

}  // namespace lodge::kvm::soft
