// What `lodge image` prints.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "block/qcow2/check.hpp"
#include "block/qcow2/snapshots.hpp"

namespace lodge::cli {

// One image, without opening it for use: another program may be writing it. Throws UsageError.
nlohmann::json image_info(const std::string& path, const std::string& format);
// With the backing files behind it when `all` is set.
std::vector<nlohmann::json> image_chain(const std::string& path, const std::string& format, bool all);
std::string info_text(const nlohmann::json& info);

nlohmann::json check_json(const std::string& path, const block::qcow2::CheckResult& result);
std::string check_text(const block::qcow2::CheckResult& result);

nlohmann::json snapshots_json(const std::vector<block::qcow2::SnapshotInfo>& snapshots);
std::string snapshots_text(const std::vector<block::qcow2::SnapshotInfo>& snapshots);

}  // namespace lodge::cli
