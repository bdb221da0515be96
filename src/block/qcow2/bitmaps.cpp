// Dirty bitmaps that other programs keep in the image. Lodge does not track changes in them; it keeps them,
// and those that should have seen our changes are marked "in use", which says just that. Bitmaps that are
// switched off stay as true as they were.
#include "block/qcow2/bitmaps.hpp"

#include <cerrno>

#include "block/qcow2/image.hpp"

namespace lodge::block::qcow2 {

std::vector<BitmapInfo> read_bitmaps(Storage& storage, const Header& header) {
  std::vector<BitmapInfo> bitmaps;
  const Extension* extension = header.extension(extension_bitmaps);
  if (!extension || extension->data.size() < 24) return bitmaps;
  const uint32_t count = load_be<uint32_t>(extension->data.data());
  const uint64_t size = load_be<uint64_t>(extension->data.data() + 8),
                 offset = load_be<uint64_t>(extension->data.data() + 16), file_size = storage.size();
  if (count > 65535 || size > 64 << 20 || size > file_size || offset > file_size - size) return bitmaps;
  std::vector<uint8_t> directory(size);
  if (storage.read(directory.data(), directory.size(), offset) != 0) return bitmaps;
  for (size_t at = 0; bitmaps.size() < count && at + 24 <= directory.size();) {
    const uint8_t* entry = directory.data() + at;
    BitmapInfo info;
    info.entry_offset = offset + at;
    info.table_offset = load_be<uint64_t>(entry);
    info.table_entries = load_be<uint32_t>(entry + 8);
    info.flags = load_be<uint32_t>(entry + 12);
    info.granularity_bits = entry[17];
    const size_t name = load_be<uint16_t>(entry + 18), extra = load_be<uint32_t>(entry + 20);
    if (extra > directory.size() || at + 24 + extra + name > directory.size()) break;
    info.name.assign(reinterpret_cast<const char*>(entry) + 24 + extra, name);
    bitmaps.push_back(std::move(info));
    at = (at + 24 + extra + name + 7) & ~size_t{7};
  }
  return bitmaps;
}

// Before the first change reaches the file.
int Qcow2Image::mark_bitmaps_in_use() {
  const Lock lock(bitmaps_mutex_);
  if (bitmaps_marked_) return 0;
  bool changed = false;
  if (header().autoclear & autoclear_bitmaps) {
    for (const auto& bitmap : read_bitmaps(*storage_, header())) {
      if (!(bitmap.flags & bitmap_auto) || (bitmap.flags & bitmap_in_use)) continue;
      uint8_t flags[4];
      store_be(flags, bitmap.flags | bitmap_in_use);
      if (const int error = storage_->write(flags, sizeof flags, bitmap.entry_offset + 12)) return error;
      changed = true;
    }
  }
  if (changed)
    if (const int error = storage_->sync()) return error;
  bitmaps_marked_ = true;
  return 0;
}

}  // namespace lodge::block::qcow2
