#include "kvm/preload/file.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/epoll.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <system_error>

namespace lodge::kvm::preload {
namespace {

// Forks between the process that loaded the library and this one.
std::atomic<unsigned> forks{0};

}  // namespace

void note_fork() noexcept {
  forks.fetch_add(1);
}

Fd placeholder(int flags) noexcept {
  Fd fd(::open("/dev/null", flags, 0));
  if (fd || errno != ENOENT) return fd;
  return Fd(::epoll_create1((flags & O_CLOEXEC) != 0 ? EPOLL_CLOEXEC : 0));  // a root directory without /dev
}

File::File(Owner owner) : owner_(owner), forks_(forks.load()) {}

bool File::foreign() const noexcept {
  return owner_ == Owner::one_process && forks_ != forks.load(std::memory_order_relaxed);
}

int File::ioctl(unsigned long request, unsigned long argument) noexcept {
  std::string why;
  const int result = attempt(request, argument, why);
  static const bool traced = std::getenv("LODGE_KVM_TRACE") != nullptr;
  if (traced && result < 0 && result != -EINTR)
    fmt::print(stderr, "liblodge-kvm: {} refused ioctl {:#x} (number {:#04x}): {}{}{}\n", name(), request,
               request & 0xff, std::strerror(-result), why.empty() ? "" : ": ", why);
  return result;
}

int File::attempt(unsigned long request, unsigned long argument, std::string& why) noexcept try {
  return foreign() ? -EIO : answer(request, argument);
} catch (const std::system_error& error) {
  why = error.what();
  return -error.code().value();
} catch (const std::bad_alloc&) {
  return -ENOMEM;
} catch (...) {
  return -EINVAL;
}

}  // namespace lodge::kvm::preload
