#include "kvm/soft/mmu/code_pages.hpp"

#include <sys/mman.h>

#include <cerrno>

namespace lodge::kvm::soft {
namespace {

void protect(uint64_t host, uint64_t size, int protection) noexcept {
  ::mprotect(reinterpret_cast<void*>(host), size, protection);
}

}  // namespace

bool CodePages::mark_guarded(uint64_t host, const std::atomic<bool>& retired) noexcept {
  host &= ~page_mask;
  const unsigned page = index(host);
  const std::lock_guard lock(mutex_);
  if (retired.load()) return true;
  if ((word[page].load() & has_code) != 0) return true;
  if (watch_.guarded.load() >= CodeWatch::max_guarded) return false;
  if (::mprotect(reinterpret_cast<void*>(host), page_size, PROT_READ) == 0) {
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
  uint32_t lifted = 0;
  for (unsigned page = index(host), left = static_cast<unsigned>(size >> page_shift); left > 0;
       ++page, --left) {
    const uint64_t bit = uint64_t{1} << page % 64;
    if ((guarded_[page / 64] & bit) != 0) ++lifted;
    guarded_[page / 64] &= ~bit;
    uint32_t value = word[page].load();
    while ((value & has_code) != 0 && !word[page].compare_exchange_weak(value, (value & ~has_code) + 2)) {
    }
  }
  // At once: the pieces grow together again.
  if (lifted > 0) protect(host, size, PROT_READ | PROT_WRITE);
  watch_.guarded.fetch_sub(lifted);
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
