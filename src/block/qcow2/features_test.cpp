// What belongs to the format beyond reading and writing: bitmaps, overlays, compressed clusters, failing
// disks.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "base/temporary_directory.hpp"
#include "block/copy.hpp"
#include "block/memory_storage.hpp"
#include "block/qcow2/bitmaps.hpp"
#include "block/qcow2/check.hpp"
#include "block/qcow2/compression.hpp"
#include "block/qcow2/create.hpp"
#include "block/qcow2/qemu.hpp"

namespace lodge::block::qcow2 {
namespace {

class Features : public testing::Test {
 protected:
  std::string make(const std::string& name, CreateOptions options = {}) const {
    const std::string path = directory_ / name;
    if (options.size == 0) options.size = 4 << 20;
    FileStorage storage(Fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600)), path, Use::write,
                        make_engine(Engine::threads));
    create(storage, options);
    return path;
  }
  static std::vector<uint8_t> all(Image& image) {
    std::vector<uint8_t> data(image.size());
    EXPECT_EQ(read(image, data.data(), data.size(), 0), 0);
    return data;
  }
  TemporaryDirectory directory_;
};

TEST_F(Features, EnabledBitmapsAreMarkedInUseAndOthersStayTrue) {
  if (!have_qemu()) GTEST_SKIP();
  const std::string path = make("disk");
  qemu_img({"bitmap", "--add", "--enable", path, "enabled"});
  qemu_img({"bitmap", "--add", "--disable", path, "disabled"});
  { open_image(path, {}); }  // opening alone changes nothing
  const auto flags = [&](const std::string& name) -> uint32_t {
    FileStorage storage(path, Use::read, true, make_engine(Engine::threads));
    for (const auto& bitmap : read_bitmaps(storage, read_header(storage)))
      if (bitmap.name == name) return bitmap.flags;
    return UINT32_MAX;
  };
  EXPECT_EQ(flags("enabled"), bitmap_auto);
  {
    const auto image = open_image(path, {});
    const std::vector<uint8_t> data(4096, 1);
    EXPECT_EQ(write(*image, data.data(), data.size(), 0), 0);
    EXPECT_EQ(resize(*image, 8 << 20), ENOTSUP);
  }
  EXPECT_EQ(flags("enabled"), bitmap_auto | bitmap_in_use);
  EXPECT_EQ(flags("disabled"), 0u);
  qemu_img({"check", "-q", path});
  const auto info = nlohmann::json::parse(qemu_img({"info", "--output=json", path}));
  const auto& bitmaps = info["format-specific"]["data"]["bitmaps"];
  ASSERT_EQ(bitmaps.size(), 2u);
  EXPECT_THAT(bitmaps.dump(), testing::HasSubstr("in-use"));
  FileStorage storage(path, Use::read, true, make_engine(Engine::threads));
  const CheckResult result = check(storage, Repair::none);
  EXPECT_EQ(result.leaks + result.corruptions, 0u) << testing::PrintToString(result.findings);
}

TEST_F(Features, QemuRespectsOurLock) {
  if (!have_qemu()) GTEST_SKIP();
  const std::string path = make("disk");
  {
    const auto image = open_image(path, {});
    EXPECT_THAT(qemu_img({"check", path}, 1), testing::HasSubstr("lock"));
  }
  qemu_img({"check", "-q", path});
  OpenOptions options;
  options.read_only = true;
  const auto image = open_image(path, options);
  qemu_img({"check", "-q", path});
  EXPECT_THAT(qemu_img({"resize", path, "8M"}, 1), testing::HasSubstr("lock"));
}

