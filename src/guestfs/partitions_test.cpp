#include "guestfs/partitions.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "base/temporary_directory.hpp"
#include "guestfs/testing.hpp"
#include "support/process.hpp"

namespace lodge::guestfs {
namespace {

constexpr uint64_t MiB = 1 << 20, disk_size = 8 * MiB;

std::vector<uint8_t> disk_with(const GptLayout& layout) {
  std::vector<uint8_t> bytes(disk_size);
  std::ranges::copy(layout.start, bytes.begin());
  std::ranges::copy(layout.end, bytes.end() - static_cast<ptrdiff_t>(layout.end.size()));
  return bytes;
}

std::vector<Partition> partitions_of(std::vector<uint8_t> bytes) {
  const auto image = testing::image_of(std::move(bytes));
  return read_partitions(View(*image));
}

TEST(Partitions, AGuidIsSpelledAsTheSpecificationDoes) {
  const Guid guid = {0xaf, 0x3d, 0xc6, 0x0f, 0x83, 0x84, 0x72, 0x47,
                     0x8e, 0x79, 0x3d, 0x69, 0xd8, 0x47, 0x7d, 0xe4};
  EXPECT_EQ(to_string(guid), "0fc63daf-8483-4772-8e79-3d69d8477de4");
}

TEST(Partitions, RandomGuidsAreOfVersionFourAndDiffer) {
  const std::string guid = to_string(random_guid());
  EXPECT_EQ(guid[14], '4');
  EXPECT_NE(std::string("89ab").find(guid[19]), std::string::npos);
  EXPECT_NE(guid, to_string(random_guid()));
}

TEST(Partitions, WhatIsWrittenIsRead) {
  const auto layout = make_gpt(disk_size, random_guid(), random_guid());
  const auto found = partitions_of(disk_with(layout));
  ASSERT_EQ(found.size(), 1u);
  EXPECT_EQ(found[0].number, 1u);
  EXPECT_EQ(found[0].begin, MiB);
  EXPECT_EQ(found[0].size, disk_size - 2 * MiB);
  EXPECT_EQ(found[0].uuid, layout.partition.uuid);
}

// An independent reader: util-linux.
TEST(Partitions, SfdiskFindsTheTableWhole) {
  if (!std::filesystem::exists("/usr/sbin/sfdisk")) GTEST_SKIP() << "sfdisk is not installed";
  const TemporaryDirectory directory;
  const auto layout = make_gpt(disk_size, random_guid(), random_guid());
  const auto bytes = disk_with(layout);
  std::ofstream(directory / "disk", std::ios::binary)
      .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  const auto verify = testing_support::run({"/usr/sbin/sfdisk", "--verify", directory / "disk"},
                                           testing_support::Seconds(60));
  EXPECT_EQ(verify.status, 0);
  EXPECT_THAT(verify.out + verify.err, ::testing::HasSubstr("No errors detected"));
  const auto dump =
      testing_support::run({"/usr/sbin/sfdisk", "--dump", directory / "disk"}, testing_support::Seconds(60));
  std::string uuid = layout.partition.uuid;
  std::ranges::transform(uuid, uuid.begin(), [](unsigned char c) { return std::toupper(c); });
  EXPECT_THAT(dump.out, ::testing::HasSubstr("uuid=" + uuid));
  EXPECT_THAT(dump.out, ::testing::ContainsRegex("start= +2048, size= +12288"));
  EXPECT_THAT(dump.out, ::testing::HasSubstr("name=\"root\""));
}

TEST(Partitions, TheBackupCountsWhenTheFirstTableIsDamaged) {
  const auto layout = make_gpt(disk_size, random_guid(), random_guid());
  auto bytes = disk_with(layout);
  bytes[2 * 512 + 40] ^= 1;  // an entry, so that its checksum is wrong
  ASSERT_EQ(partitions_of(bytes).size(), 1u);
  EXPECT_EQ(partitions_of(bytes)[0].size, disk_size - 2 * MiB);
  bytes[disk_size - 512 + 16] ^= 1;  // the backup's header too: the protective MBR is left
  ASSERT_EQ(partitions_of(bytes).size(), 1u);
  EXPECT_EQ(partitions_of(bytes)[0].begin, 512u);
}

TEST(Partitions, AnMbrHasItsPrimaryPartitions) {
  std::vector<uint8_t> bytes(disk_size);
  const auto put32 = [&](size_t at, uint32_t value) { std::memcpy(&bytes[at], &value, 4); };
  put32(440, 0x1234abcd);
  bytes[446 + 16 + 4] = 0x83;
  put32(446 + 16 + 8, 2048), put32(446 + 16 + 12, 4096);
  bytes[510] = 0x55, bytes[511] = 0xaa;
  const auto found = partitions_of(bytes);
  ASSERT_EQ(found.size(), 1u);
  EXPECT_EQ(found[0].number, 2u);
  EXPECT_EQ(found[0].begin, MiB);
  EXPECT_EQ(found[0].size, 2 * MiB);
  EXPECT_EQ(found[0].uuid, "1234abcd-02");
}

TEST(Partitions, AnEmptyDiskAndNoneHaveNoTable) {
  EXPECT_TRUE(partitions_of(std::vector<uint8_t>(disk_size)).empty());
  EXPECT_TRUE(partitions_of({}).empty());
}

}  // namespace
}  // namespace lodge::guestfs
