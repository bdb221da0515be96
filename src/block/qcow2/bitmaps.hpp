// The directory of dirty bitmaps in the file.
#pragma once

#include <string>
#include <vector>

#include "block/qcow2/format.hpp"

namespace lodge::block::qcow2 {

constexpr uint32_t bitmap_in_use = 1 << 0, bitmap_auto = 1 << 1;

struct BitmapInfo {
  std::string name;
  uint64_t entry_offset = 0;  // of its directory entry in the file
  uint64_t table_offset = 0;
  uint32_t table_entries = 0;
  uint32_t flags = 0;
  unsigned granularity_bits = 0;
};

// As far as the directory makes sense.
std::vector<BitmapInfo> read_bitmaps(Storage& storage, const Header& header);

}  // namespace lodge::block::qcow2
