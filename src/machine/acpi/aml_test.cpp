#include "machine/acpi/aml.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lodge::machine::acpi::aml {
namespace {

using testing::ElementsAre;

TEST(AmlTest, IntegersTakeTheShortestForm) {
  EXPECT_THAT(integer(0), ElementsAre(0x00));
  EXPECT_THAT(integer(1), ElementsAre(0x01));
  EXPECT_THAT(integer(2), ElementsAre(0x0a, 2));
  EXPECT_THAT(integer(0x100), ElementsAre(0x0b, 0, 1));
  EXPECT_THAT(integer(0x10000), ElementsAre(0x0c, 0, 0, 1, 0));
  EXPECT_THAT(integer(0x1'0000'0000), ElementsAre(0x0e, 0, 0, 0, 0, 1, 0, 0, 0));
}

TEST(AmlTest, PathsPadSegmentsAndPrefixSeveral) {
  EXPECT_THAT(path("\\"), ElementsAre('\\', 0));
  EXPECT_THAT(path("\\_S5"), ElementsAre('\\', '_', 'S', '5', '_'));
  EXPECT_THAT(path("A.BCDE"), ElementsAre(0x2e, 'A', '_', '_', '_', 'B', 'C', 'D', 'E'));
  EXPECT_EQ(path("A.B.C")[0], 0x2f);
  EXPECT_EQ(path("A.B.C")[1], 3);
}

TEST(AmlTest, EisaIdsArePackedBigEndian) {
  // PNP0A03 is 0x030ad041 in every published table.
  EXPECT_THAT(eisa_id("PNP0A03"), ElementsAre(0x0c, 0x41, 0xd0, 0x0a, 0x03));
}

TEST(AmlTest, UuidsMixTheByteOrder) {
  const Code code = uuid("33db4d5b-1ff7-401c-9657-7441c03dd766");
  const Code bytes(code.end() - 16, code.end());
  EXPECT_THAT(bytes, ElementsAre(0x5b, 0x4d, 0xdb, 0x33, 0xf7, 0x1f, 0x1c, 0x40, 0x96, 0x57, 0x74, 0x41, 0xc0,
                                 0x3d, 0xd7, 0x66));
}

// The length that a package claims, and the number of bytes it takes to say so.
std::pair<size_t, size_t> package_length(const Code& code) {
  const unsigned more = code[1] >> 6;
  if (more == 0) return {code[1], 1};
  size_t length = code[1] & 0xf;
  for (unsigned index = 0; index < more; ++index)
    length |= static_cast<size_t>(code[2 + index]) << (4 + 8 * index);
  return {length, 1 + more};
}

TEST(AmlTest, LengthsCountThemselvesAtEverySize) {
  for (const size_t size :
       {0u, 1u, 62u, 63u, 64u, 4000u, 4092u, 4093u, 4094u, 4095u, 5000u, 70000u, 1048573u}) {
    const Code code = else_({Code(size, 0xa3)});
    const auto [length, prefix] = package_length(code);
    EXPECT_EQ(length, code.size() - 1) << size;
    EXPECT_EQ(code.size(), 1 + prefix + size);
  }
}

TEST(AmlTest, ResourceTemplatesEndWithATag) {
  const Code code = resources({irq(4)});
  EXPECT_THAT(code, ElementsAre(0x11, 8, 0x0a, 5, 0x22, 0x10, 0x00, 0x79, 0x00));
}

}  // namespace
}  // namespace lodge::machine::acpi::aml
