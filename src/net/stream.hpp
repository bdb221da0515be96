// A cable between two virtual machines: frames over a Unix or TCP socket, each behind its length, as QEMU's
// `-netdev stream` and `-netdev socket` speak.
#pragma once

#include <memory>
#include <string>

#include "net/backend.hpp"

namespace lodge::net {

struct StreamConfig {
  // One of both: a path (with a '/') or HOST:PORT with a numeric host.
  std::string listen, connect;
  unsigned reconnect_ms = 1000;  // between attempts to connect
  bool operator==(const StreamConfig&) const = default;
};

// The peer may come and go: while there is none, the link is down. One that breaks the protocol is
// disconnected. Throws UsageError when the address is wrong or taken.
std::unique_ptr<Backend> open_stream(const StreamConfig& config);

}  // namespace lodge::net
