#include "block/qcow2/metadata.hpp"

#include <algorithm>
#include <cerrno>

#include "base/error.hpp"

namespace lodge::block::qcow2 {
Metadata::Metadata(Storage& storage, Storage* data, Header header, bool writable, const CacheLimits& limits)
    : storage_(storage),
      data_(data),
      header_(std::move(header)),
      on_disk_(header_),
      writable_(writable),
      file_size_(storage.size()),
      maximum_tables_(std::max(limits.minimum_tables, limits.l2_bytes >> header_.cluster_bits)),
      maximum_blocks_(limits.refcount_blocks),
      high_water_(header_.clusters_for(file_size_)) {
  l1_.resize(header_.l1_entries);
  int error = load_table(header_.l1_offset, l1_);
  if (error == 0 && writable) {
    refcount_table_.resize(uint64_t{header_.refcount_table_clusters} << header_.cluster_bits >> 3);
    error = load_table(header_.refcount_table_offset, refcount_table_);
  }
  if (error) throw_errno(error, storage.path());
  counts_deferred_ = header_.has(feature_dirty);
  if (writable) collect_overlaps();
}

int Metadata::load_table(uint64_t offset, std::vector<uint64_t>& entries) noexcept {
  if (entries.empty()) return 0;
  if (const int error = storage_.read(entries.data(), entries.size() * 8, offset)) return error;
  for (auto& entry : entries) entry = __builtin_bswap64(entry);
  return 0;
}

void Metadata::add_metadata(uint64_t offset, uint64_t bytes, bool add) {
  const uint64_t first = offset >> cluster_bits(), count = header_.clusters_for(bytes);
  for (uint64_t i = first; i < first + count; i++) {
    if (add)
      metadata_.insert(i);
    else
      metadata_.erase(i);
  }
}

// Learns where tables are, so that data never goes there. Two tables at one place mean that any write would
// do damage.
void Metadata::collect_overlaps() {
  std::unordered_set<uint64_t>& set = metadata_;
  const auto add = [&](uint64_t offset, uint64_t bytes, const char* what) {
    const uint64_t before = set.size(), count = header_.clusters_for(bytes);
    add_metadata(offset, bytes, true);
    if (set.size() != before + count)
      usage_error(
          "{}: its {} overlaps another table: the image is damaged; open it read-only, or try "
          "'lodge image check --repair all' on a copy",
          storage_.path(), what);
  };
  add(0, cluster_size(), "header");
  add(header_.l1_offset, l1_.size() * 8, "L1 table");
  add(header_.refcount_table_offset, refcount_table_.size() * 8, "refcount table");
  for (const uint64_t entry : l1_)
    if (entry & entry_offset) add(entry & entry_offset, 1, "L2 table");
  for (const uint64_t entry : refcount_table_)
    if (entry & ~uint64_t{511}) add(entry & ~uint64_t{511}, 1, "refcount block");
}

L2Table* Metadata::cached_l2(uint64_t index) {
  const auto found = l2_.find(index);
  if (found == l2_.end()) return nullptr;
  found->second.last_use = ++use_;
  return &found->second;
}

int Metadata::load_l2(std::unique_lock<std::mutex>& lock, uint64_t index) {
  for (;;) {
    const uint64_t offset = l1_[index] & entry_offset;
    if (offset == 0 || l2_.contains(index)) return 0;
    if (!plausible(offset, false)) return EIO;
    if (!loading_l2_.insert(index).second) {
      loaded_.wait(lock);
      continue;
    }
    std::vector<uint64_t> words(cluster_size() / 8);
    lock.unlock();
    const int error = load_table(offset, words);
    lock.lock();
    loading_l2_.erase(index);
    loaded_.notify_all();
    if (error) return error;
    // Meanwhile a snapshot may have been applied.
    if ((l1_[index] & entry_offset) != offset || l2_.contains(index)) continue;
    evict();
    l2_.emplace(index, L2Table{offset, std::move(words), {}, true, 0, ++use_});
    return 0;
  }
}

void Metadata::evict() {
  while (l2_.size() >= maximum_tables_) {
    auto oldest = l2_.end();
    for (auto it = l2_.begin(); it != l2_.end(); ++it) {
      const L2Table& table = it->second;
      if (table.pins || !table.dirty.empty() || !table.reachable) continue;
      if (oldest == l2_.end() || table.last_use < oldest->second.last_use) oldest = it;
    }
    if (oldest == l2_.end()) return;  // all have changes: wants_commit() says so
    l2_.erase(oldest);
  }
}

int Metadata::writable_l2(uint64_t index, L2Table*& table) {
  const uint64_t old = l1_[index];
  table = cached_l2(index);
  if ((old & entry_offset) && !table) return EAGAIN;
  if (table && (old & entry_copied)) return 0;
  Allocation place;
  if (const int error = allocate(place)) return error;
  if (!table) {
    evict();
    table = &l2_[index];
    table->words.resize(cluster_size() / 8);
    table->last_use = ++use_;
  } else {  // shared with a snapshot: ours from now on is a copy
    release(old & entry_offset);
  }
  if (table->dirty.empty()) dirty_l2_++;
  table->dirty.add(0, cluster_size());
  table->offset = place.offset;
  table->reachable = false;
  l1_[index] = place.offset | entry_copied;
  l1_dirty_.add(index * 8, index * 8 + 8);
  add_metadata(place.offset, 1, true);
  return 0;
}

Entry Metadata::entry(const L2Table& table, uint64_t index) const {
  if (!header_.extended_l2()) return {table.words[index], 0};
  return {table.words[index * 2], table.words[index * 2 + 1]};
}

void Metadata::set_entry(L2Table& table, uint64_t index, Entry entry) {
  const size_t width = header_.l2_entry_size();
  if (header_.extended_l2()) {
    table.words[index * 2] = entry.word;
    table.words[index * 2 + 1] = entry.bits;
  } else {
    table.words[index] = entry.word;
  }
  if (table.dirty.empty()) dirty_l2_++;
  table.dirty.add(index * width, (index + 1) * width);
}

bool Metadata::plausible(uint64_t offset, bool write) const {
  if (offset == 0 || offset % cluster_size() != 0) return false;
  // The last cluster may be written in part, or not yet: it then ends beyond the file.
  if (offset >> cluster_bits() >= high_water_) return false;
  return !write || !is_metadata(offset);
}

void Metadata::set_l1_copied(uint64_t index, bool copied) {
  const uint64_t entry = copied ? l1_[index] | entry_copied : l1_[index] & ~entry_copied;
  if (entry == l1_[index]) return;
  l1_[index] = entry;
  l1_dirty_.add(index * 8, index * 8 + 8);
}

int Metadata::replace_l1(std::vector<uint64_t> entries) {
  uint64_t offset = 0;
  const uint64_t bytes = std::max<uint64_t>(entries.size() * 8, 1);
  if (const int error = allocate_row(header_.clusters_for(bytes), offset)) return error;
  const uint64_t old = header_.l1_offset, old_bytes = l1_.size() * 8;
  for (uint64_t at = 0; at < old_bytes; at += cluster_size()) release(old + at);
  add_metadata(old, old_bytes, false);
  add_metadata(offset, bytes, true);
  l1_ = std::move(entries);
  l1_moved_ = true;
  change_header().l1_offset = offset;
  header_.l1_entries = static_cast<uint32_t>(l1_.size());
  return 0;
}

void Metadata::drop_l2_cache() {
  l2_.clear();
  dirty_l2_ = 0;
}

}  // namespace lodge::block::qcow2
