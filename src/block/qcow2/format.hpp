// The qcow2 format on disk: header, extensions, entries of the tables. Follows the specification "Qcow2 Image
// File Format" (QEMU, docs/interop/qcow2), versions 2 and 3. All numbers in the file are big-endian.
//
// Not read: encryption (AES, LUKS), unknown incompatible features: refused by name.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace lodge::block {
class Storage;
}

namespace lodge::block::qcow2 {

template <class T>
T load_be(const uint8_t* at) noexcept {
  T value;
  std::memcpy(&value, at, sizeof value);
  if constexpr (sizeof(T) == 8) return __builtin_bswap64(value);
  if constexpr (sizeof(T) == 4) return __builtin_bswap32(value);
  if constexpr (sizeof(T) == 2) return __builtin_bswap16(value);
  return value;
}
template <class T>
void store_be(uint8_t* at, T value) noexcept {
  value = load_be<T>(reinterpret_cast<const uint8_t*>(&value));
  std::memcpy(at, &value, sizeof value);
}

// incompatible_features
constexpr uint64_t feature_dirty = 1 << 0, feature_corrupt = 1 << 1, feature_data_file = 1 << 2,
                   feature_compression = 1 << 3, feature_extended_l2 = 1 << 4;
constexpr uint64_t known_incompatible =
    feature_dirty | feature_corrupt | feature_data_file | feature_compression | feature_extended_l2;
constexpr uint64_t compatible_lazy_refcounts = 1 << 0;
constexpr uint64_t autoclear_bitmaps = 1 << 0, autoclear_raw_data = 1 << 1;
constexpr uint64_t known_autoclear = autoclear_bitmaps | autoclear_raw_data;

// Header extensions
constexpr uint32_t extension_end = 0, extension_backing_format = 0xe2792aca, extension_features = 0x6803f857,
                   extension_bitmaps = 0x23852875, extension_encryption = 0x0537be77,
                   extension_data_file = 0x44415441;

// Entries of L1 and L2 tables
constexpr uint64_t entry_copied = uint64_t{1} << 63;  // refcount is exactly one
constexpr uint64_t entry_compressed = uint64_t{1} << 62;
constexpr uint64_t entry_zero = 1;  // not with extended L2
constexpr uint64_t entry_offset = 0x00ff'ffff'ffff'fe00;
constexpr uint64_t entry_reserved = 0x3f00'0000'0000'01fe;  // of a standard L2 entry, version 3

// What we accept, so that a small hostile file cannot ask for much memory: QEMU's own limits.
constexpr uint64_t maximum_l1_bytes = 32 << 20, maximum_refcount_table_bytes = 8 << 20,
                   maximum_snapshots = 65536, maximum_snapshot_bytes = 16 << 20;
constexpr unsigned minimum_cluster_bits = 9, maximum_cluster_bits = 21;

enum class Compression : uint8_t { zlib = 0, zstd = 1 };

struct Extension {
  uint32_t type;
  std::vector<uint8_t> data;
};

struct Header {
  uint32_t version = 3;
  unsigned cluster_bits = 16;
  uint64_t size = 0;
  uint32_t l1_entries = 0;
  uint64_t l1_offset = 0;
  uint64_t refcount_table_offset = 0;
  uint32_t refcount_table_clusters = 0;
  uint32_t snapshots = 0;
  uint64_t snapshots_offset = 0;
  uint64_t incompatible = 0, compatible = 0, autoclear = 0;
  unsigned refcount_order = 4;
  Compression compression = Compression::zlib;
  std::vector<uint8_t> unknown_fields;  // header bytes that a later version of the format has added
  std::optional<std::string> backing_file;
  std::string backing_format, data_file;  // empty: not said
  std::vector<Extension> extensions;      // those that are not in the fields above, in their order

  uint64_t cluster_size() const { return uint64_t{1} << cluster_bits; }
  bool has(uint64_t feature) const { return (incompatible & feature) != 0; }
  bool extended_l2() const { return has(feature_extended_l2); }
  bool external_data() const { return has(feature_data_file); }
  bool raw_external_data() const { return external_data() && (autoclear & autoclear_raw_data); }
  unsigned l2_entry_size() const { return extended_l2() ? 16 : 8; }
  uint64_t l2_entries() const { return cluster_size() / l2_entry_size(); }
  unsigned refcount_bits() const { return 1u << refcount_order; }
  uint64_t refcount_block_entries() const { return cluster_size() * 8 / refcount_bits(); }
  uint64_t clusters_for(uint64_t bytes) const {
    return (bytes >> cluster_bits) + ((bytes & (cluster_size() - 1)) != 0);
  }
  // L1 entries that a disk of `bytes` needs.
  uint64_t l1_entries_for(uint64_t bytes) const {
    return (clusters_for(bytes) + l2_entries() - 1) / l2_entries();
  }
  const Extension* extension(uint32_t type) const;
};

// Reads and checks the header: afterwards its tables lie inside the file, aligned, and within our limits.
// Throws UsageError with one line that names `storage`'s path.
Header read_header(Storage& storage);

// The first cluster's contents. Throws UsageError when it does not fit into a cluster.
std::vector<uint8_t> header_bytes(const Header& header);

// The place of a compressed cluster: where its data begins and at most how long it is.
struct CompressedPlace {
  uint64_t offset, size;
};
inline CompressedPlace compressed_place(const Header& header, uint64_t entry) {
  const unsigned shift = 62 - (header.cluster_bits - 8);
  const uint64_t offset = entry & ((uint64_t{1} << shift) - 1) & ((uint64_t{1} << 56) - 1);
  const uint64_t sectors = ((entry & (entry_compressed - 1)) >> shift) + 1;
  return {offset, sectors * 512 - (offset & 511)};
}

}  // namespace lodge::block::qcow2
