// The functions that the client calls instead of the C library's: descriptors and signals.
//
// Each looks whether a descriptor is ours, which is one load, and otherwise passes the call on. Nothing is
// set up before the first open of /dev/kvm.
#undef _FORTIFY_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <system_error>

#include "kvm/preload/cancellation.hpp"
#include "kvm/preload/next.hpp"
#include "kvm/preload/signals.hpp"
#include "kvm/preload/table.hpp"

namespace lodge::kvm::preload {
namespace real {

void* next(const char* name) noexcept {
  void* const function = ::dlsym(RTLD_NEXT, name);
  if (function != nullptr) return function;
  std::fprintf(stderr, "liblodge-kvm: the C library has no %s\n", name);
  std::abort();
}

}  // namespace real

namespace {

bool is_kvm(const char* path) noexcept {
  return path != nullptr && std::strcmp(path, "/dev/kvm") == 0;
}

int open_kvm(int flags) noexcept try {
  return table().add(open_system(flags));
} catch (const std::system_error& error) {
  errno = error.code().value();
  return -1;
} catch (...) {
  errno = ENOMEM;
  return -1;
}

bool has_mode(int flags) noexcept {
  return (flags & O_CREAT) != 0 || (flags & O_TMPFILE) == O_TMPFILE;
}

// The mode of a variadic open, which is there only with some flags.
#define LODGE_MODE(flags)                               \
  mode_t mode = 0;                                      \
  if (has_mode(flags)) {                                \
    va_list list;                                       \
    va_start(list, flags);                              \
    mode = static_cast<mode_t>(va_arg(list, unsigned)); \
    va_end(list);                                       \
  }

using Open = int (*)(const char*, int, ...);
using OpenAt = int (*)(int, const char*, int, ...);
using Open2 = int (*)(const char*, int);
using OpenAt2 = int (*)(int, const char*, int);

// A duplicate that the kernel has made, or -1.
int note_copy(int fd, int copy) noexcept {
  if (copy < 0 || copy == fd) return copy;
  const int saved_errno = errno;
  table().duplicate(fd, copy);
  errno = saved_errno;
  return copy;
}

// What dup2() or dup3() has answered. A number that it has not given away is still what it was.
int note_replacement(int fd, int copy, int result) noexcept {
  if (result < 0 || fd == copy) return result;
  const int saved_errno = errno;
  table().remove(copy);
  errno = saved_errno;
  return table().contains(fd) ? note_copy(fd, copy) : result;
}

}  // namespace
}  // namespace lodge::kvm::preload

using namespace lodge::kvm::preload;

