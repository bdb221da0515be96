#include "machine/memory.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "base/error.hpp"
#include "machine/layout.hpp"

namespace lodge::machine {

namespace {

Fd create_memfd(uint64_t size) {
  if (size == 0 || size % 4096 != 0 || size > (uint64_t{1} << 46))
    usage_error("guest memory of {} bytes: give a multiple of 4096 between 4 KiB and 64 TiB", size);
  Fd fd(memfd_create("lodge-ram", MFD_CLOEXEC));
  if (!fd) throw_errno("cannot create guest memory (memfd_create)");
  if (ftruncate(fd.get(), static_cast<off_t>(size)) != 0) throw_errno("cannot size guest memory");
  return fd;
}

}  // namespace

// MAP_NORESERVE: a guest rarely touches all its memory, and the host's overcommit policy should not refuse a
// machine for what it might touch.
GuestMemory::GuestMemory(uint64_t size)
    : size_(size),
      fd_(create_memfd(size)),
      mapping_(size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd_.get(), 0,
               "cannot map guest memory") {
  // Advice only: without huge pages the guest runs slower, not wrongly.
  madvise(mapping_.data(), mapping_.size(), MADV_HUGEPAGE);
  uint64_t low = std::min(size, layout::low_ram_limit);
  ranges_.push_back({0, low, 0});
  if (size > low) ranges_.push_back({layout::high_ram_base, size - low, low});
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

// MADV_REMOVE punches a hole into the memfd, so the memory is free for every process that maps it.
uint64_t GuestMemory::release(uint64_t gpa, uint64_t size) noexcept {
  const uint64_t first = (gpa + 4095) & ~uint64_t{4095};
  if (first < gpa || size < first - gpa) return 0;
  const uint64_t length = (size - (first - gpa)) & ~uint64_t{4095};
  const auto pages = view(first, length);
  if (pages.empty() || madvise(pages.data(), pages.size(), MADV_REMOVE) != 0) return 0;
  note_write(first, length);
  return length;
}

void GuestMemory::unmap_page(uint64_t gpa) noexcept {
  auto page = view(gpa & ~uint64_t{4095}, 4096);
  if (!page.empty()) madvise(page.data(), page.size(), MADV_DONTNEED);
}

}  // namespace lodge::machine
