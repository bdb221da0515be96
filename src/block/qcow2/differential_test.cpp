// Random operations on an image, on a model in memory, and on QEMU's tools: all agree, and both checkers find
// nothing, after every round.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <map>
#include <random>

#include "base/error.hpp"
#include "base/temporary_directory.hpp"
#include "block/qcow2/check.hpp"
#include "block/qcow2/create.hpp"
#include "block/qcow2/image.hpp"
#include "block/qcow2/qemu.hpp"

namespace lodge::block::qcow2 {
namespace {

constexpr uint64_t kib = 1024;

struct Shape {
  const char* name;
  CreateOptions options;
  bool backing = false, snapshots = true;
};

CreateOptions shape(uint64_t size, unsigned bits, unsigned version = 3) {
  CreateOptions options;
  options.size = size;
  options.cluster_bits = bits;
  options.version = version;
  return options;
}

std::vector<Shape> shapes() {
  std::vector<Shape> all;
  all.push_back({"Default", shape(6000 * kib + 512, 16)});
  all.push_back({"Version2", shape(6000 * kib, 16, 2)});
  all.push_back({"SmallClusters", shape(700 * kib + 512, 9)});
  all.push_back({"LargeClusters", shape(20480 * kib, 21)});
  all.push_back({"Backed", shape(6000 * kib, 16), true});
  all.push_back({"BackedVersion2", shape(2000 * kib, 12, 2), true});
  Shape lazy{"Lazy", shape(3000 * kib, 14)};
  lazy.options.lazy_refcounts = true;
  all.push_back(lazy);
  for (const bool backed : {false, true}) {
    Shape extended{backed ? "BackedSubclusters" : "Subclusters", shape(6000 * kib, 16), backed};
    extended.options.extended_l2 = true;
    all.push_back(extended);
  }
  for (const unsigned order : {0u, 2u, 3u, 5u, 6u}) {
    Shape counts{"", shape(1500 * kib, 10)};
    constexpr std::array names{"Counts1", "", "Counts4", "Counts8", "", "Counts32", "Counts64"};
    counts.name = names[order];
    counts.options.refcount_order = order;
    counts.snapshots = order > 0;
    all.push_back(counts);
  }
  for (const bool raw : {false, true}) {
    Shape data{raw ? "RawDataFile" : "DataFile", shape(3000 * kib, 16)};
    data.options.data_file = "disk.data";
    data.options.raw_data = raw;
    data.snapshots = false;
    all.push_back(data);
  }
  return all;
}

// LODGE_BLOCK_SEEDS=n in the environment: n runs of each shape instead of one.
unsigned seeds() {
  const char* text = std::getenv("LODGE_BLOCK_SEEDS");
  return text ? static_cast<unsigned>(std::max(std::atoi(text), 1)) : 1;
}

class Differential : public testing::TestWithParam<std::tuple<Shape, unsigned>> {
 protected:
  void SetUp() override {
    if (!have_qemu()) GTEST_SKIP() << "qemu-img is not installed";
    random_.seed(std::get<1>(GetParam()));
    shape_ = std::get<0>(GetParam());
    CreateOptions options = shape_.options;
    model_.assign(options.size, 0);
    if (shape_.backing) make_backing(options);
    if (!options.data_file.empty()) {
      options.data_file = directory_ / options.data_file;  // QEMU takes relative names from where it runs
      std::ofstream file(options.data_file);
      std::filesystem::resize_file(options.data_file, options.raw_data ? options.size : 0);
    }
    FileStorage storage(Fd(::open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600)), path_, Use::write,
                        make_engine(Engine::threads));
    create(storage, options);
  }

  // Smaller than the disk, and itself a qcow2 image with holes.
  void make_backing(CreateOptions& options) {
    const uint64_t size = options.size * 2 / 3 & ~uint64_t{511};
    qemu_img({"create", "-q", "-f", "qcow2", directory_ / "base", std::to_string(size)});
    std::vector<std::string> commands;
    for (int i = 0; i < 10; i++) {
      const uint64_t length = std::min<uint64_t>(512 * (1 + random_() % 400), size), at = pick(size - length);
      const unsigned value = 1 + random_() % 255;
      commands.push_back(fmt::format("write -P {} {} {}", value, at, length));
      std::fill_n(model_.begin() + static_cast<ptrdiff_t>(at), length, static_cast<uint8_t>(value));
    }
    qemu_io(directory_ / "base", commands);
    options.backing_file = "base";
    options.backing_format = "qcow2";
  }

