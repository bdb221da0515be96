#include "device/virtio/network_options.hpp"

#include <fmt/format.h>

#include <charconv>
#include <cstdio>

#include "base/error.hpp"
#include "device/virtio/network.hpp"

namespace lodge::device::virtio {

namespace {

// Locally administered, and another one for each place.
Mac mac_of(const DeviceOptions& options, unsigned place) {
  std::string text = options.text("mac");
  if (text == "auto") text = fmt::format("{}{:02x}", automatic_mac, static_cast<uint8_t>(place));
  Mac mac{};
  int length = 0;
  const int count = std::sscanf(text.c_str(), "%2hhx:%2hhx:%2hhx:%2hhx:%2hhx:%2hhx%n", &mac[0], &mac[1],
                                &mac[2], &mac[3], &mac[4], &mac[5], &length);
  if (count != 6 || static_cast<size_t>(length) != text.size() || text.size() != 17 || mac[0] & 1 ||
      mac == Mac{})
    usage_error("{}: give six bytes of a single card, for example 52:54:00:12:34:56", options.spelled("mac"));
  return mac;
}

// What is separated by `separator`, without empty pieces.
std::vector<std::string> split(std::string_view text, char separator) {
  std::vector<std::string> pieces;
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find(separator, at), text.size());
    if (end > at) pieces.emplace_back(text.substr(at, end - at));
    at = end + 1;
  }
  return pieces;
}

// An option of one kind of network that was given with another is a mistake.
void refuse_others(const DeviceOptions& options, std::string_view kind,
                   std::initializer_list<std::string_view> names) {
  for (const std::string_view name : names)
    if (!options.text(name).empty())
      usage_error("{}: '{}' means nothing with --net {}; see lodge run --help", options.spelled(), name,
                  kind);
}

net::TapConfig tap_config(const DeviceOptions& options) {
  net::TapConfig tap{.name = options.text("ifname")};
  tap.queues = static_cast<unsigned>(options.number("queues", 1, net::max_tap_queues));
  for (const std::string& text : split(options.text("fd"), ':')) {
    int fd = -1;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), fd);
    if (error != std::errc{} || end != text.data() + text.size() || fd < 3)
      usage_error("{}: give numbers of open descriptors, for example 5:6", options.spelled("fd"));
    tap.fds.push_back(fd);
  }
  if (tap.name.empty() == tap.fds.empty())
    usage_error("{}: give ifname=NAME or fd=NUMBER, for example --net tap,ifname=tap0", options.spelled());
  if (tap.fds.size() > net::max_tap_queues)
    usage_error("{}: at most {} queues", options.spelled("fd"), net::max_tap_queues);
  return tap;
}

net::Config network_config(const DeviceOptions& options, uint16_t mtu) {
  net::Config config;
  const std::string& kind = options.text("net");
  if (kind == "user") {
    refuse_others(options, kind, {"ifname", "fd", "listen", "connect"});
    for (const std::string& text : split(options.text("forward"), '+'))
      config.forwards.push_back(net::parse_forward("--forward", text));
    if (mtu != 0) config.user_mtu = std::min(std::max(mtu, net::min_user_mtu), net::max_user_mtu);
  } else if (kind == "tap") {
    refuse_others(options, kind, {"forward", "listen", "connect"});
    config.kind = net::Config::Kind::tap;
    config.tap = tap_config(options);
  } else if (kind == "stream") {
    refuse_others(options, kind, {"forward", "ifname", "fd"});
    config.kind = net::Config::Kind::stream;
    config.stream = {options.text("listen"), options.text("connect"),
                     static_cast<unsigned>(options.number("reconnect", 10, 3'600'000))};
  } else {
    usage_error("{}: unknown network; choose user, tap or stream", options.spelled("net"));
  }
  if (kind != "tap" && options.number("queues", 1, net::max_tap_queues) != 1)
    usage_error("{}: only a tap has several queues", options.spelled("queues"));
  config.capture = options.text("pcap");
  config.rate = options.amount("rate");
  config.burst = options.amount("burst");
  if (config.burst && !config.rate)
    usage_error("{}: a burst needs its limit; give rate= with burst=", options.spelled());
  return config;
}

}  // namespace

std::unique_ptr<MountedDevice> make_network(const DeviceContext& context, const DeviceOptions& options) {
  Network::Config config{.mac = mac_of(options, place_of(context, options))};
  config.mtu = static_cast<uint16_t>(options.number("mtu", 0, 65535));
  if (config.mtu != 0 && config.mtu < 68) usage_error("{}: give 68 to 65535", options.spelled("mtu"));
  return mount(
      context, options,
      std::make_unique<Network>(context.ram, context.open_network(network_config(options, config.mtu)),
                                config, ring_features(options)),
      Served::by_itself);
}

}  // namespace lodge::device::virtio
