// The metadata of one open qcow2 image: header, mapping (L1, L2), reference counts, and how all of it reaches
// the file.
//
// Everything changes in memory only; commit() writes it in an order in which a crash between any two writes
// leaves an image that is whole but for leaked clusters:
//   1. what nothing on disk refers to yet: new tables, and the reference counts of everything allocated
//      -- barrier: this, and the data that requests have written before --
//   2. references to new refcount blocks: refcount table entries, or the header when the table has moved
//      -- barrier, when there was anything --
//   3. references to everything else: L2 and L1 entries, header
//      -- barrier --
//   4. reference counts of what was given up go down, and only now may such clusters be used again.
// With lazy refcounts the header's dirty bit is set first and the counts are written when the image is
// closed; after a crash they are counted anew before the image is written again.
//
// A cluster that is given up is also kept until every transfer that might still use its old place has ended
// ("epochs").
#pragma once

#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <unordered_set>

#include "block/qcow2/format.hpp"
#include "block/storage.hpp"

namespace lodge::block::qcow2 {

// A range of bytes of a table that differs from the file.
struct DirtyRange {
  size_t begin = SIZE_MAX, end = 0;
  bool empty() const { return begin >= end; }
  void add(size_t from, size_t to) {
    begin = std::min(begin, from);
    end = std::max(end, to);
  }
};

// One L2 entry; `bits` only with extended L2: bit n allocated, bit 32 + n reads as zeros.
struct Entry {
  uint64_t word = 0, bits = 0;
  bool compressed() const { return (word & entry_compressed) != 0; }
  bool copied() const { return (word & entry_copied) != 0; }
  uint64_t offset() const { return word & entry_offset; }
};

struct L2Table {
  uint64_t offset = 0;  // in the file
  std::vector<uint64_t> words;
  DirtyRange dirty;       // in bytes
  bool reachable = true;  // from the L1 table on disk
  unsigned pins = 0;      // requests that will change entries when they end, commits that write it
  uint64_t last_use = 0;
};

struct RefcountBlock {
  uint64_t offset = 0;
  std::vector<uint8_t> bytes;
  DirtyRange dirty;
  unsigned pins = 0;  // commits that write it: until then the file is older than this
};

// How many tables stay in memory; those with changes do in any case.
struct CacheLimits {
  size_t l2_bytes = 32 << 20;   // maps 256 GiB with the default clusters
  size_t minimum_tables = 16;   // however large a table is
  size_t refcount_blocks = 64;  // counts 128 GiB of file
};

struct Allocation {
  uint64_t offset = 0;
  bool fresh = false;  // the place was beyond the end of the file: it reads as zeros
};

// Methods need mutex() held, unless they say otherwise. Results are 0 or an errno; EAGAIN: a table must be
// loaded first, which load_l2() and load_refcounts() do on a thread that may wait.
class Metadata {
 public:
  // Reads header and top-level tables. `data`: null, or the external data file. Throws UsageError.
  Metadata(Storage& storage, Storage* data, Header header, bool writable, const CacheLimits& limits);

  std::mutex& mutex() { return mutex_; }
  const Header& header() const { return header_; }
  unsigned cluster_bits() const { return header_.cluster_bits; }
  uint64_t cluster_size() const { return header_.cluster_size(); }

  // --- mapping -------------------------------------------------------------------------------------------
  const std::vector<uint64_t>& l1() const { return l1_; }
  // The table of this L1 entry if it is in memory. An entry of 0 has none.
  L2Table* cached_l2(uint64_t index);
  // Reads it. Unlocks meanwhile.
  int load_l2(std::unique_lock<std::mutex>& lock, uint64_t index);
  // The table, ready for changes: allocated or copied if need be.
  int writable_l2(uint64_t index, L2Table*& table);
  Entry entry(const L2Table& table, uint64_t index) const;
  void set_entry(L2Table& table, uint64_t index, Entry entry);
  // Whether a standard entry's offset is one that may be read (and, for `write`, written: not a table).
  bool plausible(uint64_t offset, bool write) const;
  bool is_metadata(uint64_t offset) const { return metadata_.contains(offset >> cluster_bits()); }

  // --- reference counts (refcounts.cpp) --------------------------------------------------------------------
  // Refcount 1 for one cluster, or for `count` in a row at the end of the file.
  int allocate(Allocation& allocation);
  int allocate_row(uint64_t count, uint64_t& offset);
  // Takes an allocation back that nothing ever referred to.
  void cancel(uint64_t offset);
  // One reference less to the cluster at `offset`, as of the next commit. The caller has removed it.
  void release(uint64_t offset);
  void release_entry(const Entry& entry);  // whatever it refers to
  // Loads the block that an allocation or a count has asked for with EAGAIN. Unlocks meanwhile.
  int load_refcounts(std::unique_lock<std::mutex>& lock);
  int refcount(uint64_t cluster, uint64_t& count);
  // The same, loading what is needed. Unlocks meanwhile.
  int count_of(std::unique_lock<std::mutex>& lock, uint64_t cluster, uint64_t& count);
  int set_refcount(uint64_t cluster, uint64_t count);
  uint64_t maximum_refcount() const {
    return header_.refcount_order == 6 ? UINT64_MAX : (uint64_t{1} << header_.refcount_bits()) - 1;
  }

