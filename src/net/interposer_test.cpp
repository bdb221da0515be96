#include "net/interposer.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstring>
#include <deque>
#include <fstream>

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

// A network that keeps what it gets and has what a test puts into it.
class Plain final : public Backend, public Source {
 public:
  void connect(Card& plugged, EventLoop&) noexcept override { card = &plugged; }
  void disconnect() noexcept override { card = nullptr; }
  bool send(unsigned, const PacketHeader&, std::span<const iovec> pieces) noexcept override {
    if (blocked) return false;
    bytes_sent += total_size(pieces);
    return true;
  }
  void receive_ready(unsigned) noexcept override {
    while (card->receive(0, *this) == Card::Received::some) {
    }
  }
  size_t largest() noexcept override { return waiting.empty() ? 0 : waiting.front().size(); }
  size_t read(PacketHeader&, std::span<const iovec> room) noexcept override {
    const size_t size = scatter(waiting.front(), room);
    waiting.pop_front();
    return size;
  }
  Card* card = nullptr;
  bool blocked = false;
  std::atomic<size_t> bytes_sent = 0;
  std::deque<Bytes> waiting;
};

uint32_t get32(const std::string& bytes, size_t at) {
  uint32_t value = 0;
  std::memcpy(&value, bytes.data() + at, sizeof value);
  return value;
}

TEST(Capture, KeepsThePacketsOfBothDirections) {
  const TemporaryDirectory directory;
  const std::string path = directory / "pcap";
  EventLoop loop("test");
  Listener card;
  auto inner = std::make_unique<Plain>();
  Plain& plain = *inner;
  auto network = capture(std::move(inner), path);
  network->keep();
  network->connect(card, loop);
  EXPECT_TRUE(send(*network, frame_of(60, 1)));
  plain.blocked = true;
  EXPECT_FALSE(send(*network, frame_of(61, 2)));  // not yet on its way
  plain.waiting = {frame_of(1514, 3)};
  plain.receive_ready(0);
  EXPECT_TRUE(card.saw_frame(frame_of(1514, 3)));
  network->disconnect();
  network.reset();
  std::ifstream file(path, std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(file)), {});
  ASSERT_EQ(bytes.size(), 24u + 16 + 60 + 16 + 1514);
  EXPECT_EQ(get32(bytes, 0), 0xa1b23c4d);
  EXPECT_EQ(get32(bytes, 4), 0x00040002u);
  EXPECT_EQ(get32(bytes, 20), 1u);
  EXPECT_EQ(get32(bytes, 24 + 8), 60u);
  EXPECT_EQ(bytes.substr(40, 60), std::string(reinterpret_cast<const char*>(frame_of(60, 1).data()), 60));
  EXPECT_EQ(get32(bytes, 100 + 12), 1514u);
  EXPECT_EQ(bytes.substr(116), std::string(reinterpret_cast<const char*>(frame_of(1514, 3).data()), 1514));
  EXPECT_THROW(capture(std::make_unique<Plain>(), "/no/such/directory/file"), UsageError);
}

// A machine that never starts, since a later option is wrong, leaves no file behind and none empty.
TEST(Capture, LeavesFilesAloneUntilTheMachineStarts) {
  const TemporaryDirectory directory;
  const std::string path = directory / "pcap";
  const auto size = [&] {
    struct stat status {};
    return ::stat(path.c_str(), &status) == 0 ? static_cast<int>(status.st_size) : -1;
  };
  const auto send_one = [&](bool start) {
    EventLoop loop("test");
    Listener card;
    const auto network = capture(std::make_unique<Plain>(), path);
    if (start) network->keep();
    network->connect(card, loop);
    EXPECT_TRUE(send(*network, frame_of(60)));
    network->disconnect();
  };
  send_one(false);
  EXPECT_EQ(size(), -1);
  std::ofstream(path) << std::string(1000, 'x');
  send_one(false);
  EXPECT_EQ(size(), 1000);
  send_one(true);
  EXPECT_EQ(size(), 24 + 16 + 60);
}

// A file that takes nothing (a pipe without a reader's help) does not stop the packets. The pipe has no name
// of its own: not every file system gives one.
TEST(Capture, NeverWaitsForItsFile) {
  int ends[2];
  ASSERT_EQ(::pipe2(ends, O_CLOEXEC), 0) << std::strerror(errno);
  const Fd reader(ends[0]);
  const Fd writer(ends[1]);
  EventLoop loop("test");
  Listener card;
  auto inner = std::make_unique<Plain>();
  Plain& plain = *inner;
  auto network = capture(std::move(inner), "/proc/self/fd/" + std::to_string(writer.get()));
  network->keep();
  network->connect(card, loop);
  for (unsigned i = 0; i < 1000; i++) EXPECT_TRUE(send(*network, frame_of(60'000)));
  EXPECT_EQ(plain.bytes_sent, 60'000'000u);
  network->disconnect();
  network.reset();  // nor does the end
}

// By what has passed, not by the clock alone: a loaded machine is slower than the limit, never faster.
TEST(RateLimit, BothDirectionsKeepToIt) {
  EventLoop loop("test");
  Listener card;
  auto inner = std::make_unique<Plain>();
  Plain& plain = *inner;
  const auto network = limit_rate(std::move(inner), {.rate = 1'000'000, .burst = 10'000});
  network->connect(card, loop);
  const auto start = std::chrono::steady_clock::now();
  for (unsigned i = 0; i < 60; i++) plain.waiting.push_back(frame_of(1000));
  plain.receive_ready(0);
  unsigned told = 0;
  for (unsigned i = 0; i < 60;) {
    if (send(*network, frame_of(1000))) {
      i++;
      continue;
    }
    EXPECT_TRUE(Listener::eventually([&] { return card.ready > told; }));
    told = card.ready;
  }
  EXPECT_TRUE(Listener::eventually([&] { return card.frames().size() == 60; }));
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  EXPECT_EQ(plain.bytes_sent, 60'000u);
  EXPECT_GT(told, 0u);
  EXPECT_GE(took.count(), 0.045);  // 60,000 bytes without the burst and the last one
  network->disconnect();
}

}  // namespace
}  // namespace lodge::net
