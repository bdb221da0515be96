// All is done on the card's loop: frames of the guest's come in under the card's lock and go straight to
// sockets; sockets and a timer are watched by one epoll descriptor, which the loop watches. What goes to the
// guest is made when the card asks for it, out of what the connections then have to say, so that one
// acknowledgement answers all that came before it.
#include "net/tcp_splice.hpp"

#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <deque>
#include <mutex>
#include <unordered_map>

#include "base/error.hpp"
#include "base/fd.hpp"
#include "net/offload.hpp"
#include "net/tcp_connection.hpp"
#include "net/wire.hpp"

namespace lodge::net {

namespace {

// What a hostile guest can make this process hold: so many descriptors, and so many bytes in each direction.
constexpr size_t max_connections = 1024, max_buffered = size_t{64} << 20;
constexpr long tick_ns = 200'000'000;
// Behind the headers of a packet of 65535 bytes.
constexpr size_t longest_payload = 65535 - 40 - 20;
constexpr size_t longest_reply = 28;  // TCP's header with the options that this writes
constexpr uint64_t work_id = 0, timer_id = 1, first_connection_id = 2;

// Where a socket has to go; 0 bytes: nowhere.
socklen_t host_address(const TcpEnds& ends, sockaddr_storage& address) noexcept {
  const auto& peer = ends.peer;
  if (ends.ip6) {
    sockaddr_in6 ip6{};
    ip6.sin6_family = AF_INET6;
    ip6.sin6_port = htons(ends.peer_port);
    constexpr std::array<uint8_t, 16> host = {0xfe, 0xc0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2};
    const bool global = (peer[0] & 0xe0) == 0x20 || (peer[0] & 0xfe) == 0xfc;
    if (peer == host)
      ip6.sin6_addr = IN6ADDR_LOOPBACK_INIT;
    else if (global)
      std::memcpy(&ip6.sin6_addr, peer.data(), 16);
    else
      return 0;
    std::memcpy(&address, &ip6, sizeof ip6);
    return sizeof ip6;
  }
  sockaddr_in ip4{};
  ip4.sin_family = AF_INET;
  ip4.sin_port = htons(ends.peer_port);
  if (peer[0] == 10 && peer[1] == 0 && peer[2] == 2) {
    if (peer[3] != 2) return 0;
    ip4.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  } else if (peer[0] == 0 || peer[0] == 127 || peer[0] >= 224) {
    return 0;
  } else {
    std::memcpy(&ip4.sin_addr, peer.data(), 4);
  }
  std::memcpy(&address, &ip4, sizeof ip4);
  return sizeof ip4;
}

class Splice final : public TcpSplice, private Source {
 public:
  explicit Splice(uint16_t mss)
      : mss_(mss),
        ready_(::epoll_create1(EPOLL_CLOEXEC)),
        work_(Fd::event()),
        timer_(::timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC)) {
    if (!ready_) throw_errno("epoll_create1");
    if (!timer_) throw_errno("timerfd_create");
    if (!watch(work_.get(), EPOLLIN, work_id) || !watch(timer_.get(), EPOLLIN, timer_id))
      throw_errno("epoll_ctl");
  }

  void connect(Card& card, EventLoop& loop) noexcept override {
    card_ = &card;
    watch_ = loop.watch(ready_.get(), EPOLLIN, [this](uint32_t) { serve(); });
  }
  void disconnect() noexcept override {
    watch_.reset();
    card_ = nullptr;
    const std::lock_guard lock(mutex_);
    for (auto& [id, connection] : connections_) connection->abort();
    connections_.clear();
    ids_.clear();
    output_.clear();
    planned_.reset();
  }
  void accept(const Offloads& offloads) noexcept override {
    const std::lock_guard lock(mutex_);
    offloads_ = offloads;
  }
  bool take(std::span<const iovec> frame) noexcept override;
  void flush() noexcept override {
    if (work_waits_.exchange(false)) signal_event(work_.get());
  }
  void receive_ready() noexcept override { signal_event(work_.get()); }

 private:
  struct Planned {
    uint64_t id;
    TcpConnection* connection;
    TcpConnection::Output output;
  };
  // --- On the loop, without a lock.
  void serve() noexcept;
  void deliver() noexcept;
  // --- Source, from the card.
  size_t largest() noexcept override;
  size_t read(PacketHeader& header, std::span<const iovec> room) noexcept override;

