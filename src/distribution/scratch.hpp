// A directory for what is in the making. It goes with its content at the end; what is mounted in it stays,
// with the directory, since it may be the host's.
#pragma once

#include <sys/types.h>

#include <filesystem>
#include <string>

namespace lodge::distribution {

class ScratchDirectory {
 public:
  // Makes `pattern`, whose last six characters are XXXXXX. Throws std::system_error.
  ScratchDirectory(const std::filesystem::path& pattern, mode_t mode);
  ~ScratchDirectory();
  ScratchDirectory(const ScratchDirectory&) = delete;
  ScratchDirectory& operator=(const ScratchDirectory&) = delete;

  const std::filesystem::path& path() const noexcept { return path_; }
  std::string operator/(const char* name) const { return path_ / name; }

 private:
  std::filesystem::path path_;
};

}  // namespace lodge::distribution
