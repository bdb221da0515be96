// lodge image, from outside.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "base/fd.hpp"
#include "base/temporary_directory.hpp"
#include "support/process.hpp"

namespace lodge {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;
using testing_support::Result;
using testing_support::Seconds;

class ImageCommand : public testing::Test {
 protected:
  std::string path(const std::string& name) const { return dir_ / name; }
  static Result image(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), {LODGE_BINARY, "image"});
    return testing_support::run(arguments, Seconds(60));
  }
  static void succeed(const std::vector<std::string>& arguments) {
    const Result result = image(arguments);
    ASSERT_EQ(result.status, 0) << result.err;
  }
  static void refuse(const std::vector<std::string>& arguments, const std::string& part) {
    const Result result = image(arguments);
    EXPECT_EQ(result.status, 2) << result.out;
    EXPECT_THAT(result.err, AllOf(testing::StartsWith("lodge: "), HasSubstr(part)));
    EXPECT_EQ(std::ranges::count(result.err, '\n'), 1) << result.err;
  }
  json info(const std::string& name) const {
    const Result result = image({"info", "--json", path(name)});
    EXPECT_EQ(result.status, 0) << result.err;
    return json::parse(result.out, nullptr, false);
  }
  // Half noise that no compressor likes, half text, and a hole.
  std::string contents() const {
    std::string data(3 << 20, '\0');
    uint32_t x = 1;
    for (size_t i = 0; i < 1 << 20; i++) data[i] = static_cast<char>((x = x * 1664525 + 1013904223) >> 24);
    for (size_t i = 2 << 20; i < 3 << 20; i++) data[i] = "lodge "[i % 6];
    return data;
  }
  void write(const std::string& name, const std::string& data) const {
    std::ofstream(path(name), std::ios::binary) << data;
  }
  std::string read(const std::string& name) const {
    std::ifstream file(path(name), std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }

  TemporaryDirectory dir_;
};

TEST_F(ImageCommand, CreateMakesWhatInfoTells) {
  succeed(
      {"create", "--cluster-size", "4K", "--lazy-refcounts", "--compression", "zstd", path("disk"), "20G"});
  const json disk = info("disk");
  EXPECT_EQ(disk["format"], "qcow2");
  EXPECT_EQ(disk["virtual_size"], uint64_t{20} << 30);
  EXPECT_EQ(disk["cluster_size"], 4096);
  EXPECT_EQ(disk["lazy_refcounts"], true);
  EXPECT_EQ(disk["compression"], "zstd");
  EXPECT_LT(disk["disk_size"], 1 << 20);
  EXPECT_THAT(image({"info", path("disk")}).out, AllOf(HasSubstr("20 GiB"), HasSubstr("qcow2, version 3")));
}

TEST_F(ImageCommand, ConvertKeepsContentsThereAndBack) {
  write("raw", contents());
  for (const std::vector<std::string>& more : {std::vector<std::string>{},
                                               {"--compress"},
                                               {"--compress", "--compression", "zstd"},
                                               {"--subclusters"}}) {
    std::vector<std::string> arguments{"convert", path("raw"), path("qcow2")};
    arguments.insert(arguments.end(), more.begin(), more.end());
    succeed(arguments);
    succeed({"check", path("qcow2")});
    // The hole takes nothing, text takes little when compressed.
    EXPECT_LT(info("qcow2")["disk_size"],
              more.size() > 0 && more[0] == "--compress" ? 1500 << 10 : 2600 << 10);
    succeed({"convert", "--format", "raw", path("qcow2"), path("back")});
    EXPECT_TRUE(read("back") == contents());
    std::filesystem::remove(path("qcow2"));
    std::filesystem::remove(path("back"));
  }
}

TEST_F(ImageCommand, OverlaysAreCreatedAndRebasedWithoutChangingContents) {
  write("base", contents());
  std::string other = contents();
  other[5] = 'x';
  write("other", other);
  succeed({"create", "--backing", "base", path("overlay")});  // relative to the overlay
  EXPECT_EQ(info("overlay")["backing_format"], "raw");
  EXPECT_EQ(info("overlay")["virtual_size"], contents().size());
  succeed({"rebase", "--backing", "other", path("overlay")});
  const Result chain = image({"info", "--chain", "--json", path("overlay")});
  EXPECT_EQ(json::parse(chain.out)[1]["file"], path("other"));
  succeed({"convert", "--format", "raw", path("overlay"), path("back")});
  EXPECT_TRUE(read("back") == contents());
  succeed({"rebase", "--no-backing", path("overlay")});
  std::filesystem::remove(path("other"));
  std::filesystem::remove(path("back"));
  succeed({"convert", "--format", "raw", path("overlay"), path("back")});
  EXPECT_TRUE(read("back") == contents());
  succeed({"check", path("overlay")});
}

