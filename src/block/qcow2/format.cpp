#include "block/qcow2/format.hpp"

#include <algorithm>

#include "base/error.hpp"
#include "block/probe.hpp"
#include "block/storage.hpp"

namespace lodge::block::qcow2 {
namespace {

constexpr size_t v2_length = 72, v3_length = 104, known_length = 112;

std::string text(std::span<const uint8_t> bytes) {
  return {bytes.begin(), bytes.end()};
}

// Printable, for messages: names in an image are not ours.
std::string printable(std::string name) {
  std::ranges::replace_if(
      name, [](char c) { return c < ' ' || c > '~'; }, '?');
  return name;
}

// The name that the image itself gives to an incompatible feature, or its number.
std::string feature_name(const Header& header, unsigned bit) {
  if (const Extension* names = header.extension(extension_features)) {
    for (size_t at = 0; at + 48 <= names->data.size(); at += 48) {
      if (names->data[at] != 0 || names->data[at + 1] != bit) continue;
      const auto first = names->data.begin() + static_cast<ptrdiff_t>(at) + 2;
      const std::string name(first, std::find(first, first + 46, 0));
      return fmt::format("'{}' (bit {})", printable(name), bit);
    }
  }
  return fmt::format("number {}", bit);
}

class Parser {
 public:
  explicit Parser(Storage& storage) : storage_(storage), file_size_(storage.size()) {}

  Header parse() {
    uint8_t fixed[known_length]{};
    load(fixed, sizeof fixed, 0);
    if (!looks_formatted(fixed)) {
      refuse_foreign(storage_);
      usage_error("{}: is not a qcow2 image; 'lodge image info' tells what it is", storage_.path());
    }
    fields(fixed);
    if (const auto crypt = load_be<uint32_t>(fixed + 32))
      usage_error(
          "{}: is encrypted ({}), which Lodge cannot read; decrypt it with 'qemu-img convert' "
          "(docs/images.md)",
          storage_.path(), crypt == 2 ? "LUKS" : "AES");
    const uint32_t length = header_.version == 2 ? v2_length : load_be<uint32_t>(fixed + 100);
    if (length < (header_.version == 2 ? v2_length : v3_length) || length % 8 != 0 ||
        length > header_.cluster_size())
      bad("has a header of an impossible length");
    if (length > known_length) {
      header_.unknown_fields.resize(length - known_length);
      load(header_.unknown_fields.data(), header_.unknown_fields.size(), known_length);
    }
    if (length > v3_length)
      compression(fixed[v3_length]);
    else if (header_.has(feature_compression))
      bad("has no compression type");
    const uint64_t end = backing_file(fixed);
    extensions(length, end);
    features();
    tables();
    return std::move(header_);
  }

 private:
  [[noreturn]] void bad(const std::string& what) const {
    usage_error("{}: {}: the header is damaged", storage_.path(), what);
  }

  void load(void* data, size_t size, uint64_t offset) {
    if (const int error = storage_.read(data, size, offset)) throw_errno(error, storage_.path());
  }

  void fields(const uint8_t* at) {
    header_.version = load_be<uint32_t>(at + 4);
    if (header_.version != 2 && header_.version != 3)
      usage_error("{}: is qcow version {}; Lodge reads 2 and 3, 'qemu-img convert -O qcow2' makes one",
                  storage_.path(), header_.version);
    header_.cluster_bits = load_be<uint32_t>(at + 20);
    if (header_.cluster_bits < minimum_cluster_bits || header_.cluster_bits > maximum_cluster_bits)
      bad(fmt::format("has clusters of 2^{} bytes, not of 512 bytes to 2 MiB", header_.cluster_bits));
    header_.size = load_be<uint64_t>(at + 24);
    header_.l1_entries = load_be<uint32_t>(at + 36);
    header_.l1_offset = load_be<uint64_t>(at + 40);
    header_.refcount_table_offset = load_be<uint64_t>(at + 48);
    header_.refcount_table_clusters = load_be<uint32_t>(at + 56);
    header_.snapshots = load_be<uint32_t>(at + 60);
    header_.snapshots_offset = load_be<uint64_t>(at + 64);
    if (header_.version == 2) return;
    header_.incompatible = load_be<uint64_t>(at + 72);
    header_.compatible = load_be<uint64_t>(at + 80);
    header_.autoclear = load_be<uint64_t>(at + 88);
    header_.refcount_order = load_be<uint32_t>(at + 96);
    if (header_.refcount_order > 6) bad("has reference counts wider than 64 bits");
  }

