// What a network card is plugged into, as a user says it, and opening that.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "net/interposer.hpp"
#include "net/stream.hpp"
#include "net/tap.hpp"
#include "net/user.hpp"

namespace lodge::net {

struct Config {
  enum class Kind { user, tap, stream };
  Kind kind = Kind::user;
  std::vector<Forward> forwards;         // of user
  uint16_t user_mtu = default_user_mtu;  // of user
  TapConfig tap;
  StreamConfig stream;
  std::string capture;           // a file for all packets, or empty
  uint64_t rate = 0, burst = 0;  // bytes a second in each direction, and at once; 0: no limit
  bool operator==(const Config&) const = default;
};

// Throws UsageError, which names the option, or std::system_error.
std::unique_ptr<Backend> open_network(const Config& config);

}  // namespace lodge::net
