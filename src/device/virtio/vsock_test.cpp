#include "device/virtio/vsock.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <thread>

#include "base/error.hpp"
#include "base/temporary_directory.hpp"
#include "device/virtio/testing.hpp"

namespace lodge::device::virtio {
namespace {

using testing::FakeDriver;
using testing::Rings;

constexpr uint32_t cid = 7, room = 256 * 1024;
constexpr size_t head = sizeof(virtio_vsock_hdr);

// What has come within ten seconds: at least `size` bytes, or up to the end.
std::string receive(int fd, size_t size) {
  std::string text;
  std::array<char, 4096> piece;
  pollfd waiting{fd, POLLIN, 0};
  while (text.size() < size && ::poll(&waiting, 1, 10'000) > 0) {
    const ssize_t count = ::recv(fd, piece.data(), std::min(piece.size(), size - text.size()), 0);
    if (count <= 0) break;
    text.append(piece.data(), static_cast<size_t>(count));
  }
  return text;
}
void send(int fd, const std::string& text) {
  EXPECT_EQ(::send(fd, text.data(), text.size(), MSG_NOSIGNAL), ssize_t(text.size()));
}

class VsockTest : public ::testing::TestWithParam<Rings> {
 protected:
  struct Packet {
    virtio_vsock_hdr header{};
    std::string data;
  };

  void SetUp() override { ASSERT_TRUE(driver.start(GetParam().features, 16)); }
  void TearDown() override { device.reset(); }  // before the transport goes

  void offer(unsigned count, uint32_t size = 4096) {
    for (unsigned i = 0; i < count; i++) {
      const uint64_t at = driver.allocate(size);
      buffers[driver.submit(0, {{at, size, true}}, GetParam().indirect)] = at;
    }
  }
  // The next packet for the guest; it comes from another thread.
  Packet next() {
    Packet packet;
    for (int i = 0; i < 10'000; i++) {
      if (const auto used = driver.used(0)) {
        const auto bytes = driver.get(buffers[used->id], used->written);
        if (bytes.size() < head) return packet;
        std::memcpy(&packet.header, bytes.data(), head);
        packet.data.assign(bytes.begin() + head, bytes.end());
        EXPECT_EQ(packet.data.size(), packet.header.len);
        return packet;
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    ADD_FAILURE() << "no packet";
    return packet;
  }
  void submit(uint16_t operation, uint32_t guest_port, uint32_t host_port, const std::string& data = "",
              uint32_t flags = 0, uint32_t taken = 0, uint16_t type = VIRTIO_VSOCK_TYPE_STREAM) {
    virtio_vsock_hdr header{};
    header.src_cid = cid, header.dst_cid = 2;
    header.src_port = guest_port, header.dst_port = host_port;
    header.len = static_cast<uint32_t>(data.size()), header.type = type, header.op = operation;
    header.flags = flags, header.buf_alloc = room, header.fwd_cnt = taken;
    std::vector<testing::Buffer> parts{{driver.put_struct(header), head, false}};
    if (!data.empty())
      parts.push_back({driver.put({data.begin(), data.end()}), static_cast<uint32_t>(data.size()), false});
    driver.submit(1, parts, GetParam().indirect);
    while (driver.used(1)) continue;
  }
  // A connection that the guest has made to the host's port 99, and the host's end of it.
  Fd connected(uint32_t guest_port = 10) {
    submit(VIRTIO_VSOCK_OP_REQUEST, guest_port, 99);
    const Packet answer = next();
    EXPECT_EQ(answer.header.op, VIRTIO_VSOCK_OP_RESPONSE);
    EXPECT_EQ(answer.header.buf_alloc, Vsock::buffer_size);
    return service.accept();
  }

  machine::GuestMemory memory{16 * machine::layout::MiB};
  TemporaryDirectory directory;
  Vsock device{memory, cid, directory / "socket"};
  net::UnixListener service{directory / "socket_99", ""};
  FakeDriver driver{device, memory};
  std::map<uint16_t, uint64_t> buffers;
};

INSTANTIATE_TEST_SUITE_P(Rings, VsockTest, ::testing::ValuesIn(testing::all_rings()),
                         [](const auto& test) { return test.param.name; });

TEST_P(VsockTest, TheGuestConnectsToTheHost) {
  offer(4);
  const Fd peer = connected();
  ASSERT_TRUE(peer);
  submit(VIRTIO_VSOCK_OP_RW, 10, 99, "question");
  EXPECT_EQ(receive(peer.get(), 8), "question");
  send(peer.get(), "answer");
  const Packet data = next();
  EXPECT_EQ(data.header.op, VIRTIO_VSOCK_OP_RW);
  EXPECT_EQ(data.data, "answer");
  EXPECT_EQ(data.header.fwd_cnt, 8u);
  EXPECT_EQ(data.header.src_port, 99u);
  EXPECT_EQ(data.header.dst_port, 10u);
  // Each side says that it is done; then the connection is gone.
  ::shutdown(peer.get(), SHUT_WR);
  const Packet end = next();
  EXPECT_EQ(end.header.op, VIRTIO_VSOCK_OP_SHUTDOWN);
  EXPECT_EQ(end.header.flags, uint32_t{VIRTIO_VSOCK_SHUTDOWN_SEND});
  submit(VIRTIO_VSOCK_OP_RW, 10, 99, "last words");
  submit(VIRTIO_VSOCK_OP_SHUTDOWN, 10, 99, "", 3);
  EXPECT_EQ(receive(peer.get(), 100), "last words");
  EXPECT_EQ(next().header.op, VIRTIO_VSOCK_OP_RST);
  EXPECT_EQ(device.connections(), 0u);
}

TEST_P(VsockTest, TheHostConnectsToTheGuest) {
  offer(4);
  const Fd client = net::connect_unix(directory / "socket");
  send(client.get(), "CONNECT 55\nearly");
  const Packet request = next();
  EXPECT_EQ(request.header.op, VIRTIO_VSOCK_OP_REQUEST);
  EXPECT_EQ(request.header.dst_port, 55u);
  const uint32_t port = request.header.src_port;
  submit(VIRTIO_VSOCK_OP_RESPONSE, 55, port);
  const std::string answer = "OK " + std::to_string(port) + "\n";
  EXPECT_EQ(receive(client.get(), answer.size()), answer);
  EXPECT_EQ(next().data, "early");
  submit(VIRTIO_VSOCK_OP_RST, 55, port);
  EXPECT_EQ(receive(client.get(), 1), "");
  EXPECT_EQ(device.connections(), 0u);

  for (const char* greeting :
       {"CONNECT x\n", "HELLO 5\n", "CONNECT 99999999999\n", "no end of the line no end of it"}) {
    const Fd wrong = net::connect_unix(directory / "socket");
    send(wrong.get(), std::string(greeting) + (greeting[0] == 'n' ? "at all" : ""));
    EXPECT_EQ(receive(wrong.get(), 1), "") << greeting;
  }
}

TEST_P(VsockTest, NobodySendsMoreThanTheOtherHasRoomFor) {
  offer(15, 65536);
  const Fd peer = connected();
  // The host reads nothing: the guest may fill the device's buffer and what the kernel takes, and no more.
  const std::string piece(32 * 1024, 'x');
  uint32_t sent = 0;
  for (int i = 0; i < 100 && device.connections() == 1; i++) {
    submit(VIRTIO_VSOCK_OP_RW, 10, 99, piece);
    sent += static_cast<uint32_t>(piece.size());
  }
  EXPECT_EQ(device.connections(), 0u);  // it went on beyond its credit
  EXPECT_LT(sent, 2u << 20);
  Packet last;
  do last = next();
  while (last.header.op == VIRTIO_VSOCK_OP_CREDIT_UPDATE);
  EXPECT_EQ(last.header.op, VIRTIO_VSOCK_OP_RST);

  // The guest takes nothing: it gets what it has room for.
  const Fd other = connected(11);
  std::thread writer([&] {
    const std::string all(room + 100'000, 'y');
    for (size_t done = 0; done < all.size();) {
      pollfd ready{other.get(), POLLOUT, 0};
      ::poll(&ready, 1, 10'000);
      const ssize_t count = ::send(other.get(), all.data() + done, all.size() - done, MSG_NOSIGNAL);
      if (count > 0) done += static_cast<size_t>(count);
    }
  });
  size_t got = 0;
  while (got < room) {
    offer(1, 65536);
    got += next().data.size();
  }
  EXPECT_EQ(got, room);
  submit(VIRTIO_VSOCK_OP_CREDIT_UPDATE, 11, 99, "", 0, room);
  offer(4, 65536);
  while (got < room + 100'000) got += next().data.size(), offer(1, 65536);
  EXPECT_EQ(got, room + 100'000);
  writer.join();
}

TEST_P(VsockTest, WhatFitsNoConnectionIsReset) {
  offer(8);
  submit(VIRTIO_VSOCK_OP_REQUEST, 10, 98);  // nobody listens
  EXPECT_EQ(next().header.op, VIRTIO_VSOCK_OP_RST);
  submit(VIRTIO_VSOCK_OP_RW, 10, 99, "data");
  EXPECT_EQ(next().header.op, VIRTIO_VSOCK_OP_RST);
  submit(VIRTIO_VSOCK_OP_REQUEST, 10, 99, "", 0, 0, VIRTIO_VSOCK_TYPE_SEQPACKET);
  const Packet refused = next();
  EXPECT_EQ(refused.header.op, VIRTIO_VSOCK_OP_RST);
  EXPECT_EQ(refused.header.type, VIRTIO_VSOCK_TYPE_SEQPACKET);
  submit(VIRTIO_VSOCK_OP_RST, 10, 99);  // no answer to this
  const Fd peer = connected();
  submit(77, 10, 99);
  EXPECT_EQ(next().header.op, VIRTIO_VSOCK_OP_RST);
  EXPECT_EQ(receive(peer.get(), 1), "");
}

// Answers are not collected without end for a guest that does not take them.
TEST_P(VsockTest, AGuestWithoutReceiveBuffersIsNotHeard) {
  unsigned submitted = 0, taken = 0;
  for (; submitted < 200; submitted++) {
    virtio_vsock_hdr header{};
    header.src_cid = cid, header.dst_cid = 2, header.type = VIRTIO_VSOCK_TYPE_STREAM,
    header.op = VIRTIO_VSOCK_OP_RW;
    if (submitted - taken >= 8) break;
    driver.submit(1, {{driver.put_struct(header), head, false}}, GetParam().indirect);
    while (driver.used(1)) taken++;
  }
  EXPECT_EQ(taken, 64u);
  offer(8);
  for (int i = 0; i < 8; i++) EXPECT_EQ(next().header.op, VIRTIO_VSOCK_OP_RST);
  device.kick(1);  // kick_later()'s, without a loop
  while (driver.used(1)) taken++;
  EXPECT_EQ(taken, submitted);
}

TEST_P(VsockTest, ConnectionsDoNotOutliveSavedStateAndTheGuestIsTold) {
  offer(4);
  const Fd peer = connected();
  nlohmann::json first, second;
  device.save(first);
  Vsock other(memory, cid, directory / "other");
  other.load(first);
  other.save(second);
  EXPECT_EQ(first, second);
  FakeDriver& still = driver;  // the rings are the same
  const uint64_t event = still.allocate(4);
  memory.write(event, std::array<uint8_t, 4>{9, 9, 9, 9});
  still.queues[2].submit({{event, 4, true}});
  other.kick(2);
  EXPECT_TRUE(still.used(2));
  EXPECT_THAT(still.get(event, 4), ::testing::ElementsAre(0, 0, 0, 0));
  Vsock third(memory, cid + 1, directory / "third");
  EXPECT_THROW(third.load(first), UsageError);
}

TEST(Vsock, APathIsTakenOverOnlyFromTheDead) {
  machine::GuestMemory memory(2 * machine::layout::MiB);
  const TemporaryDirectory directory;
  const std::string path = directory / "socket";
  {
    const Vsock first(memory, cid, path);
    EXPECT_THROW(Vsock(memory, cid, path), UsageError);
  }
  EXPECT_FALSE(std::filesystem::exists(path));
  std::ofstream(path) << "a file";
  EXPECT_THROW(Vsock(memory, cid, path), UsageError);
  EXPECT_TRUE(std::filesystem::exists(path));
  std::filesystem::remove(path);
  EXPECT_THROW(Vsock(memory, cid, "/nowhere/at/all"), UsageError);
  Vsock last(memory, cid, path);
  std::array<uint8_t, 8> config{};
  last.read_config(0, config);
  EXPECT_THAT(config, ::testing::ElementsAre(cid, 0, 0, 0, 0, 0, 0, 0));
}

TEST(HostileDriver, NothingItDoesHurtsTheSockets) {
  const TemporaryDirectory directory;
  for (unsigned seed = 0; seed < 100; seed++) {
    machine::GuestMemory memory(2 * machine::layout::MiB);
    Vsock device(memory, cid, directory / "socket");
    FakeDriver driver(device, memory);
    std::mt19937 random(seed);
    testing::attack(device, memory, 300, [&](uint32_t below) { return random() % below; });
    ASSERT_TRUE(driver.start(F_RING_PACKED)) << seed;
    driver.submit(1, {{driver.put(std::vector<uint8_t>(head)), head, false}});
    EXPECT_TRUE(driver.used(1)) << seed;
    device.reset();
  }
}

}  // namespace
}  // namespace lodge::device::virtio
