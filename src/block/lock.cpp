#include "block/lock.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <charconv>
#include <filesystem>
#include <fstream>
#include <memory>

#include "base/error.hpp"

namespace lodge::block {
namespace {

constexpr off_t used_base = 100, unshared_base = 200;

struct Permission {
  int bit;
  bool used_by_reader, used_by_writer;
  bool shared_by_reader, shared_by_writer;
};
// A writer keeps readers away because it unshares nothing that they use, but they unshare what it uses.
constexpr std::array<Permission, 3> permissions{{
    {0, true, true, true, true},     // consistent read
    {1, false, true, false, false},  // write
    {3, false, true, false, false},  // resize
}};

int set_byte(int fd, off_t byte, bool locked) {
  struct flock range {};
  range.l_type = locked ? F_RDLCK : F_UNLCK;
  range.l_whence = SEEK_SET;
  range.l_start = byte;
  range.l_len = 1;
  return ::fcntl(fd, F_OFD_SETLK, &range) == 0 ? 0 : errno;
}

bool held_by_another(int fd, off_t byte) {
  struct flock range {};
  range.l_type = F_WRLCK;
  range.l_whence = SEEK_SET;
  range.l_start = byte;
  range.l_len = 1;
  return ::fcntl(fd, F_OFD_GETLK, &range) == 0 && range.l_type != F_UNLCK;
}

// Does descriptor `number` of process `pid` hold a lock on `byte`? /proc/PID/fdinfo/FD lists the locks that
// were taken through it: "lock:\t1: OFDLCK  ADVISORY  READ -1 08:01:42 100 101".
bool holds(const std::string& fdinfo, off_t byte) {
  std::ifstream lines(fdinfo);
  for (std::string line; std::getline(lines, line);) {
    if (!line.starts_with("lock:")) continue;
    const auto last = line.rfind(' ');
    const auto before = last == std::string::npos ? last : line.rfind(' ', last - 1);
    if (before == std::string::npos) continue;
    off_t start = 0, end = 0;
    std::from_chars(line.data() + before + 1, line.data() + last, start);
    if (line.substr(last + 1) == "EOF")
      end = byte;
    else
      std::from_chars(line.data() + last + 1, line.data() + line.size(), end);
    if (start <= byte && byte <= end) return true;
  }
  return false;
}

// "qemu-system-x86 (process 123)", or what is known when /proc does not show it (another user's process).
std::string holder(int fd, off_t byte) {
  struct stat image {};
  if (::fstat(fd, &image) != 0) return "another process";
  std::error_code error;
  for (const auto& process : std::filesystem::directory_iterator("/proc", error)) {
    const std::string pid = process.path().filename();
    if (pid.find_first_not_of("0123456789") != std::string::npos) continue;
    std::error_code hidden;
    for (const auto& entry : std::filesystem::directory_iterator(process.path() / "fd", hidden)) {
      struct stat target {};
      if (::stat(entry.path().c_str(), &target) != 0 || target.st_dev != image.st_dev ||
          target.st_ino != image.st_ino)
        continue;
      const std::string number = entry.path().filename();
      if (pid == std::to_string(::getpid()) && number == std::to_string(fd)) continue;
      if (!holds(process.path() / "fdinfo" / number, byte)) continue;
      std::string name;
      std::getline(std::ifstream(process.path() / "comm"), name);
      return fmt::format("{} (process {})", name.empty() ? "a program" : name, pid);
    }
  }
  return "a process of another user";
}

}  // namespace

void lock_image(const Fd& fd, const std::string& path, Use use) {
  const bool writer = use == Use::write;
  // First take, then look at the others: of two that start at once at least one sees the other.
  for (const auto& p : permissions) {
    for (const auto& [byte, locked] :
         {std::pair{used_base + p.bit, writer ? p.used_by_writer : p.used_by_reader},
          std::pair{unshared_base + p.bit, !(writer ? p.shared_by_writer : p.shared_by_reader)}}) {
      if (const int error = set_byte(fd.get(), byte, locked)) {
        usage_error("{}: cannot be locked ({}); use a file system with open file description locks", path,
                    std::generic_category().message(error));
      }
    }
  }
  for (const auto& p : permissions) {
    const off_t unshared = unshared_base + p.bit, used = used_base + p.bit;
    if ((writer ? p.used_by_writer : p.used_by_reader) && held_by_another(fd.get(), unshared)) {
      usage_error("{}: cannot be {}: it is in use by {}; end that first{}", path, writer ? "written" : "read",
                  holder(fd.get(), unshared),
                  writer ? ", or open the image read-only or with a temporary overlay" : "");
    }
    if (!(writer ? p.shared_by_writer : p.shared_by_reader) && held_by_another(fd.get(), used)) {
      usage_error("{}: cannot be {}: {} is writing it; end that first", path, writer ? "written" : "read",
                  holder(fd.get(), used));
    }
  }
}

}  // namespace lodge::block
