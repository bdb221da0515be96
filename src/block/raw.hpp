// Raw images: the file's bytes are the disk's.
#pragma once

#include <atomic>

#include "block/requests.hpp"
#include "block/storage.hpp"

namespace lodge::block {

class RawImage final : public Image {
 public:
  // `probed`: nobody said that the file is raw. A guest must then not make it look like another format, or it
  // would choose what files the next opening reads: such a write completes with EPERM.
  RawImage(std::unique_ptr<Storage> storage, bool probed);
  ~RawImage() override { close(); }

  void read(std::span<const iovec> buffers, uint64_t offset, Completion done) noexcept override;
  void write(std::span<const iovec> buffers, uint64_t offset, Completion done) noexcept override;
  void flush(Completion done) noexcept override;
  void discard(uint64_t offset, uint64_t length, Completion done) noexcept override;
  void write_zeroes(uint64_t offset, uint64_t length, bool unmap, Completion done) noexcept override;
  void resize(uint64_t size, Completion done) noexcept override;
  void plug() noexcept override { storage_->plug(); }
  void unplug() noexcept override { storage_->unplug(); }
  uint64_t size() const noexcept override { return size_; }
  bool read_only() const noexcept override { return read_only_; }
  std::string_view format() const noexcept override { return "raw"; }
  uint64_t zeros_at(uint64_t offset, uint64_t length) noexcept override {
    return std::min(storage_->hole_at(offset), length);
  }
  int close() noexcept override;

 private:
  // EINVAL, EROFS or 0.
  int refuse(uint64_t offset, uint64_t length, bool change) const noexcept;

  std::unique_ptr<Storage> storage_;
  const bool probed_, read_only_;
  std::atomic<uint64_t> size_;
  Inflight inflight_;
  bool closed_ = false;
};

}  // namespace lodge::block
