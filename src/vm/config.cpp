#include "vm/config.hpp"

#include <fmt/format.h>
#include <sys/stat.h>
#include <sys/sysinfo.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <optional>
#include <set>

#include "base/error.hpp"
#include "device/virtio/network_options.hpp"
#include "machine/layout.hpp"

namespace lodge::vm {
namespace {

using machine::layout::KiB, machine::layout::MiB;

constexpr std::array<std::string_view, 5> models = {"host", "x86-64-v1", "x86-64-v2", "x86-64-v3",
                                                    "x86-64-v4"};
constexpr std::array<std::string_view, 3> accelerators = {"auto", "kvm", "soft"};
constexpr unsigned max_serial = 4;
constexpr size_t max_name = 64;
// Below this no kernel can be placed at all: the first MiB belongs to the firmware's areas.
constexpr uint64_t min_memory = 2 * MiB;

template <class Number>
std::optional<Number> number(std::string_view text) {
  Number value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() || text.empty()) return std::nullopt;
  return value;
}

// Takes a piece off `text` up to the next comma. Two commas are one of the piece's own, as for QEMU.
std::string take_piece(std::string_view& text) {
  std::string piece;
  while (!text.empty()) {
    const char c = text.front();
    text.remove_prefix(1);
    if (c == ',') {
      if (!text.starts_with(',')) break;
      text.remove_prefix(1);
    }
    piece += c;
  }
  return piece;
}

// Fails with a reason that a person understands when `path` is not a readable regular file.
uint64_t readable_file(std::string_view option, const std::string& path) {
  struct stat info {};
  if (::stat(path.c_str(), &info) != 0)
    usage_error("{}: cannot open '{}': {}", option, path, std::strerror(errno));
  if (S_ISDIR(info.st_mode)) usage_error("{}: '{}' is a directory; give a file", option, path);
  if (::access(path.c_str(), R_OK) != 0)
    usage_error("{}: cannot read '{}': {}", option, path, std::strerror(errno));
  return static_cast<uint64_t>(info.st_size);
}

void validate_serial(const VmConfig& config) {
  if (config.serial.size() > max_serial)
    usage_error("--serial: given {} times; the machine has {} serial ports", config.serial.size(),
                max_serial);
  const auto stdio = std::ranges::count(config.serial, SerialConfig::Kind::stdio, &SerialConfig::kind);
  if (stdio > 1)
    usage_error(
        "--serial: 'stdio' given {} times; there is one terminal, use file:PATH, pty or null for the others",
        stdio);
}

// What the micro machine does not have. (PCI options are refused by who understands them:
// device/virtio/mount.)
void validate_micro(const VmConfig& config) {
  if (config.serial.size() > 1)
    usage_error("--serial: given {} times; --machine micro has one serial port, --machine pc four",
                config.serial.size());
}

void validate_initrds(const VmConfig& config) {
  uint64_t total = 0;
  for (const auto& initrd : config.initrds) {
    // A multiboot module may have arguments after its path.
    const std::string path =
        ::access(initrd.c_str(), F_OK) == 0 ? initrd : initrd.substr(0, initrd.find(' '));
    const uint64_t size = readable_file("--initrd", path);
    if (size == 0) usage_error("--initrd: '{}' is empty", path);
    total += size;
    if (total >= config.memory) {
      usage_error("--initrd: '{}' ({} MiB) does not fit in --memory ({} MiB); give the machine more", path,
                  (size + MiB - 1) / MiB, config.memory / MiB);
    }
  }
}

}  // namespace

HostLimits host_limits() {
  struct sysinfo info {};
  if (::sysinfo(&info) != 0) throw_errno("sysinfo");
  return {.memory = uint64_t{info.totalram} * info.mem_unit};
}

uint64_t parse_size(std::string_view option, std::string_view text) {
  const auto bad = [&] {
    usage_error("{}: '{}' is not a size; give a number with K, M, G or T, like 512M", option, text);
  };
  if (text.empty()) bad();
  uint64_t unit = MiB;
  std::string_view digits = text;
  const auto suffix = std::string_view("KMGT").find(static_cast<char>(text.back() & ~0x20));
  if (text.back() > '9' && suffix != std::string_view::npos) {
    unit = KiB << (10 * suffix);
    digits.remove_suffix(1);
  }
  const auto value = number<uint64_t>(digits);
  if (!value) bad();
  if (*value > UINT64_MAX / unit) usage_error("{}: '{}' is more than a machine can have", option, text);
  return *value * unit;
}

unsigned parse_cpus(std::string_view option, std::string_view text) {
  const auto value = number<unsigned>(text);
  if (!value || *value < 1 || *value > machine::layout::max_cpus) {
    usage_error("{}: '{}' is not a number of CPUs from 1 to {}", option, text, machine::layout::max_cpus);
  }
  return *value;
}

