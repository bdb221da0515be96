// The control socket's wire format: QMP's (QEMU Machine Protocol), one JSON object a line. See
// docs/control.md.
//
// A peer is hostile until shown otherwise: lines, nesting and what is kept of them are bounded here.
#pragma once

#include <cstddef>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>

namespace lodge::vm::control {

// Ordered, so that a person reads answers in the order in which they were written.
using Json = nlohmann::ordered_json;
// What a peer has sent: looking a name up takes no longer for thousands of them.
using Received = nlohmann::json;

inline constexpr size_t max_line = 64 * 1024;  // bytes of a request, without its end
inline constexpr unsigned max_depth = 16;      // of objects and arrays in each other

// What a command answers when it cannot be done.
class CommandError : public std::runtime_error {
 public:
  explicit CommandError(const std::string& description, std::string_view kind = "GenericError")
      : std::runtime_error(description), kind_(kind) {}
  std::string_view kind() const noexcept { return kind_; }  // QMP's error class

 private:
  std::string_view kind_;  // a literal
};

struct Request {
  std::string command;
  Received arguments = Received::object();
};

// One line without its end. `id` becomes what an answer echoes, also that of a request which is refused; null
// when there is none. Throws CommandError.
Request parse_request(std::string_view line, Received& id);

// Lines to send, with their ends. What is no UTF-8 is replaced.
std::string greeting_line(std::string_view version);
std::string success_line(const Json& value, const Received& id);
std::string failure_line(const CommandError& error, const Received& id);

// The arguments of a request, by their types. All throw CommandError naming the argument.
uint64_t number_argument(const Request& request, const char* name, uint64_t maximum);
std::string text_argument(const Request& request, const char* name);
// A name that the command does not know is an error, and not ignored.
void allow_arguments(const Request& request, std::initializer_list<const char*> names);

// Cuts a stream of bytes into lines, of which none grows beyond max_line.
class LineBuffer {
 public:
  void append(std::string_view bytes) { bytes_.append(bytes); }
  // The next complete line, without LF or CR LF.
  std::optional<std::string> take();
  // What has come cannot be a line any more.
  bool overlong() const noexcept { return bytes_.size() - begin_ > max_line && !has_line(); }
  bool has_line() const noexcept { return bytes_.find('\n', begin_) != std::string::npos; }

 private:
  std::string bytes_;
  size_t begin_ = 0;  // what is before it has been taken
};

}  // namespace lodge::vm::control
