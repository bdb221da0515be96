// Protocol: a length of 32 bits, big-endian, and the frame. Nothing else is negotiated, so that frames are
// complete: segmentation and checksums of the guest's packets are done here.
//
// A loop of its own accepts, connects and reads for as long as the back end lives; sockets and watches change
// on its thread only, with `mutex_` held. Frames of the guest are written by whoever brings them, and by the
// loop when the socket was full. The peer is not trusted.
#include "net/stream.hpp"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <future>
#include <mutex>

#include "base/error.hpp"
#include "base/fd.hpp"
#include "net/offload.hpp"

namespace lodge::net {

namespace {

constexpr size_t length_size = 4;
// What waits for the socket, at most, before the guest has to wait; and what is read at once.
constexpr size_t max_out = 512 * 1024, in_size = 256 * 1024;

struct Address {
  sockaddr_storage bytes{};
  socklen_t size = 0;
  std::string path;  // of a Unix socket
  int family() const noexcept { return bytes.ss_family; }
  const sockaddr* get() const noexcept { return reinterpret_cast<const sockaddr*>(&bytes); }
};

Address parse_address(const std::string& option, const std::string& text) {
  Address address;
  if (text.find('/') != std::string::npos) {
    sockaddr_un name{};
    if (text.size() >= sizeof name.sun_path)
      usage_error("{}: the path is longer than a socket's may be", option);
    name.sun_family = AF_UNIX;
    text.copy(name.sun_path, text.size());
    std::memcpy(&address.bytes, &name, sizeof name);
    address.size = sizeof name;
    address.path = text;
    return address;
  }
  const size_t colon = text.rfind(':');
  if (colon == std::string::npos || colon == 0)
    usage_error("{}: give a path with a '/' or HOST:PORT, for example ./net.sock or 127.0.0.1:9000", option);
  std::string host = text.substr(0, colon);
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') host = host.substr(1, host.size() - 2);
  // getaddrinfo would take it modulo 65536.
  const std::string_view digits = std::string_view(text).substr(colon + 1);
  uint16_t port = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), port);
  if (error != std::errc{} || end != digits.data() + digits.size() || port == 0)
    usage_error("{}: '{}' is not a port; give a number from 1 to 65535", option, digits);
  addrinfo hints{}, *found = nullptr;
  hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV;
  hints.ai_socktype = SOCK_STREAM;
  if (::getaddrinfo(host.c_str(), text.c_str() + colon + 1, &hints, &found) != 0 || !found)
    usage_error("{}: give a numeric address and port, for example 127.0.0.1:9000 or [::1]:9000", option);
  std::memcpy(&address.bytes, found->ai_addr, found->ai_addrlen);
  address.size = found->ai_addrlen;
  ::freeaddrinfo(found);
  return address;
}

// Frames as the peer sends them.
class Incoming final : public Source {
 public:
  // Where to read to; never empty unless whole frames wait.
  std::span<uint8_t> room() {
    if (buffer_.empty()) buffer_.resize(in_size);
    if (begin_ > 0) std::memmove(buffer_.data(), buffer_.data() + begin_, end_ - begin_);
    end_ -= begin_;
    begin_ = 0;
    return std::span(buffer_).subspan(end_);
  }
  void add(size_t count) noexcept { end_ += count; }
  void clear() noexcept { begin_ = end_ = 0, broken_ = false; }
  // The peer has announced a frame that there is not.
  bool broken() const noexcept { return broken_; }

  size_t largest() noexcept override {
    for (;;) {
      if (broken_ || end_ - begin_ < length_size) return 0;
      uint32_t raw;
      std::memcpy(&raw, buffer_.data() + begin_, sizeof raw);
      const size_t length = ntohl(raw);
      if (length == 0 || length > max_frame) {
        broken_ = true;
        return 0;
      }
      if (end_ - begin_ < length_size + length) return 0;
      if (length >= ethernet_header) return length;
      begin_ += length_size + length;  // no frame of a network
    }
  }
  size_t read(PacketHeader& header, std::span<const iovec> room) noexcept override {
    const size_t size = largest();
    if (size == 0) return 0;
    header = {};
    scatter(std::span(buffer_).subspan(begin_ + length_size, size), room);
    begin_ += length_size + size;
    return size;
  }

 private:
  std::vector<uint8_t> buffer_;
  size_t begin_ = 0, end_ = 0;
  bool broken_ = false;
};

