#include "machine/boot/boot.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <random>

#include "base/error.hpp"
#include "machine/boot/bzimage.hpp"
#include "machine/boot/elf.hpp"
#include "machine/boot/test_kernels.hpp"
#include "machine/boot/unpack.hpp"
#include "machine/layout.hpp"

namespace lodge::machine::boot {
namespace {

using namespace test_kernels;

constexpr uint64_t MiB = layout::MiB;

template <class T>
T peek(GuestMemory& memory, uint64_t gpa) {
  T value{};
  EXPECT_TRUE(memory.read(gpa, {reinterpret_cast<uint8_t*>(&value), sizeof value})) << std::hex << gpa;
  return value;
}

std::string peek_string(GuestMemory& memory, uint64_t gpa) {
  std::string text;
  while (const char c = peek<char>(memory, gpa + text.size())) text += c;
  return text;
}

std::string usage_message(const std::function<void()>& action) {
  try {
    action();
  } catch (const UsageError& error) {
    return error.what();
  }
  return "no UsageError";
}

// --- unpacking
// ---------------------------------------------------------------------------------------------------

class Unpack : public testing::TestWithParam<const char*> {};

TEST_P(Unpack, RestoresThePayload) {
  const Data original = sample(300'000);
  const Data packed = pack(GetParam(), original);
  EXPECT_EQ(payload_format(packed), GetParam());
  const auto unpacked = unpack(packed, MiB);
  ASSERT_TRUE(unpacked);
  EXPECT_TRUE(std::ranges::equal(unpacked->bytes(), original));
}

TEST_P(Unpack, RefusesAPromiseAboveTheLimit) {
  EXPECT_FALSE(unpack(pack(GetParam(), sample(300'000)), 299'999));
}

TEST_P(Unpack, RefusesAStreamLongerThanItsPromise) {
  Data packed = pack(GetParam(), sample(300'000));
  put<uint32_t>(packed, packed.size() - 4, 1000);
  EXPECT_FALSE(unpack(packed, MiB));
}

TEST_P(Unpack, RefusesATruncatedStream) {
  Data packed = pack(GetParam(), sample(300'000));
  packed.erase(packed.end() - 1000, packed.end() - 4);
  EXPECT_FALSE(unpack(packed, MiB));
}

INSTANTIATE_TEST_SUITE_P(Formats, Unpack, testing::Values("gzip", "xz", "lzma", "lz4", "zstd"));

TEST(UnpackTest, LeavesUnknownFormatsAlone) {
  Data bzip2 = sample(100);
  std::copy_n("BZh9", 4, bzip2.begin());
  EXPECT_EQ(payload_format(bzip2), "");
  EXPECT_FALSE(unpack(bzip2, MiB));
  EXPECT_FALSE(unpack({}, MiB));
}

// --- bzImage
// -----------------------------------------------------------------------------------------------------

TEST(BzImageTest, UnpacksA64BitKernelToItsLinkAddress) {
  GuestMemory memory(64 * MiB);
  const Data elf = elf64({.paddr = 16 * MiB, .vaddr = 0xffffffff81000000, .entry = 16 * MiB + 0x40});
  const BootState state = load_bytes(bzimage({.payload = pack("lz4", elf)}), {.kernel = "k"}, memory);
  EXPECT_EQ(state.mode, BootState::Mode::long64);
  EXPECT_EQ(state.regs.rip, 16 * MiB + 0x40);
  EXPECT_THAT(state.protocol, testing::HasSubstr("lz4 payload unpacked, 64-bit entry"));
  EXPECT_EQ(peek<uint8_t>(memory, 16 * MiB + 0x40), segment_byte(0x40));
}

// The file goes through guest memory: a segment that is not where Linux's linker puts it moves, also over
// itself.
TEST(BzImageTest, ASegmentMovesToItsPlaceFromWhereverItLiesInTheFile) {
  for (const uint64_t size : {uint64_t{0x1000}, 3 * MiB}) {
    GuestMemory memory(64 * MiB);
    const Data elf =
        elf64({.paddr = 16 * MiB, .entry = 16 * MiB, .file_size = size, .memory_size = size + 16});
    load_bytes(bzimage({.payload = pack("lz4", elf), .init_size = 8 * MiB}), {.kernel = "k"}, memory);
    for (uint64_t at = 0; at < size; at += 0x333)
      ASSERT_EQ(peek<uint8_t>(memory, 16 * MiB + at), segment_byte(at)) << at;
    EXPECT_EQ(peek<uint8_t>(memory, 16 * MiB + size + 15), 0);
  }
}

TEST(BzImageTest, ClearsTheKernelsBss) {
  GuestMemory memory(64 * MiB);
  std::ranges::fill(memory.view(16 * MiB, 8 * MiB), 0xaa);
  const Data elf = elf64({.paddr = 16 * MiB, .entry = 16 * MiB, .file_size = 4096, .memory_size = 8192});
  load_bytes(bzimage({.payload = pack("gzip", elf)}), {.kernel = "k"}, memory);
  EXPECT_EQ(peek<uint8_t>(memory, 16 * MiB + 4096), 0);
  EXPECT_EQ(peek<uint8_t>(memory, 16 * MiB + 8191), 0);
  EXPECT_EQ(peek<uint8_t>(memory, 16 * MiB + 8192), 0xaa);
}

TEST(BzImageTest, FillsTheZeroPage) {
  GuestMemory memory(3 * layout::GiB);
  const Data elf = elf64({.paddr = 16 * MiB, .entry = 16 * MiB});
  const BootState state =
      load_bytes(bzimage({.payload = pack("zstd", elf)}),
                 {.kernel = "k", .append = "console=ttyS0", .acpi_rsdp = 0xe0000}, memory);
  const uint64_t params = state.regs.rsi;
  EXPECT_EQ(params % 4096, 0u);
  EXPECT_EQ(peek<uint64_t>(memory, params + 0x70), 0xe0000u);
  EXPECT_EQ(peek<uint32_t>(memory, params + 0x202), 0x53726448u);
  EXPECT_EQ(peek<uint16_t>(memory, params + 0x206), 0x20fu);
  EXPECT_EQ(peek<uint8_t>(memory, params + 0x210), 0xffu);
  EXPECT_EQ(peek<uint8_t>(memory, params + 0x1ef), 0u) << "sentinel";
  EXPECT_EQ(peek_string(memory, peek<uint32_t>(memory, params + 0x228)), "console=ttyS0");
  EXPECT_EQ(peek<uint32_t>(memory, params + 0x21c), 0u) << "no initrd";
  // The map: ascending, below and above the hole, with the ECAM window reserved.
  const unsigned count = peek<uint8_t>(memory, params + 0x1e8);
  uint64_t ram = 0, previous_end = 0;
  bool ecam = false;
  for (unsigned index = 0; index < count; ++index) {
    const auto entry = params + 0x2d0 + index * 20;
    const auto address = peek<uint64_t>(memory, entry), size = peek<uint64_t>(memory, entry + 8);
    const auto type = peek<uint32_t>(memory, entry + 16);
    EXPECT_GE(address, previous_end);
    previous_end = address + size;
    if (type == e820_ram) ram += size;
    ecam |= type == e820_reserved && address == layout::ecam_base && size == layout::ecam_size;
  }
  EXPECT_EQ(ram, 3 * layout::GiB - (MiB - 0x9fc00));
  EXPECT_TRUE(ecam);
  EXPECT_EQ(previous_end, 5 * layout::GiB);
}

TEST(BzImageTest, PlacesTheInitrdAboveTheKernelAndBelowItsLimit) {
  GuestMemory memory(128 * MiB);
  const TemporaryFile first(sample(5001)), second(sample(77));
  const Data elf = elf64({.paddr = 16 * MiB, .entry = 16 * MiB});
  const BootState state = load_bytes(bzimage({.payload = pack("gzip", elf), .initrd_max = 100 * MiB - 1}),
                                     {.kernel = "k", .initrds = {first.path, second.path}}, memory);
  const auto initrd = peek<uint32_t>(memory, state.regs.rsi + 0x218);
  EXPECT_EQ(peek<uint32_t>(memory, state.regs.rsi + 0x21c), 5004u + 77u) << "joined, padded to four bytes";
  EXPECT_EQ(initrd, 100 * MiB - 8192);
  EXPECT_EQ(peek<uint8_t>(memory, initrd + 5000), sample(5001)[5000]);
  EXPECT_EQ(peek<uint8_t>(memory, initrd + 5003), 0);
  EXPECT_EQ(peek<uint8_t>(memory, initrd + 5004), sample(77)[0]);
}

TEST(BzImageTest, LetsTheKernelUnpackItselfWhenLodgeCannot) {
  GuestMemory memory(64 * MiB);
  Data payload = sample(1000);
  std::copy_n("BZh9", 4, payload.begin());
  const BootState state = load_bytes(bzimage({.payload = payload}), {.kernel = "k"}, memory);
  EXPECT_EQ(state.mode, BootState::Mode::long64);
  EXPECT_EQ(state.regs.rip, 16 * MiB + 0x200);
  EXPECT_THAT(state.protocol, testing::HasSubstr("unpacking itself, 64-bit entry"));
  EXPECT_EQ(peek<uint8_t>(memory, 16 * MiB + 0x200), stub_byte(0x200));
  EXPECT_EQ(peek<uint32_t>(memory, state.regs.rsi + 0x214), 16 * MiB) << "code32_start";
}

TEST(BzImageTest, Enters32BitImagesInProtectedMode) {
  GuestMemory memory(64 * MiB);
  const BootState state =
      load_bytes(bzimage({.xloadflags = 0, .relocatable = 0, .preferred = MiB, .init_size = 4 * MiB}),
                 {.kernel = "k"}, memory);
  EXPECT_EQ(state.mode, BootState::Mode::protected32);
  EXPECT_EQ(state.regs.rip, MiB);
  EXPECT_EQ(peek<uint32_t>(memory, state.regs.rsi + 0x202), 0x53726448u);
}

TEST(BzImageTest, Unpacks32BitKernels) {
  GuestMemory memory(64 * MiB);
  const Data elf = elf32({.paddr = 16 * MiB, .vaddr = 0xc1000000, .entry = 16 * MiB});
  const BootState state =
      load_bytes(bzimage({.payload = pack("xz", elf), .xloadflags = 0}), {.kernel = "k"}, memory);
  EXPECT_EQ(state.mode, BootState::Mode::protected32);
  EXPECT_EQ(state.regs.rip, 16 * MiB);
  EXPECT_EQ(peek<uint8_t>(memory, 16 * MiB + 5), segment_byte(5));
}

TEST(BzImageTest, NamesMemoryThatIsTooSmall) {
  GuestMemory memory(8 * MiB);
  const std::string message = usage_message([&] { load_bytes(bzimage({}), {.kernel = "vmlinuz"}, memory); });
  EXPECT_EQ(message, "--memory 8M is too small for vmlinuz, which needs at least 48M");
}

TEST(BzImageTest, NamesAnInitrdLargerThanMemory) {
  GuestMemory memory(64 * MiB);
  const TemporaryFile initrd(Data(60 * MiB));
  const std::string message =
      usage_message([&] { load_bytes(bzimage({}), {.kernel = "k", .initrds = {initrd.path}}, memory); });
  EXPECT_EQ(message,
            "--initrd: 60M of initial RAM disk do not fit beside the kernel into --memory 64M, give it more");
}

TEST(BzImageTest, NamesACommandLineThatIsTooLong) {
  GuestMemory memory(64 * MiB);
  const Data image = bzimage({});
  EXPECT_NO_THROW(load_bytes(image, {.kernel = "k", .append = std::string(2047, 'x')}, memory));
  const std::string message =
      usage_message([&] { load_bytes(image, {.kernel = "k", .append = std::string(2048, 'x')}, memory); });
  EXPECT_EQ(message, "--append: the command line has 2048 characters, this kernel takes 2047 at most");
}

TEST(BzImageTest, NamesATruncatedFileAtEveryLength) {
  GuestMemory memory(64 * MiB);
  const Data image = bzimage({.payload = pack("gzip", elf64({.paddr = 16 * MiB, .entry = 16 * MiB}))});
  for (size_t size = 0; size + 32 < image.size(); size = size < 2000 ? size + 1 : size + 97) {
    const std::string message =
        usage_message([&] { load_bytes(Bytes(image).first(size), {.kernel = "k"}, memory); });
    EXPECT_THAT(message, testing::StartsWith("--kernel k: ")) << size;
  }
}

TEST(BzImageTest, RefusesOldProtocols) {
  GuestMemory memory(64 * MiB);
  Data image = bzimage({});
  put<uint16_t>(image, 0x206, 0x205);
  EXPECT_THAT(usage_message([&] { load_bytes(image, {.kernel = "k"}, memory); }),
              testing::HasSubstr("boot protocol 2.05 is too old"));
}

// --- the entry
// ---------------------------------------------------------------------------------------------------

TEST(EntryTest, LongModeMapsTheFirst4GiBOneToOne) {
  GuestMemory memory(64 * MiB);
  const BootState state = load_bytes(bzimage({}), {.kernel = "k"}, memory);
  const auto pml4 = peek<uint64_t>(memory, state.cr3);
  EXPECT_EQ(pml4 & 0xfff, 3u);
  for (uint64_t gib = 0; gib < 4; ++gib) {
    const auto pdpt = peek<uint64_t>(memory, (pml4 & ~0xfffull) + 8 * gib);
    EXPECT_EQ(pdpt & 0xfff, 3u);
    for (const uint64_t index : {0, 1, 511}) {
      EXPECT_EQ(peek<uint64_t>(memory, (pdpt & ~0xfffull) + 8 * index), (gib << 30 | index << 21) | 0x83);
    }
  }
}

TEST(EntryTest, SegmentsMatchTheDescriptorTable) {
  GuestMemory memory(64 * MiB);
  for (const uint16_t xloadflags : {0, 1}) {
    const BootState state = load_bytes(bzimage({.xloadflags = xloadflags}), {.kernel = "k"}, memory);
    kvm_sregs sregs{};
    sregs.apic_base = 0xfee00900;
    state.apply(sregs);
    EXPECT_EQ(sregs.apic_base, 0xfee00900u) << "kept";
    for (const kvm_segment& segment : {sregs.cs, sregs.ds, sregs.ss, sregs.tr}) {
      ASSERT_LE(segment.selector + 7u, state.gdt_limit);
      const auto descriptor = peek<uint64_t>(memory, state.gdt_base + segment.selector);
      EXPECT_EQ(descriptor >> 40 & 0xf, segment.type);
      EXPECT_EQ(descriptor >> 53 & 1, segment.l);
      EXPECT_EQ(descriptor >> 54 & 1, segment.db);
      const uint64_t limit = (descriptor & 0xffff) | (descriptor >> 32 & 0xf0000);
      EXPECT_EQ(segment.g != 0 ? limit << 12 | 0xfff : limit, segment.limit);
    }
    EXPECT_EQ(sregs.cr0 >> 31 & 1, xloadflags);
    EXPECT_EQ(sregs.efer, xloadflags == 1 ? 0x500u : 0u);
    EXPECT_EQ(state.regs.rflags, 2u) << "interrupts off";
  }
}

// --- ELF and PVH
// -------------------------------------------------------------------------------------------------

TEST(ElfTest, EntersPlainElf64InLongMode) {
  GuestMemory memory(16 * MiB);
  const BootState state =
      load_bytes(elf64({.paddr = 0x8000, .vaddr = 0x8000, .entry = 0x8010}), {.kernel = "k"}, memory);
  EXPECT_EQ(state.mode, BootState::Mode::long64);
  EXPECT_EQ(state.regs.rip, 0x8010u);
  EXPECT_EQ(peek<uint8_t>(memory, 0x8010), segment_byte(0x10));
  EXPECT_EQ(peek<uint32_t>(memory, state.regs.rsi + 0x202), 0x53726448u);
}

TEST(ElfTest, TranslatesAVirtualEntry) {
  GuestMemory memory(16 * MiB);
  const BootState state =
      load_bytes(elf64({.paddr = MiB, .vaddr = 0xffffffff80100000, .entry = 0xffffffff80100020}),
                 {.kernel = "k"}, memory);
  EXPECT_EQ(state.regs.rip, MiB + 0x20);
}

TEST(ElfTest, KeepsBootDataClearOfSegments) {
  GuestMemory memory(16 * MiB);
  const uint64_t begin = 0x1000, size = 0x9e000;  // nearly all conventional memory
  const BootState state = load_bytes(
      elf64({.paddr = begin, .vaddr = begin, .entry = begin, .file_size = size, .memory_size = size}),
      {.kernel = "k", .append = "x"}, memory);
  for (const uint64_t at : {state.cr3, state.gdt_base, uint64_t{state.regs.rsi}}) {
    EXPECT_TRUE(at < begin || at >= begin + size) << std::hex << at;
  }
  for (uint64_t at = 0; at < size; at += 509) ASSERT_EQ(peek<uint8_t>(memory, begin + at), segment_byte(at));
}

TEST(ElfTest, NamesASegmentOutsideMemory) {
  GuestMemory memory(16 * MiB);
  EXPECT_EQ(usage_message([&] {
              load_bytes(elf64({.paddr = 20 * MiB, .vaddr = 20 * MiB, .entry = 20 * MiB}), {.kernel = "big"},
                         memory);
            }),
            "--memory 16M is too small for big, which needs at least 21M");
  EXPECT_THAT(usage_message([&] {
                load_bytes(elf64({.paddr = layout::ecam_base, .entry = layout::ecam_base}), {.kernel = "k"},
                           memory);
              }),
              testing::HasSubstr("where this machine has no RAM"));
}

TEST(ElfTest, RefusesAKernelOverTheMachinesTables) {
  GuestMemory memory(16 * MiB);
  const auto message = [&](uint64_t begin, uint64_t size) {
    return usage_message([&] {
      load_bytes(elf64({.paddr = begin, .vaddr = begin, .entry = begin, .file_size = size}), {.kernel = "k"},
                 memory);
    });
  };
  EXPECT_EQ(message(0xdf000, 0x1001),
            "--kernel k: this kernel belongs at 0xdf000 to 0xe0000, over the machine's tables at 0xe0000 to "
            "0xfffff");
  EXPECT_THAT(message(0xfffff, 2), testing::HasSubstr("over the machine's tables"));
  EXPECT_THAT(message(0xd0000, 0x40000), testing::HasSubstr("over the machine's tables"));
  EXPECT_EQ(message(0xdf000, 0x1000), "no UsageError") << "ends where they begin";
  EXPECT_EQ(message(0x100000, 0x1000), "no UsageError") << "begins where they end";
}

TEST(ElfTest, RefusesForeignAndDamagedFiles) {
  GuestMemory memory(16 * MiB);
  const auto message = [&](Data file) {
    return usage_message([&] { load_bytes(file, {.kernel = "k"}, memory); });
  };
  Data arm = elf64({.paddr = MiB, .entry = MiB});
  put<uint16_t>(arm, 18, 183);
  EXPECT_THAT(message(arm), testing::HasSubstr("another processor"));
  Data object = elf64({.paddr = MiB, .entry = MiB});
  put<uint16_t>(object, 16, 1);
  EXPECT_THAT(message(object), testing::HasSubstr("not an executable"));
  Data cut = elf64({.paddr = MiB, .entry = MiB});
  cut.resize(cut.size() - 1);
  EXPECT_THAT(message(cut), testing::HasSubstr("truncated"));
  Data lost = elf64({.paddr = MiB, .vaddr = MiB, .entry = 9 * MiB});
  EXPECT_THAT(message(lost), testing::HasSubstr("entry point"));
  EXPECT_THAT(message(sample(5000)), testing::HasSubstr("not a kernel Lodge knows"));
}

TEST(ElfTest, RefusesProgramsOfAnOperatingSystem) {
  GuestMemory memory(64 * MiB);
  EXPECT_EQ(usage_message([&] { load({.kernel = "/proc/self/exe"}, memory); }),
            "--kernel /proc/self/exe: this is a program for an operating system, give a kernel");
}

TEST(PvhTest, PassesStartInformation) {
  GuestMemory memory(64 * MiB);
  const TemporaryFile initrd(sample(1000));
  const BootState state =
      load_bytes(elf64({.paddr = 16 * MiB, .entry = 16 * MiB, .pvh_entry = 16 * MiB + 0x80}),
                 {.kernel = "k", .initrds = {initrd.path}, .append = "quiet", .acpi_rsdp = 0xe0000}, memory);
  EXPECT_EQ(state.mode, BootState::Mode::protected32);
  EXPECT_EQ(state.regs.rip, 16 * MiB + 0x80);
  const uint64_t info = state.regs.rbx;
  EXPECT_EQ(peek<uint32_t>(memory, info), 0x336ec578u);
  EXPECT_EQ(peek<uint32_t>(memory, info + 4), 1u);
  EXPECT_EQ(peek<uint32_t>(memory, info + 12), 1u) << "modules";
  const auto module = peek<uint64_t>(memory, info + 16);
  EXPECT_EQ(peek<uint64_t>(memory, module + 8), 1000u);
  EXPECT_EQ(peek<uint8_t>(memory, peek<uint64_t>(memory, module) + 999), sample(1000)[999]);
  EXPECT_EQ(peek_string(memory, peek<uint64_t>(memory, info + 24)), "quiet");
  EXPECT_EQ(peek<uint64_t>(memory, info + 32), 0xe0000u);
  const auto map = peek<uint64_t>(memory, info + 40);
  EXPECT_EQ(peek<uint32_t>(memory, info + 48), e820_map(memory).size());
  EXPECT_EQ(peek<uint64_t>(memory, map), 0u);
  EXPECT_EQ(peek<uint32_t>(memory, map + 16), e820_ram);
}

// --- multiboot
// ---------------------------------------------------------------------------------------------------

TEST(MultibootTest, LoadsElf32WithModulesAndCommandLine) {
  GuestMemory memory(64 * MiB);
  const TemporaryFile module(sample(4097));
  const BootState state =
      load_bytes(elf32({.paddr = MiB, .entry = MiB + 0x20, .multiboot_flags = 3}),
                 {.kernel = "unit.flat", .initrds = {module.path + " a=1"}, .append = "x y"}, memory);
  EXPECT_EQ(state.mode, BootState::Mode::protected32);
  EXPECT_EQ(state.regs.rip, MiB + 0x20);
  EXPECT_EQ(state.regs.rax, 0x2badb002u);
  const uint64_t info = state.regs.rbx;
  EXPECT_EQ(peek<uint32_t>(memory, info), 0x24du);
  EXPECT_EQ(peek<uint32_t>(memory, info + 4), 639u);
  EXPECT_EQ(peek<uint32_t>(memory, info + 8), 63u * 1024);
  EXPECT_EQ(peek_string(memory, peek<uint32_t>(memory, info + 16)), "unit.flat x y");
  EXPECT_EQ(peek<uint32_t>(memory, info + 20), 1u);
  const auto list = peek<uint32_t>(memory, info + 24);
  const auto begin = peek<uint32_t>(memory, list), end = peek<uint32_t>(memory, list + 4);
  EXPECT_EQ(begin % 4096, 0u);
  EXPECT_EQ(end - begin, 4097u);
  EXPECT_EQ(peek<uint8_t>(memory, begin + 4096), sample(4097)[4096]);
  EXPECT_EQ(peek_string(memory, peek<uint32_t>(memory, list + 8)), module.path + " a=1");
  EXPECT_EQ(peek_string(memory, peek<uint32_t>(memory, info + 64)), "Lodge");
  const auto map = peek<uint32_t>(memory, info + 48), map_size = peek<uint32_t>(memory, info + 44);
  EXPECT_EQ(map_size, 24 * e820_map(memory).size());
  EXPECT_EQ(peek<uint32_t>(memory, map), 20u);
  EXPECT_EQ(peek<uint64_t>(memory, map + 12), 0x9fc00u);
}

TEST(MultibootTest, KeepsInformationClearOfSegmentsBelow1MiB) {
  GuestMemory memory(64 * MiB);
  const uint64_t begin = 0x2000, size = 0x60000;
  const BootState state = load_bytes(
      elf32({.paddr = begin, .entry = begin, .file_size = size, .memory_size = size, .multiboot_flags = 0}),
      {.kernel = "k"}, memory);
  for (uint64_t at = 256; at < size; at += 509)
    ASSERT_EQ(peek<uint8_t>(memory, begin + at), segment_byte(at));
  EXPECT_TRUE(state.regs.rbx < begin || state.regs.rbx >= begin + size);
}

TEST(MultibootTest, LoadsByTheAddressesInTheHeader) {
  GuestMemory memory(16 * MiB);
  Data file = sample(3000);
  const uint32_t flags = 0x10000;
  const std::array<uint32_t, 8> header{0x1badb002,    flags, 0u - 0x1badb002 - flags, 0x100040,
                                       0x100000 + 16, 0,     0x100000 + 8000,         0x100100};
  std::memcpy(file.data() + 0x40, header.data(), sizeof header);  // the file begins 0x40 before the header
  std::ranges::fill(memory.view(MiB, 16384), 0xaa);
  const BootState state = load_bytes(file, {.kernel = "k"}, memory);
  EXPECT_EQ(state.regs.rip, 0x100100u);
  EXPECT_EQ(peek<uint8_t>(memory, 0x100000 + 16), file[16]);
  EXPECT_EQ(peek<uint8_t>(memory, 0x100000 + 2999), file[2999]);
  EXPECT_EQ(peek<uint8_t>(memory, 0x100000 + 3000), 0);
  EXPECT_EQ(peek<uint8_t>(memory, 0x100000 + 7999), 0);
  EXPECT_EQ(peek<uint8_t>(memory, 0x100000 + 8000), 0xaa);
}

TEST(MultibootTest, RefusesUnknownRequiredFeaturesAndImpossibleAddresses) {
  GuestMemory memory(16 * MiB);
  EXPECT_THAT(usage_message([&] {
                load_bytes(elf32({.paddr = MiB, .entry = MiB, .multiboot_flags = 0x8000}), {.kernel = "k"},
                           memory);
              }),
              testing::HasSubstr("features that do not exist"));
  Data file = sample(3000);
  const uint32_t flags = 0x10000;
  const std::array<uint32_t, 8> header{0x1badb002, flags,   0u - 0x1badb002 - flags, 0x100040, 0x200000, 0,
                                       0,          0x100100};
  std::memcpy(file.data(), header.data(), sizeof header);
  EXPECT_THAT(usage_message([&] { load_bytes(file, {.kernel = "k"}, memory); }),
              testing::HasSubstr("impossible addresses"));
}

TEST(MultibootTest, RefusesAKernelOverTheMachinesTables) {
  GuestMemory memory(16 * MiB);
  Data file = sample(3000);
  const uint32_t flags = 0x10000;
  const std::array<uint32_t, 8> header{0x1badb002, flags,  0u - 0x1badb002 - flags, 0xff000, 0xff000, 0,
                                       0,          0xff100};
  std::memcpy(file.data(), header.data(), sizeof header);
  EXPECT_THAT(usage_message([&] { load_bytes(file, {.kernel = "k"}, memory); }),
              testing::HasSubstr("belongs at 0xff000 to 0xffbb7, over the machine's tables"));
}

TEST(BzImageTest, RefusesAStubOverTheMachinesTables) {
  GuestMemory memory(64 * MiB);
  EXPECT_THAT(usage_message([&] {
                load_bytes(bzimage({.payload = sample(5000), .preferred = 0xe0000}), {.kernel = "k"}, memory);
              }),
              testing::HasSubstr("over the machine's tables"));
}

// --- any file
// ----------------------------------------------------------------------------------------------------

TEST(BootTest, NamesUnreadableKernels) {
  GuestMemory memory(16 * MiB);
  EXPECT_EQ(usage_message([&] { load({.kernel = "/nonexistent/k"}, memory); }),
            "--kernel /nonexistent/k: No such file or directory");
  EXPECT_THAT(usage_message([&] { load({.kernel = "/tmp"}, memory); }),
              testing::StartsWith("--kernel /tmp: "));
}

TEST(BootTest, UnpacksGzipFiles) {
  GuestMemory memory(16 * MiB);
  const Data packed = pack("gzip", elf32({.paddr = MiB, .entry = MiB, .multiboot_flags = 0}));
  EXPECT_EQ(load_bytes(packed, {.kernel = "k"}, memory).protocol, "multiboot ELF");
  EXPECT_EQ(
      usage_message([&] { load_bytes(Bytes(packed).first(packed.size() - 9), {.kernel = "k.gz"}, memory); }),
      "--kernel k.gz: this gzip file is damaged, or larger than --memory");
}

TEST(BootTest, DamagedHeadersGiveAnErrorOrAKernelInsideMemory) {
  const std::vector<Data> kernels{
      bzimage({.payload = pack("gzip", elf64({.paddr = 16 * MiB, .entry = 16 * MiB}))}),
      elf64({.paddr = MiB, .entry = MiB, .pvh_entry = MiB}),
      elf32({.paddr = MiB, .entry = MiB, .multiboot_flags = 3}),
  };
  std::mt19937 random(20);
  for (int round = 0; round < 600; ++round) {
    Data file = kernels[static_cast<size_t>(round) % kernels.size()];
    for (unsigned n = 0; n < 4; ++n) {
      file[random() % std::min<size_t>(file.size(), 0x300)] = static_cast<uint8_t>(random());
    }
    GuestMemory memory(48 * MiB);
    try {
      load_bytes(file, {.kernel = "k", .append = "a"}, memory);
    } catch (const UsageError&) {
    }
  }
}

}  // namespace
}  // namespace lodge::machine::boot
