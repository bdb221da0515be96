#include "base/fd.hpp"

#include <fcntl.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cstdint>

#include "base/error.hpp"

namespace lodge {

void Fd::reset(int fd) noexcept {
  if (fd_ >= 0) ::close(fd_);
  fd_ = fd;
}

Fd Fd::duplicate(int fd) {
  Fd copy(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
  if (!copy) throw_errno("cannot duplicate a file descriptor");
  return copy;
}

Fd Fd::event() {
  Fd fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!fd) throw_errno("cannot create an eventfd");
  return fd;
}

void signal_event(int fd) noexcept {
  const uint64_t one = 1;
  // EAGAIN only means that the counter is full: the event is pending anyway.
  [[maybe_unused]] const auto n = ::write(fd, &one, sizeof one);
}

unsigned long long take_event(int fd) noexcept {
  uint64_t count = 0;
  if (::read(fd, &count, sizeof count) != sizeof count) return 0;
  return count;
}

}  // namespace lodge
