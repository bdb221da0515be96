#include "vm/control/server.hpp"

#include <poll.h>
#include <pthread.h>
#include <sys/socket.h>

#include <array>
#include <cerrno>
#include <utility>

namespace lodge::vm::control {
namespace {

// When the process has no descriptor left, the peer that waits would wake the thread again and again.
constexpr int crowded_pause_ms = 200;

}  // namespace

Server::Server(std::unique_ptr<Listener> listener, std::string version, Handler handler)
    : listener_(std::move(listener)),
      version_(std::move(version)),
      handler_(std::move(handler)),
      stop_(Fd::event()),
      thread_([this] {
        ::pthread_setname_np(::pthread_self(), "lodge-control");
        loop();
      }) {}

Server::~Server() {
  signal_event(stop_.get());
  thread_.join();
}

void Server::loop() noexcept {
  for (;;) {
    std::vector<pollfd> fds = {{stop_.get(), POLLIN, 0},
                               {listener_->fd(), static_cast<short>(crowded_ ? 0 : POLLIN), 0}};
    for (const auto& connection : connections_) {
      const bool reads = !connection->ends && connection->out.size() < max_unread;
      fds.push_back({connection->fd.get(),
                     static_cast<short>((reads ? POLLIN : 0) | (connection->out.empty() ? 0 : POLLOUT)), 0});
    }
    const int timeout = std::exchange(crowded_, false) ? crowded_pause_ms : -1;
    if (::poll(fds.data(), fds.size(), timeout) < 0) continue;
    if (fds[0].revents) return;
    for (size_t i = 0; i < connections_.size(); i++)
      if (fds[i + 2].revents) serve(*connections_[i], fds[i + 2].revents);
    std::erase_if(connections_, [](const auto& connection) { return connection->gone; });
    if (fds[1].revents) accept_all();
  }
}

void Server::accept_all() {
  for (;;) {
    Fd fd(::accept4(listener_->fd(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!fd) {
      crowded_ = errno != EAGAIN;
      return;
    }
    auto connection = std::make_unique<Connection>(std::move(fd));
    const bool full = connections_.size() >= max_connections;
    connection->out = full ? failure_line(CommandError("too many connections; close one"), nullptr)
                           : greeting_line(version_);
    send(*connection);  // one who is refused gets what fits, and is closed here
    if (!full && !connection->gone) connections_.push_back(std::move(connection));
  }
}

void Server::serve(Connection& connection, short events) {
  if (events & POLLOUT) send(connection);
  if (connection.gone) return;
  if (events & (POLLIN | POLLHUP | POLLERR)) receive(connection);
  if (connection.gone) return;
  do {
    answer_lines(connection);
    send(connection);
  } while (connection.out.empty() && !connection.gone && connection.in.has_line());
  if (connection.ends && connection.out.empty()) connection.gone = true;
}

void Server::receive(Connection& connection) {
  std::array<char, 16 * 1024> piece;
  const ssize_t count = ::recv(connection.fd.get(), piece.data(), piece.size(), 0);
  if (count < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (count < 0) {
    connection.gone = true;
  } else if (count == 0) {
    connection.ends = true;
  } else if (!connection.ends) {
    connection.in.append({piece.data(), static_cast<size_t>(count)});
  }
}

void Server::answer_lines(Connection& connection) {
  while (connection.out.size() < max_unread) {
    const auto line = connection.in.take();
    if (!line) break;
    if (!line->empty()) connection.out += answer(*line);
  }
  if (!connection.in.overlong() || connection.ends) return;
  connection.out += failure_line(CommandError("the line is too long"), nullptr);
  connection.ends = true;
}

std::string Server::answer(const std::string& line) {
  Received id;
  try {
    const Request request = parse_request(line, id);
    return success_line(handler_(request), id);
  } catch (const CommandError& error) {
    return failure_line(error, id);
  } catch (const std::exception& error) {  // the host had no memory, or the like: this command's misfortune
    return failure_line(CommandError(error.what()), id);
  }
}

void Server::send(Connection& connection) noexcept {
  while (!connection.out.empty()) {
    const ssize_t count =
        ::send(connection.fd.get(), connection.out.data(), connection.out.size(), MSG_NOSIGNAL);
    if (count < 0) {
      connection.gone |= errno != EAGAIN && errno != EINTR;
      return;
    }
    connection.out.erase(0, static_cast<size_t>(count));
  }
}

}  // namespace lodge::vm::control
