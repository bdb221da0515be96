// Many threads at once, and processes that are killed.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <csignal>
#include <random>
#include <thread>

#include "base/error.hpp"
#include "base/temporary_directory.hpp"
#include "block/memory_storage.hpp"
#include "block/qcow2/check.hpp"
#include "block/qcow2/create.hpp"
#include "block/qcow2/image.hpp"

namespace lodge::block::qcow2 {
namespace {

constexpr uint64_t sector = 512;

class Stress : public testing::TestWithParam<bool> {  // subclusters
 protected:
  void make(uint64_t size, bool backing) {
    CreateOptions options;
    options.size = size;
    options.cluster_bits = 14;
    options.extended_l2 = GetParam();
    if (backing) {
      const std::string base = directory_ / "base";
      FileStorage storage(Fd(::open(base.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600)), base, Use::write,
                          make_engine(Engine::threads));
      const std::vector<uint32_t> ones(size / 4, 1);
      storage.write(ones.data(), size, 0);
      options.backing_file = "base";
      options.backing_format = "raw";
    }
    FileStorage storage(Fd(::open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600)), path_, Use::write,
                        make_engine(Engine::threads));
    create(storage, options);
  }
  CheckResult check_file() const {
    FileStorage storage(path_, Use::read, true, make_engine(Engine::threads));
    return check(storage, Repair::none);
  }
  TemporaryDirectory directory_;
  std::string path_ = directory_ / "disk";
};

INSTANTIATE_TEST_SUITE_P(Shapes, Stress, testing::Bool(),
                         [](const auto& instance) { return instance.param ? "Subclusters" : "Plain"; });

// Each thread has every n-th sector for itself, so that all meet in every cluster, and knows what its sectors
// hold.
TEST_P(Stress, ThreadsInTheSameClustersDoNotDisturbEachOther) {
  constexpr unsigned threads = 6, rounds = 400;
  constexpr uint64_t size = 2 << 20, sectors = size / sector;
  make(size, true);
  const auto image = open_image(path_, {});
  auto& qcow2 = dynamic_cast<Qcow2Image&>(*image);
  std::atomic<unsigned> wrong = 0, running = threads;
  const auto work = [&](unsigned self) {
    std::mt19937 random(self);
    std::vector<uint32_t> expected(sectors, 1);
    std::vector<uint32_t> data(sector / 4);
    for (unsigned round = 0; round < rounds; round++) {
      const uint64_t at = random() % (sectors / threads) * threads + self;
      if (at >= sectors) continue;
      const unsigned kind = random() % 10;
      if (kind < 5) {
        expected[at] = random();
        std::ranges::fill(data, expected[at]);
        wrong += write(*image, data.data(), sector, at * sector) != 0;
      } else if (kind == 5) {
        expected[at] = 0;
        wrong += write_zeroes(*image, at * sector, sector, true) != 0;
      } else if (kind == 6) {
        wrong += flush(*image) != 0;
      } else {
        wrong += read(*image, data.data(), sector, at * sector) != 0;
        wrong += data.front() != expected[at] || data.back() != expected[at];
      }
    }
    running--;
  };
  std::vector<std::thread> workers;
  for (unsigned i = 0; i < threads; i++) workers.emplace_back(work, i);
  // Meanwhile the whole changes too.
  for (unsigned i = 0; running > 0; i++) {
    EXPECT_EQ(qcow2.create_snapshot(std::to_string(i)), 0);
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    EXPECT_EQ(qcow2.delete_snapshot(std::to_string(i)), 0);
  }
  for (auto& worker : workers) worker.join();
  EXPECT_EQ(wrong, 0u);
  EXPECT_EQ(image->close(), 0);
  const CheckResult result = check_file();
  EXPECT_EQ(result.corruptions + result.leaks, 0u) << testing::PrintToString(result.findings);
}

// Discards and writes of whole clusters race; places that are given up must not be used too early.
TEST_P(Stress, PlacesAreNotUsedAgainTooEarly) {
  constexpr unsigned threads = 4, rounds = 300;
  constexpr uint64_t size = 4 << 20, part = size / threads, cluster = 16384;
  make(size, false);
  const auto image = open_image(path_, {});
  std::atomic<unsigned> wrong = 0;
  const auto work = [&](unsigned self) {
    std::mt19937 random(self);
    std::vector<uint32_t> data(cluster / 4), expected(part / cluster);
    for (unsigned round = 0; round < rounds; round++) {
      const uint64_t index = random() % expected.size(), at = self * part + index * cluster;
      const unsigned kind = random() % 8;
      if (kind < 3) {
        expected[index] = (self + 1) << 24 | round;
        std::ranges::fill(data, expected[index]);
        wrong += write(*image, data.data(), cluster, at) != 0;
      } else if (kind < 5) {
        expected[index] = 0;
        wrong += discard(*image, at, cluster) != 0;
      } else if (kind == 5) {
        wrong += flush(*image) != 0;
      } else {
        wrong += read(*image, data.data(), cluster, at) != 0;
        wrong += std::ranges::any_of(data, [&](uint32_t v) { return v != expected[index]; });
      }
    }
  };
  std::vector<std::thread> workers;
  for (unsigned i = 0; i < threads; i++) workers.emplace_back(work, i);
  for (auto& worker : workers) worker.join();
  EXPECT_EQ(wrong, 0u);
  EXPECT_EQ(image->close(), 0);
  const CheckResult result = check_file();
  EXPECT_EQ(result.corruptions + result.leaks, 0u) << testing::PrintToString(result.findings);
}

// Tables take their time to reach the file.
class UnhurriedStorage final : public MemoryStorage {
 public:
  using MemoryStorage::MemoryStorage;
  using MemoryStorage::write;
  int write(const void* data, size_t size, uint64_t offset) noexcept override {
    std::this_thread::sleep_for(std::chrono::microseconds(100));
    return MemoryStorage::write(data, size, offset);
  }
  void write(std::vector<iovec> buffers, uint64_t offset, Completion done) noexcept override {
    for (const auto& buffer : buffers) {
      MemoryStorage::write(buffer.iov_base, buffer.iov_len, offset);
      offset += buffer.iov_len;
    }
    done(0);
  }
};

// With room for a single table, every request drops what another needs, also in the middle of a commit.
class TinyCaches : public testing::TestWithParam<bool> {};
INSTANTIATE_TEST_SUITE_P(Storage, TinyCaches, testing::Bool(),
                         [](const auto& instance) { return instance.param ? "Unhurried" : "Hurried"; });

TEST_P(TinyCaches, LoseNothing) {
  constexpr uint64_t size = 2 << 20, cluster = 512;  // 64 tables of 32 KiB, blocks of 64 counts
  constexpr unsigned threads = 4, rounds = 1500;
  const auto disk = std::make_shared<MemoryStorage::Disk>();
  CreateOptions options;
  options.size = size;
  options.cluster_bits = 9;
  options.refcount_order = 6;
  {
    MemoryStorage storage(disk);
    create(storage, options);
  }
  const auto open = [&] {
    Qcow2Image::Parts parts;
    if (GetParam())
      parts.storage = std::make_unique<UnhurriedStorage>(disk);
    else
      parts.storage = std::make_unique<MemoryStorage>(disk);
    parts.header = read_header(*parts.storage);
    parts.cache = {.l2_bytes = 0, .minimum_tables = 1, .refcount_blocks = 1};
    return std::make_unique<Qcow2Image>(std::move(parts), false);
  };
  auto image = open();
  std::atomic<unsigned> wrong = 0;
  std::vector<std::vector<uint32_t>> expected(threads, std::vector<uint32_t>(size / cluster / threads));
  const auto work = [&](unsigned self) {
    std::mt19937 random(self);
    std::vector<uint32_t> data(cluster / 4);
    for (unsigned round = 0; round < rounds; round++) {
      const uint64_t index = random() % expected[self].size(), at = (index * threads + self) * cluster;
      const unsigned kind = random() % 16;
      if (kind < 8) {
        expected[self][index] = random();
        std::ranges::fill(data, expected[self][index]);
        wrong += write(*image, data.data(), cluster, at) != 0;
      } else if (kind == 8) {
        expected[self][index] = 0;
        wrong += discard(*image, at, cluster) != 0;
      } else if (kind == 9) {
        wrong += flush(*image) != 0;
      } else {
        wrong += read(*image, data.data(), cluster, at) != 0;
        wrong += data.front() != expected[self][index] || data.back() != expected[self][index];
      }
    }
  };
  std::vector<std::thread> workers;
  for (unsigned i = 0; i < threads; i++) workers.emplace_back(work, i);
  for (auto& worker : workers) worker.join();
  EXPECT_EQ(wrong, 0u);
  ASSERT_EQ(image->close(), 0);
  {
    MemoryStorage storage(disk);
    const CheckResult result = check(storage, Repair::none);
    EXPECT_EQ(result.corruptions + result.leaks, 0u) << testing::PrintToString(result.findings);
  }
  image = open();
  std::vector<uint32_t> data(size / 4);
  ASSERT_EQ(read(*image, data.data(), size, 0), 0);
  for (uint64_t i = 0; i < size / cluster; i++)
    ASSERT_EQ(data[i * cluster / 4], expected[i % threads][i / threads]) << i;
}

// Keeps asynchronous transfers back while told to.
class SlowStorage final : public MemoryStorage {
 public:
  struct Held {
    std::mutex mutex;
    bool hold = false;
    std::vector<std::move_only_function<void()>> transfers;
    void let_go() {
      std::unique_lock lock(mutex);
      hold = false;
      auto list = std::exchange(transfers, {});
      lock.unlock();
      for (auto& transfer : list) transfer();
    }
  };
  SlowStorage(std::shared_ptr<Disk> disk, std::shared_ptr<Held> held)
      : MemoryStorage(std::move(disk)), held_(std::move(held)) {}
  using MemoryStorage::read;
  using MemoryStorage::write;
  void read(std::vector<iovec> buffers, uint64_t offset, Completion done) noexcept override {
    later([this, buffers = std::move(buffers), offset, done = std::move(done)]() mutable {
      MemoryStorage::read(std::move(buffers), offset, std::move(done));
    });
  }
  void write(std::vector<iovec> buffers, uint64_t offset, Completion done) noexcept override {
    later([this, buffers = std::move(buffers), offset, done = std::move(done)]() mutable {
      MemoryStorage::write(std::move(buffers), offset, std::move(done));
    });
  }

