// The guest's TCP connections of user-mode networking: a small TCP of the test's is the guest, sockets of the
// test's are the host's programs.
#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>

#include <cstring>
#include <map>
#include <random>
#include <thread>

#include "base/fd.hpp"
#include "net/offload.hpp"
#include "net/tcp_segment.hpp"
#include "net/testing.hpp"
#include "net/user.hpp"
#include "net/wire.hpp"

namespace lodge::net {
namespace {

using testing::Bytes;
using testing::frame_of;
using testing::Listener;

constexpr std::array<uint8_t, 6> guest_mac = {0x52, 0x54, 0, 1, 2, 3}, host_mac = {0x52, 0x55, 10, 0, 2, 2};

// A listening socket of the host's, with the smallest buffers there are.
class Server {
 public:
  explicit Server(int family = AF_INET) : socket_(::socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    const int small = 1;
    ::setsockopt(socket_.get(), SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    sockaddr_in6 address{};
    socklen_t size = family == AF_INET ? sizeof(sockaddr_in) : sizeof address;
    if (family == AF_INET6) {
      address.sin6_family = AF_INET6;
      address.sin6_addr = IN6ADDR_LOOPBACK_INIT;
    } else {
      sockaddr_in ip4{};
      ip4.sin_family = AF_INET;
      ip4.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
      std::memcpy(&address, &ip4, sizeof ip4);
    }
    usable_ = ::bind(socket_.get(), reinterpret_cast<sockaddr*>(&address), size) == 0 &&
              ::listen(socket_.get(), 64) == 0;
    ::getsockname(socket_.get(), reinterpret_cast<sockaddr*>(&address), &size);
    port_ = ntohs(address.sin6_port);  // where that of IPv4 is, too
  }
  bool usable() const noexcept { return usable_; }
  uint16_t port() const noexcept { return port_; }
  // Waits for a connection; what the test expects never takes a minute.
  Fd accept() const {
    pollfd ready{socket_.get(), POLLIN, 0};
    EXPECT_EQ(::poll(&ready, 1, 60'000), 1);
    Fd socket(::accept4(socket_.get(), nullptr, nullptr, SOCK_CLOEXEC));
    const timeval patience{60, 0};
    ::setsockopt(socket.get(), SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    ::setsockopt(socket.get(), SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    return socket;
  }

 private:
  Fd socket_;
  bool usable_ = false;
  uint16_t port_ = 0;
};

void write_all(const Fd& socket, const Bytes& bytes) {
  for (size_t done = 0; done < bytes.size();) {
    const ssize_t count = ::send(socket.get(), bytes.data() + done, bytes.size() - done, MSG_NOSIGNAL);
    ASSERT_GT(count, 0);
    done += static_cast<size_t>(count);
  }
}
// Until the other side ends.
Bytes read_all(const Fd& socket) {
  Bytes all;
  std::array<uint8_t, 5000> some;
  for (;;) {
    const ssize_t count = ::recv(socket.get(), some.data(), some.size(), 0);
    if (count <= 0) break;
    all.insert(all.end(), some.begin(), some.begin() + count);
  }
  return all;
}

// One end of a connection in the guest. It never sends anything twice and never asks again, so that whatever
// the network forgets to say is missed for ever.
struct Stream {
  TcpEnds ends;
  uint32_t next = 1000, acknowledged = 1000, expected = 0, edge = 0;
  int scale = 0;
  uint16_t window = 65535;
  bool open = false, ended = false, reset = false, end_sent = false;
  bool deaf = false;           // acknowledges nothing and takes nothing
  size_t largest_payload = 0;  // of what came
  unsigned segments = 0;
  Bytes out, in;
  size_t sent = 0;
};

class Guest final : public Card {
 public:
  explicit Guest(const Offloads& offloads = {true, true, true, false}) : offloads_(offloads) {
    network_->connect(*this, loop_);
    network_->accept(offloads_);
  }
  ~Guest() override { network_->disconnect(); }

  Stream& connect(uint16_t port, bool ip6 = false) {
    const std::lock_guard lock(mutex_);
    Stream& stream = streams_[next_port_];
    stream.ends = {.guest_port = next_port_++, .peer_port = port, .ip6 = ip6};
    if (ip6) {
      stream.ends.guest = {0xfe, 0xc0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 15};
      stream.ends.peer = {0xfe, 0xc0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2};
    } else {
      stream.ends.guest = {10, 0, 2, 15};
      stream.ends.peer = {10, 0, 2, 2};
    }
    transmit(stream, TCP_SYN, {});
    stream.next++;
    stream.acknowledged++;
    return stream;
  }
  void write(Stream& stream, Bytes bytes) {
    const std::lock_guard lock(mutex_);
    stream.out = std::move(bytes);
    stream.sent = 0;
    send_more(stream);
  }
  void end(Stream& stream) {
    const std::lock_guard lock(mutex_);
    transmit(stream, TCP_FIN | TCP_ACK, {});
    stream.next++;
    stream.end_sent = true;
  }
  void acknowledge(Stream& stream) {
    const std::lock_guard lock(mutex_);
    transmit(stream, TCP_ACK, {});
  }
  void set_window(Stream& stream, uint16_t window) {
    const std::lock_guard lock(mutex_);
    stream.window = window;
    transmit(stream, TCP_ACK, {});
  }
  // What comes next, from the guest and to it.
  std::pair<uint32_t, uint32_t> numbers(const Stream& stream) {
    const std::lock_guard lock(mutex_);
    return {stream.next, stream.expected};
  }
  void raw(const Stream& stream, uint8_t flags, uint32_t sequence, uint32_t acknowledged,
           const Bytes& payload) {
    const std::lock_guard lock(mutex_);
    put(stream, {.sequence = sequence, .acknowledged = acknowledged, .flags = flags, .window = 1000},
        payload);
  }
  template <class Condition>
  bool eventually(Condition holds) {
    return Listener::eventually(
        [&] {
          const std::lock_guard lock(mutex_);
          return holds();
        },
        60'000);
  }

  // --- Card
  Received receive(unsigned, Source& source) noexcept override {
    const std::lock_guard lock(mutex_);
    for (unsigned i = 0; i < 8; i++) {
      Bytes frame(source.largest());
      if (frame.empty()) return Received::all;
      // In odd pieces, as no guest has them.
      const iovec pieces[] = {
          {frame.data(), 1}, {frame.data() + 1, 30}, {frame.data() + 31, frame.size() - 31}};
      PacketHeader header;
      const size_t size = source.read(header, pieces);
      if (size == 0) return Received::all;
      frame.resize(size);
      take(header, frame);
    }
    return Received::some;
  }
  void transmit_ready(unsigned) noexcept override {}
  void set_link(bool) noexcept override {}

  // With the condition of eventually().
  unsigned count_resets() const {
    unsigned count = 0;
    for (const auto& [port, stream] : streams_) count += stream.reset;
    return count;
  }

 private:
  void put(const Stream& stream, const TcpReply& reply, const Bytes& payload) {
    TcpEnds turned = stream.ends;
    std::swap(turned.guest, turned.peer);
    std::swap(turned.guest_port, turned.peer_port);
    std::array<uint8_t, max_tcp_headers> headers;
    const size_t size = write_tcp(turned, host_mac, guest_mac, reply, payload.size(), headers);
    Bytes frame(headers.begin(), headers.begin() + static_cast<ptrdiff_t>(size));
    frame.insert(frame.end(), payload.begin(), payload.end());
    PacketHeader header{.flags = PacketHeader::NEEDS_CSUM};
    header.csum_start = static_cast<uint16_t>(tcp_offset(turned));
    header.csum_offset = 16;
    EXPECT_TRUE(testing::send(*network_, frame, header));
  }
  void transmit(Stream& stream, uint8_t flags, const Bytes& payload) {
    put(stream,
        {.sequence = stream.next,
         .acknowledged = stream.expected,
         .flags = flags,
         .window = stream.window,
         .mss = 1400,
         .window_scale = 4},
        payload);
  }
  // As much as the window takes, in pieces of all sizes up to what segmentation offload makes.
  void send_more(Stream& stream) {
    while (stream.open && stream.sent < stream.out.size() && stream.edge - stream.next - 1 < (1u << 30)) {
      const size_t count = std::min<size_t>(
          {stream.out.size() - stream.sent, stream.edge - stream.next, 1 + random_() % 60'000});
      const auto from = stream.out.begin() + static_cast<ptrdiff_t>(stream.sent);
      transmit(stream, TCP_ACK, Bytes(from, from + static_cast<ptrdiff_t>(count)));
      stream.next += static_cast<uint32_t>(count);
      stream.sent += count;
    }
  }
  void take(const PacketHeader& header, Bytes& frame) {
    TcpSegment segment;
    if (!parse_tcp(frame, frame.size(), segment)) return;  // libslirp's
    ASSERT_EQ(segment.header + segment.payload, frame.size());
    const auto found = streams_.find(segment.ends.peer_port);
    if (found == streams_.end()) return;
    Stream& stream = found->second;
    check(header, frame, segment);
    if (stream.deaf) return;
    if (segment.flags & TCP_RST) {
      stream.reset = true;
      return;
    }
    if (segment.flags & TCP_SYN) {
      stream.scale = std::max(segment.window_scale, 0);  // -1: none
      stream.expected = segment.sequence + 1;
      stream.open = true;
      stream.edge = segment.acknowledged + segment.window;
    } else {
      stream.edge = segment.acknowledged + (uint32_t{segment.window} << stream.scale);
    }
    stream.acknowledged = segment.acknowledged;
    stream.segments++;
    stream.largest_payload = std::max(stream.largest_payload, segment.payload);
    bool answer = segment.flags & TCP_SYN;
    if (segment.payload != 0 && segment.sequence == stream.expected) {
      stream.in.insert(stream.in.end(), frame.begin() + static_cast<ptrdiff_t>(segment.header), frame.end());
      stream.expected += static_cast<uint32_t>(segment.payload);
    }
    if ((segment.flags & TCP_FIN) && segment.sequence + segment.payload == stream.expected) {
      stream.expected++;
      stream.ended = true;
    }
    answer |= segment.payload != 0 || (segment.flags & TCP_FIN);
    if (answer) transmit(stream, TCP_ACK, {});
    send_more(stream);
  }
  // Nothing that the guest has not agreed to, and checksums are right or left to it.
  void check(const PacketHeader& header, Bytes frame, const TcpSegment& segment) {
    if (offloads_.checksum) {
      EXPECT_EQ(header.flags, PacketHeader::NEEDS_CSUM);
      EXPECT_TRUE(finish_checksum(header, frame));
    } else {
      EXPECT_EQ(header, PacketHeader{});
    }
    const bool ip6 = segment.ends.ip6;
    if (!(ip6 ? offloads_.tso6 : offloads_.tso4)) {
      EXPECT_LE(segment.payload, 1400u);
    }
    EXPECT_EQ(header.gso_type, segment.payload > 1400
                                   ? ip6 ? PacketHeader::GSO_TCPV6 : PacketHeader::GSO_TCPV4
                                   : PacketHeader::GSO_NONE);
    const size_t ip = ethernet_header, tcp = tcp_offset(segment.ends), length = frame.size() - tcp;
    uint32_t sum = internet_sum(std::span(frame).subspan(ip + (ip6 ? 8 : 12), ip6 ? 32 : 8));
    sum += static_cast<uint32_t>(PROTOCOL_TCP + (length >> 16) + (length & 0xffff));
    EXPECT_EQ(internet_sum(std::span(frame).subspan(tcp), sum), 0xffff);
    if (!ip6) {
      EXPECT_EQ(internet_sum(std::span(frame).subspan(ip, 20)), 0xffff);
    }
  }

  const Offloads offloads_;
  EventLoop loop_{"test"};
  std::recursive_mutex mutex_;  // the network is called with it held, as by a card
  std::map<uint16_t, Stream> streams_;
  uint16_t next_port_ = 40000;
  std::mt19937 random_{1};
  std::unique_ptr<Backend> network_ = open_user_network({});
};

class TcpSpliceTest : public ::testing::TestWithParam<Offloads> {};
INSTANTIATE_TEST_SUITE_P(Offloads, TcpSpliceTest,
                         ::testing::Values(Offloads{}, Offloads{.checksum = true},
                                           Offloads{true, true, true, false}));

TEST_P(TcpSpliceTest, BytesGoBothWaysAndBothSidesEnd) {
  Guest guest(GetParam());
  for (const bool ip6 : {false, true}) {
    const Server server(ip6 ? AF_INET6 : AF_INET);
    if (!server.usable()) continue;  // a host without IPv6
    Stream& stream = guest.connect(server.port(), ip6);
    const Fd socket = server.accept();
    ASSERT_TRUE(guest.eventually([&] { return stream.open; }));
    const Bytes there = frame_of(3'000'000, 1), back = frame_of(2'000'000, 2);
    std::thread sender([&] {
      write_all(socket, back);
      ::shutdown(socket.get(), SHUT_WR);
    });
    std::thread ender([&] {
      EXPECT_TRUE(guest.eventually(
          [&] { return stream.acknowledged == stream.next && stream.sent == there.size(); }));
      guest.end(stream);
    });
    guest.write(stream, there);
    EXPECT_TRUE(read_all(socket) == there);
    sender.join();
    ender.join();
    EXPECT_TRUE(guest.eventually([&] { return stream.ended && stream.acknowledged == stream.next; }));
    EXPECT_TRUE(stream.in == back);
    EXPECT_FALSE(stream.reset);
  }
}

// Programs that read late and little: windows close and open again, and nobody is forgotten.
TEST(TcpSplice, ManyStreamsToSlowReceivers) {
  Guest guest;
  const Server server;
  constexpr unsigned streams = 24;
  std::vector<std::thread> readers;
  std::array<std::atomic<size_t>, streams> got{};
  std::vector<Stream*> ends;
  for (unsigned i = 0; i < streams; i++) {
    ends.push_back(&guest.connect(server.port()));
    readers.emplace_back([&, i, socket = server.accept()] {
      ::usleep(30'000 * (i % 4));
      got[i] = read_all(socket).size();
    });
  }
  const Bytes bytes = frame_of(2'500'000);
  for (Stream* stream : ends) {
    ASSERT_TRUE(guest.eventually([&] { return stream->open; }));
    guest.write(*stream, bytes);
  }
  for (Stream* stream : ends) {
    EXPECT_TRUE(guest.eventually(
        [&] { return stream->acknowledged == stream->next && stream->sent == bytes.size(); }));
    guest.end(*stream);
  }
  for (auto& reader : readers) reader.join();
  for (const auto& count : got) EXPECT_EQ(count, bytes.size());
}

TEST(TcpSplice, ARefusedConnectionIsReset) {
  Guest guest;
  uint16_t port;
  {
    const Server server;
    port = server.port();
  }
  const Stream& stream = guest.connect(port);
  EXPECT_TRUE(guest.eventually([&] { return stream.reset; }));
  EXPECT_FALSE(stream.open);
}

TEST(TcpSplice, ResetsGoThroughInBothDirections) {
  Guest guest;
  const Server server;
  {
    const Stream& stream = guest.connect(server.port());
    Fd socket = server.accept();
    ASSERT_TRUE(guest.eventually([&] { return stream.open; }));
    const linger at_once{1, 0};
    ::setsockopt(socket.get(), SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    socket.reset();
    EXPECT_TRUE(guest.eventually([&] { return stream.reset; }));
  }
  Stream& stream = guest.connect(server.port());
  const Fd socket = server.accept();
  ASSERT_TRUE(guest.eventually([&] { return stream.open; }));
  guest.raw(stream, TCP_RST, guest.numbers(stream).first + 100, 0, {});  // not there: only asked about
  guest.write(stream, frame_of(100));
  char bytes[100];
  EXPECT_EQ(::recv(socket.get(), bytes, sizeof bytes, MSG_WAITALL), 100);
  guest.raw(stream, TCP_RST, guest.numbers(stream).first, 0, {});
  EXPECT_EQ(::recv(socket.get(), bytes, sizeof bytes, 0), -1);
  EXPECT_EQ(errno, ECONNRESET);
}

// What the guest has dropped comes again: after three acknowledgements for the same place at once, else after
// a while.
TEST(TcpSplice, LostSegmentsComeAgain) {
  Guest guest;
  const Server server;
  for (const bool asks : {true, false}) {
    Stream& stream = guest.connect(server.port());
    const Fd socket = server.accept();
    ASSERT_TRUE(guest.eventually([&] { return stream.open; }));
    guest.eventually([&] { return stream.deaf = true; });
    const Bytes bytes = frame_of(100'000);
    write_all(socket, bytes);
    ::usleep(100'000);
    guest.eventually([&] { return !(stream.deaf = false); });
    if (asks)
      for (unsigned i = 0; i < 4; i++) guest.acknowledge(stream);
    EXPECT_TRUE(guest.eventually([&] { return stream.in == bytes; }));
  }
}

TEST(TcpSplice, AClosedWindowIsWaitedFor) {
  Guest guest;
  const Server server;
  Stream& stream = guest.connect(server.port());
  const Fd socket = server.accept();
  ASSERT_TRUE(guest.eventually([&] { return stream.open; }));
  guest.set_window(stream, 0);
  ::usleep(20'000);
  const Bytes bytes = frame_of(500'000);
  std::thread sender([&] { write_all(socket, bytes); });
  ::usleep(50'000);
  EXPECT_TRUE(guest.eventually([&] { return stream.in.empty(); }));
  guest.set_window(stream, 65535);
  EXPECT_TRUE(guest.eventually([&] { return stream.in == bytes; }));
  sender.join();
}

// The same bytes twice, bytes out of order and bytes that overlap end up once each.
TEST(TcpSplice, SegmentsThatRepeatOrOverlap) {
  Guest guest;
  const Server server;
  Stream& stream = guest.connect(server.port());
  const Fd socket = server.accept();
  ASSERT_TRUE(guest.eventually([&] { return stream.open; }));
  const auto numbers = guest.numbers(stream);
  const uint32_t start = numbers.first, ack = numbers.second;
  const Bytes all = frame_of(3000);
  const auto part = [&](ptrdiff_t from, ptrdiff_t to) { return Bytes(all.begin() + from, all.begin() + to); };
  guest.raw(stream, TCP_ACK, start + 1000, ack, part(1000, 2000));  // too early: lost
  guest.raw(stream, TCP_ACK, start, ack, part(0, 1000));
  guest.raw(stream, TCP_ACK, start, ack, part(0, 1000));
  guest.raw(stream, TCP_ACK, start + 500, ack, part(500, 1500));
  guest.raw(stream, TCP_ACK, start + 900, ack, part(900, 1100));
  guest.raw(stream, TCP_ACK | TCP_FIN, start + 1400, ack, part(1400, 3000));
  EXPECT_TRUE(read_all(socket) == all);
}

// A guest may send what it likes: others go on.
TEST(TcpSplice, OddSegmentsDoNotHurt) {
  Guest guest;
  const Server server;
  std::mt19937 random(7);
  std::vector<Stream*> streams;
  std::vector<Fd> sockets;
  for (unsigned i = 0; i < 8; i++) {
    streams.push_back(&guest.connect(server.port()));
    sockets.push_back(server.accept());
  }
  for (unsigned i = 0; i < 20'000; i++) {
    const Stream& stream = *streams[random() % streams.size()];
    const auto numbers = guest.numbers(stream);
    const auto near = [&](uint32_t value) { return random() % 8 ? value + random() % 3 - 1 : random(); };
    guest.raw(stream, static_cast<uint8_t>(random() % 4 ? TCP_ACK : random()), near(numbers.first),
              near(numbers.second), Bytes(random() % 4 ? 0 : random() % 2000));
    if (i % 16 == 0) ::send(sockets[random() % 8].get(), "lodge", 5, MSG_NOSIGNAL | MSG_DONTWAIT);
  }
  const Server other;  // nobody else has found the way to it
  Stream& stream = guest.connect(other.port());
  const Fd socket = other.accept();
  ASSERT_TRUE(guest.eventually([&] { return stream.open; }));
  guest.write(stream, frame_of(100'000));
  std::thread reader([&] { EXPECT_EQ(read_all(socket).size(), 100'000u); });
  EXPECT_TRUE(guest.eventually([&] { return stream.acknowledged == stream.next; }));
  guest.end(stream);
  reader.join();
}

// More connections than there is room for are refused, and those that are there work.
TEST(TcpSplice, TooManyConnectionsAreRefused) {
  Guest guest;
  const Server server;
  Stream& first = guest.connect(server.port());
  const Fd socket = server.accept();
  ASSERT_TRUE(guest.eventually([&] { return first.open; }));
  unsigned refused = 0;
  for (unsigned i = 0; i < 1100; i++) guest.connect(server.port());
  EXPECT_TRUE(guest.eventually([&] {
    refused = guest.count_resets();
    return refused >= 1100 - 1023;
  }));
  guest.write(first, frame_of(1000));
  char bytes[1000];
  EXPECT_EQ(::recv(socket.get(), bytes, sizeof bytes, MSG_WAITALL), 1000);
}

TEST(TcpSegment, WhatIsNoneIsSeenAsNone) {
  TcpEnds ends{.guest_port = 1, .peer_port = 2};
  std::array<uint8_t, max_tcp_headers> out{};
  TcpSegment segment;
  for (const bool ip6 : {false, true}) {
    ends.ip6 = ip6;
    const size_t size =
        write_tcp(ends, guest_mac, host_mac, {.flags = TCP_SYN, .mss = 1460, .window_scale = 7}, 10, out);
    ASSERT_TRUE(parse_tcp(out, size + 10, segment));
    EXPECT_EQ(segment.mss, 1460);
    EXPECT_EQ(segment.window_scale, 7);
    EXPECT_EQ(segment.payload, 10u);
    EXPECT_EQ(segment.header, size);
    EXPECT_FALSE(parse_tcp(out, size + 9, segment));
    for (size_t part = 0; part < size; part++)
      EXPECT_FALSE(parse_tcp(std::span(out).first(part), size + 10, segment));
    for (unsigned seed = 0; seed < 20'000; seed++) {
      auto wrong = out;
      std::mt19937 random(seed);
      for (unsigned i = 0; i < 3; i++) wrong[random() % wrong.size()] = static_cast<uint8_t>(random());
      if (parse_tcp(wrong, size + 10, segment)) {
        EXPECT_LE(segment.header + segment.payload, size + 10);
      }
    }
  }
}

}  // namespace
}  // namespace lodge::net
