// The rows of the VirtIO devices.
#include <fmt/format.h>

#include "base/error.hpp"
#include "device/virtio/console.hpp"
#include "device/virtio/entropy.hpp"
#include "device/virtio/mount.hpp"

namespace lodge::device::virtio {

namespace {

constexpr auto entropy_options = options_with_common();

constexpr auto console_options = options_with_common(
    OptionSchema{"console", "", "stdio", "where hvc0 goes: stdio, file:PATH, pty or null"},
    OptionSchema{"port1", "", "", "a named port: NAME:WHERE, in the guest /dev/virtio-ports/NAME"},
    OptionSchema{"port2", "", "", "another"}, OptionSchema{"port3", "", "", "another"});

// "NAME:WHERE"
Console::PortConfig named_port(const DeviceContext& context, std::string_view option,
                               const std::string& text) {
  const std::string spelled = fmt::format("--device virtio-console,{}=", option);
  const size_t colon = text.find(':');
  if (colon == 0 || colon == std::string::npos || colon > 64)
    usage_error("{}{}: give NAME:WHERE, for example org.example.agent:pty", spelled, text);
  return {text.substr(0, colon), context.open_backend(text.substr(colon + 1), spelled, true)};
}

std::unique_ptr<MountedDevice> make_console(const DeviceContext& context, const DeviceOptions& options) {
  std::vector<Console::PortConfig> ports;
  ports.push_back(
      {"", context.open_backend(options.text("console"), "--device virtio-console,console=", true)});
  for (const char* name : {"port1", "port2", "port3"})
    if (!options.text(name).empty()) ports.push_back(named_port(context, name, options.text(name)));
  auto console = std::make_unique<Console>(context.ram, std::move(ports), ring_features(options));
  Console& device = *console;
  auto mounted = mount(context, options, std::move(console));
  device.connect_backends();
  return mounted;
}

constexpr std::array table{
    DeviceDescriptor{"virtio-console", "a console (Linux: hvc0) and named ports", console_options,
                     make_console},
    DeviceDescriptor{
        "virtio-rng", "random numbers from the host (Linux: /dev/hwrng)", entropy_options,
        [](const DeviceContext& context, const DeviceOptions& options) -> std::unique_ptr<MountedDevice> {
          return mount(context, options, std::make_unique<Entropy>(context.ram, ring_features(options)));
        }},
};

}  // namespace

std::span<const DeviceDescriptor> rows() noexcept {
  return table;
}

}  // namespace lodge::device::virtio
