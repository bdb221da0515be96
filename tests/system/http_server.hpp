// A server on the host for guests to download from.
#pragma once

#include <arpa/inet.h>
#include <fmt/format.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <string>
#include <thread>

#include "base/fd.hpp"

namespace lodge {

// The least of an HTTP server: any request gets one file. On 127.0.0.1, a thread a test.
class HttpServer {
 public:
  explicit HttpServer(std::string body)
      : body_(std::move(body)), socket_(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    ::bind(socket_.get(), reinterpret_cast<sockaddr*>(&address), sizeof address);
    ::listen(socket_.get(), 8);
    socklen_t size = sizeof address;
    ::getsockname(socket_.get(), reinterpret_cast<sockaddr*>(&address), &size);
    port_ = ntohs(address.sin_port);
    thread_ = std::thread([this] { serve(); });
  }
  ~HttpServer() {
    ::shutdown(socket_.get(), SHUT_RDWR);
    thread_.join();
  }
  uint16_t port() const { return port_; }

 private:
  void serve() {
    for (;;) {
      const Fd peer(::accept(socket_.get(), nullptr, nullptr));
      if (!peer) return;
      std::string request;
      std::array<char, 1024> piece;
      while (request.find("\r\n\r\n") == std::string::npos) {
        const ssize_t count = ::read(peer.get(), piece.data(), piece.size());
        if (count <= 0) break;
        request.append(piece.data(), static_cast<size_t>(count));
      }
      const std::string answer =
          fmt::format("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", body_.size()) + body_;
      for (size_t done = 0; done < answer.size();) {
        const ssize_t count = ::send(peer.get(), answer.data() + done, answer.size() - done, MSG_NOSIGNAL);
        if (count <= 0) break;
        done += static_cast<size_t>(count);
      }
    }
  }
  std::string body_;
  Fd socket_;
  uint16_t port_ = 0;
  std::thread thread_;
};

}  // namespace lodge
