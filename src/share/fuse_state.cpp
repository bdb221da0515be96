// The FUSE server's saved state.
#include <fcntl.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "base/state.hpp"
#include "share/fuse.hpp"

namespace lodge::share {

namespace {

struct NodeState {
  static constexpr std::string_view name = "shared node";
  static constexpr unsigned version = 1;
  uint64_t id = 0, device = 0, inode = 0, birth = 0, parent = 0, lookups = 0;
  uint32_t type = 0;
  std::vector<uint8_t> file_name;
  template <class V>
  void visit(V& v) {
    v("id", id), v("file_device", device), v("inode", inode), v("birth", birth), v("type", type);
    v("parent", parent), v("name", file_name), v("lookups", lookups);
  }
};

struct HandleState {
  static constexpr std::string_view name = "shared file";
  static constexpr unsigned version = 1;
  uint64_t number = 0, node = 0;
  uint32_t flags = 0;
  bool directory = false;
  template <class V>
  void visit(V& v) {
    v("number", number), v("node", node), v("flags", flags), v("directory", directory);
  }
};

struct ServerState {
  static constexpr std::string_view name = "shared folder";
  static constexpr unsigned version = 1;
  bool initialised = false;
  uint64_t next_node = 0, next_handle = 0;
  template <class V>
  void visit(V& v) {
    v("initialised", initialised), v("next_node", next_node), v("next_handle", next_handle);
  }
};

}  // namespace

// By number, so that the same table is saved as the same text.
void FuseServer::save(nlohmann::json& json) const {
  save_state(ServerState{initialised_, nodes_.next_id(), next_handle_}, json);
  json["nodes"] = nlohmann::json::array();
  std::vector<uint64_t> ids;
  for (const auto& [id, node] : nodes_.all())
    if (id != Nodes::root) ids.push_back(id);
  std::ranges::sort(ids);
  for (const uint64_t id : ids) {
    const Nodes::Node& node = *nodes_.find(id);
    save_state(NodeState{id,
                         node.key.device,
                         node.key.inode,
                         node.key.birth,
                         node.parent,
                         node.lookups,
                         node.key.type,
                         {node.name.begin(), node.name.end()}},
               json["nodes"].emplace_back());
  }
  json["files"] = nlohmann::json::array();
  for (const auto& [number, handle] : handles_)
    save_state(HandleState{number, handle.node, handle.flags, handle.directory},
               json["files"].emplace_back());
}

void FuseServer::load(const nlohmann::json& json) {
  const auto wrong = [](const char* what) { usage_error("saved state of a shared folder: {}", what); };
  const auto state = load_state<ServerState>(json);
  for (const char* list : {"nodes", "files"})
    if (!json.contains(list) || !json[list].is_array()) wrong("nodes or files are missing");
  if (json["files"].size() > config_.max_handles) wrong("more files are open than this machine allows");
  FuseServer other(folder_, config_);
  for (const auto& entry : json["nodes"]) {
    const auto node = load_state<NodeState>(entry);
    if (!other.nodes_.restore(node.id, {{node.device, node.inode, node.birth, node.type},
                                        node.parent,
                                        {node.file_name.begin(), node.file_name.end()},
                                        node.lookups}))
      wrong("a node is impossible or there twice");
  }
  if (!other.nodes_.finish_restore(state.next_node)) wrong("the nodes are no tree");
  for (const auto& entry : json["files"]) {
    const auto file = load_state<HandleState>(entry);
    const Nodes::Node* node = other.nodes_.find(file.node);
    if (!node || file.number >= state.next_handle || other.handles_.contains(file.number) ||
        file.flags & ~uint32_t{O_ACCMODE | O_APPEND} || file.directory != (node->key.type == S_IFDIR) ||
        (config_.read_only && file.flags & O_ACCMODE))
      wrong("an open file is impossible");
    const int flags = file.directory ? O_RDONLY | O_DIRECTORY : static_cast<int>(file.flags);
    Opened opened{Fd(), ESTALE};
    if (file.directory || node->key.type == S_IFREG)
      opened = other.open_node(file.node, flags | O_NONBLOCK | O_NOCTTY);
    other.nodes_.opened(file.node);
    other.handles_.emplace(file.number, Handle{std::move(opened.fd), file.node, file.flags, file.directory});
  }
  nodes_ = std::move(other.nodes_);
  handles_ = std::move(other.handles_);
  next_handle_ = state.next_handle;
  initialised_ = state.initialised;
}

}  // namespace lodge::share
