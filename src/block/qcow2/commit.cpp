// How metadata reaches the file: see the head of metadata.hpp for the order and its reason.
#include <algorithm>
#include <cerrno>

#include "block/qcow2/metadata.hpp"

namespace lodge::block::qcow2 {
namespace {

constexpr uint64_t sector = 512;

// Whole sectors: the unit in which a disk keeps old or new contents.
DirtyRange whole_sectors(const DirtyRange& range, size_t limit) {
  return {range.begin / sector * sector, std::min((range.end + sector - 1) / sector * sector, limit)};
}

std::vector<uint8_t> big_endian(const std::vector<uint64_t>& words, const DirtyRange& range) {
  std::vector<uint8_t> bytes(range.end - range.begin);
  for (size_t i = 0; i < bytes.size(); i += 8) store_be(bytes.data() + i, words[(range.begin + i) / 8]);
  return bytes;
}

// The header's changing fields, from byte 20 on: they lie in one sector. Names and extensions are elsewhere.
constexpr uint64_t fields_offset = 20;
std::vector<uint8_t> header_fields(const Header& h) {
  std::vector<uint8_t> bytes(h.version == 2 ? 52 : 76);
  uint8_t* at = bytes.data() - fields_offset;
  store_be(at + 20, h.cluster_bits);
  store_be(at + 24, h.size);
  store_be(at + 32, uint32_t{0});
  store_be(at + 36, h.l1_entries);
  store_be(at + 40, h.l1_offset);
  store_be(at + 48, h.refcount_table_offset);
  store_be(at + 56, h.refcount_table_clusters);
  store_be(at + 60, h.snapshots);
  store_be(at + 64, h.snapshots_offset);
  if (h.version == 2) return bytes;
  store_be(at + 72, h.incompatible);
  store_be(at + 80, h.compatible);
  store_be(at + 88, h.autoclear);
  return bytes;
}

}  // namespace

bool Metadata::dirty() const {
  return header_dirty_ || dirty_l2_ != 0 || !l1_dirty_.empty() || l1_moved_ || !released_.empty() ||
         refcount_table_moved_ || !refcount_table_dirty_.empty() ||
         std::ranges::any_of(blocks_, [](const auto& item) { return !item.second.dirty.empty(); });
}

int Metadata::write_all(const std::vector<Write>& writes) noexcept {
  for (const auto& write : writes)
    if (const int error = storage_.write(write.bytes.data(), write.bytes.size(), write.offset)) return error;
  return 0;
}

// After a failed barrier nobody knows what is on disk: the kernel forgets the pages that it could not write.
int Metadata::barrier() noexcept {
  const int error = storage_.sync();
  if (error == 0) return 0;
  const std::lock_guard lock(mutex_);
  broken_ = EIO;
  return error;
}

void Metadata::gather_counts(Stages& stages) {
  for (auto& [index, block] : blocks_) {
    if (block.dirty.empty()) continue;
    const DirtyRange range = whole_sectors(block.dirty, block.bytes.size());
    stages.first.push_back({block.offset + range.begin,
                            {block.bytes.begin() + static_cast<ptrdiff_t>(range.begin),
                             block.bytes.begin() + static_cast<ptrdiff_t>(range.end)}});
    stages.blocks.emplace_back(index, std::exchange(block.dirty, {}));
    block.pins++;
  }
  Header switched = on_disk_;
  stages.refcount_table = std::exchange(refcount_table_dirty_, {});
  stages.refcount_table_moved = std::exchange(refcount_table_moved_, false);
  if (stages.refcount_table_moved) {
    stages.first.push_back(
        {header_.refcount_table_offset, big_endian(refcount_table_, {0, refcount_table_.size() * 8})});
    switched.refcount_table_offset = header_.refcount_table_offset;
    switched.refcount_table_clusters = header_.refcount_table_clusters;
    stages.second.push_back({fields_offset, header_fields(switched)});
  } else if (!stages.refcount_table.empty()) {
    const DirtyRange range = whole_sectors(stages.refcount_table, refcount_table_.size() * 8);
    stages.second.push_back(
        {header_.refcount_table_offset + range.begin, big_endian(refcount_table_, range)});
  }
}

Metadata::Stages Metadata::gather() {
  Stages stages;
  if (!counts_deferred_) gather_counts(stages);
  for (auto& [index, table] : l2_) {
    if (table.dirty.empty()) continue;
    const DirtyRange range = whole_sectors(table.dirty, cluster_size());
    auto& stage = table.reachable ? stages.third : stages.first;
    stage.push_back({table.offset + range.begin, big_endian(table.words, range)});
    stages.l2.emplace_back(index, std::exchange(table.dirty, {}));
    table.pins++;
    if (!table.reachable) stages.now_reachable.push_back(index);
    table.reachable = true;
  }
  dirty_l2_ = 0;
  stages.l1 = std::exchange(l1_dirty_, {});
  stages.l1_moved = std::exchange(l1_moved_, false);
  if (stages.l1_moved)
    stages.first.push_back({header_.l1_offset, big_endian(l1_, {0, l1_.size() * 8})});
  else if (!stages.l1.empty()) {
    const DirtyRange range = whole_sectors(stages.l1, l1_.size() * 8);
    stages.third.push_back({header_.l1_offset + range.begin, big_endian(l1_, range)});
  }
  stages.header = std::exchange(header_dirty_, false);
  stages.on_disk = header_;
  if (counts_deferred_) {  // the old refcount table stays until the counts are written
    stages.on_disk.refcount_table_offset = on_disk_.refcount_table_offset;
    stages.on_disk.refcount_table_clusters = on_disk_.refcount_table_clusters;
  }
  if (stages.header) stages.third.push_back({fields_offset, header_fields(stages.on_disk)});
  stages.released = std::exchange(released_, {});
  // Transfers that began before now may still use what is released; later ones cannot.
  stages.epoch = epoch_++;
  return stages;
}

// Until they are written, tables must stay in memory: read again from the file they would be old.
void Metadata::unpin(const Stages& stages) {
  for (const auto& [index, range] : stages.l2)
    if (const auto found = l2_.find(index); found != l2_.end() && found->second.pins > 0)
      found->second.pins--;
  for (const auto& [index, range] : stages.blocks)
    if (const auto found = blocks_.find(index); found != blocks_.end() && found->second.pins > 0)
      found->second.pins--;
}

void Metadata::restore(Stages& stages) {
  const auto again = [](DirtyRange& range, const DirtyRange& old) {
    if (!old.empty()) range.add(old.begin, old.end);
  };
  // One that is missing was dropped with all others: a snapshot has been applied.
  for (const auto& [index, range] : stages.l2) {
    const auto found = l2_.find(index);
    if (found == l2_.end()) continue;
    if (found->second.dirty.empty()) dirty_l2_++;
    again(found->second.dirty, range);
  }
  for (const uint64_t index : stages.now_reachable)
    if (const auto found = l2_.find(index); found != l2_.end()) found->second.reachable = false;
  for (const auto& [index, range] : stages.blocks)
    if (const auto found = blocks_.find(index); found != blocks_.end()) again(found->second.dirty, range);
  again(l1_dirty_, stages.l1);
  again(refcount_table_dirty_, stages.refcount_table);
  l1_moved_ |= stages.l1_moved;
  refcount_table_moved_ |= stages.refcount_table_moved;
  header_dirty_ |= stages.header;
  released_.insert(released_.end(), stages.released.begin(), stages.released.end());
}

int Metadata::run(const Stages& stages) noexcept {
  int error = write_all(stages.first);
  if (error == 0 && data_) error = data_->sync();
  if (error == 0) error = barrier();
  if (error == 0 && !stages.second.empty()) {
    error = write_all(stages.second);
    if (error == 0) error = barrier();
  }
  if (error == 0 && !stages.third.empty()) {
    error = write_all(stages.third);
    if (error == 0) error = barrier();
  }
  return error;
}

int Metadata::set_dirty_bit(bool dirty) noexcept {
  Header header;
  {
    const std::lock_guard lock(mutex_);
    header_.incompatible =
        dirty ? header_.incompatible | feature_dirty : header_.incompatible & ~feature_dirty;
    on_disk_.incompatible = header_.incompatible;
    header = on_disk_;
  }
  const std::vector<uint8_t> bytes = header_fields(header);
  const int error = storage_.write(bytes.data(), bytes.size(), fields_offset);
  return error ? error : barrier();
}

int Metadata::commit_once() noexcept {
  std::unique_lock lock(mutex_);
  if (broken_) return broken_;
  const bool defer = (header_.compatible & compatible_lazy_refcounts) && header_.version >= 3;
  if (defer && !counts_deferred_ && dirty()) {
    lock.unlock();
    if (const int error = set_dirty_bit(true)) return error;
    lock.lock();
    counts_deferred_ = true;
  }
  Stages stages = gather();
  lock.unlock();
  const int error = run(stages);
  lock.lock();
  unpin(stages);
  if (error) {
    restore(stages);
    return error;
  }
  on_disk_ = stages.on_disk;
  if (!stages.released.empty()) waiting_.emplace_back(stages.epoch, std::move(stages.released));
  if (waiting_.empty()) return 0;
  // Without a barrier: a count that is too high for a while is a leak and no damage.
  reap(lock);
  if (counts_deferred_) return 0;
  Stages counts;
  counts.on_disk = on_disk_;
  gather_counts(counts);
  if (!counts.second.empty()) {  // somebody has allocated meanwhile: that takes the whole order
    unpin(counts);
    restore(counts);
    return 0;
  }
  lock.unlock();
  const int late = write_all(counts.first);
  lock.lock();
  unpin(counts);
  if (late) restore(counts);
  return 0;
}

int Metadata::commit() noexcept {
  const std::lock_guard lock(commit_mutex_);
  return commit_once();
}

int Metadata::defer_counts() noexcept {
  const std::lock_guard commit_lock(commit_mutex_);
  if (header_.version < 3 || counts_deferred_) return 0;
  if (const int error = set_dirty_bit(true)) return error;
  const std::lock_guard lock(mutex_);
  counts_deferred_ = true;
  return 0;
}

// The counts are written in the usual order, and only then trusted.
int Metadata::write_deferred_counts() noexcept {
  Stages stages;
  {
    const std::lock_guard lock(mutex_);
    if (!counts_deferred_) return 0;
    counts_deferred_ = false;
    stages = gather();
  }
  const int error = run(stages);
  {
    const std::lock_guard lock(mutex_);
    unpin(stages);
    if (error) {
      restore(stages);
      counts_deferred_ = true;
      return error;
    }
    on_disk_ = stages.on_disk;
    if (!stages.released.empty()) waiting_.emplace_back(stages.epoch, std::move(stages.released));
  }
  return set_dirty_bit(false);
}

int Metadata::settle() noexcept {
  const std::lock_guard lock(commit_mutex_);
  // What a commit releases lowers counts only afterwards: those go with the second step.
  const int error = commit_once();
  return error ? error : write_deferred_counts();
}

int Metadata::close() noexcept {
  if (!writable_) return 0;
  const std::lock_guard lock(commit_mutex_);
  if (const int error = commit_once()) return error;
  bool deferred = false, left = false;
  {
    const std::lock_guard metadata_lock(mutex_);
    deferred = counts_deferred_;
    left = dirty();
  }
  if (deferred) return write_deferred_counts();
  return left ? commit_once() : 0;
}

int Metadata::rewrite_header(const Header& header) {
  const std::vector<uint8_t> bytes = header_bytes(header);
  if (const int error = storage_.write(bytes.data(), bytes.size(), 0)) return error;
  header_ = on_disk_ = header;
  return barrier();
}

}  // namespace lodge::block::qcow2
