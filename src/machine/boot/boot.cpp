#include "machine/boot/boot.hpp"

#include <algorithm>
#include <array>

#include "base/error.hpp"
#include "base/mapping.hpp"
#include "machine/boot/loaders.hpp"
#include "machine/boot/unpack.hpp"
#include "machine/layout.hpp"

namespace lodge::machine::boot {

void memory_too_small(const Loading& loading, uint64_t end) {
  usage_error("--memory {}M is too small for {}, which needs at least {}M",
              loading.placement.memory().size() >> 20, loading.request.kernel,
              align_up(end, layout::MiB) >> 20);
}

void refuse_over_tables(const Loading& loading, uint64_t gpa, uint64_t size) {
  constexpr uint64_t begin = layout::acpi_base, end = layout::smbios_base + layout::smbios_size;
  static_assert(layout::acpi_base + layout::acpi_size == layout::smbios_base);
  if (gpa >= end || gpa + size <= begin) return;
  usage_error("{}: this kernel belongs at {:#x} to {:#x}, over the machine's tables at {:#x} to {:#x}",
              loading.name, gpa, gpa + size - 1, begin, end - 1);
}

void take_elf_segments(Loading& loading, const ElfImage& elf) {
  Placement& placement = loading.placement;
  for (const ElfSegment& segment : elf.segments) {
    if (!placement.usable(segment.paddr, segment.memory_size)) {
      if (segment.paddr + segment.memory_size <= layout::low_ram_limit)
        memory_too_small(loading, elf.highest());
      usage_error("{}: a segment of this kernel belongs at {:#x}, where this machine has no RAM",
                  loading.name, segment.paddr);
    }
    refuse_over_tables(loading, segment.paddr, segment.memory_size);
  }
  for (const ElfSegment& segment : elf.segments) placement.take(segment.paddr, segment.memory_size);
}

void load_elf_segments(Loading& loading, const ElfImage& elf) {
  take_elf_segments(loading, elf);
  Placement& placement = loading.placement;
  for (const ElfSegment& segment : elf.segments) {
    placement.store(segment.paddr, segment.data, "the kernel");
    placement.zero(segment.paddr + segment.data.size(), segment.memory_size - segment.data.size(),
                   "the kernel");
  }
}

Blob load_initrds(Loading& loading, uint64_t limit) {
  std::vector<Mapping> files;
  std::vector<Bytes> parts;
  if (!loading.request.initrd.empty()) parts.push_back(loading.request.initrd);
  for (const std::string& path : loading.request.initrds) {
    files.push_back(Mapping::file(path, "--initrd"));
    parts.push_back(files.back().bytes());
  }
  uint64_t size = 0;
  for (const Bytes part : parts) size = align_up(size, 4) + part.size();
  if (parts.empty()) return {};
  Placement& placement = loading.placement;
  const auto gpa = placement.allocate_high(size, 4096, limit);
  if (!gpa) {
    usage_error(
        "--initrd: {}M of initial RAM disk do not fit beside the kernel into --memory {}M, give it more",
        align_up(size, layout::MiB) >> 20, placement.memory().size() >> 20);
  }
  uint64_t at = 0;
  for (const Bytes part : parts) {
    const uint64_t padding = align_up(at, 4) - at;
    placement.zero(*gpa + at, padding, "the initial RAM disk");
    placement.store(*gpa + at + padding, part, "the initial RAM disk");
    at += padding + part.size();
  }
  return {*gpa, size};
}

uint64_t place_command_line(Loading& loading, uint64_t limit) {
  const std::string& text = loading.request.append;
  if (text.size() > limit) {
    usage_error("--append: the command line has {} characters, this kernel takes {} at most", text.size(),
                limit);
  }
  if (text.find('\0') != std::string::npos) usage_error("--append: the command line contains a zero byte");
  const uint64_t gpa = loading.placement.allocate(text.size() + 1, 16, "command line");
  loading.placement.store(gpa, {reinterpret_cast<const uint8_t*>(text.c_str()), text.size() + 1},
                          "the command line");
  return gpa;
}

BootState load_bytes(Bytes kernel, const Request& request, GuestMemory& memory) {
  Loading loading(request, memory);
  std::optional<Mapping> unpacked;
  if (payload_format(kernel) == "gzip") {
    unpacked = unpack(kernel, memory.size());
    if (!unpacked) usage_error("{}: this gzip file is damaged, or larger than --memory", loading.name);
    kernel = unpacked->bytes();
  }
  // What a BIOS leaves in its data area: the segment of the extended area and the KiB of conventional memory.
  constexpr std::array<uint8_t, 7> bios_data{0xc0, 0x9f, 0, 0, 0, 0x7f, 0x02};
  loading.placement.store(0x40e, bios_data, "the BIOS data area");
  constexpr std::array<uint8_t, 1> extended_bios_data{1};  // its size in KiB
  loading.placement.store(0x9fc00, extended_bios_data, "the extended BIOS data area");

  if (is_bzimage(kernel)) return load_bzimage(loading, kernel);
  if (is_elf(kernel)) {
    const ElfImage elf = parse_elf(kernel, loading.name);
    // Multiboot first: a kernel that knows both (Xen) gets its modules one by one that way.
    if (is_multiboot(kernel)) return load_multiboot(loading, kernel);
    if (elf.pvh_entry) return load_pvh(loading, elf);
    return load_plain_elf(loading, elf);
  }
  if (is_multiboot(kernel)) return load_multiboot(loading, kernel);
  usage_error("{}: not a kernel Lodge knows (Linux bzImage, ELF, multiboot)", loading.name);
}

BootState load(const Request& request, GuestMemory& memory) {
  const Mapping file = Mapping::file(request.kernel, "--kernel");
  return load_bytes(file.bytes(), request, memory);
}

}  // namespace lodge::machine::boot
