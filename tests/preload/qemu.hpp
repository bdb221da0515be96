// QEMU under `lodge kvm`, led by its monitor: for tests that look at a guest's text screen and press its
// keys.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "base/fd.hpp"
#include "base/temporary_directory.hpp"
#include "support/process.hpp"

namespace lodge::testing_support {

// For a loaded machine: an idle one needs a tenth of it.
inline constexpr Seconds qemu_patience(240);

// Every function throws std::runtime_error, with what QEMU printed, when QEMU refuses or is gone.
class Qemu {
 public:
  // `-accel kvm` and what the monitor needs are added. The first serial port is the process's output.
  explicit Qemu(const std::vector<std::string>& arguments);

  nlohmann::json execute(std::string_view command, const nlohmann::json& arguments = nullptr);
  // A line for the human monitor; what it answers, which is nothing when all is well.
  std::string monitor(const std::string& line);

  // The text screen of 80 columns and 25 lines (0xb8000). What is not ASCII is a '?'.
  std::string screen();
  // Until a part of the screen matches (ECMAScript). False when the patience is at its end.
  bool wait_screen(const std::string& pattern);
  bool wait_serial(std::string_view text) { return process_.wait_output(text, qemu_patience); }
  // Keys by QEMU's names, each pressed by itself.
  void press(const std::vector<std::string>& keys);
  void send(std::string_view text) { process_.send(text); }
  void quit();

  // What the serial port printed, and QEMU's own words.
  std::string output() const { return process_.out() + process_.err(); }
  Process& process() noexcept { return process_; }

 private:
  void connect();
  std::string receive_line();
  [[noreturn]] void fail(const std::string& what);

  TemporaryDirectory directory_;
  Process process_;
  Fd socket_;
  std::string received_;
};

}  // namespace lodge::testing_support
