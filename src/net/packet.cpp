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

}  // namespace lodge::net
