#include "guestfs/view.hpp"

#include <algorithm>

namespace lodge::guestfs {

bool View::read(std::span<uint8_t> to, uint64_t offset) const noexcept {
  if (offset > size_ || to.size() > size_ - offset) return false;
  return to.empty() || block::read(*image_, to.data(), to.size(), begin_ + offset) == 0;
}

View View::part(uint64_t begin, uint64_t size) const noexcept {
  View part = *this;
  part.begin_ = begin_ + std::min(begin, size_);
  part.size_ = std::min(size, size_ - std::min(begin, size_));
  return part;
}

}  // namespace lodge::guestfs
