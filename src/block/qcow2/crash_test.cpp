// Power is lost after every single write of a random run of operations, with any part of what was not flushed
// lost or out of order: the image must open without damage (leaked clusters are allowed), and hold everything
// that a flush has promised.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>

#include "block/chain.hpp"
#include "block/memory_storage.hpp"
#include "block/qcow2/check.hpp"
#include "block/qcow2/create.hpp"
#include "block/qcow2/image.hpp"

namespace lodge::block::qcow2 {
namespace {

using Disk = MemoryStorage::Disk;
using Event = MemoryStorage::Event;

constexpr uint64_t sector = 512;

struct Shape {
  const char* name;
  CreateOptions options;
  bool snapshots = true, backing = false;
};

Shape shape(const char* name, uint64_t size, unsigned bits, unsigned version = 3) {
  Shape result{name, {}};
  result.options.size = size;
  result.options.cluster_bits = bits;
  result.options.version = version;
  return result;
}

std::vector<Shape> shapes() {
  std::vector<Shape> all{shape("Default", 256 << 10, 12), shape("Version2", 128 << 10, 11, 2)};
  all.push_back(shape("Lazy", 256 << 10, 12));
  all.back().options.lazy_refcounts = true;
  all.push_back(shape("Subclusters", 512 << 10, 14));
  all.back().options.extended_l2 = true;
  // 64 counts in a block: blocks, and the table of blocks, have to grow all the time.
  all.push_back(shape("GrowingCounts", 1 << 20, 9));
  all.back().options.refcount_order = 6;
  all.push_back(shape("Backed", 256 << 10, 12));
  all.back().backing = true;
  return all;
}

// What a sector may hold: every write fills its sectors with a number of its own, 0 are zeros.
using Values = std::set<uint32_t>;

struct Operation {
  size_t begin, end;  // events
  bool flush = false;
  uint64_t first = 0, last = 0;  // sectors [first, last)
  uint32_t value = 0;
  bool discard = false;
  std::vector<uint32_t> reverted;  // the sectors' values in the snapshot that was applied
};

// LODGE_BLOCK_SEEDS=n in the environment: n runs of each shape instead of one.
int seeds() {
  const char* text = std::getenv("LODGE_BLOCK_SEEDS");
  return text ? std::max(std::atoi(text), 1) : 1;
}

class Crash : public testing::TestWithParam<std::tuple<Shape, int>> {
 protected:
  static const Shape& shape() { return std::get<0>(GetParam()); }
  void SetUp() override {
    random_.seed(static_cast<unsigned>(std::get<1>(GetParam())));
    options_ = shape().options;
    MemoryStorage storage(disk_);
    create(storage, options_);
    start_ = disk_->bytes;
    disk_->record = true;
    sectors_ = options_.size / sector;
    if (shape().backing) {
      backing_->bytes.resize(options_.size / 2);
      for (size_t i = 0; i < backing_->bytes.size(); i += 4) std::memcpy(&backing_->bytes[i], "\1\0\0", 4);
    }
  }

  std::unique_ptr<Image> open(const std::shared_ptr<Disk>& disk, bool writable) const {
    if (shape().backing) {
      Qcow2Image::Parts parts;
      parts.storage = std::make_unique<MemoryStorage>(disk, writable);
      parts.header = read_header(*parts.storage);
      OpenOptions raw;
      raw.format = "raw";
      raw.read_only = true;
      parts.backing = open_storage(std::make_unique<MemoryStorage>(backing_, false), raw);
      return std::make_unique<Qcow2Image>(std::move(parts), !writable);
    }
    OpenOptions options;
    options.format = "qcow2";
    options.read_only = !writable;
    return open_storage(std::make_unique<MemoryStorage>(disk, writable), options);
  }

  size_t events() const {
    const std::lock_guard lock(disk_->mutex);
    return disk_->events.size();
  }

