#pragma once

namespace lodge::cli {
inline constexpr const char* version = LODGE_VERSION;  // of CMakeLists.txt
}
