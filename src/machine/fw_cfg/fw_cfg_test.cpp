#include "machine/fw_cfg/fw_cfg.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <nlohmann/json.hpp>
#include <random>

#include "base/error.hpp"
#include "machine/boot/test_kernels.hpp"
#include "machine/layout.hpp"

namespace lodge::machine {
namespace {

using testing::ElementsAre;
using Data = std::vector<uint8_t>;

constexpr uint64_t MiB = layout::MiB;
constexpr uint32_t error = 1, read_bit = 2, skip = 4, select_bit = 8, write_bit = 16;

class FwCfgTest : public testing::Test {
 protected:
  void select(uint16_t key) { fw_cfg.write(0, 2, key); }
  Data read_data(size_t count) {
    Data bytes(count);
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(fw_cfg.read(1, 1));
    return bytes;
  }
  uint32_t big32(const Data& bytes, size_t at) {
    uint32_t value;
    std::memcpy(&value, bytes.data() + at, 4);
    return __builtin_bswap32(value);
  }
  uint16_t key_of(const std::string& name) {
    select(0x19);
    const uint32_t count = big32(read_data(4), 0);
    for (uint32_t index = 0; index < count; ++index) {
      const Data entry = read_data(64);
      if (std::string(reinterpret_cast<const char*>(entry.data() + 8)) == name) {
        return static_cast<uint16_t>(big32(entry, 4) >> 16);
      }
    }
    return 0xffff;
  }
  // Runs a DMA whose control structure is at `at`; returns the control word afterwards.
  uint32_t dma(uint32_t control, uint32_t length, uint64_t address, uint64_t at = 0x5000) {
    std::array<uint32_t, 4> request{__builtin_bswap32(control), __builtin_bswap32(length),
                                    __builtin_bswap32(static_cast<uint32_t>(address >> 32)),
                                    __builtin_bswap32(static_cast<uint32_t>(address))};
    EXPECT_TRUE(memory.write(at, {reinterpret_cast<uint8_t*>(request.data()), 16}));
    if (at >> 32 != 0) fw_cfg.write(4, 4, __builtin_bswap32(static_cast<uint32_t>(at >> 32)));
    fw_cfg.write(8, 4, __builtin_bswap32(static_cast<uint32_t>(at)));
    EXPECT_TRUE(memory.read(at, {reinterpret_cast<uint8_t*>(request.data()), 16}));
    return __builtin_bswap32(request[0]);
  }
  Data guest(uint64_t gpa, size_t size) {
    Data bytes(size);
    EXPECT_TRUE(memory.read(gpa, bytes));
    return bytes;
  }

