#include "vm/statistics.hpp"

#include <fmt/ranges.h>
#include <sys/resource.h>

#include <algorithm>

#include "device/virtio/balloon.hpp"
#include "device/virtio/network.hpp"
#include "vm/machine.hpp"

namespace lodge::vm {
namespace {

std::optional<uint64_t> find(const Statistics& counted, std::string_view group, std::string_view name) {
  for (const auto& entry : counted.accelerator)
    if (entry.group == group && entry.name == name) return entry.value;
  return std::nullopt;
}

double cpu_seconds() {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) / 1e6;
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

void add_rates(const Statistics& counted, nlohmann::ordered_json& json) {
  const auto interpreted = find(counted, "instructions", "interpreted");
  const uint64_t translated = find(counted, "instructions", "translated").value_or(0);
  if (interpreted && counted.vcpu_seconds > 0) {
    // Guest instructions for each microsecond of CPU time of the vCPUs' threads, and the share of them that
    // translated code ran.
    const auto all = static_cast<double>(*interpreted + translated);
    json["guest_mips"] = all / counted.vcpu_seconds / 1e6;
    if (all > 0) json["translated_share"] = static_cast<double>(translated) / all;
  }
  const auto lookups = find(counted, "soft_tlb", "lookups"), misses = find(counted, "soft_tlb", "misses");
  if (lookups && misses && *lookups > 0)  // of translated code's look-ups
    json["soft_tlb_hit_rate"] = 1 - static_cast<double>(*misses) / static_cast<double>(*lookups);
}

nlohmann::ordered_json traffic_json(const net::Traffic& traffic) {
  return {{"packets", traffic.packets}, {"bytes", traffic.bytes}, {"dropped", traffic.dropped}};
}

}  // namespace

void add_statistics(std::vector<kvm::Statistic>& all, const std::vector<kvm::Statistic>& more) {
  for (const auto& counted : more) {
    const auto same = std::ranges::find_if(
        all, [&](const auto& known) { return known.group == counted.group && known.name == counted.name; });
    if (same == all.end())
      all.push_back(counted);
    else
      same->value += counted.value;
  }
}

void describe_machine(Machine& machine, Statistics& out) {
  out.protocol = machine.protocol();
  out.memory = machine.memory().size();
  out.resident = machine.memory().resident();
  if (auto* balloon = machine.find_device<device::virtio::Balloon>())
    out.balloon = Statistics::Balloon{balloon->target(), balloon->actual(), balloon->released()};
  for (size_t i = 0; auto* card = machine.find_device<device::virtio::Network>(i); i++) {
    const auto counted = card->counters();
    out.networks.push_back(
        {fmt::format("{:02x}", fmt::join(counted.mac, ":")), counted.to_guest, counted.from_guest});
  }
  for (const auto& [name, disk] : machine.disks()) out.disks.push_back({name, disk->counts()});
}

nlohmann::ordered_json statistics_json(const Statistics& counted) {
  nlohmann::ordered_json json = {
      {"name", counted.name},
      {"accelerator", counted.accelerator_name},
      {"boot", counted.protocol},
      {"paused", counted.paused},
      {"seconds", counted.seconds},
      {"cpu_seconds", cpu_seconds()},
      {"vcpu_seconds", counted.vcpu_seconds},
      {"resets", counted.resets},
      {"exits",
       {{"port", counted.port_exits}, {"memory", counted.memory_exits}, {"other", counted.other_exits}}},
      {"memory", {{"size", counted.memory}, {"resident", counted.resident}}}};
  if (counted.balloon)
    json["balloon"] = {{"target", counted.balloon->target},
                       {"actual", counted.balloon->actual},
                       {"released", counted.balloon->released}};
  for (const Statistics::Network& network : counted.networks)
    json["networks"].push_back({{"mac", network.mac},
                                {"to_guest", traffic_json(network.to_guest)},
                                {"from_guest", traffic_json(network.from_guest)}});
  for (const auto& [name, counts] : counted.disks)
    json["disks"][name] = {{"reads", counts.reads},     {"read_bytes", counts.read_bytes},
                           {"writes", counts.writes},   {"written_bytes", counts.written_bytes},
                           {"flushes", counts.flushes}, {"discards", counts.discards},
                           {"zeroes", counts.zeroes},   {"errors", counts.errors}};
  add_rates(counted, json);
  for (const kvm::Statistic& entry : counted.accelerator)
    json["counted"][entry.group][entry.name] = entry.value;
  return json;
}

}  // namespace lodge::vm
