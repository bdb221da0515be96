// The functions by which the client has the kernel fill its memory, which may be its guest's: pages that hold
// decoded code are write-protected (soft::Options::guard_code) and the kernel would answer EFAULT.
//
// io_uring is refused, as under many a container's filter of system calls, so that a client takes another
// way: its buffers are filled later, by the kernel itself.
//
// What is not seen here: a client's own system calls, and memory that another process writes to.
#undef _FORTIFY_SOURCE
#include <dlfcn.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdio>

#include "kvm/preload/next.hpp"
#include "kvm/soft/mmu/write_guard.hpp"

using namespace lodge::kvm::preload;

namespace {

using lodge::kvm::soft::admit_write;

bool admit(const void* buffer, size_t size) noexcept {
  return admit_write(reinterpret_cast<uint64_t>(buffer), size);
}

// A longer list is refused by the kernel, which does not look at it.
bool admit(const iovec* vectors, int count) noexcept {
  if (count > IOV_MAX) return false;
  bool any = false;
  for (int i = 0; i < count; ++i) any |= admit(vectors[i].iov_base, vectors[i].iov_len);
  return any;
}

// Opens the memory, then calls; once more when the guest has made a page code again meanwhile.
template <class Call, class... Buffer>
ssize_t filling(const Call& call, Buffer... buffer) noexcept {
  admit(buffer...);
  for (;;) {
    const ssize_t result = call();
    if (result >= 0 || errno != EFAULT || !admit(buffer...)) return result;
  }
}

}  // namespace

LODGE_EXPORT ssize_t read(int fd, void* buffer, size_t size) {
  static constinit Next<ssize_t (*)(int, void*, size_t)> next("read");
  return filling([&] { return next.get()(fd, buffer, size); }, buffer, size);
}

// NOLINTNEXTLINE(bugprone-reserved-identifier): the C library's name
LODGE_EXPORT ssize_t __read_chk(int fd, void* buffer, size_t size, size_t room) {
  static constinit Next<ssize_t (*)(int, void*, size_t, size_t)> next("__read_chk");
  return filling([&] { return next.get()(fd, buffer, size, room); }, buffer, size);
}

#define LODGE_PREAD(name)                                                               \
  LODGE_EXPORT ssize_t name(int fd, void* buffer, size_t size, off_t offset) {          \
    static constinit Next<ssize_t (*)(int, void*, size_t, off_t)> next(#name);          \
    return filling([&] { return next.get()(fd, buffer, size, offset); }, buffer, size); \
  }
LODGE_PREAD(pread)
LODGE_PREAD(pread64)

#define LODGE_PREAD_CHK(name)                                                                 \
  LODGE_EXPORT ssize_t name(int fd, void* buffer, size_t size, off_t offset, size_t room) {   \
    static constinit Next<ssize_t (*)(int, void*, size_t, off_t, size_t)> next(#name);        \
    return filling([&] { return next.get()(fd, buffer, size, offset, room); }, buffer, size); \
  }
LODGE_PREAD_CHK(__pread_chk)
LODGE_PREAD_CHK(__pread64_chk)

LODGE_EXPORT ssize_t readv(int fd, const iovec* vectors, int count) {
  static constinit Next<ssize_t (*)(int, const iovec*, int)> next("readv");
  return filling([&] { return next.get()(fd, vectors, count); }, vectors, count);
}

#define LODGE_PREADV(name)                                                                  \
  LODGE_EXPORT ssize_t name(int fd, const iovec* vectors, int count, off_t offset) {        \
    static constinit Next<ssize_t (*)(int, const iovec*, int, off_t)> next(#name);          \
    return filling([&] { return next.get()(fd, vectors, count, offset); }, vectors, count); \
  }
LODGE_PREADV(preadv)
LODGE_PREADV(preadv64)

#define LODGE_PREADV2(name)                                                                        \
  LODGE_EXPORT ssize_t name(int fd, const iovec* vectors, int count, off_t offset, int flags) {    \
    static constinit Next<ssize_t (*)(int, const iovec*, int, off_t, int)> next(#name);            \
    return filling([&] { return next.get()(fd, vectors, count, offset, flags); }, vectors, count); \
  }
LODGE_PREADV2(preadv2)
LODGE_PREADV2(preadv64v2)

LODGE_EXPORT ssize_t recv(int fd, void* buffer, size_t size, int flags) {
  static constinit Next<ssize_t (*)(int, void*, size_t, int)> next("recv");
  return filling([&] { return next.get()(fd, buffer, size, flags); }, buffer, size);
}

LODGE_EXPORT ssize_t recvfrom(int fd, void* buffer, size_t size, int flags, __SOCKADDR_ARG address,
                              socklen_t* length) {
  static constinit Next<ssize_t (*)(int, void*, size_t, int, sockaddr*, socklen_t*)> next("recvfrom");
  return filling([&] { return next.get()(fd, buffer, size, flags, address, length); }, buffer, size);
}

LODGE_EXPORT ssize_t recvmsg(int fd, msghdr* message, int flags) {
  static constinit Next<ssize_t (*)(int, msghdr*, int)> next("recvmsg");
  return filling([&] { return next.get()(fd, message, flags); }, message->msg_iov,
                 static_cast<int>(std::min<size_t>(message->msg_iovlen, IOV_MAX + 1)));
}

// Streams and others fill the memory by a system call of the C library's own, which is not seen here and is
// not tried again.
#define LODGE_FREAD(name)                                                           \
  LODGE_EXPORT size_t name(void* buffer, size_t size, size_t count, FILE* stream) { \
    static constinit Next<size_t (*)(void*, size_t, size_t, FILE*)> next(#name);    \
    size_t bytes = 0;                                                               \
    if (!__builtin_mul_overflow(size, count, &bytes)) admit(buffer, bytes);         \
    return next.get()(buffer, size, count, stream);                                 \
  }
LODGE_FREAD(fread)
LODGE_FREAD(fread_unlocked)

#define LODGE_FREAD_CHK(name)                                                                    \
  LODGE_EXPORT size_t name(void* buffer, size_t room, size_t size, size_t count, FILE* stream) { \
    static constinit Next<size_t (*)(void*, size_t, size_t, size_t, FILE*)> next(#name);         \
    size_t bytes = 0;                                                                            \
    if (!__builtin_mul_overflow(size, count, &bytes)) admit(buffer, bytes);                      \
    return next.get()(buffer, room, size, count, stream);                                        \
  }
LODGE_FREAD_CHK(__fread_chk)
LODGE_FREAD_CHK(__fread_unlocked_chk)

LODGE_EXPORT ssize_t getrandom(void* buffer, size_t size, unsigned flags) {
  static constinit Next<ssize_t (*)(void*, size_t, unsigned)> next("getrandom");
  return filling([&] { return next.get()(buffer, size, flags); }, buffer, size);
}

// liburing's, whose results are negative errnos; whatever their arguments are.
LODGE_EXPORT int io_uring_queue_init() noexcept {
  return -EPERM;
}
LODGE_EXPORT int io_uring_queue_init_params() noexcept {
  return -EPERM;
}
LODGE_EXPORT int io_uring_queue_init_mem() noexcept {
  return -EPERM;
}
