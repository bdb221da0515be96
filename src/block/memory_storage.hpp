// Storage in memory that records what reaches it, for tests and fuzzing.
#pragma once

#include <algorithm>
#include <cstring>
#include <mutex>

#include "block/storage.hpp"

namespace lodge::block {

class MemoryStorage : public Storage {
 public:
  struct Event {
    enum class Kind { write, sync, truncate };
    Kind kind;
    uint64_t offset;             // truncate: the size
    std::vector<uint8_t> bytes;  // write
  };
  // The contents and their history, which outlive the storage.
  struct Disk {
    std::mutex mutex;
    std::vector<uint8_t> bytes;
    std::vector<Event> events;
    bool record = false;
    uint64_t limit = uint64_t{1} << 30;  // writes beyond it fail with ENOSPC
    // Writes that are still let through; then they fail with EIO, as do barriers.
    uint64_t budget = UINT64_MAX;
  };

  explicit MemoryStorage(std::shared_ptr<Disk> disk, bool writable = true)
      : disk_(std::move(disk)), writable_(writable) {}

  void read(std::vector<iovec> buffers, uint64_t offset, Completion done) noexcept override {
    for (const auto& buffer : buffers) {
      read(buffer.iov_base, buffer.iov_len, offset);
      offset += buffer.iov_len;
    }
    done(0);
  }
  void write(std::vector<iovec> buffers, uint64_t offset, Completion done) noexcept override {
    std::vector<uint8_t> bytes;
    for (const auto& buffer : buffers) {
      const auto* from = static_cast<const uint8_t*>(buffer.iov_base);
      bytes.insert(bytes.end(), from, from + buffer.iov_len);
    }
    done(write(bytes.data(), bytes.size(), offset));
  }
  void change(Transfer::Kind kind, uint64_t offset, uint64_t length, Completion done) noexcept override {
    done(change(kind, offset, length));
  }
  int read(void* data, size_t size, uint64_t offset) noexcept override {
    if (size == 0) return 0;
    const std::lock_guard lock(disk_->mutex);
    const auto& bytes = disk_->bytes;
    const size_t there = offset >= bytes.size() ? 0 : std::min<uint64_t>(size, bytes.size() - offset);
    if (there) std::memcpy(data, bytes.data() + offset, there);
    std::memset(static_cast<uint8_t*>(data) + there, 0, size - there);
    return 0;
  }
  int write(const void* data, size_t size, uint64_t offset) noexcept override {
    const std::lock_guard lock(disk_->mutex);
    if (offset > disk_->limit || size > disk_->limit - offset) return ENOSPC;
    if (disk_->budget == 0) return EIO;
    if (disk_->budget != UINT64_MAX) disk_->budget--;
    const auto* from = static_cast<const uint8_t*>(data);
    apply(disk_->bytes, {Event::Kind::write, offset, {from, from + size}});
    if (disk_->record) disk_->events.push_back({Event::Kind::write, offset, {from, from + size}});
    return 0;
  }
  int change(Transfer::Kind kind, uint64_t offset, uint64_t length) noexcept override {
    if (kind == Transfer::Kind::sync) {
      const std::lock_guard lock(disk_->mutex);
      if (disk_->budget == 0) return EIO;
      if (disk_->record) disk_->events.push_back({Event::Kind::sync, 0, {}});
      return 0;
    }
    const uint64_t end = size();
    if (offset >= end) return 0;
    const std::vector<uint8_t> zeros(std::min(length, end - offset));
    return write(zeros.data(), zeros.size(), offset);
  }
  int truncate(uint64_t size) noexcept override {
    const std::lock_guard lock(disk_->mutex);
    if (size > disk_->limit) return ENOSPC;
    disk_->bytes.resize(size);
    if (disk_->record) disk_->events.push_back({Event::Kind::truncate, size, {}});
    return 0;
  }
  uint64_t size() const noexcept override {
    const std::lock_guard lock(disk_->mutex);
    return disk_->bytes.size();
  }
  uint64_t allocated() const noexcept override { return size(); }
  bool writable() const noexcept override { return writable_; }
  void close() noexcept override {}
  const std::string& path() const noexcept override { return path_; }

  static void apply(std::vector<uint8_t>& disk, const Event& event) {
    if (event.kind == Event::Kind::truncate) disk.resize(event.offset);
    if (event.kind != Event::Kind::write) return;
    if (disk.size() < event.offset + event.bytes.size()) disk.resize(event.offset + event.bytes.size());
    std::ranges::copy(event.bytes, disk.begin() + static_cast<ptrdiff_t>(event.offset));
  }

 private:
  std::shared_ptr<Disk> disk_;
  bool writable_;
  std::string path_ = "memory";
};

}  // namespace lodge::block
