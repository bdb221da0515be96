// How the user asked for a device, for messages: they speak of what was typed, not of what it stands for.
#pragma once

#include <string>
#include <vector>

namespace lodge::device {

struct Spelling {
  std::string option;                // "--disk a.img"; empty: "--device NAME"
  std::vector<std::string> in_it{};  // the device's options whose values `option` gives itself, such as file
  bool operator==(const Spelling&) const = default;
};

}  // namespace lodge::device