  uint64_t pick(uint64_t limit) { return limit ? random_() % (limit + 1) & ~uint64_t{511} : 0; }
  std::pair<uint64_t, uint64_t> range() {
    const uint64_t size = model_.size();
    const uint64_t limit = random_() % 4 ? std::min<uint64_t>(size, 200 * kib) : size / 2;
    const uint64_t length = 512 + pick(limit - 512);
    return {pick(size - length), length};
  }

  void open() {
    image_ = open_image(path_, {});
    qcow2_ = dynamic_cast<Qcow2Image*>(image_.get());
    ASSERT_NE(qcow2_, nullptr);
  }

  void write_some() {
    const auto [at, length] = range();
    std::vector<uint8_t> data(length);
    for (auto& byte : data) byte = static_cast<uint8_t>(random_() >> 8);
    ASSERT_EQ(write(*image_, data.data(), length, at), 0);
    std::ranges::copy(data, model_.begin() + static_cast<ptrdiff_t>(at));
  }

  void zero_some() {
    const auto [at, length] = range();
    ASSERT_EQ(write_zeroes(*image_, at, length, random_() % 2), 0);
    std::fill_n(model_.begin() + static_cast<ptrdiff_t>(at), length, 0);
  }

  // Old contents or zeros, sector by sector; what is there then counts.
  void discard_some() {
    const auto [at, length] = range();
    ASSERT_EQ(discard(*image_, at, length), 0);
    std::vector<uint8_t> now(length);
    ASSERT_EQ(read(*image_, now.data(), length, at), 0);
    for (uint64_t sector = 0; sector < length; sector += 512) {
      const auto begin = now.begin() + static_cast<ptrdiff_t>(sector);
      const bool zero = std::all_of(begin, begin + 512, [](uint8_t b) { return b == 0; });
      ASSERT_TRUE(zero ||
                  std::equal(begin, begin + 512, model_.begin() + static_cast<ptrdiff_t>(at + sector)));
    }
    std::ranges::copy(now, model_.begin() + static_cast<ptrdiff_t>(at));
  }

  // Many at once; ranges do not overlap, so that the outcome is known.
  void write_many() {
    const uint64_t piece = std::min<uint64_t>(model_.size() / 16, 48 * kib) & ~uint64_t{511};
    std::vector<std::vector<uint8_t>> data;
    std::atomic<unsigned> left = 16, failed = 0;
    for (unsigned i = 0; i < 16; i++) data.emplace_back(piece, static_cast<uint8_t>(random_()));
    const uint64_t start = pick(model_.size() - 16 * piece);
    for (unsigned i = 0; i < 16; i++) {
      const iovec buffer{data[i].data(), piece};
      image_->write({&buffer, 1}, start + i * piece, [&](int error) {
        failed += error != 0;
        left--;
      });
      std::ranges::copy(data[i], model_.begin() + static_cast<ptrdiff_t>(start + i * piece));
    }
    while (left > 0) ::usleep(100);
    ASSERT_EQ(failed, 0u);
  }

  void snapshot_some() {
    if (!shape_.snapshots) return;
    const unsigned what = random_() % 3;
    if (what == 0 && saved_.size() < 3) {
      const std::string name = fmt::format("s{}", next_snapshot_++);
      ASSERT_EQ(qcow2_->create_snapshot(name), 0);
      saved_[name] = model_;
    } else if (!saved_.empty()) {
      auto it = std::next(saved_.begin(), static_cast<ptrdiff_t>(random_() % saved_.size()));
      if (what == 1) {
        ASSERT_EQ(qcow2_->apply_snapshot(it->first), 0);
        model_ = it->second;
      } else {
        ASSERT_EQ(qcow2_->delete_snapshot(it->first), 0);
        saved_.erase(it);
      }
    }
    ASSERT_EQ(image_->size(), model_.size());
  }

  void resize_some() {
    if (shape_.backing || (shape_.options.version == 2 && shape_.snapshots)) return;
    const uint64_t size = (model_.size() / 2 & ~uint64_t{511}) + pick(model_.size() * 3 / 4);
    ASSERT_EQ(resize(*image_, size), 0);
    model_.resize(size, 0);
  }