  // --- With the lock.
  bool watch(int fd, uint32_t events, uint64_t id) noexcept;
  TcpConnection* open(const TcpSegment& segment) noexcept;
  void want_output(uint64_t id, TcpConnection& connection) noexcept;
  void forget(uint64_t id) noexcept;
  void share_buffers() noexcept;
  void tick_later() noexcept;
  void tick() noexcept;
  size_t largest_payload(const TcpConnection& connection) const noexcept {
    return (connection.ends().ip6 ? offloads_.tso6 : offloads_.tso4) ? longest_payload : connection.mss();
  }

  const uint16_t mss_;
  Fd ready_, work_, timer_;
  Card* card_ = nullptr;  // set while nothing is watched
  std::atomic<bool> work_waits_ = false;

  std::mutex mutex_;  // behind the card's lock
  Offloads offloads_;
  uint64_t next_id_ = first_connection_id;
  std::unordered_map<uint64_t, std::unique_ptr<TcpConnection>> connections_;
  std::unordered_map<TcpEnds, uint64_t, TcpEndsHash> ids_;
  size_t share_ = TcpConnection::max_buffer;  // of max_buffered for each connection
  std::deque<uint64_t> output_;               // of those that may have something to say
  std::optional<Planned> planned_;
  bool ticking_ = false;
  std::vector<uint8_t> flat_;
  EventLoop::Watch watch_;
};

bool Splice::watch(int fd, uint32_t events, uint64_t id) noexcept {
  epoll_event event{};
  event.events = events;
  event.data.u64 = id;
  return ::epoll_ctl(ready_.get(), EPOLL_CTL_ADD, fd, &event) == 0;
}

// --- From the guest

bool Splice::take(std::span<const iovec> frame) noexcept {
  std::array<uint8_t, max_tcp_headers> headers;
  const size_t size = gather(frame, headers);
  TcpSegment segment;
  if (!parse_tcp(std::span(headers).first(size), total_size(frame), segment)) return false;
  const std::lock_guard lock(mutex_);
  const auto known = ids_.find(segment.ends);
  TcpConnection* connection = known == ids_.end() ? nullptr : connections_.at(known->second).get();
  const bool opens = (segment.flags & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN)) == TCP_SYN;
  if (connection && (connection->over() || (opens && connection->closing()))) {
    forget(known->second);
    connection = nullptr;
  }
  if (!connection) {
    if (!opens) return false;
    connection = open(segment);
    if (!connection) return false;
  } else {
    connection->input(segment, frame);
  }
  want_output(ids_.at(segment.ends), *connection);
  work_waits_ = true;
  return true;
}

