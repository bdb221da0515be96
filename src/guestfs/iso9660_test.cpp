#include "guestfs/iso9660.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "base/temporary_directory.hpp"
#include "support/process.hpp"

namespace lodge::guestfs {
namespace {

using ::testing::HasSubstr;
using testing_support::Seconds;

constexpr size_t sector = 2048;
constexpr Seconds patience(60);

const std::vector<VolumeFile>& seed() {
  static const std::vector<VolumeFile> files = {{"user-data", "#cloud-config\n" + std::string(3000, '#')},
                                                {"meta-data", "instance-id: one\n"}};
  return files;
}

std::string text_at(const std::vector<uint8_t>& bytes, size_t at, size_t size) {
  return {bytes.begin() + static_cast<ptrdiff_t>(at), bytes.begin() + static_cast<ptrdiff_t>(at + size)};
}

uint32_t little(const std::vector<uint8_t>& bytes, size_t at) {
  uint32_t value = 0;
  std::memcpy(&value, &bytes[at], 4);
  return value;
}

uint32_t big(const std::vector<uint8_t>& bytes, size_t at) {
  return __builtin_bswap32(little(bytes, at));
}

// What a reader of ECMA-119 finds in the root directory.
struct Record {
  std::string identifier, system_use;
  uint32_t extent, size;
};

std::vector<Record> records(const std::vector<uint8_t>& bytes) {
  std::vector<Record> found;
  for (size_t at = 20 * sector; bytes[at] != 0; at += bytes[at]) {
    const size_t id = bytes[at + 32], use = 33 + id + (id % 2 == 0 ? 1 : 0);
    EXPECT_EQ(bytes[at] % 2, 0);
    EXPECT_EQ(little(bytes, at + 2), big(bytes, at + 6));
    EXPECT_EQ(little(bytes, at + 10), big(bytes, at + 14));
    found.push_back({text_at(bytes, at + 33, id), text_at(bytes, at + use, bytes[at] - use),
                     little(bytes, at + 2), little(bytes, at + 10)});
  }
  return found;
}

TEST(Iso9660, ThePrimaryDescriptorSaysWhatTheVolumeIs) {
  const auto bytes = make_iso9660("CIDATA", seed());
  const size_t at = 16 * sector;
  EXPECT_TRUE(std::all_of(bytes.begin(), bytes.begin() + at, [](uint8_t byte) { return byte == 0; }));
  EXPECT_EQ(text_at(bytes, at, 7), std::string("\1CD001\1"));
  EXPECT_EQ(text_at(bytes, at + 40, 32), "CIDATA" + std::string(26, ' '));
  EXPECT_EQ(little(bytes, at + 80) * sector, bytes.size());
  EXPECT_EQ(little(bytes, at + 80), big(bytes, at + 84));
  EXPECT_EQ(text_at(bytes, at + 128, 4), std::string("\0\x8\x8\0", 4));  // 2048, both ways
  EXPECT_EQ(little(bytes, at + 132), 10u);
  EXPECT_EQ(little(bytes, at + 140), 18u);
  EXPECT_EQ(big(bytes, at + 148), 19u);
  EXPECT_EQ(bytes[at + 156], 34);  // the root's record
  EXPECT_EQ(little(bytes, at + 158), 20u);
  EXPECT_EQ(text_at(bytes, at + 813, 17), std::string(16, '0') + '\0');
  EXPECT_EQ(bytes[at + 881], 1);
  EXPECT_EQ(text_at(bytes, 17 * sector, 7), "\377CD001\1");
}

TEST(Iso9660, BothPathTablesNameTheRoot) {
  const auto bytes = make_iso9660("CIDATA", seed());
  EXPECT_EQ(text_at(bytes, 18 * sector, 10), std::string("\1\0\x14\0\0\0\1\0\0\0", 10));
  EXPECT_EQ(text_at(bytes, 19 * sector, 10), std::string("\1\0\0\0\0\x14\0\1\0\0", 10));
}

TEST(Iso9660, TheDirectoryLeadsToTheFiles) {
  const auto bytes = make_iso9660("CIDATA", seed());
  const auto found = records(bytes);
  ASSERT_EQ(found.size(), 4u);
  EXPECT_EQ(found[0].identifier, std::string(1, '\0'));
  EXPECT_EQ(found[1].identifier, "\1");
  EXPECT_EQ(found[2].identifier, "METADATA.;1");  // in the order of the names, as 9.3 wants it
  EXPECT_EQ(found[3].identifier, "USERDATA.;1");
  EXPECT_EQ(found[0].system_use.substr(0, 7), "SP\7\1\xbe\xef" + std::string(1, '\0'));
  EXPECT_THAT(found[0].system_use, HasSubstr("RRIP_1991A"));
  EXPECT_THAT(found[3].system_use, HasSubstr("NM\16\1" + std::string(1, '\0') + "user-data"));
  EXPECT_EQ(text_at(bytes, found[2].extent * sector, found[2].size), seed()[1].contents);
  EXPECT_EQ(text_at(bytes, found[3].extent * sector, found[3].size), seed()[0].contents);
}

TEST(Iso9660, OthersReadIt) {
  const TemporaryDirectory directory;
  const std::string path = directory / "volume";
  const auto bytes = make_iso9660("CIDATA", seed());
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
  const auto blkid = testing_support::run({"/usr/sbin/blkid", "-p", "-o", "export", path}, patience);
  EXPECT_THAT(blkid.out, HasSubstr("LABEL=CIDATA\n")) << blkid.err;
  EXPECT_THAT(blkid.out, HasSubstr("TYPE=iso9660\n"));
  if (!std::filesystem::exists("/usr/bin/bsdtar")) GTEST_SKIP() << "bsdtar is missing: run scripts/setup";
  const auto list = testing_support::run({"/usr/bin/bsdtar", "-tf", path}, patience);
  EXPECT_EQ(list.out, ".\nmeta-data\nuser-data\n") << list.err;
  for (const auto& file : seed()) {
    const auto content = testing_support::run({"/usr/bin/bsdtar", "-xOf", path, file.name}, patience);
    EXPECT_EQ(content.out, file.contents) << content.err;
  }
}

TEST(Iso9660, AnEmptyFileAndTheLargestDirectoryFit) {
  std::vector<VolumeFile> files;
  for (char letter = 'a'; letter < 'a' + 10; letter++) files.push_back({letter + std::string(63, '-'), ""});
  const auto bytes = make_iso9660("FULL", files);
  const auto found = records(bytes);
  EXPECT_EQ(found.size(), 12u);
  EXPECT_EQ(found.back().size, 0u);
  EXPECT_EQ(bytes.size(), 21 * sector);
}

TEST(Iso9660, WhatDoesNotFitIsRefused) {
  const auto refused = [](std::string_view label, std::vector<VolumeFile> files) {
    EXPECT_THROW(make_iso9660(label, std::move(files)), std::invalid_argument);
  };
  refused("cidata", {});
  refused("", {});
  refused(std::string(33, 'A'), {});
  refused("A", {{"a/b", ""}});
  refused("A", {{"", ""}});
  refused("A", {{"meta-data", ""}, {"META_DATA", ""}});
  refused("A", std::vector<VolumeFile>(11));
}

}  // namespace
}  // namespace lodge::guestfs
