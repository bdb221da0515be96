// The FUSE server's open files and directories.
#include <dirent.h>
#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <climits>
#include <cstring>

#include "share/fuse.hpp"

namespace lodge::share {

namespace {

// What of the guest's flags means something here: O_DIRECT and O_SYNC are its own page cache's affair, and
// nothing else may reach the host.
constexpr uint32_t kept_flags = O_ACCMODE | O_TRUNC | O_APPEND;
constexpr int always = O_NONBLOCK | O_NOCTTY;  // a file that turns into a pipe makes nobody wait
constexpr size_t listing_size = 32 * 1024;

bool writes(uint32_t flags) noexcept {
  return (flags & O_ACCMODE) != O_RDONLY || (flags & O_TRUNC);
}

// Reads or writes all of `pieces`, which are used up, or up to the end or an error; the number of bytes, or
// minus errno when there are none. A short answer to a read would mean the end of the file to a guest.
template <class Transfer>
ssize_t transfer_all(std::vector<iovec>& pieces, Transfer transfer) noexcept {
  ssize_t done = 0;
  for (size_t first = 0; first < pieces.size();) {
    const ssize_t count = transfer(pieces.data() + first, static_cast<int>(pieces.size() - first), done);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return done > 0 ? done : -errno;
    if (count == 0) break;
    done += count;
    auto left = static_cast<size_t>(count);
    while (first < pieces.size() && left >= pieces[first].iov_len) left -= pieces[first++].iov_len;
    if (first == pieces.size()) break;
    pieces[first].iov_base = static_cast<uint8_t*>(pieces[first].iov_base) + left;
    pieces[first].iov_len -= left;
  }
  return done;
}

}  // namespace

// --- Handles

const FuseServer::Handle* FuseServer::handle(uint64_t number, bool directory) const noexcept {
  const auto found = handles_.find(number);
  return found != handles_.end() && found->second.directory == directory && found->second.fd ? &found->second
                                                                                             : nullptr;
}

int FuseServer::answer_handle(Call& call, Handle handle) {
  fuse_open_out out{};
  out.fh = next_handle_;
  if (const int error = call.answer(out)) return error;
  nodes_.opened(handle.node);
  handles_.emplace(next_handle_++, std::move(handle));
  return 0;
}

int FuseServer::open_file(Call& call) {
  fuse_open_in in{};
  if (!call.take(in)) return EINVAL;
  const uint32_t flags = in.flags & kept_flags;
  if (config_.read_only && writes(flags)) return EROFS;
  if (handles_.size() >= config_.max_handles) return ENFILE;
  const Nodes::Node* node = nodes_.find(call.header.nodeid);
  if (!node) return ESTALE;
  if (node->key.type != S_IFREG) return EINVAL;
  // Truncated only when it is known to be the file that was meant.
  Opened file = open_node(call.header.nodeid, static_cast<int>(flags & ~uint32_t{O_TRUNC}) | always);
  if (!file.fd) return file.error;
  if ((flags & O_TRUNC) && ::ftruncate(file.fd.get(), 0) != 0) return errno;
  return answer_handle(call, {std::move(file.fd), call.header.nodeid, flags & ~uint32_t{O_TRUNC}, false});
}

int FuseServer::open_directory(Call& call) {
  if (handles_.size() >= config_.max_handles) return ENFILE;
  Opened directory = open_node(call.header.nodeid, O_RDONLY | O_DIRECTORY | always);
  if (!directory.fd) return directory.error;
  return answer_handle(call, {std::move(directory.fd), call.header.nodeid, O_RDONLY, true});
}

// A new file, or, when the guest allows it, the one that is there.
Opened FuseServer::create_in(int directory, const std::string& name, const Call& call,
                             const fuse_create_in& in) {
  const int flags = static_cast<int>(in.flags & kept_flags) | always | O_NOFOLLOW | O_CLOEXEC;
  Fd made(::openat(directory, name.c_str(), flags | O_CREAT | O_EXCL, 0600));
  if (made) {
    const int error = adopt(made.get(), call, in.mode);
    return error == 0 ? Opened{std::move(made), 0} : Opened{Fd(), error};
  }
  if (errno != EEXIST || (in.flags & O_EXCL)) return {Fd(), errno};
  made.reset(::openat(directory, name.c_str(), flags & ~O_TRUNC));
  if (!made) return {Fd(), errno};
  struct statx status {};
  if (const int error = status_of(made.get(), status)) return {Fd(), error};
  if (!S_ISREG(status.stx_mode)) return {Fd(), EINVAL};
  if ((in.flags & O_TRUNC) && ::ftruncate(made.get(), 0) != 0) return {Fd(), errno};
  return {std::move(made), 0};
}

int FuseServer::create(Call& call) {
  fuse_create_in in{};
  std::string name;
  if (!call.take(in)) return EINVAL;
  if (const int error = call.take_name(name)) return error;
  if (call.room() < sizeof(fuse_entry_out) + sizeof(fuse_open_out)) return EINVAL;
  if (handles_.size() >= config_.max_handles) return ENFILE;
  const Opened parent = open_parent(call);
  if (!parent.fd) return parent.error;
  Opened file = create_in(parent.fd.get(), name, call, in);
  if (!file.fd) return file.error;
  struct statx status {};
  if (const int error = status_of(file.fd.get(), status)) return error;
  fuse_entry_out entry{};
  if (const int error = enter(parent.fd.get(), call.header.nodeid, name, entry)) return error;
  // Somebody else may have put another file in its place.
  if (nodes_.find(entry.nodeid)->key != key_of(status)) {
    nodes_.forget(entry.nodeid, 1);
    return ESTALE;
  }
  call.answer(entry);
  return answer_handle(call,
                       {std::move(file.fd), entry.nodeid, in.flags & kept_flags & ~uint32_t{O_TRUNC}, false});
}

int FuseServer::release(Call& call) {
  fuse_release_in in{};
  if (!call.take(in)) return EINVAL;
  const auto found = handles_.find(in.fh);
  if (found == handles_.end()) return EBADF;
  const uint64_t node = found->second.node;
  handles_.erase(found);
  nodes_.closed(node);
  return 0;
}

// --- Contents

int FuseServer::read(Call& call) {
  fuse_read_in in{};
  if (!call.take(in)) return EINVAL;
  const Handle* open = handle(in.fh, false);
  if (!open) return EBADF;
  pieces_.clear();
  call.message.answer_pieces(call.answered, std::min<uint64_t>(in.size, call.room()), pieces_);
  const ssize_t count = transfer_all(pieces_, [&](const iovec* pieces, int number, ssize_t done) {
    return ::preadv(open->fd.get(), pieces, number, static_cast<off_t>(in.offset) + done);
  });
  if (count < 0) return static_cast<int>(-count);
  call.answered += static_cast<uint64_t>(count);
  return 0;
}

int FuseServer::write(Call& call) {
  fuse_write_in in{};
  if (!call.take(in)) return EINVAL;
  const Handle* open = handle(in.fh, false);
  if (!open) return EBADF;
  const uint64_t data_at = sizeof call.header + sizeof in;
  if (in.size > call.header.len - data_at) return EINVAL;
  pieces_.clear();
  call.message.request_pieces(data_at, in.size, pieces_);
  const ssize_t count = transfer_all(pieces_, [&](const iovec* pieces, int number, ssize_t done) {
    return ::pwritev(open->fd.get(), pieces, number, static_cast<off_t>(in.offset) + done);
  });
  if (count < 0) return static_cast<int>(-count);
  return call.answer(fuse_write_out{static_cast<uint32_t>(count), 0});
}

int FuseServer::sync(Call& call) {
  fuse_fsync_in in{};
  if (!call.take(in)) return EINVAL;
  const Handle* open = handle(in.fh, call.header.opcode == FUSE_FSYNCDIR);
  if (!open) return EBADF;
  const bool data_only = in.fsync_flags & FUSE_FSYNC_FDATASYNC;
  return (data_only ? ::fdatasync(open->fd.get()) : ::fsync(open->fd.get())) == 0 ? 0 : errno;
}

int FuseServer::sync_all(Call&) {
  return ::syncfs(folder_->fd()) == 0 ? 0 : errno;
}

int FuseServer::seek(Call& call) {
  fuse_lseek_in in{};
  if (!call.take(in)) return EINVAL;
  const Handle* open = handle(in.fh, false);
  if (!open) return EBADF;
  if (in.whence != SEEK_DATA && in.whence != SEEK_HOLE) return EINVAL;  // the rest is the guest's own
  const off_t at = ::lseek(open->fd.get(), static_cast<off_t>(in.offset), static_cast<int>(in.whence));
  return at < 0 ? errno : call.answer(fuse_lseek_out{static_cast<uint64_t>(at)});
}

int FuseServer::allocate(Call& call) {
  fuse_fallocate_in in{};
  if (!call.take(in)) return EINVAL;
  const Handle* open = handle(in.fh, false);
  if (!open) return EBADF;
  constexpr uint32_t known = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE;
  if (in.mode & ~known) return EOPNOTSUPP;
  return ::fallocate(open->fd.get(), static_cast<int>(in.mode), static_cast<off_t>(in.offset),
                     static_cast<off_t>(in.length)) == 0
             ? 0
             : errno;
}

// --- Directories

int FuseServer::read_directory(Call& call) {
  return list(call, false);
}

int FuseServer::read_directory_plus(Call& call) {
  return list(call, true);
}

// The positions that guests hand back are the host's own: a directory that changes is read as on the host.
int FuseServer::list(Call& call, bool plus) {
  fuse_read_in in{};
  if (!call.take(in)) return EINVAL;
  const Handle* open = handle(in.fh, true);
  if (!open) return EBADF;
  if (::lseek(open->fd.get(), static_cast<off_t>(in.offset), SEEK_SET) < 0) return errno;
  listing_.resize(listing_size);
  const ssize_t got = ::getdents64(open->fd.get(), listing_.data(), listing_.size());
  if (got < 0) return errno;
  const uint64_t room = std::min<uint64_t>(in.size, call.room());
  uint64_t used = 0;
  const uint64_t node = open->node;
  for (size_t at = 0; at < static_cast<size_t>(got);) {
    const auto* raw = reinterpret_cast<const dirent64*>(listing_.data() + at);
    at += raw->d_reclen;
    const std::string name = raw->d_name;
    const bool itself = name == "." || name == "..";
    const size_t head = (plus ? sizeof(fuse_entry_out) : 0) + sizeof(fuse_dirent);
    const size_t size = FUSE_REC_ALIGN(head + name.size());
    if (used + size > room) break;
    used += size;
    if (plus) {
      fuse_entry_out entry{};  // node 0: the guest looks for itself
      if (itself || enter(open->fd.get(), node, name, entry) != 0) entry = {};
      call.answer(entry);
    }
    // What lies above the folder is not the guest's to know.
    const uint64_t inode = name == ".." && node == Nodes::root ? nodes_.find(node)->key.inode : raw->d_ino;
    call.answer(fuse_dirent{inode, static_cast<uint64_t>(raw->d_off), static_cast<uint32_t>(name.size()),
                            raw->d_type});
    constexpr std::array<char, 8> padding{};
    call.answer(name.data(), name.size());
    call.answer(padding.data(), size - head - name.size());
  }
  return got != 0 && used == 0 ? EINVAL : 0;
}

}  // namespace lodge::share