Accelerator parse_accelerator(std::string_view option, std::string_view text) {
  const auto found = std::ranges::find(accelerators, text);
  if (found == accelerators.end())
    usage_error("{}: unknown accelerator '{}'; choose auto, kvm or soft", option, text);
  return static_cast<Accelerator>(found - accelerators.begin());
}

MachineType parse_machine(std::string_view option, std::string_view text) {
  if (text == "pc") return MachineType::pc;
  if (text == "micro") return MachineType::micro;
  usage_error("{}: unknown machine '{}'; choose pc or micro", option, text);
}

kvm::soft::Engine parse_engine(std::string_view option, std::string_view text) {
  if (text == "translate") return kvm::soft::Engine::translate;
  if (text == "interpret") return kvm::soft::Engine::interpret;
  if (text == "lockstep") return kvm::soft::Engine::lockstep;
  usage_error("{}: unknown engine '{}'; choose translate, interpret or lockstep", option, text);
}

size_t parse_code_cache(std::string_view option, std::string_view text) {
  const uint64_t size = parse_size(option, text);
  // Host code reaches all of the cache by 32-bit displacements.
  if (size < 1ull << 20 || size > 1ull << 30)
    usage_error("{}: {} is out of range; give 1M to 1G", option, text);
  return size;
}

uint64_t parse_huge_pages(std::string_view option, std::string_view text) {
  if (text == "2M" || text == "2m") return 2 * MiB;
  if (text == "1G" || text == "1g") return 1024 * MiB;
  usage_error("{}: '{}' is no size of huge pages; choose 2M or 1G", option, text);
}

machine::MemoryOptions::Transparent parse_transparent(std::string_view option, std::string_view text) {
  using Transparent = machine::MemoryOptions::Transparent;
  if (text == "auto") return Transparent::automatic;
  if (text == "on") return Transparent::on;
  if (text == "off") return Transparent::off;
  usage_error("{}: '{}' is unknown; choose auto, on or off", option, text);
}

std::string_view name_of(Accelerator accelerator) noexcept {
  return accelerators[static_cast<size_t>(accelerator)];
}

SerialConfig parse_serial(std::string_view option, std::string_view text) {
  using Kind = SerialConfig::Kind;
  if (text == "null") return {Kind::null, {}};
  if (text == "stdio") return {Kind::stdio, {}};
  if (text == "pty") return {Kind::pty, {}};
  if (text.starts_with("file:") && text.size() > 5) return {Kind::file, std::string(text.substr(5))};
  usage_error("{}: unknown back end '{}'; choose stdio, file:PATH, pty or null", option, text);
}

DeviceConfig parse_device(std::string_view option, std::string_view text) {
  DeviceConfig device;
  bool first = true;
  while (!text.empty() || first) {
    const std::string part = take_piece(text);
    if (first) {
      first = false;
      if (part.empty() || part.find(',') != std::string::npos)
        usage_error("{}: the device's name is missing; give name,key=value", option);
      device.name = part;
      continue;
    }
    const auto equals = part.find('=');
    if (equals == 0 || equals == std::string_view::npos)
      usage_error("{}: '{}' of device '{}' is not key=value", option, part, device.name);
    if (!device.options.emplace(part.substr(0, equals), part.substr(equals + 1)).second) {
      usage_error("{}: '{}' of device '{}' is given twice", option, part.substr(0, equals), device.name);
    }
  }
  return device;
}

DeviceConfig parse_disk(std::string_view option, std::string_view text) {
  DeviceConfig disk{"virtio-blk", {}};
  for (bool first = true; first || !text.empty(); first = false) {
    const std::string part = take_piece(text);
    const auto equals = std::min(part.find('='), part.size());
    if (part.empty()) usage_error("{}: give FILE[,readonly][,snapshot][,format=raw]...", option);
    const std::string key(first ? "file" : part.substr(0, equals));
    const std::string value(first ? part : equals < part.size() ? part.substr(equals + 1) : "on");
    if (first) disk.spelling = {fmt::format("{} {}", option, value), {"file"}};
    if (!disk.options.emplace(key, value).second) usage_error("{}: '{}' is given twice", option, key);
  }
  return disk;
}

DeviceConfig parse_share(std::string_view option, std::string_view text) {
  DeviceConfig share{"virtio-fs", {}};
  for (bool first = true; first || !text.empty(); first = false) {
    const std::string part = take_piece(text);
    if (first) {
      const auto colon = part.rfind(':');
      if (colon == 0 || colon == std::string_view::npos || colon + 1 == part.size() ||
          part.find(',', colon) != std::string::npos)
        usage_error("{}: '{}' is not PATH:TAG, for example /home/me/src:src", option, part);
      share.spelling = {fmt::format("{} {}", option, part), {"path", "tag"}};
      share.options = {{"path", part.substr(0, colon)}, {"tag", part.substr(colon + 1)}};
      continue;
    }
    const auto equals = std::min(part.find('='), part.size());
    const std::string key(part.substr(0, equals));
    if (key.empty() ||
        !share.options.emplace(key, equals < part.size() ? part.substr(equals + 1) : "on").second)
      usage_error("{}: '{}' is empty or given twice; give PATH:TAG[,readonly][,owner=UID:GID]", option, part);
  }
  return share;
}

