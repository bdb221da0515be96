// One TCP connection of the guest's that ends in this process and goes on as a socket of the host's.
#pragma once

#include <chrono>
#include <optional>

#include "base/fd.hpp"
#include "net/byte_ring.hpp"
#include "net/tcp_segment.hpp"

namespace lodge::net {

// The server's half of TCP (RFC 9293) towards the guest. Not synchronised. The socket is non-blocking and
// watched by its owner for edges in both directions.
class TcpConnection {
 public:
  using Clock = std::chrono::steady_clock;
  // `syn` opens it; `socket` is connected, or about to be. `mss`: of the network between.
  TcpConnection(const TcpSegment& syn, Fd socket, uint16_t mss, uint32_t initial_sequence);

  const TcpEnds& ends() const noexcept { return ends_; }
  // At most so many bytes wait in each direction; more only where they do already. At most max_buffer.
  void set_buffer(size_t bytes) noexcept { buffer_ = bytes; }
  static constexpr size_t min_buffer = size_t{64} << 10, max_buffer = size_t{1} << 20;

  // A segment of the guest's with these ends; `frame`, all of it, is guest memory, for this call only, and
  // may change meanwhile.
  void input(const TcpSegment& segment, std::span<const iovec> frame);
  // The socket's events, as epoll(7) reports them.
  void host_ready(uint32_t events);
  // There is no socket for it: the guest is told.
  void refuse() noexcept { fail(); }
  // Nothing comes from the guest any more; the host's end is told by a reset.
  void abort() noexcept;

  // What is to go to the guest now.
  struct Output {
    TcpReply reply;
    size_t payload = 0;
  };
  // `largest`: payload of a segment; more than mss() only if somebody cuts it later. Reads from the socket.
  std::optional<Output> next_output(size_t largest);
  // The payload, in one or two pieces.
  std::array<iovec, 2> payload_of(const Output& output) const noexcept;
  // It has gone.
  void sent(const Output& output, Clock::time_point now) noexcept;
  size_t headers(const Output& output, std::span<uint8_t, max_tcp_headers> out) const noexcept {
    return write_tcp(ends_, guest_mac_, peer_mac_, output.reply, output.payload, out);
  }
  uint16_t mss() const noexcept { return mss_; }

  // Whether the guest owes an answer; on_tick() says again what it may have lost.
  bool outstanding() const noexcept;
  void on_tick(Clock::time_point now) noexcept;
  // Both sides have ended: it may go.
  bool over() const noexcept { return over_; }
  // Both sides have said that they end, so that a new connection may take its place.
  bool closing() const noexcept { return guest_ended_ && host_ended_; }
  // For its owner: it stands in a list.
  bool queued = false;

 private:
  enum class State { connecting, answering, open, refusing };
  void take_acknowledgement(const TcpSegment& segment) noexcept;
  void take_payload(const TcpSegment& segment, std::span<const iovec> frame);
  size_t to_socket(std::span<const iovec> pieces) noexcept;
  size_t write(std::span<const iovec> pieces) noexcept;
  void drain_to_host() noexcept;
  void fill_from_host(size_t wanted);
  void fail() noexcept;
  void finish_if_done() noexcept;
  void go_back() noexcept;
  size_t window() const noexcept;
  TcpReply reply(uint8_t flags) const noexcept;
  Output reset() const noexcept;
  std::optional<Output> next_data(size_t largest);

  const TcpEnds ends_;
  const std::array<uint8_t, 6> guest_mac_, peer_mac_;
  const uint16_t mss_, offered_mss_;
  const int scale_;  // of the guest's windows; -1: none on either side
  size_t buffer_ = max_buffer;
  State state_ = State::connecting;
  Fd socket_;
  bool readable_ = false, writable_ = false;

  // From the guest.
  uint32_t next_;      // the sequence number that comes next
  uint32_t edge_ = 0;  // the end of the window that it knows of
  bool ended_at_host_ = false;
  bool guest_ended_ = false;
  bool owe_ = false;  // an acknowledgement
  ByteRing to_host_;  // what the socket has not taken yet

  // To the guest.
  uint32_t unacknowledged_, next_sent_, highest_sent_;
  size_t guest_window_ = 0;
  ByteRing to_guest_;  // from unacknowledged_ on
  bool host_ended_ = false, end_sent_ = false, end_acknowledged_ = false;
  bool probe_ = false;
  unsigned duplicates_ = 0, attempts_ = 0;
  std::optional<Clock::time_point> deadline_;
  bool over_ = false;
};

}  // namespace lodge::net
