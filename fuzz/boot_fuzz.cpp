// The kernel file loaders on hostile files. A loader may refuse (UsageError) or load; it must not crash,
// hang, leave its memory, or enter a kernel outside RAM.
#include <cstdlib>

#include "base/error.hpp"
#include "machine/boot/boot.hpp"
#include "machine/boot/test_kernels.hpp"

namespace {

using namespace lodge;
using namespace lodge::machine;
using boot::test_kernels::Data;

constexpr uint64_t MiB = 1 << 20;

// Whole kernels to start from: the fuzzer would need long to find a checksum or a packed payload by itself.
const std::vector<Data>& templates() {
  using namespace boot::test_kernels;
  static const std::vector<Data> all = [] {
    const Data kernel64 =
        elf64({.paddr = 16 * MiB, .vaddr = 0xffffffff81000000, .entry = 16 * MiB, .pvh_entry = 16 * MiB});
    const Data kernel32 = elf32({.paddr = 16 * MiB, .entry = 16 * MiB, .multiboot_flags = 3});
    std::vector<Data> result{kernel64, kernel32};
    for (const char* format : {"gzip", "xz", "lzma", "lz4", "zstd"})
      result.push_back(bzimage({.payload = pack(format, kernel64)}));
    result.push_back(bzimage({.payload = pack("gzip", kernel32), .xloadflags = 0}));
    return result;
  }();
  return all;
}

// The first byte chooses: the rest as a file, or a template with three-byte patches (offset, value).
Data make_file(const uint8_t* data, size_t size) {
  const size_t choice = data[0] % (templates().size() + 1);
  if (choice == templates().size()) return {data + 1, data + size};
  Data file = templates()[choice];
  for (size_t at = 1; at + 3 <= size; at += 3) {
    const size_t offset = data[at] | static_cast<size_t>(data[at + 1]) << 8;
    file[offset % file.size()] = data[at + 2];
  }
  return file;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  static GuestMemory memory(48 * MiB);
  try {
    const boot::BootState state = boot::load_bytes(
        make_file(data, size), {.kernel = "fuzz", .append = "a=b", .acpi_rsdp = 0xe0000}, memory);
    if (memory.view(state.gdt_base, state.gdt_limit + 1u).empty()) std::abort();
    if (state.mode == boot::BootState::Mode::long64 && memory.view(state.cr3, 6 * 4096).empty()) std::abort();
  } catch (const UsageError&) {
  }
  return 0;
}
