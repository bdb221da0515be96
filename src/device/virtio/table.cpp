// The rows of the VirtIO devices.
#include <fmt/format.h>

#include <algorithm>

#include "base/error.hpp"
#include "device/virtio/balloon.hpp"
#include "device/virtio/block.hpp"
#include "device/virtio/console.hpp"
#include "device/virtio/entropy.hpp"
#include "device/virtio/file_system.hpp"
#include "device/virtio/input.hpp"
#include "device/virtio/mount.hpp"
#include "device/virtio/network_options.hpp"
#include "device/virtio/vsock.hpp"

namespace lodge::device::virtio {

namespace {

constexpr auto entropy_options = options_with_common();

constexpr auto console_options = options_with_common(
    OptionSchema{"console", "", "stdio", "where hvc0 goes: stdio, file:PATH, pty or null"},
    OptionSchema{"port1", "", "", "a named port: NAME:WHERE, in the guest /dev/virtio-ports/NAME"},
    OptionSchema{"port2", "", "", "another"}, OptionSchema{"port3", "", "", "another"});

// "NAME:WHERE"
Console::PortConfig named_port(const DeviceContext& context, const DeviceOptions& options,
                               std::string_view option) {
  const std::string& text = options.text(option);
  const size_t colon = text.find(':');
  if (colon == 0 || colon == std::string::npos || colon > 64)
    usage_error("{}: give NAME:WHERE, for example org.example.agent:pty", options.spelled(option));
  return {text.substr(0, colon),
          context.open_backend(text.substr(colon + 1), options.spelled_name(option), true)};
}

std::unique_ptr<MountedDevice> make_console(const DeviceContext& context, const DeviceOptions& options) {
  std::vector<Console::PortConfig> ports;
  ports.push_back({"", context.open_backend(options.text("console"), options.spelled_name("console"), true)});
  for (const char* name : {"port1", "port2", "port3"})
    if (!options.text(name).empty()) ports.push_back(named_port(context, options, name));
  auto console = std::make_unique<Console>(context.ram, std::move(ports), ring_features(options));
  Console& device = *console;
  auto mounted = mount(context, options, std::move(console));
  device.connect_backends();
  return mounted;
}

constexpr auto block_options = options_with_common(
    OptionSchema{"file", "", "", "the disk image"}, OptionSchema{"format", "", "auto", "raw or qcow2"},
    OptionSchema{"readonly", "", "off", "the guest cannot write"},
    OptionSchema{"snapshot", "", "off", "changes are thrown away at the end"},
    OptionSchema{"serial", "", "", "serial number that the guest sees, at most 20 characters"},
    OptionSchema{"queues", "num-queues", "0", "request queues, 1 to 16; 0: one for each processor"},
    OptionSchema{"id", "", "", "what the control socket calls the disk; else disk0, disk1..."},
    OptionSchema{"iops", "", "0", "requests a second, at most; 0: no limit"},
    OptionSchema{"bps", "", "0", "bytes a second, at most; with K, M, G if you like"},
    OptionSchema{"iops-burst", "", "0", "requests that may come at once; 0: a tenth of a second's"},
    OptionSchema{"bps-burst", "", "0", "bytes that may come at once; 0: a tenth of a second's"});

// A disk also answers to the machine's owner.
class MountedDisk final : public MountedDevice {
 public:
  MountedDisk(std::unique_ptr<MountedDevice> mounted, Disk& disk)
      : mounted_(std::move(mounted)), disk_(disk) {}
  Savable* savable() noexcept override { return mounted_->savable(); }
  Device* virtio_device() noexcept override { return mounted_->virtio_device(); }
  Disk* disk() noexcept override { return &disk_; }

