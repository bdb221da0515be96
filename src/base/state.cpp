#include "base/state.hpp"

#include <cstring>
#include <nlohmann/json.hpp>

#include "base/error.hpp"

namespace lodge::state_detail {
namespace {

constexpr std::string_view hex_digits = "0123456789abcdef";

const nlohmann::json& field(const nlohmann::json& json, std::string_view device, std::string_view name) {
  const auto it = json.find(std::string(name));
  if (it == json.end()) usage_error("saved state of {}: field '{}' is missing", device, name);
  return *it;
}

}  // namespace

void begin(nlohmann::json& json, std::string_view name, unsigned version) {
  json = nlohmann::json::object();
  json["device"] = std::string(name);
  json["version"] = version;
}

void check(const nlohmann::json& json, std::string_view name, unsigned version) {
  if (!json.is_object() || !json.contains("device") || json["device"] != std::string(name))
    usage_error("saved state: expected the device '{}'", name);
  if (!json.contains("version") || json["version"] != version)
    usage_error("saved state of {}: this build reads version {} only", name, version);
}

void Writer::integer(std::string_view name, uint64_t value) {
  json_[std::string(name)] = value;
}

void Writer::bytes(std::string_view name, std::span<const uint8_t> value) {
  std::string hex;
  hex.reserve(value.size() * 2);
  for (const uint8_t byte : value) {
    hex += hex_digits[byte >> 4];
    hex += hex_digits[byte & 15];
  }
  json_[std::string(name)] = std::move(hex);
}

uint64_t Reader::integer(std::string_view name, uint64_t maximum) {
  const nlohmann::json& value = field(json_, device_, name);
  if (!value.is_number_unsigned() || value.get<uint64_t>() > maximum)
    usage_error("saved state of {}: field '{}' is not a number from 0 to {}", device_, name, maximum);
  return value.get<uint64_t>();
}

std::vector<uint8_t> Reader::bytes(std::string_view name) {
  const nlohmann::json& value = field(json_, device_, name);
  const std::string hex = value.is_string() ? value.get<std::string>() : std::string("?");
  std::vector<uint8_t> out(hex.size() / 2);
  for (size_t i = 0; i < hex.size(); ++i) {
    const size_t digit = hex_digits.find(hex[i]);
    if (digit == std::string_view::npos || hex.size() % 2 != 0)
      usage_error("saved state of {}: field '{}' is not an even number of hexadecimal digits", device_, name);
    out[i / 2] = static_cast<uint8_t>(out[i / 2] << 4 | digit);
  }
  return out;
}

void Reader::fixed(std::string_view name, std::span<uint8_t> value) {
  const std::vector<uint8_t> data = bytes(name);
  if (data.size() != value.size())
    usage_error("saved state of {}: field '{}' has {} bytes, expected {}", device_, name, data.size(),
                value.size());
  std::memcpy(value.data(), data.data(), data.size());
}

}  // namespace lodge::state_detail
