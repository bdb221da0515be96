#include "vm/control_commands.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <string_view>

#include "device/virtio/balloon.hpp"
#include "vm/input_commands.hpp"
#include "vm/slot_commands.hpp"

namespace lodge::vm {
namespace {

using control::allow_arguments, control::CommandError, control::Json, control::Request;
using device::virtio::Balloon;

// How long a guest may take to tell its memory statistics before older ones are shown.
constexpr std::chrono::milliseconds balloon_patience(500);

// --- Life

Json query_status(VirtualMachine& machine, const Request& request) {
  allow_arguments(request, {});
  const bool paused = machine.paused();
  return {{"status", paused ? "paused" : "running"}, {"running", !paused}};
}

Json query_name(VirtualMachine& machine, const Request& request) {
  allow_arguments(request, {});
  return {{"name", machine.config().name}};
}

Json lodge_query(VirtualMachine& machine, const Request& request) {
  allow_arguments(request, {});
  const VmConfig& config = machine.config();
  return {{"name", config.name},
          {"pid", ::getpid()},
          {"status", machine.paused() ? "paused" : "running"},
          {"accelerator", machine.accelerator()},
          {"cpus", config.cpus},
          {"memory", config.memory}};
}

Json lodge_statistics(VirtualMachine& machine, const Request& request) {
  allow_arguments(request, {});
  return statistics_json(machine.statistics());
}

Json stop(VirtualMachine& machine, const Request& request) {
  allow_arguments(request, {});
  machine.pause();
  return Json::object();
}

Json cont(VirtualMachine& machine, const Request& request) {
  allow_arguments(request, {});
  machine.resume();
  return Json::object();
}

Json system_reset(VirtualMachine& machine, const Request& request) {
  allow_arguments(request, {});
  machine.reset();
  return Json::object();
}

Json system_powerdown(VirtualMachine& machine, const Request& request) {
  allow_arguments(request, {});
  if (!machine.press_power_button())
    throw CommandError("the guest has no driver that would see its power button; quit ends the machine");
  return Json::object();
}

Json quit(VirtualMachine& machine, const Request& request) {
  allow_arguments(request, {});
  machine.end();
  return Json::object();
}

// --- Memory

void with_balloon(VirtualMachine& machine, const std::function<void(Balloon&)>& use) {
  machine.with_machine([&](Machine& present) {
    auto* balloon = present.find_device<Balloon>();
    if (!balloon) throw CommandError("the machine has no balloon", "DeviceNotActive");
    use(*balloon);
  });
}

Json set_balloon(VirtualMachine& machine, const Request& request) {
  allow_arguments(request, {"value"});
  // QEMU's command says how much memory the guest shall have, not how large the balloon is.
  const uint64_t size = machine.config().memory;
  const uint64_t value = control::number_argument(request, "value", size);
  with_balloon(machine, [&](Balloon& balloon) { balloon.set_target(size - value); });
  return Json::object();
}

Json guest_memory_json(const Balloon::Statistics& statistics) {
  constexpr std::array<const char*, Balloon::statistic_tags> names = {
      "swap_in", "swap_out",  "major_faults", "minor_faults",   "free",
      "total",   "available", "disk_caches",  "hugetlb_allocs", "hugetlb_failures"};
  Json json = Json::object();
  for (size_t tag = 0; tag < names.size(); tag++)
    if (statistics[tag] != UINT64_MAX) json[names[tag]] = statistics[tag];
  return json;
}

Json query_balloon(VirtualMachine& machine, const Request& request) {
  allow_arguments(request, {});
  Json json;
  with_balloon(machine, [&](Balloon& balloon) {
    balloon.refresh_statistics(balloon_patience);
    const uint64_t actual = balloon.actual(), size = machine.config().memory;
    json = {{"actual", size - std::min(actual, size)},
            {"balloon", {{"target", balloon.target()}, {"actual", actual}, {"released", balloon.released()}}},
            {"guest", guest_memory_json(balloon.statistics())}};
  });
  return json;
}

const char* name_of(Balloon::Hinting state) {
  switch (state) {
    case Balloon::Hinting::none: return "none";
    case Balloon::Hinting::asked: return "asked";
    case Balloon::Hinting::running: return "running";
    case Balloon::Hinting::complete: return "complete";
  }
  return "none";
}

Json lodge_balloon_hint(VirtualMachine& machine, const Request& request) {
  allow_arguments(request, {"action"});
  const std::string action = control::text_argument(request, "action");
  Json json;
  with_balloon(machine, [&](Balloon& balloon) {
    if (action == "begin" && !balloon.begin_hinting())
      throw CommandError(balloon.hinting() == Balloon::Hinting::none
                             ? "the guest has no driver that names its free pages"
                             : "a round of hinting is under way; finish it first");
    if (action != "begin" && action != "finish" && action != "query")
      throw CommandError("'action' is begin, query or finish");
    json = {{"hinting", name_of(balloon.hinting())}, {"bytes", balloon.hinted_bytes()}};
    if (action == "finish") balloon.finish_hinting();
  });
  return json;
}

// --- Console and disks

Json lodge_console_resize(VirtualMachine& machine, const Request& request) {
  allow_arguments(request, {"columns", "rows"});
  const auto columns = static_cast<uint16_t>(control::number_argument(request, "columns", 4096));
  const auto rows = static_cast<uint16_t>(control::number_argument(request, "rows", 4096));
  machine.resize_terminal(columns, rows);
  return Json::object();
}

Json query_block(VirtualMachine& machine, const Request& request) {
  allow_arguments(request, {});
  Json disks = Json::array();
  machine.with_machine([&](Machine& present) {
    for (const auto& [name, disk] : present.disks())
      disks.push_back({{"device", name},
                       {"format", disk->format()},
                       {"size", disk->size()},
                       {"readonly", disk->read_only()}});
  });
  return disks;
}

Json block_resize(VirtualMachine& machine, const Request& request) {
  allow_arguments(request, {"device", "size"});
  const std::string name = control::text_argument(request, "device");
  const uint64_t size = control::number_argument(request, "size", uint64_t{1} << 62);
  switch (const int error = machine.resize_disk(name, size)) {
    case 0: return Json::object();
    case ENODEV:
      throw CommandError(fmt::format("there is no disk '{}'; query-block names them", name),
                         "DeviceNotFound");
    case EINVAL:
      throw CommandError(
          fmt::format("{}: a running guest's disk only grows, by multiples of 512 bytes; lodge image resize "
                      "shrinks one that "
                      "is not in use",
                      name));
    case ENOTSUP:
      throw CommandError(fmt::format(
          "{} cannot be resized: its image has bitmaps, snapshots in version 2, or a backing file "
          "larger than itself; lodge image info tells which",
          name));
    default: throw CommandError(fmt::format("{} cannot be resized: {}", name, std::strerror(error)));
  }
}

// --- The table

Json query_commands(VirtualMachine& machine, const Request& request);
// What a QMP client says first; here nothing has to be negotiated.
Json qmp_capabilities(VirtualMachine&, const Request&) {
  return Json::object();
}

struct Command {
  std::string_view name;
  Json (*execute)(VirtualMachine& machine, const Request& request);
};

constexpr std::array commands = {
    Command{"balloon", set_balloon},
    Command{"block_resize", block_resize},
    Command{"cont", cont},
    Command{"device_add", device_add},
    Command{"device_del", device_del},
    Command{"input-send-event", input_send_event},
    Command{"lodge-balloon-hint", lodge_balloon_hint},
    Command{"lodge-console-resize", lodge_console_resize},
    Command{"lodge-query", lodge_query},
    Command{"lodge-query-input", lodge_query_input},
    Command{"lodge-query-slots", lodge_query_slots},
    Command{"lodge-statistics", lodge_statistics},
    Command{"qmp_capabilities", qmp_capabilities},
    Command{"query-balloon", query_balloon},
    Command{"query-block", query_block},
    Command{"query-commands", query_commands},
    Command{"query-name", query_name},
    Command{"query-status", query_status},
    Command{"quit", quit},
    Command{"send-key", send_key},
    Command{"stop", stop},
    Command{"system_powerdown", system_powerdown},
    Command{"system_reset", system_reset},
};

Json query_commands(VirtualMachine&, const Request& request) {
  allow_arguments(request, {});
  Json names = Json::array();
  for (const Command& command : commands) names.push_back({{"name", command.name}});
  return names;
}

}  // namespace

control::Json execute(VirtualMachine& machine, const control::Request& request) {
  for (const Command& command : commands)
    if (request.command == command.name) return command.execute(machine, request);
  throw CommandError(fmt::format("The command {} has not been found", request.command), "CommandNotFound");
}

}  // namespace lodge::vm
