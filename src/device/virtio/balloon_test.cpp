#include "device/virtio/balloon.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <random>
#include <thread>

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

constexpr uint64_t F_FREE_PAGE_HINT = feature(3);

class HintingTest : public BalloonTest {
 protected:
  static constexpr unsigned hintq = 2;  // without the statistics' queue before it
  void SetUp() override { ASSERT_TRUE(driver.start(GetParam().features | F_FREE_PAGE_HINT)); }
  uint32_t shown() {
    std::array<uint8_t, 4> bytes{};
    balloon.read_config(8, bytes);
    return bytes[0] | bytes[1] << 8 | bytes[2] << 16 | static_cast<uint32_t>(bytes[3]) << 24;
  }
  void send(uint32_t command) {
    driver.submit(hintq, {{driver.put_struct(command), sizeof command, false}}, GetParam().indirect);
    EXPECT_TRUE(driver.used(hintq));
  }
  void hint(uint64_t gpa, uint32_t size) {
    driver.submit(hintq, {{gpa, size, true}}, GetParam().indirect);
    EXPECT_TRUE(driver.used(hintq));
  }
};

INSTANTIATE_TEST_SUITE_P(Rings, HintingTest, ::testing::ValuesIn(testing::all_rings()),
                         [](const auto& test) { return test.param.name; });

