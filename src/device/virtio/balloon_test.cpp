#include "device/virtio/balloon.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <random>

#include "base/error.hpp"
#include "device/virtio/testing.hpp"

namespace lodge::device::virtio {
namespace {

using testing::FakeDriver;
using testing::Rings;

constexpr uint64_t F_STATS_VQ = feature(1), F_PAGE_REPORTING = feature(5);

class BalloonTest : public ::testing::TestWithParam<Rings> {
 protected:
  bool is_zero(uint64_t gpa) { return memory.view(gpa, 1)[0] == 0; }
  void fill(uint64_t gpa, uint64_t size) { memory.write(gpa, std::vector<uint8_t>(size, 7)); }

  machine::GuestMemory memory{8 * machine::layout::MiB};
  Balloon balloon{memory};
  FakeDriver driver{balloon, memory};
};

INSTANTIATE_TEST_SUITE_P(Rings, BalloonTest, ::testing::ValuesIn(testing::all_rings()),
                         [](const auto& test) { return test.param.name; });

TEST_P(BalloonTest, InflatedPagesGoBackToTheHost) {
  ASSERT_TRUE(driver.start(GetParam().features));
  fill(0x40'0000, 8 * 4096);
  // Upwards, downwards, alone, and outside RAM.
  const uint32_t pages[] = {0x400, 0x401, 0x405, 0x404, 0x407, 0xffff'ffff, 0x800};
  driver.submit(0, {{driver.put_struct(pages), sizeof pages, false}}, GetParam().indirect);
  EXPECT_TRUE(driver.used(0));
  for (const uint64_t page : {0x400, 0x401, 0x404, 0x405, 0x407}) EXPECT_TRUE(is_zero(page * 4096)) << page;
  for (const uint64_t page : {0x402, 0x403, 0x406}) EXPECT_FALSE(is_zero(page * 4096)) << page;
  EXPECT_EQ(balloon.released(), 5u * 4096);
  driver.submit(1, {{driver.put_struct(pages), sizeof pages, false}}, GetParam().indirect);
  EXPECT_TRUE(driver.used(1));
  EXPECT_FALSE(driver.needs_reset());
}

TEST_P(BalloonTest, ReportedPagesGoBackWhateverQueueTheyComeBy) {
  for (const uint64_t features : {F_PAGE_REPORTING, F_PAGE_REPORTING | F_STATS_VQ}) {
    ASSERT_TRUE(driver.start(GetParam().features | features));
    fill(0x40'0000, 4 * 4096);
    const unsigned reportingq = features & F_STATS_VQ ? 3 : 2;
    driver.submit(reportingq, {{0x40'0000, 8192, true}, {0x40'3000, 4096, true}}, GetParam().indirect);
    EXPECT_TRUE(driver.used(reportingq));
    EXPECT_TRUE(is_zero(0x40'0000));
    EXPECT_TRUE(is_zero(0x40'1000));
    EXPECT_FALSE(is_zero(0x40'2000));
    EXPECT_TRUE(is_zero(0x40'3000));
  }
}

TEST_P(BalloonTest, TheTargetIsAnnouncedAndTheDriverSaysHowFarItIs) {
  ASSERT_TRUE(driver.start(GetParam().features));
  balloon.set_target(2 << 20);
  EXPECT_EQ(driver.transport.config_interrupts, 1u);
  std::array<uint8_t, 4> target{};
  balloon.read_config(0, target);
  EXPECT_THAT(target, ::testing::ElementsAre(0, 2, 0, 0));
  balloon.write_config(4, std::array<uint8_t, 4>{0, 1, 0, 0});
  EXPECT_EQ(balloon.actual(), 1u << 20);
  balloon.set_target(~uint64_t{0});
  EXPECT_EQ(balloon.target(), 8u << 20);
}

TEST_P(BalloonTest, StatisticsComeWhenAskedFor) {
  ASSERT_TRUE(driver.start(GetParam().features | F_STATS_VQ));
  EXPECT_FALSE(balloon.request_statistics());
  struct [[gnu::packed]] {
    uint16_t tag;
    uint64_t value;
  } entries[] = {{4, 1234}, {5, 5678}, {77, 1}};
  const uint64_t at = driver.put_struct(entries);
  driver.submit(2, {{at, sizeof entries, false}}, GetParam().indirect);
  EXPECT_EQ(balloon.statistics()[4], 1234u);
  EXPECT_EQ(balloon.statistics()[5], 5678u);
  EXPECT_EQ(balloon.statistics()[0], UINT64_MAX);
  EXPECT_FALSE(driver.used(2));
  nlohmann::json first, second;
  balloon.save(first);
  Balloon other(memory);
  other.load(first);
  other.save(second);
  EXPECT_EQ(first, second);
  EXPECT_TRUE(balloon.request_statistics());
  EXPECT_TRUE(driver.used(2));
  EXPECT_FALSE(balloon.request_statistics());
  first["model"]["target_pages"] = 1 << 20;
  EXPECT_THROW(other.load(first), UsageError);
}

TEST(HostileDriver, NothingItDoesHurtsTheBalloon) {
  for (unsigned seed = 0; seed < 100; seed++) {
    machine::GuestMemory memory(2 * machine::layout::MiB);
    Balloon balloon(memory);
    FakeDriver driver(balloon, memory);
    std::mt19937 random(seed);
    testing::attack(balloon, memory, 300, [&](uint32_t below) { return random() % below; });
    ASSERT_TRUE(driver.start(F_RING_PACKED)) << seed;
    driver.submit(0, {{driver.put({0, 1, 0, 0}), 4, false}});
    EXPECT_TRUE(driver.used(0)) << seed;
  }
}

}  // namespace
}  // namespace lodge::device::virtio
