// SMBIOS tables, by the System Management BIOS Reference Specification (DMTF DSP0134) 3.0, sections 5 (entry
// points) and 7 (structures).
//
// All processors are cores of one socket, all memory is one module: what a guest makes of both is up to CPUID
// and the memory map. Missing: caches (type 7), slots and ports: there is nothing to tell about them.
#include "machine/smbios/smbios.hpp"

#include <algorithm>
#include <numeric>
#include <string_view>

#include "base/error.hpp"
#include "machine/layout.hpp"

namespace lodge::machine::smbios {

namespace {

using Bytes = std::vector<uint8_t>;

constexpr std::string_view vendor = "Lodge", product = "PC", version = LODGE_VERSION, date = "01/01/2026";
constexpr uint16_t no_handle = 0xffff, no_error_information = 0xfffe;
constexpr uint16_t memory_array_handle = 0x1000;
constexpr uint64_t KiB = layout::KiB, MiB = layout::MiB;

// Builds one structure: fields in order, strings numbered as they come, the length filled in at the end.
class Structure {
 public:
  Structure(uint8_t type, uint16_t handle) { u8(type).u8(0).u16(handle); }
  Structure& u8(uint64_t value) { return put(value, 1); }
  Structure& u16(uint64_t value) { return put(value, 2); }
  Structure& u32(uint64_t value) { return put(value, 4); }
  Structure& u64(uint64_t value) { return put(value, 8); }
  Structure& bytes(std::span<const uint8_t> value) {
    fields_.insert(fields_.end(), value.begin(), value.end());
    return *this;
  }
  // A string reference; 0 means none. Zero bytes would end the string early and are dropped.
  Structure& text(std::string_view value) {
    if (value.empty()) return u8(0);
    std::copy_if(value.begin(), value.end(), std::back_inserter(strings_), [](char c) { return c != 0; });
    strings_.push_back(0);
    return u8(++string_count_);
  }
  Bytes take() {
    fields_[1] = static_cast<uint8_t>(fields_.size());
    if (strings_.empty()) strings_.push_back(0);
    strings_.push_back(0);
    fields_.insert(fields_.end(), strings_.begin(), strings_.end());
    return std::move(fields_);
  }

