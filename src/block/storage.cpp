#include "block/storage.hpp"

#include <fcntl.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>

#include "base/error.hpp"

namespace lodge::block {

FileStorage::FileStorage(std::string path, Use use, bool lock, std::shared_ptr<TransferEngine> engine)
    : engine_(std::move(engine)), path_(std::move(path)), use_(use) {
  // Not blocking: a FIFO with an image's name must not hang us; regular files do not care.
  fd_.reset(::open(path_.c_str(), (use == Use::write ? O_RDWR : O_RDONLY) | O_CLOEXEC | O_NONBLOCK));
  if (!fd_) {
    const int error = errno;
    const char* remedy = "";
    if (use == Use::write && error == EROFS)
      remedy = "; copy it to where it can be written, or give it to a guest as FILE,readonly";
    else if (use == Use::write && (error == EACCES || error == EPERM))
      remedy = "; get permission to write it, or give it to a guest as FILE,readonly";
    usage_error("{}: cannot be opened{}: {}{}", path_, use == Use::write ? " for writing" : "",
                std::generic_category().message(error), remedy);
  }
  struct stat status {};
  if (::fstat(fd_.get(), &status) != 0 || !(S_ISREG(status.st_mode) || S_ISBLK(status.st_mode)))
    usage_error("{}: is neither a file nor a block device", path_);
  if (lock) lock_image(fd_, path_, use);
}

FileStorage::FileStorage(Fd fd, std::string path, Use use, std::shared_ptr<TransferEngine> engine)
    : engine_(std::move(engine)), path_(std::move(path)), use_(use), fd_(std::move(fd)) {}

void FileStorage::read(std::vector<iovec> buffers, uint64_t offset, Completion done) noexcept {
  engine_->submit({Transfer::Kind::read, fd_.get(), offset, std::move(buffers), 0, std::move(done)});
}

void FileStorage::write(std::vector<iovec> buffers, uint64_t offset, Completion done) noexcept {
  engine_->submit({Transfer::Kind::write, fd_.get(), offset, std::move(buffers), 0, std::move(done)});
}

void FileStorage::change(Transfer::Kind kind, uint64_t offset, uint64_t length, Completion done) noexcept {
  if (kind == Transfer::Kind::sync && !syncs_) return done(0);
  engine_->submit({kind, fd_.get(), offset, {}, length, std::move(done)});
}

int FileStorage::read(void* data, size_t size, uint64_t offset) noexcept {
  Transfer transfer{Transfer::Kind::read, fd_.get(), offset, {{data, size}}};
  return execute(transfer);
}

int FileStorage::write(const void* data, size_t size, uint64_t offset) noexcept {
  Transfer transfer{Transfer::Kind::write, fd_.get(), offset, {{const_cast<void*>(data), size}}};
  return execute(transfer);
}

int FileStorage::change(Transfer::Kind kind, uint64_t offset, uint64_t length) noexcept {
  if (kind == Transfer::Kind::sync && !syncs_) return 0;
  Transfer transfer{kind, fd_.get(), offset, {}, length};
  return execute(transfer);
}

int FileStorage::truncate(uint64_t size) noexcept {
  return ::ftruncate(fd_.get(), static_cast<off_t>(size)) == 0 ? 0 : errno;
}

uint64_t FileStorage::size() const noexcept {
  struct stat status {};
  if (::fstat(fd_.get(), &status) != 0) return 0;
  uint64_t bytes = 0;
  if (S_ISBLK(status.st_mode)) return ::ioctl(fd_.get(), BLKGETSIZE64, &bytes) == 0 ? bytes : 0;
  return static_cast<uint64_t>(status.st_size);
}

uint64_t FileStorage::allocated() const noexcept {
  struct stat status {};
  return ::fstat(fd_.get(), &status) == 0 ? static_cast<uint64_t>(status.st_blocks) * 512 : 0;
}

uint64_t FileStorage::hole_at(uint64_t offset) const noexcept {
  const off_t next = ::lseek(fd_.get(), static_cast<off_t>(offset), SEEK_DATA);
  if (next >= 0) return static_cast<uint64_t>(next) - offset;
  const uint64_t end = size();
  return errno == ENXIO && end > offset ? end - offset : 0;  // a hole up to the end
}

}  // namespace lodge::block
