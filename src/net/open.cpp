// From the configuration to a back end.
#include "net/config.hpp"

namespace lodge::net {

namespace {

std::unique_ptr<Backend> open_kind(const Config& config) {
  switch (config.kind) {
    case Config::Kind::tap: return open_tap(config.tap);
    case Config::Kind::stream: return open_stream(config.stream);
    case Config::Kind::user: break;
  }
  return open_user_network(config.forwards, config.user_mtu);
}

}  // namespace

std::unique_ptr<Backend> open_network(const Config& config) {
  auto network = open_kind(config);
  if (config.rate != 0) network = limit_rate(std::move(network), {config.rate, config.burst});
  if (!config.capture.empty()) network = capture(std::move(network), config.capture);
  return network;
}

}  // namespace lodge::net
