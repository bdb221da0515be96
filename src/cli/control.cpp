#include "cli/control.hpp"

#include <fmt/format.h>

#include <array>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <span>
#include <thread>

#include "base/error.hpp"
#include "cli/commands.hpp"
#include "cli/control_slots.hpp"
#include "cli/statistics.hpp"
#include "vm/config.hpp"
#include "vm/control/client.hpp"

namespace lodge::cli {
namespace {

using vm::control::Client, vm::control::CommandError, vm::control::Json;

struct Control {
  std::string_view name, arguments, help;
  size_t least, most;  // number of arguments
  Asked (*run)(Client& client, Arguments arguments);
};

Asked plain(Client& client, const char* command, const Json& arguments = Json::object()) {
  return {client.execute(command, arguments), ""};
}

double number(const Json& json, const char* name) {
  const auto found = json.is_object() ? json.find(name) : json.end();
  return found != json.end() && found->is_number() ? found->get<double>() : 0;
}

Json part(const Json& json, const char* name) {
  return json.is_object() ? json.value(name, Json::object()) : Json::object();
}

std::string word(const Json& json, const char* name) {
  const auto found = json.is_object() ? json.find(name) : json.end();
  return found != json.end() && found->is_string() ? found->get<std::string>() : "?";
}

std::string mebibytes(double bytes) {
  return fmt::format("{:.0f} MiB", bytes / (1 << 20));
}

Asked status(Client& client, Arguments) {
  Json answer = client.execute("lodge-query");
  std::string text =
      fmt::format("{}: {}, process {:.0f}, {:.0f} CPUs, {}, {} accelerator\n", word(answer, "name"),
                  word(answer, "status"), number(answer, "pid"), number(answer, "cpus"),
                  mebibytes(number(answer, "memory")), word(answer, "accelerator"));
  return {std::move(answer), std::move(text)};
}

Asked stats(Client& client, Arguments) {
  Json answer = client.execute("lodge-statistics");
  std::string text = statistics_text(answer) + "\n";
  return {std::move(answer), std::move(text)};
}

std::string balloon_text(const Json& answer) {
  const Json balloon = part(answer, "balloon"), guest = part(answer, "guest");
  std::string text = fmt::format("target      {}\nactual      {}\ngiven back  {} so far\n",
                                 mebibytes(number(balloon, "target")), mebibytes(number(balloon, "actual")),
                                 mebibytes(number(balloon, "released")));
  if (guest.empty()) return text + "guest       has told nothing: no driver, or none that answers\n";
  for (const auto* name : {"total", "free", "available", "disk_caches"})
    if (guest.contains(name)) text += fmt::format("guest {:<11} {}\n", name, mebibytes(number(guest, name)));
  return text;
}

// One round to its end, as whoever copies the machine's memory would ask for.
Asked balloon_hint(Client& client) {
  constexpr auto patience = std::chrono::seconds(60);
  const auto start = std::chrono::steady_clock::now();
  client.execute("lodge-balloon-hint", {{"action", "begin"}});
  Json answer;
  do {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    answer = client.execute("lodge-balloon-hint", {{"action", "query"}});
  } while (word(answer, "hinting") != "complete" && std::chrono::steady_clock::now() - start < patience);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  client.execute("lodge-balloon-hint", {{"action", "finish"}});
  if (word(answer, "hinting") != "complete") throw CommandError("the guest has not finished within 60 s");
  answer["seconds"] = seconds;
  std::string text = fmt::format("the guest has named {} as free within {:.2f} s\n",
                                 mebibytes(number(answer, "bytes")), seconds);
  return {std::move(answer), std::move(text)};
}

// The machine's command takes what the guest keeps; here it is what the guest does without.
Asked balloon(Client& client, Arguments arguments) {
  if (!arguments.empty() && arguments[0] == "hint") return balloon_hint(client);
  if (!arguments.empty()) {
    const uint64_t wanted = vm::parse_size("balloon", arguments[0]);
    const auto memory = static_cast<uint64_t>(number(client.execute("lodge-query"), "memory"));
    if (wanted > memory)
      usage_error("balloon: {} is more than the machine's {}", arguments[0],
                  mebibytes(static_cast<double>(memory)));
    return plain(client, "balloon", {{"value", memory - wanted}});
  }
  Json answer = client.execute("query-balloon");
  std::string text = balloon_text(answer);
  return {std::move(answer), std::move(text)};
}

Asked console_resize(Client& client, Arguments arguments) {
  const std::string& size = arguments[0];
  unsigned columns = 0, rows = 0;
  const char* const end = size.data() + size.size();
  const auto [middle, error] = std::from_chars(size.data(), end, columns);
  if (error != std::errc{} || middle == end || *middle != 'x' ||
      std::from_chars(middle + 1, end, rows).ptr != end || rows == 0)
    usage_error("console-resize: '{}' is not a size; give COLUMNSxROWS, like 100x40", size);
  return plain(client, "lodge-console-resize", {{"columns", columns}, {"rows", rows}});
}

Asked disks(Client& client, Arguments) {
  Json answer = client.execute("query-block");
  std::string text;
  for (const Json& disk : answer)
    text += fmt::format("{}  {}  {}{}\n", word(disk, "device"), word(disk, "format"),
                        mebibytes(number(disk, "size")), disk.value("readonly", false) ? "  read-only" : "");
  return {std::move(answer), std::move(text)};
}

Asked disk_resize(Client& client, Arguments arguments) {
  return plain(client, "block_resize",
               {{"device", arguments[0]}, {"size", vm::parse_size("disk-resize", arguments[1])}});
}

Asked input(Client& client, Arguments) {
  Json answer = client.execute("lodge-query-input");
  std::string text;
  for (const Json& device : answer) {
    text +=
        fmt::format("{}  {}", word(device, "kind"), device.value("driver", false) ? "in use" : "no driver");
    for (const Json& light : device.value("lights", Json::array()))
      text += fmt::format("  {} lock", light.get<std::string>());
    text += "\n";
  }
  return {std::move(answer), std::move(text)};
}

// Each argument is keys that are held together: ctrl-alt-delete.
Asked send_key(Client& client, Arguments arguments) {
  for (const std::string& chord : arguments) {
    Json keys = Json::array();
    for (size_t begin = 0; begin <= chord.size();) {
      const size_t end = std::min(chord.find('-', begin), chord.size());
      keys.push_back({{"type", "qcode"}, {"data", chord.substr(begin, end - begin)}});
      begin = end + 1;
    }
    client.execute("send-key", {{"keys", std::move(keys)}});
  }
  return {Json::object(), ""};
}

Asked pointer(Client& client, Arguments arguments) {
  Json events = Json::array();
  for (const auto& [axis, text] : {std::pair{"x", arguments[0]}, std::pair{"y", arguments[1]}}) {
    unsigned value = 0;
    const char* const end = text.data() + text.size();
    const auto [last, error] = std::from_chars(text.data(), end, value);
    if (error != std::errc{} || last != end)
      usage_error("pointer: '{}' is not a place; give 0 (left, top) to 32767 (right, bottom)", text);
    events.push_back({{"type", "abs"}, {"data", {{"axis", axis}, {"value", value}}}});
  }
  client.execute("input-send-event", {{"events", std::move(events)}});
  if (arguments.size() > 2)
    for (const bool down : {true, false})
      client.execute("input-send-event",
                     {{"events", {{{"type", "btn"}, {"data", {{"down", down}, {"button", arguments[2]}}}}}}});
  return {Json::object(), ""};
}

// Whatever the machine knows, for what has no word here.
Asked qmp(Client& client, Arguments arguments) {
  Json given = Json::object();
  if (arguments.size() > 1) given = Json::parse(arguments[1], nullptr, false);
  if (!given.is_object()) usage_error("qmp: '{}' is no JSON object", arguments[1]);
  Json answer = client.execute(arguments[0], given);
  std::string text = answer.dump(2, ' ', false, Json::error_handler_t::replace) + "\n";
  return {std::move(answer), std::move(text)};
}

constexpr std::array controls = {
    Control{"status", "", "whether it runs, its process and size", 0, 0, status},
    Control{"stats", "", "what has been counted so far, as --stats prints it at the end", 0, 0, stats},
    Control{"pause", "", "the processors stand still", 0, 0,
            [](Client& client, Arguments) { return plain(client, "stop"); }},
    Control{"resume", "", "they go on", 0, 0,
            [](Client& client, Arguments) { return plain(client, "cont"); }},
    Control{"reset", "", "as its reset button", 0, 0,
            [](Client& client, Arguments) { return plain(client, "system_reset"); }},
    Control{"powerdown", "", "as its power button: the guest shuts down", 0, 0,
            [](Client& client, Arguments) { return plain(client, "system_powerdown"); }},
    Control{"quit", "", "ends it at once", 0, 0,
            [](Client& client, Arguments) { return plain(client, "quit"); }},
    Control{"balloon", "[SIZE | hint]",
            "the balloon and the guest's memory; the guest shall do without SIZE; it names its free pages", 0,
            1, balloon},
    Control{"console-resize", "COLUMNSxROWS", "the size of the virtio console's screen", 1, 1,
            console_resize},
    Control{"disks", "", "the disks and their names", 0, 0, disks},
    Control{"disk-resize", "DISK SIZE", "makes a disk larger while the guest uses it", 2, 2, disk_resize},
    Control{"slots", "", "hot-plug slots and what is in them", 0, 0, slots},
    Control{"add-disk", "FILE[,OPTION...]", "plugs a disk in, as --disk describes it", 1, 1, add_disk},
    Control{"add-network", "KIND[,OPTION...]", "plugs a network card in, as --net describes it", 1, 1,
            add_network},
    Control{"add-device", "NAME[,OPTION...]", "plugs another VirtIO device in, as --device describes it", 1,
            1, add_device},
    Control{"remove", "SLOT|DISK", "asks the guest to let a device go, and waits until it has", 1, 1, remove},
    Control{"input", "", "keyboards and tablets, and which lights are on", 0, 0, input},
    Control{"send-key", "KEYS...", "presses and releases keys, like ctrl-alt-delete or h e l l o ret", 1, 64,
            send_key},
    Control{"pointer", "X Y [BUTTON]", "puts the tablet's pointer there, 0 to 32767, and clicks", 2, 3,
            pointer},
    Control{"qmp", "COMMAND [JSON]", "any command of docs/control.md, with its arguments", 1, 2, qmp},
};

const Control& find_control(const CtlCommand& command) {
  for (const Control& control : controls) {
    if (control.name != command.command) continue;
    if (command.arguments.size() < control.least || command.arguments.size() > control.most)
      usage_error("lodge ctl: write '{}{}{}'", control.name, control.arguments.empty() ? "" : " ",
                  control.arguments);
    return control;
  }
  std::string names;
  for (const Control& control : controls)
    names += fmt::format("{}{}", names.empty() ? "" : ", ", control.name);
  usage_error("lodge ctl: unknown command '{}'; there are {}", command.command, names);
}

}  // namespace

std::string ctl_commands_help() {
  std::string text = "\nCommands:\n";
  for (const Control& control : controls)
    text += fmt::format("  {:<29} {}\n", fmt::format("{} {}", control.name, control.arguments), control.help);
  return text;
}

std::vector<std::string> ctl_command_names() {
  std::vector<std::string> names;
  names.reserve(std::size(controls));
  for (const Control& control : controls) names.emplace_back(control.name);
  return names;
}

int ctl(const CtlCommand& command) {
  const Control& control = find_control(command);
  Client client(vm::control::path_of(command.machine));
  const Asked asked = control.run(client, command.arguments);
  if (command.json)
    fmt::print("{}\n", asked.answer.dump(-1, ' ', false, Json::error_handler_t::replace));
  else
    std::fputs(asked.text.c_str(), stdout);
  return 0;
}

// A machine that does not answer is shown as such: the list is not to hang on one that is stopped.
int list(const ListCommand& command) {
  constexpr int patience_ms = 2000;
  Json all = Json::array();
  for (const auto& [name, path] : vm::control::named_sockets()) {
    Json one = {{"name", name}, {"status", "not answering"}};
    try {
      one = Client(path, patience_ms).execute("lodge-query");
    } catch (const std::exception&) {
      // It has ended meanwhile, or is stopped: the row says what is known.
    }
    one["socket"] = path;
    all.push_back(std::move(one));
  }
  if (command.json) {
    fmt::print("{}\n", all.dump(-1, ' ', false, Json::error_handler_t::replace));
    return 0;
  }
  if (!all.empty())
    fmt::print("{:<24} {:<14} {:>8} {:>5} {:>10}  {}\n", "NAME", "STATUS", "PROCESS", "CPUS", "MEMORY",
               "ACCELERATOR");
  for (const Json& one : all)
    fmt::print("{:<24} {:<14} {:>8.0f} {:>5.0f} {:>10}  {}\n", word(one, "name"), word(one, "status"),
               number(one, "pid"), number(one, "cpus"), mebibytes(number(one, "memory")),
               word(one, "accelerator"));
  return 0;
}

}  // namespace lodge::cli