TEST_F(Features, ATemporaryOverlayLeavesTheImageAlone) {
  const std::string path = make("disk");
  const std::vector<uint8_t> data(100'000, 7);
  {
    const auto image = open_image(path, {});
    ASSERT_EQ(write(*image, data.data(), data.size(), 5000), 0);
  }
  OpenOptions options;
  options.temporary = true;
  {
    const auto image = open_image(path, options);
    EXPECT_FALSE(image->read_only());
    auto expected = all(*image);
    EXPECT_EQ(expected[5000], 7);
    const std::vector<uint8_t> other(3000, 9);
    ASSERT_EQ(write(*image, other.data(), other.size(), 70'000), 0);
    ASSERT_EQ(write_zeroes(*image, 6000, 1000, true), 0);
    ASSERT_EQ(flush(*image), 0);
    std::ranges::copy(other, expected.begin() + 70'000);
    std::fill_n(expected.begin() + 6000, 1000, 0);
    EXPECT_EQ(all(*image), expected);
    // Others may have overlays of their own at the same time.
    EXPECT_EQ(all(*open_image(path, options))[70'000], 7);
  }
  const auto image = open_image(path, {});
  EXPECT_EQ(all(*image)[6000], 7);
  EXPECT_EQ(all(*image)[70'000], 7);
}

TEST_F(Features, CompressedClustersAreReadByQemu) {
  if (!have_qemu()) GTEST_SKIP();
  for (const auto type : {Compression::zlib, Compression::zstd}) {
    for (const unsigned bits : {12u, 16u, 21u}) {
      CreateOptions options;
      options.cluster_bits = bits;
      options.compression = type;
      options.size = (8 << 20) + 512;
      const std::string name = fmt::format("{}-{}", bits, static_cast<int>(type));
      const std::string to = make(name, options);
      std::vector<uint8_t> data(options.size);
      for (size_t i = 0; i < data.size(); i++)
        data[i] = static_cast<uint8_t>(i % 977 < 700 ? i >> 8 : i * i >> 5);
      const auto raw = std::make_unique<FileStorage>(
          Fd(::open((directory_ / "raw").c_str(), O_RDWR | O_CREAT | O_TRUNC, 0600)), "raw", Use::write,
          make_engine(Engine::threads));
      raw->write(data.data(), data.size(), 0);
      {
        const auto image = open_image(to, {}), original = open_image(directory_ / "raw", {.format = "raw"});
        copy_contents(*original, *image, true, nullptr);
        EXPECT_EQ(all(*image), data);
      }
      qemu_img({"check", "-q", to});
      qemu_img({"compare", "-q", "-f", "qcow2", "-F", "raw", to, directory_ / "raw"});
      FileStorage storage(to, Use::read, true, make_engine(Engine::threads));
      EXPECT_GT(check(storage, Repair::none).compressed, 0u);
    }
  }
}

// Snapshots and compressed images that QEMU has made, where clusters are shared by both.
TEST_F(Features, TakesOverWhatQemuHasMade) {
  if (!have_qemu()) GTEST_SKIP();
  std::vector<uint8_t> data(6 << 20);
  for (size_t i = 0; i < data.size(); i++)
    data[i] = static_cast<uint8_t>(i % 1000 < 600 ? i >> 12 : i * i >> 7);
  FileStorage raw(Fd(::open((directory_ / "raw").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600)), "raw",
                  Use::write, make_engine(Engine::threads));
  ASSERT_EQ(raw.write(data.data(), data.size(), 0), 0);
  for (const char* type : {"zlib", "zstd"}) {
    const std::string path = directory_ / type;
    qemu_img({"convert", "-c", "-O", "qcow2", "-o", std::string("compression_type=") + type, "-f", "raw",
              directory_ / "raw", path});
    qemu_img({"snapshot", "-c", "theirs", path});
    qemu_io(path, {"write -P 7 100k 500k"});
    {
      const auto image = open_image(path, {});
      auto& qcow2 = dynamic_cast<Qcow2Image&>(*image);
      auto expected = data;
      std::fill_n(expected.begin() + 102400, 512000, 7);
      EXPECT_EQ(all(*image), expected);
      ASSERT_EQ(qcow2.create_snapshot("ours"), 0);
      ASSERT_EQ(qcow2.apply_snapshot("theirs"), 0);
      EXPECT_EQ(all(*image), data);
      ASSERT_EQ(qcow2.delete_snapshot("theirs"), 0);
    }
    qemu_img({"check", "-q", path});
    qemu_img({"snapshot", "-a", "ours", path});
    qemu_img({"snapshot", "-d", "ours", path});
    qemu_img({"check", "-q", path});
    EXPECT_EQ(all(*open_image(path, {}))[102400], 7);
  }
}

TEST_F(Features, CompressedWritesRefuseWhatHasContents) {
  const std::string path = make("disk");
  const auto image = open_image(path, {});
  auto& qcow2 = dynamic_cast<Qcow2Image&>(*image);
  const std::vector<uint8_t> data(65536, 3);
  const auto packed = compress(Compression::zlib, data);
  EXPECT_EQ(qcow2.write_compressed(packed, 0), 0);
  EXPECT_EQ(qcow2.write_compressed(packed, 0), EEXIST);
  EXPECT_EQ(qcow2.write_compressed(packed, 512), EINVAL);
  // Overwritten, it is unpacked first.
  const std::vector<uint8_t> some(512, 4);
  EXPECT_EQ(write(*image, some.data(), some.size(), 1024), 0);
  auto expected = data;
  std::ranges::copy(some, expected.begin() + 1024);
  std::vector<uint8_t> now(65536);
  EXPECT_EQ(read(*image, now.data(), now.size(), 0), 0);
  EXPECT_EQ(now, expected);
}

TEST_F(Features, AFullDiskIsAnErrorFromWhichThereIsAWayBack) {
  const auto disk = std::make_shared<MemoryStorage::Disk>();
  CreateOptions options;
  options.size = 4 << 20;
  options.cluster_bits = 12;
  {
    MemoryStorage storage(disk);
    create(storage, options);
  }
  disk->limit = 1 << 20;
  {
    Qcow2Image::Parts parts;
    parts.storage = std::make_unique<MemoryStorage>(disk);
    parts.header = read_header(*parts.storage);
    Qcow2Image image(std::move(parts), false);
    const std::vector<uint8_t> data(1 << 20, 5);
    EXPECT_EQ(write(image, data.data(), data.size(), 0), ENOSPC);
    disk->limit = 64 << 20;
    EXPECT_EQ(write(image, data.data(), data.size(), 0), 0);
    EXPECT_EQ(flush(image), 0);
    EXPECT_EQ(image.close(), 0);
  }
  MemoryStorage storage(disk);
  const CheckResult result = check(storage, Repair::none);
  EXPECT_EQ(result.corruptions, 0u) << testing::PrintToString(result.findings);
}

TEST_F(Features, SpaceThatIsDiscardedGoesBackToTheHost) {
  const std::string path = make("disk");
  const auto image = open_image(path, {});
  const std::vector<uint8_t> data(4 << 20, 5);
  ASSERT_EQ(write(*image, data.data(), data.size(), 0), 0);
  ASSERT_EQ(flush(*image), 0);
  FileStorage storage(path, Use::read, false, make_engine(Engine::threads));
  const uint64_t before = storage.allocated();
  EXPECT_GE(before, 4u << 20);
  ASSERT_EQ(discard(*image, 0, data.size()), 0);
  ASSERT_EQ(flush(*image), 0);
  EXPECT_LT(storage.allocated(), 1u << 20);
}

TEST_F(Features, RebaseKeepsContents) {
  const std::string base = make("base"), other = make("other");
  const std::vector<uint8_t> ones(200'000, 1), twos(200'000, 2);
  ASSERT_EQ(write(*open_image(base, {}), ones.data(), ones.size(), 100'000), 0);
  ASSERT_EQ(write(*open_image(other, {}), twos.data(), twos.size(), 200'000), 0);
  CreateOptions options;
  options.backing_file = "base";
  const std::string path = make("overlay", options);
  const auto image = open_image(path, {});
  auto& overlay = dynamic_cast<Qcow2Image&>(*image);
  const auto before = all(*image);
  OpenOptions read_only;
  read_only.read_only = true;
  const auto backing = open_image(other, read_only);
  keep_contents(overlay, backing.get(), nullptr);
  ASSERT_EQ(overlay.set_backing("other", "qcow2"), 0);
  ASSERT_EQ(image->close(), 0);
  EXPECT_EQ(all(*open_image(path, {})), before);
}

}  // namespace
}  // namespace lodge::block::qcow2