 private:
  void later(std::move_only_function<void()> transfer) {
    {
      const std::lock_guard lock(held_->mutex);
      if (held_->hold) return held_->transfers.push_back(std::move(transfer));
    }
    transfer();
  }
  std::shared_ptr<Held> held_;
};

TEST(Epochs, APlaceIsNotUsedAgainWhileATransferToItIsUnderWay) {
  constexpr uint64_t cluster = 4096;
  const auto disk = std::make_shared<MemoryStorage::Disk>();
  const auto held = std::make_shared<SlowStorage::Held>();
  CreateOptions options;
  options.size = 1 << 20;
  options.cluster_bits = 12;
  {
    MemoryStorage storage(disk);
    create(storage, options);
  }
  Qcow2Image::Parts parts;
  parts.storage = std::make_unique<SlowStorage>(disk, held);
  parts.header = read_header(*parts.storage);
  Qcow2Image image(std::move(parts), false);
  std::vector<uint8_t> old(cluster, 0x11), slow(cluster, 0x33), fresh(cluster, 0x22), seen(cluster);
  for (const bool writing : {false, true}) {
    ASSERT_EQ(write(image, old.data(), cluster, 0), 0);
    ASSERT_EQ(flush(image), 0);
    held->hold = true;
    std::atomic<int> result = -1;
    const iovec buffer{writing ? slow.data() : seen.data(), cluster};
    const auto done = [&](int error) { result = error; };
    if (writing)
      image.write({&buffer, 1}, 0, done);
    else
      image.read({&buffer, 1}, 0, done);
    ASSERT_EQ(held->transfers.size(), 1u);
    ASSERT_EQ(discard(image, 0, cluster), 0);
    ASSERT_EQ(flush(image), 0);
    ASSERT_EQ(flush(image), 0);
    {
      const std::lock_guard lock(held->mutex);
      held->hold = false;
    }
    // A file of this size has few free places: the one that was given up is the lowest.
    for (uint64_t at = 5; at < 9; at++) ASSERT_EQ(write(image, fresh.data(), cluster, at * cluster), 0);
    held->let_go();
    while (result < 0) ::usleep(100);
    EXPECT_EQ(result, 0);
    if (!writing) {
      EXPECT_EQ(seen, old);
    }
    for (uint64_t at = 5; at < 9; at++) {
      ASSERT_EQ(read(image, seen.data(), cluster, at * cluster), 0);
      EXPECT_EQ(seen, fresh) << at;
      ASSERT_EQ(discard(image, at * cluster, cluster), 0);
    }
    ASSERT_EQ(flush(image), 0);
  }
  EXPECT_EQ(image.close(), 0);
  MemoryStorage storage(disk);
  const CheckResult result = check(storage, Repair::none);
  EXPECT_EQ(result.corruptions + result.leaks, 0u) << testing::PrintToString(result.findings);
}

// The child tells through a pipe what has been flushed; whatever it has told must be there after kill -9.
[[noreturn]] void write_until_killed(const std::string& path, int tell, unsigned seed) {
  std::mt19937 random(seed);
  const auto image = open_image(path, {});
  const uint64_t sectors = image->size() / sector;
  std::vector<uint32_t> data(64 * sector / 4);
  for (uint32_t id = 1;; id++) {
    const uint64_t count = 1 + random() % 64, at = random() % (sectors - count);
    std::fill_n(data.begin(), count * sector / 4, id);
    if (write(*image, data.data(), count * sector, at * sector) != 0) ::_exit(1);
    const bool flushed = random() % 4 == 0;
    if (flushed && flush(*image) != 0) ::_exit(2);
    const std::array<uint64_t, 4> message{id, at, count, flushed};
    if (::write(tell, message.data(), sizeof message) != sizeof message) ::_exit(3);
  }
}

TEST_P(Stress, KilledProcessesLoseNothingThatWasFlushed) {
  constexpr uint64_t size = 8 << 20;
  make(size, false);
  for (unsigned round = 0; round < 15; round++) {
    int pipe[2];
    ASSERT_EQ(::pipe(pipe), 0);
    std::vector<uint32_t> before(size / 4);
    ASSERT_EQ(read(*open_image(path_, {}), before.data(), size, 0), 0);
    const pid_t child = ::fork();
    if (child == 0) {
      ::close(pipe[0]);
      write_until_killed(path_, pipe[1], round);
    }
    ::close(pipe[1]);
    ::usleep(20'000 + round * 3'000);
    ::kill(child, SIGKILL);
    int status = 0;
    ::waitpid(child, &status, 0);
    ASSERT_TRUE(WIFSIGNALED(status)) << status;
    // Sectors that were written later than the last flush that we know of may hold either.
    std::vector<std::array<uint64_t, 4>> told;
    std::array<uint64_t, 4> message{};
    while (::read(pipe[0], message.data(), sizeof message) == sizeof message) told.push_back(message);
    ::close(pipe[0]);
    const CheckResult result = check_file();
    ASSERT_EQ(result.corruptions, 0u) << testing::PrintToString(result.findings);
    std::vector<uint32_t> promised(size / sector, UINT32_MAX), now(size / 4);
    size_t flushed = 0;
    for (size_t i = 0; i < told.size(); i++)
      if (told[i][3]) flushed = i + 1;
    for (size_t i = 0; i < flushed; i++)
      for (uint64_t s = 0; s < told[i][2]; s++) promised[told[i][1] + s] = static_cast<uint32_t>(told[i][0]);
    ASSERT_EQ(read(*open_image(path_, {}), now.data(), size, 0), 0);
    for (uint64_t s = 0; s < size / sector; s++) {
      if (promised[s] == UINT32_MAX) continue;
      const uint32_t found = now[s * sector / 4];
      ASSERT_GE(found, promised[s]) << "sector " << s;  // later writes have higher numbers
    }
  }
}

}  // namespace
}  // namespace lodge::block::qcow2
