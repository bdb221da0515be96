// The rows of --device, and the look-up.
//
// A mounted device holds its chip first and its registrations after it, so that the registrations, destroyed
// first, wait for accesses that are still inside the chip. To add a device: a class here that puts the chip
// on its buses, its options, one row. Options keep the names of QEMU's command line as aliases where scripts
// already use those.
#include "device/table.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <vector>

#include "base/error.hpp"
#include "device/debug_ports.hpp"
#include "device/pci/mount.hpp"
#include "device/testdev.hpp"
#include "device/virtio/mount.hpp"
#include "device/watchdog.hpp"
#include "machine/layout.hpp"

namespace lodge::device {

namespace {

// --- Rows ---

class MountedDebugConsole final : public MountedDevice {
 public:
  MountedDebugConsole(const DeviceContext& context, const DeviceOptions& options)
      : backend_(context.open_backend(options.text("output"), options.spelled_name("output"), false)),
        console_(*backend_),
        port_(context.ports, options.number("port", 0, 0xffff), 1, console_, "debugcon") {}

 private:
  std::shared_ptr<CharBackend> backend_;
  DebugConsole console_;
  machine::Registration port_;
};

class MountedDebugExit final : public MountedDevice {
 public:
  MountedDebugExit(const DeviceContext& context, const DeviceOptions& options)
      : exit_(context.power),
        ports_(context.ports, options.number("port", 0, 0xffff), options.number("size", 1, 8), exit_,
               "isa-debug-exit") {}

 private:
  DebugExit exit_;
  machine::Registration ports_;
};

class MountedTestdev final : public MountedDevice {
 public:
  explicit MountedTestdev(const DeviceContext& context)
      : testdev_(context.ram, context.line),
        echo_(context.ports, Testdev::echo_port, Testdev::echo_size, testdev_.echo_window(),
              "pc-testdev echo"),
        flush_(context.ports, Testdev::flush_port, Testdev::flush_size, testdev_.flush_window(),
               "pc-testdev flush"),
        byte_(context.ports, Testdev::byte_port, Testdev::byte_size, testdev_.echo_window(),
              "pc-testdev byte"),
        irq_(context.ports, Testdev::irq_port, Testdev::irq_size, testdev_.irq_window(), "pc-testdev irq"),
        memory_(context.memory, Testdev::memory_base, Testdev::memory_size, testdev_.memory_window(),
                "pc-testdev memory") {}
  Savable* savable() noexcept override { return &testdev_; }

 private:
  Testdev testdev_;
  machine::Registration echo_, flush_, byte_, irq_, memory_;
};

class MountedPanicPort final : public MountedDevice {
 public:
  explicit MountedPanicPort(const DeviceContext& context)
      : panic_(context.power), port_(context.ports, machine::layout::pvpanic_port, 1, panic_, "pvpanic") {}

 private:
  PanicPort panic_;
  machine::Registration port_;
};

// What --watchdog and action= take.
std::function<void()> watchdog_action(machine::Power& power, const DeviceOptions& options) {
  const std::string& action = options.text("action");
  using enum machine::PowerRequest;
  if (action == "reset") return [&power] { power.request(reset); };
  if (action == "poweroff") return [&power] { power.request(power_off); };
  if (action == "none") return [] {};  // the guest finds that it has expired
  usage_error("{}: choose reset, poweroff or none", options.spelled("action"));
}

class MountedWatchdog final : public MountedDevice {
 public:
  MountedWatchdog(const DeviceContext& context, const DeviceOptions& options)
      : watchdog_(context.clock, watchdog_action(context.power, options)),
        ports_(context.ports, Watchdog::ports, Watchdog::window_size, watchdog_, "watchdog") {}
  Savable* savable() noexcept override { return &watchdog_; }
  void set_paused(bool paused) noexcept override { watchdog_.set_paused(paused); }