  void operate(unsigned count) {
    auto image = open(disk_, true);
    auto& qcow2 = dynamic_cast<Qcow2Image&>(*image);
    for (uint32_t i = 2; i < count + 2; i++) {
      Operation op{events(), 0};
      op.first = random_() % sectors_;
      op.last = op.first + 1 + random_() % std::min<uint64_t>(sectors_ - op.first, random_() % 4 ? 12 : 200);
      const uint64_t offset = op.first * sector, length = (op.last - op.first) * sector;
      switch (random_() % 12) {
        case 0:
          op.discard = true;
          ASSERT_EQ(discard(*image, offset, length), 0);
          break;
        case 1:
        case 2: ASSERT_EQ(write_zeroes(*image, offset, length, random_() % 2), 0); break;
        case 3:
        case 4:
          op.flush = true;
          ASSERT_EQ(flush(*image), 0);
          break;
        case 5:
          op.flush = true;  // a snapshot promises what it holds
          if (shape().snapshots)
            change_snapshots(qcow2, op);
          else
            ASSERT_EQ(flush(*image), 0);
          break;
        default: {
          op.value = i;
          const std::vector<uint32_t> data(length / 4, i);
          ASSERT_EQ(write(*image, data.data(), length, offset), 0);
        }
      }
      op.end = events();
      operations_.push_back(op);
    }
    Operation op{events(), 0, true};
    ASSERT_EQ(image->close(), 0);
    op.end = events();
    operations_.push_back(op);
  }

  void change_snapshots(Qcow2Image& image, Operation& op) {
    const unsigned what = random_() % 3;
    if (image.snapshots().empty() || (what == 0 && image.snapshots().size() < 3)) {
      const std::string name = fmt::format("s{}", saved_.size());
      ASSERT_EQ(image.create_snapshot(name), 0);
      std::vector<uint32_t> data(options_.size / 4);
      ASSERT_EQ(read(image, data.data(), options_.size, 0), 0);
      for (uint64_t at = 0; at < sectors_; at++) saved_[name].push_back(data[at * sector / 4]);
      return;
    }
    const std::string name = image.snapshots()[random_() % image.snapshots().size()].name;
    if (what == 1) {
      ASSERT_EQ(image.delete_snapshot(name), 0);
    } else {
      ASSERT_EQ(image.apply_snapshot(name), 0);
      op.reverted = saved_[name];
    }
  }

  // What may be read when only the events before `cut` have happened.
  std::vector<Values> allowed(size_t cut) const {
    std::vector<Values> values(sectors_, Values{0});
    if (shape().backing)
      for (uint64_t i = 0; i < sectors_ / 2; i++) values[i] = {1};
    size_t promised = 0;
    for (size_t i = 0; i < operations_.size(); i++)
      if (operations_[i].flush && operations_[i].end <= cut) promised = i;
    for (size_t i = 0; i < operations_.size() && operations_[i].begin <= cut; i++) {
      const Operation& op = operations_[i];
      for (uint64_t at = 0; at < op.reverted.size(); at++) {
        if (i <= promised) values[at].clear();
        values[at].insert(op.reverted[at]);
      }
      if (op.flush) continue;
      for (uint64_t at = op.first; at < op.last; at++) {
        if (i < promised && !op.discard) values[at].clear();
        values[at].insert(op.value);
      }
    }
    return values;
  }

  void check_state(std::vector<uint8_t> bytes, const std::vector<Values>& values, size_t cut,
                   const char* how) {
    SCOPED_TRACE(fmt::format("cut after {} of {} events, {}", cut, disk_->events.size(), how));
    const auto disk = std::make_shared<Disk>();
    disk->bytes = std::move(bytes);
    MemoryStorage storage(disk);
    const bool dirty = read_header(storage).has(feature_dirty);
    // The dirty bit allows wrong counts; nothing allows wrong tables.
    if (dirty) {
      const CheckResult repaired = check(storage, Repair::all);
      ASSERT_EQ(repaired.left(), 0u) << testing::PrintToString(repaired.findings);
    }
    const CheckResult result = check(storage, Repair::none);
    ASSERT_EQ(result.corruptions, 0u) << testing::PrintToString(result.findings);
    {
      const auto image = open(disk, false);
      std::vector<uint32_t> data(options_.size / 4);
      ASSERT_EQ(read(*image, data.data(), options_.size, 0), 0);
      for (uint64_t at = 0; at < sectors_; at++) {
        const uint32_t* begin = &data[at * sector / 4];
        ASSERT_TRUE(std::all_of(begin, begin + sector / 4, [&](uint32_t v) { return v == *begin; }));
        ASSERT_TRUE(values[at].contains(*begin))
            << "sector " << at << " holds " << *begin << " and not " << testing::PrintToString(values[at]);
      }
    }
    if (cut % 7 != 0) return;
    // Life goes on.
    const auto image = open(disk, true);
    const std::vector<uint8_t> data(options_.size, 0x55);
    ASSERT_EQ(write(*image, data.data(), data.size(), 0), 0);
    ASSERT_EQ(image->close(), 0);
    ASSERT_EQ(check(storage, Repair::none).corruptions, 0u);
  }

