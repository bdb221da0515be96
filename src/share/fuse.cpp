// FUSE protocol 7.31 and later (Linux include/uapi/linux/fuse.h; fs/fuse is the other side).
//
// Modelled: names, attributes, links, files, directories, positions of holes, allocation. The guest's kernel
// checks permissions (virtio-fs mounts have default_permissions) and the host's kernel checks those of this
// process. Names and attributes may be cached for a second, file contents until a file is opened again or
// seen to have changed. Refused: device nodes (EPERM), extended attributes, ACLs, ioctl, poll, remote locks
// (ENOSYS: the guest locks among its own processes).
#include "share/fuse.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/statfs.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <climits>
#include <cstdio>
#include <cstring>

#include "base/error.hpp"

namespace lodge::share {

namespace {

constexpr uint32_t oldest_minor = 31, newest_minor = 38;
constexpr uint32_t max_pages = 256, page_size = 4096;
// A request's arguments without data: a symbolic link's name and target are the longest.
constexpr size_t max_body = NAME_MAX + PATH_MAX + 256;
constexpr uint64_t cache_seconds = 1;
constexpr uint32_t nobody = 65534;
constexpr uint32_t init_flags = FUSE_ASYNC_READ | FUSE_ATOMIC_O_TRUNC | FUSE_BIG_WRITES |
                                FUSE_AUTO_INVAL_DATA | FUSE_DO_READDIRPLUS | FUSE_READDIRPLUS_AUTO |
                                FUSE_PARALLEL_DIROPS | FUSE_MAX_PAGES;

}  // namespace

Owners owners_of_process(std::string_view option, const std::string& guest) {
  Owners owners{::geteuid() != 0, ::geteuid(), ::getegid()};
  const char* const last = guest.data() + guest.size();
  const auto uid = std::from_chars(guest.data(), last, owners.guest_uid);
  const auto gid = std::from_chars(std::min(uid.ptr + 1, last), last, owners.guest_gid);
  // The largest number means "nobody in particular" to chown(2).
  if (uid.ec != std::errc{} || uid.ptr == last || *uid.ptr != ':' || gid.ec != std::errc{} ||
      gid.ptr != last || owners.guest_uid == UINT32_MAX || owners.guest_gid == UINT32_MAX)
    usage_error("{}={}: give UID:GID, for example 1000:1000", option, guest);
  return owners;
}

namespace {

FileKey key_of_root(const Folder& folder) {
  struct statx status {};
  if (const int error = status_of(folder.fd(), status)) throw_errno(error, "statx of a shared folder");
  return key_of(status);
}

}  // namespace

FuseServer::FuseServer(std::shared_ptr<const Folder> folder, const Config& config)
    : folder_(std::move(folder)), config_(config), nodes_(key_of_root(*folder_)) {}

FuseServer::~FuseServer() = default;

void FuseServer::reset() noexcept {
  handles_.clear();
  nodes_.clear();
  initialised_ = false;
}

// --- Requests

int FuseServer::Call::take_text(std::string& out, size_t longest) noexcept {
  const auto end = std::ranges::find(body, uint8_t{0});
  if (end == body.end()) return EINVAL;
  out.assign(body.begin(), end);
  body = body.subspan(out.size() + 1);
  if (out.empty()) return EINVAL;
  return out.size() > longest ? ENAMETOOLONG : 0;
}

int FuseServer::Call::take_name(std::string& out) noexcept {
  if (const int error = take_text(out, NAME_MAX)) return error;
  return out == "." || out == ".." || out.find('/') != std::string::npos ? EINVAL : 0;
}

int FuseServer::Call::answer(const void* data, size_t size) noexcept {
  if (room() < size) return EINVAL;
  message.write(answered, {static_cast<const uint8_t*>(data), size});
  answered += size;
  return 0;
}

FuseServer::Handler FuseServer::handler_of(uint32_t opcode) noexcept {
  switch (opcode) {
    case FUSE_LOOKUP: return &FuseServer::lookup;
    case FUSE_GETATTR: return &FuseServer::get_attributes;
    case FUSE_SETATTR: return &FuseServer::set_attributes;
    case FUSE_READLINK: return &FuseServer::read_link;
    case FUSE_SYMLINK: return &FuseServer::make_symlink;
    case FUSE_MKNOD: return &FuseServer::make_node;
    case FUSE_MKDIR: return &FuseServer::make_directory;
    case FUSE_UNLINK: return &FuseServer::unlink;
    case FUSE_RMDIR: return &FuseServer::remove_directory;
    case FUSE_RENAME: return &FuseServer::rename;
    case FUSE_RENAME2: return &FuseServer::rename2;
    case FUSE_LINK: return &FuseServer::link;
    case FUSE_OPEN: return &FuseServer::open_file;
    case FUSE_READ: return &FuseServer::read;
    case FUSE_WRITE: return &FuseServer::write;
    case FUSE_STATFS: return &FuseServer::file_system_status;
    case FUSE_RELEASE:
    case FUSE_RELEASEDIR: return &FuseServer::release;
    case FUSE_FSYNC:
    case FUSE_FSYNCDIR: return &FuseServer::sync;
    case FUSE_SYNCFS: return &FuseServer::sync_all;
    case FUSE_INIT: return &FuseServer::init;
    case FUSE_DESTROY: return &FuseServer::destroy;
    case FUSE_OPENDIR: return &FuseServer::open_directory;
    case FUSE_READDIR: return &FuseServer::read_directory;
    case FUSE_READDIRPLUS: return &FuseServer::read_directory_plus;
    case FUSE_CREATE: return &FuseServer::create;
    case FUSE_FALLOCATE: return &FuseServer::allocate;
    case FUSE_LSEEK: return &FuseServer::seek;
    default: return nullptr;  // ENOSYS: Linux does without, and does not ask again
  }
}

// Opening for writing is seen to where files are opened.
bool FuseServer::changes_files(uint32_t opcode) noexcept {
  switch (opcode) {
    case FUSE_SETATTR:
    case FUSE_SYMLINK:
    case FUSE_MKNOD:
    case FUSE_MKDIR:
    case FUSE_UNLINK:
    case FUSE_RMDIR:
    case FUSE_RENAME:
    case FUSE_RENAME2:
    case FUSE_LINK:
    case FUSE_WRITE:
    case FUSE_CREATE:
    case FUSE_FALLOCATE: return true;
    default: return false;
  }
}

uint32_t FuseServer::serve(Message& message) noexcept {
  Call call{.message = message};
  if (message.read(0, {reinterpret_cast<uint8_t*>(&call.header), sizeof call.header}) != sizeof call.header)
    return 0;
  if (call.header.opcode == FUSE_FORGET || call.header.opcode == FUSE_BATCH_FORGET ||
      call.header.opcode == FUSE_INTERRUPT) {
    forget(message, call.header);
    return 0;
  }
  if (message.room() < sizeof(fuse_out_header)) return 0;
  const int error = dispatch(call);
  if (error != 0) call.answered = sizeof(fuse_out_header);
  const fuse_out_header out{static_cast<uint32_t>(call.answered), -error, call.header.unique};
  message.write(0, {reinterpret_cast<const uint8_t*>(&out), sizeof out});
  return out.len;
}

int FuseServer::dispatch(Call& call) noexcept {
  if (call.header.len < sizeof call.header || call.header.len > call.message.request_size()) return EINVAL;
  size_t size = call.header.len - sizeof call.header;
  if (call.header.opcode == FUSE_WRITE) size = std::min(size, sizeof(fuse_write_in));
  if (size > max_body) return E2BIG;
  body_.resize(size);
  call.message.read(sizeof call.header, body_);
  call.body = body_;
  const Handler handler = handler_of(call.header.opcode);
  if (!handler) return ENOSYS;
  if (!initialised_ && call.header.opcode != FUSE_INIT) return EPROTO;
  if (config_.read_only && changes_files(call.header.opcode)) return EROFS;
  return (this->*handler)(call);
}

// An INTERRUPT is for requests that wait for others; none does here.
void FuseServer::forget(Message& message, const fuse_in_header& header) noexcept {
  uint64_t at = sizeof header;
  if (header.opcode == FUSE_FORGET) {
    fuse_forget_in in{};
    if (message.read(at, {reinterpret_cast<uint8_t*>(&in), sizeof in}) == sizeof in)
      nodes_.forget(header.nodeid, in.nlookup);
  } else if (header.opcode == FUSE_BATCH_FORGET) {
    fuse_batch_forget_in in{};
    if (message.read(at, {reinterpret_cast<uint8_t*>(&in), sizeof in}) != sizeof in) return;
    at += sizeof in;
    fuse_forget_one one{};
    for (uint32_t i = 0; i < in.count; i++, at += sizeof one) {
      if (message.read(at, {reinterpret_cast<uint8_t*>(&one), sizeof one}) != sizeof one) return;
      nodes_.forget(one.nodeid, one.nlookup);
    }
  }
}

// --- The session

int FuseServer::init(Call& call) {
  struct {
    uint32_t major, minor, max_readahead, flags;
  } in{};
  if (!call.take(in)) return EINVAL;
  fuse_init_out out{};
  out.major = FUSE_KERNEL_VERSION;
  out.minor = std::min(in.minor, newest_minor);
  if (in.major > FUSE_KERNEL_VERSION) return call.answer(out);  // it asks again with our major
  if (in.major < FUSE_KERNEL_VERSION || in.minor < oldest_minor) return EPROTO;
  reset();  // a guest that starts anew knows nothing
  out.max_readahead = in.max_readahead;
  out.flags = in.flags & init_flags;
  out.max_background = 64;
  out.congestion_threshold = 48;
  out.max_write = max_pages * page_size;
  out.max_pages = max_pages;
  out.time_gran = 1;
  initialised_ = true;
  return call.answer(out);
}

int FuseServer::destroy(Call&) {
  reset();
  return 0;
}

int FuseServer::file_system_status(Call& call) {
  struct statfs status {};
  if (::fstatfs(folder_->fd(), &status) != 0) return errno;
  fuse_statfs_out out{};
  out.st.blocks = status.f_blocks;
  out.st.bfree = status.f_bfree;
  out.st.bavail = status.f_bavail;
  out.st.files = status.f_files;
  out.st.ffree = status.f_ffree;
  out.st.bsize = static_cast<uint32_t>(status.f_bsize);
  out.st.namelen = static_cast<uint32_t>(status.f_namelen);
  out.st.frsize = static_cast<uint32_t>(status.f_frsize);
  return call.answer(out);
}

// --- Nodes

Opened FuseServer::open_node(uint64_t id, int flags) const {
  const Nodes::Node* node = nodes_.find(id);
  std::string path;
  if (!node || !nodes_.path(id, path)) return {Fd(), ESTALE};
  Opened opened = folder_->open(path, flags);
  if (!opened.fd) {
    // Another file is there by now: the guest looks it up again when it is told so.
    if (opened.error == ENOENT || opened.error == ENOTDIR || opened.error == ELOOP) opened.error = ESTALE;
    return opened;
  }
  struct statx status {};
  const int error = status_of(opened.fd.get(), status);
  if (error != 0) return {Fd(), error};
  if (id != Nodes::root && key_of(status) != node->key) return {Fd(), ESTALE};
  return opened;
}

Opened FuseServer::reach(uint64_t id) const {
  Opened opened = open_node(id, name_only);
  if (opened.fd) return opened;
  const Nodes::Node* node = nodes_.find(id);
  if (!node || node->handles == 0) return opened;
  for (const auto& [number, handle] : handles_) {
    if (handle.node != id || !handle.fd) continue;
    const int copy = ::fcntl(handle.fd.get(), F_DUPFD_CLOEXEC, 0);
    return copy < 0 ? Opened{Fd(), errno} : Opened{Fd(copy), 0};
  }
  return opened;
}

Opened FuseServer::open_parent(const Call& call) const {
  return open_node(call.header.nodeid, name_only | O_DIRECTORY);
}

int FuseServer::enter(int directory, uint64_t parent, const std::string& name, fuse_entry_out& out) {
  struct statx status {};
  if (const int error = status_of(directory, name, status)) return error;
  out.nodeid = nodes_.enter(parent, name, key_of(status));
  if (out.nodeid == 0) return ENFILE;
  out.entry_valid = out.attr_valid = cache_seconds;
  out.attr = attributes_of(status);
  return 0;
}

int FuseServer::answer_entry(Call& call, int directory, const std::string& name) {
  fuse_entry_out out{};
  if (call.room() < sizeof out) return EINVAL;  // before the guest is counted as told
  if (const int error = enter(directory, call.header.nodeid, name, out)) return error;
  return call.answer(out);
}

int FuseServer::lookup(Call& call) {
  std::string name;
  if (const int error = call.take_name(name)) return error;
  const Opened parent = open_parent(call);
  if (!parent.fd) return parent.error;
  return answer_entry(call, parent.fd.get(), name);
}

// --- Attributes

fuse_attr FuseServer::attributes_of(const struct statx& status) const noexcept {
  const Owners& owners = config_.owners;
  fuse_attr out{};
  out.ino = status.stx_ino;
  out.size = status.stx_size;
  out.blocks = status.stx_blocks;
  out.atime = static_cast<uint64_t>(status.stx_atime.tv_sec), out.atimensec = status.stx_atime.tv_nsec;
  out.mtime = static_cast<uint64_t>(status.stx_mtime.tv_sec), out.mtimensec = status.stx_mtime.tv_nsec;
  out.ctime = static_cast<uint64_t>(status.stx_ctime.tv_sec), out.ctimensec = status.stx_ctime.tv_nsec;
  out.mode = status.stx_mode;
  out.nlink = status.stx_nlink;
  out.uid = !owners.mapped ? status.stx_uid : status.stx_uid == owners.host_uid ? owners.guest_uid : nobody;
  out.gid = !owners.mapped ? status.stx_gid : status.stx_gid == owners.host_gid ? owners.guest_gid : nobody;
  out.blksize = status.stx_blksize;
  return out;
}

int FuseServer::answer_attributes(Call& call, const struct statx& status) const {
  fuse_attr_out out{};
  out.attr_valid = cache_seconds;
  out.attr = attributes_of(status);
  return call.answer(out);
}

int FuseServer::get_attributes(Call& call) {
  fuse_getattr_in in{};
  if (!call.take(in)) return EINVAL;
  struct statx status {};
  const auto open = in.getattr_flags & FUSE_GETATTR_FH ? handles_.find(in.fh) : handles_.end();
  if (open != handles_.end() && open->second.fd) {
    if (const int error = status_of(open->second.fd.get(), status)) return error;
    return answer_attributes(call, status);
  }
  const Opened file = reach(call.header.nodeid);
  if (!file.fd) return file.error;
  if (const int error = status_of(file.fd.get(), status)) return error;
  return answer_attributes(call, status);
}

// A descriptor that only names a file takes no fchmod(2); its entry in /proc leads to that very file.
static int change_mode(int fd, uint32_t mode) noexcept {
  return ::chmod(fmt::format("/proc/self/fd/{}", fd).c_str(), mode & 07777) == 0 ? 0 : errno;
}

// -1: as it is.
int FuseServer::change_owner(int fd, uint32_t uid, uint32_t gid) const noexcept {
  constexpr uint32_t same = ~0u;
  const Owners& owners = config_.owners;
  if (owners.mapped) {
    const bool fits = (uid == same || uid == owners.guest_uid) && (gid == same || gid == owners.guest_gid);
    return fits ? 0 : EPERM;
  }
  return ::fchownat(fd, "", uid, gid, AT_EMPTY_PATH) == 0 ? 0 : errno;
}

int FuseServer::change_size(Call& call, const fuse_setattr_in& wanted) {
  if (wanted.valid & FATTR_FH) {
    const Handle* open = handle(wanted.fh, false);
    if (!open) return EBADF;
    return ::ftruncate(open->fd.get(), static_cast<off_t>(wanted.size)) == 0 ? 0 : errno;
  }
  const Nodes::Node* node = nodes_.find(call.header.nodeid);
  if (!node) return ESTALE;
  if (node->key.type != S_IFREG) return EINVAL;
  const Opened file = open_node(call.header.nodeid, O_WRONLY | O_NONBLOCK | O_NOCTTY);
  if (!file.fd) return file.error;
  return ::ftruncate(file.fd.get(), static_cast<off_t>(wanted.size)) == 0 ? 0 : errno;
}

int FuseServer::set_attributes(Call& call) {
  fuse_setattr_in in{};
  if (!call.take(in)) return EINVAL;
  if (in.valid & FATTR_SIZE)
    if (const int error = change_size(call, in)) return error;
  const Opened file = reach(call.header.nodeid);
  if (!file.fd) return file.error;
  struct statx status {};
  if (const int error = status_of(file.fd.get(), status)) return error;
  if (in.valid & (FATTR_UID | FATTR_GID)) {
    const uint32_t uid = in.valid & FATTR_UID ? in.uid : ~0u, gid = in.valid & FATTR_GID ? in.gid : ~0u;
    if (const int error = change_owner(file.fd.get(), uid, gid)) return error;
  }
  if (in.valid & FATTR_MODE) {
    if (S_ISLNK(status.stx_mode)) return EOPNOTSUPP;
    if (const int error = change_mode(file.fd.get(), in.mode)) return error;
  }
  if (in.valid & (FATTR_ATIME | FATTR_MTIME)) {
    const auto time = [&](uint32_t set, uint32_t now, uint64_t seconds, uint32_t nanoseconds) {
      if (!(in.valid & set)) return timespec{0, UTIME_OMIT};
      if (in.valid & now) return timespec{0, UTIME_NOW};
      return timespec{static_cast<time_t>(seconds), static_cast<long>(nanoseconds % 1'000'000'000)};
    };
    const std::array times = {time(FATTR_ATIME, FATTR_ATIME_NOW, in.atime, in.atimensec),
                              time(FATTR_MTIME, FATTR_MTIME_NOW, in.mtime, in.mtimensec)};
    if (::utimensat(file.fd.get(), "", times.data(), AT_EMPTY_PATH) != 0) return errno;
  }
  if (const int error = status_of(file.fd.get(), status)) return error;
  return answer_attributes(call, status);
}

// --- Making and removing names

int FuseServer::adopt(int fd, const Call& call, uint32_t mode) const noexcept {
  struct statx status {};
  if (const int error = status_of(fd, status)) return error;
  if (!config_.owners.mapped) {
    // A directory with S_ISGID has already given its group.
    const uint32_t gid = status.stx_gid == ::getegid() ? call.header.gid : ~0u;
    if (status.stx_uid != call.header.uid || (gid != ~0u && gid != status.stx_gid))
      if (const int error = change_owner(fd, call.header.uid, gid)) return error;
  }
  if (S_ISLNK(status.stx_mode)) return 0;
  // The guest has applied its umask; ours is nobody's business. And changing the owner takes bits away.
  mode = (mode & 07777) | (S_ISDIR(status.stx_mode) ? status.stx_mode & S_ISGID : 0);
  return change_mode(fd, mode);
}

int FuseServer::adopt_named(int directory, const std::string& name, const Call& call,
                            uint32_t mode) const noexcept {
  const Fd made(::openat(directory, name.c_str(), name_only | O_CLOEXEC));
  return made ? adopt(made.get(), call, mode) : errno;
}

int FuseServer::make_node(Call& call) {
  fuse_mknod_in in{};
  std::string name;
  if (!call.take(in)) return EINVAL;
  if (const int error = call.take_name(name)) return error;
  // The host's devices are not the guest's to name.
  if (!S_ISREG(in.mode) && !S_ISFIFO(in.mode) && !S_ISSOCK(in.mode)) return EPERM;
  const Opened parent = open_parent(call);
  if (!parent.fd) return parent.error;
  if (::mknodat(parent.fd.get(), name.c_str(), (in.mode & S_IFMT) | 0600, 0) != 0) return errno;
  if (const int error = adopt_named(parent.fd.get(), name, call, in.mode)) return error;
  return answer_entry(call, parent.fd.get(), name);
}

int FuseServer::make_directory(Call& call) {
  fuse_mkdir_in in{};
  std::string name;
  if (!call.take(in)) return EINVAL;
  if (const int error = call.take_name(name)) return error;
  const Opened parent = open_parent(call);
  if (!parent.fd) return parent.error;
  if (::mkdirat(parent.fd.get(), name.c_str(), 0700) != 0) return errno;
  if (const int error = adopt_named(parent.fd.get(), name, call, in.mode)) return error;
  return answer_entry(call, parent.fd.get(), name);
}

int FuseServer::make_symlink(Call& call) {
  std::string name, target;
  if (const int error = call.take_name(name)) return error;
  if (const int error = call.take_text(target, PATH_MAX - 1)) return error;
  const Opened parent = open_parent(call);
  if (!parent.fd) return parent.error;
  if (::symlinkat(target.c_str(), parent.fd.get(), name.c_str()) != 0) return errno;
  if (const int error = adopt_named(parent.fd.get(), name, call, 0)) return error;
  return answer_entry(call, parent.fd.get(), name);
}

int FuseServer::read_link(Call& call) {
  const Opened link = open_node(call.header.nodeid, name_only);
  if (!link.fd) return link.error;
  std::array<char, PATH_MAX> target;
  const ssize_t size = ::readlinkat(link.fd.get(), "", target.data(), target.size());
  return size < 0 ? errno : call.answer(target.data(), static_cast<size_t>(size));
}

int FuseServer::link(Call& call) {
  fuse_link_in in{};
  std::string name;
  if (!call.take(in)) return EINVAL;
  if (const int error = call.take_name(name)) return error;
  const Nodes::Node* node = nodes_.find(in.oldnodeid);
  if (!node || node->parent == 0) return ESTALE;
  const Opened from = open_node(node->parent, name_only | O_DIRECTORY);
  if (!from.fd) return from.error;
  const Opened to = open_parent(call);
  if (!to.fd) return to.error;
  // Without AT_SYMLINK_FOLLOW: what is linked lies in that directory, whatever it has become.
  if (::linkat(from.fd.get(), node->name.c_str(), to.fd.get(), name.c_str(), 0) != 0) return errno;
  return answer_entry(call, to.fd.get(), name);
}

int FuseServer::remove(Call& call, int flags) {
  std::string name;
  if (const int error = call.take_name(name)) return error;
  const Opened parent = open_parent(call);
  if (!parent.fd) return parent.error;
  struct statx status {};
  if (const int error = status_of(parent.fd.get(), name, status)) return error;
  if (::unlinkat(parent.fd.get(), name.c_str(), flags) != 0) return errno;
  nodes_.unlinked(call.header.nodeid, name, key_of(status));
  return 0;
}

int FuseServer::unlink(Call& call) {
  return remove(call, 0);
}

int FuseServer::remove_directory(Call& call) {
  return remove(call, AT_REMOVEDIR);
}

int FuseServer::rename(Call& call) {
  fuse_rename_in in{};
  return call.take(in) ? rename_to(call, in.newdir, 0) : EINVAL;
}

int FuseServer::rename2(Call& call) {
  fuse_rename2_in in{};
  if (!call.take(in)) return EINVAL;
  // No RENAME_WHITEOUT: that makes a device node.
  if (in.flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE)) return EINVAL;
  return rename_to(call, in.newdir, in.flags);
}

int FuseServer::rename_to(Call& call, uint64_t new_parent, uint32_t flags) {
  std::string name, new_name;
  if (const int error = call.take_name(name)) return error;
  if (const int error = call.take_name(new_name)) return error;
  const Opened from = open_parent(call);
  if (!from.fd) return from.error;
  const Opened to = open_node(new_parent, name_only | O_DIRECTORY);
  if (!to.fd) return to.error;
  struct statx moved {
  }, replaced{};
  if (const int error = status_of(from.fd.get(), name, moved)) return error;
  const bool replaces = status_of(to.fd.get(), new_name, replaced) == 0;
  if (::renameat2(from.fd.get(), name.c_str(), to.fd.get(), new_name.c_str(), flags) != 0) return errno;
  const uint64_t parent = call.header.nodeid;
  if (replaces && key_of(moved) == key_of(replaced) && !(flags & RENAME_EXCHANGE))
    return 0;  // both names stay
  if (replaces && (flags & RENAME_EXCHANGE)) {
    nodes_.renamed(new_parent, new_name, key_of(replaced), parent, name);
  } else if (replaces) {
    nodes_.unlinked(new_parent, new_name, key_of(replaced));
  }
  nodes_.renamed(parent, name, key_of(moved), new_parent, new_name);
  return 0;
}

}  // namespace lodge::share
