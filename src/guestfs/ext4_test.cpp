// Against file systems that mke2fs has made, and damaged ones.
#include "guestfs/ext4.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "base/error.hpp"
#include "base/temporary_directory.hpp"
#include "guestfs/testing.hpp"
#include "support/process.hpp"

namespace lodge::guestfs {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;
using ::testing::UnorderedElementsAre;
using testing_support::Seconds;

constexpr uint64_t limit = 64 << 20;

std::string text_of(const std::vector<uint8_t>& bytes) {
  return {bytes.begin(), bytes.end()};
}

// A tree of files made into a file system by mke2fs with some options.
class MadeByMke2fs : public ::testing::TestWithParam<std::vector<std::string>> {
 protected:
  void SetUp() override {
    if (!fs::exists("/usr/sbin/mke2fs")) GTEST_SKIP() << "mke2fs is not installed";
    fill(directory_ / "tree");
    std::vector<std::string> command{"/usr/sbin/mke2fs", "-q", "-F", "-d", directory_ / "tree"};
    command.insert(command.end(), GetParam().begin(), GetParam().end());
    command.insert(command.end(), {directory_ / "disk", "96M"});
    const auto result = testing_support::run(command, Seconds(120));
    ASSERT_EQ(result.status, 0) << result.err;
    block::OpenOptions options;
    options.format = "raw";
    options.read_only = true;
    image_ = block::open_image(directory_ / "disk", options);
    fs_ = Ext4::open(View(*image_), "disk");
    ASSERT_TRUE(fs_);
  }