// Null: not a matter of sockets.
TcpConnection* Splice::open(const TcpSegment& segment) noexcept {
  sockaddr_storage address{};
  const socklen_t size = host_address(segment.ends, address);
  if (size == 0) return nullptr;
  uint32_t sequence = 0;
  std::ignore = ::getrandom(&sequence, sizeof sequence, GRND_NONBLOCK);
  Fd socket;
  const uint64_t id = next_id_++;
  if (connections_.size() < max_connections)
    socket.reset(::socket(address.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  bool refused = !socket;
  if (socket) {
    const int on = 1;
    ::setsockopt(socket.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    refused = ::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), size) != 0 &&
              errno != EINPROGRESS;
    // Only now: a socket that is not being connected has hung up.
    if (!refused) refused = !watch(socket.get(), EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, id);
  }
  auto connection = std::make_unique<TcpConnection>(segment, std::move(socket), mss_, sequence);
  connection->set_buffer(share_);
  if (refused) connection->refuse();
  TcpConnection* made = connection.get();
  connections_.emplace(id, std::move(connection));
  ids_.emplace(segment.ends, id);
  share_buffers();
  return made;
}

void Splice::want_output(uint64_t id, TcpConnection& connection) noexcept {
  if (!std::exchange(connection.queued, true)) output_.push_back(id);
}

void Splice::tick_later() noexcept {
  if (std::exchange(ticking_, true)) return;
  const itimerspec when{{}, {0, tick_ns}};
  ::timerfd_settime(timer_.get(), 0, &when, nullptr);
}

// Its number in `output_` means nobody from here on.
void Splice::forget(uint64_t id) noexcept {
  const auto found = connections_.find(id);
  ids_.erase(found->second->ends());
  connections_.erase(found);
  if (planned_ && planned_->id == id) planned_.reset();
  share_buffers();
}

void Splice::share_buffers() noexcept {
  const size_t each = std::clamp(max_buffered / std::max<size_t>(connections_.size(), 1),
                                 TcpConnection::min_buffer, TcpConnection::max_buffer);
  if (each == std::exchange(share_, each)) return;
  for (auto& [id, connection] : connections_) connection->set_buffer(each);
}

// --- On the loop

void Splice::serve() noexcept {
  std::array<epoll_event, 64> events;
  const int count = ::epoll_wait(ready_.get(), events.data(), static_cast<int>(events.size()), 0);
  {
    const std::lock_guard lock(mutex_);
    for (int i = 0; i < count; i++) {
      const auto& event = events[static_cast<size_t>(i)];
      if (event.data.u64 == work_id) {
        take_event(work_.get());
      } else if (event.data.u64 == timer_id) {
        tick();
      } else if (const auto found = connections_.find(event.data.u64); found != connections_.end()) {
        found->second->host_ready(event.events);
        want_output(found->first, *found->second);
      }
    }
  }
  deliver();
}

void Splice::tick() noexcept {
  uint64_t expired;
  if (::read(timer_.get(), &expired, sizeof expired) != sizeof expired) return;
  ticking_ = false;
  const auto now = TcpConnection::Clock::now();
  for (auto& [id, connection] : connections_) {
    if (!connection->outstanding()) continue;
    connection->on_tick(now);
    want_output(id, *connection);
    tick_later();
  }
}

// When the card is full it says later that it has room.
void Splice::deliver() noexcept {
  while (card_->receive(0, *this) == Card::Received::some) {
  }
}

// --- To the guest

// Those that have nothing to say leave the list; the first that has stays there.
size_t Splice::largest() noexcept {
  const std::lock_guard lock(mutex_);
  planned_.reset();
  while (!output_.empty()) {
    const uint64_t id = output_.front();
    const auto found = connections_.find(id);
    if (found != connections_.end()) {
      TcpConnection& connection = *found->second;
      if (!connection.over())
        if (const auto output = connection.next_output(largest_payload(connection))) {
          planned_ = Planned{id, &connection, *output};
          return tcp_offset(connection.ends()) + longest_reply + output->payload;
        }
      connection.queued = false;
      if (connection.over()) forget(id);
    }
    output_.pop_front();
  }
  return 0;
}

size_t Splice::read(PacketHeader& header, std::span<const iovec> room) noexcept {
  const std::lock_guard lock(mutex_);
  if (!planned_) return 0;
  const auto [id, connection, output] = *planned_;
  planned_.reset();
  std::array<uint8_t, max_tcp_headers> headers;
  const size_t header_size = connection->headers(output, headers);
  const auto payload = connection->payload_of(output);
  const std::array<iovec, 3> parts = {iovec{headers.data(), header_size}, payload[0], payload[1]};
  header = {};
  header.csum_start = static_cast<uint16_t>(tcp_offset(connection->ends()));
  header.csum_offset = 16;
  header.flags = PacketHeader::NEEDS_CSUM;
  const size_t size = header_size + output.payload;
  if (offloads_.checksum) {
    if (output.payload > connection->mss()) {
      header.gso_type = connection->ends().ip6 ? PacketHeader::GSO_TCPV6 : PacketHeader::GSO_TCPV4;
      header.gso_size = connection->mss();
      header.hdr_len = static_cast<uint16_t>(header_size);
    }
    copy_pieces(parts, room);
  } else {
    flat_.resize(size);
    gather(parts, flat_);
    finish_checksum(header, flat_);
    header = {};
    scatter(flat_, room);
  }
  connection->sent(output, TcpConnection::Clock::now());
  if (connection->outstanding()) tick_later();
  // The next one's turn, as long as others wait.
  output_.pop_front();
  output_.push_back(id);
  return size;
}

}  // namespace

std::unique_ptr<TcpSplice> TcpSplice::make(uint16_t mss) {
  return std::make_unique<Splice>(mss);
}

}  // namespace lodge::net
