// Where control sockets are, who may use them, and which machines run.
//
// A machine named NAME has $XDG_RUNTIME_DIR/lodge/NAME.sock; without that variable the directory is
// /run/user/UID/lodge, or else /tmp/lodge-UID. Directories have mode 0700 and sockets 0600: the owner alone.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

#include "base/fd.hpp"

namespace lodge::vm::control {

// The directory of named sockets; made when it is missing and `create`. Throws UsageError when it cannot be
// had, or belongs to somebody else.
std::string socket_directory(bool create);
// Throws UsageError when `name` cannot name a file.
std::string socket_path(const std::string& name);
// What a person gives to `lodge ctl`: a path when there is a '/' in it, and else a name.
std::string path_of(const std::string& name_or_path);

// A socket that is listened at; the file goes with the object.
class Listener {
 public:
  // A socket that nobody listens at any more is replaced. Throws UsageError when another process has it, or
  // when the path is no socket's.
  explicit Listener(const std::string& path);
  ~Listener();
  Listener(const Listener&) = delete;
  Listener& operator=(const Listener&) = delete;

  int fd() const noexcept { return fd_.get(); }  // non-blocking
  const std::string& path() const noexcept { return path_; }

 private:
  std::string path_;
  Fd fd_;
  dev_t device_ = 0;
  ino_t inode_ = 0;
};

// A blocking connection. Throws UsageError when there is no machine.
Fd connect_to(const std::string& path);

struct Named {
  std::string name, path;
};
// The sockets of the directory at which somebody listens, by name. Those of machines that were killed are
// removed.
std::vector<Named> named_sockets();

}  // namespace lodge::vm::control