TEST_F(ImageCommand, ResizeGrowsAndShrinksOnlyWhenAllowed) {
  for (const char* format : {"raw", "qcow2"}) {
    succeed({"create", "--format", format, path(format), "64M"});
    succeed({"resize", path(format), "+64M"});
    EXPECT_EQ(info(format)["virtual_size"], 128 << 20);
    refuse({"resize", path(format), "32M"}, "--shrink");
    succeed({"resize", "--shrink", path(format), "32M"});
    EXPECT_EQ(info(format)["virtual_size"], 32 << 20);
  }
}

TEST_F(ImageCommand, ResizeNamesWhatIsInItsWay) {
  succeed({"create", "--qcow2-version", "2", path("old"), "1M"});
  succeed({"snapshot", path("old"), "--create", "first"});
  refuse({"resize", path("old"), "2M"}, "cannot be resized: it has snapshots, and is of version 2; copy it");
  succeed({"create", path("base"), "2M"});
  succeed({"create", "--backing", "base", path("small"), "1M"});
  refuse({"resize", path("small"), "3M"}, "it has a backing file larger than itself; copy it");
  if (!std::filesystem::exists("/usr/bin/qemu-img")) GTEST_SKIP() << "qemu-img is not installed";
  succeed({"create", path("disk"), "1M"});
  const Result made =
      testing_support::run({"/usr/bin/qemu-img", "bitmap", "--add", path("disk"), "b"}, Seconds(60));
  ASSERT_EQ(made.status, 0) << made.err;
  refuse({"resize", path("disk"), "2M"}, "it has bitmaps; copy it");
}

TEST_F(ImageCommand, SnapshotsComeBack) {
  write("raw", contents());
  succeed({"convert", path("raw"), path("disk")});
  succeed({"snapshot", path("disk"), "--create", "first"});
  refuse({"snapshot", path("disk"), "--create", "first"}, "already");
  succeed({"resize", path("disk"), "+1M"});
  EXPECT_THAT(image({"snapshot", path("disk")}).out, HasSubstr("first"));
  succeed({"snapshot", path("disk"), "--apply", "first"});
  EXPECT_EQ(info("disk")["virtual_size"], contents().size());
  succeed({"snapshot", path("disk"), "--delete", "first"});
  refuse({"snapshot", path("disk"), "--apply", "first"}, "no snapshot");
  succeed({"check", path("disk")});
  succeed({"convert", "--format", "raw", path("disk"), path("back")});
  EXPECT_TRUE(read("back") == contents());
}

TEST_F(ImageCommand, CheckFindsAndMendsLeaks) {
  write("raw", contents());
  succeed({"convert", path("raw"), path("disk")});
  std::string bytes = read("disk");
  // The first refcount block's place is in the first entry of the table, whose place is in the header.
  const auto number = [&](size_t at) {
    uint64_t value = 0;
    for (size_t i = 0; i < 8; i++) value = value << 8 | static_cast<uint8_t>(bytes[at + i]);
    return value;
  };
  const uint64_t block = number(number(48));
  bytes[block + 2 * 500 + 1] = 1;  // cluster 500 is far behind the end
  bytes[block + 2 * 6 + 1] = 2;
  write("disk", bytes);
  const Result found = image({"check", "--json", path("disk")});
  EXPECT_EQ(found.status, 3);
  EXPECT_EQ(json::parse(found.out)["leaks"], 2);
  succeed({"check", "--repair", "all", path("disk")});
  EXPECT_THAT(image({"check", path("disk")}).out, testing::StartsWith("no damage"));
}

// Whatever encrypts, by the hand of the program that makes such images.
TEST_F(ImageCommand, EncryptedImagesAreRefusedByEveryCommand) {
  if (!std::filesystem::exists("/usr/bin/qemu-img")) GTEST_SKIP() << "qemu-img is not installed";
  write("password", "secret");
  const std::string secret = "secret,id=key,file=" + path("password");
  for (const std::vector<std::string>& kind :
       {std::vector<std::string>{"luks", "key-secret=key,iter-time=10"},
        {"qcow2", "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"},
        {"qcow2", "encrypt.format=aes,encrypt.key-secret=key"}}) {
    Result made;
    // Where its thread gets no processor for a moment, qemu-img cannot time its own work and gives up.
    for (int attempt = 0; attempt < 20; attempt++) {
      made = testing_support::run({"/usr/bin/qemu-img", "create", "-f", kind[0], "--object", secret, "-o",
                                   kind[1], path("encrypted"), "1M"},
                                  Seconds(60));
      if (made.err.find("accurate CPU usage") == std::string::npos) break;
    }
    ASSERT_EQ(made.status, 0) << made.err;
    for (const std::vector<std::string>& command : {std::vector<std::string>{"info", path("encrypted")},
                                                    {"check", path("encrypted")},
                                                    {"convert", path("encrypted"), path("new")},
                                                    {"resize", path("encrypted"), "2M"},
                                                    {"create", "--backing", path("encrypted"), path("new")}})
      refuse(command, "decrypt it with 'qemu-img convert'");
    const Result run =
        testing_support::run({LODGE_BINARY, "run", "--accel", "soft", path("encrypted")}, Seconds(60));
    EXPECT_EQ(run.status, 2);
    EXPECT_THAT(run.err, HasSubstr("encrypted: is encrypted"));
    EXPECT_FALSE(std::filesystem::exists(path("new")));
    if (kind[0] == "luks") succeed({"info", "--format", "raw", path("encrypted")});
    std::filesystem::remove(path("encrypted"));
  }
}

