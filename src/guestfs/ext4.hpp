// Reads files of an ext4 (ext3, ext2) file system without mounting it, to find a kernel.
//
// Follows the Linux kernel's Documentation/filesystems/ext4/. Understood: extents and block maps, 64-bit
// block numbers, hashed directories (read linearly, as every kernel that does not know them does), symbolic
// links, holes. Not looked at: checksums, and the journal: what was written just before a crash and is only
// there is not seen. Refused: compression, an external journal's device, meta block groups, encrypted and
// inline files.
//
// The file system is hostile: every number is checked before it is used, walks are bounded by counts and not
// by what the disk says, and memory by the limits that the caller gives. Functions throw UsageError with one
// sentence that begins with the name given to open().
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "guestfs/view.hpp"

namespace lodge::guestfs {

class Ext4 {
 public:
  struct Node {
    uint32_t inode = 0;
    uint16_t mode = 0;  // as stat(2) has it: type and permissions
    uint32_t flags = 0;
    uint64_t size = 0;
    std::array<uint8_t, 60> map{};  // extents, block numbers, or a short link's target
    bool is_directory() const noexcept { return (mode & 0xf000) == 0x4000; }
    bool is_file() const noexcept { return (mode & 0xf000) == 0x8000; }
    bool is_link() const noexcept { return (mode & 0xf000) == 0xa000; }
  };
  struct Found {
    std::string path;  // without links: where it really is
    Node node;
  };

  // Nothing when there is no such file system. `name` begins messages.
  static std::optional<Ext4> open(View view, const std::string& name);

  // What an absolute path leads to, links followed. Nothing when there is nothing.
  std::optional<Found> find(std::string_view path) const;
  // The names in a directory, without "." and "..".
  std::vector<std::string> list(const Node& directory) const;
  // A whole file. Refuses one of more than `limit` bytes.
  std::vector<uint8_t> read(const Node& file, uint64_t limit) const;

 private:
  struct Run {
    uint64_t logical, physical, count;  // blocks
  };
  struct Walk;

  Ext4(View view, std::string name) : view_(view), name_(std::move(name)) {}
  std::optional<uint32_t> look_up(const Node& directory, std::string_view name) const;
  Node load(uint32_t inode) const;
  std::string target(const Node& link) const;
  template <class Visitor>
  void visit_entries(const Node& directory, Visitor visit) const;
  std::vector<Run> runs(const Node& node, uint64_t blocks) const;
  void extents(std::span<const uint8_t> node, unsigned depth, Walk& walk) const;
  void block_map(uint64_t block, unsigned level, uint64_t& logical, Walk& walk) const;
  std::vector<uint8_t> block(uint64_t number) const;
  [[noreturn]] void damaged(const char* what) const;

  View view_;
  std::string name_;
  uint32_t block_size_ = 0, inodes_ = 0, inodes_per_group_ = 0, inode_size_ = 0, descriptor_size_ = 0;
  uint64_t blocks_ = 0, first_data_block_ = 0;
};

}  // namespace lodge::guestfs
