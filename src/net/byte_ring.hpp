// Bytes in the order in which they came, up to a limit.
#pragma once

#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>

namespace lodge::net {

// Takes memory as it fills, since most connections never hold much. Not synchronised.
class ByteRing {
 public:
  size_t size() const noexcept { return size_; }
  bool empty() const noexcept { return size_ == 0; }

  // The bytes from `offset` on, at most `count`, in one or two pieces; offset <= size().
  std::array<iovec, 2> pieces(size_t offset, size_t count) const noexcept {
    return cut(begin_ + offset, std::min(count, size_ - offset));
  }
  // Room behind the bytes for at most `count` more: what is put there is added by grow(). Throws
  // std::bad_alloc.
  std::array<iovec, 2> room(size_t count) {
    reserve(size_ + count);
    return cut(begin_ + size_, count);
  }
  void grow(size_t count) noexcept { size_ += count; }
  void consume(size_t count) noexcept {
    size_ -= count;
    begin_ = size_ == 0 ? 0 : (begin_ + count) & (capacity_ - 1);
  }

 private:
  static constexpr size_t smallest = 16 * 1024;  // a power of two, as all capacities are
  std::array<iovec, 2> cut(size_t from, size_t count) const noexcept {
    if (count == 0) return {};
    const size_t start = from & (capacity_ - 1), first = std::min(count, capacity_ - start);
    return {iovec{bytes_.get() + start, first}, iovec{bytes_.get(), count - first}};
  }
  void reserve(size_t wanted) {
    if (wanted <= capacity_) return;
    size_t capacity = std::max(smallest, capacity_);
    while (capacity < wanted) capacity *= 2;
    auto bytes = std::make_unique_for_overwrite<uint8_t[]>(capacity);
    size_t done = 0;
    for (const iovec& piece : pieces(0, size_)) {
      if (piece.iov_len == 0) continue;
      std::memcpy(bytes.get() + done, piece.iov_base, piece.iov_len);
      done += piece.iov_len;
    }
    bytes_ = std::move(bytes);
    capacity_ = capacity;
    begin_ = 0;
  }

  std::unique_ptr<uint8_t[]> bytes_;
  size_t capacity_ = 0, begin_ = 0, size_ = 0;
};

}  // namespace lodge::net
