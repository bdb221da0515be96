// Debian's kernel with a virtio socket device: a program of ours in the guest, Unix sockets here.
#include <fmt/format.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <array>
#include <cstring>

#include "base/fd.hpp"
#include "system/guest.hpp"

namespace lodge {
namespace {

namespace fs = std::filesystem;

class Vsock : public Boot {};

Fd unix_socket(const std::string& path, bool listens) {
  Fd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, path.c_str(), sizeof address.sun_path - 1);
  const auto* where = reinterpret_cast<const sockaddr*>(&address);
  if ((listens ? ::bind : ::connect)(socket.get(), where, sizeof address) != 0) return Fd();
  if (listens && ::listen(socket.get(), 16) != 0) return Fd();
  return socket;
}

// All that comes up to the end, sending `data` at the same time; nothing must wait longer than a minute.
std::string exchange(int fd, const std::string& data, size_t expected) {
  std::string got;
  size_t sent = 0;
  std::array<char, 65536> piece;
  while (got.size() < expected) {
    pollfd ready{fd, static_cast<short>(POLLIN | (sent < data.size() ? POLLOUT : 0)), 0};
    if (::poll(&ready, 1, 60'000) <= 0) break;
    if (ready.revents & POLLOUT) {
      const ssize_t count = ::send(fd, data.data() + sent, data.size() - sent, MSG_DONTWAIT | MSG_NOSIGNAL);
      if (count > 0) sent += static_cast<size_t>(count);
    }
    if (!(ready.revents & (POLLIN | POLLHUP))) continue;
    const ssize_t count =
        ::recv(fd, piece.data(), std::min(piece.size(), expected - got.size()), MSG_DONTWAIT);
    if (count == 0) break;
    if (count > 0) got.append(piece.data(), static_cast<size_t>(count));
  }
  return got;
}

std::string pattern(size_t size) {
  std::string data(size, ' ');
  for (size_t i = 0; i < size; i++) data[i] = static_cast<char>(i * 7 + i / 251);
  return data;
}

TEST_F(Vsock, HostAndGuestTalkOverSockets) {
  NEEDS_GUEST("cloud");
  const TemporaryDirectory directory;
  const std::string path = directory / "vm.sock", extra = directory / "initramfs";
  fs::copy_file(LODGE_GUEST_VSOCK, directory / "vsock");
  ASSERT_EQ(
      testing_support::run(
          {"/bin/sh", "-c", "cd " + directory.path() + " && echo vsock | cpio --quiet -o -H newc >initramfs"},
          Seconds(60))
          .status,
      0);
  const Fd listener = unix_socket(path + "_99", true);
  ASSERT_TRUE(listener);
  Process process(command("cloud", "console=ttyS0 quiet lodge.mode=shell",
                          {"--initrd", extra, "--vsock", "cid=42,path=" + path}));
  ASSERT_TRUE(process.wait_output("This is a shell in the guest.", boot_patience))
      << process.out() << process.err();

  // From the guest.
  process.send("/vsock send 99 1000000\n");
  pollfd coming{listener.get(), POLLIN, 0};
  ASSERT_EQ(::poll(&coming, 1, 60'000), 1) << process.out();
  const Fd peer(::accept(listener.get(), nullptr, nullptr));
  EXPECT_TRUE(exchange(peer.get(), "", 2'000'000) == pattern(1'000'000));
  ASSERT_EQ(::send(peer.get(), "thanks a lot\n", 13, MSG_NOSIGNAL), 13);
  ::shutdown(peer.get(), SHUT_RDWR);
  EXPECT_TRUE(process.wait_output("thanks a lot", answer_patience)) << process.out();

  // From the host: several at once, of which the guest serves one after another.
  process.send("/vsock echo 5000 8\n");
  ASSERT_TRUE(process.wait_output("echo ready=5001", answer_patience)) << process.out();
  std::vector<Fd> clients;
  for (int i = 0; i < 8; i++) {
    clients.push_back(unix_socket(path, false));
    ASSERT_TRUE(clients.back());
    ASSERT_EQ(::send(clients.back().get(), "CONNECT 5000\n", 13, MSG_NOSIGNAL), 13);
  }
  for (const Fd& client : clients) {
    std::string answer;
    for (char c = 0; c != '\n' && ::recv(client.get(), &c, 1, 0) == 1;) answer += c;
    EXPECT_THAT(answer, testing::StartsWith("OK "));
    EXPECT_TRUE(exchange(client.get(), pattern(700'000), 700'000) == pattern(700'000));
    ::shutdown(client.get(), SHUT_WR);
    EXPECT_EQ(exchange(client.get(), "", 1), "");
  }
  // Nobody listens.
  const Fd late = unix_socket(path, false);
  ASSERT_EQ(::send(late.get(), "CONNECT 5001\n", 13, MSG_NOSIGNAL), 13);
  EXPECT_EQ(exchange(late.get(), "", 1), "");
  process.send("/vsock send 98 1; echo refused=$((1+1)); poweroff -f\n");
  EXPECT_TRUE(process.wait_output("refused=2", answer_patience)) << process.out();
  EXPECT_THAT(process.out(), HasSubstr("connect: Connection reset by peer"));
  EXPECT_EQ(process.wait_exit(answer_patience), 0) << process.out() << process.err();
  EXPECT_FALSE(fs::exists(path));
}

}  // namespace
}  // namespace lodge
