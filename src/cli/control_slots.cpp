#include "cli/control_slots.hpp"

#include <fmt/format.h>

#include <chrono>
#include <filesystem>
#include <thread>

#include "base/error.hpp"
#include "vm/config.hpp"

namespace lodge::cli {
namespace {

using vm::control::Client, vm::control::CommandError, vm::control::Json;

// A driver of the guest's blinks for five seconds, and gives the power one more to go.
constexpr std::chrono::seconds removal_patience(60);

// The machine's process may have another directory.
Asked add(Client& client, vm::DeviceConfig device) {
  for (const char* name : {"file", "path", "pcap"})
    if (const auto found = device.options.find(name); found != device.options.end() && !found->second.empty())
      found->second = std::filesystem::absolute(found->second).string();
  Json arguments = {{"driver", device.name}};
  for (const auto& [name, value] : device.options) arguments[name] = value;
  Json answer = client.execute("device_add", arguments);
  std::string text = answer.value("slot", "?") + "\n";
  return {std::move(answer), std::move(text)};
}

std::string slot_text(const Json& slot) {
  std::string text = slot.value("slot", "?");
  if (!slot.contains("driver")) return text + "  empty\n";
  text += "  " + slot.value("driver", "?");
  if (slot.contains("disk")) text += "  " + slot.value("disk", "?");
  return text + (slot.value("leaving", false) ? "  asked to leave\n" : "\n");
}

bool is_empty(Client& client, const std::string& name) {
  for (const Json& slot : client.execute("lodge-query-slots"))
    if (slot.value("slot", "") == name) return !slot.contains("driver");
  return true;
}

}  // namespace

Asked slots(Client& client, Arguments) {
  Json answer = client.execute("lodge-query-slots");
  std::string text;
  for (const Json& slot : answer) text += slot_text(slot);
  if (text.empty()) text = "none: lodge run --hotplug N gives the machine some\n";
  return {std::move(answer), std::move(text)};
}

Asked add_disk(Client& client, Arguments arguments) {
  return add(client, vm::parse_disk("add-disk", arguments[0]));
}

Asked add_network(Client& client, Arguments arguments) {
  return add(client, vm::parse_network("add-network", arguments[0]));
}

Asked add_device(Client& client, Arguments arguments) {
  return add(client, vm::parse_device("add-device", arguments[0]));
}

Asked remove(Client& client, Arguments arguments) {
  Json answer = client.execute("device_del", {{"id", arguments[0]}});
  const std::string slot = answer.value("slot", "?");
  const auto start = std::chrono::steady_clock::now();
  while (!is_empty(client, slot)) {
    if (std::chrono::steady_clock::now() - start > removal_patience)
      throw CommandError(
          fmt::format("the guest was asked to let {} go and has not done it within {} s; the machine's next "
                      "reset does it",
                      arguments[0], removal_patience.count()));
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
  return {std::move(answer), ""};
}

}  // namespace lodge::cli