#define LODGE_OPEN(name)                                    \
  LODGE_EXPORT int name(const char* path, int flags, ...) { \
    static constinit Next<Open> next(#name);                \
    LODGE_MODE(flags)                                       \
    if (is_kvm(path)) return open_kvm(flags);               \
    return next.get()(path, flags, mode);                   \
  }
#define LODGE_OPENAT(name)                                                 \
  LODGE_EXPORT int name(int directory, const char* path, int flags, ...) { \
    static constinit Next<OpenAt> next(#name);                             \
    LODGE_MODE(flags)                                                      \
    if (is_kvm(path)) return open_kvm(flags);                              \
    return next.get()(directory, path, flags, mode);                       \
  }
#define LODGE_OPEN_2(name)                             \
  LODGE_EXPORT int name(const char* path, int flags) { \
    static constinit Next<Open2> next(#name);          \
    if (is_kvm(path)) return open_kvm(flags);          \
    return next.get()(path, flags);                    \
  }
#define LODGE_OPENAT_2(name)                                          \
  LODGE_EXPORT int name(int directory, const char* path, int flags) { \
    static constinit Next<OpenAt2> next(#name);                       \
    if (is_kvm(path)) return open_kvm(flags);                         \
    return next.get()(directory, path, flags);                        \
  }

LODGE_OPEN(open)
LODGE_OPEN(open64)
LODGE_OPENAT(openat)
LODGE_OPENAT(openat64)
LODGE_OPEN_2(__open_2)
LODGE_OPEN_2(__open64_2)
LODGE_OPENAT_2(__openat_2)
LODGE_OPENAT_2(__openat64_2)

LODGE_EXPORT int access(const char* path, int mode) noexcept {
  static constinit Next<int (*)(const char*, int)> next("access");
  return is_kvm(path) && (mode & X_OK) == 0 ? 0 : next.get()(path, mode);
}

LODGE_EXPORT int faccessat(int directory, const char* path, int mode, int flags) noexcept {
  static constinit Next<int (*)(int, const char*, int, int)> next("faccessat");
  return is_kvm(path) && (mode & X_OK) == 0 ? 0 : next.get()(directory, path, mode, flags);
}

namespace {

int answer(int fd, unsigned long request, unsigned long argument) noexcept {
  const auto file = table().find(fd);
  // The kernel takes 32 bits of the request, which some callers extend by its sign.
  return file ? file->ioctl(request & 0xffffffff, argument) : -EBADF;
}

// What the kernel answers for every descriptor itself (ioctl_list(2), fs/ioctl.c).
bool is_any_files(unsigned long request) noexcept {
  return request == FIOCLEX || request == FIONCLEX || request == FIONBIO || request == FIOASYNC;
}

}  // namespace

// ioctl, but for what the C library's header promises of it: a cancelled thread ends here, by an exception.
LODGE_EXPORT int cancellable_ioctl(int fd, unsigned long request, ...) __asm__("ioctl");
int cancellable_ioctl(int fd, unsigned long request, ...) {
  static constinit Next<int (*)(int, unsigned long, ...)> next("ioctl");
  va_list list;
  va_start(list, request);
  const auto argument = va_arg(list, unsigned long);
  va_end(list);
  const bool held_back = hold_back_cancellation();
  if (!table().contains(fd) || is_any_files(request)) {
    if (held_back) admit_cancellation();
    return next.get()(fd, request, argument);
  }
  const int result = answer(fd, request, argument);
  if (held_back) admit_cancellation();
  if (result >= 0) return result;
  errno = -result;
  return -1;
}

LODGE_EXPORT int close(int fd) {
  static constinit Next<int (*)(int)> next("close");
  table().remove(fd);
  return next.get()(fd);
}

// The C library closes the descriptor by itself.
LODGE_EXPORT int fclose(FILE* stream) {
  static constinit Next<int (*)(FILE*)> next("fclose");
  if (const int fd = ::fileno(stream); fd >= 0) table().remove(fd);
  return next.get()(stream);
}

LODGE_EXPORT int close_range(unsigned first, unsigned last, int flags) noexcept {
  static constinit Next<int (*)(unsigned, unsigned, int)> next("close_range");
  // First a range that holds no descriptor: where the kernel does not know the call, or these flags, nothing
  // is closed.
  if (const int result = next.get()(~0u, ~0u, flags); result != 0) return result;
  if ((static_cast<unsigned>(flags) & 4u /* CLOSE_RANGE_CLOEXEC */) == 0) table().remove_range(first, last);
  return next.get()(first, last, flags);
}

LODGE_EXPORT void closefrom(int first) noexcept {
  static constinit Next<void (*)(int)> next("closefrom");
  table().remove_range(first < 0 ? 0u : static_cast<unsigned>(first), ~0u);
  next.get()(first);
}

LODGE_EXPORT int dup(int fd) noexcept {
  static constinit Next<int (*)(int)> next("dup");
  const int copy = next.get()(fd);
  return table().contains(fd) ? note_copy(fd, copy) : copy;
}

LODGE_EXPORT int dup2(int fd, int copy) noexcept {
  static constinit Next<int (*)(int, int)> next("dup2");
  return note_replacement(fd, copy, next.get()(fd, copy));
}

LODGE_EXPORT int dup3(int fd, int copy, int flags) noexcept {
  static constinit Next<int (*)(int, int, int)> next("dup3");
  return note_replacement(fd, copy, next.get()(fd, copy, flags));
}

#define LODGE_FCNTL(name)                                                   \
  LODGE_EXPORT int name(int fd, int command, ...) {                         \
    static constinit Next<int (*)(int, int, ...)> next(#name);              \
    va_list list;                                                           \
    va_start(list, command);                                                \
    const auto argument = va_arg(list, unsigned long);                      \
    va_end(list);                                                           \
    const int result = next.get()(fd, command, argument);                   \
    const bool copies = command == F_DUPFD || command == F_DUPFD_CLOEXEC;   \
    return copies && table().contains(fd) ? note_copy(fd, result) : result; \
  }

LODGE_FCNTL(fcntl)
LODGE_FCNTL(fcntl64)

// --- signals ---

namespace lodge::kvm::preload::real {

int sigaction(int number, const struct sigaction* action, struct sigaction* old) noexcept {
  static constinit Next<int (*)(int, const struct sigaction*, struct sigaction*)> next("sigaction");
  return next.get()(number, action, old);
}

}  // namespace lodge::kvm::preload::real

// The soft accelerator's own handlers are no client's: the linker sends its calls here (--wrap).
// NOLINTNEXTLINE(bugprone-reserved-identifier): the linker's name
extern "C" int __wrap_sigaction(int number, const struct sigaction* action, struct sigaction* old) noexcept {
  return real::sigaction(number, action, old);
}

LODGE_EXPORT int sigaction(int number, const struct sigaction* action, struct sigaction* old) noexcept {
  return client_sigaction(number, action, old);
}

namespace {

sighandler_t set_handler(int number, sighandler_t handler, int flags) noexcept {
  struct sigaction action {};
  struct sigaction old {};
  action.sa_handler = handler;
  action.sa_flags = flags;
  ::sigemptyset(&action.sa_mask);
  return client_sigaction(number, &action, &old) == 0 ? old.sa_handler : SIG_ERR;
}

}  // namespace

LODGE_EXPORT sighandler_t signal(int number, sighandler_t handler) noexcept {
  return set_handler(number, handler, SA_RESTART);
}

LODGE_EXPORT sighandler_t bsd_signal(int number, sighandler_t handler) noexcept {
  return set_handler(number, handler, SA_RESTART);
}

LODGE_EXPORT sighandler_t sysv_signal(int number, sighandler_t handler) noexcept {
  return set_handler(number, handler, static_cast<int>(SA_RESETHAND) | SA_NODEFER);
}

LODGE_EXPORT sighandler_t __sysv_signal(int number, sighandler_t handler) noexcept {
  return set_handler(number, handler, static_cast<int>(SA_RESETHAND) | SA_NODEFER);
}

LODGE_EXPORT int sigignore(int number) noexcept {
  return set_handler(number, SIG_IGN, 0) == SIG_ERR ? -1 : 0;
}

LODGE_EXPORT sighandler_t sigset(int number, sighandler_t handler) noexcept {
  sigset_t one, before;
  ::sigemptyset(&one);
  if (::sigaddset(&one, number) != 0) return SIG_ERR;
  sighandler_t old = SIG_ERR;
  if (handler == SIG_HOLD) {
    struct sigaction action {};
    if (client_sigaction(number, nullptr, &action) != 0) return SIG_ERR;
    old = action.sa_handler;
  } else if (old = set_handler(number, handler, 0); old == SIG_ERR) {
    return SIG_ERR;
  }
  if (::sigprocmask(handler == SIG_HOLD ? SIG_BLOCK : SIG_UNBLOCK, &one, &before) != 0) return SIG_ERR;
  return ::sigismember(&before, number) == 1 ? SIG_HOLD : old;
}

LODGE_EXPORT int siginterrupt(int number, int interrupt) noexcept {
  struct sigaction action {};
  if (client_sigaction(number, nullptr, &action) != 0) return -1;
  if (interrupt != 0)
    action.sa_flags &= ~SA_RESTART;
  else
    action.sa_flags |= SA_RESTART;
  return client_sigaction(number, &action, nullptr);
}

LODGE_EXPORT int pthread_sigmask(int how, const sigset_t* set, sigset_t* old) noexcept {
  static constinit Next<int (*)(int, const sigset_t*, sigset_t*)> next("pthread_sigmask");
  sigset_t room;
  return next.get()(how, without_alarm(how, set, room), old);
}

LODGE_EXPORT int sigprocmask(int how, const sigset_t* set, sigset_t* old) noexcept {
  static constinit Next<int (*)(int, const sigset_t*, sigset_t*)> next("sigprocmask");
  sigset_t room;
  return next.get()(how, without_alarm(how, set, room), old);
}
