// Runs in guests, linked statically: the other end of the vsock tests, since BusyBox knows no AF_VSOCK.
//   vsock echo PORT N     serves N connections one after another: all that comes goes back
//   vsock send PORT N     sends N bytes to the host's PORT, says that this is all, and prints what comes back
#include <linux/vm_sockets.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace {

sockaddr_vm address(unsigned cid, unsigned port) {
  sockaddr_vm to{};
  to.svm_family = AF_VSOCK;
  to.svm_cid = cid;
  to.svm_port = port;
  return to;
}

bool write_all(int fd, const char* data, size_t size) {
  while (size > 0) {
    const ssize_t count = ::write(fd, data, size);
    if (count <= 0) return false;
    data += count, size -= static_cast<size_t>(count);
  }
  return true;
}

int echo(unsigned port, unsigned connections) {
  const int listener = ::socket(AF_VSOCK, SOCK_STREAM, 0);
  const sockaddr_vm here = address(VMADDR_CID_ANY, port);
  if (::bind(listener, reinterpret_cast<const sockaddr*>(&here), sizeof here) != 0 ||
      ::listen(listener, 16) != 0)
    return std::perror("listen"), 1;
  std::printf("echo ready=%u\n", port + 1);
  std::fflush(stdout);
  for (unsigned i = 0; i < connections; i++) {
    const int peer = ::accept(listener, nullptr, nullptr);
    static char piece[65536];
    for (ssize_t count; (count = ::read(peer, piece, sizeof piece)) > 0;)
      if (!write_all(peer, piece, static_cast<size_t>(count))) break;
    ::close(peer);
  }
  return 0;
}

int send(unsigned port, size_t size) {
  const int peer = ::socket(AF_VSOCK, SOCK_STREAM, 0);
  const sockaddr_vm there = address(VMADDR_CID_HOST, port);
  if (::connect(peer, reinterpret_cast<const sockaddr*>(&there), sizeof there) != 0)
    return std::perror("connect"), 1;
  std::string data(size, ' ');
  for (size_t i = 0; i < size; i++) data[i] = static_cast<char>(i * 7 + i / 251);
  if (!write_all(peer, data.data(), data.size())) return std::perror("write"), 1;
  ::shutdown(peer, SHUT_WR);
  char piece[4096];
  for (ssize_t count; (count = ::read(peer, piece, sizeof piece)) > 0;)
    std::fwrite(piece, 1, static_cast<size_t>(count), stdout);
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) return 2;
  const auto port = static_cast<unsigned>(std::atoi(arguments[2]));
  const auto number = static_cast<unsigned>(std::atoi(arguments[3]));
  return std::strcmp(arguments[1], "echo") == 0 ? echo(port, number) : send(port, number);
}
