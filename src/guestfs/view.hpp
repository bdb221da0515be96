// A disk as a reader at set-up sees it: a range of bytes of an image, with integers read little-endian. All
// that it holds is hostile; a read outside the range, or one that the host cannot do, is refused and nothing
// is assumed about it.
#pragma once

#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <type_traits>

#include "block/image.hpp"

namespace lodge::guestfs {

class View {
 public:
  // The whole disk. The image must outlive the view.
  explicit View(block::Image& image) noexcept : image_(&image), size_(image.size()) {}

  uint64_t size() const noexcept { return size_; }
  // Fills `to` from `offset` on. False when not all of it is there.
  bool read(std::span<uint8_t> to, uint64_t offset) const noexcept;
  // A range of this view, cut off at its end.
  View part(uint64_t begin, uint64_t size) const noexcept;

 private:
  block::Image* image_;
  uint64_t begin_ = 0, size_;
};

// A plain integer or array at `offset` of bytes in memory (the host is little-endian as well).
template <class T>
std::optional<T> field(std::span<const uint8_t> bytes, uint64_t offset) noexcept {
  static_assert(std::is_trivially_copyable_v<T>);
  if (offset > bytes.size() || sizeof(T) > bytes.size() - offset) return std::nullopt;
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof value);
  return value;
}

}  // namespace lodge::guestfs
