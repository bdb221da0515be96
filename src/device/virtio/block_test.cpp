#include "device/virtio/block.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <deque>
#include <nlohmann/json.hpp>
#include <random>

#include "base/error.hpp"
#include "device/virtio/testing.hpp"

namespace lodge::device::virtio {
namespace {

using testing::Buffer;
using testing::FakeDriver;
using testing::Rings;

// A disk in memory that completes at once, or when the test lets it.
class MemoryDisk final : public block::Image {
 public:
  explicit MemoryDisk(size_t size) : bytes(size) {}
  void read(std::span<const iovec> buffers, uint64_t offset, block::Completion done) noexcept override {
    if (before) before(offset);
    for (const auto& buffer : buffers) {
      std::memcpy(buffer.iov_base, bytes.data() + offset, buffer.iov_len);
      offset += buffer.iov_len;
    }
    end(std::move(done));
  }
  void write(std::span<const iovec> buffers, uint64_t offset, block::Completion done) noexcept override {
    for (const auto& buffer : buffers) {
      std::memcpy(bytes.data() + offset, buffer.iov_base, buffer.iov_len);
      offset += buffer.iov_len;
    }
    end(std::move(done));
  }
  void flush(block::Completion done) noexcept override { flushes++, end(std::move(done)); }
  void discard(uint64_t offset, uint64_t length, block::Completion done) noexcept override {
    discarded.emplace_back(offset, length);
    end(std::move(done));
  }
  void write_zeroes(uint64_t offset, uint64_t length, bool unmap, block::Completion done) noexcept override {
    std::fill_n(bytes.begin() + static_cast<ptrdiff_t>(offset), length, uint8_t{0});
    unmapped = unmap;
    end(std::move(done));
  }
  void resize(uint64_t size, block::Completion done) noexcept override { bytes.resize(size), done(0); }
  uint64_t size() const noexcept override { return bytes.size(); }
  bool read_only() const noexcept override { return fixed; }
  std::string_view format() const noexcept override { return "memory"; }
  int close() noexcept override { return 0; }

  void release() {
    auto all = std::exchange(held, {});
    while (!all.empty()) {
      all.back()(error);
      all.pop_back();
    }
  }

  std::vector<uint8_t> bytes;
  bool fixed = false, hold = false, unmapped = false;
  int error = 0;
  unsigned flushes = 0;
  std::vector<std::pair<uint64_t, uint64_t>> discarded;
  std::deque<block::Completion> held;
  std::function<void(uint64_t offset)> before;  // within a read

 private:
  void end(block::Completion done) {
    if (hold)
      held.push_back(std::move(done));
    else
      done(error);
  }
};

constexpr uint32_t IN = 0, OUT = 1, FLUSH = 4, GET_ID = 8, DISCARD = 11, WRITE_ZEROES = 13;
constexpr int OK = 0, IOERR = 1, UNSUPP = 2, none = -1;

class BlockTest : public ::testing::TestWithParam<Rings> {
 protected:
  BlockTest() {
    for (size_t i = 0; i < disk->bytes.size(); i++) disk->bytes[i] = static_cast<uint8_t>(i / 512);
  }
  void SetUp() override { ASSERT_TRUE(driver.start(GetParam().features)); }

  struct Out {
    unsigned queue;
    uint64_t status;
  };
  Out submit(uint32_t type, uint64_t sector, std::vector<Buffer> buffers, unsigned queue = 0) {
    struct {
      uint32_t type, reserved;
      uint64_t sector;
    } header{type, 0, sector};
    const uint64_t status = driver.put({0xee});
    buffers.insert(buffers.begin(), {driver.put_struct(header), sizeof header, false});
    buffers.push_back({status, 1, true});
    driver.submit(queue, buffers, GetParam().indirect);
    return {queue, status};
  }
  int result(const Out& out) {
    const auto used = driver.used(out.queue);
    return used ? driver.get(out.status, 1)[0] : none;
  }
  int request(uint32_t type, uint64_t sector, std::vector<Buffer> buffers) {
    return result(submit(type, sector, std::move(buffers)));
  }

