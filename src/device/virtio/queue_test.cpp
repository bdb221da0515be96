// Both ring layouts against a driver that follows VirtIO 1.2, section 2.7 and 2.8, and against one that does
// not.
#include "device/virtio/queue.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <random>

#include "device/virtio/testing.hpp"

namespace lodge::device::virtio {
namespace {

using testing::Buffer;
using testing::DriverQueue;
using ::testing::ElementsAre;
using testing::Rings;

constexpr uint64_t base = 0x10000, data = 0x80000;

class QueueTest : public ::testing::TestWithParam<Rings> {
 protected:
  void start(uint16_t size = 8, uint64_t more = 0) {
    features = GetParam().features | more;
    driver.emplace(memory, base, size, features);
    ASSERT_TRUE(queue.activate(driver->setup, features, memory));
  }
  uint16_t submit(const std::vector<Buffer>& buffers) { return driver->submit(buffers, GetParam().indirect); }
  // What a hostile descriptor in the first place gives.
  Pop pop_descriptor(uint64_t address, uint32_t length, uint16_t flags, uint16_t next = 0) {
    submit({{data, 16, false}});
    uint16_t raw = flags;
    if (driver->packed()) raw |= DESC_AVAIL;
    driver->put_descriptor(base, address, length, raw, next);
    return queue.pop(chain);
  }

