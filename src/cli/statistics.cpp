#include "cli/statistics.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>

namespace lodge::cli {
namespace {

// Instructions that are left to the interpreter: as many kinds of them are shown as text.
constexpr size_t shown_kinds = 10;
constexpr std::string_view by_kind = "left_to_interpreter";

std::optional<uint64_t> find(const vm::Statistics& counted, std::string_view group, std::string_view name) {
  for (const auto& entry : counted.accelerator)
    if (entry.group == group && entry.name == name) return entry.value;
  return std::nullopt;
}

struct Rates {
  // Guest instructions for each microsecond of CPU time of the vCPUs' threads, and the share of them that
  // translated code ran.
  std::optional<double> mips, translated;
  std::optional<double> tlb_hits;  // share of translated code's look-ups
};

Rates rates_of(const vm::Statistics& counted) {
  Rates rates;
  const auto interpreted = find(counted, "instructions", "interpreted");
  const auto translated = find(counted, "instructions", "translated");
  if (interpreted && counted.vcpu_seconds > 0) {
    const auto all = static_cast<double>(*interpreted + translated.value_or(0));
    rates.mips = all / counted.vcpu_seconds / 1e6;
    if (all > 0) rates.translated = static_cast<double>(translated.value_or(0)) / all;
  }
  const auto lookups = find(counted, "soft_tlb", "lookups");
  const auto misses = find(counted, "soft_tlb", "misses");
  if (lookups && misses && *lookups > 0)
    rates.tlb_hits = 1 - static_cast<double>(*misses) / static_cast<double>(*lookups);
  return rates;
}

// A line for each group.
std::string groups_text(std::vector<kvm::Statistic> counted) {
  const auto kinds = std::ranges::stable_partition(
      counted, [](const kvm::Statistic& entry) { return entry.group != by_kind; });
  std::ranges::stable_sort(kinds, std::ranges::greater{}, &kvm::Statistic::value);
  if (kinds.size() > shown_kinds) counted.resize(counted.size() - kinds.size() + shown_kinds);
  std::string text;
  std::string_view group;
  for (const kvm::Statistic& entry : counted) {
    text += entry.group == group ? fmt::format(", {} {}", entry.name, entry.value)
                                 : fmt::format("\n  {}: {} {}", entry.group, entry.name, entry.value);
    group = entry.group;
  }
  return text;
}

}  // namespace

std::string statistics_text(const RunReport& report) {
  const vm::Statistics& s = report.counted;
  std::string text = fmt::format(
      "{}: {:.3f} s, {:.3f} s of CPU, {} accelerator, {}; exits: {} port, {} memory, {} other; {} resets",
      report.name, s.seconds, report.cpu_seconds, report.accelerator, report.protocol, s.port_exits,
      s.memory_exits, s.other_exits, s.resets);
  const Rates rates = rates_of(s);
  if (rates.mips) {
    text += fmt::format("\n  {:.1f} million guest instructions for each of {:.3f} s of the CPUs' threads",
                        *rates.mips, s.vcpu_seconds);
    if (rates.translated) text += fmt::format(", {:.2f} % in translated code", *rates.translated * 100);
  }
  if (rates.tlb_hits)
    text += fmt::format("\n  {:.3f} % of translated code's look-ups hit the soft TLB", *rates.tlb_hits * 100);
  return text + groups_text(s.accelerator);
}

std::string statistics_json(const RunReport& report) {
  const vm::Statistics& s = report.counted;
  nlohmann::json json = {
      {"name", report.name},
      {"accelerator", report.accelerator},
      {"boot", report.protocol},
      {"exit_status", report.exit_status},
      {"seconds", s.seconds},
      {"cpu_seconds", report.cpu_seconds},
      {"vcpu_seconds", s.vcpu_seconds},
      {"resets", s.resets},
      {"exits", {{"port", s.port_exits}, {"memory", s.memory_exits}, {"other", s.other_exits}}}};
  const Rates rates = rates_of(s);
  if (rates.mips) json["guest_mips"] = *rates.mips;
  if (rates.tlb_hits) json["soft_tlb_hit_rate"] = *rates.tlb_hits;
  for (const kvm::Statistic& entry : s.accelerator) json["counted"][entry.group][entry.name] = entry.value;
  return json.dump();
}

}  // namespace lodge::cli
