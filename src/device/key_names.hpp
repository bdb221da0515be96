// Keys of a keyboard by the names that QMP gives them (QKeyCode), and as Linux numbers them.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

namespace lodge::device {

struct KeyName {
  std::string_view name;
  uint16_t code;  // linux/input-event-codes.h
};

// Sorted by name. A key may have two names.
std::span<const KeyName> key_names() noexcept;
std::optional<uint16_t> key_code(std::string_view name) noexcept;

}  // namespace lodge::device
