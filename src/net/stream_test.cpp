#include "net/stream.hpp"

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>

#include <cstring>
#include <fstream>
#include <random>
#include <tuple>

#include "base/error.hpp"
#include "base/fd.hpp"
#include "base/temporary_directory.hpp"
#include "net/testing.hpp"

namespace lodge::net {
namespace {

using testing::Bytes;
using testing::frame_of;
using testing::Listener;
using testing::send;

class StreamTest : public ::testing::Test {
 protected:
  const TemporaryDirectory directory;
  const std::string path = directory / "socket";
  EventLoop loop{"test"};

  // The other end as a program that speaks whatever it likes.
  Fd raw_peer() const {
    Fd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_un name{};
    name.sun_family = AF_UNIX;
    path.copy(name.sun_path, sizeof name.sun_path - 1);
    EXPECT_EQ(::connect(socket.get(), reinterpret_cast<sockaddr*>(&name), sizeof name), 0);
    return socket;
  }
  static Bytes framed(const Bytes& frame) {
    const uint32_t length = htonl(static_cast<uint32_t>(frame.size()));
    Bytes all(4 + frame.size());
    std::memcpy(all.data(), &length, 4);
    std::copy(frame.begin(), frame.end(), all.begin() + 4);
    return all;
  }
  static void write(const Fd& socket, const Bytes& bytes) {
    EXPECT_EQ(::send(socket.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL),
              static_cast<ssize_t>(bytes.size()));
  }
  static bool closed(const Fd& socket) {
    char byte;
    return ::recv(socket.get(), &byte, 1, 0) <= 0;
  }
};

TEST_F(StreamTest, CarriesFramesBothWays) {
  for (const std::string& address : {path, std::string("127.0.0.1:28761")}) {
    Listener first, second;
    const auto one = open_stream({.listen = address, .reconnect_ms = 10});
    const auto two = open_stream({.connect = address, .reconnect_ms = 10});
    one->connect(first, loop);
    two->connect(second, loop);
    ASSERT_TRUE(Listener::eventually([&] { return first.link && second.link; }));
    for (const size_t size : {size_t{14}, size_t{60}, size_t{1514}, max_frame}) {
      EXPECT_TRUE(send(*one, frame_of(size)));
      EXPECT_TRUE(second.saw_frame(frame_of(size))) << size;
      EXPECT_TRUE(send(*two, frame_of(size, 9)));
      EXPECT_TRUE(first.saw_frame(frame_of(size, 9))) << size;
    }
    one->disconnect();
    two->disconnect();
  }
}

TEST_F(StreamTest, TheLinkFollowsThePeer) {
  Listener first, second;
  auto two = open_stream({.connect = path, .reconnect_ms = 10});  // before anybody listens
  two->connect(second, loop);
  EXPECT_FALSE(second.link);
  EXPECT_TRUE(send(*two, frame_of(60)));  // lost
  auto one = open_stream({.listen = path, .reconnect_ms = 10});
  one->connect(first, loop);
  EXPECT_TRUE(Listener::eventually([&] { return first.link && second.link; }));
  for (unsigned i = 0; i < 3; i++) {  // and again
    two.reset();
    EXPECT_TRUE(Listener::eventually([&] { return !first.link; }));
    two = open_stream({.connect = path, .reconnect_ms = 10});
    two->connect(second, loop);
    EXPECT_TRUE(Listener::eventually([&] { return first.link && second.link; }));
    EXPECT_TRUE(send(*one, frame_of(100, static_cast<uint8_t>(i))));
    EXPECT_TRUE(second.saw_frame(frame_of(100, static_cast<uint8_t>(i))));
  }
  one.reset();
  EXPECT_TRUE(Listener::eventually([&] { return !second.link; }));
  one = open_stream({.listen = path});
  EXPECT_TRUE(Listener::eventually([&] { return second.link.load(); }));
}

TEST_F(StreamTest, AGuestThatIsFullKeepsThePeerWaiting) {
  Listener first, second;
  const auto one = open_stream({.listen = path, .reconnect_ms = 10});
  const auto two = open_stream({.connect = path, .reconnect_ms = 10});
  one->connect(first, loop);
  two->connect(second, loop);
  ASSERT_TRUE(Listener::eventually([&] { return first.link && second.link; }));
  first.room = false;
  unsigned sent = 0;
  while (sent < 100'000 && send(*two, frame_of(1000, static_cast<uint8_t>(sent)))) sent++;
  ASSERT_LT(sent, 100'000u);
  EXPECT_EQ(second.ready, 0u);
  first.room = true;
  one->receive_ready(0);
  EXPECT_TRUE(Listener::eventually([&] { return second.ready > 0 && first.frames().size() == sent; }));
  const auto frames = first.frames();
  for (unsigned i = 0; i < sent; i++) ASSERT_EQ(frames[i], frame_of(1000, static_cast<uint8_t>(i))) << i;
}

TEST_F(StreamTest, WhatTheGuestLeftUndoneIsDone) {
  Listener first;
  const auto one = open_stream({.listen = path});
  one->connect(first, loop);
  const Fd peer = raw_peer();
  ASSERT_TRUE(Listener::eventually([&] { return first.link.load(); }));
  // An IPv4 TCP packet of 3000 bytes of payload for segments of 1000.
  Bytes frame(54 + 3000);
  frame[12] = 8, frame[14] = 0x45, frame[23] = 6, frame[46] = 0x50;
  EXPECT_TRUE(send(*one, frame, {PacketHeader::NEEDS_CSUM, PacketHeader::GSO_TCPV4, 54, 1000, 34, 16}));
  for (unsigned i = 0; i < 3; i++) {
    Bytes got(4 + 1054);
    ASSERT_EQ(::recv(peer.get(), got.data(), got.size(), MSG_WAITALL), static_cast<ssize_t>(got.size()));
    EXPECT_EQ(got[2] << 8 | got[3], 1054);
    EXPECT_EQ(got[4 + 40] << 8 | got[4 + 41], static_cast<int>(i * 1000));
  }
}

TEST_F(StreamTest, OneThatBreaksTheProtocolIsDisconnected) {
  Listener first;
  const auto one = open_stream({.listen = path, .reconnect_ms = 10});
  one->connect(first, loop);
  for (const Bytes& wrong : {Bytes{0, 0, 0, 0}, Bytes{0xff, 0xff, 0xff, 0xff}, Bytes{0, 1, 0, 18, 1}}) {
    const Fd peer = raw_peer();
    write(peer, framed(frame_of(60)));
    write(peer, wrong);
    EXPECT_TRUE(closed(peer));
  }
  const Fd peer = raw_peer();      // the next one is served as if nothing had been
  write(peer, framed({1, 2, 3}));  // too short for a frame: ignored
  write(peer, framed(frame_of(70)));
  EXPECT_TRUE(first.saw_frame(frame_of(70)));
}

TEST_F(StreamTest, PiecesOfAnySizeMakeFrames) {
  Listener first;
  const auto one = open_stream({.listen = path, .reconnect_ms = 10});
  one->connect(first, loop);
  const Fd peer = raw_peer();
  std::mt19937 random(3);
  Bytes all;
  for (unsigned i = 0; i < 300; i++) {
    const Bytes one_frame = framed(frame_of(14 + random() % 3000, static_cast<uint8_t>(i)));
    all.insert(all.end(), one_frame.begin(), one_frame.end());
  }
  for (size_t at = 0; at < all.size();) {
    const size_t count = std::min<size_t>(all.size() - at, 1 + random() % 4000);
    write(peer,
          Bytes(all.begin() + static_cast<ptrdiff_t>(at), all.begin() + static_cast<ptrdiff_t>(at + count)));
    at += count;
  }
  ASSERT_TRUE(Listener::eventually([&] { return first.frames().size() == 300; }));
  Bytes got;
  for (const Bytes& frame : first.frames()) {
    const Bytes again = framed(frame);
    got.insert(got.end(), again.begin(), again.end());
  }
  EXPECT_EQ(got, all);
}

TEST_F(StreamTest, WrongAddressesAreRefused) {
  for (const char* wrong :
       {"", "nothing", ":1", "example.org:1", "127.0.0.1:x", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536"})
    EXPECT_THROW(open_stream({.listen = wrong}), UsageError) << wrong;
  EXPECT_THROW(open_stream({.listen = "/no/such/directory/socket"}), UsageError);
  EXPECT_THROW(open_stream({.listen = "/" + std::string(200, 'x')}), UsageError);
  EXPECT_THROW(open_stream({.listen = path, .connect = path}), UsageError);
  std::ofstream(path) << "a file";
  EXPECT_THROW(open_stream({.listen = path}), UsageError);  // and is left alone
  EXPECT_TRUE(std::ifstream(path).good());
  ::unlink(path.c_str());
  const auto one = open_stream({.listen = path});
  EXPECT_THROW(open_stream({.listen = path}), UsageError);
}

// QEMU's own user-mode network at the other end of the cable, with both of its back ends: who has 10.0.2.2?
// No machine runs, so it takes a moment only.
class QemuPeer : public StreamTest, public ::testing::WithParamInterface<std::tuple<bool, bool>> {
 protected:
  ~QemuPeer() override {
    if (process_ <= 0) return;
    ::kill(process_, SIGKILL);
    ::waitpid(process_, nullptr, 0);
  }
  void start(const std::string& netdev) {
    process_ = ::fork();
    if (process_ != 0) return;
    ::execl("/usr/bin/qemu-system-x86_64", "qemu-system-x86_64", "-M", "none", "-nodefaults", "-display",
            "none", "-netdev", "user,id=user", "-netdev", "hubport,id=port1,hubid=0,netdev=user", "-netdev",
            (netdev + ",id=cable").c_str(), "-netdev", "hubport,id=port2,hubid=0,netdev=cable",
            static_cast<char*>(nullptr));
    ::_exit(127);
  }
  pid_t process_ = 0;
};
INSTANTIATE_TEST_SUITE_P(Sides, QemuPeer, ::testing::Combine(::testing::Bool(), ::testing::Bool()));

TEST_P(QemuPeer, AnswersOverTheCable) {
  if (::access("/usr/bin/qemu-system-x86_64", X_OK) != 0) GTEST_SKIP() << "no QEMU here";
  const auto [listens, old] = GetParam();
  // `-netdev socket` knows no Unix sockets.
  const std::string address = !old ? path : listens ? "127.0.0.1:28763" : "127.0.0.1:28764";
  const std::string theirs = old ? address : "addr.type=unix,addr.path=" + path;
  StreamConfig config{.reconnect_ms = 10};
  (listens ? config.listen : config.connect) = address;
  Listener card;
  const auto stream = open_stream(config);
  stream->connect(card, loop);
  if (old)
    start(std::string("socket,") + (listens ? "connect=" : "listen=") + theirs);
  else
    start(std::string("stream,server=") + (listens ? "off," : "on,") + theirs);
  ASSERT_TRUE(Listener::eventually([&] { return card.link.load(); }, 60'000));
  Bytes request(60);
  const uint8_t bytes[] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x52, 0x54, 0,    1,    2,  3, 8, 6,
                           0,    1,    8,    0,    6,    4,    0,    1,    0x52, 0x54, 0,  1, 2, 3,
                           10,   0,    2,    15,   0,    0,    0,    0,    0,    0,    10, 0, 2, 2};
  std::copy(std::begin(bytes), std::end(bytes), request.begin());
  // The other side of its hub may not be there yet.
  const auto answer = [](const Bytes& frame) {
    return frame.size() >= 42 && frame[12] == 8 && frame[13] == 6 && frame[21] == 2;
  };
  for (unsigned i = 0; i < 60 && !card.saw(answer, 1); i++) {
    EXPECT_TRUE(send(*stream, request));
    card.saw(answer, 1000);
  }
  EXPECT_TRUE(card.saw(answer, 1));
  stream->disconnect();
}

}  // namespace
}  // namespace lodge::net
