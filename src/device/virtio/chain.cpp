// Descriptor chains (VirtIO 1.2, sections 2.6 "message framing", 2.7.4 and 2.7.5).
#include "device/virtio/chain.hpp"

#include <algorithm>
#include <cstring>

namespace lodge::device::virtio {

namespace {

// Calls `use(piece, done)` for each piece of [offset, offset + size); returns how many bytes there were.
template <class Use>
uint64_t for_pieces(std::span<const Segment> segments, uint64_t offset, uint64_t size, Use use) {
  uint64_t done = 0;
  for (const Segment& segment : segments) {
    if (done == size) break;
    if (offset >= segment.bytes.size()) {
      offset -= segment.bytes.size();
      continue;
    }
    const uint64_t length = std::min<uint64_t>(segment.bytes.size() - offset, size - done);
    use(Segment{segment.gpa + offset, segment.bytes.subspan(offset, length)}, done);
    done += length;
    offset = 0;
  }
  return done;
}

}  // namespace

size_t Chain::read(uint64_t offset, std::span<uint8_t> out) const noexcept {
  return for_pieces(readable(), offset, out.size(), [&](const Segment& piece, uint64_t done) {
    std::memcpy(out.data() + done, piece.bytes.data(), piece.bytes.size());
  });
}

size_t Chain::write(uint64_t offset, std::span<const uint8_t> data) const noexcept {
  return for_pieces(writable(), offset, data.size(), [&](const Segment& piece, uint64_t done) {
    std::memcpy(piece.bytes.data(), data.data() + done, piece.bytes.size());
  });
}

void Chain::cut_readable(uint64_t offset, uint64_t size, std::vector<Segment>& out) const {
  for_pieces(readable(), offset, size, [&](const Segment& piece, uint64_t) { out.push_back(piece); });
}

void Chain::cut_writable(uint64_t offset, uint64_t size, std::vector<Segment>& out) const {
  for_pieces(writable(), offset, size, [&](const Segment& piece, uint64_t) { out.push_back(piece); });
}

void Chain::clear() noexcept {
  segments_.clear();
  readable_count_ = 0;
  descriptors_ = 0;
  readable_size_ = writable_size_ = 0;
  id_ = slots_ = 0;
  ticket_ = 0;
}

bool Chain::add(machine::GuestMemory& memory, uint64_t gpa, uint32_t size, bool writable) {
  if (++descriptors_ > max_descriptors) return false;
  if (!writable && writable_size_ != 0) return false;
  if (size == 0) return true;  // names no memory, so its address means nothing
  const auto bytes = memory.view(gpa, size);
  if (bytes.empty()) return false;
  uint64_t& total = writable ? writable_size_ : readable_size_;
  total += size;
  if (readable_size_ + writable_size_ > UINT32_MAX) return false;
  segments_.push_back({gpa, bytes});
  if (!writable) readable_count_++;
  return true;
}

}  // namespace lodge::device::virtio
