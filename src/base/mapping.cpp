#include "base/mapping.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstring>

#include "base/error.hpp"

namespace lodge {

Mapping::Mapping(size_t size, int protection, int flags, int fd, uint64_t offset, const std::string& what) {
  void* address = ::mmap(nullptr, size, protection, flags, fd, static_cast<off_t>(offset));
  if (address == MAP_FAILED) throw_errno(what);
  data_ = static_cast<uint8_t*>(address);
  size_ = size;
}

Mapping::~Mapping() {
  if (data_ != nullptr) ::munmap(data_, size_);
}

Mapping Mapping::anonymous(size_t size) {
  return Mapping(size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0,
                 "cannot map anonymous memory");
}

Mapping Mapping::file(const std::string& path, const std::string& option) {
  // O_NONBLOCK: to open a FIFO would wait for its writer before it can be refused.
  const Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!fd) usage_error("{} {}: {}", option, path, std::strerror(errno));
  struct stat status {};
  if (::fstat(fd.get(), &status) != 0) usage_error("{} {}: {}", option, path, std::strerror(errno));
  if (!S_ISREG(status.st_mode)) usage_error("{} {}: not a regular file", option, path);
  if (status.st_size == 0) usage_error("{} {}: the file is empty", option, path);
  return Mapping(static_cast<size_t>(status.st_size), PROT_READ, MAP_PRIVATE, fd.get(), 0,
                 option + " " + path + ": cannot map the file");
}

}  // namespace lodge
