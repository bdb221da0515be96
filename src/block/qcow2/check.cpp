#include "block/qcow2/check.hpp"

#include <algorithm>
#include <map>
#include <set>

#include "base/error.hpp"
#include "block/qcow2/bitmaps.hpp"
#include "block/qcow2/counts.hpp"
#include "block/qcow2/snapshots.hpp"
#include "block/storage.hpp"

namespace lodge::block::qcow2 {
namespace {

constexpr uint64_t offset_mask = ~uint64_t{511};

class Checker {
 public:
  Checker(Storage& storage, Repair repair, const std::function<void(uint64_t, uint64_t)>& progress)
      : storage_(storage),
        repair_(repair),
        progress_(progress),
        header_(read_header(storage)),
        file_clusters_(header_.clusters_for(storage.size())) {}

  CheckResult run() {
    count_fixed();
    count_tables();
    visit_tables();
    count_bitmaps();
    compare();
    if (rebuild_) rebuild();
    check_flags();
    finish();
    return std::move(result_);
  }

 private:
  struct Table {
    uint32_t references = 0;
    bool active = false;
  };

  void find(const std::string& text) {
    if (result_.findings.size() < 100) result_.findings.push_back(text);
  }
  void corrupt(const std::string& text) {
    result_.corruptions++;
    find(text);
  }
  std::vector<uint64_t> words(uint64_t offset, uint64_t count) {
    std::vector<uint64_t> result(count);
    if (count == 0) return result;
    if (const int error = storage_.read(result.data(), count * 8, offset))
      throw_errno(error, storage_.path());
    for (auto& word : result) word = __builtin_bswap64(word);
    return result;
  }
  void write(const void* data, size_t size, uint64_t offset) {
    if (const int error = storage_.write(data, size, offset)) throw_errno(error, storage_.path());
  }
  void write_word(uint64_t word, uint64_t offset) {
    word = __builtin_bswap64(word);
    write(&word, sizeof word, offset);
  }
  void sync() {
    if (const int error = storage_.sync()) throw_errno(error, storage_.path());
  }
  bool inside(uint64_t offset) const {
    return offset != 0 && offset % header_.cluster_size() == 0 && cluster(offset) < file_clusters_;
  }
  uint64_t cluster(uint64_t offset) const { return offset >> header_.cluster_bits; }
  void count_range(uint64_t offset, uint64_t bytes, bool metadata) {
    const uint64_t first = cluster(offset), last = first + header_.clusters_for(bytes);
    for (uint64_t c = first; c < last; c++) {
      counts_.add(c, 1);
      if (metadata && !tables_at_.insert(c).second)
        corrupt(fmt::format("two tables at {:#x}", c << header_.cluster_bits));
    }
  }

  // Header, top-level tables, refcount blocks.
  void count_fixed() {
    count_range(0, header_.cluster_size(), true);
    count_range(header_.l1_offset, header_.l1_entries * uint64_t{8}, true);
    refcount_table_ = words(header_.refcount_table_offset,
                            uint64_t{header_.refcount_table_clusters} << header_.cluster_bits >> 3);
    count_range(header_.refcount_table_offset, refcount_table_.size() * 8, true);
    for (auto& entry : refcount_table_) {
      if (entry == 0) continue;
      const bool good = (entry & ~offset_mask) == 0 && inside(entry);
      if (good && !tables_at_.contains(cluster(entry))) {
        count_range(entry, header_.cluster_size(), true);
        continue;
      }
      corrupt(fmt::format("refcount table entry {:#x} is no place of a refcount block", entry));
      entry = 0;
      rebuild_ = true;
    }
  }

  // All L1 tables, and how often each L2 table is referred to.
  void count_tables() {
    l1_ = words(header_.l1_offset, header_.l1_entries);
    count_l1(l1_, header_.l1_offset, true);
    snapshots_ = read_snapshots(storage_, header_);
    if (!snapshots_.empty()) count_range(header_.snapshots_offset, snapshots_bytes(snapshots_).size(), true);
    for (const auto& snapshot : snapshots_) {
      count_range(snapshot.l1_offset, snapshot.l1_entries * uint64_t{8}, true);
      if (result_.corruptions > 1000) usage_error("{}: is too damaged to be checked", storage_.path());
      const auto l1 = words(snapshot.l1_offset, snapshot.l1_entries);
      count_l1(l1, snapshot.l1_offset, false);
    }
  }

