#include "vm/stream.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <unistd.h>

#include <atomic>

namespace lodge::vm {
namespace {

std::span<const uint8_t> bytes(std::string_view text) {
  return {reinterpret_cast<const uint8_t*>(text.data()), text.size()};
}

struct Pipe {
  Fd read, write;
  Pipe() {
    int fds[2];
    EXPECT_EQ(::pipe2(fds, O_CLOEXEC), 0);
    read.reset(fds[0]);
    write.reset(fds[1]);
  }
};

// Reads until `size` bytes or the end.
std::string read_all(int fd, size_t size) {
  std::string text;
  char piece[4096];
  while (text.size() < size) {
    const ssize_t count = ::read(fd, piece, std::min(sizeof piece, size - text.size()));
    if (count <= 0) break;
    text.append(piece, static_cast<size_t>(count));
  }
  return text;
}

// A chip with room for `room` bytes.
class Port : public device::CharPort {
 public:
  explicit Port(size_t room) : room_(room) {}
  size_t receive(std::span<const uint8_t> input) noexcept override {
    std::lock_guard lock(mutex_);
    const size_t taken = std::min(input.size(), room_);
    received_.append(reinterpret_cast<const char*>(input.data()), taken);
    room_ -= taken;
    changed_.notify_all();
    return taken;
  }
  void transmit_ready() noexcept override {
    std::lock_guard lock(mutex_);
    ready_ = true;
    changed_.notify_all();
  }
  void make_room(size_t room) {
    std::lock_guard lock(mutex_);
    room_ = room;
  }
  std::string wait_received(size_t size) {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, std::chrono::seconds(20), [&] { return received_.size() >= size; });
    return received_;
  }
  bool wait_ready() {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(20), [&] { return ready_; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::string received_;
  size_t room_;
  bool ready_ = false;
};

TEST(Stream, WritesOutEverythingBeforeItEnds) {
  Pipe pipe;
  {
    Stream stream({.out = std::move(pipe.write)}, {});
    EXPECT_EQ(stream.write(bytes("hello ")), 6u);
    EXPECT_EQ(stream.write(bytes("world")), 5u);
  }
  EXPECT_EQ(read_all(pipe.read.get(), 100), "hello world");
}

TEST(Stream, NeverBlocksTheWriterAndAnnouncesRoomWhenTheReaderComes) {
  Pipe pipe;
  Port port(0);
  Stream stream({.out = std::move(pipe.write)}, {});
  stream.connect(port);
  const std::string piece(1000, 'x');
  size_t total = 0;
  // The pipe holds 64 KiB and the buffer as much again: nobody reads, so a write must come back short in the
  // end.
  for (int i = 0; i < 10'000; i++) {
    const size_t taken = stream.write(bytes(piece));
    total += taken;
    if (taken < piece.size()) break;
  }
  EXPECT_LT(total, 1'000'000u);
  EXPECT_EQ(read_all(pipe.read.get(), total).size(), total);
  EXPECT_TRUE(port.wait_ready());
  EXPECT_EQ(stream.write(bytes("more")), 4u);
}

TEST(Stream, DropsOutputWhenTheReaderHasLeft) {
  ::signal(SIGPIPE, SIG_IGN);
  Pipe pipe;
  Stream stream({.out = std::move(pipe.write)}, {});
  pipe.read.reset();
  const std::string piece(4096, 'x');
  // The thread needs a moment to find out; after that nothing is refused, however much comes.
  size_t total = 0;
  for (int i = 0; i < 200'000 && total < 1'000'000; i++) {
    total += stream.write(bytes(piece));
    ::usleep(10);
  }
  EXPECT_GE(total, 1'000'000u);
}

TEST(Stream, KeepsInputUntilTheChipHasRoom) {
  Pipe pipe;
  Port port(3);
  Stream stream({.in = std::move(pipe.read)}, {});
  ASSERT_EQ(::write(pipe.write.get(), "abcdef", 6), 6);
  stream.connect(port);
  EXPECT_EQ(port.wait_received(3), "abc");
  port.make_room(10);
  stream.receive_ready();
  EXPECT_EQ(port.wait_received(6), "abcdef");
}

TEST(Stream, PassesInputThroughItsFilter) {
  Pipe pipe;
  Port port(100);
  Stream stream({.in = std::move(pipe.read)}, [](std::span<uint8_t> input) {
    return static_cast<size_t>(std::remove(input.begin(), input.end(), 'x') - input.begin());
  });
  stream.connect(port);
  ASSERT_EQ(::write(pipe.write.get(), "axbxc", 5), 5);
  EXPECT_EQ(port.wait_received(3), "abc");
}

TEST(Stream, SurvivesTheEndOfItsInput) {
  Pipe input, output;
  Port port(100);
  {
    Stream stream({.in = std::move(input.read), .out = std::move(output.write)}, {});
    stream.connect(port);
    ASSERT_EQ(::write(input.write.get(), "abc", 3), 3);
    input.write.reset();
    EXPECT_EQ(port.wait_received(3), "abc");
    stream.write(bytes("still here"));
  }
  EXPECT_EQ(read_all(output.read.get(), 100), "still here");
}

TEST(Stream, PseudoTerminalDropsOutputWhileNobodyIsThereAndThenTalksBothWays) {
  Port port(100);
  Stream stream(open_ends({SerialConfig::Kind::pty, {}}, "--serial"), {});
  stream.connect(port);
  const std::string piece(1000, 'x');
  // Far more than the kernel and the buffer hold together: only a stream that drops takes it all in the end.
  size_t total = 0;
  for (int i = 0; i < 200'000 && total < 300'000; i++) {
    total += stream.write(bytes(piece));
    ::usleep(10);
  }
  EXPECT_GE(total, 300'000u);

  Fd slave(::open(stream.where().c_str(), O_RDWR | O_NOCTTY));
  ASSERT_TRUE(slave);
  ASSERT_EQ(::write(slave.get(), "hi", 2), 2);
  EXPECT_EQ(port.wait_received(2), "hi");
  stream.write(bytes("END"));
  std::string text;
  while (text.find("END") == std::string::npos) {
    pollfd ready{slave.get(), POLLIN, 0};
    ASSERT_GT(::poll(&ready, 1, 20'000), 0);
    text += read_all(slave.get(), 1);
  }
}

}  // namespace
}  // namespace lodge::vm
