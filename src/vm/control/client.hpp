// The other end of a control socket: what `lodge ctl` and tests speak through. One thread.
#pragma once

#include <string>

#include "vm/control/protocol.hpp"
#include "vm/control/socket.hpp"

namespace lodge::vm::control {

class Client {
 public:
  // Connects and reads the greeting. Throws UsageError when nobody listens, CommandError when what listens
  // does not answer.
  explicit Client(const std::string& path, int patience_ms = 30'000);

  // The answer of a command. Throws CommandError: the machine's own, or that it has gone.
  Json execute(const std::string& command, const Json& arguments = Json::object());

 private:
  Json receive();

  Fd fd_;
  LineBuffer in_;
  int patience_ms_;
};

}  // namespace lodge::vm::control