// Whatever other programs make, by the hand of one that makes it.
TEST_F(ImageCommand, ImagesOfOtherFormatsAreRefusedByEveryCommand) {
  if (!std::filesystem::exists("/usr/bin/qemu-img")) GTEST_SKIP() << "qemu-img is not installed";
  for (const std::vector<std::string>& kind : {std::vector<std::string>{"vdi"},
                                               {"vmdk"},
                                               {"vmdk", "subformat=monolithicFlat"},
                                               {"vpc"},
                                               {"vpc", "subformat=fixed"},
                                               {"vhdx"},
                                               {"qed"},
                                               {"parallels"}}) {
    std::vector<std::string> make{"/usr/bin/qemu-img", "create", "-f", kind[0], path("foreign"), "4M"};
    if (kind.size() > 1) make.insert(make.begin() + 2, {"-o", kind[1]});
    const Result made = testing_support::run(make, Seconds(60));
    ASSERT_EQ(made.status, 0) << made.err;
    for (const std::vector<std::string>& command : {std::vector<std::string>{"info", path("foreign")},
                                                    {"check", path("foreign")},
                                                    {"convert", path("foreign"), path("new")},
                                                    {"resize", path("foreign"), "8M"},
                                                    {"create", "--backing", path("foreign"), path("new")}})
      refuse(command, "'qemu-img convert -f " + kind[0]);
    const Result run =
        testing_support::run({LODGE_BINARY, "run", "--accel", "soft", path("foreign")}, Seconds(60));
    EXPECT_EQ(run.status, 2);
    EXPECT_THAT(run.err, HasSubstr("'qemu-img convert -f " + kind[0]));
    EXPECT_FALSE(std::filesystem::exists(path("new")));
    succeed({"info", "--format", "raw", path("foreign")});
    std::filesystem::remove(path("foreign"));
  }
}

TEST_F(ImageCommand, ADataFileOutsideTheImagesDirectoryIsRefusedWhenItIsMade) {
  std::filesystem::create_directory(path("sub"));
  write("raw", contents());
  const std::string disk = path("sub/disk");
  refuse({"create", "--data-file", "../data", disk, "1M"}, "--data-file: '../data' would not be in");
  refuse({"convert", "--data-file", "../data", path("raw"), disk}, "--data-file: '../data' would not be in");
  EXPECT_FALSE(std::filesystem::exists(path("data")));
  EXPECT_FALSE(std::filesystem::exists(disk));
  succeed({"create", "--data-file", "../sub/data", disk, "1M"});
  succeed({"convert", "--format", "raw", disk, path("back")});
}

TEST_F(ImageCommand, OptionsThatDoNotFitAreRefused) {
  write("raw", contents());
  for (const std::vector<std::string>& option : {std::vector<std::string>{"--cluster-size", "64K"},
                                                 {"--compression", "zlib"},
                                                 {"--refcount-bits", "16"},
                                                 {"--qcow2-version", "3"},
                                                 {"--data-file", "data"},
                                                 {"--raw-data"},
                                                 {"--lazy-refcounts"},
                                                 {"--subclusters"},
                                                 {"--backing", path("raw")}}) {
    std::vector<std::string> create{"create", "--format", "raw", path("new"), "1M"},
        convert{"convert", "--format", "raw", path("raw"), path("new")};
    create.insert(create.begin() + 1, option.begin(), option.end());
    convert.insert(convert.begin() + 1, option.begin(), option.end());
    refuse(create, "image create: a raw image has no " + option[0]);
    refuse(convert, "image convert: a raw image has no " + option[0]);
  }
  refuse({"convert", "--compress", "--format", "raw", path("raw"), path("new")}, "has no --compress;");
  refuse({"create", "--backing-format", "raw", path("new"), "1M"}, "give --backing FILE too");
  for (const char* option : {"--data-file", "--backing"})
    refuse({"convert", "--compress", option, path("raw"), path("raw"), path("new")},
           "--compress and " + std::string(option));
  EXPECT_FALSE(std::filesystem::exists(path("new")));
}

