#include "cli/statistics.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <vector>

namespace lodge::cli {
namespace {

using Json = nlohmann::ordered_json;

// Instructions that are left to the interpreter: as many kinds of them are shown as text.
constexpr size_t shown_kinds = 10;
constexpr std::string_view by_kind = "left_to_interpreter";

double number(const Json& json, const char* name) {
  const auto found = json.find(name);
  return found != json.end() && found->is_number() ? found->get<double>() : 0;
}

std::string text(const Json& json, const char* name) {
  const auto found = json.find(name);
  return found != json.end() && found->is_string() ? found->get<std::string>() : std::string();
}

Json part(const Json& json, const char* name) {
  const auto found = json.find(name);
  return found != json.end() && found->is_object() ? *found : Json::object();
}

double mebibytes(const Json& json, const char* name) {
  return number(json, name) / (1 << 20);
}

// A line for each group.
std::string groups_text(const Json& groups) {
  std::string lines;
  for (const auto& [group, entries] : groups.items()) {
    std::vector<std::pair<std::string, double>> values;
    for (const auto& [name, value] : entries.items())
      if (value.is_number()) values.emplace_back(name, value.get<double>());
    if (group == by_kind) {
      std::ranges::stable_sort(values, std::ranges::greater{},
                               [](const auto& entry) { return entry.second; });
      if (values.size() > shown_kinds) values.resize(shown_kinds);
    }
    std::string line;
    for (const auto& [name, value] : values)
      line += fmt::format("{}{} {:.0f}", line.empty() ? "" : ", ", name, value);
    if (!line.empty()) lines += fmt::format("\n  {}: {}", group, line);
  }
  return lines;
}

std::string memory_text(const Json& counted) {
  const Json memory = part(counted, "memory"), balloon = part(counted, "balloon");
  if (memory.empty()) return {};
  std::string line = fmt::format("\n  memory: {:.0f} MiB, of which the host holds {:.0f} MiB",
                                 mebibytes(memory, "size"), mebibytes(memory, "resident"));
  if (!balloon.empty())
    line += fmt::format("; balloon {:.0f} of {:.0f} MiB, given back so far {:.0f} MiB",
                        mebibytes(balloon, "actual"), mebibytes(balloon, "target"),
                        mebibytes(balloon, "released"));
  return line;
}

std::string traffic_text(const Json& traffic) {
  return fmt::format("{:.0f} packets, {:.1f} MiB, {:.0f} dropped", number(traffic, "packets"),
                     mebibytes(traffic, "bytes"), number(traffic, "dropped"));
}

// A line for each card.
std::string networks_text(const Json& counted) {
  std::string lines;
  const auto networks = counted.find("networks");
  if (networks == counted.end() || !networks->is_array()) return lines;
  for (const Json& network : *networks)
    lines += fmt::format("\n  network {}: to the guest {}; from it {}", text(network, "mac"),
                         traffic_text(part(network, "to_guest")), traffic_text(part(network, "from_guest")));
  return lines;
}

// A line for each disk.
std::string disks_text(const Json& disks) {
  std::string lines;
  for (const auto& [name, disk] : disks.items()) {
    lines += fmt::format("\n  {}: {:.0f} reads ({:.1f} MiB), {:.0f} writes ({:.1f} MiB), {:.0f} flushes",
                         name, number(disk, "reads"), mebibytes(disk, "read_bytes"), number(disk, "writes"),
                         mebibytes(disk, "written_bytes"), number(disk, "flushes"));
    for (const char* rare : {"discards", "zeroes", "errors"})
      if (number(disk, rare) != 0) lines += fmt::format(", {:.0f} {}", number(disk, rare), rare);
  }
  return lines;
}

}  // namespace

std::string statistics_text(const Json& counted) {
  const Json exits = part(counted, "exits");
  std::string lines = fmt::format(
      "{}: {:.3f} s, {:.3f} s of CPU, {} accelerator, {}; exits: {:.0f} port, {:.0f} memory, {:.0f} other; "
      "{:.0f} resets",
      text(counted, "name"), number(counted, "seconds"), number(counted, "cpu_seconds"),
      text(counted, "accelerator"), text(counted, "boot"), number(exits, "port"), number(exits, "memory"),
      number(exits, "other"), number(counted, "resets"));
  if (counted.contains("guest_mips")) {
    lines += fmt::format("\n  {:.1f} million guest instructions for each of {:.3f} s of the CPUs' threads",
                         number(counted, "guest_mips"), number(counted, "vcpu_seconds"));
    if (counted.contains("translated_share"))
      lines += fmt::format(", {:.2f} % in translated code", number(counted, "translated_share") * 100);
  }
  if (counted.contains("soft_tlb_hit_rate"))
    lines += fmt::format("\n  {:.3f} % of translated code's look-ups hit the soft TLB",
                         number(counted, "soft_tlb_hit_rate") * 100);
  return lines + memory_text(counted) + disks_text(part(counted, "disks")) + networks_text(counted) +
         groups_text(part(counted, "counted"));
}

}  // namespace lodge::cli
