// The PVH direct boot protocol: ELF kernels with the note XEN_ELFNOTE_PHYS32_ENTRY, entered in flat protected
// mode with EBX = hvm_start_info, version 1 (with memory map). Document: Xen docs/misc/pvh.pandoc and
// xen/include/public/arch-x86/hvm/start_info.h (facts only: the layout of the structures).
#include "base/error.hpp"
#include "machine/boot/loaders.hpp"
#include "machine/layout.hpp"

namespace lodge::machine::boot {

namespace {

struct StartInfo {
  uint32_t magic = 0x336e'c578;
  uint32_t version = 1;
  uint32_t flags = 0;
  uint32_t module_count = 0;
  uint64_t modules = 0;
  uint64_t command_line = 0;
  uint64_t rsdp = 0;
  uint64_t memory_map = 0;
  uint32_t memory_map_count = 0;
  uint32_t reserved = 0;
};
static_assert(sizeof(StartInfo) == 56);

struct ModuleEntry {
  uint64_t address = 0;
  uint64_t size = 0;
  uint64_t command_line = 0;
  uint64_t reserved = 0;
};

struct MemoryMapEntry {
  uint64_t address = 0;
  uint64_t size = 0;
  uint32_t type = 0;  // the numbers of E820
  uint32_t reserved = 0;
};

constexpr uint64_t command_line_max = 2047;  // what Linux takes; the protocol has no bound of its own

template <class T>
Bytes bytes_of(const T& value) {
  return {reinterpret_cast<const uint8_t*>(&value), sizeof value};
}

}  // namespace

BootState load_pvh(Loading& loading, const ElfImage& elf) {
  Placement& placement = loading.placement;
  const uint64_t entry = *elf.pvh_entry;
  if (entry >= layout::low_ram_limit)
    usage_error("{}: the PVH entry {:#x} is outside RAM", loading.name, entry);
  load_elf_segments(loading, elf);

  StartInfo info;
  info.rsdp = loading.request.acpi_rsdp;
  info.command_line = place_command_line(loading, command_line_max);
  if (const Blob initrd = load_initrds(loading, layout::low_ram_limit); initrd.size != 0) {
    const ModuleEntry module{.address = initrd.gpa, .size = initrd.size};
    info.module_count = 1;
    info.modules = placement.allocate(sizeof module, 8, "module list");
    placement.store(info.modules, bytes_of(module), "the module list");
  }
  const auto map = e820_map(placement.memory());
  info.memory_map_count = static_cast<uint32_t>(map.size());
  info.memory_map = placement.allocate(map.size() * sizeof(MemoryMapEntry), 8, "memory map");
  for (size_t index = 0; index < map.size(); ++index) {
    const MemoryMapEntry line{
        .address = map[index].address, .size = map[index].size, .type = map[index].type};
    placement.store(info.memory_map + index * sizeof line, bytes_of(line), "the memory map");
  }
  const uint64_t info_at = placement.allocate(sizeof info, 8, "start information");
  placement.store(info_at, bytes_of(info), "the start information");

  BootState state = enter_protected(placement, entry, "ELF, PVH entry");
  state.regs.rbx = info_at;
  state.kernel_begin = elf.lowest();
  state.kernel_end = elf.highest();
  return state;
}

}  // namespace lodge::machine::boot
