// Confinement by openat2(2) of Linux 5.6: RESOLVE_BENEATH and RESOLVE_NO_SYMLINKS in one call, so that there
// is no moment between a check and a use. Everything else works on single names in directories that it has
// opened.
#include "share/folder.hpp"

#include <linux/openat2.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/error.hpp"

namespace lodge::share {

Folder::Folder(const std::string& path) : root_(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {
  if (!root_) {
    const int error = errno;
    usage_error("--share {}: {}; give a folder that you may read", path, std::strerror(error));
  }
  const int error = open(".", name_only).error;
  if (error == ENOSYS || error == EPERM)
    usage_error(
        "--share {}: this host does not allow openat2, without which a folder cannot be confined; it "
        "needs Linux 5.6 or later and no filter that forbids the call",
        path);
  if (error != 0) usage_error("--share {}: {}", path, std::strerror(error));
}

Opened Folder::open(const std::string& path, int flags) const noexcept {
  open_how how{};
  how.flags = static_cast<uint64_t>(flags) | O_CLOEXEC | O_NOFOLLOW;
  how.resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS;
  const long fd = ::syscall(SYS_openat2, root_.get(), path.c_str(), &how, sizeof how);
  if (fd < 0) return {Fd(), errno};
  return {Fd(static_cast<int>(fd)), 0};
}

namespace {
constexpr unsigned wanted = STATX_BASIC_STATS | STATX_BTIME;
}

int status_of(int fd, struct statx& out) noexcept {
  return ::statx(fd, "", AT_EMPTY_PATH, wanted, &out) == 0 ? 0 : errno;
}

int status_of(int directory, const std::string& name, struct statx& out) noexcept {
  return ::statx(directory, name.c_str(), AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT, wanted, &out) == 0 ? 0
                                                                                                    : errno;
}

FileKey key_of(const struct statx& status) noexcept {
  const uint64_t birth =
      status.stx_mask & STATX_BTIME
          ? static_cast<uint64_t>(status.stx_btime.tv_sec) * 1'000'000'000 + status.stx_btime.tv_nsec
          : 0;
  return {uint64_t{status.stx_dev_major} << 32 | status.stx_dev_minor, status.stx_ino, birth,
          uint32_t{status.stx_mode} & S_IFMT};
}

}  // namespace lodge::share
