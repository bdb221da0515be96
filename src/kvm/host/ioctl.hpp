// ioctl(2) with the contract's errors.
#pragma once

#include <linux/kvm.h>
#include <sys/ioctl.h>

#include <cerrno>
#include <string_view>

#include "base/error.hpp"

namespace lodge::kvm::host {

// ioctl(2); 0 or a positive result, else a negative errno.
template <class Argument>
int try_ioctl(int fd, unsigned long request, Argument argument) noexcept {
  const int result = ::ioctl(fd, request, argument);
  return result < 0 ? -errno : result;
}

// ioctl(2); throws std::system_error with the sentence "/dev/kvm: `name` failed".
template <class Argument>
int checked_ioctl(int fd, unsigned long request, Argument argument, std::string_view name) {
  const int result = try_ioctl(fd, request, argument);
  if (result < 0) throw_errno(-result, fmt::format("/dev/kvm: {} failed", name));
  return result;
}

// KVM_CHECK_EXTENSION on a system or VM descriptor: 0 when absent.
inline int extension(int fd, uint32_t capability) noexcept {
  const int result = try_ioctl(fd, KVM_CHECK_EXTENSION, static_cast<unsigned long>(capability));
  return result < 0 ? 0 : result;
}

// Throws std::system_error (ENOTSUP) when the kernel lacks `capability`.
inline void require(int fd, uint32_t capability, std::string_view name) {
  if (extension(fd, capability) == 0)
    throw_errno(ENOTSUP, fmt::format("/dev/kvm: this kernel or its vendor module does not offer {}", name));
}

}  // namespace lodge::kvm::host

// The request under its own name, for messages.
#define LODGE_IOCTL(fd, request, argument) \
  ::lodge::kvm::host::checked_ioctl((fd), (request), (argument), #request)
#define LODGE_REQUIRE(fd, capability) ::lodge::kvm::host::require((fd), (capability), #capability)
