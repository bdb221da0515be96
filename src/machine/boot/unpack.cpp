// Compressed kernel payloads.
//
// Modelled: gzip (RFC 1952), xz and lzma, lz4 in its legacy container (8 MiB blocks, lz4_Frame_format.md),
// zstd. Missing: bzip2 and LZO, which no distribution of the last ten years uses; such kernels unpack
// themselves. Document: Linux Documentation/x86/boot.rst, payload_offset and payload_length.
#include "machine/boot/unpack.hpp"

#include <lz4.h>
#include <lzma.h>
#include <sys/mman.h>
#include <zlib.h>
#include <zstd.h>

#include <algorithm>
#include <array>
#include <climits>
#include <memory>

namespace lodge::machine::boot {

namespace {

using Output = std::span<uint8_t>;

// xz -9 has a dictionary of 64 MiB, kernels are packed with 32 or 128 MiB: anything that wants more is
// hostile.
constexpr uint64_t dictionary_limit = 192 << 20;
constexpr int zstd_window_log_limit = 27;  // 128 MiB, what "zstd -22 --ultra" uses
constexpr uint32_t lz4_legacy_magic = 0x184c2102;
constexpr uint64_t lz4_legacy_block = 8 << 20;

struct Format {
  std::string_view name;
  std::array<uint8_t, 6> magic;
  size_t magic_size;
  // The number of bytes written, or nothing when the data are damaged or do not fit.
  std::optional<uint64_t> (*unpack)(Bytes in, Output out);
};

std::optional<uint64_t> unpack_gzip(Bytes in, Output out) {
  z_stream stream{};
  if (in.size() > UINT_MAX || out.size() > UINT_MAX) return std::nullopt;
  if (inflateInit2(&stream, 16 + MAX_WBITS) != Z_OK) return std::nullopt;
  stream.next_in = const_cast<uint8_t*>(in.data());  // zlib's interface is not const-correct; it only reads
  stream.avail_in = static_cast<unsigned>(in.size());
  stream.next_out = out.data();
  stream.avail_out = static_cast<unsigned>(out.size());
  const int result = inflate(&stream, Z_FINISH);
  const uint64_t written = stream.total_out;
  inflateEnd(&stream);
  if (result != Z_STREAM_END) return std::nullopt;
  return written;
}

std::optional<uint64_t> run_lzma(lzma_stream& stream, Bytes in, Output out) {
  stream.next_in = in.data();
  stream.avail_in = in.size();
  stream.next_out = out.data();
  stream.avail_out = out.size();
  const lzma_ret result = lzma_code(&stream, LZMA_FINISH);
  const uint64_t written = stream.total_out;
  lzma_end(&stream);
  if (result != LZMA_STREAM_END) return std::nullopt;
  return written;
}

std::optional<uint64_t> unpack_xz(Bytes in, Output out) {
  lzma_stream stream = LZMA_STREAM_INIT;
  if (lzma_stream_decoder(&stream, dictionary_limit, 0) != LZMA_OK) return std::nullopt;
  return run_lzma(stream, in, out);
}

std::optional<uint64_t> unpack_lzma(Bytes in, Output out) {
  lzma_stream stream = LZMA_STREAM_INIT;
  if (lzma_alone_decoder(&stream, dictionary_limit) != LZMA_OK) return std::nullopt;
  return run_lzma(stream, in, out);
}

std::optional<uint64_t> unpack_lz4(Bytes in, Output out) {
  uint64_t written = 0;
  uint64_t at = 4;
  while (const auto size = get<uint32_t>(in, at)) {
    at += 4;
    if (*size == lz4_legacy_magic) continue;  // archives may be concatenated
    const auto block = slice(in, at, *size);
    if (!block || block->size() > INT_MAX || block->empty()) return std::nullopt;
    const uint64_t room = std::min<uint64_t>(out.size() - written, lz4_legacy_block);
    const int count = LZ4_decompress_safe(reinterpret_cast<const char*>(block->data()),
                                          reinterpret_cast<char*>(out.data() + written),
                                          static_cast<int>(block->size()), static_cast<int>(room));
    if (count < 0) return std::nullopt;
    written += static_cast<uint64_t>(count);
    at += *size;
  }
  return written;
}

std::optional<uint64_t> unpack_zstd(Bytes in, Output out) {
  const std::unique_ptr<ZSTD_DCtx, decltype(&ZSTD_freeDCtx)> context(ZSTD_createDCtx(), &ZSTD_freeDCtx);
  if (!context) return std::nullopt;
  if (ZSTD_isError(ZSTD_DCtx_setParameter(context.get(), ZSTD_d_windowLogMax, zstd_window_log_limit))) {
    return std::nullopt;
  }
  // Streaming, because a kernel's frame is followed by nothing but may lack its content size.
  ZSTD_inBuffer input{in.data(), in.size(), 0};
  ZSTD_outBuffer output{out.data(), out.size(), 0};
  while (true) {
    const size_t in_before = input.pos, out_before = output.pos;
    const size_t left = ZSTD_decompressStream(context.get(), &output, &input);
    if (ZSTD_isError(left)) return std::nullopt;
    if (left == 0) return output.pos;                                             // the frame is complete
    if (input.pos == in_before && output.pos == out_before) return std::nullopt;  // truncated, or too big
  }
}

constexpr std::array<Format, 5> formats{{
    {"gzip", {0x1f, 0x8b, 0x08}, 3, unpack_gzip},
    {"xz", {0xfd, '7', 'z', 'X', 'Z', 0x00}, 6, unpack_xz},
    {"lzma", {0x5d, 0x00, 0x00}, 3, unpack_lzma},
    {"lz4", {0x02, 0x21, 0x4c, 0x18}, 4, unpack_lz4},
    {"zstd", {0x28, 0xb5, 0x2f, 0xfd}, 4, unpack_zstd},
}};

const Format* find_format(Bytes payload) noexcept {
  for (const Format& format : formats) {
    if (payload.size() >= format.magic_size &&
        std::equal(payload.begin(), payload.begin() + static_cast<ptrdiff_t>(format.magic_size),
                   format.magic.begin())) {
      return &format;
    }
  }
  return nullptr;
}

}  // namespace

std::string_view payload_format(Bytes payload) noexcept {
  const Format* format = find_format(payload);
  return format == nullptr ? std::string_view{} : format->name;
}

std::optional<uint64_t> unpacked_size(Bytes payload, uint64_t limit) noexcept {
  if (find_format(payload) == nullptr || payload.size() < 8) return std::nullopt;
  const auto size = get<uint32_t>(payload, payload.size() - 4);
  if (!size || *size == 0 || *size > limit) return std::nullopt;
  return *size;
}

bool unpack_into(Bytes payload, std::span<uint8_t> out) {
  const Format* format = find_format(payload);
  if (format == nullptr || payload.size() < 8) return false;
  // gzip's own trailer is what stands there, for the others the size was appended after the stream.
  const Bytes stream = format->name == "gzip" ? payload : payload.first(payload.size() - 4);
  return format->unpack(stream, out) == out.size();
}

std::optional<Mapping> unpack(Bytes payload, uint64_t limit) {
  const auto size = unpacked_size(payload, limit);
  if (!size) return std::nullopt;
  Mapping out = Mapping::anonymous(*size);
  // Advice only: a kernel has more than ten thousand small pages, and touching them is half of the time lz4
  // takes.
  ::madvise(out.data(), out.size(), MADV_HUGEPAGE);
  if (!unpack_into(payload, out.bytes())) return std::nullopt;
  return out;
}

}  // namespace lodge::machine::boot
