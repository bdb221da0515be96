#include "vm/control/socket.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "base/error.hpp"

namespace lodge::vm::control {
namespace {

constexpr std::string_view suffix = ".sock";

sockaddr_un address_of(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof address.sun_path)
    usage_error("control socket '{}': give a path of 1 to {} characters", path, sizeof address.sun_path - 1);
  std::memcpy(address.sun_path, path.data(), path.size());
  return address;
}

Fd make_socket(int flags) {
  Fd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | flags, 0));
  if (!fd) throw_errno("cannot create a Unix socket");
  return fd;
}

// 0, or the errno.
int try_connect(const Fd& fd, const sockaddr_un& address) noexcept {
  return ::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0 ? 0 : errno;
}

// Held while a socket is made or a dead one is removed: of two that find a dead one, neither may remove what
// the other has just made in its place.
Fd lock_directory_of(const std::string& path) {
  const auto parent = std::filesystem::path(path).parent_path();
  const std::string directory = parent.empty() ? "." : parent.string();
  Fd fd(::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd) usage_error("control socket '{}': {}: {}", path, directory, std::strerror(errno));
  if (::flock(fd.get(), LOCK_EX) != 0) throw_errno("flock");
  return fd;
}

// With the directory locked. Nobody listens: not merely a machine that is too busy to accept (EAGAIN).
bool is_dead(const std::string& path) {
  return try_connect(make_socket(SOCK_NONBLOCK), address_of(path)) == ECONNREFUSED;
}

bool is_socket(const std::string& path) {
  struct stat info {};
  return ::lstat(path.c_str(), &info) == 0 && S_ISSOCK(info.st_mode);
}

// In a directory that others may write to, somebody may have been here first.
void check_own_directory(const std::string& path) {
  struct stat info {};
  if (::lstat(path.c_str(), &info) != 0) usage_error("{}: {}", path, std::strerror(errno));
  if (!S_ISDIR(info.st_mode) || info.st_uid != ::geteuid() || (info.st_mode & 077) != 0)
    usage_error(
        "{}: control sockets need a directory of mode 0700 that is yours; remove it, or set "
        "XDG_RUNTIME_DIR",
        path);
}

}  // namespace

std::string socket_directory(bool create) {
  const auto uid = static_cast<unsigned long>(::geteuid());
  const char* runtime = std::getenv("XDG_RUNTIME_DIR");
  std::string path;
  if (runtime && *runtime)
    path = std::string(runtime) + "/lodge";
  else if (const auto usual = fmt::format("/run/user/{}", uid); ::access(usual.c_str(), W_OK) == 0)
    path = usual + "/lodge";
  else
    path = fmt::format("/tmp/lodge-{}", uid);
  if (!create) return path;
  if (::mkdir(path.c_str(), 0700) != 0 && errno != EEXIST)
    usage_error(
        "cannot make the directory {} for control sockets: {}; set XDG_RUNTIME_DIR, or give "
        "--control PATH",
        path, std::strerror(errno));
  check_own_directory(path);
  return path;
}

std::string socket_path(const std::string& name) {
  const auto plain = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' ||
           c == '_' || c == '.';
  };
  if (name.empty() || name.size() > 64 || name[0] == '.' || !std::ranges::all_of(name, plain))
    usage_error(
        "--name: '{}' cannot name a control socket; use 1 to 64 letters, digits, '-', '_' and '.', or "
        "give --control PATH",
        name);
  return socket_directory(false) + "/" + name + std::string(suffix);
}

std::string path_of(const std::string& name_or_path) {
  return name_or_path.find('/') == std::string::npos ? socket_path(name_or_path) : name_or_path;
}

Listener::Listener(const std::string& path) : path_(path), fd_(make_socket(SOCK_NONBLOCK)) {
  const sockaddr_un address = address_of(path);
  const Fd lock = lock_directory_of(path);
  // The socket's own mode is what its file gets: no moment in which it is wider.
  if (::fchmod(fd_.get(), 0600) != 0) throw_errno("fchmod");
  const auto bind = [&] {
    return ::bind(fd_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address);
  };
  int status = bind();
  if (status != 0 && errno == EADDRINUSE) {
    if (!is_socket(path)) usage_error("control socket '{}': the file exists and is no socket", path);
    if (!is_dead(path))
      usage_error("control socket '{}': a running machine has it; choose another --name or --control", path);
    ::unlink(path.c_str());
    status = bind();
  }
  if (status != 0) usage_error("control socket '{}': {}", path, std::strerror(errno));
  if (::listen(fd_.get(), 16) != 0) throw_errno("listen");
  struct stat info {};
  if (::lstat(path.c_str(), &info) == 0) device_ = info.st_dev, inode_ = info.st_ino;
}

Listener::~Listener() {
  struct stat info {};
  // Only what is ours: somebody may have removed it and made another.
  if (::lstat(path_.c_str(), &info) == 0 && info.st_dev == device_ && info.st_ino == inode_)
    ::unlink(path_.c_str());
}

Fd connect_to(const std::string& path) {
  Fd fd = make_socket(0);
  const int error = try_connect(fd, address_of(path));
  if (error == ENOENT || error == ECONNREFUSED)
    usage_error("no machine listens at '{}'; `lodge list` shows those that run", path);
  if (error != 0) usage_error("cannot reach '{}': {}", path, std::strerror(error));
  return fd;
}

std::vector<Named> named_sockets() {
  const std::string directory = socket_directory(false);
  std::vector<Named> found;
  std::error_code missing;
  if (!std::filesystem::is_directory(directory, missing)) return found;
  check_own_directory(directory);
  const Fd lock = lock_directory_of(directory + "/x");
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    const std::string file = entry.path().filename().string(), path = entry.path().string();
    if (!file.ends_with(suffix) || !is_socket(path)) continue;
    if (is_dead(path))
      ::unlink(path.c_str());
    else
      found.push_back({file.substr(0, file.size() - suffix.size()), path});
  }
  std::ranges::sort(found, {}, &Named::name);
  return found;
}

}  // namespace lodge::vm::control