  // --- transfers in flight
  // -----------------------------------------------------------------------------------
  uint64_t enter_epoch() {
    epochs_[epoch_]++;
    return epoch_;
  }
  void leave_epoch(uint64_t epoch) {
    if (--epochs_[epoch] == 0) epochs_.erase(epoch);
  }

  // --- to the file (commit.cpp)
  // ------------------------------------------------------------------------------
  bool dirty() const;
  // Many changes wait in memory: somebody should commit.
  bool wants_commit() const { return dirty_l2_ > maximum_tables_ / 2; }
  // Writes everything in order and makes it and all data durable. Without mutex().
  int commit() noexcept;
  // From now on counts are not written but marked as untrue in the file (version 3); for changes of many
  // counts at once. Ends with settle(). Both without mutex().
  int defer_counts() noexcept;
  int settle() noexcept;
  // Commits, and marks the image as whole. Without mutex(); no request is in flight.
  int close() noexcept;
  // Changes header fields and L1 with the next commit.
  Header& change_header() {
    header_dirty_ = true;
    return header_;
  }
  void set_l1_copied(uint64_t index, bool copied);
  int replace_l1(std::vector<uint64_t> entries);  // at a new place; the old one is released
  void drop_l2_cache();                           // nothing may be dirty
  // Rewrites the whole first cluster: names and extensions. Without mutex(); nothing in flight.
  int rewrite_header(const Header& header);
  void add_metadata(uint64_t offset, uint64_t bytes, bool add);
  // A table of 64-bit entries. Needs no lock.
  int load_table(uint64_t offset, std::vector<uint64_t>& entries) noexcept;

 private:
  struct Write {
    uint64_t offset;
    std::vector<uint8_t> bytes;
  };
  // One commit: what to write in its three stages, and what to mark as changed again should that fail.
  struct Stages {
    std::vector<Write> first, second, third;
    std::vector<std::pair<uint64_t, DirtyRange>> l2, blocks;  // by index
    std::vector<uint64_t> now_reachable, released;
    DirtyRange l1, refcount_table;
    bool l1_moved = false, refcount_table_moved = false, header = false;
    uint64_t epoch = 0;
    Header on_disk;  // what the header says once all is written
  };

  void evict();
  void collect_overlaps();
  // refcounts.cpp
  int block_of(uint64_t cluster, bool create, RefcountBlock*& block);
  int grow_table(uint64_t blocks);
  uint64_t get(const RefcountBlock& block, uint64_t index) const;
  void set(RefcountBlock& block, uint64_t index, uint64_t count);
  void reap(std::unique_lock<std::mutex>& lock);
  // commit.cpp
  Stages gather();
  void gather_counts(Stages& stages);
  void restore(Stages& stages);
  void unpin(const Stages& stages);
  int write_all(const std::vector<Write>& writes) noexcept;
  int barrier() noexcept;
  int run(const Stages& stages) noexcept;
  int commit_once() noexcept;
  int set_dirty_bit(bool dirty) noexcept;
  int write_deferred_counts() noexcept;

  Storage& storage_;
  Storage* const data_;
  std::mutex commit_mutex_;  // before mutex_
  std::mutex mutex_;
  Header header_, on_disk_;  // on_disk_: the fields as they are in the file
  bool header_dirty_ = false;
  const bool writable_;
  uint64_t file_size_;  // when it was opened

  std::vector<uint64_t> l1_;
  DirtyRange l1_dirty_;
  bool l1_moved_ = false;
  std::unordered_map<uint64_t, L2Table> l2_;  // by L1 index
  size_t dirty_l2_ = 0;
  const size_t maximum_tables_, maximum_blocks_;
  uint64_t use_ = 0;
  // Tables being read without the lock. Nobody else reads them meanwhile: he could change, write and drop his
  // copy before an older one arrives here.
  std::unordered_set<uint64_t> loading_l2_, loading_blocks_;
  std::condition_variable loaded_;

  std::vector<uint64_t> refcount_table_;
  DirtyRange refcount_table_dirty_;
  bool refcount_table_moved_ = false;
  std::unordered_map<uint64_t, RefcountBlock> blocks_;  // by refcount table index
  std::optional<uint64_t> wanted_block_;                // that EAGAIN was for
  uint64_t hint_ = 0;                                   // no free cluster below
  uint64_t high_water_;                                 // clusters from here on have never been used
  std::unordered_set<uint64_t> metadata_;               // clusters that hold tables

  std::vector<uint64_t> released_;                                   // offsets, since the last commit
  std::vector<std::pair<uint64_t, std::vector<uint64_t>>> waiting_;  // committed; by their epoch
  uint64_t epoch_ = 1;
  std::map<uint64_t, uint64_t> epochs_;  // transfers in flight by epoch
  bool counts_deferred_ = false;         // the dirty bit is set on disk: lazy refcounts
  int broken_ = 0;                       // a barrier has failed: nothing may be promised any more
};

}  // namespace lodge::block::qcow2
