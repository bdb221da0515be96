// Multiboot 1: ELF32 kernels, and images of any format whose header gives the addresses ("a.out kludge").
//
// Modelled: command line, modules, memory map, boot loader name. Missing: video mode (the machine has no VGA;
// a kernel that insists on one by flag bit 2 still boots and sees that the fields are not there), APM,
// drives, symbols. ELF64 kernels (kvm-unit-tests) are loaded by their segments and entered in 32-bit mode as
// the protocol says. The information is placed clear of all segments, also of those below 1 MiB. Document:
// Multiboot Specification version 0.6.96.
#include <array>

#include "base/error.hpp"
#include "machine/boot/loaders.hpp"
#include "machine/layout.hpp"

namespace lodge::machine::boot {

namespace {

constexpr uint32_t header_magic = 0x1bad'b002, entry_magic = 0x2bad'b002;
constexpr uint64_t search_bytes = 8192;
// Header flags. Of bits 0 to 15 those that a loader does not know forbid booting.
constexpr uint32_t flag_page_aligned = 1, flag_memory = 2, flag_video = 4, flag_addresses = 1 << 16;
constexpr uint32_t required_mask = 0xffff;
// Information flags.
constexpr uint32_t has_memory = 1, has_command_line = 4, has_modules = 8, has_memory_map = 0x40,
                   has_name = 0x200;
constexpr uint64_t info_size = 116, memory_map_entry = 24;
constexpr uint64_t command_line_max = 65535;

struct Header {
  uint64_t offset;  // in the file
  uint32_t flags;
  uint32_t header_address, load_address, load_end, bss_end, entry;  // with flag_addresses
};

std::optional<Header> find_header(Bytes file) noexcept {
  for (uint64_t at = 0; at + 12 <= search_bytes; at += 4) {
    const auto magic = get<uint32_t>(file, at);
    if (!magic) break;
    const auto flags = get<uint32_t>(file, at + 4), checksum = get<uint32_t>(file, at + 8);
    if (*magic != header_magic || !flags || !checksum || *magic + *flags + *checksum != 0) continue;
    Header header{.offset = at, .flags = *flags};
    if ((*flags & flag_addresses) != 0) {
      const auto addresses = get<std::array<uint32_t, 5>>(file, at + 12);
      if (!addresses) break;
      header.header_address = (*addresses)[0];
      header.load_address = (*addresses)[1];
      header.load_end = (*addresses)[2];
      header.bss_end = (*addresses)[3];
      header.entry = (*addresses)[4];
    }
    return header;
  }
  return std::nullopt;
}

struct Loaded {
  uint64_t entry, begin, end;
};

Loaded load_by_addresses(Loading& loading, const Header& header, Bytes file) {
  const uint64_t before = uint64_t{header.header_address} - header.load_address;
  if (header.load_address > header.header_address || before > header.offset) {
    usage_error("{}: the multiboot header has impossible addresses", loading.name);
  }
  const uint64_t start = header.offset - before;
  const uint64_t load_end =
      header.load_end == 0 ? header.load_address + (file.size() - start) : header.load_end;
  if (load_end <= header.load_address)
    usage_error("{}: the multiboot header has impossible addresses", loading.name);
  const auto data = slice(file, start, load_end - header.load_address);
  if (!data) usage_error("{}: the file is truncated (its multiboot header promises more)", loading.name);
  const uint64_t end = std::max<uint64_t>(load_end, header.bss_end);
  Placement& placement = loading.placement;
  if (!placement.usable(header.load_address, end - header.load_address)) memory_too_small(loading, end);
  refuse_over_tables(loading, header.load_address, end - header.load_address);
  placement.take(header.load_address, end - header.load_address);
  placement.store(header.load_address, *data, "the kernel");
  placement.zero(load_end, end - load_end, "the kernel");
  return {header.entry, header.load_address, end};
}

Loaded load_by_elf(Loading& loading, Bytes file) {
  if (!is_elf(file)) {
    usage_error("{}: a multiboot kernel that is no ELF file must give its addresses in the header",
                loading.name);
  }
  const ElfImage elf = parse_elf(file, loading.name);
  const auto entry = elf.physical_entry();
  if (!entry || *entry >= layout::high_ram_base) {
    usage_error("{}: the entry point {:#x} lies in no segment of this ELF file", loading.name, elf.entry);
  }
  load_elf_segments(loading, elf);
  return {*entry, elf.lowest(), elf.highest()};
}

uint64_t place_string(Loading& loading, const std::string& text, const std::string& what) {
  const uint64_t gpa = loading.placement.allocate(text.size() + 1, 4, what);
  loading.placement.store(gpa, {reinterpret_cast<const uint8_t*>(text.c_str()), text.size() + 1}, what);
  return gpa;
}

// "path arguments": a file whose name contains blanks is tried first.
Mapping open_module(const std::string& line) {
  const size_t blank = line.find(' ');
  if (blank == std::string::npos) return Mapping::file(line, "--initrd");
  try {
    return Mapping::file(line, "--initrd");
  } catch (const UsageError&) {
    return Mapping::file(line.substr(0, blank), "--initrd");
  }
}

// Loads the modules and returns the address of their list.
uint64_t place_modules(Loading& loading) {
  Placement& placement = loading.placement;
  const auto& lines = loading.request.initrds;
  const uint64_t list = placement.allocate(lines.size() * 16, 4, "module list");
  for (size_t index = 0; index < lines.size(); ++index) {
    const Mapping file = open_module(lines[index]);
    const auto gpa = placement.allocate_high(align_up(file.size(), 4096), 4096, layout::low_ram_limit);
    if (!gpa) {
      usage_error("--initrd {}: the module does not fit beside the kernel into --memory {}M, give it more",
                  lines[index], placement.memory().size() >> 20);
    }
    placement.store(*gpa, file.bytes(), "the module");
    const std::array<uint32_t, 4> entry{
        static_cast<uint32_t>(*gpa), static_cast<uint32_t>(*gpa + file.size()),
        static_cast<uint32_t>(place_string(loading, lines[index], "the module's command line")), 0};
    placement.store(list + index * 16, {reinterpret_cast<const uint8_t*>(entry.data()), 16},
                    "the module list");
  }
  return list;
}

uint64_t place_memory_map(Loading& loading, const std::vector<E820Entry>& map) {
  const uint64_t gpa = loading.placement.allocate(map.size() * memory_map_entry, 4, "memory map");
  for (size_t index = 0; index < map.size(); ++index) {
    std::array<uint8_t, memory_map_entry> line{};
    put(line, 0, static_cast<uint32_t>(memory_map_entry - 4));  // the size does not count itself
    put(line, 4, map[index].address);
    put(line, 12, map[index].size);
    put(line, 20, map[index].type);
    loading.placement.store(gpa + index * memory_map_entry, line, "the memory map");
  }
  return gpa;
}

uint64_t place_info(Loading& loading) {
  const Request& request = loading.request;
  Placement& placement = loading.placement;
  const std::string line = request.append.empty() ? request.kernel : request.kernel + " " + request.append;
  if (line.size() > command_line_max) {
    usage_error("--append: the command line has {} characters, Lodge passes {} at most", line.size(),
                command_line_max);
  }
  const auto map = e820_map(placement.memory());
  std::array<uint8_t, info_size> info{};
  uint32_t flags = has_memory | has_command_line | has_memory_map | has_name;
  put(info, 4, uint32_t{639});  // KiB below 640 KiB
  put(info, 8, static_cast<uint32_t>((placement.low_end() - layout::MiB) / layout::KiB));
  put(info, 16, static_cast<uint32_t>(place_string(loading, line, "command line")));
  if (!request.initrds.empty()) {
    flags |= has_modules;
    put(info, 20, static_cast<uint32_t>(request.initrds.size()));
    put(info, 24, static_cast<uint32_t>(place_modules(loading)));
  }
  put(info, 44, static_cast<uint32_t>(map.size() * memory_map_entry));
  put(info, 48, static_cast<uint32_t>(place_memory_map(loading, map)));
  put(info, 64, static_cast<uint32_t>(place_string(loading, "Lodge", "boot loader name")));
  put(info, 0, flags);
  const uint64_t gpa = placement.allocate(info_size, 4, "multiboot information");
  placement.store(gpa, info, "the multiboot information");
  return gpa;
}

}  // namespace

bool is_multiboot(Bytes file) noexcept {
  return find_header(file).has_value();
}

BootState load_multiboot(Loading& loading, Bytes file) {
  const auto header = find_header(file);
  if (!header) usage_error("{}: no multiboot header", loading.name);
  const uint32_t unknown = header->flags & required_mask & ~(flag_page_aligned | flag_memory | flag_video);
  if (unknown != 0) {
    usage_error("{}: the multiboot header asks for features that do not exist ({:#x})", loading.name,
                unknown);
  }
  const bool by_addresses = (header->flags & flag_addresses) != 0;
  const Loaded kernel = by_addresses ? load_by_addresses(loading, *header, file) : load_by_elf(loading, file);
  BootState state = enter_protected(loading.placement, kernel.entry,
                                    by_addresses ? "multiboot, addresses from the header" : "multiboot ELF");
  state.regs.rax = entry_magic;
  state.regs.rbx = place_info(loading);
  state.kernel_begin = kernel.begin;
  state.kernel_end = kernel.end;
  return state;
}

}  // namespace lodge::machine::boot
