// User-mode networking: a NAT by libslirp inside the process. Needs no privilege and changes nothing on the
// host.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "net/backend.hpp"

namespace lodge::net {

// One port of the host that leads into the guest.
struct Forward {
  bool udp = false;
  std::string host = "127.0.0.1";  // the host's address to listen on
  uint16_t host_port = 0, guest_port = 0;
  bool operator==(const Forward&) const = default;
};
// "2222:22", "udp:5353:53", "0.0.0.0:8080:80". Throws UsageError naming `option`.
Forward parse_forward(std::string_view option, std::string_view text);

// The guest is 10.0.2.15 by DHCP, the host 10.0.2.2 (its own 127.0.0.1 appears there), DNS 10.0.2.3; the same
// with fec0:: in IPv6. Throws UsageError when a port cannot be listened on, std::system_error when the host
// has no thread. `mtu`, up to max_user_mtu, is that of the network and proposed to the guest: the longer its
// packets, the fewer of them go through libslirp. Its TCP windows end at 64 KiB, though, and few packets to a
// window leave one side waiting for the other.
inline constexpr uint16_t min_user_mtu = 1280, max_user_mtu = 65521, default_user_mtu = 9000;
std::unique_ptr<Backend> open_user_network(const std::vector<Forward>& forwards,
                                           uint16_t mtu = default_user_mtu);

}  // namespace lodge::net
