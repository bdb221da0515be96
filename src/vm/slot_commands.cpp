#include "vm/slot_commands.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <string>

#include "base/error.hpp"

namespace lodge::vm {
namespace {

using control::CommandError, control::Json, control::Received, control::Request;

// Numbers and truth values as the command line spells them.
std::string option_text(const std::string& name, const Received& value) {
  if (value.is_string()) return value.get<std::string>();
  if (value.is_boolean()) return value.get<bool>() ? "on" : "off";
  if (value.is_number_unsigned()) return std::to_string(value.get<uint64_t>());
  throw CommandError(fmt::format("'{}' is a text, a number or true or false", name));
}

// The port whose slot has this id, or the disk of this name in it; empty: none.
std::string port_of(Machine& machine, const std::string& id) {
  const device::Disk* const disk = machine.disk(id);
  for (const auto& slot : machine.slots())
    if (slot.device && (slot.port == id || (disk && slot.mounted->disk() == disk))) return slot.port;
  return {};
}

}  // namespace

Json device_add(VirtualMachine& machine, const Request& request) {
  DeviceConfig device{.name = control::text_argument(request, "driver"), .options = {}};
  device.spelling.option = device.name;
  for (const auto& [name, value] : request.arguments.items())
    if (name != "driver") device.options[name] = option_text(name, value);
  try {
    return {{"slot", machine.plug(std::move(device))}};
  } catch (const UsageError& error) {
    throw CommandError(error.what());
  }
}

Json device_del(VirtualMachine& machine, const Request& request) {
  control::allow_arguments(request, {"id"});
  const std::string id = control::text_argument(request, "id");
  std::string port;
  machine.with_machine([&](Machine& present) { port = port_of(present, id); });
  if (port.empty() || !machine.unplug(port))
    throw CommandError(
        fmt::format("no slot has a device '{}'; lodge-query-slots shows what can be removed", id),
        "DeviceNotFound");
  return {{"slot", port}};
}

Json lodge_query_slots(VirtualMachine& machine, const Request& request) {
  control::allow_arguments(request, {});
  Json answer = Json::array();
  machine.with_machine([&](Machine& present) {
    const auto disks = present.disks();
    for (const auto& slot : present.slots()) {
      Json one = {{"slot", slot.port}};
      if (slot.device) {
        one["driver"] = slot.device->name;
        const auto disk =
            std::ranges::find_if(disks, [&](const auto& each) { return each.disk == slot.mounted->disk(); });
        if (disk != disks.end()) one["disk"] = disk->name;
        one["leaving"] = slot.leaving;
      }
      answer.push_back(std::move(one));
    }
  });
  return answer;
}

}  // namespace lodge::vm