DeviceConfig parse_network(std::string_view option, std::string_view text) {
  DeviceConfig card = parse_device(option, fmt::format("virtio-net,net={}", text));
  const std::string& kind = card.options.at("net");
  card.spelling = {fmt::format("{} {}", option, kind), {"net"}};
  if (kind != "user" && kind != "tap" && kind != "stream")
    usage_error("{}: unknown network '{}'; choose user, tap, stream or none", option, kind);
  return card;
}

void check_names(std::span<const DeviceConfig> devices) {
  unsigned nameless = 0;
  bool automatic = false;  // a card without mac=
  std::set<std::string> disks, ports, tags, macs;
  const auto text = [](const DeviceConfig& device, const char* option) {
    const auto found = device.options.find(option);
    return found == device.options.end() ? std::string() : found->second;
  };
  for (const auto& device : devices) {
    if (device.name == "virtio-blk") {
      const std::string id = text(device, "id");
      if (id.empty())
        nameless++;
      else if (!disks.insert(id).second)
        usage_error("--disk: id={} is given twice; every disk needs a name of its own", id);
    } else if (device.name == "virtio-fs") {
      const std::string tag = text(device, "tag");
      if (!tag.empty() && !tags.insert(tag).second)
        usage_error("--share: the tag '{}' is given twice; every share needs one of its own", tag);
    } else if (device.name == "virtio-net") {
      std::string mac = text(device, "mac");
      std::ranges::transform(mac, mac.begin(), [](unsigned char c) { return std::tolower(c); });
      if (mac.empty() || mac == "auto")
        automatic = true;
      else if (!macs.insert(mac).second)
        usage_error("--net: mac={} is given twice; every card needs an address of its own", mac);
    } else if (device.name == "pcie-root-port") {
      ports.insert(text(device, "id"));
    }
  }
  for (const std::string& mac : macs)
    if (automatic && mac.starts_with(device::virtio::automatic_mac))
      usage_error("--net: mac={} may be the address of a card without mac=; choose another", mac);
  for (unsigned i = 0; i < nameless; i++)
    if (const auto name = fmt::format("disk{}", i); !disks.insert(name).second)
      usage_error("--disk: id={} is the name of a disk without one; choose another", name);
  for (const std::string& id : disks)
    if (ports.contains(id))
      usage_error("--disk: id={} is the name of a PCI Express port; choose another", id);
}

bool uses_terminal(const VmConfig& config) noexcept {
  const auto console = [](const DeviceConfig& device) {
    if (device.name != "virtio-console") return false;
    const auto where = device.options.find("console");
    return where == device.options.end() || where->second == "stdio";
  };
  return std::ranges::find(config.serial, SerialConfig::Kind::stdio, &SerialConfig::kind) !=
             config.serial.end() ||
         std::ranges::any_of(config.devices, console);
}

std::span<const std::string_view> cpu_models() noexcept {
  return models;
}

void validate(const VmConfig& config, const HostLimits& limits) {
  if (config.kernel.empty() && config.boot_disk.empty()) {
    usage_error(
        "nothing to run: give a disk image with an installed Linux, or --kernel with the path of a Linux "
        "bzImage, an ELF vmlinux or a multiboot kernel");
  }
  if (config.name.empty() || config.name.size() > max_name ||
      !std::ranges::all_of(config.name, [](unsigned char c) { return c > ' ' && c < 0x7f && c != '/'; })) {
    usage_error("--name: '{}' is not a name of 1 to {} visible ASCII characters without '/'", config.name,
                max_name);
  }
  if (config.cpus < 1 || config.cpus > machine::layout::max_cpus)
    usage_error("--cpus: {} is not a number of CPUs from 1 to {}", config.cpus, machine::layout::max_cpus);
  if (std::ranges::find(models, config.cpu) == models.end())
    usage_error("--cpu: unknown model '{}'; choose one of {}", config.cpu, fmt::join(models, ", "));
  if (config.memory % (4 * KiB) != 0)
    usage_error("--memory: {} bytes is not a multiple of 4K", config.memory);
  if (config.memory < min_memory)
    usage_error("--memory: {} KiB is too little for any kernel; give at least {} MiB", config.memory / KiB,
                min_memory / MiB);
  if (config.memory > limits.memory)
    usage_error("--memory: {} MiB is more than this host's {} MiB; give less", config.memory / MiB,
                limits.memory / MiB);
  machine::check_memory(config.memory, config.memory_options);
  validate_serial(config);
  if (config.machine == MachineType::micro) validate_micro(config);
  for (const auto& device : config.devices)
    device::check_device(device.name, device.options, device.spelling);
  check_names(config.devices);
  if (!config.kernel.empty() && readable_file("--kernel", config.kernel) == 0)
    usage_error("--kernel: '{}' is empty", config.kernel);
  validate_initrds(config);
}

}  // namespace lodge::vm