  std::mt19937_64 random_;
  CreateOptions options_;
  std::shared_ptr<Disk> disk_ = std::make_shared<Disk>(), backing_ = std::make_shared<Disk>();
  std::vector<uint8_t> start_;
  uint64_t sectors_ = 0;
  std::vector<Operation> operations_;
  std::map<std::string, std::vector<uint32_t>> saved_;  // by snapshot
};

INSTANTIATE_TEST_SUITE_P(Shapes, Crash,
                         testing::Combine(testing::ValuesIn(shapes()), testing::Range(1, 1 + seeds())),
                         [](const auto& instance) {
                           return fmt::format("{}_{}", std::get<0>(instance.param).name,
                                              std::get<1>(instance.param));
                         });

// Cuts a write into sectors: each of them is old or new.
void apply_some(std::vector<uint8_t>& disk, const Event& event, std::mt19937_64& random) {
  if (event.kind != Event::Kind::write) return MemoryStorage::apply(disk, event);
  const unsigned kind = random() % 3;  // all, none, some
  for (uint64_t at = 0; at < event.bytes.size();) {
    const uint64_t size = std::min<uint64_t>(sector - (event.offset + at) % sector, event.bytes.size() - at);
    const auto from = event.bytes.begin() + static_cast<ptrdiff_t>(at);
    if (kind == 0 || (kind == 2 && random() % 2))
      MemoryStorage::apply(
          disk, {Event::Kind::write, event.offset + at, {from, from + static_cast<ptrdiff_t>(size)}});
    at += size;
  }
}

TEST_P(Crash, AnyCutLeavesAWholeImageWithAllThatWasFlushed) {
  operate(60);
  if (HasFatalFailure()) return;
  std::vector<uint8_t> durable = start_;  // up to the last barrier
  std::vector<Event> open_writes;         // since
  for (size_t cut = 0; cut <= disk_->events.size(); cut++) {
    const auto values = allowed(cut);
    std::vector<uint8_t> all = durable;
    for (const auto& event : open_writes) MemoryStorage::apply(all, event);
    check_state(all, values, cut, "all written");
    if (!open_writes.empty()) check_state(durable, values, cut, "nothing of the unflushed written");
    for (int variant = 0; variant < 2 && !open_writes.empty(); variant++) {
      std::vector<uint8_t> some = durable;
      // A later write that is there without an earlier one has overtaken it.
      for (const auto& event : open_writes) apply_some(some, event, random_);
      check_state(std::move(some), values, cut, "some of the unflushed written");
    }
    if (HasFatalFailure() || HasNonfatalFailure() || cut == disk_->events.size()) return;
    const Event& event = disk_->events[cut];
    if (event.kind != Event::Kind::sync) {
      open_writes.push_back(event);
      continue;
    }
    durable = std::move(all);
    open_writes.clear();
  }
}

// A disk that fails must not turn into damage either.
TEST_P(Crash, FailingWritesLeaveAWholeImage) {
  for (uint64_t budget = 0; budget < 60; budget += 1 + budget / 8) {
    const auto disk = std::make_shared<Disk>();
    disk->bytes = start_;
    {
      const auto image = open(disk, true);
      disk->budget = budget;
      const std::vector<uint32_t> data(options_.size / 4, 77);
      for (uint64_t at = 0; at + 8192 <= options_.size; at += 24576) {
        write(*image, data.data(), 8192, at);
        if (at % 5 == 0) flush(*image);
      }
      image->close();
      disk->budget = UINT64_MAX;
    }
    MemoryStorage storage(disk);
    if (read_header(storage).has(feature_dirty)) check(storage, Repair::all);
    const CheckResult result = check(storage, Repair::none);
    ASSERT_EQ(result.corruptions, 0u) << budget << testing::PrintToString(result.findings);
  }
}

}  // namespace
}  // namespace lodge::block::qcow2