 private:
  Structure& put(uint64_t value, unsigned size) {
    for (unsigned index = 0; index < size; ++index)
      fields_.push_back(static_cast<uint8_t>(value >> (8 * index)));
    return *this;
  }
  Bytes fields_, strings_;
  uint8_t string_count_ = 0;
};

Bytes bios_information() {
  constexpr uint64_t characteristics_not_supported = 1 << 3;
  constexpr uint8_t is_virtual_machine = 1 << 4;
  constexpr uint8_t no_release = 0xff;
  Structure s(0, 0);
  s.text(vendor).text(version).u16(0xe000).text(date).u8(0).u64(characteristics_not_supported);
  s.u8(0).u8(is_virtual_machine);
  return s.u8(no_release).u8(no_release).u8(no_release).u8(no_release).take();
}

Bytes system_information(const Config& config) {
  constexpr uint8_t woken_by_power_switch = 6;
  // The first three groups of a UUID are little-endian here (7.2.1).
  std::array<uint8_t, 16> uuid = config.uuid;
  std::reverse(uuid.begin(), uuid.begin() + 4);
  std::reverse(uuid.begin() + 4, uuid.begin() + 6);
  std::reverse(uuid.begin() + 6, uuid.begin() + 8);
  Structure s(1, 0x100);
  s.text(vendor).text(product).text(version).text(config.serial).bytes(uuid);
  return s.u8(woken_by_power_switch).u8(0).u8(0).take();
}

Bytes chassis() {
  constexpr uint8_t other = 1, safe = 3, no_security = 3;
  Structure s(3, 0x300);
  s.text(vendor).u8(other).text(version).u8(0).u8(0).u8(safe).u8(safe).u8(safe).u8(no_security);
  return s.u32(0).u8(0).u8(0).u8(0).u8(0).u8(0).take();
}

Bytes processor(const Config& config) {
  constexpr uint8_t central_processor = 3, other = 1, unknown = 2, populated_and_enabled = 0x41;
  constexpr uint16_t is_64bit = 1 << 2, multi_core = 1 << 3;
  const unsigned count = std::min(config.cpus, 0xffffu), count8 = std::min(count, 0xffu);
  Structure s(4, 0x400);
  s.text("CPU 0").u8(central_processor).u8(other).text(vendor).u32(config.cpuid_eax).u32(config.cpuid_edx);
  s.text(config.cpu_name).u8(0).u16(0).u16(0).u16(0).u8(populated_and_enabled).u8(other);
  s.u16(no_handle).u16(no_handle).u16(no_handle).u8(0).u8(0).u8(0);
  s.u8(count8).u8(count8).u8(count8).u16(is_64bit | (count > 1 ? multi_core : 0)).u16(unknown);
  return s.u16(count).u16(count).u16(count).take();
}

Bytes memory_array(uint64_t total) {
  constexpr uint8_t location_other = 1, use_system_memory = 3, no_correction = 3;
  constexpr uint64_t needs_extended = 0x8000'0000;  // KiB
  Structure s(16, memory_array_handle);
  s.u8(location_other).u8(use_system_memory).u8(no_correction).u32(std::min(total / KiB, needs_extended));
  return s.u16(no_error_information).u16(1).u64(total / KiB >= needs_extended ? total : 0).take();
}

Bytes memory_device(uint64_t total) {
  constexpr uint16_t unknown_width = 0xffff, needs_extended = 0x7fff, size_in_kib = 0x8000, detail_other = 2;
  constexpr uint8_t form_dimm = 9, type_ram = 7;
  const bool extended = total / MiB >= needs_extended;
  const uint64_t size = extended ? needs_extended : total < MiB ? (total / KiB | size_in_kib) : total / MiB;
  Structure s(17, 0x1100);
  s.u16(memory_array_handle).u16(no_error_information).u16(unknown_width).u16(unknown_width).u16(size);
  s.u8(form_dimm)
      .u8(0)
      .text("DIMM 0")
      .u8(0)
      .u8(type_ram)
      .u16(detail_other)
      .u16(0)
      .text(vendor)
      .u8(0)
      .u8(0)
      .u8(0);
  return s.u8(0).u32(extended ? total / MiB : 0).u16(0).u16(0).u16(0).u16(0).take();
}

Bytes mapped_address(uint16_t handle, const RamRange& range) {
  constexpr uint32_t needs_extended = 0xffff'ffff;
  const uint64_t first = range.gpa / KiB, last = (range.gpa + range.size) / KiB - 1;
  const bool extended = last >= needs_extended;
  Structure s(19, handle);
  s.u32(extended ? needs_extended : first)
      .u32(extended ? needs_extended : last)
      .u16(memory_array_handle)
      .u8(1);
  return s.u64(extended ? range.gpa : 0).u64(extended ? range.gpa + range.size - 1 : 0).take();
}

Bytes boot_information() {
  return Structure(32, 0x2000).u32(0).u16(0).u8(0).take();
}

uint8_t checksum(std::span<const uint8_t> bytes) {
  return static_cast<uint8_t>(-std::accumulate(bytes.begin(), bytes.end(), 0u));
}

// 5.2.2
Bytes entry_point_3(uint64_t gpa, size_t size) {
  Bytes entry{'_', 'S', 'M', '3', '_', 0, 24, 3, 0, 0, 1, 0};
  for (unsigned index = 0; index < 4; ++index) entry.push_back(static_cast<uint8_t>(size >> (8 * index)));
  for (unsigned index = 0; index < 8; ++index) entry.push_back(static_cast<uint8_t>(gpa >> (8 * index)));
  entry[5] = checksum(entry);
  return entry;
}

struct Extent {
  unsigned count = 0;
  size_t longest = 0;
};

// Walks the structures as a reader does.
Extent measure(const Bytes& bytes) {
  Extent extent;
  for (size_t at = 0; at + 4 <= bytes.size();) {
    size_t end = at + bytes[at + 1];
    while (end + 2 <= bytes.size() && (bytes[end] != 0 || bytes[end + 1] != 0)) ++end;
    end += 2;
    extent.longest = std::max(extent.longest, end - at);
    ++extent.count;
    at = end;
  }
  return extent;
}

// 5.2.1: for systems that know SMBIOS 2 only. Its second half has a checksum of its own, for DMI.
Bytes entry_point_2(uint64_t gpa, const Bytes& bytes) {
  constexpr size_t size = 31, intermediate_at = 16;
  const Extent extent = measure(bytes);
  Bytes entry{'_', 'S', 'M', '_', 0, size, 2, 8};
  const auto put = [&](uint64_t value, unsigned count) {
    for (unsigned index = 0; index < count; ++index)
      entry.push_back(static_cast<uint8_t>(value >> (8 * index)));
  };
  put(extent.longest, 2);
  put(0, 6);  // entry point revision, formatted area
  entry.insert(entry.end(), {'_', 'D', 'M', 'I', '_', 0});
  put(bytes.size(), 2);
  put(gpa, 4);
  put(extent.count, 2);
  put(0x28, 1);
  entry[21] = checksum(std::span(entry).subspan(intermediate_at));
  entry[4] = checksum(entry);
  return entry;
}

}  // namespace

std::vector<uint8_t> structures(const Config& config, std::span<const RamRange> ranges) {
  uint64_t total = 0;
  for (const RamRange& range : ranges) total += range.size;
  Bytes all;
  const auto add = [&](const Bytes& bytes) { all.insert(all.end(), bytes.begin(), bytes.end()); };
  add(bios_information());
  add(system_information(config));
  add(chassis());
  add(processor(config));
  add(memory_array(total));
  add(memory_device(total));
  uint16_t handle = 0x1300;
  for (const RamRange& range : ranges) add(mapped_address(handle++, range));
  add(boot_information());
  add(Structure(127, 0x7f00).take());
  return all;
}

void install(const Config& config, GuestMemory& memory) {
  constexpr uint64_t entry3_gpa = layout::smbios_base, entry2_gpa = entry3_gpa + 0x20,
                     tables_gpa = entry2_gpa + 0x20;
  const Bytes tables = structures(config, memory.ranges());
  if (tables.size() > layout::smbios_size - (tables_gpa - layout::smbios_base)) {
    usage_error("the SMBIOS tables outgrew their area: give the machine shorter names");
  }
  if (!memory.write(tables_gpa, tables) ||
      !memory.write(entry3_gpa, entry_point_3(tables_gpa, tables.size())) ||
      !memory.write(entry2_gpa, entry_point_2(tables_gpa, tables))) {
    usage_error("--memory: a machine with SMBIOS tables needs at least 1M");
  }
}

}  // namespace lodge::machine::smbios