  void fill(const std::string& tree) {
    fs::create_directories(tree + "/boot/deep/deeper");
    fs::create_directories(tree + "/many");
    std::ofstream(tree + "/boot/small") << "a small file\n";
    std::ofstream(tree + "/boot/empty");
    for (uint64_t i = 0; i < 100'000; i++) large_ += std::to_string(i * 7919) + "\n";
    std::ofstream(tree + "/boot/large") << large_;
    {
      std::ofstream sparse(tree + "/boot/sparse");
      sparse.seekp(3'000'000);
      sparse << "behind a hole";
    }
    for (int i = 0; i < 300; i++) std::ofstream(tree + "/many/a-file-with-number-" + std::to_string(i)) << i;
    fs::create_symlink("boot/small", tree + "/relative");
    fs::create_symlink("/boot/deep/../small", tree + "/absolute");
    fs::create_symlink("../../../../boot/small", tree + "/boot/above-the-root");
    fs::create_symlink("/boot/./deep/deeper/../../deep/deeper/../../deep/deeper/../../deep/../small",
                       tree + "/a-target-that-does-not-fit-into-the-inode");
    fs::create_symlink("loop", tree + "/loop");
    fs::create_symlink("boot", tree + "/directory");
  }

  std::string contents(const std::string& path) {
    const auto found = fs_->find(path);
    return found ? text_of(fs_->read(found->node, limit)) : "nothing";
  }

  TemporaryDirectory directory_;
  std::string large_;
  std::unique_ptr<block::Image> image_;
  std::optional<Ext4> fs_;
};

// One test for all, because making the file system takes the longest.
TEST_P(MadeByMke2fs, FilesLinksAndDirectoriesAreReadAsTheyWereMade) {
  EXPECT_EQ(contents("/boot/small"), "a small file\n");
  EXPECT_EQ(contents("/boot/empty"), "");
  EXPECT_EQ(contents("/boot/large"), large_);
  EXPECT_EQ(contents("/boot/sparse"), std::string(3'000'000, '\0') + "behind a hole");
  EXPECT_THROW(fs_->read(fs_->find("/boot/large")->node, 1000), UsageError);
  for (const char* path : {"/relative", "/absolute", "/boot/above-the-root", "/directory/small",
                           "//boot/./deep/../small", "/a-target-that-does-not-fit-into-the-inode"}) {
    EXPECT_EQ(contents(path), "a small file\n") << path;
    EXPECT_EQ(fs_->find(path)->path, "/boot/small") << path;
  }
  for (const char* path : {"/none", "/boot/small/more", "/loop", "/boot/smal", "/boot/smalll"})
    EXPECT_FALSE(fs_->find(path)) << path;
  EXPECT_THAT(fs_->list(fs_->find("/boot/deep")->node), UnorderedElementsAre("deeper"));
  EXPECT_EQ(fs_->list(fs_->find("/many")->node).size(), 300u);
  EXPECT_EQ(contents("/many/a-file-with-number-234"), "234");
}

INSTANTIATE_TEST_SUITE_P(
    Kinds, MadeByMke2fs,
    ::testing::Values(std::vector<std::string>{"-t", "ext4"}, std::vector<std::string>{"-t", "ext2"},
                      std::vector<std::string>{"-t", "ext3", "-b", "1024"},
                      std::vector<std::string>{"-t", "ext4", "-O", "^64bit,^metadata_csum", "-b", "2048"},
                      std::vector<std::string>{"-t", "ext4", "-I", "512", "-b", "65536"},
                      std::vector<std::string>{"-r", "0", "-t", "ext2", "-b", "1024"}));

// Many extents, by writing every other block of a file: a tree with inner nodes.
TEST(Ext4, AFragmentedFileIsReadWhole) {
  if (!fs::exists("/usr/sbin/mke2fs")) GTEST_SKIP() << "mke2fs is not installed";
  const TemporaryDirectory directory;
  fs::create_directories(directory / "tree");
  std::vector<char> expected(4 << 20);
  {
    std::ofstream file(directory / "tree/holes", std::ios::binary);
    for (size_t at = 0; at < expected.size(); at += 2048) {
      std::memset(&expected[at], 'a' + static_cast<int>(at / 2048 % 26), 1024);
      file.seekp(static_cast<std::streamoff>(at));
      file.write(&expected[at], 1024);
    }
    file.seekp(static_cast<std::streamoff>(expected.size() - 1));
    file.put('\0');
  }
  const auto made = testing_support::run({"/usr/sbin/mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", "-d",
                                          directory / "tree", directory / "disk", "64M"},
                                         Seconds(120));
  ASSERT_EQ(made.status, 0) << made.err;
  const auto image = block::open_image(directory / "disk", {.format = "raw", .read_only = true});
  const auto file_system = Ext4::open(View(*image), "disk");
  ASSERT_TRUE(file_system);
  const auto bytes = file_system->read(file_system->find("/holes")->node, limit);
  EXPECT_TRUE(std::ranges::equal(bytes, expected, {}, [](uint8_t b) { return static_cast<char>(b); }));
}

TEST(Ext4, AnotherFileSystemIsNone) {
  const auto image = testing::image_of(std::vector<uint8_t>(1 << 20));
  EXPECT_FALSE(Ext4::open(View(*image), "disk"));
}

// What a patch of the hand-made file system leads to.
std::string refusal(size_t at, std::vector<uint8_t> patch) {
  auto bytes = testing::Ext4Maker().bytes();
  std::ranges::copy(patch, bytes.begin() + static_cast<ptrdiff_t>(at));
  const auto image = testing::image_of(bytes);
  try {
    const auto file_system = Ext4::open(View(*image), "disk");
    const auto found = file_system->find("/boot/vmlinuz-1.0");
    if (!found) return "nothing";
    return text_of(file_system->read(found->node, limit));
  } catch (const UsageError& error) {
    return error.what();
  }
}

TEST(Ext4, DamageIsRefusedAndNamed) {
  constexpr size_t kernel_inode = 3 * 1024 + 13 * 128, root_directory = 8 * 1024;
  EXPECT_EQ(refusal(0, {}), std::string(3000, 'k'));
  EXPECT_THAT(refusal(1024 + 0x18, {40}), HasSubstr("block size"));
  EXPECT_THAT(refusal(1024 + 0x58, {0, 16}), HasSubstr("inode size"));
  EXPECT_THAT(refusal(1024 + 0x28, {0}), HasSubstr("inode size"));
  EXPECT_THAT(refusal(1024 + 0x60, {0x52}), HasSubstr("meta block groups"));
  EXPECT_THAT(refusal(2048 + 8, {0xff, 0xff}), HasSubstr("an inode lies outside"));
  EXPECT_THAT(refusal(kernel_inode + 0x28, {0}), HasSubstr("extent tree"));
  EXPECT_THAT(refusal(kernel_inode + 0x28 + 2, {9}), HasSubstr("too many entries"));
  EXPECT_THAT(refusal(kernel_inode + 0x28 + 6, {1}), HasSubstr("outside"));  // as an index it leads astray
  EXPECT_THAT(refusal(kernel_inode + 0x28 + 16, {0, 0}), HasSubstr("out of order"));
  EXPECT_THAT(refusal(kernel_inode + 0x28 + 20, {0xff}), HasSubstr("outside"));
  EXPECT_THAT(refusal(kernel_inode + 0x6c, {1}), HasSubstr("too large"));  // 4 GiB
  EXPECT_THAT(refusal(kernel_inode + 0x20, {0, 8, 8}), HasSubstr("encrypted"));
  EXPECT_THAT(refusal(root_directory + 4, {4}), HasSubstr("entries do not fit"));
  EXPECT_THAT(refusal(root_directory + 6, {200}), HasSubstr("entries do not fit"));
  EXPECT_THAT(refusal(root_directory, {0xff}), HasSubstr("inode's number"));
}

}  // namespace
}  // namespace lodge::guestfs
