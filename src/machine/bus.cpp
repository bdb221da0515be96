#include "machine/bus.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <bit>

#include "base/error.hpp"

namespace lodge::machine {

namespace {

constexpr uint32_t removing = 1u << 31;

uint64_t ones(unsigned size) {
  return size >= 8 ? ~uint64_t{0} : (uint64_t{1} << (size * 8)) - 1;
}

}  // namespace

// The right to be inside a window: remove() waits until all are given back.
class Bus::Access {
 public:
  Access(Bus& bus, uint64_t address) noexcept : bus_(bus) {
    std::shared_lock lock(bus.mutex_);
    auto after = std::upper_bound(bus.entries_.begin(), bus.entries_.end(), address,
                                  [](uint64_t a, const auto& entry) { return a < entry->base; });
    if (after == bus.entries_.begin()) return;
    Entry& entry = **std::prev(after);
    if (address - entry.base >= entry.size) return;
    entry.users.fetch_add(1, std::memory_order_relaxed);  // before remove(), by the lock
    entry_ = &entry;
  }
  ~Access() {
    if (entry_) bus_.leave(*entry_);
  }
  Access(const Access&) = delete;
  Access& operator=(const Access&) = delete;

  explicit operator bool() const noexcept { return entry_ != nullptr; }
  // Whether one call of the window can serve the access.
  bool whole(uint64_t address, unsigned size) const noexcept {
    return std::has_single_bit(size) && address - entry_->base <= entry_->size - size && size <= entry_->size;
  }
  RegisterWindow& window() const noexcept { return *entry_->window; }
  uint64_t offset(uint64_t address) const noexcept { return address - entry_->base; }

 private:
  Bus& bus_;
  Entry* entry_ = nullptr;
};

// After the count drops the entry may be gone: only members of the bus are touched from there on. The count
// orders nothing but the removal behind all accesses: two accesses are the chip's to order, and the thread
// sanitizer sees when it does not.
void Bus::leave(Entry& entry) noexcept {
  if (entry.users.fetch_sub(1, std::memory_order_release) != (removing | 1)) return;
  std::lock_guard lock(removal_mutex_);
  left_.notify_all();
}

const Bus::Entry* Bus::overlapping(uint64_t base, uint64_t size) const noexcept {
  for (const auto& entry : entries_)
    if (base < entry->base + entry->size && entry->base < base + size) return entry.get();
  return nullptr;
}

void Bus::insert(uint64_t base, uint64_t size, RegisterWindow& window, std::string owner) {
  auto entry = std::make_unique<Entry>();
  entry->base = base;
  entry->size = size;
  entry->window = &window;
  entry->owner = std::move(owner);
  auto at = std::upper_bound(entries_.begin(), entries_.end(), base,
                             [](uint64_t b, const auto& other) { return b < other->base; });
  entries_.insert(at, std::move(entry));
}

void Bus::add(uint64_t base, uint64_t size, RegisterWindow& window, std::string owner) {
  std::lock_guard lock(mutex_);
  if (size == 0 || base >= size_ || size > size_ - base)
    usage_error("{}: {:#x} bytes at {:#x} do not fit on the {} bus, which ends at {:#x}", owner, size, base,
                name_, size_);
  if (const Entry* other = overlapping(base, size))
    usage_error(
        "{} at {:#x}-{:#x} overlaps {} at {:#x}-{:#x} on the {} bus; give one of them another address", owner,
        base, base + size - 1, other->owner, other->base, other->base + other->size - 1, name_);
  insert(base, size, window, std::move(owner));
}

bool Bus::try_add(uint64_t base, uint64_t size, RegisterWindow& window, const std::string& owner) noexcept {
  std::lock_guard lock(mutex_);
  if (size == 0 || base >= size_ || size > size_ - base || overlapping(base, size)) return false;
  insert(base, size, window, owner);
  return true;
}

void Bus::remove(uint64_t base) noexcept {
  std::unique_ptr<Entry> entry;
  {
    std::lock_guard lock(mutex_);
    auto at = std::find_if(entries_.begin(), entries_.end(),
                           [base](const auto& candidate) { return candidate->base == base; });
    if (at == entries_.end()) return;
    entry = std::move(*at);
    entries_.erase(at);
  }
  std::unique_lock lock(removal_mutex_);
  entry->users.fetch_or(removing, std::memory_order_acq_rel);
  left_.wait(lock, [&] { return entry->users.load(std::memory_order_acquire) == removing; });
}

uint64_t Bus::read(uint64_t address, unsigned size) noexcept {
  if (address >= size_) return ones(size);
  {
    Access access(*this, address);
    if (access && access.whole(address, size))
      return access.window().read(access.offset(address), size) & ones(size);
    if (size == 1) return 0xff;
  }
  uint64_t value = 0;
  for (unsigned i = 0; i < size; i++) value |= read(address + i, 1) << (i * 8);
  return value;
}

void Bus::write(uint64_t address, unsigned size, uint64_t value) noexcept {
  if (address >= size_) return;
  {
    Access access(*this, address);
    if (access && access.whole(address, size)) {
      access.window().write(access.offset(address), size, value & ones(size));
      return;
    }
    if (size == 1) return;
  }
  for (unsigned i = 0; i < size; i++) write(address + i, 1, value >> (i * 8));
}

std::vector<std::string> Bus::describe() const {
  std::shared_lock lock(mutex_);
  std::vector<std::string> lines;
  for (const auto& entry : entries_)
    lines.push_back(fmt::format("{:#x}-{:#x} {}", entry->base, entry->base + entry->size - 1, entry->owner));
  return lines;
}

}  // namespace lodge::machine
