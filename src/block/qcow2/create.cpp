#include "block/qcow2/create.hpp"

#include "base/error.hpp"
#include "block/storage.hpp"

namespace lodge::block::qcow2 {
namespace {

void check(const Storage& storage, const CreateOptions& o) {
  const std::string& path = storage.path();
  const auto bad = [&](const std::string& what) { usage_error("{}: {}", path, what); };
  if (o.size % 512 != 0) bad("the size must be a multiple of 512 bytes");
  if (o.version != 2 && o.version != 3) bad("qcow2 has the versions 2 and 3");
  if (o.cluster_bits < minimum_cluster_bits || o.cluster_bits > maximum_cluster_bits)
    bad("clusters are powers of two from 512 to 2M");
  if (o.refcount_order > 6) bad("reference counts have 1, 2, 4, 8, 16, 32 or 64 bits");
  if (o.version == 2 && (o.lazy_refcounts || o.extended_l2 || o.refcount_order != 4 || !o.data_file.empty() ||
                         o.compression != Compression::zlib))
    bad("lazy refcounts, subclusters, other counts than of 16 bits, data files and zstd need version 3");
  if (o.extended_l2 && o.cluster_bits < 14) bad("subclusters need clusters of at least 16K");
  if (o.raw_data && o.data_file.empty()) bad("raw external data needs a data file");
  if (o.raw_data && o.backing_file) bad("raw external data and a backing file exclude each other");
}

}  // namespace

void create(Storage& storage, const CreateOptions& o) {
  check(storage, o);
  Header h;
  h.version = o.version;
  h.cluster_bits = o.cluster_bits;
  h.size = o.size;
  h.refcount_order = o.refcount_order;
  h.compression = o.compression;
  if (o.compression != Compression::zlib) h.incompatible |= feature_compression;
  if (o.extended_l2) h.incompatible |= feature_extended_l2;
  if (!o.data_file.empty()) h.incompatible |= feature_data_file;
  if (o.raw_data) h.autoclear |= autoclear_raw_data;
  if (o.lazy_refcounts) h.compatible |= compatible_lazy_refcounts;
  h.backing_file = o.backing_file;
  h.backing_format = o.backing_format;
  h.data_file = o.data_file;

  const uint64_t cluster = h.cluster_size(), l1_entries = h.l1_entries_for(o.size);
  if (l1_entries * 8 > maximum_l1_bytes)
    usage_error("{}: is too large for clusters of {} bytes; use larger clusters", storage.path(), cluster);
  // Header, L1 table, refcount table, refcount blocks, in this order; as many blocks as count all of it.
  const uint64_t l1_clusters = std::max<uint64_t>(h.clusters_for(l1_entries * 8), 1);
  uint64_t table_clusters = 1, blocks = 1, total = 0;
  for (;;) {
    total = 1 + l1_clusters + table_clusters + blocks;
    const uint64_t wanted = (total + h.refcount_block_entries() - 1) / h.refcount_block_entries();
    if (wanted <= blocks && blocks * 8 <= table_clusters * cluster) break;
    blocks = std::max(blocks, wanted);
    table_clusters = h.clusters_for(blocks * 8);
  }
  h.l1_entries = static_cast<uint32_t>(l1_entries);
  h.l1_offset = cluster;
  h.refcount_table_offset = (1 + l1_clusters) * cluster;
  h.refcount_table_clusters = static_cast<uint32_t>(table_clusters);
  const uint64_t blocks_offset = h.refcount_table_offset + table_clusters * cluster;

  const auto put = [&](const std::vector<uint8_t>& bytes, uint64_t offset) {
    if (const int error = storage.write(bytes.data(), bytes.size(), offset))
      throw_errno(error, storage.path() + ": cannot be written");
  };
  std::vector<uint8_t> table(table_clusters * cluster);
  for (uint64_t block = 0; block < blocks; block++) {
    store_be(table.data() + block * 8, blocks_offset + block * cluster);
    std::vector<uint8_t> counts(cluster);
    const unsigned bits = h.refcount_bits();
    for (uint64_t i = 0; i < h.refcount_block_entries() && block * h.refcount_block_entries() + i < total;
         i++) {
      const uint64_t bit = i * bits;
      if (bits < 8)
        counts[bit / 8] = static_cast<uint8_t>(counts[bit / 8] | 1u << bit % 8);
      else
        counts[(bit + bits) / 8 - 1] = 1;  // big-endian
    }
    put(counts, blocks_offset + block * cluster);
  }
  put(table, h.refcount_table_offset);
  put(std::vector<uint8_t>(l1_clusters * cluster), h.l1_offset);
  put(header_bytes(h), 0);
  if (const int error = storage.sync()) throw_errno(error, storage.path() + ": cannot be written");
}

}  // namespace lodge::block::qcow2
