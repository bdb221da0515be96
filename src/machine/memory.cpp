#include "machine/memory.hpp"

#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "machine/layout.hpp"
#include "machine/memory_host.hpp"

namespace lodge::machine {

GuestMemory::GuestMemory(uint64_t size, const MemoryOptions& options, const MemoryProgress& progress)
    : size_(size),
      options_(options),
      fd_(create_backing(size, options)),
      mapping_(map_backing(size, options, fd_)) {
  prepare(mapping_, options, progress);
  uint64_t low = std::min(size, layout::low_ram_limit);
  ranges_.push_back({0, low, 0});
  if (size > low) ranges_.push_back({layout::high_ram_base, size - low, low});
}

uint64_t GuestMemory::resident() const noexcept {
  struct stat info {};
  if (fd_) return ::fstat(fd_.get(), &info) == 0 ? static_cast<uint64_t>(info.st_blocks) * 512 : 0;
  constexpr uint64_t pages_at_once = 4096;
  std::array<unsigned char, pages_at_once> present;
  uint64_t count = 0;
  for (uint64_t at = 0; at < size_; at += pages_at_once * 4096) {
    const uint64_t length = std::min(pages_at_once * 4096, size_ - at);
    if (::mincore(mapping_.data() + at, length, present.data()) != 0) return 0;
    count += static_cast<uint64_t>(std::count_if(present.begin(),
                                                 present.begin() + static_cast<ptrdiff_t>(length / 4096),
                                                 [](unsigned char page) { return page & 1; }));
  }
  return count * 4096;
}

void GuestMemory::attach(kvm::Vm& vm, uint32_t first_slot) {
  detach();
  vm_ = &vm;
  first_slot_ = first_slot;
  try {
    for (size_t i = 0; i < ranges_.size(); i++)
      vm.set_user_memory_region(
          {.slot = first_slot + static_cast<uint32_t>(i),
           .flags = 0,
           .guest_phys_addr = ranges_[i].gpa,
           .memory_size = ranges_[i].size,
           .userspace_addr = reinterpret_cast<uint64_t>(mapping_.data()) + ranges_[i].offset});
  } catch (...) {
    detach();
    throw;
  }
}

void GuestMemory::detach() noexcept {
  if (!vm_) return;
  for (size_t i = 0; i < ranges_.size(); i++) {
    try {
      vm_->set_user_memory_region({.slot = first_slot_ + static_cast<uint32_t>(i),
                                   .flags = 0,
                                   .guest_phys_addr = ranges_[i].gpa,
                                   .memory_size = 0,
                                   .userspace_addr = 0});
    } catch (const std::exception&) {
      // A slot that attach() did not get to: there is nothing to remove.
    }
  }
  vm_ = nullptr;
}

std::optional<uint64_t> GuestMemory::offset(uint64_t gpa) const noexcept {
  for (const RamRange& range : ranges_)
    if (gpa >= range.gpa && gpa - range.gpa < range.size) return range.offset + (gpa - range.gpa);
  return std::nullopt;
}

std::span<uint8_t> GuestMemory::view(uint64_t gpa, uint64_t size) noexcept {
  for (const RamRange& range : ranges_) {
    if (gpa < range.gpa || gpa - range.gpa >= range.size) continue;
    uint64_t into = gpa - range.gpa;
    if (size > range.size - into) return {};
    return mapping_.bytes().subspan(range.offset + into, size);
  }
  return {};
}

bool GuestMemory::read(uint64_t gpa, std::span<uint8_t> out) noexcept {
  if (out.empty()) return true;
  auto from = view(gpa, out.size());
  if (from.empty()) return false;
  std::memcpy(out.data(), from.data(), out.size());
  return true;
}

bool GuestMemory::write(uint64_t gpa, std::span<const uint8_t> data) noexcept {
  if (data.empty()) return true;
  auto to = view(gpa, data.size());
  if (to.empty()) return false;
  std::memcpy(to.data(), data.data(), data.size());
  note_write(gpa, data.size());
  return true;
}

void GuestMemory::note_write(uint64_t gpa, uint64_t size) noexcept {
  if (vm_) vm_->note_write(gpa, size);
}

// MADV_REMOVE punches a hole into the memfd, so the memory is free for every process that maps it. A huge
// page that is given back may be another's when the guest wants it again, and the signal would end the
// machine.
uint64_t GuestMemory::release(uint64_t gpa, uint64_t size) noexcept {
  if (!gives_back()) return 0;
  const uint64_t first = (gpa + 4095) & ~uint64_t{4095};
  if (first < gpa || size < first - gpa) return 0;
  const uint64_t length = (size - (first - gpa)) & ~uint64_t{4095};
  const auto pages = view(first, length);
  if (pages.empty() || madvise(pages.data(), pages.size(), fd_ ? MADV_REMOVE : MADV_DONTNEED) != 0) return 0;
  note_write(first, length);
  return length;
}

void GuestMemory::unmap_page(uint64_t gpa) noexcept {
  auto page = view(gpa & ~uint64_t{4095}, 4096);
  if (!page.empty() && fd_) madvise(page.data(), page.size(), MADV_DONTNEED);
}

}  // namespace lodge::machine
