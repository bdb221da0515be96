#include "cli/escape.hpp"

namespace lodge::cli {

size_t EscapeKey::filter(std::span<uint8_t> input) {
  size_t kept = 0;
  for (const uint8_t byte : input) {
    if (!escaped_) {
      if (byte == prefix)
        escaped_ = true;
      else
        input[kept++] = byte;
      continue;
    }
    escaped_ = false;
    switch (byte) {
      case prefix:  // Ctrl-A twice is Ctrl-A once, as in screen
      case 'a':
      case 'A': input[kept++] = prefix; break;
      case 'x':
      case 'X': act_(Action::end); break;
      case 'b':
      case 'B': act_(Action::power_button); break;
      case 'r':
      case 'R': act_(Action::reset); break;
      default: act_(Action::help); break;  // h, or a key that means nothing: say which do
    }
  }
  return kept;
}

}  // namespace lodge::cli
