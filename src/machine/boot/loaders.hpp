// What the loaders of the different protocols share. Private to this folder.
#pragma once

#include <string>
#include <vector>

#include "machine/boot/boot.hpp"
#include "machine/boot/bzimage.hpp"
#include "machine/boot/elf.hpp"
#include "machine/boot/placement.hpp"

namespace lodge::machine::boot {

struct Loading {
  Loading(const Request& r, GuestMemory& memory)
      : request(r), placement(memory), name("--kernel " + r.kernel) {}
  const Request& request;
  Placement placement;
  std::string name;  // begins messages about the kernel file
};

struct Blob {
  uint64_t gpa = 0;
  uint64_t size = 0;
};

// Throws UsageError when kernel bytes at [gpa, gpa + size) would overwrite the machine's ACPI and SMBIOS
// tables.
void refuse_over_tables(const Loading& loading, uint64_t gpa, uint64_t size);
// Checks that all segments lie in RAM and off the tables, and takes their ranges. Throws UsageError naming
// what is wrong.
void take_elf_segments(Loading& loading, const ElfImage& elf);
// The same, and copies them.
void load_elf_segments(Loading& loading, const ElfImage& elf);
// All --initrd files as one, each padded to four bytes as an initramfs asks; {0, 0} without. Ends below
// `limit`.
Blob load_initrds(Loading& loading, uint64_t limit);
// A zero-terminated string among the low structures. `limit` is the longest the kernel takes.
uint64_t place_command_line(Loading& loading, uint64_t limit);
// Throws the UsageError for a kernel that needs RAM up to `end`.
[[noreturn]] void memory_too_small(const Loading& loading, uint64_t end);

// linux.cpp
BootState load_bzimage(Loading& loading, Bytes file);
BootState load_plain_elf(Loading& loading, const ElfImage& elf);
// pvh.cpp
BootState load_pvh(Loading& loading, const ElfImage& elf);
// multiboot.cpp
bool is_multiboot(Bytes file) noexcept;
BootState load_multiboot(Loading& loading, Bytes file);

}  // namespace lodge::machine::boot