TEST_P(HintingTest, ARoundNamesFreePagesAndChangesNone) {
  fill(0x40'0000, 0x10'0000);
  EXPECT_EQ(shown(), 0u);
  ASSERT_TRUE(balloon.begin_hinting());
  EXPECT_FALSE(balloon.begin_hinting());
  EXPECT_EQ(driver.transport.config_interrupts, 1u);
  EXPECT_EQ(balloon.hinting(), Balloon::Hinting::asked);
  send(shown());
  EXPECT_EQ(balloon.hinting(), Balloon::Hinting::running);
  hint(0x40'0000, 0x10'0000);
  hint(0x40'0000, 0x2000);  // again
  hint(0x60'0800, 0x1000);  // no whole page
  send(0);
  EXPECT_EQ(balloon.hinting(), Balloon::Hinting::complete);
  EXPECT_EQ(balloon.hinted_bytes(), 0x10'0000u);
  EXPECT_TRUE(balloon.is_hinted(0x4f'ffff));
  for (const uint64_t gpa : {0x3f'ffffull, 0x50'0000ull, 0x60'0800ull, ~0ull})
    EXPECT_FALSE(balloon.is_hinted(gpa));
  EXPECT_FALSE(is_zero(0x40'0000));
  EXPECT_EQ(balloon.released(), 0u);
  balloon.finish_hinting();
  EXPECT_EQ(shown(), 1u);
  EXPECT_FALSE(balloon.is_hinted(0x40'0000));
  EXPECT_EQ(driver.transport.config_interrupts, 2u);
}

TEST_P(HintingTest, HintsOfAnOldRoundAreIgnored) {
  hint(0x40'0000, 0x1000);  // nobody has asked
  ASSERT_TRUE(balloon.begin_hinting());
  const uint32_t old = shown();
  balloon.finish_hinting();
  ASSERT_TRUE(balloon.begin_hinting());
  EXPECT_NE(shown(), old);
  EXPECT_GE(shown(), 2u);
  send(old);
  hint(0x40'0000, 0x1000);
  send(0);
  EXPECT_EQ(balloon.hinting(), Balloon::Hinting::asked);
  EXPECT_EQ(balloon.hinted_bytes(), 0u);
  send(shown());
  hint(0x50'0000, 0x1000);
  EXPECT_EQ(balloon.hinted_bytes(), 0x1000u);
  driver.device.reset();
  EXPECT_EQ(balloon.hinting(), Balloon::Hinting::none);
  EXPECT_FALSE(balloon.begin_hinting());  // no driver
}

TEST_P(HintingTest, ASavedRoundIsOverAndWaitsForItsEnd) {
  ASSERT_TRUE(balloon.begin_hinting());
  send(shown());
  hint(0x50'0000, 0x1000);
  nlohmann::json first, second;
  balloon.save(first);
  Balloon other(memory);
  FakeDriver(other, memory);
  other.load(first);
  EXPECT_EQ(other.hinting(), Balloon::Hinting::complete);
  EXPECT_EQ(other.hinted_bytes(), 0u);
  EXPECT_FALSE(other.is_hinted(0x50'0000));
  other.save(second);
  EXPECT_EQ(first, second);
}

constexpr uint64_t MiB = machine::layout::MiB, second = 1'000'000'000;

TEST(SqueezePolicy, TakesWhatTheHostHoldsAndTheGuestDoesNotUse) {
  Squeeze squeeze;
  // Used are 300 MiB, so 1,100 MiB are held for nothing.
  EXPECT_EQ(squeeze.begin({2048 * MiB, 1400 * MiB, 1748 * MiB, 0}, 0), 1100 * MiB);
  // What is in the balloon is neither used nor held.
  EXPECT_EQ(Squeeze().begin({2048 * MiB, 1400 * MiB, 1648 * MiB, 100 * MiB}, 0), 1100 * MiB);
  // The guest keeps a tenth.
  EXPECT_EQ(Squeeze().begin({1000 * MiB, 1000 * MiB, 400 * MiB, 0}, 0), 300 * MiB);
  EXPECT_EQ(Squeeze().begin({1000 * MiB, 1000 * MiB, 90 * MiB, 0}, 0), 0u);
  // Little is not worth the guest's time; nonsense of the guest's is nothing.
  EXPECT_EQ(Squeeze().begin({2048 * MiB, 360 * MiB, 1748 * MiB, 0}, 0), 0u);
  EXPECT_LE(Squeeze().begin({2048 * MiB, 2048 * MiB, UINT64_MAX - 1, 7}, 0), 2048 * MiB);
}

TEST(SqueezePolicy, WhatDoesNotPayIsDoneLessOften) {
  Squeeze squeeze;
  uint64_t now = 0, pause = second;
  for (int i = 0; i < 12; i++) {
    ASSERT_TRUE(squeeze.due(now)) << i;
    ASSERT_NE(squeeze.begin({2048 * MiB, 1400 * MiB, 1748 * MiB, 0}, now), 0u);
    squeeze.end(1400 * MiB, now);
    pause = std::min(2 * pause, 600 * second);
    EXPECT_FALSE(squeeze.due(now + pause - 1));
    now += pause;
  }
  squeeze.begin({2048 * MiB, 1400 * MiB, 1748 * MiB, 0}, now);
  squeeze.end(400 * MiB, now);
  EXPECT_TRUE(squeeze.due(now + second));
}

// A driver that reports free pages, is asked for statistics, inflates and deflates again.
class SqueezeTest : public ::testing::Test {
 protected:
  static constexpr unsigned statisticsq = 2, reportingq = 3;
  struct [[gnu::packed]] Entry {
    uint16_t tag = 4;
    uint64_t value;
  };
  void SetUp() override {
    balloon.collect_free_memory(clock);
    ASSERT_TRUE(driver.start(F_STATS_VQ | F_PAGE_REPORTING));
    memory.write(0x100'0000, std::vector<uint8_t>(100 * MiB, 7));
    tell(200 * MiB);
  }
  void tell(uint64_t free) {
    const Entry entry{.value = free};
    driver.submit(statisticsq, {{driver.put_struct(entry), sizeof entry, false}});
  }
  void report() {
    driver.submit(reportingq, {{0x800'0000, 4096, true}});
    EXPECT_TRUE(driver.used(reportingq));
  }
  uint32_t wanted() {
    std::array<uint8_t, 4> bytes{};
    balloon.read_config(0, bytes);
    return bytes[0] | bytes[1] << 8 | bytes[2] << 16 | static_cast<uint32_t>(bytes[3]) << 24;
  }
  void have(uint32_t pages) {
    balloon.write_config(4, {reinterpret_cast<const uint8_t*>(&pages), sizeof pages});
  }

  FakeClock clock;
  machine::GuestMemory memory{256 * MiB,
                              {.transparent_huge_pages = machine::MemoryOptions::Transparent::off}};
  Balloon balloon{memory};
  FakeDriver driver{balloon, memory};
};

TEST_F(SqueezeTest, ReportsLeadToAShortInflation) {
  EXPECT_EQ(wanted(), 0u);
  report();
  ASSERT_TRUE(driver.used(statisticsq));
  EXPECT_EQ(wanted(), 0u);
  tell(240 * MiB);  // 16 MiB used, about 100 held
  const uint32_t pages = wanted();
  EXPECT_GT(pages, 60 * MiB / 4096);
  EXPECT_EQ(balloon.target(), 0u);
  have(pages - 1);
  EXPECT_EQ(wanted(), pages);
  have(pages);
  EXPECT_EQ(wanted(), 0u);
}

TEST_F(SqueezeTest, ADriverThatDoesNotGetThereIsLetGo) {
  report();
  ASSERT_TRUE(driver.used(statisticsq));
  tell(240 * MiB);
  EXPECT_NE(wanted(), 0u);
  nlohmann::json state;
  balloon.save(state);
  clock.advance(3 * second);
  EXPECT_EQ(wanted(), 0u);
  // One that was saved in the middle ends soon after.
  balloon.load(state);
  EXPECT_NE(wanted(), 0u);
  clock.advance(1);
  EXPECT_EQ(wanted(), 0u);
  // It did not pay: not at once again.
  report();
  EXPECT_FALSE(driver.used(statisticsq));
}

TEST_F(SqueezeTest, ATargetOfTheUserStays) {
  balloon.set_target(10 * MiB);
  have(10 * MiB / 4096);
  report();
  ASSERT_TRUE(driver.used(statisticsq));
  tell(200 * MiB);
  EXPECT_GT(wanted(), 10 * MiB / 4096);
  driver.device.reset();
  EXPECT_EQ(wanted(), 10 * MiB / 4096);
}

TEST(Refresh, WaitsForTheDriversAnswer) {
  machine::GuestMemory memory(8 * machine::layout::MiB);
  Balloon balloon(memory);
  FakeDriver driver(balloon, memory);
  ASSERT_TRUE(driver.start(F_STATS_VQ));
  struct [[gnu::packed]] {
    uint16_t tag = 4;
    uint64_t value = 1;
  } entry;
  driver.submit(2, {{driver.put_struct(entry), sizeof entry, false}});
  EXPECT_FALSE(balloon.refresh_statistics(std::chrono::milliseconds(10)));  // the driver does not answer
  EXPECT_TRUE(driver.used(2));
  driver.submit(2, {{driver.put_struct(entry), sizeof entry, false}});
  std::jthread guest([&] {
    while (!driver.used(2)) std::this_thread::yield();
    entry.value = 2;
    driver.submit(2, {{driver.put_struct(entry), sizeof entry, false}});
  });
  EXPECT_TRUE(balloon.refresh_statistics(std::chrono::seconds(60)));
  EXPECT_EQ(balloon.statistics()[4], 2u);
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
