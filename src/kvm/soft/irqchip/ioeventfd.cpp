// KVM_IOEVENTFD by the kernel's Documentation/virt/kvm/api.rst, section 4.59.
#include "kvm/soft/irqchip/ioeventfd.hpp"

#include <algorithm>
#include <mutex>

#include "base/error.hpp"
#include "kvm/soft/irqchip/event_identity.hpp"

namespace lodge::kvm::soft {
namespace {

constexpr uint32_t known_flags =
    KVM_IOEVENTFD_FLAG_DATAMATCH | KVM_IOEVENTFD_FLAG_PIO | KVM_IOEVENTFD_FLAG_DEASSIGN;

void check(const kvm_ioeventfd& request) {
  const bool length_fits =
      request.len == 0 || request.len == 1 || request.len == 2 || request.len == 4 || request.len == 8;
  if (!length_fits) throw_errno(EINVAL, "an ioeventfd's length must be 0, 1, 2, 4 or 8");
  if (request.addr + request.len < request.addr) throw_errno(EINVAL, "an ioeventfd's range wraps");
  if ((request.flags & ~known_flags) != 0) throw_errno(EINVAL, "unknown ioeventfd flags");
  if (request.len == 0 && (request.flags & KVM_IOEVENTFD_FLAG_DATAMATCH) != 0)
    throw_errno(EINVAL, "an ioeventfd of any length cannot compare data");
}

}  // namespace

void IoEventfds::set(const kvm_ioeventfd& request) {
  check(request);
  Entry entry{.pio = (request.flags & KVM_IOEVENTFD_FLAG_PIO) != 0,
              .match_any = (request.flags & KVM_IOEVENTFD_FLAG_DATAMATCH) == 0,
              .size = request.len,
              .address = request.addr,
              .datamatch = request.datamatch,
              .identity = event_identity(request.fd),
              .fd = {}};
  const auto same_value = [&](const Entry& other) { return other.datamatch == entry.datamatch; };
  const std::unique_lock lock(mutex_);
  const auto first = std::ranges::lower_bound(entries_, entry.address, {}, &Entry::address);
  const auto last = std::ranges::upper_bound(entries_, entry.address, {}, &Entry::address);
  if ((request.flags & KVM_IOEVENTFD_FLAG_DEASSIGN) != 0) {
    const auto found = std::find_if(first, last, [&](const Entry& other) {
      return other.pio == entry.pio && other.identity == entry.identity && other.size == entry.size &&
             other.match_any == entry.match_any && (entry.match_any || same_value(other));
    });
    if (found == last) throw_errno(ENOENT, "no such ioeventfd");
    entries_.erase(found);
  } else {
    const bool collides = std::any_of(first, last, [&](const Entry& other) {
      return other.pio == entry.pio &&
             (other.size == 0 || entry.size == 0 ||
              (other.size == entry.size && (other.match_any || entry.match_any || same_value(other))));
    });
    if (collides) throw_errno(EEXIST, "another ioeventfd answers the same writes");
    entry.fd = Fd::duplicate(request.fd);
    entries_.insert(last, std::move(entry));
  }
  rebuild_filters();
}

void IoEventfds::rebuild_filters() noexcept {
  std::array<uint64_t, 2> filters{};
  for (const Entry& entry : entries_) filters[entry.pio ? 1 : 0] |= filter_bit(entry.address);
  for (unsigned i = 0; i < 2; ++i) filters_[i].store(filters[i], std::memory_order_relaxed);
}

bool IoEventfds::find(bool pio, uint64_t address, unsigned size, uint64_t value) noexcept {
  // Data beyond the write's size is not part of the comparison.
  const uint64_t mask = size >= 8 ? ~uint64_t{0} : (uint64_t{1} << (size * 8)) - 1;
  const std::shared_lock lock(mutex_);
  auto it = std::ranges::lower_bound(entries_, address, {}, &Entry::address);
  for (; it != entries_.end() && it->address == address; ++it) {
    if (it->pio != pio || (it->size != 0 && it->size != size)) continue;
    if (!it->match_any && (value & mask) != it->datamatch) continue;
    signal_event(it->fd.get());
    return true;
  }
  return false;
}

}  // namespace lodge::kvm::soft