  void compression(uint8_t type) {
    if (header_.has(feature_compression) != (type != 0)) bad("contradicts itself about its compression");
    if (type > 1)
      usage_error("{}: is compressed by method {}; Lodge knows zlib (0) and zstd (1)", storage_.path(), type);
    header_.compression = static_cast<Compression>(type);
  }

  // Returns where the extensions must end: at the name, or at the end of the cluster.
  uint64_t backing_file(const uint8_t* fixed) {
    const uint64_t offset = load_be<uint64_t>(fixed + 8);
    const uint32_t size = load_be<uint32_t>(fixed + 16);
    if (offset == 0) return header_.cluster_size();
    if (size > 1023 || offset > header_.cluster_size() || size > header_.cluster_size() - offset)
      bad("has the name of its backing file outside the first cluster");
    std::vector<uint8_t> name(size);
    load(name.data(), name.size(), offset);
    if (std::ranges::find(name, 0) != name.end()) bad("has a backing file with a NUL in its name");
    if (!name.empty()) header_.backing_file = text(name);
    return offset;
  }

  void extensions(uint64_t at, uint64_t end) {
    while (at + 8 <= end) {
      uint8_t head[8];
      load(head, sizeof head, at);
      const auto type = load_be<uint32_t>(head), size = load_be<uint32_t>(head + 4);
      at += 8;
      if (type == extension_end) return;
      if (size > end - at) bad("has a header extension that does not fit");
      std::vector<uint8_t> data(size);
      load(data.data(), size, at);
      at += (size + 7) & ~uint64_t{7};
      if (type == extension_backing_format)
        header_.backing_format = text(data);
      else if (type == extension_data_file)
        header_.data_file = text(data);
      else
        header_.extensions.push_back({type, std::move(data)});
    }
  }

  void features() {
    if (const uint64_t unknown = header_.incompatible & ~known_incompatible) {
      usage_error("{}: needs the feature {}, which Lodge does not know", storage_.path(),
                  feature_name(header_, static_cast<unsigned>(std::countr_zero(unknown))));
    }
    if (header_.extended_l2() && header_.cluster_bits < 14)
      bad("has subclusters, but clusters of less than 16 KiB");
    if ((header_.autoclear & autoclear_raw_data) && !header_.external_data())
      bad("claims raw external data without an external data file");
    if (header_.raw_external_data() && header_.backing_file) bad("has raw external data and a backing file");
  }

  void inside(uint64_t offset, uint64_t size, const char* what) const {
    if (offset % header_.cluster_size() != 0) bad(fmt::format("has a {} that is not aligned", what));
    if (size > file_size_ || offset > file_size_ - size || (offset == 0 && size != 0))
      bad(fmt::format("has a {} outside the file", what));
  }

  void tables() {
    const uint64_t l1_bytes = uint64_t{header_.l1_entries} * 8;
    if (l1_bytes > maximum_l1_bytes) bad("has an L1 table of more than 32 MiB");
    if (header_.size > uint64_t{1} << 61) bad("claims to be larger than 2 EiB");
    if (header_.l1_entries_for(header_.size) > header_.l1_entries)
      bad("has an L1 table that is too small for its size");
    inside(header_.l1_offset, l1_bytes, "L1 table");
    const uint64_t table_bytes = uint64_t{header_.refcount_table_clusters} << header_.cluster_bits;
    if (table_bytes > maximum_refcount_table_bytes) bad("has a refcount table of more than 8 MiB");
    if (table_bytes == 0) bad("has no refcount table");
    inside(header_.refcount_table_offset, table_bytes, "refcount table");
    if (header_.snapshots > maximum_snapshots) bad("has more than 65536 snapshots");
    // An entry is at least 40 bytes.
    if (header_.snapshots)
      inside(header_.snapshots_offset, header_.snapshots * uint64_t{40}, "snapshot table");
  }

