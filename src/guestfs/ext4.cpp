#include "guestfs/ext4.hpp"

#include <algorithm>
#include <array>
#include <deque>

#include "base/error.hpp"

namespace lodge::guestfs {
namespace {

using Bytes = std::span<const uint8_t>;

// Super block (ext4/super.rst).
constexpr uint64_t super_at = 1024;
constexpr uint64_t inodes_at = 0x00, blocks_low_at = 0x04, first_data_block_at = 0x14,
                   log_block_size_at = 0x18, inodes_per_group_at = 0x28, magic_at = 0x38, revision_at = 0x4c,
                   inode_size_at = 0x58, incompatible_at = 0x60, descriptor_size_at = 0xfe,
                   blocks_high_at = 0x150;
constexpr uint16_t magic = 0xef53;
constexpr uint32_t incompat_compression = 1, incompat_journal_device = 8, incompat_meta_groups = 0x10,
                   incompat_64bit = 0x80;
// What changes nothing that is read here, or is refused file by file: entry types, a journal to replay,
// extents, multiple mount protection, flexible groups, attributes in inodes, data in entries, the checksums'
// seed, large directories, inline data, encryption, case folding.
constexpr uint32_t incompat_known =
    2 | 4 | 0x40 | incompat_64bit | 0x100 | 0x200 | 0x400 | 0x2000 | 0x4000 | 0x8000 | 0x10000 | 0x20000;

// Group descriptor (ext4/group_descr.rst), inode (ext4/inodes.rst).
constexpr uint64_t inode_table_low_at = 0x08, inode_table_high_at = 0x28;
constexpr uint64_t mode_at = 0x00, size_low_at = 0x04, flags_at = 0x20, map_at = 0x28, size_high_at = 0x6c;
constexpr uint32_t flag_encrypted = 0x800, flag_extents = 0x80000, flag_inline = 0x10000000;
constexpr uint32_t root_inode = 2;

// Extent tree (ext4/ifork.rst).
constexpr uint16_t extent_magic = 0xf30a;
constexpr unsigned max_depth = 5;
constexpr uint16_t max_extent = 32768;  // longer: not written yet, reads as zeros

// Bounds that no file system in use comes near, so that a hostile one cannot make us walk for ever: blocks of
// an extent tree or a block map, links on one path, bytes of a directory.
constexpr unsigned max_tree_blocks = 20'000, max_links = 40;
constexpr uint64_t max_directory = 16 << 20, max_path = 4096;
constexpr size_t max_names = 256;  // components of a path, with those of links

template <class T>
T get(Bytes bytes, uint64_t offset) {
  return field<T>(bytes, offset).value_or(T{});
}

// The components of a path, without empty ones and ".".
std::deque<std::string> components(std::string_view path) {
  std::deque<std::string> parts;
  while (!path.empty()) {
    const size_t slash = std::min(path.find('/'), path.size());
    if (slash > 0 && path.substr(0, slash) != ".") parts.emplace_back(path.substr(0, slash));
    path.remove_prefix(std::min(slash + 1, path.size()));
  }
  return parts;
}

}  // namespace

// What a walk over a file's blocks has found, and how much it may still look at.
struct Ext4::Walk {
  uint64_t blocks;  // of the file
  std::vector<Run> runs;
  unsigned budget = max_tree_blocks;
};

void Ext4::damaged(const char* what) const {
  usage_error("{}: the file system is damaged: {}; 'e2fsck' may mend it", name_, what);
}

std::optional<Ext4> Ext4::open(View view, const std::string& name) {
  std::array<uint8_t, 1024> super{};
  if (!view.read(super, super_at) || get<uint16_t>(super, magic_at) != magic) return std::nullopt;
  Ext4 fs(view, name);
  const auto incompatible = get<uint32_t>(super, incompatible_at);
  if (incompatible & incompat_journal_device) return std::nullopt;  // only a journal
  if (const uint32_t unknown = incompatible & ~incompat_known) {
    usage_error(
        "{}: the file system has features that Lodge cannot read ({:#x}: {}); give --kernel and --initrd",
        name, unknown,
        unknown & incompat_meta_groups   ? "meta block groups"
        : unknown & incompat_compression ? "compression"
                                         : "unknown");
  }
  const auto log_block_size = get<uint32_t>(super, log_block_size_at);
  if (log_block_size > 6) fs.damaged("impossible block size");
  fs.block_size_ = 1024u << log_block_size;
  fs.inodes_ = get<uint32_t>(super, inodes_at);
  fs.inodes_per_group_ = get<uint32_t>(super, inodes_per_group_at);
  fs.first_data_block_ = get<uint32_t>(super, first_data_block_at);
  fs.blocks_ = get<uint32_t>(super, blocks_low_at);
  fs.descriptor_size_ = 32;
  if (incompatible & incompat_64bit) {
    fs.blocks_ |= uint64_t{get<uint32_t>(super, blocks_high_at)} << 32;
    fs.descriptor_size_ = get<uint16_t>(super, descriptor_size_at);
  }
  fs.inode_size_ = get<uint32_t>(super, revision_at) == 0 ? 128 : get<uint16_t>(super, inode_size_at);
  if (fs.inode_size_ < 128 || fs.inode_size_ > fs.block_size_ || fs.inodes_per_group_ == 0)
    fs.damaged("impossible inode size");
  if (fs.descriptor_size_ < 32 || fs.descriptor_size_ > 1024) fs.damaged("impossible descriptor size");
  return fs;
}

std::vector<uint8_t> Ext4::block(uint64_t number) const {
  std::vector<uint8_t> bytes(block_size_);
  if (number >= blocks_ || !view_.read(bytes, number * block_size_)) damaged("a block lies outside of it");
  return bytes;
}

Ext4::Node Ext4::load(uint32_t inode) const {
  if (inode == 0 || inode > inodes_) damaged("an inode's number is out of range");
  const uint32_t group = (inode - 1) / inodes_per_group_, index = (inode - 1) % inodes_per_group_;
  std::vector<uint8_t> descriptor(descriptor_size_);
  const uint64_t descriptors = (first_data_block_ + 1) * block_size_;
  if (!view_.read(descriptor, descriptors + uint64_t{group} * descriptor_size_))
    damaged("a group descriptor lies outside of it");
  uint64_t table = get<uint32_t>(descriptor, inode_table_low_at);
  if (descriptor_size_ >= 64) table |= uint64_t{get<uint32_t>(descriptor, inode_table_high_at)} << 32;
  std::vector<uint8_t> bytes(inode_size_);
  if (table >= blocks_ || !view_.read(bytes, table * block_size_ + uint64_t{index} * inode_size_))
    damaged("an inode lies outside of it");

  Node node;
  node.inode = inode;
  node.mode = get<uint16_t>(bytes, mode_at);
  node.flags = get<uint32_t>(bytes, flags_at);
  node.size = get<uint32_t>(bytes, size_low_at) | uint64_t{get<uint32_t>(bytes, size_high_at)} << 32;
  node.map = get<decltype(node.map)>(bytes, map_at);
  return node;
}

// One node of an extent tree: the part of an inode, or a block.
void Ext4::extents(Bytes node, unsigned depth, Walk& walk) const {
  if (get<uint16_t>(node, 0) != extent_magic || get<uint16_t>(node, 6) != depth)
    damaged("an extent tree is none");
  const auto entries = get<uint16_t>(node, 2);
  if ((entries + 1u) * 12 > node.size()) damaged("an extent tree has too many entries");
  for (unsigned i = 1; i <= entries; i++) {
    const auto entry = node.subspan(i * 12, 12);
    if (depth > 0) {
      if (walk.budget-- == 0) damaged("an extent tree is too large");
      const uint64_t child = get<uint32_t>(entry, 4) | uint64_t{get<uint16_t>(entry, 8)} << 32;
      extents(block(child), depth - 1, walk);
      continue;
    }
    const auto length = get<uint16_t>(entry, 4);
    const uint64_t logical = get<uint32_t>(entry, 0),
                   physical = get<uint32_t>(entry, 8) | uint64_t{get<uint16_t>(entry, 6)} << 32;
    // In order and without overlap, so that a file has no more extents than blocks.
    const uint64_t next = walk.runs.empty() ? 0 : walk.runs.back().logical + walk.runs.back().count;
    if (length == 0 || logical < next) damaged("extents are out of order");
    if (length > max_extent) continue;
    if (physical >= blocks_ || length > blocks_ - physical) damaged("an extent lies outside of it");
    if (logical < walk.blocks) walk.runs.push_back({logical, physical, length});
  }
}

// Block `number` of a block map, `level` steps above the data; 0 is a hole.
void Ext4::block_map(uint64_t number, unsigned level, uint64_t& logical, Walk& walk) const {
  if (logical >= walk.blocks) return;
  uint64_t covers = 1;
  for (unsigned i = 0; i < level; i++) covers *= block_size_ / 4;
  if (number == 0 || level == 0) {
    if (number >= blocks_) damaged("a block lies outside of it");
    auto& runs = walk.runs;
    const bool joins = !runs.empty() && runs.back().logical + runs.back().count == logical &&
                       runs.back().physical + runs.back().count == number;
    if (number != 0 && joins)
      runs.back().count++;
    else if (number != 0)
      runs.push_back({logical, number, 1});
    logical += covers;
    return;
  }
  if (walk.budget-- == 0) damaged("a block map is too large");
  const auto numbers = block(number);
  for (uint64_t at = 0; at < numbers.size() && logical < walk.blocks; at += 4)
    block_map(get<uint32_t>(numbers, at), level - 1, logical, walk);
}

// Where the first `blocks` blocks of a file are; what is missing is a hole.
std::vector<Ext4::Run> Ext4::runs(const Node& node, uint64_t blocks) const {
  if (node.flags & flag_encrypted) usage_error("{}: the file is encrypted", name_);
  if (node.flags & flag_inline) usage_error("{}: the file lies in its inode, which Lodge cannot read", name_);
  Walk walk{.blocks = blocks};
  if (node.flags & flag_extents) {
    const unsigned depth = get<uint16_t>(node.map, 6);
    if (depth > max_depth) damaged("an extent tree is too deep");
    extents(node.map, depth, walk);
    return walk.runs;
  }
  uint64_t logical = 0;
  for (unsigned i = 0; i < 15; i++)
    block_map(get<uint32_t>(node.map, i * 4), i < 12 ? 0 : i - 11, logical, walk);
  return walk.runs;
}

std::vector<uint8_t> Ext4::read(const Node& file, uint64_t limit) const {
  if (file.size > limit)
    usage_error("{}: a file of {} MiB is too large for what it is needed for ({} MiB)", name_,
                file.size >> 20, limit >> 20);
  // The blocks before the memory: a file's size is a claim, and need not have anything behind it.
  const auto where = runs(file, (file.size + block_size_ - 1) / block_size_);
  std::vector<uint8_t> bytes(file.size);
  for (const auto& run : where) {
    const uint64_t begin = run.logical * block_size_;
    if (begin >= bytes.size()) break;
    const uint64_t size = std::min(run.count * block_size_, bytes.size() - begin);
    if (!view_.read(std::span(bytes).subspan(begin, size), run.physical * block_size_))
      damaged("a file's blocks lie outside of it");
  }
  return bytes;
}

// Calls visit(name, inode) for each entry until it returns true. Hashed directories have their hashes where
// entries without an inode seem to be.
template <class Visitor>
void Ext4::visit_entries(const Node& directory, Visitor visit) const {
  const auto bytes = read(directory, max_directory);
  for (uint64_t base = 0; base + block_size_ <= bytes.size(); base += block_size_) {
    const auto entries = Bytes(bytes).subspan(base, block_size_);
    for (uint64_t at = 0; at + 8 <= entries.size();) {
      // The two low bits carry the high ones of a 64 KiB block; the largest length is spelled 65535 or 0.
      const uint32_t raw = get<uint16_t>(entries, at + 4);
      const uint64_t length = raw == 0xffff || raw == 0 ? block_size_ : (raw & 0xfffc) | (raw & 3) << 16;
      const auto name_length = get<uint8_t>(entries, at + 6);
      if (length < 8 || length > entries.size() - at || name_length + 8u > length)
        damaged("a directory's entries do not fit");
      const auto inode = get<uint32_t>(entries, at);
      const std::string_view name(reinterpret_cast<const char*>(&entries[at]) + 8, name_length);
      if (inode != 0 && name != "." && name != ".." && !name.empty() && visit(name, inode)) return;
      at += length;
    }
  }
}

std::vector<std::string> Ext4::list(const Node& directory) const {
  std::vector<std::string> names;
  visit_entries(directory, [&](std::string_view name, uint32_t) {
    names.emplace_back(name);
    return false;
  });
  return names;
}

std::optional<uint32_t> Ext4::look_up(const Node& directory, std::string_view name) const {
  std::optional<uint32_t> found;
  visit_entries(directory, [&](std::string_view entry, uint32_t inode) {
    if (entry == name) found = inode;
    return found.has_value();
  });
  return found;
}

std::string Ext4::target(const Node& link) const {
  if (link.size > max_path) damaged("a symbolic link is too long");
  if (link.size < link.map.size() && !(link.flags & flag_extents))  // no blocks: it is in the inode
    return {reinterpret_cast<const char*>(link.map.data()), static_cast<size_t>(link.size)};
  const auto bytes = read(link, max_path);
  return {bytes.begin(), bytes.end()};
}

std::optional<Ext4::Found> Ext4::find(std::string_view path) const {
  auto parts = components(path);
  std::vector<Found> stack{{"", load(root_inode)}};
  for (unsigned links = 0; !parts.empty();) {
    const std::string name = std::move(parts.front());
    parts.pop_front();
    const Found here = stack.back();
    if (!here.node.is_directory()) return std::nullopt;
    if (name == "..") {
      if (stack.size() > 1) stack.pop_back();
      continue;
    }
    const auto inode = look_up(here.node, name);
    if (!inode) return std::nullopt;
    Found next{here.path + "/" + name, load(*inode)};
    if (!next.node.is_link()) {
      stack.push_back(std::move(next));
      continue;
    }
    const std::string to = target(next.node);
    if (++links > max_links) return std::nullopt;
    auto more = components(to);
    if (more.size() + parts.size() > max_names) return std::nullopt;
    parts.insert(parts.begin(), more.begin(), more.end());
    if (to.starts_with('/')) stack.resize(1);
  }
  return stack.back();
}

}  // namespace lodge::guestfs
