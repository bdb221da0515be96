#include "base/token_bucket.hpp"

#include <gtest/gtest.h>

namespace lodge {
namespace {

using namespace std::chrono_literals;

TEST(TokenBucket, LetsABurstPassAndThenTheRate) {
  TokenBucket bucket(1000, 100ms);  // 100 units at once
  TokenBucket::Clock::time_point now{1h};
  unsigned passed = 0;
  const auto drain = [&] {
    for (passed = 0; bucket.free_at() <= now; passed++) bucket.pay(1, now);
    return passed;
  };
  EXPECT_NEAR(drain(), 100, 2);
  EXPECT_NEAR(drain(), 0, 1);
  now += 50ms;
  EXPECT_NEAR(drain(), 50, 2);
  now += 10s;
  EXPECT_NEAR(drain(), 100, 2);  // no more than the bucket holds
  bucket.pay(1000, now);         // a large one is paid for afterwards
  now += 900ms;
  EXPECT_EQ(drain(), 0u);
  now += 210ms;
  EXPECT_GT(drain(), 0u);
}

TEST(TokenBucket, HoldsATenthOfASecondUnlessToldOtherwise) {
  const TokenBucket::Clock::time_point now{1h};
  const auto passes = [&](TokenBucket bucket) {
    unsigned passed = 0;
    for (; bucket.free_at() <= now && passed < 1000; passed++) bucket.pay(1, now);
    return passed;
  };
  EXPECT_NEAR(passes(TokenBucket::of(200, 0)), 20, 2);
  EXPECT_NEAR(passes(TokenBucket::of(200, 50)), 50, 2);
  EXPECT_EQ(passes(TokenBucket::of(0, 0)), 1000u);
  EXPECT_EQ(passes(TokenBucket::of(0, 5)), 1000u);
}

// A unit at a time, of which each takes an age: the clock's range holds nevertheless.
TEST(TokenBucket, StaysWithinTheClocksRange) {
  TokenBucket bucket = TokenBucket::of(1, UINT64_MAX);
  const TokenBucket::Clock::time_point now{1h};
  for (unsigned i = 0; i < 1000; i++) bucket.pay(1e18, now);
  EXPECT_GT(bucket.free_at(), now);
}

}  // namespace
}  // namespace lodge
