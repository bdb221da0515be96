// The network card's row: its options and its factory.
#pragma once

#include "device/virtio/mount.hpp"

namespace lodge::device::virtio {

inline constexpr auto network_options = options_with_common(
    OptionSchema{"net", "", "user", "user (NAT, needs no privilege), tap or stream"},
    OptionSchema{"forward", "", "",
                 "user: ports of the host that lead into the guest: HOST:GUEST, joined by '+'"},
    OptionSchema{"ifname", "", "", "tap: the host's interface; made when there is none"},
    OptionSchema{"fd", "fds", "",
                 "tap: descriptors of an open tap instead, one for each queue, joined by ':'"},
    OptionSchema{"queues", "", "1", "tap: pairs of queues, 1 to 16"},
    OptionSchema{"listen", "", "", "stream: wait for the other end at PATH (with a '/') or HOST:PORT"},
    OptionSchema{"connect", "", "", "stream: go to the other end at PATH or HOST:PORT"},
    OptionSchema{"reconnect", "", "1000", "stream: milliseconds between attempts, 10 to 3600000"},
    OptionSchema{"pcap", "", "", "write all packets to this file (Wireshark, tcpdump -r)"},
    OptionSchema{"rate", "", "0", "bytes a second in each direction, with K, M or G; 0: no limit"},
    OptionSchema{"burst", "", "0", "bytes that may pass at once after a pause; 0: a tenth of a second's"},
    OptionSchema{"mac", "", "auto", "the card's address, for example 52:54:00:12:34:56"},
    OptionSchema{"mtu", "host_mtu", "0", "the largest packet, 68 to 65535; 0: as the network likes it"});

// With what the addresses of cards without mac= begin; the sixth byte is another one for each place.
inline constexpr std::string_view automatic_mac = "52:54:00:4c:4f:";

// Throws UsageError naming the option.
std::unique_ptr<MountedDevice> make_network(const DeviceContext& context, const DeviceOptions& options);

}  // namespace lodge::device::virtio
