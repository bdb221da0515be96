// TCP of a user-mode network: connections that the guest opens end here and go on as sockets of the host's,
// with segments as long as the guest likes, no checksums, large windows and no thread in between.
#pragma once

#include <memory>

#include "net/backend.hpp"

namespace lodge::net {

class TcpSplice {
 public:
  // `mss` is proposed to the guest. Throws std::system_error.
  static std::unique_ptr<TcpSplice> make(uint16_t mss);
  virtual ~TcpSplice() = default;

  // As Backend's.
  virtual void connect(Card& card, EventLoop& loop) noexcept = 0;
  virtual void disconnect() noexcept = 0;
  virtual void accept(const Offloads& offloads) noexcept = 0;
  // False: the frame is no TCP of a connection that is its matter: the guest's to a host that can be reached
  // by a socket, which is every one but those of the virtual network itself, save for the host's own address.
  virtual bool take(std::span<const iovec> frame) noexcept = 0;
  virtual void flush() noexcept = 0;
  virtual void receive_ready() noexcept = 0;
};

}  // namespace lodge::net
