// A file descriptor with one owner.
#pragma once

#include <utility>

namespace lodge {

class Fd {
 public:
  Fd() noexcept = default;
  explicit Fd(int fd) noexcept : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept {
    if (this != &other) reset(std::exchange(other.fd_, -1));
    return *this;
  }
  Fd(const Fd&) = delete;
  Fd& operator=(const Fd&) = delete;
  ~Fd() { reset(); }

  int get() const noexcept { return fd_; }
  explicit operator bool() const noexcept { return fd_ >= 0; }
  int release() noexcept { return std::exchange(fd_, -1); }
  void reset(int fd = -1) noexcept;

  // A duplicate of `fd` with close-on-exec. Throws std::system_error.
  static Fd duplicate(int fd);
  // A new non-blocking eventfd. Throws std::system_error.
  static Fd event();

 private:
  int fd_ = -1;
};

// eventfd(2): adds one; takes the count (0 when nothing was signalled).
void signal_event(int fd) noexcept;
unsigned long long take_event(int fd) noexcept;

}  // namespace lodge
