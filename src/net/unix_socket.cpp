#include "net/unix_socket.hpp"

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/error.hpp"

namespace lodge::net {

namespace {

bool fill(sockaddr_un& address, const std::string& path) noexcept {
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof address.sun_path) return false;
  std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
  return true;
}

Fd stream_socket() noexcept {
  return Fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
}

}  // namespace

UnixListener::UnixListener(const std::string& path, const std::string& option)
    : path_(path), socket_(stream_socket()) {
  if (!socket_) throw_errno("cannot create a Unix socket");
  sockaddr_un address{};
  if (!fill(address, path))
    usage_error("{}{}: give a path of 1 to {} characters", option, path, sizeof address.sun_path - 1);
  const auto bind = [&] {
    return ::bind(socket_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0 ? 0
                                                                                                   : errno;
  };
  int error = bind();
  if (error == EADDRINUSE) {
    struct stat status {};
    if (::lstat(path.c_str(), &status) != 0 || !S_ISSOCK(status.st_mode))
      usage_error("{}{}: the file is there and is no socket; give another path", option, path);
    const Fd probe = stream_socket();
    if (::connect(probe.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0 ||
        errno != ECONNREFUSED)
      usage_error("{}{}: another process listens there; give another path", option, path);
    ::unlink(path.c_str());
    error = bind();
  }
  if (error != 0)
    usage_error("{}{}: {}; give a path in a folder that you may write", option, path, std::strerror(error));
  if (::listen(socket_.get(), SOMAXCONN) != 0) throw_errno("cannot listen on a Unix socket");
}

UnixListener::~UnixListener() {
  ::unlink(path_.c_str());
}

Fd UnixListener::accept() const noexcept {
  return Fd(::accept4(socket_.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
}

Fd connect_unix(const std::string& path) noexcept {
  sockaddr_un address{};
  Fd socket = stream_socket();
  if (!socket || !fill(address, path) ||
      ::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0)
    return Fd();
  return socket;
}

}  // namespace lodge::net
