#include "cli/image_report.hpp"

#include <fmt/chrono.h>
#include <fmt/format.h>

#include <array>
#include <nlohmann/json.hpp>
#include <set>

#include "base/error.hpp"
#include "block/chain.hpp"
#include "block/probe.hpp"
#include "block/qcow2/bitmaps.hpp"

namespace lodge::cli {
namespace {

using nlohmann::json;
namespace qcow2 = block::qcow2;

std::string size_text(uint64_t bytes) {
  constexpr std::array units{"bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  size_t unit = 0;
  auto value = static_cast<double>(bytes);
  while (value >= 1024 && unit + 1 < units.size()) value /= 1024, unit++;
  return unit == 0 ? fmt::format("{} bytes", bytes)
                   : fmt::format("{:.4g} {} ({} bytes)", value, units[unit], bytes);
}

// Names in an image are not ours: nothing that a terminal or JSON would take for more than text.
std::string printable(std::string text) {
  for (char& c : text)
    if (c < ' ' || c > '~') c = '?';
  return text;
}

void describe_qcow2(json& info, block::Storage& storage) {
  const qcow2::Header h = qcow2::read_header(storage);
  info["virtual_size"] = h.size;
  info["version"] = h.version;
  info["cluster_size"] = h.cluster_size();
  info["refcount_bits"] = h.refcount_bits();
  info["compression"] = h.compression == qcow2::Compression::zstd ? "zstd" : "zlib";
  info["lazy_refcounts"] = (h.compatible & qcow2::compatible_lazy_refcounts) != 0;
  info["subclusters"] = h.extended_l2();
  info["dirty"] = h.has(qcow2::feature_dirty);
  info["corrupt"] = h.has(qcow2::feature_corrupt);
  if (h.backing_file) {
    info["backing_file"] = printable(*h.backing_file);
    if (!h.backing_format.empty()) info["backing_format"] = printable(h.backing_format);
  }
  if (h.external_data()) {
    info["data_file"] = printable(h.data_file);
    info["raw_data"] = h.raw_external_data();
  }
  info["snapshots"] = snapshots_json(qcow2::read_snapshots(storage, h));
  info["bitmaps"] = json::array();
  for (const auto& bitmap : qcow2::read_bitmaps(storage, h)) {
    info["bitmaps"].push_back({{"name", printable(bitmap.name)},
                               {"granularity", uint64_t{1} << (bitmap.granularity_bits & 63)},
                               {"enabled", (bitmap.flags & qcow2::bitmap_auto) != 0},
                               {"in_use", (bitmap.flags & qcow2::bitmap_in_use) != 0}});
  }
}

}  // namespace

json image_info(const std::string& path, const std::string& format) {
  block::FileStorage storage(path, block::Use::read, false, block::make_engine(block::Engine::threads));
  std::array<uint8_t, block::magic_size> start{};
  if (const int error = storage.read(start.data(), start.size(), 0)) throw_errno(error, path);
  json info{{"file", path}, {"disk_size", storage.allocated()}};
  if (format == "qcow2" || (format.empty() && block::looks_formatted(start))) {
    info["format"] = "qcow2";
    describe_qcow2(info, storage);
  } else {
    if (format.empty()) block::refuse_foreign(storage);
    info["format"] = "raw";
    info["virtual_size"] = (storage.size() + 511) & ~uint64_t{511};
  }
  return info;
}

std::vector<json> image_chain(const std::string& path, const std::string& format, bool all) {
  std::vector<json> chain{image_info(path, format)};
  std::set<std::string> seen{path};
  while (all && chain.back().contains("backing_file")) {
    const json& top = chain.back();
    const std::string next = block::backing_path(top["file"], top["backing_file"]);
    if (!seen.insert(next).second || seen.size() > 64)
      usage_error("{}: is its own backing file, directly or through others", next);
    chain.push_back(image_info(next, top.value("backing_format", "")));
  }
  return chain;
}

std::string info_text(const json& info) {
  std::string text;
  const auto line = [&](const char* name, const std::string& value) {
    text += fmt::format("{:<16} {}\n", name, value);
  };
  line("file", info["file"]);
  line("format",
       info["format"] == "qcow2" ? fmt::format("qcow2, version {}", info["version"].get<int>()) : "raw");
  line("disk", size_text(info["virtual_size"]));
  line("takes", size_text(info["disk_size"]));
  if (info["format"] == "raw") return text;
  line("clusters",
       fmt::format("{}{}{}", size_text(info["cluster_size"]), info["subclusters"] ? ", subclusters" : "",
                   info["lazy_refcounts"] ? ", lazy refcounts" : ""));
  line("compression", info["compression"]);
  if (info.contains("backing_file"))
    line("backing file", fmt::format("{} ({})", info["backing_file"].get<std::string>(),
                                     info.value("backing_format", "format not said")));
  if (info.contains("data_file")) line("data file", info["data_file"]);
  if (info["dirty"]) line("state", "was not closed properly; it is repaired when it is next written");
  if (info["corrupt"]) line("state", "marked as corrupt");
  for (const auto& snapshot : info["snapshots"]) line("snapshot", snapshot["name"]);
  for (const auto& bitmap : info["bitmaps"])
    line("bitmap", bitmap["name"].get<std::string>() + (bitmap["in_use"] ? " (not up to date)" : ""));
  return text;
}

json check_json(const std::string& path, const qcow2::CheckResult& r) {
  return {{"file", path},
          {"leaks", r.leaks},
          {"leaks_fixed", r.leaks_fixed},
          {"corruptions", r.corruptions},
          {"corruptions_fixed", r.corruptions_fixed},
          {"flags", r.flags},
          {"flags_fixed", r.flags_fixed},
          {"clusters", r.clusters},
          {"allocated_clusters", r.allocated},
          {"compressed_clusters", r.compressed},
          {"image_end", r.end},
          {"findings", r.findings}};
}

std::string check_text(const qcow2::CheckResult& r) {
  std::string text;
  for (const auto& finding : r.findings) text += finding + "\n";
  const auto line = [&](uint64_t count, uint64_t fixed, const char* what) {
    if (count) text += fmt::format("{} {}, {} mended\n", count, what, fixed);
  };
  line(r.corruptions, r.corruptions_fixed, "damaged places");
  line(r.leaks, r.leaks_fixed, "leaked clusters (lost space, no damage)");
  line(r.flags, r.flags_fixed, "flags that are clear without need (harmless)");
  if (text.empty()) text = "no damage\n";
  return text +
         fmt::format("{} of {} clusters in use, {} compressed\n", r.allocated, r.clusters, r.compressed);
}

json snapshots_json(const std::vector<qcow2::SnapshotInfo>& snapshots) {
  json list = json::array();
  for (const auto& s : snapshots) {
    list.push_back({{"id", printable(s.id)},
                    {"name", printable(s.name)},
                    {"time", s.seconds},
                    {"disk_size", s.size},
                    {"vm_state_size", s.vm_state},
                    {"vm_clock_ns", s.vm_clock}});
  }
  return list;
}

std::string snapshots_text(const std::vector<qcow2::SnapshotInfo>& snapshots) {
  if (snapshots.empty()) return "no snapshots\n";
  std::string text = fmt::format("{:<6} {:<20} {:<30} {}\n", "id", "taken", "disk", "name");
  for (const auto& s : snapshots) {
    text += fmt::format("{:<6} {:<20} {:<30} {}\n", printable(s.id),
                        fmt::format("{:%Y-%m-%d %H:%M:%S}", fmt::localtime(static_cast<time_t>(s.seconds))),
                        size_text(s.size), printable(s.name));
  }
  return text;
}

}  // namespace lodge::cli
