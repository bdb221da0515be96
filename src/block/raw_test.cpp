#include "block/raw.hpp"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <tuple>
#include <vector>

#include "base/error.hpp"
#include "base/temporary_directory.hpp"
#include "block/uring.hpp"

namespace lodge::block {
namespace {

using testing::AllOf;
using testing::HasSubstr;

constexpr uint64_t kib = 1024, mib = 1024 * kib;

class Raw : public testing::TestWithParam<Engine> {
 protected:
  void SetUp() override {
    int error = 0;
    if (GetParam() == Engine::uring && !UringEngine::create(error))
      GTEST_SKIP() << "io_uring: errno " << error;
  }
  Raw() {
    std::ofstream file(path_);
    std::filesystem::resize_file(path_, mib);
  }
  std::unique_ptr<Image> open(OpenOptions options = {}) const {
    options.engine = GetParam();
    return open_image(path_, options);
  }
  static std::vector<uint8_t> bytes(Image& image, uint64_t offset, size_t size) {
    std::vector<uint8_t> data(size, 0xee);
    EXPECT_EQ(read(image, data.data(), size, offset), 0);
    return data;
  }
  TemporaryDirectory directory_;
  std::string path_ = directory_ / "disk.raw";
};

INSTANTIATE_TEST_SUITE_P(Engines, Raw, testing::Values(Engine::uring, Engine::threads));

TEST_P(Raw, KeepsWhatIsWrittenInPieces) {
  const auto image = open();
  std::vector<uint8_t> one(3000, 1), two(5192, 2), back(8192);
  const std::vector<iovec> out{{one.data(), one.size()}, {two.data(), two.size()}};
  std::atomic<int> result = -1;
  image->write(out, 4096, [&](int error) { result = error; });
  while (result < 0) continue;
  EXPECT_EQ(result, 0);
  EXPECT_EQ(flush(*image), 0);
  EXPECT_EQ(read(*image, back.data(), back.size(), 4096), 0);
  one.insert(one.end(), two.begin(), two.end());
  EXPECT_EQ(back, one);
  EXPECT_EQ(bytes(*image, 0, 4096), std::vector<uint8_t>(4096, 0));
}

TEST_P(Raw, RefusesWhatLeavesTheDisk) {
  const auto image = open();
  uint8_t sector[512]{};
  EXPECT_EQ(image->size(), mib);
  EXPECT_EQ(read(*image, sector, 512, mib), EINVAL);
  EXPECT_EQ(write(*image, sector, 512, mib - 511), EINVAL);
  EXPECT_EQ(discard(*image, UINT64_MAX - 511, 1024), EINVAL);
  EXPECT_EQ(write_zeroes(*image, 512, UINT64_MAX, true), EINVAL);
  EXPECT_EQ(read(*image, sector, 0, mib), 0);
}

TEST_P(Raw, LuksVolumesAreRefusedUnlessSaidToBeRaw) {
  for (const uint8_t version : {1, 2}) {
    std::ofstream(path_, std::ios::in | std::ios::binary)
        << "LUKS\xba\xbe" << '\0' << static_cast<char>(version);
    try {
      open();
      ADD_FAILURE() << "opened";
    } catch (const UsageError& error) {
      EXPECT_THAT(error.what(), AllOf(HasSubstr("LUKS"), HasSubstr("decrypt"), HasSubstr("raw")));
    }
  }
  OpenOptions options;
  options.format = "raw";
  EXPECT_EQ(open(options)->format(), "raw");
}

TEST_P(Raw, ImagesOfOtherFormatsAreRefusedByNameUnlessSaidToBeRaw) {
  using namespace std::string_literals;
  const std::vector<std::tuple<std::streamoff, std::string, std::string>> marks{
      {0x40, "\x7f\x10\xda\xbe", "VDI"},
      {0, "KDMV", "VMDK"},
      {0, "COWD", "VMDK"},
      {0, "# Disk DescriptorFile\n", "VMDK"},
      {0, "vhdxfile", "VHDX"},
      {0, "conectix", "VHD"},
      {mib - 512, "conectix", "VHD"},  // of fixed size: only a footer
      {0, "QED\0"s, "QED"},
      {0, "WithoutFreeSpace", "Parallels"},
      {0, "WithouFreSpacExt", "Parallels"}};
  for (const auto& [offset, mark, name] : marks) {
    std::filesystem::resize_file(path_, 0);
    std::filesystem::resize_file(path_, mib);
    std::fstream file(path_, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(offset);
    file << mark << std::flush;
    try {
      open();
      ADD_FAILURE() << name << " opened";
    } catch (const UsageError& error) {
      EXPECT_THAT(error.what(), AllOf(HasSubstr("is a " + name + " image"), HasSubstr("qemu-img convert"),
                                      HasSubstr("format is raw")));
    }
    OpenOptions options;
    options.format = "raw";
    EXPECT_EQ(open(options)->format(), "raw");
  }
}

// The name alone is no volume: a disk may begin with any text.
TEST_P(Raw, WhatOnlyBeginsLikeLuksIsRaw) {
  std::ofstream(path_, std::ios::in | std::ios::binary) << "LUKS is not here";
  EXPECT_EQ(open()->format(), "raw");
}

// A guest may encrypt its own disk: it is told nothing, and whoever starts it next says that the format is
// raw.
TEST_P(Raw, GuestsMayMakeALuksVolume) {
  uint8_t sector[512]{'L', 'U', 'K', 'S', 0xba, 0xbe, 0, 2};
  EXPECT_EQ(write(*open(), sector, sizeof sector, 0), 0);
  EXPECT_THROW(open(), UsageError);
}

TEST_P(Raw, ReadOnlyRefusesEveryChange) {
  OpenOptions options;
  options.read_only = true;
  const auto image = open(options);
  uint8_t sector[512]{};
  EXPECT_TRUE(image->read_only());
  EXPECT_EQ(write(*image, sector, 512, 0), EROFS);
  EXPECT_EQ(discard(*image, 0, 512), EROFS);
  EXPECT_EQ(write_zeroes(*image, 0, 512, true), EROFS);
  EXPECT_EQ(resize(*image, 2 * mib), EROFS);
  EXPECT_EQ(flush(*image), 0);
}

TEST_P(Raw, WriteZeroesAndDiscardGiveZerosAndSpace) {
  const auto image = open();
  const std::vector<uint8_t> data(256 * kib, 0xab), zeros(64 * kib, 0);
  ASSERT_EQ(write(*image, data.data(), data.size(), 0), 0);
  EXPECT_EQ(write_zeroes(*image, 0, 64 * kib, false), 0);
  EXPECT_EQ(write_zeroes(*image, 64 * kib, 64 * kib, true), 0);
  EXPECT_EQ(discard(*image, 128 * kib, 64 * kib), 0);
  for (const uint64_t at : {0, 64, 128}) EXPECT_EQ(bytes(*image, at * kib, zeros.size()), zeros) << at;
  EXPECT_EQ(bytes(*image, 192 * kib, 64 * kib), std::vector<uint8_t>(64 * kib, 0xab));
  EXPECT_EQ(flush(*image), 0);
}

TEST_P(Raw, ResizesWhileOpen) {
  const auto image = open();
  uint8_t sector[512]{7};
  ASSERT_EQ(resize(*image, 2 * mib), 0);
  EXPECT_EQ(write(*image, sector, 512, 2 * mib - 512), 0);
  ASSERT_EQ(resize(*image, 512), 0);
  EXPECT_EQ(read(*image, sector, 512, 512), EINVAL);
  EXPECT_EQ(resize(*image, 100), EINVAL);
  image->close();
  EXPECT_EQ(std::filesystem::file_size(path_), 512u);
}

TEST_P(Raw, TheLastSectorIsWhole) {
  std::ofstream(path_, std::ios::trunc) << std::string(700, 'x');
  const auto image = open();
  EXPECT_EQ(image->size(), 1024u);
  std::vector<uint8_t> expected(512, 0);
  std::fill_n(expected.begin(), 188, 'x');
  EXPECT_EQ(bytes(*image, 512, 512), expected);
}

TEST_P(Raw, AGuestCannotTurnAProbedImageIntoAnotherFormat) {
  uint8_t sector[512]{'Q', 'F', 'I', 0xfb};
  EXPECT_EQ(write(*open(), sector, 512, 0), EPERM);
  EXPECT_EQ(write(*open(), sector + 1, 3, 1), EPERM);
  OpenOptions options;
  options.format = "raw";
  EXPECT_EQ(write(*open(options), sector, 512, 0), 0);
}

TEST_P(Raw, ManyRequestsInFlightAllEnd) {
  auto image = open();
  constexpr unsigned count = 512;
  std::vector<std::vector<uint8_t>> data;
  std::atomic<unsigned> ended = 0, failed = 0;
  for (unsigned i = 0; i < count; i++) data.emplace_back(2048, static_cast<uint8_t>(i));
  image->plug();
  for (unsigned i = 0; i < count; i++) {
    const iovec buffer{data[i].data(), data[i].size()};
    image->write({&buffer, 1}, i * 2048, [&](int error) {
      failed += error != 0;
      ended++;
    });
  }
  image->unplug();
  EXPECT_EQ(image->close(), 0);
  EXPECT_EQ(ended, count);
  EXPECT_EQ(failed, 0u);
  image = open();
  for (unsigned i = 0; i < count; i++) EXPECT_EQ(bytes(*image, i * 2048, 2048), data[i]);
}

// Reads that are not in the page cache, more than the ring holds.
TEST_P(Raw, ManyReadsFromTheDiskAllEnd) {
  constexpr unsigned count = 1500;
  std::filesystem::resize_file(path_, count * 4096);
  auto image = open();
  for (unsigned i = 0; i < count; i++) {
    const std::vector<uint32_t> data(1024, i);
    ASSERT_EQ(write(*image, data.data(), 4096, i * 4096), 0);
  }
  ASSERT_EQ(image->close(), 0);
  const Fd fd(::open(path_.c_str(), O_RDONLY | O_CLOEXEC));
  ASSERT_EQ(::posix_fadvise(fd.get(), 0, 0, POSIX_FADV_DONTNEED), 0);
  image = open();
  std::vector<uint32_t> data(count * 1024);
  std::atomic<unsigned> failed = 0;
  for (unsigned i = 0; i < count; i++) {
    const iovec buffer{&data[((i * 7) % count) * 1024], 4096};
    image->read({&buffer, 1}, i * 7 % count * 4096, [&](int error) { failed += error != 0; });
  }
  ASSERT_EQ(image->close(), 0);
  EXPECT_EQ(failed, 0u);
  for (unsigned i = 0; i < count; i++) ASSERT_EQ(data[i * 1024 + 1023], i);
}

TEST_P(Raw, OpeningNamesFileAndRemedy) {
  OpenOptions options;
  EXPECT_THAT([&] { open_image(directory_ / "none", options); },
              testing::ThrowsMessage<UsageError>(testing::HasSubstr("none: cannot be opened for writing")));
  EXPECT_THAT([&] { open_image("/dev/null", options); },
              testing::ThrowsMessage<UsageError>(testing::HasSubstr("neither a file nor a block device")));
  options.format = "vmdk";
  EXPECT_THAT([&] { open_image(path_, options); },
              testing::ThrowsMessage<UsageError>(testing::HasSubstr("there are raw and qcow2")));
}

}  // namespace
}  // namespace lodge::block
