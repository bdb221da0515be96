#include "guestfs/boot_files.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "base/error.hpp"
#include "base/temporary_directory.hpp"
#include "guestfs/partitions.hpp"
#include "guestfs/testing.hpp"
#include "support/process.hpp"

namespace lodge::guestfs {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;
using testing_support::Seconds;

constexpr uint64_t limit = 64 << 20, MiB = 1 << 20;

std::string text_of(const std::vector<uint8_t>& bytes) {
  return {bytes.begin(), bytes.end()};
}

TEST(BootFiles, ADiskWithoutATableIsItsOwnRoot) {
  const auto image = testing::image_of(testing::Ext4Maker().bytes());
  const auto files = find_boot_files(*image, "disk", limit);
  EXPECT_EQ(files.kernel_path, "/boot/vmlinuz-1.0");
  EXPECT_EQ(text_of(files.kernel), std::string(3000, 'k'));
  EXPECT_EQ(files.initrd_path, "/boot/initrd.img-1.0");
  EXPECT_EQ(text_of(files.initrd), std::string(5000, 'i'));
  EXPECT_EQ(files.root, "/dev/vda");
  EXPECT_FALSE(files.cloud_init);
}

TEST(BootFiles, APartitionIsNamedByItsUuid) {
  const auto layout = make_gpt(8 * MiB, random_guid(), random_guid());
  std::vector<uint8_t> bytes(8 * MiB);
  std::ranges::copy(layout.start, bytes.begin());
  std::ranges::copy(testing::Ext4Maker().bytes(), bytes.begin() + MiB);
  const auto image = testing::image_of(bytes);
  EXPECT_EQ(find_boot_files(*image, "disk", limit).root, "PARTUUID=" + layout.partition.uuid);
}

TEST(BootFiles, NoFileSystemIsSaidClearly) {
  const auto image = testing::image_of(std::vector<uint8_t>(MiB));
  try {
    find_boot_files(*image, "disk", limit);
    FAIL();
  } catch (const UsageError& error) {
    EXPECT_THAT(error.what(), HasSubstr("disk: there is no kernel on this disk"));
    EXPECT_THAT(error.what(), HasSubstr("--kernel"));
  }
}

// A tree as distributions have them.
class Trees : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!fs::exists("/usr/sbin/mke2fs")) GTEST_SKIP() << "mke2fs is not installed";
  }
  void put(const std::string& path, const std::string& text) {
    const fs::path file = directory_ / ("tree/" + path);
    fs::create_directories(file.parent_path());
    std::ofstream(file) << text;
  }
  BootFiles find() {
    const auto made = testing_support::run(
        {"/usr/sbin/mke2fs", "-q", "-F", "-t", "ext4", "-d", directory_ / "tree", directory_ / "disk", "16M"},
        Seconds(120));
    EXPECT_EQ(made.status, 0) << made.err;
    const auto image = block::open_image(directory_ / "disk", {.format = "raw", .read_only = true});
    return find_boot_files(*image, "disk", limit);
  }
  TemporaryDirectory directory_;
};

TEST_F(Trees, TheNewestVersionCountsAndNotTheLastByLetters) {
  put("boot/vmlinuz-6.1.0-9-amd64", "old");
  put("boot/vmlinuz-6.1.0-18-amd64", "new");
  put("boot/vmlinuz-0-rescue-abc", "rescue");
  put("boot/initrd.img-6.1.0-18-amd64", "ramdisk");
  put("boot/initrd.img-6.1.0-9-amd64", "old ramdisk");
  put("usr/bin/cloud-init", "#!/usr/bin/python3\n");
  put("etc/os-release", "ID=debian\n");
  const auto files = find();
  EXPECT_EQ(text_of(files.kernel), "new");
  EXPECT_EQ(text_of(files.initrd), "ramdisk");
  EXPECT_TRUE(files.cloud_init);
}

TEST_F(Trees, DebiansLinkDecidesOverTheVersion) {
  put("boot/vmlinuz-6.1.0-9-amd64", "chosen");
  put("boot/vmlinuz-6.1.0-18-amd64", "newer");
  put("boot/initrd.img-6.1.0-9-amd64", "chosen ramdisk");
  fs::create_symlink("boot/vmlinuz-6.1.0-9-amd64", directory_ / "tree/vmlinuz");
  const auto files = find();
  EXPECT_EQ(text_of(files.kernel), "chosen");
  EXPECT_EQ(text_of(files.initrd), "chosen ramdisk");
}

TEST_F(Trees, AKernelWithoutAnInitialRamDiskAndOneOfFedora) {
  put("vmlinuz-6.5.6-300.fc39.x86_64", "fedora");
  EXPECT_TRUE(find().initrd.empty());
  put("initramfs-6.5.6-300.fc39.x86_64.img", "dracut");
  EXPECT_EQ(text_of(find().initrd), "dracut");
}

TEST_F(Trees, NoKernelIsSaidClearly) {
  put("etc/os-release", "ID=debian\n");
  EXPECT_THROW(find(), UsageError);
}

}  // namespace
}  // namespace lodge::guestfs
