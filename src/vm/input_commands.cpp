#include "vm/input_commands.hpp"

#include <fmt/format.h>
#include <linux/input-event-codes.h>

#include <array>
#include <string>
#include <string_view>
#include <vector>

#include "device/key_names.hpp"
#include "device/virtio/input.hpp"

namespace lodge::vm {
namespace {

using control::CommandError, control::Json, control::Received, control::Request;
using device::virtio::Input, device::virtio::InputEvent;

// A request's events are few; the device holds more (Input::max_waiting).
constexpr size_t max_events = 128;

// --- Reading a request

const Received& member(const Received& object, const char* name, const char* what) {
  const auto found = object.is_object() ? object.find(name) : object.end();
  if (!object.is_object() || found == object.end())
    throw CommandError(fmt::format("'{}' is missing in {}", name, what));
  return *found;
}

std::string text_member(const Received& object, const char* name, const char* what) {
  const Received& value = member(object, name, what);
  if (!value.is_string()) throw CommandError(fmt::format("'{}' of {} is a text", name, what));
  return value.get<std::string>();
}

bool flag_member(const Received& object, const char* name, const char* what) {
  const Received& value = member(object, name, what);
  if (!value.is_boolean()) throw CommandError(fmt::format("'{}' of {} is true or false", name, what));
  return value.get<bool>();
}

const Received& list_argument(const Request& request, const char* name) {
  control::allow_arguments(request, {name});
  const Received& list = member(request.arguments, name, "the arguments");
  if (!list.is_array() || list.empty() || list.size() > max_events)
    throw CommandError(fmt::format("'{}' is a list of 1 to {}", name, max_events));
  return list;
}

uint16_t key_of(const Received& key) {
  const std::string type = text_member(key, "type", "a key");
  if (type != "qcode") throw CommandError(fmt::format("keys are given as qcode, not as {}", type));
  const std::string name = text_member(key, "data", "a key");
  if (const auto code = device::key_code(name)) return *code;
  throw CommandError(
      fmt::format("there is no key '{}'; they have QMP's names, like a, ret, ctrl, kp_enter", name));
}

struct Button {
  std::string_view name;
  uint16_t type, code;
  int32_t step;  // of a wheel
};
constexpr std::array buttons = {
    Button{"left", EV_KEY, BTN_LEFT, 0},          Button{"middle", EV_KEY, BTN_MIDDLE, 0},
    Button{"right", EV_KEY, BTN_RIGHT, 0},        Button{"side", EV_KEY, BTN_SIDE, 0},
    Button{"extra", EV_KEY, BTN_EXTRA, 0},        Button{"wheel-up", EV_REL, REL_WHEEL, 1},
    Button{"wheel-down", EV_REL, REL_WHEEL, -1},  Button{"wheel-left", EV_REL, REL_HWHEEL, -1},
    Button{"wheel-right", EV_REL, REL_HWHEEL, 1},
};

void add_button(std::vector<InputEvent>& events, const Received& data) {
  const std::string name = text_member(data, "button", "a btn event");
  const bool down = flag_member(data, "down", "a btn event");
  for (const Button& button : buttons) {
    if (button.name != name) continue;
    // A wheel's notch is over at once: its release says nothing.
    if (button.type == EV_KEY)
      events.push_back({EV_KEY, button.code, down});
    else if (down)
      events.push_back({EV_REL, button.code, static_cast<uint32_t>(button.step)});
    return;
  }
  throw CommandError(
      fmt::format("there is no button '{}'; there are left, middle, right, side, extra and wheel-up, "
                  "wheel-down, wheel-left, wheel-right",
                  name));
}

void add_axis(std::vector<InputEvent>& events, const Received& data) {
  const std::string axis = text_member(data, "axis", "an abs event");
  const Received& value = member(data, "value", "an abs event");
  if (axis != "x" && axis != "y") throw CommandError("'axis' of an abs event is x or y");
  if (!value.is_number_unsigned() || value.get<uint64_t>() > Input::largest_axis)
    throw CommandError(fmt::format("'value' of an abs event is 0 to {}", Input::largest_axis));
  events.push_back({EV_ABS, static_cast<uint16_t>(axis == "x" ? ABS_X : ABS_Y),
                    static_cast<uint32_t>(value.get<uint64_t>())});
}

// --- The devices

const char* name_of(Input::Kind kind) {
  return kind == Input::Kind::keyboard ? "keyboard" : "tablet";
}

// The first of its kind; null: there is none.
Input* find(Machine& machine, Input::Kind kind) {
  for (size_t i = 0; Input* input = machine.find_device<Input>(i); i++)
    if (input->kind() == kind) return input;
  return nullptr;
}

void require(VirtualMachine& machine, Input::Kind kind) {
  machine.with_machine([&](Machine& present) {
    if (!find(present, kind))
      throw CommandError(
          fmt::format("the machine has no {0}; start it with --device virtio-{0}", name_of(kind)),
          "DeviceNotActive");
  });
}

void send(VirtualMachine& machine, Input::Kind kind, const std::vector<InputEvent>& events) {
  if (events.empty()) return;
  require(machine, kind);
  machine.with_machine([&](Machine& present) {
    Input* input = find(present, kind);
    if (!input || input->send(events)) return;
    throw CommandError(fmt::format("the guest {} its {}",
                                   input->listened_to() ? "takes nothing from" : "has no driver for",
                                   name_of(kind)));
  });
}

}  // namespace

Json send_key(VirtualMachine& machine, const Request& request) {
  std::vector<InputEvent> events;
  std::vector<uint16_t> codes;
  for (const Received& key : list_argument(request, "keys")) codes.push_back(key_of(key));
  for (const uint16_t code : codes) {
    events.push_back({EV_KEY, code, 1});
    events.push_back({EV_SYN, SYN_REPORT, 0});
  }
  for (auto code = codes.rbegin(); code != codes.rend(); ++code) {
    events.push_back({EV_KEY, *code, 0});
    if (code + 1 != codes.rend()) events.push_back({EV_SYN, SYN_REPORT, 0});  // the last one is added
  }
  send(machine, Input::Kind::keyboard, events);
  return Json::object();
}

Json input_send_event(VirtualMachine& machine, const Request& request) {
  std::vector<InputEvent> keys, moves;
  for (const Received& event : list_argument(request, "events")) {
    const std::string type = text_member(event, "type", "an event");
    const Received& data = member(event, "data", "an event");
    if (type == "key")
      keys.push_back(
          {EV_KEY, key_of(member(data, "key", "a key event")), flag_member(data, "down", "a key event")});
    else if (type == "btn")
      add_button(moves, data);
    else if (type == "abs")
      add_axis(moves, data);
    else
      throw CommandError(fmt::format("events are key, btn and abs, not {}", type));
  }
  // All of it or nothing, as far as it is known beforehand.
  if (!keys.empty()) require(machine, Input::Kind::keyboard);
  if (!moves.empty()) require(machine, Input::Kind::tablet);
  send(machine, Input::Kind::keyboard, keys);
  send(machine, Input::Kind::tablet, moves);
  return Json::object();
}

Json lodge_query_input(VirtualMachine& machine, const Request& request) {
  control::allow_arguments(request, {});
  constexpr std::array<std::pair<unsigned, const char*>, 3> names = {
      {{LED_NUML, "num"}, {LED_CAPSL, "caps"}, {LED_SCROLLL, "scroll"}}};
  Json devices = Json::array();
  machine.with_machine([&](Machine& present) {
    for (size_t i = 0; Input* input = present.find_device<Input>(i); i++) {
      Json lights = Json::array();
      for (const auto& [bit, name] : names)
        if (input->lights() >> bit & 1) lights.push_back(name);
      devices.push_back({{"kind", name_of(input->kind())},
                         {"driver", input->listened_to()},
                         {"lights", std::move(lights)}});
    }
  });
  return devices;
}

}  // namespace lodge::vm