  machine::GuestMemory memory{16 * machine::layout::MiB};
  std::shared_ptr<MemoryDisk> disk = std::make_shared<MemoryDisk>(64 * 512);
  Block block{memory, disk, {"0123456789", 2}};
  FakeDriver driver{block, memory};
};

INSTANTIATE_TEST_SUITE_P(Rings, BlockTest, ::testing::ValuesIn(testing::all_rings()),
                         [](const auto& test) { return test.param.name; });

TEST_P(BlockTest, ReadsAndWritesSectors) {
  const uint64_t at = driver.allocate(2048);
  EXPECT_EQ(request(IN, 3, {{at, 512, true}, {at + 1024, 512, true}}), OK);
  EXPECT_EQ(driver.get(at, 1)[0], 3);
  EXPECT_EQ(driver.get(at + 1024, 1)[0], 4);
  EXPECT_EQ(request(OUT, 62, {{at, 100, false}, {at + 924, 924, false}}), OK);  // odd pieces, whole sectors
  EXPECT_EQ(disk->bytes[62 * 512], 3);
  EXPECT_EQ(disk->bytes[62 * 512 + 200], 4);
  EXPECT_EQ(driver.transport.queue_interrupts[0] > 0, true);
}

TEST_P(BlockTest, WhatIsNotOnTheDiskIsRefused) {
  const uint64_t at = driver.allocate(4096);
  EXPECT_EQ(request(IN, 64, {{at, 512, true}}), IOERR);
  EXPECT_EQ(request(IN, 63, {{at, 1024, true}}), IOERR);
  EXPECT_EQ(request(IN, ~uint64_t{0}, {{at, 512, true}}), IOERR);
  EXPECT_EQ(request(IN, uint64_t{1} << 55, {{at, 512, true}}), IOERR);
  EXPECT_EQ(request(OUT, 0, {{at, 100, false}}), IOERR);
  EXPECT_EQ(request(99, 0, {{at, 512, true}}), UNSUPP);
  EXPECT_EQ(request(IN, 0, {{at, 512, true}}), OK);
  EXPECT_FALSE(driver.needs_reset());
}

TEST_P(BlockTest, RequestsWithoutHeaderOrStatusComeBack) {
  const uint64_t at = driver.allocate(4096);
  driver.submit(0, {{at, 16, false}}, GetParam().indirect);  // no status
  EXPECT_EQ(driver.used(0)->written, 0u);
  driver.submit(0, {{at, 8, false}, {at + 16, 1, true}}, GetParam().indirect);  // half a header
  EXPECT_EQ(driver.used(0)->written, 1u);
  EXPECT_EQ(driver.get(at + 16, 1)[0], IOERR);
}

TEST_P(BlockTest, FlushIdentificationAndErrors) {
  EXPECT_EQ(request(FLUSH, 0, {}), OK);
  EXPECT_EQ(disk->flushes, 1u);
  const uint64_t at = driver.allocate(512);
  EXPECT_EQ(request(GET_ID, 0, {{at, 20, true}}), OK);
  EXPECT_EQ(driver.get(at, 11), (std::vector<uint8_t>{'0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 0}));
  EXPECT_EQ(request(GET_ID, 0, {{at, 4, true}}), IOERR);
  disk->error = EIO;
  EXPECT_EQ(request(IN, 0, {{at, 512, true}}), IOERR);
  disk->error = EOPNOTSUPP;
  EXPECT_EQ(request(FLUSH, 0, {}), UNSUPP);
}

TEST_P(BlockTest, DiscardAndWriteZeroesTakeRanges) {
  struct Range {
    uint64_t sector;
    uint32_t sectors, flags;
  };
  const Range two[2] = {{2, 3, 0}, {10, 1, 0}};
  const uint64_t at = driver.put_struct(two);
  EXPECT_EQ(request(DISCARD, 0, {{at, 32, false}}), OK);
  EXPECT_THAT(disk->discarded,
              ::testing::ElementsAre(std::pair(2u * 512, 3u * 512), std::pair(10u * 512, 512u)));
  EXPECT_EQ(request(WRITE_ZEROES, 0, {{at, 16, false}}), OK);
  EXPECT_EQ(disk->bytes[4 * 512], 0);
  EXPECT_EQ(disk->bytes[5 * 512], 5);
  EXPECT_FALSE(disk->unmapped);
  EXPECT_EQ(request(WRITE_ZEROES, 0, {{driver.put_struct(Range{7, 1, 1}), 16, false}}), OK);
  EXPECT_TRUE(disk->unmapped);
  // None of it happens when one range is wrong.
  disk->discarded.clear();
  const Range bad[2] = {{2, 3, 0}, {63, 2, 0}};
  EXPECT_EQ(request(DISCARD, 0, {{driver.put_struct(bad), 32, false}}), IOERR);
  EXPECT_EQ(request(DISCARD, 0, {{driver.put_struct(Range{1, 1, 1}), 16, false}}), UNSUPP);
  EXPECT_EQ(request(WRITE_ZEROES, 0, {{driver.put_struct(Range{1, 1, 2}), 16, false}}), UNSUPP);
  EXPECT_EQ(request(DISCARD, 0, {{at, 15, false}}), IOERR);
  EXPECT_EQ(request(DISCARD, 0, {}), IOERR);
  EXPECT_EQ(request(DISCARD, 0, {{driver.put(std::vector<uint8_t>(33 * 16)), 33 * 16, false}}), IOERR);
  EXPECT_TRUE(disk->discarded.empty());
}

TEST_P(BlockTest, RequestsCompleteInAnyOrderAndOnAnyQueue) {
  disk->hold = true;
  const uint64_t at = driver.allocate(4096);
  const Out first = submit(IN, 1, {{at, 512, true}}), second = submit(IN, 2, {{at + 512, 512, true}});
  const Out other = submit(IN, 3, {{at + 1024, 512, true}}, 1);
  EXPECT_EQ(result(first), none);
  EXPECT_EQ(result(other), none);
  std::thread([&] { disk->release(); }).join();  // last one first, on another thread
  EXPECT_EQ(result(other), OK);
  EXPECT_TRUE(driver.used(0));
  EXPECT_TRUE(driver.used(0));
  EXPECT_EQ(driver.get(second.status, 1)[0], OK);
  EXPECT_EQ(driver.get(first.status, 1)[0], OK);
  EXPECT_GE(driver.transport.queue_interrupts[1], 1u);
}

TEST_P(BlockTest, WhatHasComeBackIsCounted) {
  const uint64_t at = driver.allocate(4096);
  EXPECT_EQ(request(IN, 1, {{at, 1024, true}}), OK);
  EXPECT_EQ(request(OUT, 1, {{at, 512, false}}), OK);
  EXPECT_EQ(request(OUT, 1, {{at, 1536, false}}), OK);
  EXPECT_EQ(request(FLUSH, 0, {}), OK);
  EXPECT_EQ(request(GET_ID, 0, {{at, 20, true}}), OK);
  struct {
    uint64_t sector;
    uint32_t sectors, flags;
  } const range{4, 1, 0};
  EXPECT_EQ(request(DISCARD, 0, {{driver.put_struct(range), 16, false}}), OK);
  EXPECT_EQ(request(WRITE_ZEROES, 0, {{driver.put_struct(range), 16, false}}), OK);
  const Disk::Counts good = block.counts();
  EXPECT_EQ(good.reads, 1u);
  EXPECT_EQ(good.read_bytes, 1024u);
  EXPECT_EQ(good.writes, 2u);
  EXPECT_EQ(good.written_bytes, 2048u);
  EXPECT_EQ(good.flushes, 1u);
  EXPECT_EQ(good.discards, 1u);
  EXPECT_EQ(good.zeroes, 1u);
  EXPECT_EQ(good.errors, 0u);
  // What fails has moved nothing, wherever it was found out.
  EXPECT_EQ(request(IN, 64, {{at, 512, true}}), IOERR);
  disk->error = EIO;
  EXPECT_EQ(request(OUT, 1, {{at, 512, false}}), IOERR);
  EXPECT_EQ(request(99, 0, {{at, 512, true}}), UNSUPP);
  const Disk::Counts bad = block.counts();
  EXPECT_EQ(bad.reads, 2u);
  EXPECT_EQ(bad.read_bytes, 1024u);
  EXPECT_EQ(bad.writes, 3u);
  EXPECT_EQ(bad.written_bytes, 2048u);
  EXPECT_EQ(bad.errors, 3u);
}

TEST_P(BlockTest, AResetInMidRequestWaitsForTheDisk) {
  disk->hold = true;
  submit(IN, 1, {{driver.allocate(512), 512, true}});
  std::atomic<bool> released = false;
  std::thread host([&] {
    ::usleep(20'000);
    released = true;
    disk->release();
  });
  block.reset();
  EXPECT_TRUE(released);
  host.join();
  disk->hold = false;
  ASSERT_TRUE(driver.start(GetParam().features));
  EXPECT_EQ(request(FLUSH, 0, {}), OK);
}

TEST_P(BlockTest, AReadOnlyDiskIsNotWritten) {
  auto fixed = std::make_shared<MemoryDisk>(64 * 512);
  fixed->fixed = true;
  Block device(memory, fixed, {"", 1});
  EXPECT_TRUE(device.features(false) & feature(5));
  EXPECT_FALSE(device.features(false) & feature(13));
  FakeDriver other(device, memory, 8 * machine::layout::MiB);
  ASSERT_TRUE(other.start(GetParam().features));
  struct {
    uint32_t type, reserved;
    uint64_t sector;
  } header{OUT, 0, 0};
  const uint64_t data = other.put(std::vector<uint8_t>(512, 9)), status = other.put({0xee});
  other.submit(0, {{other.put_struct(header), 16, false}, {data, 512, false}, {status, 1, true}});
  EXPECT_EQ(other.get(status, 1)[0], IOERR);
  EXPECT_EQ(fixed->bytes[0], 0);
}

TEST_P(BlockTest, ADiskGrowsInUseAndDoesNotShrink) {
  Disk& owner = block;
  EXPECT_EQ(owner.size(), 64u * 512);
  EXPECT_EQ(owner.resize(32 * 512), EINVAL);
  EXPECT_EQ(owner.resize(64 * 512 + 1), EINVAL);
  EXPECT_EQ(driver.transport.config_interrupts, 0u);
  const uint64_t at = driver.allocate(512);
  EXPECT_EQ(request(IN, 99, {{at, 512, true}}), IOERR);
  EXPECT_EQ(owner.resize(100 * 512), 0);
  EXPECT_EQ(driver.transport.config_interrupts, 1u);
  EXPECT_EQ(request(IN, 99, {{at, 512, true}}), OK);
}

// The lock is not held while the image works: other queues go on, and a completion on the thread that submits
// needs no care.
TEST_P(BlockTest, ASlowRequestHoldsUpNobody) {
  const uint64_t at = driver.allocate(4096);
  std::atomic<bool> entered = false, go_on = false;
  disk->before = [&](uint64_t offset) {
    if (offset != 512) return;
    entered = true;
    while (!go_on) std::this_thread::yield();
  };
  Out slow{};
  std::thread vcpu([&] { slow = submit(IN, 1, {{at, 512, true}}); });
  while (!entered) std::this_thread::yield();
  block.kick(1);  // another thread comes and goes
  block.kick(0);
  std::array<uint8_t, 8> config{};
  block.read_config(0, config);
  go_on = true;
  vcpu.join();
  EXPECT_EQ(result(slow), OK);
  EXPECT_EQ(driver.get(at, 1)[0], 1);
}

// Which thread serves: the loop, once a driver has been seen to ask for more before it knew of an answer.
TEST_P(BlockTest, TheLoopServesADriverWithSeveralRequestsOut) {
  EventLoop loop("test");
  block.attach_loop(loop);
  const uint64_t at = driver.allocate(512);
  struct {
    uint32_t type, reserved;
    uint64_t sector;
  } const header{IN, 0, 1};
  const uint64_t head = driver.put_struct(header), status = driver.put({0xee});
  const auto add = [&] {
    if (driver.features & F_EVENT_IDX) driver.queues[0].interrupt_after(1);
    driver.queues[0].submit({{head, sizeof header, false}, {at, 512, true}, {status, 1, true}});
  };
  std::atomic<unsigned>& interrupts = driver.transport.queue_interrupts[0];
  std::atomic<unsigned> by_loop = 0, by_kicker = 0;
  std::atomic<bool> go_on = true;
  disk->before = [&](uint64_t) {
    (loop.on_loop_thread() ? by_loop : by_kicker)++;
    while (loop.on_loop_thread() && !go_on) std::this_thread::yield();
  };
  const auto ask = [&] {
    unsigned seen = interrupts;
    add();
    block.notified(0);
    do {  // an interrupt that the loop still owed for an earlier answer may come first
      while (interrupts == seen) std::this_thread::yield();
      seen = interrupts;
    } while (!driver.used(0));
  };
  // Who waits for each answer serves itself; the loop is tried once in a while.
  for (unsigned i = 0; i < Depth::first_interval + 10; i++) ask();
  EXPECT_GE(by_loop, 1u);
  EXPECT_GE(by_kicker, Depth::first_interval / 2);
  // At the next trial a second request is there before the first is answered.
  go_on = false;
  for (;;) {
    const unsigned before = by_kicker;
    add();
    block.notified(0);
    if (by_kicker == before) break;
    EXPECT_TRUE(driver.used(0));
  }
  const uint64_t answered = block.counts().reads;
  add();
  go_on = true;
  while (block.counts().reads < answered + 2) std::this_thread::yield();
  EXPECT_TRUE(driver.used(0));
  EXPECT_TRUE(driver.used(0));
  block.detach_loop();  // waits until the loop is done with it, and so knows
  block.attach_loop(loop);
  by_loop = by_kicker = 0;
  ask();
  EXPECT_EQ(by_loop, 1u);
  EXPECT_EQ(by_kicker, 0u);
  // And when it waits for its answers again, that is seen, too.
  for (unsigned i = 0; i < 1000 && by_kicker == 0; i++) ask();
  EXPECT_GT(by_kicker, 0u);
  block.detach_loop();
}

TEST_P(BlockTest, ConfigurationAndState) {
  std::array<uint8_t, 60> config{};
  block.read_config(0, config);
  EXPECT_EQ(config[0], 64);
  EXPECT_EQ(config[34], 2);  // queues
  disk->bytes.resize(128 * 512);
  block.resized();
  EXPECT_EQ(driver.transport.config_interrupts, 1u);
  block.read_config(0, config);
  EXPECT_EQ(config[0], 128);
  nlohmann::json first, second;
  block.save(first);
  Block other(memory, disk, {"", 2});
  other.load(first);
  other.save(second);
  EXPECT_EQ(first, second);
  disk->bytes.resize(512);
  EXPECT_THROW(other.load(first), UsageError);
}

TEST(HostileDriver, NothingItDoesHurtsTheDisk) {
  for (unsigned seed = 0; seed < 100; seed++) {
    machine::GuestMemory memory(2 * machine::layout::MiB);
    auto disk = std::make_shared<MemoryDisk>(64 * 512);
    Block block(memory, disk, {"", 2});
    FakeDriver driver(block, memory);
    std::mt19937 random(seed);
    testing::attack(block, memory, 300, [&](uint32_t below) { return random() % below; });
    ASSERT_TRUE(driver.start(F_RING_PACKED)) << seed;
    const uint64_t status = driver.put({0xee});
    driver.submit(
        0, {{driver.put({4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}), 16, false}, {status, 1, true}});
    EXPECT_EQ(driver.get(status, 1)[0], OK) << seed;
  }
}

}  // namespace
}  // namespace lodge::device::virtio