class Stream final : public Backend {
 public:
  explicit Stream(const StreamConfig& config)
      : listens_(!config.listen.empty()),
        address_(parse_address(
            listens_ ? "--net stream,listen=" + config.listen : "--net stream,connect=" + config.connect,
            listens_ ? config.listen : config.connect)),
        reconnect_ms_(config.reconnect_ms),
        wake_(Fd::event()),
        timer_(::timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC)) {
    if (!timer_) throw_errno("timerfd_create");
    if (listens_) open_listener("--net stream,listen=" + config.listen);
    wake_watch_ = loop_.watch_event(wake_.get(), [this] { step(); });
    timer_watch_ = loop_.watch(timer_.get(), EPOLLIN, [this](uint32_t) { retry(); });
    signal_event(wake_.get());
  }
  ~Stream() override {
    closing_ = true;
    signal_event(wake_.get());
    closed_.get_future().wait();
    wake_watch_.reset();
    timer_watch_.reset();
    if (listens_ && !address_.path.empty()) ::unlink(address_.path.c_str());
  }

  Offloads transmit_offloads() const noexcept override { return {true, true, true, true}; }

  void connect(Card& card, EventLoop&) noexcept override {
    const std::lock_guard lock(card_mutex_);
    card_ = &card;
    card.set_link(up_);  // whoever changes it from here on waits for the lock to say so
    signal_event(wake_.get());
  }
  void disconnect() noexcept override {
    const std::lock_guard lock(card_mutex_);
    card_ = nullptr;
  }
  bool send(unsigned, const PacketHeader& header, std::span<const iovec> frame) noexcept override {
    const std::lock_guard lock(mutex_);
    if (!up_) {
      lost_++;
      return true;
    }
    if (out_.size() - out_sent_ >= max_out) write_out();
    if (out_.size() - out_sent_ >= max_out) {
      guest_waits_ = true;  // until the loop, which waits for the socket now, has written it
      return false;
    }
    flat_.resize(total_size(frame));
    gather(frame, flat_);
    const bool good = segment(header, flat_, scratch_, [this](std::span<const uint8_t> one) {
      const uint32_t length = htonl(static_cast<uint32_t>(one.size()));
      const auto* bytes = reinterpret_cast<const uint8_t*>(&length);
      out_.insert(out_.end(), bytes, bytes + length_size);
      out_.insert(out_.end(), one.begin(), one.end());
    });
    if (!good) lost_++;
    return true;
  }
  void flush(unsigned) noexcept override {
    const std::lock_guard lock(mutex_);
    if (up_) write_out();
  }
  void receive_ready(unsigned) noexcept override { signal_event(wake_.get()); }
  Losses losses() const noexcept override { return {.from_guest = lost_}; }

 private:
  void open_listener(const std::string& option) {
    listener_.reset(::socket(address_.family(), SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!listener_) throw_errno(option);
    const int on = 1;
    ::setsockopt(listener_.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (!address_.path.empty()) remove_stale(option);
    if (::bind(listener_.get(), address_.get(), address_.size) != 0 || ::listen(listener_.get(), 1) != 0)
      usage_error("{}: cannot listen: {}; choose another address", option, std::strerror(errno));
  }
  // The socket of a process that is gone; one that somebody listens on is left alone.
  void remove_stale(const std::string& option) {
    struct stat status {};
    if (::lstat(address_.path.c_str(), &status) != 0) return;
    if (!S_ISSOCK(status.st_mode)) usage_error("{}: there is a file of another kind", option);
    const Fd probe(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (::connect(probe.get(), address_.get(), address_.size) == 0 || errno == EAGAIN)
      usage_error("{}: another process listens there; choose another path", option);
    ::unlink(address_.path.c_str());
  }

  // --- On the loop's thread.
  void step() noexcept {
    if (closing_) return close();
    if (!peer_ && !listen_watch_on_ && !timer_on_) start();
    if (peer_ && up_ && paused_) deliver();
  }
  void close() noexcept {
    const std::lock_guard lock(mutex_);
    peer_watch_.reset();
    listen_watch_.reset();
    peer_.reset();
    up_ = false;
    if (!std::exchange(closed_said_, true)) closed_.set_value();
  }
  // Waits for a peer or goes to it.
  void start() noexcept {
    if (listens_) {
      listen_watch_ = loop_.watch(listener_.get(), EPOLLIN, [this](uint32_t) { accept_peer(); });
      listen_watch_on_ = true;
      return;
    }
    Fd socket(::socket(address_.family(), SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!socket) return retry_later();
    const int result = ::connect(socket.get(), address_.get(), address_.size);
    if (result != 0 && errno != EINPROGRESS) return retry_later();
    meet(std::move(socket), result == 0);
  }
  void retry_later() noexcept {
    const itimerspec when{{},
                          {reconnect_ms_ / 1000, static_cast<long>(reconnect_ms_ % 1000) * 1'000'000 + 1}};
    ::timerfd_settime(timer_.get(), 0, &when, nullptr);
    timer_on_ = true;
  }
  void retry() noexcept {
    uint64_t count;
    if (::read(timer_.get(), &count, sizeof count) != sizeof count) return;
    timer_on_ = false;
    step();
  }
  void accept_peer() noexcept {
    Fd socket(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!socket) return;
    listen_watch_.reset();  // one at a time: the next one waits
    listen_watch_on_ = false;
    meet(std::move(socket), true);
  }
  void meet(Fd socket, bool connected) noexcept {
    if (address_.path.empty()) {
      const int on = 1;
      ::setsockopt(socket.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    }
    {
      const std::lock_guard lock(mutex_);
      peer_ = std::move(socket);
      in_.clear();
      out_.clear();
      out_sent_ = 0;
      paused_ = false;
      events_ = connected ? EPOLLIN : EPOLLOUT;
      peer_watch_ = loop_.watch(peer_.get(), events_, [this](uint32_t events) { peer_ready(events); });
      up_ = connected;
    }
    if (connected) set_link(true);
  }
  void peer_ready(uint32_t events) noexcept {
    if (!up_) return finish_connect();
    // Not to be told all the time, while the guest has no room, that the peer has gone.
    if (paused_ && (events & (EPOLLHUP | EPOLLERR))) return lose();
    if (events & EPOLLOUT) {
      bool waits;
      {
        const std::lock_guard lock(mutex_);
        write_out();
        waits = out_.empty() && std::exchange(guest_waits_, false);
      }
      const std::lock_guard lock(card_mutex_);
      if (waits && card_) card_->transmit_ready(0);
    }
    if (events & (EPOLLIN | EPOLLHUP | EPOLLERR)) read_in();
  }
  void finish_connect() noexcept {
    int error = 0;
    socklen_t size = sizeof error;
    ::getsockopt(peer_.get(), SOL_SOCKET, SO_ERROR, &error, &size);
    if (error != 0) return lose();
    {
      const std::lock_guard lock(mutex_);
      up_ = true;
      set_events(EPOLLIN);
    }
    set_link(true);
  }
  void read_in() noexcept {
    const auto room = in_.room();
    const ssize_t count = room.empty() ? 0 : ::recv(peer_.get(), room.data(), room.size(), 0);
    if (count == 0 && !room.empty()) return lose();
    if (count < 0) {
      if (errno != EAGAIN && errno != EINTR) lose();
      return;
    }
    in_.add(static_cast<size_t>(count));
    deliver();
  }
  void deliver() noexcept {
    auto result = Card::Received::all;
    {
      const std::lock_guard lock(card_mutex_);
      do {
        if (card_) result = card_->receive(0, in_);
      } while (card_ && result == Card::Received::some);
      if (!card_) drop_all();
    }
    if (in_.broken()) return lose();
    const std::lock_guard lock(mutex_);
    paused_ = result == Card::Received::full;
    set_events(paused_ ? events_ & ~uint32_t{EPOLLIN} : events_ | EPOLLIN);
  }
  void drop_all() noexcept {
    std::vector<uint8_t> sink(max_frame);
    const iovec all{sink.data(), sink.size()};
    PacketHeader header;
    while (in_.read(header, {&all, 1}) != 0) {
    }
  }
  void lose() noexcept {
    bool waited;
    {
      const std::lock_guard lock(mutex_);
      peer_watch_.reset();
      peer_.reset();
      up_ = paused_ = false;
      waited = std::exchange(guest_waits_, false);
    }
    set_link(false);
    {
      const std::lock_guard lock(card_mutex_);
      if (waited && card_) card_->transmit_ready(0);  // what waits is lost now
    }
    // Also a listener waits a moment, so that a peer which connects and leaves all the time costs little.
    retry_later();
  }
  void set_link(bool up) noexcept {
    const std::lock_guard lock(card_mutex_);
    if (card_) card_->set_link(up);
  }

  // --- With `mutex_` held.
  void set_events(uint32_t events) noexcept {
    if (std::exchange(events_, events) != events) peer_watch_.set_events(events);
  }
  void write_out() noexcept {
    while (out_sent_ < out_.size()) {
      const ssize_t count =
          ::send(peer_.get(), out_.data() + out_sent_, out_.size() - out_sent_, MSG_NOSIGNAL | MSG_DONTWAIT);
      if (count < 0 && errno == EINTR) continue;
      if (count < 0 && errno == EAGAIN) return set_events(events_ | EPOLLOUT);
      if (count < 0) break;  // the loop hears of it, too
      out_sent_ += static_cast<size_t>(count);
    }
    out_.clear();
    out_sent_ = 0;
    set_events(events_ & ~uint32_t{EPOLLOUT});
  }

  const bool listens_;
  const Address address_;
  const unsigned reconnect_ms_;
  Fd wake_, timer_, listener_;
  std::atomic<bool> closing_ = false;
  std::promise<void> closed_;
  bool closed_said_ = false;

  // Of the loop's thread; those below also under the mutex.
  bool listen_watch_on_ = false, timer_on_ = false, paused_ = false;
  Incoming in_;

  std::mutex card_mutex_;  // before the card's lock, which is before mutex_
  Card* card_ = nullptr;

  std::mutex mutex_;
  Fd peer_;
  std::atomic<bool> up_ = false;
  uint32_t events_ = 0;
  std::vector<uint8_t> out_, flat_, scratch_;
  size_t out_sent_ = 0;
  bool guest_waits_ = false;
  std::atomic<uint64_t> lost_ = 0;  // of the guest's, while there is no peer or because they break a rule

  EventLoop loop_{"lodge-stream"};
  EventLoop::Watch wake_watch_, timer_watch_, listen_watch_, peer_watch_;
};

}  // namespace

std::unique_ptr<Backend> open_stream(const StreamConfig& config) {
  if (config.listen.empty() == config.connect.empty())
    usage_error("--net stream: give one of listen=ADDRESS and connect=ADDRESS");
  return std::make_unique<Stream>(config);
}

}  // namespace lodge::net
