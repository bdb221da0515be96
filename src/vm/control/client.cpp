#include "vm/control/client.hpp"

#include <fmt/format.h>
#include <poll.h>
#include <sys/socket.h>

#include <array>
#include <cerrno>

namespace lodge::vm::control {
namespace {

// Of one answer: a server is no more to be trusted than a client.
constexpr size_t max_answer = 8u << 20;

}  // namespace

Client::Client(const std::string& path, int patience_ms) : fd_(connect_to(path)), patience_ms_(patience_ms) {
  const Json greeting = receive();
  if (const auto error = greeting.find("error"); error != greeting.end())
    throw CommandError(error->value("desc", "refused"));
  if (!greeting.contains("QMP")) throw CommandError(fmt::format("'{}' is no control socket", path));
}

Json Client::execute(const std::string& command, const Json& arguments) {
  Json request = {{"execute", command}};
  if (!arguments.empty()) request["arguments"] = arguments;
  const std::string line = request.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
  for (size_t done = 0; done < line.size();) {
    const ssize_t count = ::send(fd_.get(), line.data() + done, line.size() - done, MSG_NOSIGNAL);
    if (count < 0 && errno != EINTR) throw CommandError("the machine has gone");
    if (count > 0) done += static_cast<size_t>(count);
  }
  for (;;) {
    Json answer = receive();
    if (answer.contains("event")) continue;
    if (const auto error = answer.find("error"); error != answer.end())
      throw CommandError(error->is_object() ? error->value("desc", "refused") : "refused");
    if (const auto value = answer.find("return"); value != answer.end()) return std::move(*value);
    throw CommandError("the machine's answer makes no sense");
  }
}

Json Client::receive() {
  for (size_t total = 0; total < max_answer;) {
    if (const auto line = in_.take()) {
      Json json = Json::parse(*line, nullptr, false);
      if (!json.is_object()) throw CommandError("the machine's answer makes no sense");
      return json;
    }
    pollfd waiting{fd_.get(), POLLIN, 0};
    const int ready = ::poll(&waiting, 1, patience_ms_);
    if (ready == 0) throw CommandError(fmt::format("no answer within {} s", patience_ms_ / 1000));
    std::array<char, 16 * 1024> piece;
    const ssize_t count = ready < 0 ? -1 : ::recv(fd_.get(), piece.data(), piece.size(), 0);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) throw CommandError("the machine has gone");
    in_.append({piece.data(), static_cast<size_t>(count)});
    total += static_cast<size_t>(count);
  }
  throw CommandError("the machine's answer is too long");
}

}  // namespace lodge::vm::control
