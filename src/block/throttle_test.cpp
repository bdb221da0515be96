#include "block/throttle.hpp"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "base/temporary_directory.hpp"

namespace lodge::block {
namespace {

class Throttle : public testing::Test {
 protected:
  double seconds_for(const RateLimits& limits, unsigned count, size_t size) {
    std::ofstream(path_).flush();
    std::filesystem::resize_file(path_, 1 << 20);
    OpenOptions options;
    options.limits = limits;
    const auto image = open_image(path_, options);
    std::vector<uint8_t> data(size);
    std::vector<unsigned> order;
    std::mutex mutex;
    const auto begin = std::chrono::steady_clock::now();
    for (unsigned i = 0; i < count; i++) {
      const iovec buffer{data.data(), size};
      image->read({&buffer, 1}, 0, [&, i](int error) {
        EXPECT_EQ(error, 0);
        const std::lock_guard lock(mutex);
        order.push_back(i);
      });
    }
    EXPECT_EQ(image->close(), 0);
    EXPECT_EQ(order.size(), count);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }
  TemporaryDirectory directory_;
  std::string path_ = directory_ / "disk";
};

TEST_F(Throttle, HoldsOperationsToTheirRate) {
  // 0.1 s come at once, the other 40 take 0.2 s.
  EXPECT_GE(seconds_for({.operations = 200, .bytes = 0}, 60, 512), 0.19);
}

TEST_F(Throttle, HoldsBytesToTheirRate) {
  EXPECT_GE(seconds_for({.operations = 0, .bytes = 1 << 20}, 5, 65536), 0.14);
}

TEST_F(Throttle, ABurstPassesAtOnce) {
  // What begins within the burst comes at once (51 and 5), the other 9 take 0.45 s, the sixth 1 s.
  EXPECT_GE(seconds_for({.operations = 20, .bytes = 0, .operations_burst = 50}, 60, 512), 0.4);
  EXPECT_LT(seconds_for({.operations = 1, .bytes = 0, .operations_burst = 60}, 60, 512), 30);
  EXPECT_GE(seconds_for({.operations = 0, .bytes = 65536, .bytes_burst = 262144}, 6, 65536), 0.9);
}

TEST_F(Throttle, WithoutLimitsNothingWaits) {
  EXPECT_LT(seconds_for({}, 1000, 512), 2.0);
}

}  // namespace
}  // namespace lodge::block
