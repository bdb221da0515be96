// Reference counts and the allocation of clusters.
#include <algorithm>
#include <cerrno>

#include "block/qcow2/metadata.hpp"

namespace lodge::block::qcow2 {
namespace {

constexpr uint64_t block_offset_mask = ~uint64_t{511};

}  // namespace

uint64_t Metadata::get(const RefcountBlock& block, uint64_t index) const {
  const uint8_t* bytes = block.bytes.data();
  switch (header_.refcount_order) {
    case 3: return bytes[index];
    case 4: return load_be<uint16_t>(bytes + index * 2);
    case 5: return load_be<uint32_t>(bytes + index * 4);
    case 6: return load_be<uint64_t>(bytes + index * 8);
    default: break;
  }
  const unsigned bits = header_.refcount_bits(), per_byte = 8 / bits;
  return static_cast<unsigned>(bytes[index / per_byte]) >> (index % per_byte * bits) & ((1u << bits) - 1);
}

void Metadata::set(RefcountBlock& block, uint64_t index, uint64_t count) {
  uint8_t* bytes = block.bytes.data();
  const unsigned bits = header_.refcount_bits();
  switch (header_.refcount_order) {
    case 3: bytes[index] = static_cast<uint8_t>(count); break;
    case 4: store_be(bytes + index * 2, static_cast<uint16_t>(count)); break;
    case 5: store_be(bytes + index * 4, static_cast<uint32_t>(count)); break;
    case 6: store_be(bytes + index * 8, count); break;
    default: {
      const unsigned per_byte = 8 / bits, shift = static_cast<unsigned>(index % per_byte) * bits;
      uint8_t& byte = bytes[index / per_byte];
      byte = static_cast<uint8_t>((byte & ~(((1u << bits) - 1) << shift)) | count << shift);
    }
  }
  const size_t begin = index * bits / 8;
  block.dirty.add(begin, begin + std::max(1u, bits / 8));
}

// The block that counts `cluster`; null when there is none and `create` is false: the count is 0 then.
int Metadata::block_of(uint64_t cluster, bool create, RefcountBlock*& block) {
  block = nullptr;
  const uint64_t index = cluster / header_.refcount_block_entries();
  if (index >= refcount_table_.size()) {
    if (!create) return 0;
    if (const int error = grow_table(index + 1)) return error;
  }
  const auto found = blocks_.find(index);
  if (found != blocks_.end()) {
    block = &found->second;
    return 0;
  }
  if (refcount_table_[index] & block_offset_mask) {
    wanted_block_ = index;
    return EAGAIN;
  }
  if (!create) return 0;
  // Nothing that it counts is in use, so it can be the first of them.
  const uint64_t first = index * header_.refcount_block_entries();
  if (metadata_.contains(first)) return EIO;  // only in a damaged image
  block = &blocks_[index];
  block->offset = first << cluster_bits();
  block->bytes.resize(cluster_size());
  set(*block, 0, 1);
  block->dirty.add(0, cluster_size());
  metadata_.insert(first);
  high_water_ = std::max(high_water_, first + 1);
  refcount_table_[index] = block->offset;
  refcount_table_dirty_.add(index * 8, index * 8 + 8);
  return 0;
}

// The table moves to a larger place, which lies in what only it can count.
int Metadata::grow_table(uint64_t blocks) {
  const uint64_t per_cluster = cluster_size() / 8, old_size = refcount_table_.size();
  blocks = std::max(blocks, high_water_ / header_.refcount_block_entries() + 1);
  uint64_t size = std::max(blocks + 1, old_size + old_size / 2);
  // The table itself, and the block that counts it, must fit too.
  size += size / (header_.refcount_block_entries() * per_cluster) + 1;
  size = (size + per_cluster - 1) / per_cluster * per_cluster;
  if (size * 8 > maximum_refcount_table_bytes) return EFBIG;
  refcount_table_.resize(size);
  uint64_t offset = 0;
  if (const int error = allocate_row(size / per_cluster, offset)) {
    std::erase_if(blocks_, [&](const auto& item) {
      if (item.first < old_size) return false;
      metadata_.erase(item.second.offset >> cluster_bits());
      return true;
    });
    refcount_table_.resize(old_size);
    refcount_table_dirty_.end = std::min(refcount_table_dirty_.end, old_size * 8);
    return error;
  }
  for (uint64_t at = 0; at < old_size * 8; at += cluster_size()) release(header_.refcount_table_offset + at);
  add_metadata(header_.refcount_table_offset, old_size * 8, false);
  add_metadata(offset, size * 8, true);
  change_header().refcount_table_offset = offset;
  header_.refcount_table_clusters = static_cast<uint32_t>(size / per_cluster);
  refcount_table_moved_ = true;
  return 0;
}

int Metadata::load_refcounts(std::unique_lock<std::mutex>& lock) {
  if (!wanted_block_) return 0;
  const uint64_t index = *std::exchange(wanted_block_, std::nullopt);
  while (!blocks_.contains(index) && !loading_blocks_.insert(index).second) loaded_.wait(lock);
  if (blocks_.contains(index)) return 0;
  const uint64_t offset = refcount_table_[index] & block_offset_mask;
  RefcountBlock block;
  block.offset = offset;
  int error = 0;
  if (offset == 0 || offset % cluster_size() != 0 || offset >= std::max(file_size_, storage_.size()))
    error = EIO;
  if (error == 0) {
    block.bytes.resize(cluster_size());
    lock.unlock();
    error = storage_.read(block.bytes.data(), block.bytes.size(), offset);
    lock.lock();
  }
  loading_blocks_.erase(index);
  loaded_.notify_all();
  if (error) return error;
  if (blocks_.size() >= maximum_blocks_) {
    std::erase_if(blocks_,
                  [](const auto& item) { return item.second.dirty.empty() && item.second.pins == 0; });
  }
  blocks_.emplace(index, std::move(block));
  return 0;
}

int Metadata::refcount(uint64_t cluster, uint64_t& count) {
  RefcountBlock* block = nullptr;
  if (const int error = block_of(cluster, false, block)) return error;
  count = block ? get(*block, cluster % header_.refcount_block_entries()) : 0;
  return 0;
}

int Metadata::count_of(std::unique_lock<std::mutex>& lock, uint64_t cluster, uint64_t& count) {
  for (;;) {
    int error = refcount(cluster, count);
    if (error != EAGAIN) return error;
    if ((error = load_refcounts(lock)) != 0) return error;
  }
}

int Metadata::set_refcount(uint64_t cluster, uint64_t count) {
  if (count > maximum_refcount()) return EOVERFLOW;
  RefcountBlock* block = nullptr;
  if (const int error = block_of(cluster, true, block)) return error;
  set(*block, cluster % header_.refcount_block_entries(), count);
  return 0;
}

int Metadata::allocate(Allocation& allocation) {
  const uint64_t per_block = header_.refcount_block_entries();
  for (uint64_t cluster = hint_;; cluster++) {
    // An entry of a table has room for 56 bits.
    if (cluster >> (56 - cluster_bits()) != 0) return EFBIG;
    RefcountBlock* block = nullptr;
    if (const int error = block_of(cluster, true, block)) return error;
    // Skip what is in use within this block.
    uint64_t index = cluster % per_block;
    while (index < per_block && get(*block, index) != 0) index++;
    cluster = cluster - cluster % per_block + index;
    hint_ = cluster;
    if (index == per_block) {
      cluster--;
      continue;
    }
    if (metadata_.contains(cluster)) continue;  // in use, though its count says otherwise: a damaged image
    set(*block, index, 1);
    hint_ = cluster + 1;
    allocation.offset = cluster << cluster_bits();
    allocation.fresh = cluster >= high_water_;
    high_water_ = std::max(high_water_, cluster + 1);
    return 0;
  }
}

int Metadata::allocate_row(uint64_t count, uint64_t& offset) {
  uint64_t start = std::max(high_water_, hint_);
  for (uint64_t i = 0; i < count;) {
    RefcountBlock* block = nullptr;
    if (const int error = block_of(start + i, true, block)) return error;
    if (get(*block, (start + i) % header_.refcount_block_entries()) == 0) {
      i++;
    } else {
      start += i + 1;
      i = 0;
    }
  }
  for (uint64_t i = 0; i < count; i++)
    if (const int error = set_refcount(start + i, 1)) return error;
  high_water_ = std::max(high_water_, start + count);
  offset = start << cluster_bits();
  return 0;
}

void Metadata::cancel(uint64_t offset) {
  const uint64_t cluster = offset >> cluster_bits();
  // Its block was changed by the allocation, so it is still in memory unless a commit came between; a leak
  // then.
  RefcountBlock* block = nullptr;
  if (block_of(cluster, false, block) != 0 || !block) return;
  set(*block, cluster % header_.refcount_block_entries(), 0);
  hint_ = std::min(hint_, cluster);
}

void Metadata::release(uint64_t offset) {
  released_.push_back(offset);
}

void Metadata::release_entry(const Entry& entry) {
  if (entry.compressed()) {
    const auto place = compressed_place(header_, entry.word);
    const uint64_t first = place.offset >> cluster_bits(),
                   last = (place.offset + place.size - 1) >> cluster_bits();
    for (uint64_t cluster = first; cluster <= last; cluster++) release(cluster << cluster_bits());
  } else if (entry.offset() != 0 && !header_.external_data()) {
    release(entry.offset());
  }
}

// Lowers the counts of what has been committed as given up and is no longer used by any transfer. The space
// goes back to the host before a cluster can be used again.
void Metadata::reap(std::unique_lock<std::mutex>& lock) {
  const uint64_t oldest = epochs_.empty() ? UINT64_MAX : epochs_.begin()->first;
  std::vector<uint64_t> clusters;
  std::erase_if(waiting_, [&](const auto& item) {
    if (item.first >= oldest) return false;
    for (const uint64_t offset : item.second) clusters.push_back(offset >> cluster_bits());
    return true;
  });
  std::ranges::sort(clusters);
  uint64_t begin = 0, end = 0;  // a row of clusters that nobody will use any more
  const auto punch = [&] {
    if (begin == end) return;
    lock.unlock();
    storage_.change(Transfer::Kind::punch, begin << cluster_bits(), (end - begin) << cluster_bits());
    lock.lock();
  };
  // A cluster may be there more than once: compressed clusters share it.
  for (size_t i = 0, same = 1; i < clusters.size(); i += same) {
    for (same = 1; i + same < clusters.size() && clusters[i + same] == clusters[i];) same++;
    uint64_t count = 0;
    if (count_of(lock, clusters[i], count) != 0 || count != same) continue;
    if (clusters[i] != end) {
      punch();
      begin = clusters[i];
    }
    end = clusters[i] + 1;
  }
  punch();
  for (const uint64_t cluster : clusters) {
    uint64_t count = 0;
    if (count_of(lock, cluster, count) != 0 || count == 0) continue;  // a damaged image
    set_refcount(cluster, count - 1);
    if (count > 1) continue;
    hint_ = std::min(hint_, cluster);
    metadata_.erase(cluster);
  }
}

}  // namespace lodge::block::qcow2
