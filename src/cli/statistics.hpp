// Statistics of a machine as lines for a person.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

namespace lodge::cli {

// Of vm::statistics_json(), which may come from another process: what is missing or of another type is left
// out. Lines, the last without its end.
std::string statistics_text(const nlohmann::ordered_json& counted);

}  // namespace lodge::cli
