#include "machine/boot/placement.hpp"

#include <algorithm>
#include <cstring>

#include "base/error.hpp"
#include "machine/layout.hpp"

namespace lodge::machine::boot {

namespace {

constexpr uint64_t page = 4096;
// The extended BIOS data area of a real PC begins here; operating systems expect RAM to end below it.
constexpr uint64_t conventional_end = 0x9fc00;
constexpr uint64_t rom_area = 0xe0000, extended_begin = 0x100000;

}  // namespace

std::vector<E820Entry> e820_map(const GuestMemory& memory) {
  std::vector<E820Entry> map;
  for (const RamRange& range : memory.ranges()) {
    const uint64_t end = range.gpa + range.size;
    if (range.gpa != 0) {
      map.push_back({range.gpa, range.size, e820_ram});
      continue;
    }
    map.push_back({0, std::min(end, conventional_end), e820_ram});
    map.push_back({conventional_end, 0xa0000 - conventional_end, e820_reserved});
    map.push_back({rom_area, extended_begin - rom_area, e820_reserved});  // ACPI and SMBIOS tables
    if (end > extended_begin) map.push_back({extended_begin, end - extended_begin, e820_ram});
  }
  map.push_back({layout::ecam_base, layout::ecam_size, e820_reserved});  // as the MCFG table demands
  map.push_back({layout::identity_map_base, 4 * page, e820_reserved});   // KVM's own pages on Intel hosts
  std::sort(map.begin(), map.end(), [](const auto& a, const auto& b) { return a.address < b.address; });
  return map;
}

Placement::Placement(GuestMemory& memory) : memory_(memory) {
  for (const RamRange& range : memory.ranges()) {
    if (range.gpa == 0) low_end_ = range.size;
  }
  if (low_end_ < 2 * layout::MiB) usage_error("--memory: a guest with a kernel needs at least 2M");
  take(0, page);  // interrupt vectors and BIOS data, which kernels look at
  take(conventional_end, extended_begin - conventional_end);
}

void Placement::take(uint64_t gpa, uint64_t size) {
  taken_.push_back({gpa, gpa + size});
}

bool Placement::usable(uint64_t gpa, uint64_t size) const noexcept {
  for (const RamRange& range : memory_.ranges()) {
    if (gpa >= range.gpa && gpa - range.gpa <= range.size && size <= range.size - (gpa - range.gpa))
      return true;
  }
  return false;
}

std::optional<uint64_t> Placement::find_low(uint64_t size, uint64_t alignment, Range within) const {
  uint64_t at = align_up(within.begin, alignment);
  while (at < within.end && size <= within.end - at) {
    const auto hit = std::find_if(taken_.begin(), taken_.end(), [&](const Range& range) {
      return at < range.end && range.begin < at + size;
    });
    if (hit == taken_.end()) return at;
    at = align_up(hit->end, alignment);  // ends the loop: `at` only grows
  }
  return std::nullopt;
}

uint64_t Placement::allocate(uint64_t size, uint64_t alignment, const std::string& what) {
  auto at = find_low(size, alignment, {page, conventional_end});
  if (!at) at = find_low(size, alignment, {extended_begin, low_end_});
  if (!at) usage_error("--memory: no room for the {} beside the kernel, give the guest more memory", what);
  take(*at, size);
  return *at;
}

std::optional<uint64_t> Placement::allocate_high(uint64_t size, uint64_t alignment, uint64_t limit) {
  uint64_t end = std::min(limit, low_end_);
  while (end >= extended_begin && size <= end - extended_begin) {
    const uint64_t at = (end - size) & ~(alignment - 1);
    if (at < extended_begin) break;
    const auto hit = std::find_if(taken_.begin(), taken_.end(), [&](const Range& range) {
      return at < range.end && range.begin < at + size;
    });
    if (hit == taken_.end()) {
      take(at, size);
      return at;
    }
    end = hit->begin;  // ends the loop: `end` only shrinks
  }
  return std::nullopt;
}

void Placement::store(uint64_t gpa, Bytes data, const std::string& what) {
  if (!memory_.write(gpa, data)) {
    usage_error("--memory: {} ({} bytes at {:#x}) does not fit into the guest's memory, give it more", what,
                data.size(), gpa);
  }
}

void Placement::zero(uint64_t gpa, uint64_t size, const std::string& what) {
  const auto view = memory_.view(gpa, size);
  if (view.empty() && size != 0) {
    usage_error("--memory: {} ({} bytes at {:#x}) does not fit into the guest's memory, give it more", what,
                size, gpa);
  }
  if (size == 0) return;
  std::memset(view.data(), 0, size);
  memory_.note_write(gpa, size);
}

}  // namespace lodge::machine::boot
