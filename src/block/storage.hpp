// The bytes under an image: a regular file or a block device. Image formats do all their I/O through this
// interface, so that a test can stand in between, record the writes and lose some.
#pragma once

#include <memory>
#include <string>

#include "base/fd.hpp"
#include "block/image.hpp"
#include "block/lock.hpp"
#include "block/transfer.hpp"

namespace lodge::block {

class Storage {
 public:
  virtual ~Storage() = default;

  // Asynchronous, as Image's requests are. Reads beyond the end give zeros, writes beyond it make the file
  // longer. `kind` is any but read and write in change().
  virtual void read(std::vector<iovec> buffers, uint64_t offset, Completion done) noexcept = 0;
  virtual void write(std::vector<iovec> buffers, uint64_t offset, Completion done) noexcept = 0;
  virtual void change(Transfer::Kind kind, uint64_t offset, uint64_t length, Completion done) noexcept = 0;
  virtual void plug() noexcept {}
  virtual void unplug() noexcept {}

  // Waiting for the end; 0 or an errno.
  virtual int read(void* data, size_t size, uint64_t offset) noexcept = 0;
  virtual int write(const void* data, size_t size, uint64_t offset) noexcept = 0;
  virtual int change(Transfer::Kind kind, uint64_t offset, uint64_t length) noexcept = 0;
  int sync() noexcept { return change(Transfer::Kind::sync, 0, 0); }
  virtual int truncate(uint64_t size) noexcept = 0;

  virtual uint64_t size() const noexcept = 0;       // bytes, as it is now
  virtual uint64_t allocated() const noexcept = 0;  // bytes that it takes on its file system
  virtual bool writable() const noexcept = 0;
  // How many bytes from `offset` on are a hole.
  virtual uint64_t hole_at(uint64_t offset) const noexcept {
    static_cast<void>(offset);
    return 0;
  }
  virtual void close() noexcept = 0;  // ends the lock; nothing may be asked of it afterwards
  virtual const std::string& path() const noexcept = 0;  // for messages, and what relative names start from
};

class FileStorage final : public Storage {
 public:
  // Opens and locks. Throws UsageError.
  FileStorage(std::string path, Use use, bool lock, std::shared_ptr<TransferEngine> engine);
  // Takes over a descriptor that is open for `use`. `path` is a name for messages.
  FileStorage(Fd fd, std::string path, Use use, std::shared_ptr<TransferEngine> engine);

  void read(std::vector<iovec> buffers, uint64_t offset, Completion done) noexcept override;
  void write(std::vector<iovec> buffers, uint64_t offset, Completion done) noexcept override;
  void change(Transfer::Kind kind, uint64_t offset, uint64_t length, Completion done) noexcept override;
  void plug() noexcept override { engine_->plug(); }
  void unplug() noexcept override { engine_->unplug(); }
  int read(void* data, size_t size, uint64_t offset) noexcept override;
  int write(const void* data, size_t size, uint64_t offset) noexcept override;
  int change(Transfer::Kind kind, uint64_t offset, uint64_t length) noexcept override;
  int truncate(uint64_t size) noexcept override;
  uint64_t size() const noexcept override;
  uint64_t allocated() const noexcept override;
  uint64_t hole_at(uint64_t offset) const noexcept override;
  bool writable() const noexcept override { return use_ == Use::write; }
  void close() noexcept override { fd_.reset(); }
  const std::string& path() const noexcept override { return path_; }
  // For files that nobody will read again: barriers do nothing from now on.
  void never_sync() noexcept { syncs_ = false; }
  int fd() const noexcept { return fd_.get(); }
  std::string_view engine() const noexcept { return engine_->name(); }

 private:
  std::shared_ptr<TransferEngine> engine_;
  std::string path_;
  Use use_;
  bool syncs_ = true;
  Fd fd_;
};

}  // namespace lodge::block