  void count_l1(std::span<const uint64_t> l1, uint64_t at, bool active) {
    std::set<uint64_t> seen;
    for (size_t i = 0; i < l1.size(); i++) {
      if (l1[i] == 0) continue;
      const uint64_t offset = l1[i] & entry_offset;
      const bool overlap = inside(offset) && tables_at_.contains(cluster(offset)) && !l2_.contains(offset);
      if (inside(offset) && !overlap && seen.insert(offset).second) {
        Table& table = l2_[offset];
        table.references++;
        table.active |= active;
        continue;
      }
      corrupt(fmt::format("L1 entry {} ({:#x}) is no place of an L2 table of its own", i, l1[i]));
      if (repair_ != Repair::all) continue;
      write_word(0, at + i * 8);
      if (active) l1_[i] = 0;
      result_.corruptions_fixed++;
    }
  }

  void visit_tables() {
    for (const auto& [offset, table] : l2_) {
      counts_.add(cluster(offset), table.references);
      tables_at_.insert(cluster(offset));
    }
    uint64_t done = 0;
    for (const auto& [offset, table] : l2_) {
      visit_table(offset, table);
      if (progress_) progress_(++done, l2_.size() + 1);
    }
    result_.clusters = header_.clusters_for(header_.size);
  }

  void visit_table(uint64_t at, const Table& table) {
    const size_t step = header_.l2_entry_size() / 8;
    auto entries = words(at, header_.cluster_size() / 8);
    for (size_t i = 0; i < entries.size(); i += step) {
      const uint64_t word = entries[i], bits = step == 2 ? entries[i + 1] : 0;
      const std::string wrong = judge(word, bits, table);
      if (wrong.empty()) continue;
      corrupt(fmt::format("L2 table {:#x}, entry {} ({:#x}): {}", at, i / step, word, wrong));
      if (repair_ != Repair::all) continue;
      // What it pointed to is lost; zeros are better than another file's or a table's contents.
      write_word(header_.version >= 3 && step == 1 ? entry_zero : 0, at + i * 8);
      if (step == 2) write_word(uint64_t{UINT32_MAX} << 32, at + i * 8 + 8);
      result_.corruptions_fixed++;
    }
  }

  // Counts what an L2 entry refers to; says what is wrong with it, if anything is.
  std::string judge(uint64_t word, uint64_t bits, const Table& table) {
    if (word & entry_compressed) {
      const auto place = compressed_place(header_, word);
      const uint64_t first = cluster(place.offset), last = cluster(place.offset + place.size - 1);
      if (header_.external_data()) return "is compressed, but data is in another file";
      if (place.offset == 0 || place.offset >= storage_.size()) return "compressed data outside the file";
      for (uint64_t c = first; c <= last; c++)
        if (tables_at_.contains(c)) return "compressed data where a table is";
      for (uint64_t c = first; c <= last; c++) counts_.add(c, table.references);
      if (table.active) result_.allocated++, result_.compressed++;
      return "";
    }
    const uint64_t offset = word & entry_offset;
    if (header_.external_data()) {
      if (table.active && (word & (entry_offset | entry_copied))) result_.allocated++;
      return "";
    }
    if ((bits & UINT32_MAX & (bits >> 32)) != 0) return "a subcluster is both allocated and zero";
    if (offset == 0) return (bits & UINT32_MAX) ? "allocated subclusters without a place" : "";
    if (offset % header_.cluster_size() != 0) return "not aligned";
    if (!inside(offset)) return "outside the file";
    if (tables_at_.contains(cluster(offset))) return "data where a table is";
    counts_.add(cluster(offset), table.references);
    if (table.active) result_.allocated++;
    return "";
  }

  void count_bitmaps() {
    const Extension* extension = header_.extension(extension_bitmaps);
    if (!extension || extension->data.size() < 24) return;
    const uint64_t size = load_be<uint64_t>(extension->data.data() + 8),
                   offset = load_be<uint64_t>(extension->data.data() + 16);
    if (!inside(offset) || size > 64 << 20) return corrupt("the directory of bitmaps is outside the file");
    count_range(offset, size, false);
    for (const auto& bitmap : read_bitmaps(storage_, header_)) {
      const uint64_t bytes = bitmap.table_entries * uint64_t{8};
      if (bytes == 0) continue;
      if (!inside(bitmap.table_offset) || cluster(bitmap.table_offset + bytes - 1) >= file_clusters_) {
        corrupt("the table of a bitmap is outside the file");
        continue;
      }
      count_range(bitmap.table_offset, bytes, false);
      for (const uint64_t entry : words(bitmap.table_offset, bitmap.table_entries)) {
        if ((entry & entry_offset) == 0) continue;
        if (inside(entry & entry_offset))
          counts_.add(cluster(entry & entry_offset), 1);
        else
          corrupt("the data of a bitmap is outside the file");
      }
    }
  }

