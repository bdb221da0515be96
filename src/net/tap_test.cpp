#include "net/tap.hpp"

#include <arpa/inet.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include <fstream>
#include <functional>

#include "base/error.hpp"
#include "base/fd.hpp"
#include "net/testing.hpp"

namespace lodge::net {
namespace {

using testing::Bytes;
using testing::frame_of;
using testing::Listener;
using testing::send;

constexpr int no_namespace = 77;

// In a child with a network of its own, where it may make interfaces; skipped where the host permits none.
// The child's failures are printed and its status tells of them.
void in_own_network(const std::function<void()>& body) {
  const pid_t child = ::fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    const uid_t uid = ::getuid();
    if (uid == 0 ? ::unshare(CLONE_NEWNET) != 0 : ::unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0)
      ::_exit(no_namespace);
    if (uid != 0) std::ofstream("/proc/self/uid_map") << "0 " << uid << " 1";
    if (!Fd(::open("/dev/net/tun", O_RDWR | O_CLOEXEC))) ::_exit(no_namespace);
    try {
      body();
    } catch (const std::exception& error) {
      ADD_FAILURE() << error.what();
    }
    ::_exit(::testing::Test::HasFailure() ? 1 : 0);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  ASSERT_TRUE(WIFEXITED(status)) << "signal " << WTERMSIG(status);
  if (WEXITSTATUS(status) == no_namespace) GTEST_SKIP() << "no network namespace or no /dev/net/tun here";
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

// The host's end of the interface, as any program may open it.
Fd packet_socket(const std::string& name) {
  Fd socket(::socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC, htons(ETH_P_ALL)));
  sockaddr_ll address{};
  address.sll_family = AF_PACKET;
  address.sll_protocol = htons(ETH_P_ALL);
  address.sll_ifindex = static_cast<int>(::if_nametoindex(name.c_str()));
  EXPECT_EQ(::bind(socket.get(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  return socket;
}

Bytes broadcast(uint8_t seed, size_t size = 100) {
  Bytes frame = frame_of(size, seed);
  for (size_t i = 0; i < 6; i++) frame[i] = 0xff, frame[6 + i] = 2;
  frame[12] = 0x88, frame[13] = 0xb5;  // for experiments
  return frame;
}

bool arrives(const Fd& socket, const Bytes& wanted) {
  Bytes got(70'000);
  for (int i = 0; i < 100; i++) {
    const ssize_t count = ::recv(socket.get(), got.data(), got.size(), 0);
    if (count == static_cast<ssize_t>(wanted.size()) && std::equal(wanted.begin(), wanted.end(), got.begin()))
      return true;
  }
  return false;
}

TEST(Tap, CarriesFramesBothWays) {
  in_own_network([] {
    EventLoop loop("test");
    Listener card;
    const auto tap = open_tap({.name = "lodgetap"});
    tap->connect(card, loop);
    const Fd host = packet_socket("lodgetap");
    EXPECT_TRUE(send(*tap, broadcast(1)));
    EXPECT_TRUE(arrives(host, broadcast(1)));
    const Bytes back = broadcast(2);
    EXPECT_EQ(::send(host.get(), back.data(), back.size(), 0), static_cast<ssize_t>(back.size()));
    EXPECT_TRUE(card.saw_frame(back));
    // A card that is full gets it all later.
    card.room = false;
    for (uint8_t i = 3; i < 40; i++) {
      const Bytes next = broadcast(i);
      EXPECT_EQ(::send(host.get(), next.data(), next.size(), 0), static_cast<ssize_t>(next.size()));
    }
    ::usleep(10'000);
    card.room = true;
    tap->receive_ready(0);
    for (uint8_t i = 3; i < 40; i++) EXPECT_TRUE(card.saw_frame(broadcast(i))) << int{i};
    tap->disconnect();
  });
}

// The kernel completes what the guest has left to it, and refuses headers that make no sense.
TEST(Tap, TheKernelDoesWhatIsLeftUndone) {
  in_own_network([] {
    EventLoop loop("test");
    Listener card;
    const auto tap = open_tap({.name = "lodgetap"});
    EXPECT_TRUE(tap->transmit_offloads().tso4);
    EXPECT_TRUE(tap->receive_offloads().checksum);
    tap->connect(card, loop);
    tap->accept({true, true, true, false});
    tap->accept({});
    for (const PacketHeader& odd :
         {PacketHeader{1, 0, 0, 0, 65535, 65535}, PacketHeader{1, 1, 65535, 0, 34, 16},
          PacketHeader{1, 0x7f, 0, 1, 1, 1}, PacketHeader{1, 4, 10, 65535, 14, 0}})
      EXPECT_TRUE(send(*tap, broadcast(1), odd));
    const Fd host = packet_socket("lodgetap");
    EXPECT_TRUE(send(*tap, broadcast(2)));
    EXPECT_TRUE(arrives(host, broadcast(2)));
    tap->disconnect();
  });
}

TEST(Tap, SeveralQueues) {
  in_own_network([] {
    EventLoop loop("test");
    Listener card;
    const auto tap = open_tap({.name = "lodgetap", .queues = 4});
    EXPECT_EQ(tap->queues(), 4u);
    tap->connect(card, loop);
    const Fd host = packet_socket("lodgetap");
    for (const unsigned pairs : {1u, 4u, 2u, 1u, 4u}) {
      tap->use_queues(pairs);
      for (unsigned queue = 0; queue < pairs; queue++) {
        const Bytes frame = broadcast(static_cast<uint8_t>(16 * pairs + queue));
        EXPECT_TRUE(send(*tap, frame, {}, queue));
        EXPECT_TRUE(arrives(host, frame));
      }
      const Bytes back = broadcast(static_cast<uint8_t>(200 + pairs), 80);
      EXPECT_EQ(::send(host.get(), back.data(), back.size(), 0), static_cast<ssize_t>(back.size()));
      EXPECT_TRUE(card.saw_frame(back)) << pairs;
    }
    tap->disconnect();
  });
}

TEST(Tap, OpenDescriptorsAreTakenOver) {
  in_own_network([] {
    for (const short header : {short{IFF_VNET_HDR}, short{0}}) {
      const Fd fd(::open("/dev/net/tun", O_RDWR | O_CLOEXEC));
      ifreq request{};
      std::string("given").copy(request.ifr_name, IFNAMSIZ - 1);
      request.ifr_flags = static_cast<short>(IFF_TAP | IFF_NO_PI | header);
      ASSERT_EQ(::ioctl(fd.get(), TUNSETIFF, &request), 0);
      const Fd socket(::socket(AF_INET, SOCK_DGRAM, 0));
      request.ifr_flags = IFF_UP;
      ASSERT_EQ(::ioctl(socket.get(), SIOCSIFFLAGS, &request), 0);
      EventLoop loop("test");
      Listener card;
      const auto tap = open_tap({.fds = {fd.get()}});
      EXPECT_EQ(tap->transmit_offloads().tso4, header != 0);
      tap->connect(card, loop);
      const Fd host = packet_socket("given");
      EXPECT_TRUE(send(*tap, broadcast(1)));
      EXPECT_TRUE(arrives(host, broadcast(1)));
      const Bytes back = broadcast(2);
      EXPECT_EQ(::send(host.get(), back.data(), back.size(), 0), static_cast<ssize_t>(back.size()));
      EXPECT_TRUE(card.saw_frame(back));
      tap->disconnect();
    }
    const Fd file(::open("/dev/null", O_RDWR));
    EXPECT_THROW(open_tap({.fds = {file.get()}}), UsageError);
  });
}

TEST(Tap, AnInterfaceThatGoesTakesTheLinkAway) {
  in_own_network([] {
    const pid_t maker = ::fork();  // an interface that outlives who has opened it
    if (maker == 0) {
      ::execlp("ip", "ip", "tuntap", "add", "lodgetap", "mode", "tap", nullptr);
      ::_exit(127);
    }
    int status = 0;
    ::waitpid(maker, &status, 0);
    ASSERT_EQ(status, 0) << "ip tuntap add";
    EventLoop loop("test");
    Listener card;
    const auto tap = open_tap({.name = "lodgetap"});
    tap->connect(card, loop);
    EXPECT_THROW(open_tap({.name = "lodgetap"}), UsageError);  // it is in use
    EXPECT_THROW(open_tap({.name = "lo"}), UsageError);
    const pid_t remover = ::fork();
    if (remover == 0) {
      ::execlp("ip", "ip", "link", "del", "lodgetap", nullptr);
      ::_exit(127);
    }
    ::waitpid(remover, &status, 0);
    ASSERT_EQ(status, 0) << "ip link del";
    EXPECT_TRUE(Listener::eventually([&] { return !card.link; }));
    EXPECT_TRUE(send(*tap, broadcast(1)));  // lost
    tap->disconnect();
  });
}

TEST(Tap, WrongNamesAreRefused) {
  EXPECT_THROW(open_tap({.name = ""}), UsageError);
  EXPECT_THROW(open_tap({.name = "a-name-that-is-too-long"}), UsageError);
}

}  // namespace
}  // namespace lodge::net
