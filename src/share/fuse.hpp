// A FUSE server over a folder: what virtio-fs carries. One request after another, on one thread.
#pragma once

#include <linux/fuse.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "share/folder.hpp"
#include "share/message.hpp"
#include "share/nodes.hpp"

namespace lodge::share {

// Whose files are whose. As root the guest's numbers are the host's. Without root all that the guest makes
// belongs to the host's user, who is `guest_uid` and `guest_gid` to the guest; others are nobody there.
struct Owners {
  bool mapped;
  uint32_t host_uid, host_gid;  // mapped only
  uint32_t guest_uid = 0, guest_gid = 0;
};
// For this process. `guest` is "UID:GID". Throws UsageError naming `option`.
Owners owners_of_process(std::string_view option, const std::string& guest);

class FuseServer {
 public:
  struct Config {
    bool read_only = false;
    Owners owners;
    size_t max_handles = 1024;  // open files and directories; the guest's further ones get ENFILE
  };
  FuseServer(std::shared_ptr<const Folder> folder, const Config& config);
  ~FuseServer();

  // Does what the request asks and writes the answer; returns its size, 0 when the request has none. What is
  // wrong with a request is answered by an error.
  uint32_t serve(Message& message) noexcept;
  // The guest has gone: all its files are closed.
  void reset() noexcept;

  size_t open_files() const noexcept { return handles_.size(); }
  size_t known_nodes() const noexcept { return nodes_.size(); }

  // Nodes by path, open files by node. load() opens them again; what is not there any more answers with
  // errors. Throws UsageError; nothing has changed then.
  void save(nlohmann::json& json) const;
  void load(const nlohmann::json& json);

 private:
  struct Handle {
    Fd fd;  // empty: it could not be opened again after load()
    uint64_t node = 0;
    uint32_t flags = 0;
    bool directory = false;
  };
  // A request as it is worked on: handlers take arguments from `body` and add to the answer.
  struct Call {
    Message& message;
    fuse_in_header header{};
    std::span<const uint8_t> body;  // behind the header; of a write only its argument
    uint64_t answered = sizeof(fuse_out_header);

    template <class Argument>
    bool take(Argument& out) noexcept;
    // The next of the names, each ended by a zero. 0 or errno.
    int take_name(std::string& out) noexcept;
    int take_text(std::string& out, size_t longest) noexcept;
    uint64_t room() const noexcept { return message.room() - answered; }
    // Appends to the answer; EINVAL when it does not fit.
    int answer(const void* data, size_t size) noexcept;
    template <class Struct>
    int answer(const Struct& value) noexcept {
      return answer(&value, sizeof value);
    }
  };
  using Handler = int (FuseServer::*)(Call&);  // 0 or errno
  static Handler handler_of(uint32_t opcode) noexcept;
  static bool changes_files(uint32_t opcode) noexcept;
  int dispatch(Call& call) noexcept;
  void forget(Message& message, const fuse_in_header& header) noexcept;

  // --- fuse.cpp: the session, names and attributes
  int init(Call& call);
  int lookup(Call& call);
  int get_attributes(Call& call);
  int set_attributes(Call& call);
  int read_link(Call& call);
  int make_symlink(Call& call);
  int make_node(Call& call);
  int make_directory(Call& call);
  int unlink(Call& call);
  int remove_directory(Call& call);
  int rename(Call& call);
  int rename2(Call& call);
  int link(Call& call);
  int file_system_status(Call& call);
  int destroy(Call& call);

  // --- fuse_files.cpp: open files and directories
  int open_file(Call& call);
  int open_directory(Call& call);
  int create(Call& call);
  int read(Call& call);
  int write(Call& call);
  int read_directory(Call& call);
  int read_directory_plus(Call& call);
  int release(Call& call);
  int sync(Call& call);
  int sync_all(Call& call);
  int seek(Call& call);
  int allocate(Call& call);

  // --- Helpers
  // Opens what the node was last known to be; ESTALE when it is something else by now.
  Opened open_node(uint64_t id, int flags) const;
  // The same with `name_only`, or one of its open files when it has no name any more.
  Opened reach(uint64_t id) const;
  Opened open_parent(const Call& call) const;
  // Looks `name` up in an open directory and tells the guest of it.
  int enter(int directory, uint64_t parent, const std::string& name, fuse_entry_out& out);
  int answer_entry(Call& call, int directory, const std::string& name);
  int answer_attributes(Call& call, const struct statx& status) const;
  fuse_attr attributes_of(const struct statx& status) const noexcept;
  int remove(Call& call, int flags);
  int rename_to(Call& call, uint64_t new_parent, uint32_t flags);
  int change_owner(int fd, uint32_t uid, uint32_t gid) const noexcept;
  int change_size(Call& call, const fuse_setattr_in& wanted);
  // What was just made belongs to who asked and has exactly the mode that was asked for.
  int adopt(int fd, const Call& call, uint32_t mode) const noexcept;
  int adopt_named(int directory, const std::string& name, const Call& call, uint32_t mode) const noexcept;
  Opened create_in(int directory, const std::string& name, const Call& call, const fuse_create_in& in);
  int list(Call& call, bool plus);
  const Handle* handle(uint64_t number, bool directory) const noexcept;
  int answer_handle(Call& call, Handle handle);

  std::shared_ptr<const Folder> folder_;
  Config config_;
  Nodes nodes_;
  std::map<uint64_t, Handle> handles_;
  uint64_t next_handle_ = 1;
  bool initialised_ = false;
  std::vector<iovec> pieces_;
  std::vector<uint8_t> body_, listing_;
};

// --- For the parts of the server.

template <class Argument>
bool FuseServer::Call::take(Argument& out) noexcept {
  if (body.size() < sizeof out) return false;
  std::memcpy(&out, body.data(), sizeof out);
  body = body.subspan(sizeof out);
  return true;
}

}  // namespace lodge::share
