// RFC 9293; acknowledgements and windows of the sender's side as RFC 5681, 3.2, and RFC 9293, 3.8.6 have
// them.
//
// The way to the guest loses nothing by itself, keeps the order and has no queue of others', so there is no
// congestion control. The guest may drop a segment all the same, for want of memory or by its own rules:
// three acknowledgements for the same place or silence for a second, then twice as long each time, and all is
// sent again from there on. Segments that arrive out of order are not kept. Urgent data is data.
#include "net/tcp_connection.hpp"

#include <sys/epoll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "net/wire.hpp"

namespace lodge::net {

namespace {

constexpr int own_scale = 5;  // 65535 << 5 is more than max_buffer
constexpr uint16_t default_mss = 536, smallest_mss = 88;
constexpr unsigned many_duplicates = 3;
// Of one segment's payload: a guest that cuts its packets smaller sends the rest again.
constexpr size_t most_pieces = 64;
constexpr size_t a_read = size_t{64} << 10;  // what a short connection needs at most
constexpr std::chrono::seconds first_patience{1}, longest_patience{30};

// Of sequence numbers, modulo 2^32.
bool before(uint32_t one, uint32_t other) noexcept {
  return static_cast<int32_t>(one - other) < 0;
}

}  // namespace

TcpConnection::TcpConnection(const TcpSegment& syn, Fd socket, uint16_t mss, uint32_t initial_sequence)
    : ends_(syn.ends),
      guest_mac_(syn.guest_mac),
      peer_mac_(syn.peer_mac),
      mss_(std::clamp(syn.mss == 0 ? default_mss : syn.mss, smallest_mss, mss)),
      offered_mss_(mss),
      scale_(syn.window_scale),
      socket_(std::move(socket)),
      next_(syn.sequence + 1),
      unacknowledged_(initial_sequence),
      next_sent_(initial_sequence),
      highest_sent_(initial_sequence),
      guest_window_(syn.window) {}

// --- From the guest

void TcpConnection::input(const TcpSegment& segment, std::span<const iovec> frame) {
  if (over_) return;
  if (segment.flags & TCP_RST) {
    // RFC 5961, 3.2: only at the very place where the next byte is due; others are asked about it.
    if (segment.sequence == next_) return abort();
    owe_ = true;
    return;
  }
  if (segment.flags & TCP_SYN) {
    // The same one again: the answer is still on its way.
    if (state_ == State::open) owe_ = true;
    return;
  }
  if (!(segment.flags & TCP_ACK) || state_ == State::connecting || state_ == State::refusing) return;
  if (state_ == State::answering) {
    if (highest_sent_ == unacknowledged_ || segment.acknowledged != highest_sent_) return;
    unacknowledged_ = next_sent_ = highest_sent_;
    state_ = State::open;
    deadline_.reset();
    attempts_ = 0;
    readable_ = true;  // there may have been something before the first edge
  }
  take_acknowledgement(segment);
  take_payload(segment, frame);
  finish_if_done();
}

void TcpConnection::take_acknowledgement(const TcpSegment& segment) noexcept {
  if (before(segment.acknowledged, unacknowledged_) || before(highest_sent_, segment.acknowledged)) return;
  const size_t window = size_t{segment.window} << std::max(scale_, 0);
  const size_t acknowledged = segment.acknowledged - unacknowledged_;
  if (acknowledged == 0) {
    if (segment.payload == 0 && window == guest_window_ && next_sent_ != unacknowledged_ &&
        !(segment.flags & TCP_FIN) && ++duplicates_ == many_duplicates)
      go_back();
    if (guest_window_ == 0 && window != 0) {
      // It opens: whatever probed it was not taken.
      attempts_ = 0;
      deadline_.reset();
      go_back();
    }
    guest_window_ = window;
    return;
  }
  guest_window_ = window;
  duplicates_ = attempts_ = 0;
  deadline_.reset();
  const size_t data = std::min(acknowledged, to_guest_.size());
  to_guest_.consume(data);
  if (acknowledged > data) end_acknowledged_ = true;
  unacknowledged_ = segment.acknowledged;
  if (before(next_sent_, unacknowledged_)) next_sent_ = unacknowledged_;
}

void TcpConnection::take_payload(const TcpSegment& segment, std::span<const iovec> frame) {
  const bool ends = segment.flags & TCP_FIN;
  // A probe of a window that is closed, or of a connection that is idle, wants an answer, too.
  if (segment.payload == 0 && !ends) {
    if (segment.sequence != next_) owe_ = true;
    return;
  }
  owe_ = true;
  const uint32_t known = next_ - segment.sequence;
  if (before(next_, segment.sequence) || known > segment.payload || guest_ended_) return;
  std::array<iovec, most_pieces> pieces, rest;
  const auto fresh = std::span(pieces).first(
      cut_pieces(frame, segment.header + known, std::min(segment.payload - known, window()), pieces));
  const size_t taken = total_size(fresh), done = taken == 0 ? 0 : to_socket(fresh);
  if (state_ == State::refusing) return;
  if (done < taken) {
    // The rest waits for the socket.
    const size_t count = cut_pieces(fresh, done, taken - done, rest);
    copy_pieces(std::span(rest).first(count), to_host_.room(taken - done));
    to_host_.grow(taken - done);
  }
  next_ += static_cast<uint32_t>(taken);
  if (ends && segment.sequence + segment.payload == next_) {
    next_++;
    guest_ended_ = true;
    drain_to_host();
  }
}

// Bytes that the socket has taken; none when others wait before them.
size_t TcpConnection::to_socket(std::span<const iovec> pieces) noexcept {
  return writable_ && to_host_.empty() ? write(pieces) : 0;
}

size_t TcpConnection::write(std::span<const iovec> pieces) noexcept {
  msghdr message{};
  message.msg_iov = const_cast<iovec*>(pieces.data());
  message.msg_iovlen = pieces.size();
  const ssize_t count = ::sendmsg(socket_.get(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
  if (count < 0 && errno != EAGAIN && errno != EINTR) fail();
  const size_t done = count < 0 ? 0 : static_cast<size_t>(count);
  if (done < total_size(pieces)) writable_ = false;
  return done;
}

void TcpConnection::drain_to_host() noexcept {
  if (writable_ && !to_host_.empty()) {
    to_host_.consume(write(to_host_.pieces(0, to_host_.size())));
    if (state_ == State::refusing) return;
    // What the guest knows of is nearly used up: tell it that there is more.
    if (edge_ - next_ < buffer_ / 2 && window() >= buffer_ / 2) owe_ = true;
  }
  if (guest_ended_ && to_host_.empty() && !std::exchange(ended_at_host_, true))
    ::shutdown(socket_.get(), SHUT_WR);
}

void TcpConnection::abort() noexcept {
  const linger at_once{.l_onoff = 1, .l_linger = 0};  // by a reset
  ::setsockopt(socket_.get(), SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
  socket_.reset();
  over_ = true;
}

// --- From the host

void TcpConnection::host_ready(uint32_t events) {
  if (over_ || state_ == State::refusing) return;
  if (state_ == State::connecting) {
    if (!(events & (EPOLLOUT | EPOLLERR | EPOLLHUP))) return;
    int error = 0;
    socklen_t size = sizeof error;
    ::getsockopt(socket_.get(), SOL_SOCKET, SO_ERROR, &error, &size);
    if (error != 0) return fail();
    state_ = State::answering;
    writable_ = true;
    return;
  }
  if (events & (EPOLLIN | EPOLLRDHUP | EPOLLERR | EPOLLHUP)) readable_ = true;
  if (events & EPOLLOUT) {
    writable_ = true;
    drain_to_host();
    finish_if_done();
  }
}

void TcpConnection::fill_from_host(size_t wanted) {
  while (readable_ && !host_ended_ && to_guest_.size() < buffer_ && to_guest_.size() < wanted) {
    const auto room = to_guest_.room(std::min(buffer_ - to_guest_.size(), a_read));
    const ssize_t count = ::readv(socket_.get(), room.data(), room[1].iov_len == 0 ? 1 : 2);
    if (count > 0) {
      to_guest_.grow(static_cast<size_t>(count));
    } else if (count == 0) {
      host_ended_ = true;
    } else if (errno == EAGAIN) {
      readable_ = false;
    } else if (errno != EINTR) {
      return fail();
    }
  }
}

// The guest is told by a reset.
void TcpConnection::fail() noexcept {
  state_ = State::refusing;
  socket_.reset();
}

void TcpConnection::finish_if_done() noexcept {
  if (state_ == State::open && guest_ended_ && end_acknowledged_ && to_host_.empty() && !owe_) over_ = true;
}

// --- To the guest

size_t TcpConnection::window() const noexcept {
  const size_t room = to_host_.size() < buffer_ ? buffer_ - to_host_.size() : 0;
  const size_t most = size_t{65535} << (scale_ >= 0 ? own_scale : 0);
  // What has been offered stays offered.
  return std::max(std::min(room, most),
                  state_ == State::open && before(next_, edge_) ? edge_ - next_ : size_t{0});
}

TcpReply TcpConnection::reply(uint8_t flags) const noexcept {
  size_t shown = window();
  if (scale_ >= 0 && !(flags & TCP_SYN)) shown >>= own_scale;
  return {.sequence = next_sent_,
          .acknowledged = next_,
          .flags = flags,
          .window = static_cast<uint16_t>(std::min<size_t>(shown, 65535))};
}

// RFC 5961, 3.2: it counts only at the place where the guest expects the next byte.
TcpConnection::Output TcpConnection::reset() const noexcept {
  Output output{reply(TCP_RST | TCP_ACK), 0};
  output.reply.sequence = highest_sent_;
  return output;
}

std::optional<TcpConnection::Output> TcpConnection::next_output(size_t largest) {
  if (over_) return std::nullopt;
  switch (state_) {
    case State::connecting: return std::nullopt;
    case State::refusing: return reset();
    case State::answering: {
      if (next_sent_ != unacknowledged_) return std::nullopt;
      Output answer{reply(TCP_SYN | TCP_ACK), 0};
      answer.reply.mss = offered_mss_;
      answer.reply.window_scale = scale_ >= 0 ? own_scale : -1;
      return answer;
    }
    case State::open: break;
  }
  if (auto data = next_data(largest)) return data;
  if (state_ == State::refusing) return reset();  // reading has failed
  if (!owe_) return std::nullopt;
  Output acknowledgement{reply(TCP_ACK), 0};
  acknowledgement.reply.sequence = highest_sent_;
  return acknowledgement;
}

std::optional<TcpConnection::Output> TcpConnection::next_data(size_t largest) {
  if (end_sent_ || end_acknowledged_) return std::nullopt;
  const size_t in_flight = next_sent_ - unacknowledged_;
  if (in_flight < guest_window_) fill_from_host(in_flight + largest);
  if (state_ != State::open) return std::nullopt;
  const size_t unsent = to_guest_.size() - in_flight;
  const size_t open = in_flight < guest_window_ ? guest_window_ - in_flight : 0;
  size_t count = std::min({unsent, open, largest});
  // RFC 9293, 3.8.6.2.1: not crumbs because the window is nearly closed.
  if (count < unsent && count < mss_ && in_flight != 0) count = 0;
  if (count == 0 && unsent != 0 && probe_) count = 1;
  const bool end = host_ended_ && count == unsent;
  if (count == 0 && !end) return std::nullopt;
  uint8_t flags = TCP_ACK;
  if (count == unsent) flags |= TCP_PSH;
  if (end) flags |= TCP_FIN;
  return Output{reply(flags), count};
}

std::array<iovec, 2> TcpConnection::payload_of(const Output& output) const noexcept {
  return to_guest_.pieces(output.reply.sequence - unacknowledged_, output.payload);
}

void TcpConnection::sent(const Output& output, Clock::time_point now) noexcept {
  if (output.reply.flags & TCP_RST) {
    over_ = true;
    return;
  }
  owe_ = false;
  edge_ = next_ + static_cast<uint32_t>(window());
  if (output.payload != 0 || (output.reply.flags & (TCP_SYN | TCP_FIN))) {
    next_sent_ += static_cast<uint32_t>(output.payload);
    if (output.reply.flags & (TCP_SYN | TCP_FIN)) next_sent_++;
    if (output.reply.flags & TCP_FIN) end_sent_ = true;
    if (before(highest_sent_, next_sent_)) highest_sent_ = next_sent_;
    probe_ = false;
    if (!deadline_)
      deadline_ =
          now + std::min<Clock::duration>(first_patience * (1 << std::min(attempts_, 5u)), longest_patience);
  }
  finish_if_done();
}

bool TcpConnection::outstanding() const noexcept {
  if (over_ || state_ == State::connecting || state_ == State::refusing) return false;
  return next_sent_ != unacknowledged_ || !to_guest_.empty();
}

void TcpConnection::on_tick(Clock::time_point now) noexcept {
  if (!outstanding()) return;
  if (!deadline_) deadline_ = now + first_patience;
  if (now < *deadline_) return;
  attempts_++;
  deadline_.reset();
  probe_ = guest_window_ == 0;
  go_back();
}

void TcpConnection::go_back() noexcept {
  next_sent_ = unacknowledged_;
  end_sent_ = false;
}

}  // namespace lodge::net