  machine::GuestMemory memory{machine::layout::MiB};
  uint64_t features = 0;
  std::optional<DriverQueue> driver;
  Queue queue;
  Chain chain;
};

INSTANTIATE_TEST_SUITE_P(Rings, QueueTest, ::testing::ValuesIn(testing::all_rings()),
                         [](const auto& test) { return test.param.name; });

TEST_P(QueueTest, ARequestComesOutAndGoesBack) {
  start();
  EXPECT_EQ(queue.pop(chain), Pop::empty);
  memory.write(data, std::array<uint8_t, 4>{1, 2, 3, 4});
  const uint16_t id =
      submit({{data, 3, false}, {data + 3, 1, false}, {data + 16, 2, true}, {data + 32, 8, true}});
  ASSERT_EQ(queue.pop(chain), Pop::chain);
  EXPECT_EQ(chain.readable_size(), 4u);
  EXPECT_EQ(chain.writable_size(), 10u);
  std::array<uint8_t, 3> middle{};
  EXPECT_EQ(chain.read(1, middle), 3u);
  EXPECT_THAT(middle, ElementsAre(2, 3, 4));
  EXPECT_EQ(chain.write(1, std::array<uint8_t, 3>{7, 8, 9}), 3u);
  EXPECT_EQ(chain.write(9, std::array<uint8_t, 3>{5, 5, 5}), 1u);
  EXPECT_FALSE(driver->used());
  queue.push(chain, 10);
  const auto used = driver->used();
  ASSERT_TRUE(used);
  EXPECT_EQ(used->id, id);
  EXPECT_EQ(used->written, 10u);
  std::array<uint8_t, 2> out{};
  memory.read(data + 32, out);
  EXPECT_THAT(out, ElementsAre(8, 9));
  EXPECT_EQ(queue.pop(chain), Pop::empty);
}

TEST_P(QueueTest, GoesRoundManyTimesInWhateverOrderRequestsComplete) {
  start(8);
  std::mt19937 random(7);
  std::vector<Chain> out;
  std::vector<uint16_t> completed, expected;
  std::map<uint16_t, unsigned> length_of;
  unsigned places = 0;
  const auto collect = [&] {
    while (const auto used = driver->used()) {
      completed.push_back(used->id);
      places -= length_of[used->id];
    }
  };
  // The fake driver of split rings hands out its descriptors in turn, so only the others may complete in any
  // order.
  const bool any_order = driver->packed() || (features & F_IN_ORDER);
  for (unsigned step = 0; step < 5000; step++) {
    const unsigned length = GetParam().indirect ? 1 : 1 + random() % 2;
    if (places + length <= 8 && random() % 2) {
      const uint16_t id = submit(std::vector<Buffer>(length, Buffer{data, 64, true}));
      places += length;
      length_of[id] = length;
      ASSERT_EQ(queue.pop(chain), Pop::chain);
      EXPECT_EQ(chain.id(), id);
      out.push_back(chain);
      expected.push_back(id);
    } else if (!out.empty()) {
      const size_t which = any_order ? random() % out.size() : 0;
      queue.push(out[which], step);
      out.erase(out.begin() + static_cast<ptrdiff_t>(which));
    }
    collect();
  }
  for (const Chain& left : out) queue.push(left, 0);
  collect();
  EXPECT_EQ(places, 0u);
  EXPECT_GT(expected.size(), 1000u);
  if (driver->packed() && !(features & F_IN_ORDER)) {
    EXPECT_NE(completed, expected);
    std::ranges::sort(completed);
    std::ranges::sort(expected);
  }
  EXPECT_EQ(completed, expected);
}

TEST_P(QueueTest, AnUndonePopComesAgain) {
  start();
  const uint16_t id = submit({{data, 16, true}});
  ASSERT_EQ(queue.pop(chain), Pop::chain);
  queue.undo_pop(chain);
  EXPECT_EQ(queue.in_flight(), 0u);
  ASSERT_EQ(queue.pop(chain), Pop::chain);
  EXPECT_EQ(chain.id(), id);
  queue.push(chain, 0);
  EXPECT_TRUE(driver->used());
}

TEST_P(QueueTest, InterruptsAsTheDriverWishes) {
  start();
  const auto one = [&] {
    submit({{data, 16, true}});
    EXPECT_EQ(queue.pop(chain), Pop::chain);
    queue.push(chain, 16);
    const bool wanted = queue.interrupt_wanted();
    driver->used();
    return wanted;
  };
  if (features & F_EVENT_IDX) {
    one();
    driver->interrupt_after(1);
    EXPECT_TRUE(one());
    driver->interrupt_after(3);
    EXPECT_FALSE(one());
    EXPECT_FALSE(one());
    EXPECT_TRUE(one());
    EXPECT_FALSE(one());
    for (int round = 0; round < 40; round++) {  // over the end of the ring, at every place
      driver->interrupt_after(2);
      EXPECT_FALSE(one()) << round;
      EXPECT_TRUE(one()) << round;
    }
  } else {
    EXPECT_TRUE(one());
    driver->suppress_interrupts(true);
    EXPECT_FALSE(one());
    driver->suppress_interrupts(false);
    EXPECT_TRUE(one());
  }
}

TEST_P(QueueTest, TellsTheDriverWhetherToKick) {
  start();
  queue.want_kicks(false);
  if (driver->packed()) {
    EXPECT_EQ(driver->get16(driver->setup.device + 2), 1);
  } else if (!(features & F_EVENT_IDX)) {
    EXPECT_EQ(driver->get16(driver->setup.device), 1);
  }
  submit({{data, 16, true}});
  queue.pop(chain);
  queue.want_kicks(true);
  if (driver->packed()) {
    EXPECT_EQ(driver->get16(driver->setup.device + 2), features & F_EVENT_IDX ? 2 : 0);
    if (features & F_EVENT_IDX) {
      EXPECT_EQ(driver->get16(driver->setup.device), 1 | 0x8000);
    }
  } else if (features & F_EVENT_IDX) {
    EXPECT_EQ(driver->get16(driver->setup.device + 4 + 8 * driver->size()), 1);
  } else {
    EXPECT_EQ(driver->get16(driver->setup.device), 0);
  }
}

TEST_P(QueueTest, APositionIsKept) {
  start();
  for (int i = 0; i < 11; i++) {
    submit({{data, 16, true}});
    ASSERT_EQ(queue.pop(chain), Pop::chain);
    queue.push(chain, 1);
    ASSERT_TRUE(driver->used());
  }
  submit({{data, 16, true}});
  Queue other;
  ASSERT_TRUE(other.activate(driver->setup, features, memory));
  ASSERT_TRUE(other.set_position(queue.position()));
  ASSERT_EQ(other.pop(chain), Pop::chain);
  other.push(chain, 5);
  const auto used = driver->used();
  ASSERT_TRUE(used);
  EXPECT_EQ(used->written, 5u);
}

// --- Hostile drivers

TEST_P(QueueTest, ImpossibleSetUpsAreRefused) {
  start();
  const QueueSetup good = driver->setup;
  const auto refused = [&](auto change) {
    QueueSetup setup = good;
    change(setup);
    return !queue.activate(setup, features, memory);
  };
  EXPECT_TRUE(refused([](auto& s) { s.size = 0; }));
  EXPECT_TRUE(refused([](auto& s) { s.descriptors += 8; }));
  EXPECT_TRUE(refused([](auto& s) { s.driver += 1; }));
  EXPECT_TRUE(refused([](auto& s) { s.device += 2; }));
  EXPECT_TRUE(refused([](auto& s) { s.descriptors = machine::layout::MiB - 16; }));
  EXPECT_TRUE(refused([](auto& s) { s.driver = ~uint64_t{15}; }));
  EXPECT_TRUE(refused([](auto& s) { s.device = uint64_t{1} << 50; }));
  if (!driver->packed()) {
    EXPECT_TRUE(refused([](auto& s) { s.size = 6; }));
  }
  EXPECT_FALSE(queue.active());
  EXPECT_EQ(queue.pop(chain), Pop::empty);
}

TEST_P(QueueTest, BuffersOutsideRamBreakTheQueue) {
  for (const uint64_t address :
       {machine::layout::MiB - 8, uint64_t{1} << 40, ~uint64_t{0} - 4, ~uint64_t{0}}) {
    start();
    EXPECT_EQ(pop_descriptor(address, 16, 0), Pop::broken) << address;
    EXPECT_EQ(queue.pop(chain), Pop::broken);  // and it stays so
    EXPECT_FALSE(queue.has_available());
  }
}

TEST_P(QueueTest, AZeroLengthBufferIsNothing) {
  start();
  ASSERT_EQ(pop_descriptor(~uint64_t{0}, 0, DESC_WRITE), Pop::chain);
  EXPECT_EQ(chain.writable_size(), 0u);
  queue.push(chain, 0);
  EXPECT_TRUE(driver->used());
}

TEST_P(QueueTest, ACycleEnds) {
  start();
  // Split: a descriptor that links to itself; packed: a chain all around the ring.
  for (int i = 0; i < 8; i++) {
    const uint16_t flags = DESC_NEXT | (driver->packed() ? DESC_AVAIL : 0);
    driver->put_descriptor(base + 16 * static_cast<uint64_t>(i), data, 16, flags, 0);
  }
  if (!driver->packed()) driver->put16(driver->setup.driver + 2, 1);
  EXPECT_EQ(queue.pop(chain), Pop::broken);
}

TEST_P(QueueTest, MoreThanTheRingHoldsBreaksIt) {
  start();
  if (driver->packed()) {
    // All places again and again, without waiting for the device.
    for (int i = 0; i < 8; i++) submit({{data, 16, true}});
    for (int i = 0; i < 8; i++) ASSERT_EQ(queue.pop(chain), Pop::chain);
    for (int i = 0; i < 8; i++)
      driver->put_descriptor(base + 16u * static_cast<unsigned>(i), data, 16, DESC_USED, 0);
    EXPECT_EQ(queue.pop(chain), Pop::broken);
  } else {
    driver->put16(driver->setup.driver + 2, 9);
    EXPECT_EQ(queue.pop(chain), Pop::broken);
    start();
    for (int i = 0; i < 8; i++) submit({{data, 16, true}});
    for (int i = 0; i < 8; i++) ASSERT_EQ(queue.pop(chain), Pop::chain);
    driver->put16(driver->setup.driver + 2, 9);
    EXPECT_EQ(queue.pop(chain), Pop::broken);
  }
}

TEST_P(QueueTest, AHeadOutsideTheTableBreaksTheQueue) {
  start();
  if (driver->packed()) GTEST_SKIP() << "packed rings have no heads";
  driver->put16(driver->setup.driver + 4, 8);
  driver->put16(driver->setup.driver + 2, 1);
  EXPECT_EQ(queue.pop(chain), Pop::broken);
}

TEST_P(QueueTest, ReadableBehindWritableBreaksTheQueue) {
  start();
  driver->submit({{data, 16, true}, {data, 16, false}});
  EXPECT_EQ(queue.pop(chain), Pop::broken);
}

TEST_P(QueueTest, IndirectTablesAreChecked) {
  if (!GetParam().indirect) {
    start();
    EXPECT_EQ(pop_descriptor(data, 16, DESC_INDIRECT), Pop::broken);  // not negotiated
    return;
  }
  const auto table = [&](uint32_t length, uint16_t flags, uint16_t next, uint16_t outer = DESC_INDIRECT) {
    start();
    for (uint64_t i = 0; i < 4; i++) driver->put_descriptor(data + 16 * i, data, 16, flags, next);
    return pop_descriptor(data, length, outer);
  };
  EXPECT_EQ(table(0, 0, 0), Pop::broken);
  EXPECT_EQ(table(24, 0, 0), Pop::broken);
  EXPECT_EQ(table(64, 0, 0, DESC_INDIRECT | DESC_NEXT), Pop::broken);
  EXPECT_EQ(table(0xffff'fff0, 0, 0), Pop::broken);  // longer than RAM
  EXPECT_EQ(table(64, 0, 0), Pop::chain);
  if (!driver->packed()) {
    EXPECT_EQ(table(64, DESC_NEXT, 0), Pop::broken);      // a cycle
    EXPECT_EQ(table(64, DESC_NEXT, 4), Pop::broken);      // out of the table
    EXPECT_EQ(table(64, DESC_INDIRECT, 0), Pop::broken);  // a table in a table
  }
}

TEST_P(QueueTest, MoreBytesThanALengthCanSayBreakTheQueue) {
  // 2.7.5.2: at most 2^32 bytes. 16 MiB of RAM, 512 times.
  if (!GetParam().indirect) GTEST_SKIP() << "needs a table";
  machine::GuestMemory large(16 * machine::layout::MiB);
  DriverQueue wide(large, base, 8, GetParam().features);
  ASSERT_TRUE(queue.activate(wide.setup, GetParam().features, large));
  constexpr uint32_t count = 512;
  for (uint64_t i = 0; i < count; i++)
    wide.put_descriptor(data + 16 * i, 0x10'0000, 8 << 20,
                        DESC_WRITE | (i + 1 < count && !wide.packed() ? DESC_NEXT : 0),
                        static_cast<uint16_t>(i + 1));
  wide.submit({{data, 16, false}});
  wide.put_descriptor(base, data, 16 * count,
                      static_cast<uint16_t>(DESC_INDIRECT | (wide.packed() ? DESC_AVAIL : 0)), 0);
  EXPECT_EQ(queue.pop(chain), Pop::broken);
}

}  // namespace
}  // namespace lodge::device::virtio
