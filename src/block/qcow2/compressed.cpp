// Writing compressed clusters: what `lodge image convert --compress` makes of a disk.
#include <cerrno>

#include "block/qcow2/run.hpp"

namespace lodge::block::qcow2 {

// What has been unpacked, and the place behind the last compressed data, may be given away now.
void Qcow2Image::forget_unpacked() {
  unpacked_.fill({});
  compressed_at_ = 0;
}

// Room for `size` bytes (less than a cluster): behind the last compressed data, if need be into the next
// cluster of the file. Every host cluster counts each compressed cluster that touches it.
int Qcow2Image::place_compressed(uint64_t size, uint64_t& offset) {
  const uint64_t cluster = metadata_.cluster_size(), used = compressed_at_ & (cluster - 1);
  if (used != 0) {
    uint64_t count = 0;
    const uint64_t current = compressed_at_ >> metadata_.cluster_bits();
    if (const int error = metadata_.refcount(current, count)) return error;
    const bool fits = used + size <= cluster;
    if (count < metadata_.maximum_refcount()) {
      Allocation next;
      if (!fits)
        if (const int error = metadata_.allocate(next)) return error;
      if (fits || next.offset == compressed_at_ - used + cluster) {
        if (const int error = metadata_.set_refcount(current, count + 1)) return error;
        offset = compressed_at_;
        return 0;
      }
      offset = next.offset;
      return 0;
    }
  }
  Allocation place;
  const int error = metadata_.allocate(place);
  offset = place.offset;
  return error;
}

int Qcow2Image::write_compressed(std::span<const uint8_t> packed, uint64_t offset) noexcept {
  const uint64_t cluster = metadata_.cluster_size();
  if (read_only_) return EROFS;
  if (header().external_data()) return ENOTSUP;
  if (packed.empty() || packed.size() >= cluster || offset % cluster != 0 || offset >= size_) return EINVAL;
  if (const int error = mark_bitmaps_in_use()) return error;
  Lock lock(metadata_.mutex());
  L2Table* table = nullptr;
  uint64_t place = 0;
  for (;;) {
    int error = load(lock, l1_index(offset));
    if (error == 0) error = metadata_.writable_l2(l1_index(offset), table);
    if (error == 0 && metadata_.entry(*table, l2_index(offset)).word != 0) return EEXIST;
    if (error == 0) error = place_compressed(packed.size(), place);
    if (error == 0) break;
    if (error != EAGAIN) return error;
  }
  compressed_at_ = place + packed.size();
  table->pins++;
  lock.unlock();
  const int error = storage_->write(packed.data(), packed.size(), place);
  lock.lock();
  table->pins--;
  if (error) return error;  // the place is lost until the next check
  const unsigned shift = 62 - (header().cluster_bits - 8);
  const uint64_t more_sectors = (place + packed.size() - 1) / 512 - place / 512;
  metadata_.set_entry(*table, l2_index(offset), {entry_compressed | more_sectors << shift | place, 0});
  if (!metadata_.wants_commit()) return 0;
  lock.unlock();
  return metadata_.commit();
}

int Qcow2Image::set_backing(const std::optional<std::string>& file, const std::string& format) {
  if (read_only_) return EROFS;
  if (const int error = metadata_.commit()) return error;
  Header changed = header();
  changed.backing_file = file;
  changed.backing_format = file ? format : "";
  return metadata_.rewrite_header(changed);
}

}  // namespace lodge::block::qcow2