 private:
  std::unique_ptr<MountedDevice> mounted_;
  Disk& disk_;  // in it
};

block::RateLimits rate_limits(const DeviceOptions& options) {
  const block::RateLimits limits{options.amount("iops"), options.amount("bps"), options.amount("iops-burst"),
                                 options.amount("bps-burst")};
  if ((limits.operations_burst && !limits.operations) || (limits.bytes_burst && !limits.bytes))
    usage_error("{}: a burst needs its limit; give iops= with iops-burst=, bps= with bps-burst=",
                options.spelled());
  return limits;
}

std::unique_ptr<MountedDevice> make_block(const DeviceContext& context, const DeviceOptions& options) {
  if (options.text("file").empty())
    usage_error("{}: the image is missing; give file=PATH", options.spelled());
  if (options.text("serial").size() > Block::max_serial)
    usage_error("{}: give at most {} characters", options.spelled("serial"), Block::max_serial);
  block::OpenOptions open;
  if (options.text("format") != "auto") open.format = options.text("format");
  open.read_only = options.flag("readonly");
  open.temporary = options.flag("snapshot");
  open.limits = rate_limits(options);
  auto queues = static_cast<unsigned>(options.number("queues", 0, Block::max_queues));
  if (queues == 0) queues = std::min(context.cpus, Block::max_queues);
  auto image = context.open_disk(options.text("file"), open);
  auto block = std::make_unique<Block>(context.ram, std::move(image),
                                       Block::Config{options.text("serial"), queues, options.text("id")},
                                       ring_features(options));
  Block& disk = *block;
  return std::make_unique<MountedDisk>(mount(context, options, std::move(block), Served::by_itself), disk);
}

constexpr auto vsock_options =
    options_of_modern(OptionSchema{"cid", "guest-cid", "3", "the guest's number, 3 to 0xfffffffe"},
                      OptionSchema{"path", "uds_path", "",
                                   "the Unix socket for programs of the host; PATH_PORT for the guest's"});

std::unique_ptr<MountedDevice> make_vsock(const DeviceContext& context, const DeviceOptions& options) {
  const std::string& path = options.text("path");
  if (path.empty() || path.size() > Vsock::max_path)
    usage_error("{}: give the path of a Unix socket, 1 to {} characters", options.spelled("path"),
                Vsock::max_path);
  const auto cid =
      static_cast<uint32_t>(options.number("cid", Vsock::first_guest_cid, Vsock::last_guest_cid));
  return mount(context, options, std::make_unique<Vsock>(context.ram, cid, path, ring_features(options)),
               Served::by_itself);
}

constexpr auto balloon_options = options_with_common(
    OptionSchema{"inflate", "", "0", "MiB that the guest is asked to do without from the start"},
    OptionSchema{"squeeze", "", "on",
                 "inflated for a moment when the guest has freed much, so that the host gets it soon"});

constexpr auto file_system_options = options_of_modern(
    OptionSchema{"path", "", "", "the folder of the host"},
    OptionSchema{"tag", "", "", "the name by which the guest mounts it, at most 36 characters"},
    OptionSchema{"readonly", "", "off", "the guest cannot change anything"},
    OptionSchema{"owner", "", "0:0",
                 "without root: whose the files of the host's user are in the guest, UID:GID"});

std::unique_ptr<MountedDevice> make_file_system(const DeviceContext& context, const DeviceOptions& options) {
  const std::string& tag = options.text("tag");
  if (options.text("path").empty())
    usage_error("{}: the folder is missing; give path=FOLDER", options.spelled());
  if (tag.empty() || tag.size() > FileSystem::max_tag)
    usage_error("{}: give a tag of 1 to {} characters", options.spelled("tag"), FileSystem::max_tag);
  share::FuseServer::Config config;
  config.read_only = options.flag("readonly");
  config.owners = share::owners_of_process(options.spelled_name("owner"), options.text("owner"));
  config.max_handles = FileSystem::files_that_may_be_open();
  auto folder = std::make_shared<share::Folder>(options.text("path"));
  return mount(
      context, options,
      std::make_unique<FileSystem>(context.ram, std::move(folder), tag, config, ring_features(options)),
      Served::by_itself);
}

constexpr auto input_options = options_of_modern();

template <Input::Kind kind>
std::unique_ptr<MountedDevice> make_input(const DeviceContext& context, const DeviceOptions& options) {
  return mount(context, options, std::make_unique<Input>(context.ram, kind, ring_features(options)));
}

constexpr std::array table{
    DeviceDescriptor{
        "virtio-balloon", "gives memory that the guest does not use back to the host", balloon_options,
        [](const DeviceContext& context, const DeviceOptions& options) -> std::unique_ptr<MountedDevice> {
          auto balloon = std::make_unique<Balloon>(context.ram, ring_features(options));
          if (options.flag("squeeze")) balloon->collect_free_memory(context.clock);
          balloon->set_target(options.number("inflate", 0, 1u << 24) << 20);
          return mount(context, options, std::move(balloon));
        }},
    DeviceDescriptor{"virtio-blk", "a disk image (Linux: /dev/vda)", block_options, make_block},
    DeviceDescriptor{"virtio-console", "a console (Linux: hvc0) and named ports", console_options,
                     make_console},
    DeviceDescriptor{"virtio-fs", "a folder of the host (Linux: mount -t virtiofs TAG DIRECTORY)",
                     file_system_options, make_file_system},
    DeviceDescriptor{"virtio-keyboard",
                     "a keyboard, whose keys the control socket presses (lodge ctl send-key)", input_options,
                     make_input<Input::Kind::keyboard>},
    DeviceDescriptor{"virtio-net", "a network card (Linux: eth0)", network_options, make_network},
    DeviceDescriptor{
        "virtio-rng", "random numbers from the host (Linux: /dev/hwrng)", entropy_options,
        [](const DeviceContext& context, const DeviceOptions& options) -> std::unique_ptr<MountedDevice> {
          return mount(context, options, std::make_unique<Entropy>(context.ram, ring_features(options)));
        }},
    DeviceDescriptor{"virtio-tablet", "a pointer that the control socket puts anywhere (lodge ctl pointer)",
                     input_options, make_input<Input::Kind::tablet>},
    DeviceDescriptor{"virtio-vsock", "sockets between guest and host (Linux: AF_VSOCK)", vsock_options,
                     make_vsock},
};

}  // namespace

std::span<const DeviceDescriptor> rows() noexcept {
  return table;
}

}  // namespace lodge::device::virtio
