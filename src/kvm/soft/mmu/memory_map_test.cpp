#include "kvm/soft/mmu/memory_map.hpp"

#include <gtest/gtest.h>

#include <memory>
#include <vector>

namespace lodge::kvm::soft {
namespace {

constexpr uint64_t slot_size = 0x2000, stride = 0x3000;  // a page is free between two slots
constexpr uint32_t count = 1000;                         // several pieces of a map

class MemoryMapTest : public testing::Test {
 protected:
  std::shared_ptr<Slot> slot(uint32_t id) {
    kvm_userspace_memory_region region{};
    region.slot = id;
    region.guest_phys_addr = id * stride;
    region.memory_size = slot_size;
    return std::make_shared<Slot>(region, watch_);
  }
  // In an order that goes up and down.
  MemoryMap filled() {
    MemoryMap map;
    for (uint32_t i = 0; i < count; ++i) map.insert(slot(i * 389 % count));
    return map;
  }
  static std::vector<uint32_t> ids(const MemoryMap& map) {
    std::vector<uint32_t> found;
    map.for_each([&](const Slot& one) { found.push_back(one.id); });
    return found;
  }

  CodeWatch watch_;
};

TEST_F(MemoryMapTest, SlotsAreFoundByEachOfTheirAddressesAndByNoOther) {
  const MemoryMap map = filled();
  for (uint32_t id = 0; id < count; ++id) {
    const uint64_t gpa = id * stride;
    ASSERT_NE(map.find(gpa), nullptr);
    EXPECT_EQ(map.find(gpa)->id, id);
    EXPECT_EQ(map.find(gpa + slot_size - 1)->id, id);
    EXPECT_EQ(map.find(gpa + slot_size), nullptr);
  }
  EXPECT_EQ(map.find(count * stride), nullptr);
  EXPECT_EQ(MemoryMap().find(0), nullptr);
}

TEST_F(MemoryMapTest, TheyComeInTheOrderOfTheirAddresses) {
  const auto found = ids(filled());
  ASSERT_EQ(found.size(), count);
  for (uint32_t id = 0; id < count; ++id) EXPECT_EQ(found[id], id);
}

TEST_F(MemoryMapTest, TheFirstSlotInARangeIsFound) {
  const MemoryMap map = filled();
  for (uint32_t id = 0; id + 1 < count; ++id) {
    const uint64_t gap = id * stride + slot_size;
    EXPECT_EQ(map.first_in(gap, stride - slot_size), nullptr);
    ASSERT_NE(map.first_in(gap, stride), nullptr);
    EXPECT_EQ(map.first_in(gap, stride)->id, id + 1);
    EXPECT_EQ(map.first_in(gap - 1, stride)->id, id);
  }
  EXPECT_EQ(map.first_in((count - 1) * stride + slot_size, ~uint64_t{0} / 2), nullptr);
}

TEST_F(MemoryMapTest, WhatIsTakenOutOfACopyStaysInTheOriginal) {
  const MemoryMap map = filled();
  MemoryMap copy = map;
  for (uint32_t id = 0; id < count; id += 2) copy.erase(*copy.find(id * stride));
  EXPECT_EQ(ids(map).size(), count);
  EXPECT_EQ(ids(copy).size(), count / 2);
  EXPECT_EQ(copy.find(0), nullptr);
  EXPECT_EQ(copy.first_in(0, 2 * stride)->id, 1u);
  for (uint32_t id = 1; id < count; id += 2) copy.erase(*copy.find(id * stride));
  EXPECT_TRUE(ids(copy).empty());
  copy.insert(slot(5));
  EXPECT_EQ(copy.find(5 * stride)->id, 5u);
}

}  // namespace
}  // namespace lodge::kvm::soft