 private:
  Watchdog watchdog_;
  machine::Registration ports_;
};

constexpr std::array watchdog_options{
    OptionSchema{"action", "", "reset", "when the guest lets it expire: reset, poweroff or none"},
};
constexpr std::array debugcon_options{
    OptionSchema{"port", "iobase", "0xe9", "the port to write to"},
    OptionSchema{"output", "", "stdio", "where it prints: stdio, file:PATH or null"},
};
constexpr std::array debug_exit_options{
    OptionSchema{"port", "iobase", "0x501", "the first port"},
    OptionSchema{"size", "iosize", "2", "how many ports, 1 to 8"},
};

constexpr std::array own_rows{
    DeviceDescriptor{
        "debugcon", "prints the bytes that the guest writes to a port", debugcon_options,
        [](const DeviceContext& context, const DeviceOptions& options) -> std::unique_ptr<MountedDevice> {
          return std::make_unique<MountedDebugConsole>(context, options);
        }},
    DeviceDescriptor{
        "isa-debug-exit", "ends the VM with exit status (value << 1) | 1 when the guest writes a port",
        debug_exit_options,
        [](const DeviceContext& context, const DeviceOptions& options) -> std::unique_ptr<MountedDevice> {
          return std::make_unique<MountedDebugExit>(context, options);
        }},
    DeviceDescriptor{
        "pc-testdev",
        "echo ports, interrupt lines and an MMIO window for bare-metal tests",
        {},
        [](const DeviceContext& context, const DeviceOptions&) -> std::unique_ptr<MountedDevice> {
          return std::make_unique<MountedTestdev>(context);
        }},
    DeviceDescriptor{
        "pvpanic",
        "ends the VM with its own exit status when the guest's kernel panics (Linux: module pvpanic-mmio)",
        {},
        [](const DeviceContext& context, const DeviceOptions&) -> std::unique_ptr<MountedDevice> {
          return std::make_unique<MountedPanicPort>(context);
        }},
    DeviceDescriptor{
        "watchdog", "acts when the guest hangs (Linux: module wdat_wdt, /dev/watchdog0)", watchdog_options,
        [](const DeviceContext& context, const DeviceOptions& options) -> std::unique_ptr<MountedDevice> {
          return std::make_unique<MountedWatchdog>(context, options);
        }},
};

template <class Rows>
std::string names_of(const Rows& named) {
  std::string names;
  for (const auto& row : named) names += fmt::format("{}{}", names.empty() ? "" : ", ", row.name);
  return names;
}

}  // namespace

// --- Look-up ---

// This folder's rows and those of the folders below it, which keep their own.
std::span<const DeviceDescriptor> device_table() noexcept {
  static const std::vector<DeviceDescriptor> all = [] {
    std::vector<DeviceDescriptor> joined(own_rows.begin(), own_rows.end());
    for (const auto& rows : {pci::rows(), virtio::rows()})
      joined.insert(joined.end(), rows.begin(), rows.end());
    return joined;
  }();
  return all;
}

bool created_first(std::string_view name) noexcept {
  return std::ranges::any_of(device_table(),
                             [name](const auto& row) { return row.first && row.name == name; });
}

const std::string& DeviceOptions::text(std::string_view name) const {
  return values_.at(std::string(name));
}

std::string DeviceOptions::spelled_name(std::string_view name) const {
  return spelling_.gives(name) ? spelling_.option : fmt::format("{},{}", spelling_.option, name);
}

std::string DeviceOptions::spelled(std::string_view name) const {
  return spelling_.gives(name) ? spelling_.option : fmt::format("{}={}", spelled_name(name), text(name));
}

uint64_t DeviceOptions::number(std::string_view name, uint64_t minimum, uint64_t maximum) const {
  std::string_view value = text(name);
  int base = value.starts_with("0x") || value.starts_with("0X") ? 16 : 10;
  std::string_view digits = base == 16 ? value.substr(2) : value;
  uint64_t number = 0;
  auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), number, base);
  // The limits as people write such a number: like its default, or like this one.
  const auto schema = std::ranges::find(schemas_, name, &OptionSchema::name);
  const bool hexadecimal = base == 16 || (schema != schemas_.end() && schema->fallback.starts_with("0x"));
  const auto as_given = [hexadecimal](uint64_t limit) {
    return hexadecimal ? fmt::format("{:#x}", limit) : fmt::format("{}", limit);
  };
  if (error != std::errc{} || end != digits.data() + digits.size() || number < minimum || number > maximum)
    usage_error("{}: give a number from {} to {}", spelled(name), as_given(minimum), as_given(maximum));
  return number;
}

uint64_t DeviceOptions::amount(std::string_view name) const {
  const std::string& value = text(name);
  uint64_t number = 0;
  const char* const last = value.data() + value.size();
  auto [end, error] = std::from_chars(value.data(), last, number);
  const auto unit =
      end == last ? std::string_view::npos : std::string_view("KMGT").find(static_cast<char>(*end & ~0x20));
  const unsigned shift = unit == std::string_view::npos ? 0 : 10 * (static_cast<unsigned>(unit) + 1);
  if (error != std::errc{} || end + (shift != 0) != last || number > UINT64_MAX >> shift)
    usage_error("{}: give a number, with K, M, G or T if you like", spelled(name));
  return number << shift;
}

bool DeviceOptions::flag(std::string_view name) const {
  const std::string& value = text(name);
  if (value != "on" && value != "off") usage_error("{}: give on or off", spelled(name));
  return value == "on";
}

std::pair<const DeviceDescriptor*, DeviceOptions> check_device(
    const std::string& name, const std::map<std::string, std::string>& options, Spelling spelling) {
  if (spelling.option.empty()) spelling.option = "--device " + name;
  const DeviceDescriptor* row = nullptr;
  for (const auto& candidate : device_table())
    if (candidate.name == name) row = &candidate;
  if (!row) usage_error("--device {}: no such device; there are {}", name, names_of(device_table()));

  // Defaults first, under the canonical name: a factory asks for that name only and always finds a value.
  std::map<std::string, std::string> values;
  for (const auto& schema : row->options) values[std::string(schema.name)] = schema.fallback;
  for (const auto& [key, value] : options) {
    const OptionSchema* schema = nullptr;
    for (const auto& candidate : row->options)
      if (key == candidate.name || (!candidate.alias.empty() && key == candidate.alias)) schema = &candidate;
    if (!schema && row->options.empty())
      usage_error("{}: option '{}': it takes no options", spelling.option, key);
    if (!schema)
      usage_error("{}: no option '{}'; there are {}", spelling.option, key, names_of(row->options));
    values[std::string(schema->name)] = value;
  }
  return {row, DeviceOptions(std::move(spelling), row->options, std::move(values))};
}

std::unique_ptr<MountedDevice> create_device(const DeviceContext& context, const std::string& name,
                                             const std::map<std::string, std::string>& options,
                                             Spelling spelling) {
  auto [row, checked] = check_device(name, options, std::move(spelling));
  return row->create(context, checked);
}

}  // namespace lodge::device
