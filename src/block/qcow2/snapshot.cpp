// Internal snapshots: other L1 tables over the same clusters.
//
// Reference counts, flags and the table of snapshots change together. Version 3 images carry the dirty bit
// meanwhile, so that a crash in between is repaired at the next opening; in version 2, which has no such bit,
// the order of the commits leaves counts that are too high and flags that forbid writing in place: leaks at
// most.
#include <algorithm>
#include <cerrno>
#include <chrono>

#include "base/error.hpp"
#include "block/qcow2/run.hpp"
#include "block/qcow2/snapshots.hpp"

namespace lodge::block::qcow2 {

void Qcow2Image::load_snapshots() {
  snapshots_ = read_snapshots(*storage_, header());
  if (read_only_ || snapshots_.empty()) return;
  metadata_.add_metadata(header().snapshots_offset, snapshots_bytes(snapshots_).size(), true);
  for (const auto& snapshot : snapshots_)
    metadata_.add_metadata(snapshot.l1_offset, snapshot.l1_entries * uint64_t{8}, true);
}

int Qcow2Image::commit(Lock& lock) {
  lock.unlock();
  const int error = metadata_.commit();
  lock.lock();
  return error;
}

int Qcow2Image::allocate_row(Lock& lock, uint64_t bytes, uint64_t& offset) {
  for (;;) {
    int error = metadata_.allocate_row(header().clusters_for(std::max<uint64_t>(bytes, 1)), offset);
    if (error != EAGAIN) return error;
    if ((error = metadata_.load_refcounts(lock))) return error;
  }
}

// Writes a new table of snapshots and lets the header name it with the next commit.
int Qcow2Image::store_snapshots(Lock& lock, const std::vector<SnapshotInfo>& snapshots) {
  const std::vector<uint8_t> bytes = snapshots_bytes(snapshots);
  uint64_t offset = 0;
  if (!snapshots.empty()) {
    if (const int error = allocate_row(lock, bytes.size(), offset)) return error;
    if (const int error = storage_->write(bytes.data(), bytes.size(), offset)) return error;
    metadata_.add_metadata(offset, bytes.size(), true);
  }
  Header& h = metadata_.change_header();
  if (h.snapshots != 0) {
    const uint64_t old = snapshots_bytes(snapshots_).size();
    for (uint64_t at = 0; at < old; at += metadata_.cluster_size())
      metadata_.release(h.snapshots_offset + at);
  }
  h.snapshots_offset = offset;
  h.snapshots = static_cast<uint32_t>(snapshots.size());
  return 0;
}

// Visits every L2 table under an L1 table, as it is in the file: nothing may be dirty.
int Qcow2Image::each_table(Lock& lock, const std::vector<uint64_t>& l1,
                           const std::function<int(std::vector<uint64_t>&)>& visit) {
  std::vector<uint64_t> words(metadata_.cluster_size() / 8);
  for (const uint64_t entry : l1) {
    const uint64_t offset = entry & entry_offset;
    if (offset == 0) continue;
    if (!metadata_.plausible(offset, false)) return EIO;
    lock.unlock();
    int error = metadata_.load_table(offset, words);
    lock.lock();
    if (error == 0) error = visit(words);
    if (error) return error;
  }
  return 0;
}

namespace {

// Every cluster that an L2 table refers to; `visit` gets offsets, and may fail.
template <class Visit>
int each_cluster(const Header& header, const std::vector<uint64_t>& words, Visit visit) {
  for (size_t i = 0; i < words.size(); i += header.l2_entry_size() / 8) {
    const uint64_t word = words[i];
    if (word & entry_compressed) {
      const auto place = compressed_place(header, word);
      const uint64_t last = (place.offset + place.size - 1) >> header.cluster_bits;
      for (uint64_t c = place.offset >> header.cluster_bits; c <= last; c++)
        if (const int error = visit(c << header.cluster_bits)) return error;
    } else if (word & entry_offset) {
      if (const int error = visit(word & entry_offset)) return error;
    }
  }
  return 0;
}

}  // namespace

int Qcow2Image::add_references(Lock& lock, const std::vector<uint64_t>& l1) {
  const auto check = [&](bool change) {
    return [this, &lock, change](uint64_t offset) {
      const uint64_t cluster = offset >> metadata_.cluster_bits();
      uint64_t count = 0;
      if (const int error = metadata_.count_of(lock, cluster, count)) return error;
      // A count of 0 is what a damaged image has; a snapshot would only hide that.
      if (count == 0) return EIO;
      if (count == metadata_.maximum_refcount()) return EOVERFLOW;
      return change ? metadata_.set_refcount(cluster, count + 1) : 0;
    };
  };
  // Narrow counts may overflow: look before anything is changed.
  for (const bool change : {false, true}) {
    const auto visit = check(change);
    for (const uint64_t entry : l1)
      if (entry & entry_offset)
        if (const int error = visit(entry & entry_offset)) return error;
    const int error = each_table(
        lock, l1, [&](std::vector<uint64_t>& words) { return each_cluster(header(), words, visit); });
    if (error) return error;
  }
  return 0;
}

int Qcow2Image::list_references(Lock& lock, const std::vector<uint64_t>& l1, std::vector<uint64_t>& list) {
  const auto add = [&list](uint64_t offset) {
    list.push_back(offset);
    return 0;
  };
  for (const uint64_t entry : l1)
    if (entry & entry_offset) add(entry & entry_offset);
  return each_table(lock, l1,
                    [&](std::vector<uint64_t>& words) { return each_cluster(header(), words, add); });
}

// Makes the "copied" flags of the active tables say what the counts say.
int Qcow2Image::correct_copied_flags(Lock& lock) {
  const auto is_one = [&](uint64_t offset, bool& one) {
    uint64_t count = 0;
    const int error = metadata_.count_of(lock, offset >> metadata_.cluster_bits(), count);
    one = count == 1;
    return error;
  };
  for (uint64_t index = 0; index < metadata_.l1().size(); index++) {
    const uint64_t offset = metadata_.l1()[index] & entry_offset;
    if (offset == 0) continue;
    bool one = false;
    if (const int error = is_one(offset, one)) return error;
    metadata_.set_l1_copied(index, one);
    if (const int error = metadata_.load_l2(lock, index)) return error;
    L2Table* table = metadata_.cached_l2(index);
    table->pins++;
    for (uint64_t i = 0; i < l2_entries_; i++) {
      Entry entry = metadata_.entry(*table, i);
      if (entry.compressed() || entry.offset() == 0) continue;
      if (const int error = is_one(entry.offset(), one)) {
        table->pins--;
        return error;
      }
      if (one == entry.copied()) continue;
      entry.word ^= entry_copied;
      metadata_.set_entry(*table, i, entry);
    }
    table->pins--;
    if (metadata_.wants_commit())
      if (const int error = commit(lock)) return error;
  }
  return 0;
}

int Qcow2Image::create_now(Lock& lock, const std::string& name) {
  SnapshotInfo info;
  unsigned long last = 0;
  for (const auto& snapshot : snapshots_)
    last = std::max(last, std::strtoul(snapshot.id.c_str(), nullptr, 10));
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  info.id = std::to_string(last + 1);
  info.name = name;
  info.seconds = static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::seconds>(now).count());
  info.nanoseconds = static_cast<uint32_t>(now.count() % 1'000'000'000);
  info.size = size_;
  const std::vector<uint64_t> l1 = metadata_.l1();
  info.l1_entries = static_cast<uint32_t>(l1.size());

  // Counts go up first in memory; in a version 2 file the flags must be gone before the counts are there.
  int error = 0;
  if (header().version < 3) {
    if ((error = clear_copied_flags(lock)) || (error = commit(lock))) return error;
  }
  if ((error = add_references(lock, l1))) return error;
  if (header().version >= 3 && (error = clear_copied_flags(lock))) return error;
  if ((error = allocate_row(lock, l1.size() * 8, info.l1_offset))) return error;
  std::vector<uint64_t> copy = l1;
  for (auto& entry : copy) entry = __builtin_bswap64(entry & ~entry_copied);
  if ((error = storage_->write(copy.data(), copy.size() * 8, info.l1_offset))) return error;
  metadata_.add_metadata(info.l1_offset, copy.size() * 8, true);
  auto snapshots = snapshots_;
  snapshots.push_back(std::move(info));
  if ((error = store_snapshots(lock, snapshots)) || (error = commit(lock))) return error;
  snapshots_ = std::move(snapshots);
  return 0;
}

int Qcow2Image::clear_copied_flags(Lock& lock) {
  for (uint64_t index = 0; index < metadata_.l1().size(); index++) {
    if ((metadata_.l1()[index] & entry_offset) == 0) continue;
    if (const int error = metadata_.load_l2(lock, index)) return error;
    L2Table* table = metadata_.cached_l2(index);
    for (uint64_t i = 0; i < l2_entries_; i++) {
      Entry entry = metadata_.entry(*table, i);
      if (!entry.copied()) continue;
      entry.word &= ~entry_copied;
      metadata_.set_entry(*table, i, entry);
    }
    metadata_.set_l1_copied(index, false);
    if (metadata_.wants_commit())
      if (const int error = commit(lock)) return error;
  }
  return 0;
}

int Qcow2Image::apply_now(Lock& lock, const SnapshotInfo& snapshot) {
  std::vector<uint64_t> l1(snapshot.l1_entries);
  const std::vector<uint64_t> old = metadata_.l1();
  int error = metadata_.load_table(snapshot.l1_offset, l1);
  if (error) return error;
  if (header().l1_entries_for(snapshot.size) > l1.size()) return EIO;
  if (snapshot.size != size_ && header().extension(extension_bitmaps)) return ENOTSUP;
  std::vector<uint64_t> given_up;
  if ((error = list_references(lock, old, given_up))) return error;
  if ((error = add_references(lock, l1))) return error;
  for (auto& entry : l1) entry &= ~entry_copied;
  while ((error = metadata_.replace_l1(l1)) == EAGAIN)
    if ((error = metadata_.load_refcounts(lock))) return error;
  if (error) return error;
  // From here on nothing fails before the commit.
  metadata_.drop_l2_cache();
  for (const uint64_t offset : given_up) metadata_.release(offset);
  metadata_.change_header().size = snapshot.size;
  forget_unpacked();
  if ((error = commit(lock))) return error;
  size_ = snapshot.size;
  return correct_copied_flags(lock);
}

int Qcow2Image::delete_now(Lock& lock, size_t index) {
  const SnapshotInfo snapshot = snapshots_[index];
  std::vector<uint64_t> l1(snapshot.l1_entries);
  int error = metadata_.load_table(snapshot.l1_offset, l1);
  if (error) return error;
  auto snapshots = snapshots_;
  snapshots.erase(snapshots.begin() + static_cast<ptrdiff_t>(index));
  std::vector<uint64_t> given_up;
  if ((error = list_references(lock, l1, given_up))) return error;
  if ((error = store_snapshots(lock, snapshots))) return error;
  for (const uint64_t offset : given_up) metadata_.release(offset);
  const uint64_t bytes = l1.size() * 8;
  for (uint64_t at = 0; at < bytes; at += metadata_.cluster_size())
    metadata_.release(snapshot.l1_offset + at);
  if ((error = commit(lock))) return error;
  snapshots_ = std::move(snapshots);
  forget_unpacked();
  return correct_copied_flags(lock);
}

// All three: nothing dirty before, the dirty bit around.
int Qcow2Image::change_snapshots(const std::function<int(Lock&)>& change) noexcept {
  if (read_only_) return EROFS;
  if (header().external_data()) return ENOTSUP;
  return exclusively([&](Lock& lock) {
    int error = commit(lock);
    if (error) return error;
    lock.unlock();
    error = metadata_.defer_counts();
    lock.lock();
    if (error) return error;
    error = change(lock);
    lock.unlock();
    const int settled = metadata_.settle();
    lock.lock();
    return error ? error : settled;
  });
}

int Qcow2Image::create_snapshot(const std::string& name) noexcept {
  if (name.empty() || name.size() > 255 || snapshots_.size() >= maximum_snapshots) return EINVAL;
  return change_snapshots([&](Lock& lock) {
    return std::ranges::find(snapshots_, name, &SnapshotInfo::name) != snapshots_.end()
               ? EEXIST
               : create_now(lock, name);
  });
}

int Qcow2Image::apply_snapshot(const std::string& name) noexcept {
  return change_snapshots([&](Lock& lock) {
    const auto found = std::ranges::find(snapshots_, name, &SnapshotInfo::name);
    return found == snapshots_.end() ? ENOENT : apply_now(lock, *found);
  });
}

int Qcow2Image::delete_snapshot(const std::string& name) noexcept {
  return change_snapshots([&](Lock& lock) {
    const auto found = std::ranges::find(snapshots_, name, &SnapshotInfo::name);
    return found == snapshots_.end() ? ENOENT
                                     : delete_now(lock, static_cast<size_t>(found - snapshots_.begin()));
  });
}

}  // namespace lodge::block::qcow2
