// Serves a control socket: a thread of its own, which alone touches connections and calls the handler.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/fd.hpp"
#include "vm/control/protocol.hpp"
#include "vm/control/socket.hpp"

namespace lodge::vm::control {

// What a peer can take up: so many connections, each with one line that is coming and some answers that it
// has not read. While those are too many its requests are not read either.
inline constexpr size_t max_connections = 16;
inline constexpr size_t max_unread = 256 * 1024;

class Server {
 public:
  // The answer of a command; throws CommandError. On the server's thread; others wait meanwhile.
  using Handler = std::function<Json(const Request&)>;

  // Starts the thread. `handler` may be called until the destructor has returned. Throws std::system_error.
  Server(std::unique_ptr<Listener> listener, std::string version, Handler handler);
  // Answers that were given are sent as far as peers take them without waiting.
  ~Server();
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

 private:
  struct Connection {
    explicit Connection(Fd socket) : fd(std::move(socket)) {}
    Fd fd;
    LineBuffer in;
    std::string out;
    bool ends = false;  // nothing more is read; closed once `out` has gone
    bool gone = false;
  };

  void loop() noexcept;
  void accept_all();
  void serve(Connection& connection, short events);
  void receive(Connection& connection);
  void answer_lines(Connection& connection);
  std::string answer(const std::string& line);
  static void send(Connection& connection) noexcept;

  std::unique_ptr<Listener> listener_;
  std::string version_;
  Handler handler_;
  Fd stop_;
  // The thread's.
  std::vector<std::unique_ptr<Connection>> connections_;
  bool crowded_ = false;  // a connection could not be accepted
  std::thread thread_;
};

}  // namespace lodge::vm::control
