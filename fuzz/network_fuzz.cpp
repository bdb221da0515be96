// A TCP connection of user-mode networking between a guest and a program of the host's: the input chooses
// what both of them do, and when what is told to the guest goes. Whatever they do, each side gets the other's
// bytes in order or none.
#include <sys/epoll.h>
#include <sys/socket.h>

#include <array>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <vector>

#include "input.hpp"
#include "net/tcp_connection.hpp"
#include "net/wire.hpp"

namespace {

using namespace lodge;
using namespace lodge::net;

class Input : public fuzz::Bytes {
 public:
  using Bytes::Bytes;
  uint32_t word() { return uint32_t{byte()} << 24 | byte() << 16 | byte() << 8 | byte(); }
};

constexpr uint32_t guest_start = 0xffff'f000, host_start = 0xffff'ff00;  // numbers wrap soon

uint8_t guest_byte(uint32_t index) {
  return static_cast<uint8_t>(index * 31 + index / 251);
}
uint8_t host_byte(uint32_t index) {
  return static_cast<uint8_t>(index * 17 + index / 241 + 3);
}

class Both {
 public:
  Both() {
    int ends[2];
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, ends) != 0) std::abort();
    program_.reset(ends[1]);
    TcpSegment syn{.sequence = guest_start - 1, .flags = TCP_SYN, .window = 1000, .mss = 1000};
    syn.window_scale = 3;
    connection_.emplace(syn, Fd(ends[0]), uint16_t{1460}, host_start - 1);
    connection_->host_ready(EPOLLOUT);
  }
  void step(Input& input) {
    switch (input.byte() % 8) {
      case 0:
      case 1: return guest_sends(input);
      case 2: return program_writes(input);
      case 3: return program_reads();
      case 4:
      case 5: return tell_the_guest(input);
      case 6: now_ += std::chrono::milliseconds(10 * input.byte()); return connection_->on_tick(now_);
      default:
        if (input.byte() % 16 == 0) ::shutdown(program_.get(), SHUT_WR);
        if (input.byte() % 64 == 0) program_.reset();
        connection_->host_ready(input.byte());
        connection_->set_buffer(TcpConnection::min_buffer << input.byte() % 5);
    }
  }

 private:
  void guest_sends(Input& input) {
    const uint8_t choice = input.byte();
    TcpSegment segment{.ends = connection_->ends(), .flags = TCP_ACK};
    segment.sequence = choice & 1 ? expected_by_host_ : expected_by_host_ + input.byte() - 128;
    segment.acknowledged = choice & 2 ? expected_by_guest_ : expected_by_guest_ + input.byte() - 128;
    if ((choice & 0xe0) == 0) segment.flags = input.byte();
    if ((choice & 0xe0) == 0x20) segment.sequence = input.word();
    if ((choice & 0xe0) == 0x40) segment.acknowledged = input.word();
    segment.window = static_cast<uint16_t>(input.byte() * 8);
    segment.payload = choice & 4 ? 0 : size_t{input.byte()} * 16;
    segment.header = 54;
    std::vector<uint8_t> frame(segment.header + segment.payload);
    for (uint32_t i = 0; i < segment.payload; i++)
      frame[segment.header + i] = guest_byte(segment.sequence + i - guest_start);
    const size_t first = std::min<size_t>(frame.size(), input.byte());
    const iovec pieces[] = {{frame.data(), first}, {frame.data() + first, frame.size() - first}};
    connection_->input(segment, pieces);
  }
  void program_writes(Input& input) {
    std::vector<uint8_t> bytes(size_t{input.byte()} * 64 + 1);
    for (uint32_t i = 0; i < bytes.size(); i++) bytes[i] = host_byte(written_ + i);
    const ssize_t count = ::send(program_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (count > 0) written_ += static_cast<uint32_t>(count);
    connection_->host_ready(EPOLLIN);
  }
  void program_reads() {
    std::array<uint8_t, 8192> bytes;
    const ssize_t count = ::recv(program_.get(), bytes.data(), bytes.size(), MSG_DONTWAIT);
    for (ssize_t i = 0; i < count; i++)
      if (bytes[static_cast<size_t>(i)] != guest_byte(read_++)) std::abort();
    connection_->host_ready(EPOLLOUT);
  }
  void tell_the_guest(Input& input) {
    const auto output = connection_->next_output(input.byte() * size_t{250} + 1);
    if (!output) return;
    std::array<uint8_t, max_tcp_headers> headers;
    connection_->headers(*output, headers);
    size_t seen = 0;
    for (const iovec& piece : connection_->payload_of(*output))
      for (size_t i = 0; i < piece.iov_len; i++, seen++) {
        const auto index = output->reply.sequence - host_start + static_cast<uint32_t>(seen);
        if (static_cast<const uint8_t*>(piece.iov_base)[i] != host_byte(index)) std::abort();
      }
    if (seen != output->payload) std::abort();
    expected_by_host_ = output->reply.acknowledged;
    const uint32_t end = output->reply.sequence + static_cast<uint32_t>(output->payload) +
                         (output->reply.flags & (TCP_SYN | TCP_FIN) ? 1 : 0);
    if (static_cast<int32_t>(end - expected_by_guest_) > 0) expected_by_guest_ = end;
    connection_->sent(*output, now_);
  }

  Fd program_;
  std::optional<TcpConnection> connection_;
  TcpConnection::Clock::time_point now_{};
  uint32_t expected_by_host_ = guest_start, expected_by_guest_ = host_start - 1;
  uint32_t written_ = 0, read_ = 0;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  // Any frame is parsed, whatever is in it; what is found lies within.
  TcpSegment segment;
  if (parse_tcp({data, size}, size, segment) && segment.header + segment.payload > size) std::abort();
  Both both;
  for (Input input({data, size}); !input.empty();) both.step(input);
  return 0;
}
