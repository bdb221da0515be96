#include "share/nodes.hpp"

#include <algorithm>
#include <climits>
#include <vector>

namespace lodge::share {

Nodes::Nodes(const FileKey& root_key) {
  nodes_[root].key = root_key;
  by_key_[root_key] = root;
}

void Nodes::clear() {
  const FileKey key = nodes_.at(root).key;
  nodes_.clear();
  by_key_.clear();
  nodes_[root].key = key;
  by_key_[key] = root;
  next_id_ = root + 1;
}

const Nodes::Node* Nodes::find(uint64_t id) const noexcept {
  const auto found = nodes_.find(id);
  return found == nodes_.end() ? nullptr : &found->second;
}

// --- Coming and going

uint64_t Nodes::enter(uint64_t parent, std::string_view name, const FileKey& key) {
  const auto known = by_key_.find(key);
  uint64_t id = 0;
  if (known != by_key_.end()) {
    id = known->second;
  } else {
    if (nodes_.size() >= max_nodes) return 0;
    id = next_id_++;
    nodes_[id].key = key;
    by_key_[key] = id;
  }
  nodes_.at(id).lookups++;
  place(id, parent, name);
  return id;
}

void Nodes::forget(uint64_t id, uint64_t count) noexcept {
  const auto found = nodes_.find(id);
  if (found == nodes_.end()) return;
  found->second.lookups -= std::min(found->second.lookups, count);
  release(id);
}

void Nodes::closed(uint64_t id) noexcept {
  nodes_.at(id).handles--;
  release(id);
}

// Takes out a node that nothing needs, and then perhaps its ancestors.
void Nodes::release(uint64_t id) noexcept {
  while (id != root) {
    const auto found = nodes_.find(id);
    const Node& node = found->second;
    if (node.lookups != 0 || node.children != 0 || node.handles != 0) return;
    const uint64_t parent = node.parent;
    by_key_.erase(node.key);
    nodes_.erase(found);
    if (parent == 0) return;
    nodes_.at(parent).children--;
    id = parent;
  }
}

// --- Paths

bool Nodes::is_below(uint64_t id, uint64_t ancestor) const noexcept {
  for (; id != 0; id = nodes_.at(id).parent)
    if (id == ancestor) return true;
  return false;
}

void Nodes::detach(Node& node) noexcept {
  const uint64_t parent = node.parent;
  node.parent = 0;
  node.name.clear();
  if (parent == 0) return;
  nodes_.at(parent).children--;
  release(parent);
}

void Nodes::place(uint64_t id, uint64_t parent, std::string_view name) noexcept {
  Node& node = nodes_.at(id);
  if (id == root || (node.parent == parent && node.name == name)) return;
  // Only when others move directories at the same time can a directory seem to be inside itself.
  if (!nodes_.contains(parent) || is_below(parent, id)) return detach(node);
  nodes_.at(parent).children++;  // first: the old parent may be the only one that keeps the new one
  detach(node);
  node.parent = parent;
  node.name = name;
}

void Nodes::unlinked(uint64_t parent, std::string_view name, const FileKey& key) noexcept {
  const auto found = by_key_.find(key);
  if (found == by_key_.end()) return;
  Node& node = nodes_.at(found->second);
  if (node.parent == parent && node.name == name) detach(node);
}

void Nodes::renamed(uint64_t parent, std::string_view name, const FileKey& key, uint64_t new_parent,
                    std::string_view new_name) noexcept {
  const auto found = by_key_.find(key);
  if (found == by_key_.end()) return;
  const Node& node = nodes_.at(found->second);
  if (node.parent == parent && node.name == name) place(found->second, new_parent, new_name);
}

bool Nodes::path(uint64_t id, std::string& out) const {
  std::vector<const std::string*> names;
  size_t length = 0;
  for (; id != root;) {
    const Node* node = find(id);
    if (!node || node->parent == 0) return false;
    length += node->name.size() + 1;
    if (length > PATH_MAX) return false;
    names.push_back(&node->name);
    id = node->parent;
  }
  out = names.empty() ? "." : "";
  for (auto name = names.rbegin(); name != names.rend(); ++name) {
    if (!out.empty()) out += '/';
    out += **name;
  }
  return true;
}

// --- Saved state

bool Nodes::restore(uint64_t id, Node node) {
  if (id <= root || nodes_.size() >= max_nodes || nodes_.contains(id) || by_key_.contains(node.key))
    return false;
  if ((node.parent == 0) != node.name.empty() || node.name.size() > NAME_MAX || node.name == "." ||
      node.name == ".." || node.name.find('/') != std::string::npos ||
      node.name.find('\0') != std::string::npos)
    return false;
  node.children = node.handles = 0;
  by_key_[node.key] = id;
  nodes_[id] = std::move(node);
  return true;
}

bool Nodes::finish_restore(uint64_t next_id) {
  for (const auto& [id, node] : nodes_) {
    if (id >= next_id) return false;
    if (node.parent == 0) continue;
    const auto parent = nodes_.find(node.parent);
    if (parent == nodes_.end()) return false;
    parent->second.children++;
  }
  // Peel off what has no children, level by level: what is left then goes round in a circle.
  std::unordered_map<uint64_t, uint32_t> left;
  std::vector<uint64_t> leaves;
  for (const auto& [id, node] : nodes_) {
    left[id] = node.children;
    if (node.children == 0) leaves.push_back(id);
  }
  size_t peeled = 0;
  while (!leaves.empty()) {
    const uint64_t parent = nodes_.at(leaves.back()).parent;
    leaves.pop_back();
    peeled++;
    if (parent != 0 && --left[parent] == 0) leaves.push_back(parent);
  }
  next_id_ = next_id;
  return peeled == nodes_.size();
}

}  // namespace lodge::share
