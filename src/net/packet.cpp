#include "net/packet.hpp"

#include <algorithm>
#include <cstring>

namespace lodge::net {

size_t total_size(std::span<const iovec> pieces) noexcept {
  size_t total = 0;
  for (const iovec& piece : pieces) total += piece.iov_len;
  return total;
}

size_t gather(std::span<const iovec> pieces, std::span<uint8_t> out) noexcept {
  size_t done = 0;
  for (const iovec& piece : pieces) {
    const size_t count = std::min(piece.iov_len, out.size() - done);
    if (count == 0) continue;  // an empty piece need not have an address
    std::memcpy(out.data() + done, piece.iov_base, count);
    done += count;
  }
  return done;
}

size_t scatter(std::span<const uint8_t> bytes, std::span<const iovec> pieces) noexcept {
  size_t done = 0;
  for (const iovec& piece : pieces) {
    const size_t count = std::min(piece.iov_len, bytes.size() - done);
    if (count == 0) continue;
    std::memcpy(piece.iov_base, bytes.data() + done, count);
    done += count;
  }
  return done;
}

size_t copy_pieces(std::span<const iovec> from, std::span<const iovec> to) noexcept {
  size_t done = 0, piece = 0, used = 0;
  for (const iovec& source : from) {
    for (size_t taken = 0; taken < source.iov_len;) {
      if (piece == to.size()) return done;
      const size_t count = std::min(source.iov_len - taken, to[piece].iov_len - used);
      if (count != 0)
        std::memcpy(static_cast<uint8_t*>(to[piece].iov_base) + used,
                    static_cast<const uint8_t*>(source.iov_base) + taken, count);
      taken += count;
      used += count;
      done += count;
      if (used == to[piece].iov_len) piece++, used = 0;
    }
  }
  return done;
}

size_t cut_pieces(std::span<const iovec> pieces, size_t offset, size_t count, std::span<iovec> out) noexcept {
  size_t places = 0;
  for (const iovec& piece : pieces) {
    if (count == 0 || places == out.size()) break;
    const size_t skipped = std::min(offset, piece.iov_len), length = std::min(piece.iov_len - skipped, count);
    offset -= skipped;
    if (length == 0) continue;
    out[places++] = {static_cast<uint8_t*>(piece.iov_base) + skipped, length};
    count -= length;
  }
  return places;
}

}  // namespace lodge::net
