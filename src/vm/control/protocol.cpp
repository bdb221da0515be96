#include "vm/control/protocol.hpp"

#include <fmt/format.h>

#include <algorithm>

namespace lodge::vm::control {
namespace {

// Before anything is parsed: neither the parser nor what prints an answer may be led deep into recursion.
bool too_deep(std::string_view line) noexcept {
  unsigned depth = 0;
  bool text = false;
  for (size_t i = 0; i < line.size(); i++) {
    const char c = line[i];
    if (text) {
      if (c == '\\') i++;
      text = c != '"';
    } else if (c == '"') {
      text = true;
    } else if (c == '{' || c == '[') {
      if (++depth > max_depth) return true;
    } else if ((c == '}' || c == ']') && depth > 0) {
      depth--;
    }
  }
  return false;
}

std::string to_line(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
}

std::string answer_line(const char* kind, Json value, const Received& id) {
  Json answer;
  answer[kind] = std::move(value);
  if (!id.is_null()) answer["id"] = Json(id);
  return to_line(answer);
}

const Received& argument(const Request& request, const char* name) {
  const auto found = request.arguments.find(name);
  if (found == request.arguments.end())
    throw CommandError(fmt::format("{}: the argument '{}' is missing", request.command, name));
  return *found;
}

}  // namespace

Request parse_request(std::string_view line, Received& id) {
  if (line.size() > max_line) throw CommandError(fmt::format("a request is at most {} bytes long", max_line));
  if (too_deep(line)) throw CommandError("the request is nested too deeply");
  Received json = Received::parse(line, nullptr, false);
  if (!json.is_object())
    throw CommandError("a request is one line of JSON, for example {\"execute\": \"query-status\"}");
  Request request;
  if (const auto given = json.find("id"); given != json.end()) id = std::move(*given);
  const auto command = json.find("execute");
  if (command == json.end() || !command->is_string()) throw CommandError("\"execute\" names no command");
  request.command = command->get<std::string>();
  if (const auto arguments = json.find("arguments"); arguments != json.end()) {
    if (!arguments->is_object()) throw CommandError("\"arguments\" is no object");
    request.arguments = std::move(*arguments);
  }
  return request;
}

// The numbers are QEMU's version, which this is not: what a client may rely on is query-commands.
std::string greeting_line(std::string_view version) {
  const Json qemu = {{"micro", 0}, {"minor", 0}, {"major", 0}};
  return to_line({{"QMP",
                   {{"version", {{"qemu", qemu}, {"package", fmt::format("lodge {}", version)}}},
                    {"capabilities", Json::array()}}}});
}

std::string success_line(const Json& value, const Received& id) {
  return answer_line("return", value, id);
}

std::string failure_line(const CommandError& error, const Received& id) {
  return answer_line("error", {{"class", error.kind()}, {"desc", error.what()}}, id);
}

uint64_t number_argument(const Request& request, const char* name, uint64_t maximum) {
  const Received& value = argument(request, name);
  if (!value.is_number_unsigned() || value.get<uint64_t>() > maximum)
    throw CommandError(
        fmt::format("{}: '{}' is a whole number from 0 to {}", request.command, name, maximum));
  return value.get<uint64_t>();
}

std::string text_argument(const Request& request, const char* name) {
  const Received& value = argument(request, name);
  if (!value.is_string()) throw CommandError(fmt::format("{}: '{}' is a string", request.command, name));
  return value.get<std::string>();
}

void allow_arguments(const Request& request, std::initializer_list<const char*> names) {
  for (const auto& [name, value] : request.arguments.items())
    if (std::ranges::none_of(names, [&given = name](const char* known) { return given == known; }))
      throw CommandError(fmt::format("{}: there is no argument '{}'", request.command, name));
}

std::optional<std::string> LineBuffer::take() {
  const size_t end = bytes_.find('\n', begin_);
  if (end == std::string::npos) {
    bytes_.erase(0, begin_);
    begin_ = 0;
    return std::nullopt;
  }
  std::string line = bytes_.substr(begin_, end - begin_);
  if (!line.empty() && line.back() == '\r') line.pop_back();
  begin_ = end + 1;
  return line;
}

}  // namespace lodge::vm::control
