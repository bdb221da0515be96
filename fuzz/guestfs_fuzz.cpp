// A hostile disk whose kernel is looked for: a good file system, with or without a partition table, with
// places overwritten, or anything at all. It is refused or read; nothing crashes, hangs or asks for much
// memory.
#include <algorithm>

#include "base/error.hpp"
#include "guestfs/boot_files.hpp"
#include "guestfs/partitions.hpp"
#include "guestfs/testing.hpp"

namespace {

using namespace lodge::guestfs;

constexpr uint64_t MiB = 1 << 20;

std::vector<uint8_t> partitioned() {
  const auto layout = make_gpt(3 * MiB, {1}, {2});
  std::vector<uint8_t> bytes(3 * MiB);
  std::ranges::copy(layout.start, bytes.begin());
  std::ranges::copy(testing::Ext4Maker().bytes(), bytes.begin() + MiB);
  return bytes;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  static const std::vector<uint8_t> plain = testing::Ext4Maker().bytes(), table = partitioned();
  std::vector<uint8_t> bytes;
  if (data[0] % 8 == 7) {
    bytes.assign(data + 1, data + size);
  } else {
    bytes = data[0] % 8 == 6 ? table : plain;
    const size_t begin = data[0] % 8 == 6 && data[0] & 8 ? MiB : 0;
    for (size_t at = 1; at + 4 <= size; at += 4) {
      const size_t offset = data[at] | size_t{data[at + 1]} << 8 | size_t{data[at + 2]} << 16;
      bytes[begin + offset % (bytes.size() - begin)] = data[at + 3];
    }
  }
  const auto image = testing::image_of(std::move(bytes));
  try {
    find_boot_files(*image, "fuzz", 4 * MiB);
  } catch (const lodge::UsageError&) {
  }
  return 0;
}
