// ELF executables as boot loaders need them: segments, entry and the PVH note.
#pragma once

#include <string>
#include <vector>

#include "machine/boot/bytes.hpp"

namespace lodge::machine::boot {

struct ElfSegment {
  uint64_t paddr;
  uint64_t vaddr;
  uint64_t memory_size;  // >= data.size(); the rest is zero
  Bytes data;            // inside the file
};

struct ElfImage {
  bool is64;
  uint64_t entry;                     // as the header says: physical or virtual
  std::vector<ElfSegment> segments;   // PT_LOAD with a size, in file order; never empty
  std::optional<uint64_t> pvh_entry;  // XEN_ELFNOTE_PHYS32_ENTRY
  bool is_program = false;  // has an interpreter or thread-local storage: made for an operating system

  // The entry as a physical address: kernels give it either way. Nothing when it lies in no segment.
  std::optional<uint64_t> physical_entry() const noexcept;
  uint64_t lowest() const noexcept;   // first physical byte of all segments
  uint64_t highest() const noexcept;  // end, exclusive
};

bool is_elf(Bytes file) noexcept;

// Parses an x86 executable, 32 or 64 bits. `name` ("--kernel vmlinux") begins the messages. Throws UsageError
// when the file is truncated, no executable, or for another processor.
ElfImage parse_elf(Bytes file, const std::string& name);

}  // namespace lodge::machine::boot
