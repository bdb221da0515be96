// The ELF reader. Follows the System V ABI (gABI chapter 4 and 5) for executables of EM_386 and EM_X86_64;
// everything that a loader of static kernels does not need (relocation, dynamic linking, sections) is
// ignored.
#include "machine/boot/elf.hpp"

#include <elf.h>

#include <algorithm>
#include <cstring>

#include "base/error.hpp"

namespace lodge::machine::boot {

namespace {

constexpr unsigned max_program_headers = 128;    // kernels have about 5
constexpr uint32_t xen_phys32_entry = 18;        // XEN_ELFNOTE_PHYS32_ENTRY
constexpr uint64_t physical_limit = 1ull << 52;  // the architecture's largest physical address

// Notes: {name size, descriptor size, type} and the two byte strings, each padded to four bytes. Some linkers
// align PT_NOTE to eight and pad accordingly; Xen's notes are four-byte aligned in every kernel.
std::optional<uint64_t> find_pvh_note(Bytes notes) noexcept {
  uint64_t at = 0;
  while (const auto header = get<Elf64_Nhdr>(notes, at)) {  // the 32-bit header is the same
    const uint64_t name_at = at + sizeof *header;
    const uint64_t value_at = name_at + align_up(header->n_namesz, 4);
    const auto name = slice(notes, name_at, header->n_namesz);
    if (!name || !slice(notes, value_at, header->n_descsz)) return std::nullopt;
    if (header->n_type == xen_phys32_entry && name->size() == 4 && std::memcmp(name->data(), "Xen", 4) == 0) {
      if (header->n_descsz == 8) return get<uint64_t>(notes, value_at);
      if (header->n_descsz == 4) return get<uint32_t>(notes, value_at);
    }
    at = value_at + align_up(header->n_descsz, 4);
  }
  return std::nullopt;
}

// Reads what both classes share, through the struct types of either.
template <class Header, class Program>
ElfImage parse(Bytes file, const std::string& name, bool is64) {
  const auto header = get<Header>(file, 0);
  if (!header) usage_error("{}: the ELF header is truncated", name);
  if (header->e_type != ET_EXEC && header->e_type != ET_DYN) {
    usage_error("{}: this ELF file is not an executable (type {}): give a linked kernel", name,
                header->e_type);
  }
  if (header->e_machine != EM_X86_64 && header->e_machine != EM_386) {
    usage_error("{}: this ELF file is for another processor (machine {}), Lodge runs x86 guests", name,
                header->e_machine);
  }
  if (header->e_phentsize != sizeof(Program) || header->e_phnum == 0 ||
      header->e_phnum > max_program_headers) {
    usage_error("{}: this ELF file has no usable program headers", name);
  }
  ElfImage image{.is64 = is64, .entry = header->e_entry};
  for (unsigned index = 0; index < header->e_phnum; ++index) {
    const auto at = static_cast<uint64_t>(header->e_phoff);
    const auto program = at > file.size()
                             ? std::nullopt
                             : get<Program>(file, at + static_cast<uint64_t>(index) * sizeof(Program));
    if (!program) usage_error("{}: the ELF program headers are truncated", name);
    const auto data = slice(file, program->p_offset, program->p_filesz);
    if (program->p_type == PT_NOTE && data && !image.pvh_entry) image.pvh_entry = find_pvh_note(*data);
    if (program->p_type == PT_INTERP || program->p_type == PT_TLS) image.is_program = true;
    if (program->p_type != PT_LOAD || program->p_memsz == 0) continue;
    if (!data) usage_error("{}: the file is truncated (ELF segment {} is not all there)", name, index);
    if (program->p_memsz < program->p_filesz || program->p_paddr >= physical_limit ||
        program->p_memsz >= physical_limit) {
      usage_error("{}: ELF segment {} has impossible sizes", name, index);
    }
    image.segments.push_back({program->p_paddr, program->p_vaddr, program->p_memsz, *data});
  }
  if (image.segments.empty()) usage_error("{}: this ELF file has nothing to load", name);
  return image;
}

}  // namespace

std::optional<uint64_t> ElfImage::physical_entry() const noexcept {
  for (const ElfSegment& segment : segments) {
    if (entry - segment.paddr < segment.memory_size) return entry;
  }
  for (const ElfSegment& segment : segments) {
    if (entry - segment.vaddr < segment.memory_size) return entry - segment.vaddr + segment.paddr;
  }
  return std::nullopt;
}

uint64_t ElfImage::lowest() const noexcept {
  uint64_t result = physical_limit;
  for (const ElfSegment& segment : segments) result = std::min(result, segment.paddr);
  return result;
}

uint64_t ElfImage::highest() const noexcept {
  uint64_t result = 0;
  for (const ElfSegment& segment : segments) result = std::max(result, segment.paddr + segment.memory_size);
  return result;
}

bool is_elf(Bytes file) noexcept {
  return file.size() >= EI_NIDENT && std::memcmp(file.data(), ELFMAG, SELFMAG) == 0;
}

ElfImage parse_elf(Bytes file, const std::string& name) {
  if (!is_elf(file)) usage_error("{}: not an ELF file", name);
  if (file[EI_DATA] != ELFDATA2LSB) usage_error("{}: this ELF file is big-endian, x86 is not", name);
  if (file[EI_CLASS] == ELFCLASS64) return parse<Elf64_Ehdr, Elf64_Phdr>(file, name, true);
  if (file[EI_CLASS] == ELFCLASS32) return parse<Elf32_Ehdr, Elf32_Phdr>(file, name, false);
  usage_error("{}: this ELF file is neither 32-bit nor 64-bit", name);
}

}  // namespace lodge::machine::boot
