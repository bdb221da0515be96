#include "block/qcow2/compression.hpp"

#include <zlib.h>
#include <zstd.h>

#include <memory>

namespace lodge::block::qcow2 {
namespace {

bool inflate_cluster(std::span<const uint8_t> data, std::span<uint8_t> cluster) {
  z_stream stream{};
  if (::inflateInit2(&stream, -15) != Z_OK) return false;
  stream.next_in = const_cast<uint8_t*>(data.data());
  stream.avail_in = static_cast<unsigned>(data.size());
  stream.next_out = cluster.data();
  stream.avail_out = static_cast<unsigned>(cluster.size());
  const int result = ::inflate(&stream, Z_FINISH);
  ::inflateEnd(&stream);
  // Z_BUF_ERROR: more would come, but a cluster is all that counts.
  return (result == Z_STREAM_END || result == Z_BUF_ERROR) && stream.avail_out == 0;
}

bool unpack_zstd(std::span<const uint8_t> data, std::span<uint8_t> cluster) {
  const std::unique_ptr<ZSTD_DCtx, size_t (*)(ZSTD_DCtx*)> context(ZSTD_createDCtx(), ZSTD_freeDCtx);
  if (!context) return false;
  // A window far larger than a cluster would only be an allocation that a hostile image asks for.
  ZSTD_DCtx_setParameter(context.get(), ZSTD_d_windowLogMax, 23);
  ZSTD_inBuffer in{data.data(), data.size(), 0};
  ZSTD_outBuffer out{cluster.data(), cluster.size(), 0};
  while (out.pos < out.size) {
    const size_t in_before = in.pos, out_before = out.pos;
    const size_t result = ZSTD_decompressStream(context.get(), &out, &in);
    if (ZSTD_isError(result) || (in.pos == in_before && out.pos == out_before)) return false;
    if (result == 0 && out.pos < out.size) return false;  // the frame has ended early
  }
  return true;
}

}  // namespace

bool decompress(Compression type, std::span<const uint8_t> data, std::span<uint8_t> cluster) {
  return type == Compression::zstd ? unpack_zstd(data, cluster) : inflate_cluster(data, cluster);
}

std::vector<uint8_t> compress(Compression type, std::span<const uint8_t> cluster) {
  std::vector<uint8_t> result(cluster.size() - 1);
  if (type == Compression::zstd) {
    const size_t size = ZSTD_compress(result.data(), result.size(), cluster.data(), cluster.size(), 3);
    result.resize(ZSTD_isError(size) ? 0 : size);
    return result;
  }
  z_stream stream{};
  if (::deflateInit2(&stream, Z_DEFAULT_COMPRESSION, Z_DEFLATED, -12, 8, Z_DEFAULT_STRATEGY) != Z_OK)
    return {};
  stream.next_in = const_cast<uint8_t*>(cluster.data());
  stream.avail_in = static_cast<unsigned>(cluster.size());
  stream.next_out = result.data();
  stream.avail_out = static_cast<unsigned>(result.size());
  const bool fits = ::deflate(&stream, Z_FINISH) == Z_STREAM_END;
  result.resize(fits ? result.size() - stream.avail_out : 0);
  ::deflateEnd(&stream);
  return result;
}

}  // namespace lodge::block::qcow2
