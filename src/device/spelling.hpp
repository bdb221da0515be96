// How the user asked for a device, for messages: they speak of what was typed, not of what it stands for.
#pragma once

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

namespace lodge::device {

struct Spelling {
  std::string option;                // "--disk a.img"; empty: "--device NAME"
  std::vector<std::string> in_it{};  // the device's options whose values `option` gives itself, such as file
  bool gives(std::string_view name) const { return std::ranges::find(in_it, name) != in_it.end(); }
  bool operator==(const Spelling&) const = default;
};

}  // namespace lodge::device
