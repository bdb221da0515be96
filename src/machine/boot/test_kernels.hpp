// Small kernel files made up for tests and fuzz seeds: the formats with the fields a test wants to vary.
#pragma once

#include <elf.h>
#include <lz4.h>
#include <lzma.h>
#include <unistd.h>
#include <zlib.h>
#include <zstd.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "machine/boot/bytes.hpp"

namespace lodge::machine::boot::test_kernels {

using Data = std::vector<uint8_t>;

// What the loaded segment and the self-unpacking stub contain at an offset.
inline uint8_t segment_byte(uint64_t offset) {
  return static_cast<uint8_t>(offset * 7 + (offset >> 8) + 1);
}
inline uint8_t stub_byte(uint64_t offset) {
  return static_cast<uint8_t>(offset * 5 + 3);
}

// Compressible, but not trivially.
inline Data sample(size_t size) {
  Data data(size);
  uint32_t state = 1;
  for (size_t index = 0; index < size; ++index) {
    state = state * 1664525 + 1013904223;
    data[index] = static_cast<uint8_t>(state >> 29);
  }
  return data;
}

inline void append_size(Data& packed, size_t size) {
  packed.resize(packed.size() + 4);
  put(packed, packed.size() - 4, static_cast<uint32_t>(size));
}

inline Data pack_gzip(const Data& in) {
  Data out(in.size() + 1000);
  z_stream stream{};
  if (deflateInit2(&stream, 6, Z_DEFLATED, 16 + MAX_WBITS, 8, Z_DEFAULT_STRATEGY) != Z_OK) std::abort();
  stream.next_in = const_cast<uint8_t*>(in.data());
  stream.avail_in = static_cast<unsigned>(in.size());
  stream.next_out = out.data();
  stream.avail_out = static_cast<unsigned>(out.size());
  if (deflate(&stream, Z_FINISH) != Z_STREAM_END) std::abort();
  out.resize(stream.total_out);
  deflateEnd(&stream);
  return out;  // its last four bytes are the size
}

inline Data pack_lzma(const Data& in, bool xz) {
  Data out(in.size() + 1000);
  lzma_stream stream = LZMA_STREAM_INIT;
  lzma_options_lzma options;
  lzma_lzma_preset(&options, 1);
  if ((xz ? lzma_easy_encoder(&stream, 1, LZMA_CHECK_CRC32) : lzma_alone_encoder(&stream, &options)) !=
      LZMA_OK) {
    std::abort();
  }
  stream.next_in = in.data();
  stream.avail_in = in.size();
  stream.next_out = out.data();
  stream.avail_out = out.size();
  if (lzma_code(&stream, LZMA_FINISH) != LZMA_STREAM_END) std::abort();
  out.resize(stream.total_out);
  lzma_end(&stream);
  append_size(out, in.size());
  return out;
}

inline Data pack_lz4(const Data& in) {
  Data out{0x02, 0x21, 0x4c, 0x18};
  constexpr size_t block = 8 << 20;
  for (size_t at = 0; at < in.size(); at += block) {
    const int size = static_cast<int>(std::min(block, in.size() - at));
    Data packed(static_cast<size_t>(LZ4_compressBound(size)));
    const int count =
        LZ4_compress_default(reinterpret_cast<const char*>(in.data() + at),
                             reinterpret_cast<char*>(packed.data()), size, static_cast<int>(packed.size()));
    append_size(out, static_cast<size_t>(count));
    out.insert(out.end(), packed.begin(), packed.begin() + count);
  }
  append_size(out, in.size());
  return out;
}

inline Data pack_zstd(const Data& in) {
  Data out(ZSTD_compressBound(in.size()));
  out.resize(ZSTD_compress(out.data(), out.size(), in.data(), in.size(), 3));
  append_size(out, in.size());
  return out;
}

inline Data pack(std::string_view format, const Data& in) {
  if (format == "gzip") return pack_gzip(in);
  if (format == "xz") return pack_lzma(in, true);
  if (format == "lzma") return pack_lzma(in, false);
  if (format == "lz4") return pack_lz4(in);
  return pack_zstd(in);
}

struct ElfOptions {
  uint64_t paddr = 0;
  uint64_t vaddr = 0;
  uint64_t entry = 0;
  uint64_t file_size = 4096;
  uint64_t memory_size = 4096;
  std::optional<uint64_t> pvh_entry = {};
  std::optional<uint32_t> multiboot_flags = {};  // a header at the begin of the segment's bytes
};

template <class Header, class Program>
Data elf(const ElfOptions& options, uint8_t elf_class, uint16_t machine) {
  constexpr size_t note_at = 512, segment_at = 1024;
  Data file(segment_at + options.file_size);
  Header header{};
  std::memcpy(header.e_ident, ELFMAG, SELFMAG);
  header.e_ident[EI_CLASS] = elf_class;
  header.e_ident[EI_DATA] = ELFDATA2LSB;
  header.e_type = ET_EXEC;
  header.e_machine = machine;
  header.e_entry = static_cast<decltype(header.e_entry)>(options.entry);
  header.e_phoff = sizeof(Header);
  header.e_phentsize = sizeof(Program);
  header.e_phnum = 2;
  put(file, 0, header);
  Program load{};
  load.p_type = PT_LOAD;
  load.p_offset = segment_at;
  load.p_paddr = static_cast<decltype(load.p_paddr)>(options.paddr);
  load.p_vaddr = static_cast<decltype(load.p_vaddr)>(options.vaddr);
  load.p_filesz = static_cast<decltype(load.p_filesz)>(options.file_size);
  load.p_memsz = static_cast<decltype(load.p_memsz)>(std::max(options.memory_size, options.file_size));
  put(file, sizeof(Header), load);
  Program note{};
  note.p_type = PT_NOTE;
  note.p_offset = note_at;
  note.p_filesz = options.pvh_entry ? 44 : 0;
  put(file, sizeof(Header) + sizeof(Program), note);
  if (options.pvh_entry) {  // another vendor's note first: it has to be skipped
    const std::array<uint32_t, 11> notes{
        4, 4, 1, 0x00756e47, 99, 4, 8, 18, 0x006e6558, static_cast<uint32_t>(*options.pvh_entry), 0};
    std::memcpy(file.data() + note_at, notes.data(), sizeof notes);
  }
  for (size_t at = 0; at < options.file_size; ++at) file[segment_at + at] = segment_byte(at);
  if (options.multiboot_flags) {
    const std::array<uint32_t, 3> multiboot{0x1badb002, *options.multiboot_flags,
                                            0u - 0x1badb002 - *options.multiboot_flags};
    std::memcpy(file.data() + segment_at, multiboot.data(), sizeof multiboot);
  }
  return file;
}

inline Data elf64(const ElfOptions& options) {
  return elf<Elf64_Ehdr, Elf64_Phdr>(options, ELFCLASS64, EM_X86_64);
}
inline Data elf32(const ElfOptions& options) {
  return elf<Elf32_Ehdr, Elf32_Phdr>(options, ELFCLASS32, EM_386);
}

struct BzImageOptions {
  Data payload = {};
  uint16_t xloadflags = 1;
  uint8_t relocatable = 1;
  uint64_t preferred = 16 << 20;
  uint32_t init_size = 32 << 20;
  uint32_t initrd_max = 0x7fffffff;
};

inline Data bzimage(const BzImageOptions& options) {
  constexpr size_t setup_size = 2 * 512, stub_size = 0x300;
  const size_t body = (stub_size + options.payload.size() + 15) & ~size_t{15};
  Data file(setup_size + body);
  for (size_t at = 0; at < stub_size; ++at) file[setup_size + at] = stub_byte(at);
  std::copy(options.payload.begin(), options.payload.end(), file.begin() + setup_size + stub_size);
  file[0x1f1] = 1;
  put(file, 0x1f4, static_cast<uint32_t>(body / 16));
  put(file, 0x1fe, uint16_t{0xaa55});
  put(file, 0x200, uint16_t{0x6aeb});
  put(file, 0x202, uint32_t{0x53726448});
  put(file, 0x206, uint16_t{0x20f});
  file[0x211] = 1;
  put(file, 0x214, uint32_t{0x100000});
  put(file, 0x22c, options.initrd_max);
  put(file, 0x230, uint32_t{0x200000});
  file[0x234] = options.relocatable;
  put(file, 0x236, options.xloadflags);
  put(file, 0x238, uint32_t{2047});
  put(file, 0x248, static_cast<uint32_t>(stub_size));
  put(file, 0x24c, static_cast<uint32_t>(options.payload.size()));
  put(file, 0x258, options.preferred);
  put(file, 0x260, options.init_size);
  return file;
}

class TemporaryFile {
 public:
  explicit TemporaryFile(const Data& data) {
    std::string name = "/tmp/lodge-boot-XXXXXX";
    const int fd = ::mkstemp(name.data());
    if (fd < 0 || ::write(fd, data.data(), data.size()) != static_cast<ssize_t>(data.size())) std::abort();
    ::close(fd);
    path = name;
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
  ~TemporaryFile() { ::unlink(path.c_str()); }
  std::string path;
};

}  // namespace lodge::machine::boot::test_kernels
