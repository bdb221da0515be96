#include "kvm/soft/coalesced.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "base/error.hpp"

namespace lodge::kvm::soft {
namespace {

constexpr size_t page_bytes = 4096;

Fd make_file() {
  Fd file(::memfd_create("kvm-coalesced", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!file || ::ftruncate(file.get(), page_bytes) != 0 ||
      ::fcntl(file.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0)
    throw_errno("cannot make the ring of coalesced I/O");
  return file;
}

bool contains(const kvm_coalesced_mmio_zone& zone, bool pio, uint64_t address, uint64_t size) noexcept {
  const uint64_t offset = address - zone.addr;
  return (zone.pio != 0) == pio && address >= zone.addr && offset <= zone.size && size <= zone.size - offset;
}

}  // namespace

CoalescedIo::CoalescedIo()
    : file_(make_file()),
      page_(page_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file_.get(), 0,
            "cannot map the ring of coalesced I/O"),
      ring_(*reinterpret_cast<Ring*>(page_.data())) {}

void CoalescedIo::add(const kvm_coalesced_mmio_zone& zone) {
  if (zone.pio > 1) throw_errno(EINVAL, "KVM_REGISTER_COALESCED_MMIO: neither memory nor ports");
  const std::lock_guard lock(mutex_);
  zones_.push_back(zone);
  count_ = zones_.size();
}

void CoalescedIo::remove(const kvm_coalesced_mmio_zone& zone) {
  if (zone.pio > 1) throw_errno(EINVAL, "KVM_UNREGISTER_COALESCED_MMIO: neither memory nor ports");
  const std::lock_guard lock(mutex_);
  std::erase_if(zones_,
                [&](const auto& other) { return contains(other, zone.pio != 0, zone.addr, zone.size); });
  count_ = zones_.size();
}

bool CoalescedIo::find(bool pio, uint64_t address, unsigned size) const noexcept {
  return std::ranges::any_of(zones_, [&](const auto& zone) { return contains(zone, pio, address, size); });
}

bool CoalescedIo::covers(bool pio, uint64_t address, unsigned size) noexcept {
  if (!any()) return false;
  const std::lock_guard lock(mutex_);
  return find(pio, address, size);
}

bool CoalescedIo::put(bool pio, uint64_t address, const void* data, unsigned size) noexcept {
  if (!any()) return false;
  const std::lock_guard lock(mutex_);
  if (!find(pio, address, size)) return false;
  // The VMM moves `first`, and may have written anything.
  const uint32_t last = std::atomic_ref(ring_.last).load(std::memory_order_relaxed);
  const uint32_t first = std::atomic_ref(ring_.first).load(std::memory_order_acquire);
  if (last >= entries || (last + 1) % entries == first) return false;
  kvm_coalesced_mmio entry{};
  entry.phys_addr = address;
  entry.len = size;
  entry.pio = pio ? 1 : 0;
  std::memcpy(entry.data, data, size);
  ring_.entry[last] = entry;
  std::atomic_ref(ring_.last).store((last + 1) % entries, std::memory_order_release);
  return true;
}

}  // namespace lodge::kvm::soft