  GuestMemory memory{2 * MiB};
  FwCfg fw_cfg{memory};
};

TEST_F(FwCfgTest, HasItsSignatureAndFeatures) {
  select(0);
  EXPECT_THAT(read_data(5), ElementsAre('Q', 'E', 'M', 'U', 0));
  select(1);
  EXPECT_THAT(read_data(4), ElementsAre(3, 0, 0, 0));
}

TEST_F(FwCfgTest, DmaRegisterReadsAsSignature) {
  EXPECT_EQ(fw_cfg.read(4, 4), __builtin_bswap32(0x51454d55));
  EXPECT_EQ(fw_cfg.read(8, 4), __builtin_bswap32(0x20434647));
}

TEST_F(FwCfgTest, SelectingRewinds) {
  select(0);
  EXPECT_THAT(read_data(2), ElementsAre('Q', 'E'));
  select(0x4000);  // the write channel's bit means nothing
  EXPECT_THAT(read_data(2), ElementsAre('Q', 'E'));
}

TEST_F(FwCfgTest, MissingItemsReadAsZeros) {
  select(0x1234);
  EXPECT_THAT(read_data(3), ElementsAre(0, 0, 0));
}

TEST_F(FwCfgTest, DirectoryListsFilesBigEndian) {
  fw_cfg.add_file("opt/one", {1, 2, 3});
  fw_cfg.add_file("opt/two", Data(0x12345));
  select(0x19);
  const Data directory = read_data(4 + 2 * 64);
  EXPECT_EQ(big32(directory, 0), 2u);
  EXPECT_EQ(big32(directory, 4), 3u);
  EXPECT_EQ(big32(directory, 4 + 64), 0x12345u);
  select(key_of("opt/one"));
  EXPECT_THAT(read_data(4), ElementsAre(1, 2, 3, 0));
}

TEST_F(FwCfgTest, ReplacesAFileOfTheSameName) {
  fw_cfg.add_file("opt/one", {1});
  fw_cfg.add_file("opt/one", {9, 9});
  select(0x19);
  EXPECT_EQ(big32(read_data(4), 0), 1u);
  EXPECT_THAT(fw_cfg.file("opt/one"), ElementsAre(9, 9));
}

TEST_F(FwCfgTest, RefusesNamesThatDoNotFit) {
  EXPECT_NO_THROW(fw_cfg.add_file(std::string(55, 'x'), {}));
  EXPECT_THROW(fw_cfg.add_file(std::string(56, 'x'), {}), UsageError);
  EXPECT_THROW(fw_cfg.add_file("", {}), UsageError);
  EXPECT_THROW(fw_cfg.add_file("a b", {}), UsageError);
}

TEST_F(FwCfgTest, RefusesMoreFilesThanTheDirectoryHolds) {
  for (size_t index = 0; index < FwCfg::max_files; ++index)
    fw_cfg.add_file("opt/" + std::to_string(index), {});
  EXPECT_THROW(fw_cfg.add_file("opt/more", {}), UsageError);
}

TEST_F(FwCfgTest, DmaSelectsAndReads) {
  fw_cfg.add_file("opt/one", {1, 2, 3, 4});
  const uint32_t select_one = uint32_t{key_of("opt/one")} << 16 | select_bit;
  EXPECT_EQ(dma(select_one | read_bit, 3, 0x8000), 0u);
  EXPECT_THAT(guest(0x8000, 4), ElementsAre(1, 2, 3, 0));
  memory.view(0x8000, 8)[2] = 0xaa;
  EXPECT_EQ(dma(read_bit, 3, 0x8000), 0u) << "goes on behind, and reads zeros past the end";
  EXPECT_THAT(guest(0x8000, 3), ElementsAre(4, 0, 0));
}

TEST_F(FwCfgTest, DmaSkips) {
  fw_cfg.add_file("opt/one", {1, 2, 3, 4});
  dma(uint32_t{key_of("opt/one")} << 16 | select_bit | skip, 2, 0);
  EXPECT_THAT(read_data(2), ElementsAre(3, 4));
  EXPECT_EQ(dma(skip, 0xffffffff, 0), 0u);
  EXPECT_THAT(read_data(1), ElementsAre(0));
}

TEST_F(FwCfgTest, DmaWritesWritableItemsOnly) {
  fw_cfg.add_file("opt/fixed", {1, 2, 3, 4});
  fw_cfg.add_file("opt/open", {1, 2, 3, 4}, true);
  memory.write(0x8000, Data{7, 8, 9, 10, 11});
  EXPECT_EQ(dma(uint32_t{key_of("opt/fixed")} << 16 | select_bit | write_bit, 2, 0x8000), error);
  EXPECT_THAT(fw_cfg.file("opt/fixed"), ElementsAre(1, 2, 3, 4));
  const uint32_t open = uint32_t{key_of("opt/open")} << 16 | select_bit;
  EXPECT_EQ(dma(open | write_bit, 2, 0x8000), 0u);
  EXPECT_THAT(fw_cfg.file("opt/open"), ElementsAre(7, 8, 3, 4));
  EXPECT_EQ(dma(open | write_bit, 5, 0x8000), error) << "cannot be resized";
  EXPECT_THAT(fw_cfg.file("opt/open"), ElementsAre(7, 8, 3, 4)) << "nothing of a write that does not fit";
  EXPECT_EQ(dma(uint32_t{0} << 16 | select_bit | write_bit, 1, 0x8000), error) << "the signature";
}

TEST_F(FwCfgTest, DataPortIgnoresWrites) {
  fw_cfg.add_file("opt/open", {1}, true);
  select(key_of("opt/open"));
  fw_cfg.write(1, 1, 99);
  EXPECT_THAT(fw_cfg.file("opt/open"), ElementsAre(1));
}

TEST_F(FwCfgTest, DmaOutsideRamFails) {
  EXPECT_EQ(dma(select_bit | read_bit, 4, 2 * MiB - 3), error);
  EXPECT_EQ(dma(select_bit | read_bit, 4, 0xffffffffffffffff), error);
  EXPECT_EQ(dma(select_bit | read_bit, 0xffffffff, 0x8000), error);
  fw_cfg.add_file("opt/open", Data(16), true);
  EXPECT_EQ(dma(uint32_t{key_of("opt/open")} << 16 | select_bit | write_bit, 16, 2 * MiB - 8), error);
}

TEST_F(FwCfgTest, DmaControlOutsideRamIsIgnored) {
  fw_cfg.write(4, 4, __builtin_bswap32(0xffffffff));
  fw_cfg.write(8, 4, __builtin_bswap32(0xfffffff8));
  fw_cfg.write(8, 4, __builtin_bswap32(2 * MiB - 8));
  select(0);
  EXPECT_THAT(read_data(1), ElementsAre('Q'));
}

TEST_F(FwCfgTest, SurvivesRandomAccesses) {
  fw_cfg.add_file("opt/open", Data(64), true);
  std::mt19937_64 random(510);
  for (int round = 0; round < 20000; ++round) {
    const unsigned size = 1u << (random() % 3);
    const uint64_t offset = random() % (FwCfg::window_size - size + 1);
    if (random() % 2 == 0) {
      fw_cfg.read(offset, size);
    } else {
      fw_cfg.write(offset, size, random() & (random() % 3 == 0 ? 0x3f1f0000 : ~0ull));
    }
  }
  EXPECT_EQ(fw_cfg.file("opt/open").size(), 64u);
}

TEST_F(FwCfgTest, SavesAndRestores) {
  fw_cfg.add_file("opt/open", {1, 2, 3, 4}, true);
  memory.write(0x8000, Data{7, 8});
  const uint16_t key = key_of("opt/open");
  dma(uint32_t{key} << 16 | select_bit | write_bit, 2, 0x8000);
  nlohmann::json saved, again;
  fw_cfg.save(saved);
  FwCfg other(memory);
  other.add_file("opt/open", {1, 2, 3, 4}, true);
  other.load(saved);
  EXPECT_EQ(other.read(1, 1), 3u) << "the position";
  fw_cfg.read(1, 1);
  EXPECT_THAT(other.file("opt/open"), ElementsAre(7, 8, 3, 4));
  fw_cfg.save(saved);
  other.save(again);
  EXPECT_EQ(saved, again);
  FwCfg bare(memory);
  EXPECT_THROW(bare.load(saved), UsageError) << "a machine with other items";
}

TEST_F(FwCfgTest, DescribesTheMachine) {
  describe_machine(fw_cfg, memory, 3);
  select(5);
  EXPECT_THAT(read_data(2), ElementsAre(3, 0));
  select(3);
  EXPECT_THAT(read_data(8), ElementsAre(0, 0, 0x20, 0, 0, 0, 0, 0));
  const Data map = fw_cfg.file("etc/e820");
  ASSERT_EQ(map.size() % 20, 0u);
  EXPECT_EQ(*reinterpret_cast<const uint32_t*>(map.data() + 16), 1u) << "RAM first";
}

TEST_F(FwCfgTest, DescribesAKernel) {
  namespace kernels = boot::test_kernels;
  const Data image = kernels::bzimage({});
  const kernels::TemporaryFile kernel(image), initrd(Data{5, 6, 7});
  describe_kernel(fw_cfg, kernel.path, initrd.path, "quiet");
  select(0x17);
  EXPECT_THAT(read_data(4), ElementsAre(0, 4, 0, 0)) << "two sectors of setup";
  select(0x18);
  EXPECT_EQ(read_data(1024), Data(image.begin(), image.begin() + 1024));
  select(0x08);
  EXPECT_EQ(read_data(2)[1], (image.size() - 1024) >> 8);
  select(0x11);
  EXPECT_EQ(read_data(16), Data(image.begin() + 1024, image.begin() + 1040));
  select(0x15);
  EXPECT_THAT(read_data(6), ElementsAre('q', 'u', 'i', 'e', 't', 0));
  select(0x12);
  EXPECT_THAT(read_data(3), ElementsAre(5, 6, 7));
}

}  // namespace
}  // namespace lodge::machine