  void compare_with_model() {
    std::vector<uint8_t> now(model_.size());
    ASSERT_EQ(read(*image_, now.data(), now.size(), 0), 0);
    const auto [a, b] = std::ranges::mismatch(now, model_);
    ASSERT_EQ(a - now.begin(), static_cast<ptrdiff_t>(model_.size()));
  }

  void operate(unsigned count) {
    for (unsigned i = 0; i < count; i++) {
      switch (random_() % 16) {
        case 0:
        case 1: discard_some(); break;
        case 2:
        case 3:
        case 4: zero_some(); break;
        case 5: ASSERT_EQ(flush(*image_), 0); break;
        case 6: snapshot_some(); break;
        case 7: resize_some(); break;
        case 8: write_many(); break;
        case 9: compare_with_model(); break;
        default: write_some();
      }
      if (HasFatalFailure()) return;
    }
  }

  void find_free_cluster() {
    const uint64_t cluster = uint64_t{1} << shape_.options.cluster_bits;
    free_cluster_.reset();
    for (uint64_t at = 0; at + cluster <= model_.size(); at += cluster) {
      Qcow2Image::Extent extent;
      ASSERT_EQ(qcow2_->map(at, cluster, extent), 0);
      if (extent.content == Qcow2Image::Content::unallocated && extent.length == cluster) free_cluster_ = at;
    }
  }

  void check_closed() {
    find_free_cluster();
    ASSERT_EQ(image_->close(), 0);
    image_.reset();
    qemu_img({"check", "-q", path_});
    FileStorage storage(path_, Use::read, true, make_engine(Engine::threads));
    const CheckResult result = check(storage, Repair::none);
    EXPECT_EQ(result.leaks + result.corruptions + result.flags, 0u)
        << ::testing::PrintToString(result.findings);
    std::ofstream(directory_ / "model", std::ios::binary)
        .write(reinterpret_cast<const char*>(model_.data()), static_cast<std::streamsize>(model_.size()));
    qemu_img({"compare", "-q", "-f", "qcow2", "-F", "raw", path_, directory_ / "model"});
  }

  // The same kinds of operations by the other program.
  void operate_by_qemu() {
    std::vector<std::string> commands;
    const auto fill = [&](uint64_t at, uint64_t length, unsigned value) {
      std::fill_n(model_.begin() + static_cast<ptrdiff_t>(at), length, static_cast<uint8_t>(value));
      return fmt::format("-P {} {} {}", value, at, length);
    };
    // Only a cluster without contents can be written compressed.
    if (shape_.options.data_file.empty() && free_cluster_)
      commands.push_back("write -c " + fill(*free_cluster_, uint64_t{1} << shape_.options.cluster_bits, 99));
    for (int i = 0; i < 6; i++) {
      const auto [at, length] = range();
      if (random_() % 4 != 0) {
        commands.push_back("write " + fill(at, length, 1 + random_() % 255));
        continue;
      }
      fill(at, length, 0);
      commands.push_back(fmt::format("write -z {} {} {}", random_() % 2 ? "-u" : "", at, length));
    }
    qemu_io(path_, commands);
  }

  TemporaryDirectory directory_;
  std::string path_ = directory_ / "disk";
  std::mt19937_64 random_;
  Shape shape_{};
  std::unique_ptr<Image> image_;
  Qcow2Image* qcow2_ = nullptr;
  std::vector<uint8_t> model_;
  std::map<std::string, std::vector<uint8_t>> saved_;
  unsigned next_snapshot_ = 0;
  std::optional<uint64_t> free_cluster_;
};

INSTANTIATE_TEST_SUITE_P(Shapes, Differential,
                         testing::Combine(testing::ValuesIn(shapes()), testing::Range(1u, 1 + seeds())),
                         [](const auto& instance) {
                           return fmt::format("{}_{}", std::get<0>(instance.param).name,
                                              std::get<1>(instance.param));
                         });

TEST_P(Differential, AgreesWithTheModelAndWithQemu) {
  for (int round = 0; round < 6; round++) {
    SCOPED_TRACE(fmt::format("round {}", round));
    open();
    compare_with_model();
    if (HasFatalFailure()) return;
    operate(40);
    if (HasFatalFailure()) return;
    compare_with_model();
    check_closed();
    if (HasFatalFailure() || HasNonfatalFailure()) return;
    operate_by_qemu();
    if (HasNonfatalFailure()) return;
  }
}

}  // namespace
}  // namespace lodge::block::qcow2