TEST_F(ImageCommand, NamesThatCannotBeAreRefused) {
  succeed({"create", path("disk"), "1M"});
  for (const char* option : {"--create", "--apply", "--delete"}) {
    refuse({"snapshot", path("disk"), option, ""}, "a name has 1 to 255 bytes, and this one has 0");
    refuse({"snapshot", path("disk"), option, std::string(300, 'x')}, "and this one has 300\n");
  }
  succeed({"snapshot", path("disk"), "--create", std::string(255, 'x')});
  refuse({"create", "", "1G"}, "image create: a file's name is empty");
  refuse({"convert", path("disk"), ""}, "image convert: a file's name is empty");
}

TEST_F(ImageCommand, AnImageIsNotItsOwnBackingFile) {
  succeed({"create", path("disk"), "1M"});
  succeed({"create", "--backing", "disk", path("overlay")});
  for (const std::vector<std::string>& more : {std::vector<std::string>{}, {"--unsafe"}}) {
    std::vector<std::string> itself{"rebase", "--backing", "disk", path("disk")},
        behind{"rebase", "--backing", "overlay", path("disk")};
    itself.insert(itself.end(), more.begin(), more.end());
    behind.insert(behind.end(), more.begin(), more.end());
    refuse(itself, "disk: cannot be its own backing file; choose another");
    refuse(behind, "disk: cannot be its own backing file, nor lie behind that");
  }
  refuse({"rebase", "--unsafe", "--backing", "disk", "--backing-format", "qcow2", path("disk")},
         "cannot be its own backing file");
}

TEST_F(ImageCommand, WhatCannotBeWrittenNamesAFittingRemedy) {
  if (::geteuid() == 0) GTEST_SKIP() << "root may write every file";
  succeed({"create", path("disk"), "1M"});
  std::filesystem::permissions(path("disk"), std::filesystem::perms::owner_read);
  refuse({"resize", path("disk"), "2M"},
         "get permission to write it, or give it to a guest as FILE,readonly");
}

TEST_F(ImageCommand, RefusesWithOneLineThatNamesTheRemedy) {
  succeed({"create", path("disk"), "1M"});
  refuse({"create", path("disk"), "1M"}, "is there already");
  refuse({"create", path("new"), "1Q"}, "not a size");
  refuse({"create", path("new")}, "how large");
  refuse({"create", "--cluster-size", "3K", path("new"), "1M"}, "--cluster-size");
  refuse({"create", "--format", "vmdk", path("new"), "1M"}, "--format");
  refuse({"create", "--qcow2-version", "2", "--subclusters", path("new"), "1M"}, "need version 3");
  refuse({"create", "--backing", "missing", path("new")}, "missing");
  refuse({"info", path("missing")}, "missing");
  write("text", "not an image");
  refuse({"check", path("text")}, "is not a qcow2 image; 'lodge image info' tells what it is");
  refuse({"rebase", path("disk")}, "--no-backing");
  refuse({"fly"}, "there are build, create, info, check, convert, resize, snapshot and rebase");
  refuse({}, "lodge image --help");
  EXPECT_FALSE(std::filesystem::exists(path("new")));
}

TEST_F(ImageCommand, AnImageInUseIsRefusedAndTheUserNamed) {
  if (!std::filesystem::exists("/usr/bin/qemu-io")) GTEST_SKIP() << "qemu-io is not installed";
  succeed({"create", path("disk"), "1M"});
  testing_support::Process other(
      {"/usr/bin/qemu-io", "-f", "qcow2", "-c", "read 0 512", "-c", "sleep 20000", path("disk")});
  // It says nothing that could be waited for until it ends; its lock on byte 101 ("I write") is what tells.
  const Fd fd(::open(path("disk").c_str(), O_RDWR | O_CLOEXEC));
  struct flock held {};
  for (int i = 0; i < 500; i++) {
    held = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 101, .l_len = 1, .l_pid = 0};
    ASSERT_EQ(::fcntl(fd.get(), F_OFD_GETLK, &held), 0);
    if (held.l_type != F_UNLCK) break;
    ::usleep(20000);
  }
  const Result result = image({"resize", path("disk"), "2M"});
  EXPECT_EQ(result.status, 2);
  EXPECT_THAT(result.err, AllOf(HasSubstr("qemu-io"), HasSubstr(std::to_string(other.pid()))));
}

}  // namespace
}  // namespace lodge