  uint64_t count_in(const std::vector<uint8_t>& block, uint64_t index) const {
    const unsigned bits = header_.refcount_bits();
    if (bits == 64) return load_be<uint64_t>(block.data() + index * 8);
    if (bits == 32) return load_be<uint32_t>(block.data() + index * 4);
    if (bits == 16) return load_be<uint16_t>(block.data() + index * 2);
    if (bits == 8) return block[index];
    const unsigned shift = static_cast<unsigned>(index % (8 / bits)) * bits;
    return static_cast<unsigned>(block[index * bits / 8]) >> shift & ((1u << bits) - 1);
  }
  void put_count(std::vector<uint8_t>& block, uint64_t index, uint64_t count) const {
    const unsigned bits = header_.refcount_bits();
    if (bits == 64) return store_be(block.data() + index * 8, count);
    if (bits == 32) return store_be(block.data() + index * 4, static_cast<uint32_t>(count));
    if (bits == 16) return store_be(block.data() + index * 2, static_cast<uint16_t>(count));
    const unsigned shift = bits == 8 ? 0 : static_cast<unsigned>(index % (8 / bits)) * bits;
    uint8_t& byte = block[index * bits / 8];
    byte = static_cast<uint8_t>((byte & ~(((1u << bits) - 1) << shift)) | count << shift);
  }

  // The counts in the file against those that the tables give.
  void compare() {
    const uint64_t per_block = header_.refcount_block_entries();
    const uint64_t end = std::max(counts_.end(), file_clusters_);
    for (uint64_t index = 0; index < refcount_table_.size(); index++) {
      if (refcount_table_[index] == 0) continue;
      std::vector<uint8_t> block(header_.cluster_size());
      if (const int error = storage_.read(block.data(), block.size(), refcount_table_[index]))
        throw_errno(error, storage_.path());
      bool changed = false;
      for (uint64_t i = 0; i < per_block; i++) changed |= compare_one(block, index * per_block + i, i);
      if (changed) write(block.data(), block.size(), refcount_table_[index]);
    }
    // Clusters in use that no block counts at all.
    for (uint64_t c = 0; c < end; c++) {
      const uint64_t index = c / per_block;
      if (index < refcount_table_.size() && refcount_table_[index] != 0) {
        c = (index + 1) * per_block - 1;
        continue;
      }
      if (c >= counts_.end()) break;
      if (counts_.get(c) == 0) continue;
      corrupt(fmt::format("cluster {:#x} is in use and not counted", c << header_.cluster_bits));
      rebuild_ = true;
    }
  }

  // Narrow counts cannot say how many snapshots share a cluster: then there is nothing that could be mended.
  bool representable(uint64_t count) {
    const unsigned bits = header_.refcount_bits();
    const bool fits = bits >= 64 || count >> bits == 0;
    if (!fits) too_narrow_++;
    return fits;
  }

  // Whether the block was changed.
  bool compare_one(std::vector<uint8_t>& block, uint64_t c, uint64_t index) {
    const uint64_t counted = count_in(block, index), used = counts_.get(c);
    if (counted == used) return false;
    const std::string text =
        fmt::format("cluster {:#x} has the count {} and {} users", c << header_.cluster_bits, counted, used);
    if (counted > used) {
      result_.leaks++;
      find("leak: " + text);
      if (repair_ == Repair::none) return false;
      result_.leaks_fixed++;
    } else {
      corrupt(text);
      if (repair_ != Repair::all || !representable(used)) return false;
      result_.corruptions_fixed++;
    }
    put_count(block, index, used);
    return true;
  }

