// qemu-img and qemu-io, for tests: the other implementation of the format. Tests that need them are skipped
// where they are not installed.
#pragma once

#include <gtest/gtest.h>

#include <filesystem>

#include "support/process.hpp"

namespace lodge::block::qcow2 {

inline bool have_qemu() {
  return std::filesystem::exists("/usr/bin/qemu-img") && std::filesystem::exists("/usr/bin/qemu-io");
}

// Its output; the test fails when its status is not `status`.
inline std::string qemu_img(std::vector<std::string> arguments, int status = 0) {
  arguments.insert(arguments.begin(), "/usr/bin/qemu-img");
  const auto result = testing_support::run(arguments, testing_support::Seconds(60));
  EXPECT_EQ(result.status, status) << result.out << result.err;
  return result.out + result.err;
}

inline void qemu_io(const std::string& image, const std::vector<std::string>& commands,
                    const std::string& format = "qcow2") {
  std::vector<std::string> arguments{"/usr/bin/qemu-io", "-f", format};
  for (const auto& command : commands) {
    arguments.emplace_back("-c");
    arguments.push_back(command);
  }
  arguments.push_back(image);
  const auto result = testing_support::run(arguments, testing_support::Seconds(60));
  EXPECT_EQ(result.status, 0) << result.out << result.err;
}

}  // namespace lodge::block::qcow2
