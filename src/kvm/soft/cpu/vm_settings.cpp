#include "kvm/soft/cpu/vm_settings.hpp"

#include <cerrno>
#include <utility>

#include "base/error.hpp"

namespace lodge::kvm::soft {
namespace {

constexpr uint32_t x2apic_first = 0x800, x2apic_last = 0x8ff;
constexpr uint32_t directions = KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE;

}  // namespace

MsrFilter::MsrFilter(const kvm_msr_filter& filter)
    : default_allow_((filter.flags & KVM_MSR_FILTER_DEFAULT_DENY) == 0) {
  if ((filter.flags & ~uint32_t{KVM_MSR_FILTER_DEFAULT_DENY}) != 0)
    throw_errno(EINVAL, "KVM_X86_SET_MSR_FILTER: unknown flags");
  for (const kvm_msr_filter_range& range : filter.ranges) {
    if (range.nmsrs == 0) continue;
    if ((range.flags & ~directions) != 0 || range.flags == 0)
      throw_errno(EINVAL, "KVM_X86_SET_MSR_FILTER: a range is for reads, writes or both");
    if (range.nmsrs > KVM_MSR_FILTER_MAX_BITMAP_SIZE * 8 || range.bitmap == nullptr)
      throw_errno(EINVAL, "KVM_X86_SET_MSR_FILTER: a bitmap is too large, or missing");
    ranges_.push_back({.flags = range.flags,
                       .base = range.base,
                       .count = range.nmsrs,
                       .bitmap = {range.bitmap, range.bitmap + (range.nmsrs + 7) / 8}});
  }
  // A guest that may touch nothing at all cannot be meant.
  if (ranges_.empty() && !default_allow_)
    throw_errno(EINVAL, "KVM_X86_SET_MSR_FILTER: everything is denied and no range allows anything");
}

bool MsrFilter::allows(uint32_t index, bool write) const noexcept {
  const uint32_t wanted = write ? KVM_MSR_FILTER_WRITE : KVM_MSR_FILTER_READ;
  for (const Range& range : ranges_) {
    const uint32_t offset = index - range.base;
    if ((range.flags & wanted) != 0 && index >= range.base && offset < range.count)
      return (range.bitmap[offset / 8] >> offset % 8 & 1) != 0;
  }
  return default_allow_;
}

void VmSettings::set_filter(std::shared_ptr<const MsrFilter> filter) noexcept {
  const std::lock_guard lock(mutex_);
  filter_.swap(filter);
  filtered_.store(filter_ != nullptr, std::memory_order_release);
}

bool VmSettings::ask_filter(uint32_t index, bool write) const noexcept {
  if (index >= x2apic_first && index <= x2apic_last) return true;
  const std::lock_guard lock(mutex_);
  return !filter_ || filter_->allows(index, write);
}

}  // namespace lodge::kvm::soft