  Storage& storage_;
  uint64_t file_size_;
  Header header_;
};

class Writer {
 public:
  Writer(std::vector<uint8_t>& bytes, size_t at) : bytes_(bytes), at_(at) {}
  void extension(uint32_t type, std::span<const uint8_t> data) {
    if (at_ + 8 + data.size() + 8 > bytes_.size())
      usage_error(
          "the image's header, with the names of its backing and data files, does not fit into a "
          "cluster; use shorter names or larger clusters");
    store_be(bytes_.data() + at_, type);
    store_be(bytes_.data() + at_ + 4, static_cast<uint32_t>(data.size()));
    std::ranges::copy(data, bytes_.begin() + static_cast<ptrdiff_t>(at_) + 8);
    at_ += 8 + ((data.size() + 7) & ~size_t{7});
  }
  size_t end() {
    extension(extension_end, {});
    return at_;
  }

 private:
  std::vector<uint8_t>& bytes_;
  size_t at_;
};

std::span<const uint8_t> bytes_of(const std::string& string) {
  return {reinterpret_cast<const uint8_t*>(string.data()), string.size()};
}

}  // namespace

const Extension* Header::extension(uint32_t type) const {
  const auto found = std::ranges::find(extensions, type, &Extension::type);
  return found == extensions.end() ? nullptr : &*found;
}

Header read_header(Storage& storage) {
  return Parser(storage).parse();
}

std::vector<uint8_t> header_bytes(const Header& h) {
  std::vector<uint8_t> bytes(h.cluster_size());
  uint8_t* at = bytes.data();
  std::ranges::copy(qcow_magic, at);
  store_be(at + 4, h.version);
  store_be(at + 20, h.cluster_bits);
  store_be(at + 24, h.size);
  store_be(at + 36, h.l1_entries);
  store_be(at + 40, h.l1_offset);
  store_be(at + 48, h.refcount_table_offset);
  store_be(at + 56, h.refcount_table_clusters);
  store_be(at + 60, h.snapshots);
  store_be(at + 64, h.snapshots_offset);
  size_t length = v2_length;
  if (h.version >= 3) {
    length = known_length + h.unknown_fields.size();
    store_be(at + 72, h.incompatible);
    store_be(at + 80, h.compatible);
    store_be(at + 88, h.autoclear);
    store_be(at + 96, h.refcount_order);
    store_be(at + 100, static_cast<uint32_t>(length));
    at[v3_length] = static_cast<uint8_t>(h.compression);
    std::ranges::copy(h.unknown_fields, at + known_length);
  }
  Writer writer(bytes, length);
  if (!h.backing_format.empty()) writer.extension(extension_backing_format, bytes_of(h.backing_format));
  if (!h.data_file.empty()) writer.extension(extension_data_file, bytes_of(h.data_file));
  for (const auto& extension : h.extensions) writer.extension(extension.type, extension.data);
  const size_t end = writer.end();
  if (h.backing_file) {
    if (h.backing_file->size() > 1023) usage_error("the backing file's name is longer than 1023 bytes");
    if (end + h.backing_file->size() > bytes.size())
      usage_error("the backing file's name does not fit into the first cluster; use larger clusters");
    store_be(at + 8, uint64_t{end});
    store_be(at + 16, static_cast<uint32_t>(h.backing_file->size()));
    std::ranges::copy(bytes_of(*h.backing_file), at + end);
  }
  return bytes;
}

}  // namespace lodge::block::qcow2
