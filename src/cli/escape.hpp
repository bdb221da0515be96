// The escape key of the terminal: Ctrl-A and a letter.
#pragma once

#include <cstdint>
#include <functional>
#include <span>

namespace lodge::cli {

class EscapeKey {
 public:
  enum class Action { end, help, power_button, reset };
  explicit EscapeKey(std::function<void(Action)> act) : act_(std::move(act)) {}

  // Removes escapes from the input in place, acts on them, and returns how many bytes are left for the guest.
  // An escape may come in two pieces.
  size_t filter(std::span<uint8_t> input);

 private:
  static constexpr uint8_t prefix = 0x01;
  std::function<void(Action)> act_;
  bool escaped_ = false;
};

}  // namespace lodge::cli
