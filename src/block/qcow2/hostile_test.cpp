// Images that somebody has made to do harm, and images with what we do not know: refused with a reason, or
// I/O errors.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "base/error.hpp"
#include "base/temporary_directory.hpp"
#include "block/memory_storage.hpp"
#include "block/qcow2/create.hpp"
#include "block/qcow2/image.hpp"

namespace lodge::block::qcow2 {
namespace {

using testing::AllOf;
using testing::HasSubstr;

constexpr uint64_t cluster = 65536;

class Hostile : public testing::Test {
 protected:
  // One allocated cluster at the disk's start.
  Hostile() {
    {
      FileStorage storage(Fd(::open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600)), path_, Use::write,
                          make_engine(Engine::threads));
      CreateOptions options;
      options.size = 1 << 20;
      create(storage, options);
    }
    const auto image = open_image(path_, {});
    const std::vector<uint8_t> data(cluster, 1);
    write(*image, data.data(), data.size(), 0);
  }

  template <class T>
  void put(uint64_t offset, T value) const {
    uint8_t bytes[sizeof value];
    store_be(bytes, value);
    std::fstream file(path_, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(static_cast<std::streamoff>(offset));
    file.write(reinterpret_cast<const char*>(bytes), sizeof bytes);
  }
  uint64_t get(uint64_t offset) const {
    uint8_t bytes[8]{};
    std::ifstream file(path_, std::ios::binary);
    file.seekg(static_cast<std::streamoff>(offset));
    file.read(reinterpret_cast<char*>(bytes), sizeof bytes);
    return load_be<uint64_t>(bytes);
  }
  uint64_t l1() const { return get(40); }
  uint64_t l2() const { return get(l1()) & entry_offset; }

  std::string refusal(OpenOptions options = {}) const {
    try {
      open_image(path_, options);
    } catch (const UsageError& error) {
      return error.what();
    }
    return "";
  }
  static int read_first(Image& image) {
    std::vector<uint8_t> data(512);
    return read(image, data.data(), data.size(), 0);
  }
  static int write_first(Image& image) {
    const std::vector<uint8_t> data(512, 0xaa);
    return write(image, data.data(), data.size(), 0);
  }

  TemporaryDirectory directory_;
  std::string path_ = directory_ / "disk";
};

TEST_F(Hostile, HeadersOutOfRangeAreRefused) {
  const struct {
    uint64_t offset;
    uint64_t value;
    const char* part;
  } cases[] = {
      {20, uint64_t{40} << 32, "2^40"},            // cluster_bits
      {36, uint64_t{0x7fffffff} << 32, "32 MiB"},  // l1 entries
      {40, 12345, "not aligned"},                  // l1 offset
      {40, uint64_t{1} << 50, "outside the file"},
      {48, uint64_t{1} << 50, "outside the file"},
      {56, uint64_t{0xffffff} << 32, "8 MiB"},  // refcount table clusters
      {24, uint64_t{1} << 62, "2 EiB"},
      {24, uint64_t{1} << 50, "too small for its size"},
      {96, uint64_t{7} << 32 | 104, "64 bits"},  // refcount order
      {96, uint64_t{4} << 32 | 8, "impossible length"},
      {8, cluster + 5, "backing file outside"},
  };
  for (const auto& c : cases) {
    const uint64_t old = get(c.offset);
    put(c.offset, c.value);
    EXPECT_THAT(refusal(), HasSubstr(c.part)) << c.offset;
    put(c.offset, old);
  }
  EXPECT_EQ(refusal(), "");
}

TEST_F(Hostile, EncryptionIsRefusedByName) {
  put(32, uint32_t{2});
  EXPECT_THAT(refusal(), AllOf(HasSubstr("LUKS"), HasSubstr("decrypt")));
  put(32, uint32_t{1});
  EXPECT_THAT(refusal(), HasSubstr("AES"));
}

TEST_F(Hostile, UnknownIncompatibleFeaturesAreRefusedByTheNameThatTheImageGives) {
  put(72, uint64_t{1} << 9);
  EXPECT_THAT(refusal(), HasSubstr("feature number 9"));
  // A feature name table where the extensions begin.
  put(112, uint32_t{extension_features});
  put(116, uint32_t{48});
  put(120, static_cast<uint16_t>(9));
  put(122, uint64_t{0x77'61'72'70'00'00'00'00});  // "warp"
  EXPECT_THAT(refusal(), HasSubstr("'warp' (bit 9)"));
}

TEST_F(Hostile, UnknownAutoclearFeaturesAreClearedBeforeWriting) {
  put(88, uint64_t{1} << 20);
  OpenOptions options;
  options.read_only = true;
  open_image(path_, options);
  EXPECT_EQ(get(88), uint64_t{1} << 20);
  open_image(path_, {});
  EXPECT_EQ(get(88), 0u);
}

TEST_F(Hostile, ACorruptImageIsOnlyRead) {
  put(72, uint64_t{feature_corrupt});
  EXPECT_THAT(refusal(), HasSubstr("marked as corrupt"));
  OpenOptions options;
  options.read_only = true;
  EXPECT_EQ(refusal(options), "");
}

TEST_F(Hostile, ADirtyImageIsRepairedWhenItIsWritten) {
  const uint64_t block = get(get(48));
  put(block + 2 * 4, uint32_t{0});  // two counts
  put(72, uint64_t{feature_dirty});
  EXPECT_EQ(refusal(), "");
  EXPECT_EQ(get(72), 0u);
  EXPECT_NE(get(block + 2 * 4) >> 32, 0u);
}

TEST_F(Hostile, EntriesOutsideTheFileAreErrors) {
  const uint64_t l2_offset = l2();
  for (const uint64_t entry : {uint64_t{1} << 40 | entry_copied, uint64_t{512} | entry_copied,
                               entry_compressed | uint64_t{1} << 45}) {
    put(l2_offset, entry);
    const auto image = open_image(path_, {});
    EXPECT_EQ(read_first(*image), EIO);
    EXPECT_EQ(write_first(*image), EIO);
    EXPECT_EQ(write_zeroes(*image, 0, 1024, true), EIO);
  }
  put(l1(), uint64_t{1} << 40 | entry_copied);
  const auto image = open_image(path_, {});
  EXPECT_EQ(read_first(*image), EIO);
  EXPECT_EQ(write_first(*image), EIO);
}

TEST_F(Hostile, NoWriteGoesWhereATableIs) {
  const uint64_t l2_offset = l2();
  // The header would decide which files the next opening reads.
  for (const uint64_t table : {l1(), get(48), get(get(48)), l2_offset}) {
    put(l2_offset, table | entry_copied);
    const uint64_t before = get(table);
    EXPECT_EQ(write_first(*open_image(path_, {})), EIO);
    EXPECT_EQ(get(table), before);
  }
}

TEST_F(Hostile, TablesOverEachOtherAreRefusedForWriting) {
  put(l1(), get(48) | entry_copied);
  EXPECT_THAT(refusal(), HasSubstr("overlaps"));
}

TEST_F(Hostile, CompressedDataThatIsNoneIsAnError) {
  put(l2(), entry_compressed | (uint64_t{127} << (62 - 8)) | 5 * cluster);
  const auto image = open_image(path_, {});
  EXPECT_EQ(read_first(*image), EIO);
}

TEST_F(Hostile, SnapshotTablesOutsideTheFileAreRefused) {
  put(60, uint32_t{3});
  put(64, uint64_t{1} << 50);
  EXPECT_THAT(refusal(), HasSubstr("snapshot table outside"));
  put(60, uint32_t{0x10000000});
  EXPECT_THAT(refusal(), HasSubstr("65536"));
  put(60, uint32_t{1});
  put(64, 5 * cluster);
  EXPECT_NE(refusal(), "");  // data read as a table
}

TEST_F(Hostile, ChainsThatLoopAreRefused) {
  const auto make = [&](const std::string& name, const std::string& backing) {
    FileStorage storage(Fd(::open((directory_ / name).c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600)), name,
                        Use::write, make_engine(Engine::threads));
    CreateOptions options;
    options.size = 1 << 20;
    options.backing_file = backing;
    create(storage, options);
  };
  make("a", "b");
  make("b", "a");
  make("self", "self");
  for (const char* name : {"a", "self"}) {
    EXPECT_THAT([&] { open_image(directory_ / name, {}); },
                testing::ThrowsMessage<UsageError>(HasSubstr("cannot be")))
        << name;  // the lock is met first
    OpenOptions options;
    options.lock = false;
    EXPECT_THAT([&] { open_image(directory_ / name, options); },
                testing::ThrowsMessage<UsageError>(HasSubstr("its own backing file")))
        << name;
  }
  make("network", "nbd://example.org/disk");
  EXPECT_THAT([&] { open_image(directory_ / "network", {}); },
              testing::ThrowsMessage<UsageError>(HasSubstr("is not a file")));
}

TEST_F(Hostile, AnImageCannotChooseWhichFileIsWritten) {
  const std::string victim = directory_ / "elsewhere";
  std::filesystem::create_directory(victim);
  std::ofstream(victim + "/passwd") << "root";
  FileStorage storage(Fd(::open((directory_ / "disk2").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600)), "disk2",
                      Use::write, make_engine(Engine::threads));
  CreateOptions options;
  options.size = 1 << 20;
  options.data_file = victim + "/passwd";
  create(storage, options);
  EXPECT_THAT([&] { open_image(directory_ / "disk2", {}); },
              testing::ThrowsMessage<UsageError>(HasSubstr("not in its own directory")));
  OpenOptions chosen;  // by the user
  chosen.data_file = victim + "/passwd";
  EXPECT_NO_THROW(open_image(directory_ / "disk2", chosen));
}

// A sparse file of any size costs nothing: our memory must not depend on it.
TEST_F(Hostile, HugeSparseFilesCostNothing) {
  std::filesystem::resize_file(path_, uint64_t{1} << 42);
  const auto image = open_image(path_, {});
  EXPECT_EQ(read_first(*image), 0);
  EXPECT_EQ(write_first(*image), 0);
}

}  // namespace
}  // namespace lodge::block::qcow2
