// The Linux boot protocol, entered in long or protected mode with a boot_params page ("zero page").
//
// The kernel is put where it was linked: no address randomization by the loader, hence the relocation table
// that follows the unpacked kernel is not needed. (A kernel that unpacks itself randomizes itself, if it
// wants to.) Documents: Linux Documentation/x86/boot.rst, Documentation/x86/zero-page.rst.
#include <algorithm>
#include <array>
#include <optional>

#include "base/error.hpp"
#include "base/mapping.hpp"
#include "machine/boot/loaders.hpp"
#include "machine/boot/unpack.hpp"
#include "machine/layout.hpp"

namespace lodge::machine::boot {

namespace {

using Page = std::array<uint8_t, 4096>;

constexpr uint64_t rsdp_at = 0x70, e820_count_at = 0x1e8, header_at = 0x1f1, vid_mode_at = 0x1fa,
                   boot_flag_at = 0x1fe, magic_at = 0x202, version_at = 0x206, loader_at = 0x210,
                   loadflags_at = 0x211, code32_start_at = 0x214, ramdisk_image_at = 0x218,
                   ramdisk_size_at = 0x21c, cmdline_at = 0x228, initrd_max_at = 0x22c, alignment_at = 0x230,
                   cmdline_size_at = 0x238, setup_data_at = 0x250, e820_table_at = 0x2d0;
constexpr size_t e820_max = 128;
constexpr uint8_t loader_unknown = 0xff;
constexpr uint8_t loaded_high = 1;
constexpr uint64_t entry64_offset = 0x200;
constexpr uint64_t kernel_command_line_max = 2047;  // COMMAND_LINE_SIZE - 1 on x86
constexpr uint64_t command_line_bound = 65535;      // whatever a header claims

// The fields that every protocol fills the same way. Screen information stays zero: there is no VGA, and that
// is how a kernel learns it.
void fill_common(Loading& loading, Page& params, uint64_t command_line, const Blob& initrd) {
  put(params, rsdp_at, loading.request.acpi_rsdp);
  put(params, loader_at, loader_unknown);
  put(params, vid_mode_at, uint16_t{0xffff});  // "normal"
  put(params, cmdline_at, static_cast<uint32_t>(command_line));
  put(params, ramdisk_image_at, static_cast<uint32_t>(initrd.gpa));
  put(params, ramdisk_size_at, static_cast<uint32_t>(initrd.size));
  put(params, setup_data_at, uint64_t{0});
  const auto map = e820_map(loading.placement.memory());
  const size_t count = std::min(map.size(), e820_max);
  put(params, e820_count_at, static_cast<uint8_t>(count));
  for (size_t index = 0; index < count; ++index) {
    const uint64_t at = e820_table_at + index * 20;
    put(params, at, map[index].address);
    put(params, at + 8, map[index].size);
    put(params, at + 16, map[index].type);
  }
}

uint64_t place_params(Loading& loading, const Page& params) {
  const uint64_t gpa = loading.placement.allocate(params.size(), 4096, "boot parameters");
  loading.placement.store(gpa, params, "the boot parameters");
  return gpa;
}

struct Unpacked {
  Mapping file;  // elf.segments point into it
  ElfImage elf;
};

// What is in a bzImage is the kernel that its header describes.
bool fits_header(const ElfImage& elf, const BzImage& image) {
  // A 32-bit kernel in an image with a 64-bit entry, or the other way round, is not what the header says.
  if (elf.is64 != image.has_64bit_entry || !elf.physical_entry()) return false;
  // Linux runs at any 2 MiB boundary; elsewhere than at its preferred address it would have to be relocated.
  return elf.lowest() >= image.preferred_address &&
         elf.highest() <= image.preferred_address + image.init_size;
}

// The kernel inside the image, or nothing when the image has to do it itself.
std::optional<Unpacked> unpack_kernel(const Loading& loading, const BzImage& image) {
  auto file = unpack(image.payload, image.init_size);
  if (!file) return std::nullopt;
  try {
    ElfImage elf = parse_elf(file->bytes(), loading.name);
    if (!fits_header(elf, image)) return std::nullopt;
    return Unpacked{std::move(*file), std::move(elf)};
  } catch (const UsageError&) {
    return std::nullopt;  // its own decompressor may know better
  }
}

// Linux's linker puts the first segment so far into the file. Where another does, all segments move.
constexpr uint64_t usual_segment_offset = 2 * layout::MiB;

// Segments of a file that lies in guest memory can go to their places, the last first, when each moves up and
// none would run over what lies before it.
bool can_move_up(const ElfImage& elf, const uint8_t* file, uint64_t file_at) {
  uint64_t end = 0;
  const uint8_t* data_end = file;
  for (const ElfSegment& segment : elf.segments) {
    if (segment.paddr < end || segment.data.data() < data_end) return false;
    if (segment.paddr < file_at + static_cast<uint64_t>(segment.data.data() - file)) return false;
    end = segment.paddr + segment.memory_size;
    data_end = segment.data.data() + segment.data.size();
  }
  return true;
}

// The kernel inside the image, unpacked into guest memory so that its code is where it belongs already: half
// of the time that a detour over other memory takes goes into touching that. Nothing, and perhaps garbage in
// free RAM, when that cannot be done.
std::optional<ElfImage> unpack_in_place(Loading& loading, const BzImage& image) {
  const auto size = unpacked_size(image.payload, image.init_size);
  if (!size || image.preferred_address < usual_segment_offset + layout::MiB) return std::nullopt;
  const uint64_t file_at = image.preferred_address - usual_segment_offset;
  if (!loading.placement.usable(file_at, *size)) return std::nullopt;
  machine::GuestMemory& memory = loading.placement.memory();
  const auto file = memory.view(file_at, *size);
  if (!unpack_into(image.payload, file)) return std::nullopt;
  ElfImage elf;
  try {
    elf = parse_elf(file, loading.name);
  } catch (const UsageError&) {
    return std::nullopt;
  }
  if (!fits_header(elf, image) || !can_move_up(elf, file.data(), file_at)) return std::nullopt;
  take_elf_segments(loading, elf);
  for (auto segment = elf.segments.rbegin(); segment != elf.segments.rend(); ++segment) {
    const auto to = memory.view(segment->paddr, segment->data.size());
    if (to.data() != segment->data.data()) std::ranges::move_backward(segment->data, to.end());
  }
  for (const ElfSegment& segment : elf.segments)
    loading.placement.zero(segment.paddr + segment.data.size(), segment.memory_size - segment.data.size(),
                           "the kernel");
  memory.note_write(file_at, *size);
  memory.note_write(elf.lowest(), elf.highest() - elf.lowest());
  return elf;
}

BootState enter_linux(Loading& loading, bool is64, uint64_t entry, uint64_t params, std::string protocol) {
  BootState state = is64 ? enter_long(loading.placement, entry, std::move(protocol))
                         : enter_protected(loading.placement, entry, std::move(protocol));
  state.regs.rsi = params;
  return state;
}

}  // namespace

BootState load_bzimage(Loading& loading, Bytes file) {
  const BzImage image = parse_bzimage(file, loading.name);
  Placement& placement = loading.placement;
  const uint64_t stub_end = image.load_address + image.protected_mode.size();
  const uint64_t end =
      std::max(stub_end, std::max(image.load_address, image.preferred_address) + image.init_size);
  if (end > placement.low_end()) memory_too_small(loading, end);
  // Unpacked or not, all this is the kernel's: it uses more than its segments say before it knows its memory
  // map.
  placement.take(image.preferred_address, image.init_size);
  placement.take(image.load_address, image.protected_mode.size());

  uint64_t entry = 0;
  std::string protocol;
  std::optional<uint64_t> unpacked_entry;
  if (const auto elf = unpack_in_place(loading, image)) {
    unpacked_entry = elf->physical_entry();
  } else if (const auto kernel = unpack_kernel(loading, image)) {
    load_elf_segments(loading, kernel->elf);
    unpacked_entry = kernel->elf.physical_entry();
  }
  if (unpacked_entry) {
    entry = *unpacked_entry;
    protocol = fmt::format("Linux bzImage, {} payload unpacked", payload_format(image.payload));
  } else {
    refuse_over_tables(loading, image.load_address, image.protected_mode.size());
    placement.store(image.load_address, image.protected_mode, "the kernel");
    entry = image.load_address + (image.has_64bit_entry ? entry64_offset : 0);
    protocol = "Linux bzImage, unpacking itself";
  }
  protocol += image.has_64bit_entry ? ", 64-bit entry" : ", 32-bit entry";

  Page params{};
  std::copy(image.setup_header.begin(), image.setup_header.end(), params.begin() + header_at);
  const uint64_t line =
      place_command_line(loading, std::min<uint64_t>(image.command_line_size, command_line_bound));
  const Blob initrd = load_initrds(loading, image.initrd_max + 1);
  fill_common(loading, params, line, initrd);
  put(params, code32_start_at, static_cast<uint32_t>(image.load_address));
  BootState state =
      enter_linux(loading, image.has_64bit_entry, entry, place_params(loading, params), protocol);
  state.kernel_begin = std::min(image.load_address, image.preferred_address);
  state.kernel_end = end;
  return state;
}

BootState load_plain_elf(Loading& loading, const ElfImage& elf) {
  // Nothing marks a plain ELF file as a kernel, but these are surely none.
  if (elf.is_program)
    usage_error("{}: this is a program for an operating system, give a kernel", loading.name);
  const auto entry = elf.physical_entry();
  if (!entry)
    usage_error("{}: the entry point {:#x} lies in no segment of this ELF file", loading.name, elf.entry);
  load_elf_segments(loading, elf);
  // What a bzImage's header would have said, so that a vmlinux without PVH note boots as well.
  Page params{};
  put(params, boot_flag_at, uint16_t{0xaa55});
  put(params, magic_at, uint32_t{0x53726448});  // "HdrS"
  put(params, version_at, uint16_t{0x20f});
  put(params, loadflags_at, loaded_high);
  put(params, initrd_max_at, uint32_t{0x7fff'ffff});
  put(params, alignment_at, uint32_t{2 * layout::MiB});
  put(params, cmdline_size_at, static_cast<uint32_t>(kernel_command_line_max));
  const uint64_t line = place_command_line(loading, kernel_command_line_max);
  const Blob initrd = load_initrds(loading, layout::low_ram_limit);
  fill_common(loading, params, line, initrd);
  BootState state = enter_linux(loading, elf.is64, *entry, place_params(loading, params),
                                elf.is64 ? "ELF, 64-bit entry" : "ELF, 32-bit entry");
  state.kernel_begin = elf.lowest();
  state.kernel_end = elf.highest();
  return state;
}

}  // namespace lodge::machine::boot
