// Stream sockets with a name in the file system.
#pragma once

#include <string>

#include "base/fd.hpp"

namespace lodge::net {

// A listening socket; its name goes with the object. Any thread.
class UnixListener {
 public:
  // Non-blocking. Takes over a name that a process has left behind. Throws UsageError naming `option`, also
  // when somebody listens there.
  UnixListener(const std::string& path, const std::string& option);
  ~UnixListener();
  UnixListener(const UnixListener&) = delete;
  UnixListener& operator=(const UnixListener&) = delete;

  int fd() const noexcept { return socket_.get(); }
  // The next client, non-blocking; empty when there is none.
  Fd accept() const noexcept;

 private:
  std::string path_;
  Fd socket_;
};

// A non-blocking connection; empty when nobody takes it at once.
Fd connect_unix(const std::string& path) noexcept;

}  // namespace lodge::net