  // A new refcount table and new blocks at the end of the file.
  void rebuild() {
    if (repair_ != Repair::all) return;
    for (const uint64_t entry : refcount_table_)
      if (entry) counts_.set(cluster(entry), counts_.get(cluster(entry)) - 1);
    for (uint64_t at = 0; at < refcount_table_.size() * 8; at += header_.cluster_size())
      counts_.set(cluster(header_.refcount_table_offset + at), 0);
    const uint64_t per_block = header_.refcount_block_entries(),
                   start = std::max(file_clusters_, counts_.end());
    uint64_t blocks = 1, table = 1;
    for (;;) {
      const uint64_t wanted = (start + table + blocks + per_block - 1) / per_block;
      if (wanted <= blocks && header_.clusters_for(blocks * 8) <= table) break;
      blocks = std::max(blocks, wanted);
      table = header_.clusters_for(blocks * 8);
    }
    if (table << header_.cluster_bits > maximum_refcount_table_bytes)
      usage_error("{}: is too large for new reference counts; copy it with 'lodge image convert'",
                  storage_.path());
    for (uint64_t c = start; c < start + table + blocks; c++) counts_.set(c, 1);
    std::vector<uint8_t> entries(table << header_.cluster_bits);
    for (uint64_t index = 0; index < blocks; index++) {
      std::vector<uint8_t> block(header_.cluster_size());
      bool used = false;
      for (uint64_t i = 0; i < per_block; i++) {
        const uint64_t count = counts_.get(index * per_block + i);
        if (count) put_count(block, i, representable(count) ? count : 1), used = true;
      }
      const uint64_t at = (start + table + index) << header_.cluster_bits;
      if (used || index + 1 == blocks) store_be(entries.data() + index * 8, at);
      write(block.data(), block.size(), at);
    }
    write(entries.data(), entries.size(), start << header_.cluster_bits);
    sync();
    uint8_t fields[12];
    store_be(fields, start << header_.cluster_bits);
    store_be(fields + 8, static_cast<uint32_t>(table));
    write(fields, sizeof fields, 48);
    result_.corruptions_fixed = result_.corruptions - std::min(too_narrow_, result_.corruptions);
  }

  // The "copied" flags of the active tables.
  void check_flags() {
    if (header_.external_data()) return;
    for (size_t i = 0; i < l1_.size(); i++) {
      const uint64_t offset = l1_[i] & entry_offset;
      if (offset == 0 || !l2_.contains(offset)) continue;
      check_flag(l1_[i], header_.l1_offset + i * 8);
      const size_t step = header_.l2_entry_size() / 8;
      const auto entries = words(offset, header_.cluster_size() / 8);
      for (size_t e = 0; e < entries.size(); e += step) {
        if ((entries[e] & entry_compressed) == 0 && inside(entries[e] & entry_offset))
          check_flag(entries[e], offset + e * 8);
      }
    }
  }

  void check_flag(uint64_t entry, uint64_t at) {
    const bool one = counts_.get(cluster(entry & entry_offset)) == 1;
    if (one == ((entry & entry_copied) != 0)) return;
    if (one) {
      result_.flags++;
      find(fmt::format("entry {:#x} could say that it alone uses its cluster", entry));
    } else {
      corrupt(fmt::format("entry {:#x} says wrongly that it alone uses its cluster", entry));
    }
    if (repair_ != Repair::all) return;
    write_word(entry ^ entry_copied, at);
    (one ? result_.flags_fixed : result_.corruptions_fixed)++;
  }

  void finish() {
    result_.end = counts_.end() << header_.cluster_bits;
    if (repair_ == Repair::none) return;
    sync();
    const uint64_t marks = feature_dirty | feature_corrupt;
    if (repair_ != Repair::all || header_.version < 3 || result_.left() != 0 ||
        !(header_.incompatible & marks))
      return;
    write_word(header_.incompatible & ~marks, 72);
    sync();
  }

  Storage& storage_;
  const Repair repair_;
  const std::function<void(uint64_t, uint64_t)>& progress_;
  const Header header_;
  const uint64_t file_clusters_;
  CheckResult result_;
  Counts counts_;
  std::set<uint64_t> tables_at_;  // clusters that hold tables
  std::vector<uint64_t> refcount_table_, l1_;
  std::vector<SnapshotInfo> snapshots_;
  std::map<uint64_t, Table> l2_;
  bool rebuild_ = false;
  uint64_t too_narrow_ = 0;
};

}  // namespace

CheckResult check(Storage& storage, Repair repair, const std::function<void(uint64_t, uint64_t)>& progress) {
  return Checker(storage, repair, progress).run();
}

}  // namespace lodge::block::qcow2
