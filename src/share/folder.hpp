// A folder of the host that others may reach into, and nothing but that folder.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>

#include <compare>
#include <cstdint>
#include <string>

#include "base/fd.hpp"

namespace lodge::share {

// What makes a file that file and no other. With the time of its birth, where the file system tells, since
// numbers of inodes are used again.
struct FileKey {
  uint64_t device = 0, inode = 0, birth = 0;
  uint32_t type = 0;  // S_IFMT
  auto operator<=>(const FileKey&) const = default;
};

// A descriptor, or the reason (errno) why there is none.
struct Opened {
  Fd fd;
  int error = 0;
};

// Any thread.
class Folder {
 public:
  // Throws UsageError naming --share: the folder cannot be opened, or the host's kernel cannot confine.
  explicit Folder(const std::string& path);

  // Opens what lies at `path` below the folder: "." or names joined by '/'. Whatever others rename meanwhile,
  // nothing outside the folder is opened: symbolic links are not followed, not even inside.
  Opened open(const std::string& path, int flags) const noexcept;
  int fd() const noexcept { return root_.get(); }

 private:
  Fd root_;
};

// A descriptor that names a file without opening it (O_PATH).
inline constexpr int name_only = O_PATH | O_NOFOLLOW;

// statx(2) of an open descriptor, or of `name` (no '/') in an open directory, without following a link. 0 or
// errno.
int status_of(int fd, struct statx& out) noexcept;
int status_of(int directory, const std::string& name, struct statx& out) noexcept;
FileKey key_of(const struct statx& status) noexcept;

}  // namespace lodge::share
