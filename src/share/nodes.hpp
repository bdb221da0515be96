// The files that a guest knows by number: which file each is, and by which path it was last seen.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <unordered_map>

#include "share/folder.hpp"

namespace lodge::share {

// A node holds no descriptor, so that a guest which knows a million files costs memory and nothing else, and
// so that the table can be saved. A path may have become wrong behind the table's back: whoever opens it
// compares the key. Not synchronised.
class Nodes {
 public:
  static constexpr uint64_t root = 1;  // FUSE_ROOT_ID
  // About 200 bytes each. A guest that wants more gets ENFILE.
  static constexpr size_t max_nodes = 1u << 19;

  struct Node {
    FileKey key;
    uint64_t parent = 0;  // 0: no name leads to it any more, as far as is known
    std::string name;
    uint64_t lookups = 0;                // how often the guest was told of it
    uint32_t children = 0, handles = 0;  // nodes whose parent it is; open files
  };

  explicit Nodes(const FileKey& root_key);
  void clear();

  const Node* find(uint64_t id) const noexcept;
  size_t size() const noexcept { return nodes_.size(); }

  // `name` in `parent` is the file `key`: its node, made if need be, counted as told. 0 when there is no
  // room.
  uint64_t enter(uint64_t parent, std::string_view name, const FileKey& key);
  // The guest forgets `count` of the times it was told.
  void forget(uint64_t id, uint64_t count) noexcept;
  // `name` in `parent` does not lead to the file any more; or another name does.
  void unlinked(uint64_t parent, std::string_view name, const FileKey& key) noexcept;
  void renamed(uint64_t parent, std::string_view name, const FileKey& key, uint64_t new_parent,
               std::string_view new_name) noexcept;
  // A file of the node is opened or closed.
  void opened(uint64_t id) noexcept { nodes_.at(id).handles++; }
  void closed(uint64_t id) noexcept;

  // Names from the root on, or "."; false when there is no path that fits PATH_MAX.
  bool path(uint64_t id, std::string& out) const;

  // --- For saved state. restore() takes nodes in any order, finish_restore() then checks that all parents
  // are there and that no node is its own ancestor.
  const std::unordered_map<uint64_t, Node>& all() const noexcept { return nodes_; }
  uint64_t next_id() const noexcept { return next_id_; }
  bool restore(uint64_t id, Node node);
  bool finish_restore(uint64_t next_id);

 private:
  void place(uint64_t id, uint64_t parent, std::string_view name) noexcept;
  void detach(Node& node) noexcept;
  bool is_below(uint64_t id, uint64_t ancestor) const noexcept;
  void release(uint64_t id) noexcept;

  std::unordered_map<uint64_t, Node> nodes_;
  std::map<FileKey, uint64_t> by_key_;
  uint64_t next_id_ = root + 1;  // never used twice, so that generations are not needed
};

}  // namespace lodge::share
