#include "distribution/scratch.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "base/error.hpp"

namespace lodge::distribution {
namespace {

namespace fs = std::filesystem;

// Whether it can be told that nothing is mounted there.
bool mounted(const fs::path& path) {
  struct statx status {};
  return ::statx(AT_FDCWD, path.c_str(), AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT, 0, &status) != 0 ||
         (status.stx_attributes & STATX_ATTR_MOUNT_ROOT) != 0;
}

bool holds_mount(const fs::path& root) {
  for (fs::recursive_directory_iterator entry(root, fs::directory_options::none), end; entry != end; ++entry)
    if (mounted(entry->path())) return true;
  return false;
}

}  // namespace

ScratchDirectory::ScratchDirectory(const fs::path& pattern, mode_t mode) {
  std::string text = pattern.string();
  if (!::mkdtemp(text.data())) throw_errno(text);
  path_ = text;
  ::chmod(path_.c_str(), mode);
}

ScratchDirectory::~ScratchDirectory() {
  std::error_code error;
  if (::rmdir(path_.c_str()) == 0) return;
  try {
    if (!holds_mount(path_)) fs::remove_all(path_, error);
  } catch (const fs::filesystem_error&) {
    // A part of it belongs to others; it is named below.
  }
  if (fs::exists(path_, error)) fmt::print(stderr, "lodge: {}: could not be removed\n", path_.string());
}

}  // namespace lodge::distribution
