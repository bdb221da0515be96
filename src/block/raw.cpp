#include "block/raw.hpp"

#include <array>
#include <cerrno>
#include <utility>

#include "block/probe.hpp"

namespace lodge::block {

// A disk consists of whole sectors: the rest of the last one reads as zeros until it is written.
RawImage::RawImage(std::unique_ptr<Storage> storage, bool probed)
    : storage_(std::move(storage)),
      probed_(probed),
      read_only_(!storage_->writable()),
      size_((storage_->size() + 511) & ~uint64_t{511}) {}

int RawImage::refuse(uint64_t offset, uint64_t length, bool change) const noexcept {
  const uint64_t size = size_;
  if (offset > size || length > size - offset) return EINVAL;
  return change && read_only() ? EROFS : 0;
}

void RawImage::read(std::span<const iovec> buffers, uint64_t offset, Completion done) noexcept {
  if (const int error = refuse(offset, total_length(buffers), false)) return done(error);
  storage_->read({buffers.begin(), buffers.end()}, offset, inflight_.enter(std::move(done)));
}

void RawImage::write(std::span<const iovec> buffers, uint64_t offset, Completion done) noexcept {
  if (const int error = refuse(offset, total_length(buffers), true)) return done(error);
  if (probed_ && offset < magic_size) {
    std::array<uint8_t, magic_size> start{};
    // A piecemeal write of the magic number is refused at its first piece that begins after byte 0: disks are
    // written in sectors.
    if (offset != 0) return done(EPERM);
    gather(buffers, start);
    if (looks_formatted(start)) return done(EPERM);
  }
  storage_->write({buffers.begin(), buffers.end()}, offset, inflight_.enter(std::move(done)));
}

void RawImage::flush(Completion done) noexcept {
  if (read_only()) return done(0);
  storage_->change(Transfer::Kind::sync, 0, 0, inflight_.enter(std::move(done)));
}

void RawImage::discard(uint64_t offset, uint64_t length, Completion done) noexcept {
  if (const int error = refuse(offset, length, true)) return done(error);
  if (length == 0) return done(0);
  storage_->change(Transfer::Kind::punch, offset, length, inflight_.enter(std::move(done)));
}

void RawImage::write_zeroes(uint64_t offset, uint64_t length, bool unmap, Completion done) noexcept {
  if (const int error = refuse(offset, length, true)) return done(error);
  if (length == 0) return done(0);
  storage_->change(unmap ? Transfer::Kind::erase : Transfer::Kind::zero, offset, length,
                   inflight_.enter(std::move(done)));
}

void RawImage::resize(uint64_t size, Completion done) noexcept {
  if (read_only()) return done(EROFS);
  if (size % 512 != 0 || size > uint64_t{INT64_MAX}) return done(EINVAL);
  // Smaller: requests must not reach beyond the end from before it moves on.
  if (size < size_) size_ = size;
  const int error = storage_->truncate(size);
  if (error == 0) size_ = size;
  done(error);
}

int RawImage::close() noexcept {
  inflight_.wait();
  if (std::exchange(closed_, true)) return 0;
  const int error = read_only_ ? 0 : storage_->sync();
  storage_.reset();
  return error;
}

}  // namespace lodge::block
