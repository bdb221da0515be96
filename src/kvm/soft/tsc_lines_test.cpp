#include "kvm/soft/tsc_lines.hpp"

#include <gtest/gtest.h>

namespace lodge::kvm::soft {
namespace {

constexpr uint32_t khz = 1'000'000;
constexpr uint64_t second = uint64_t{khz} * 1000, half_of_all = uint64_t{1} << 63;

// The offset of a TSC that is written `apart` from another vCPU's, which has offset 0.
uint64_t written(uint64_t apart) {
  TscLines lines(khz);
  lines.set(khz, 0);
  constexpr uint64_t now = 100 * second;
  return lines.place(TscLines::Cause::write, khz, now + apart, now);
}

TEST(TscLines, WhatIsLessThanASecondOffIsTheSame) {
  EXPECT_EQ(written(second - 1), 0u);
  EXPECT_EQ(written(-(second - 1)), 0u);
}

TEST(TscLines, WhatIsASecondOffIsNot) {
  for (const uint64_t apart : {second, -second, half_of_all, half_of_all - 1, half_of_all + 1})
    EXPECT_EQ(written(apart), apart);
}

}  // namespace
}  // namespace lodge::kvm::soft
