// TCP connections that the guest opens are TcpSplice's; everything else is libslirp's: ARP, DHCP, DNS, UDP,
// ICMP, connections through forwarded ports.
//
// libslirp is not thread-safe: one thread owns it and does nothing else. Frames of the guest and wake-ups
// come through `mutex_`; frames for the guest go out from that thread, all of a turn together. Those that
// the card has no room for wait in a list, and while that is long, sockets are not read.
#include "net/user.hpp"

#include <arpa/inet.h>
#include <fmt/format.h>
#include <poll.h>
#include <pthread.h>
#include <slirp/libslirp.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <deque>
#include <list>
#include <mutex>
#include <thread>

#include "base/error.hpp"
#include "base/fd.hpp"
#include "net/offload.hpp"
#include "net/tcp_splice.hpp"

namespace lodge::net {

namespace {

using Frame = std::vector<uint8_t>;

// Frames that wait in each direction. More of the guest's wait in its queue. While so many wait for the
// guest no socket is read; libslirp's answers to what the guest sends meanwhile come on top, up to
// max_kept, and are dropped then.
constexpr size_t max_waiting = 512, max_kept = 4 * max_waiting;

// What the network sends, one after the other.
class WaitingFrames final : public Source {
 public:
  bool empty() const noexcept { return frames_.empty(); }
  void add(std::span<const uint8_t> frame) {
    if (frames_.size() < max_kept)
      frames_.emplace_back(frame.begin(), frame.end());
    else
      dropped_++;
  }
  void clear() noexcept {
    dropped_ += frames_.size();
    frames_.clear();
  }
  bool many() const noexcept { return frames_.size() >= max_waiting; }
  // Any thread.
  uint64_t dropped() const noexcept { return dropped_; }
  // libslirp has made the checksums in this process: nothing can have damaged them.
  void set_checksums_known(bool known) noexcept { header_.flags = known ? PacketHeader::DATA_VALID : 0; }

  size_t largest() noexcept override { return frames_.empty() ? 0 : frames_.front().size(); }
  size_t read(PacketHeader& header, std::span<const iovec> room) noexcept override {
    if (frames_.empty()) return 0;
    header = header_;
    const size_t size = scatter(frames_.front(), room);
    frames_.pop_front();
    return size;
  }

 private:
  std::deque<Frame> frames_;
  PacketHeader header_;
  std::atomic<uint64_t> dropped_ = 0;
};

// As parse_forward() takes it.
std::string text_of(const Forward& forward) {
  const std::string host = forward.host == Forward().host ? "" : forward.host + ":";
  return fmt::format("{}{}{}:{}", forward.udp ? "udp:" : "", host, forward.host_port, forward.guest_port);
}

const char* remedy(int error) {
  if (error == EADDRNOTAVAIL) return "give an address of this host, or 0.0.0.0 for all";
  if (error == EACCES) return "choose a port from 1024 on";
  return "choose another port";
}

struct SlirpTimer {
  SlirpTimerCb callback;
  void* opaque;
  int64_t expires;  // milliseconds; -1: not armed
};

class UserNetwork final : public Backend {
 public:
  UserNetwork(const std::vector<Forward>& forwards, uint16_t mtu)
      : mtu_(mtu), wake_(Fd::event()), splice_(TcpSplice::make(static_cast<uint16_t>(mtu - 60))) {
    SlirpConfig config{};
    config.version = 1;
    config.if_mtu = config.if_mru = mtu;
    config.in_enabled = true;
    config.in6_enabled = true;
    const auto ip4 = [](const char* text) {
      in_addr address{};
      ::inet_pton(AF_INET, text, &address);
      return address;
    };
    const auto ip6 = [](const char* text) {
      in6_addr address{};
      ::inet_pton(AF_INET6, text, &address);
      return address;
    };
    config.vnetwork = ip4("10.0.2.0");
    config.vnetmask = ip4("255.255.255.0");
    config.vhost = ip4("10.0.2.2");
    config.vdhcp_start = ip4("10.0.2.15");
    config.vnameserver = ip4("10.0.2.3");
    config.vprefix_addr6 = ip6("fec0::");
    config.vprefix_len = 64;
    config.vhost6 = ip6("fec0::2");
    config.vnameserver6 = ip6("fec0::3");
    slirp_.reset(::slirp_new(&config, &callbacks, this));
    if (!slirp_) throw_errno(ENOMEM, "cannot start user-mode networking");
    for (const Forward& forward : forwards) {
      in_addr host = ip4(forward.host.c_str()), guest = config.vdhcp_start;
      if (::slirp_add_hostfwd(slirp_.get(), forward.udp, host, forward.host_port, guest, forward.guest_port) <
          0) {
        const int error = errno;
        usage_error("--forward {}: cannot listen on {}: {}; {}", text_of(forward), forward.host,
                    std::strerror(error), remedy(error));
      }
    }
    thread_ = std::thread([this] { loop(); });
  }
  ~UserNetwork() override {
    stop_ = true;
    signal_event(wake_.get());
    thread_.join();
  }

  // A TCP packet of the guest's goes through libslirp, too, in one piece, however long: it reads a length of
  // up to 64 KiB in the IP header as any other.
  Offloads transmit_offloads() const noexcept override { return {true, true, true, true}; }
  Offloads receive_offloads() const noexcept override { return {true, true, true, false}; }
  uint16_t mtu() const noexcept override { return mtu_; }
  void accept(const Offloads& offloads) noexcept override {
    checksums_known_ = offloads.checksum;
    splice_->accept(offloads);
  }
  Losses losses() const noexcept override { return {to_guest_.dropped(), lost_}; }

  void connect(Card& card, EventLoop& loop) noexcept override {
    splice_->connect(card, loop);
    const std::lock_guard lock(card_mutex_);
    card_ = &card;
  }
  void disconnect() noexcept override {
    splice_->disconnect();
    const std::lock_guard lock(card_mutex_);
    card_ = nullptr;
  }
  bool send(unsigned, const PacketHeader& header, std::span<const iovec> pieces) noexcept override {
    if (splice_->take(pieces)) return true;
    const std::lock_guard lock(mutex_);
    if (from_guest_.size() >= max_waiting) {
      guest_waits_ = true;
      return false;
    }
    Frame frame;
    if (!spare_.empty()) {
      frame = std::move(spare_.back());
      spare_.pop_back();
    }
    frame.resize(total_size(pieces));
    gather(pieces, frame);
    if (finish_checksum(header, frame))
      from_guest_.push_back(std::move(frame));
    else
      lost_++;
    return true;
  }
  void flush(unsigned) noexcept override {
    splice_->flush();
    const std::lock_guard lock(mutex_);
    if (!from_guest_.empty()) signal_event(wake_.get());
  }
  void receive_ready(unsigned) noexcept override {
    splice_->receive_ready();
    signal_event(wake_.get());
  }

 private:
  static UserNetwork& self(void* opaque) { return *static_cast<UserNetwork*>(opaque); }
  static int64_t now_ns() noexcept {
    timespec now{};
    ::clock_gettime(CLOCK_MONOTONIC, &now);
    return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
  }

  // --- What libslirp calls, on the thread.
  static ssize_t on_packet(const void* data, size_t size, void* opaque) {
    const auto* bytes = static_cast<const uint8_t*>(data);
    self(opaque).to_guest_.add({bytes, size});
    return static_cast<ssize_t>(size);
  }
  static void* new_timer(SlirpTimerCb callback, void* callback_opaque, void* opaque) {
    auto& timers = self(opaque).timers_;
    timers.push_back({callback, callback_opaque, -1});
    return &timers.back();
  }
  static void free_timer(void* timer, void* opaque) {
    self(opaque).timers_.remove_if([timer](const SlirpTimer& one) { return &one == timer; });
  }
  static void set_timer(void* timer, int64_t expires, void*) {
    static_cast<SlirpTimer*>(timer)->expires = expires;
  }
  static int add_poll(int fd, int events, void* opaque) {
    auto& polls = self(opaque).polls_;
    short wanted = 0;
    if (events & SLIRP_POLL_IN) wanted |= POLLIN;
    if (events & SLIRP_POLL_OUT) wanted |= POLLOUT;
    if (events & SLIRP_POLL_PRI) wanted |= POLLPRI;
    polls.push_back({fd, wanted, 0});
    return static_cast<int>(polls.size() - 1);
  }
  static int polled(int index, void* opaque) {
    const short events = self(opaque).polls_[static_cast<size_t>(index)].revents;
    int seen = 0;
    if (events & POLLIN) seen |= SLIRP_POLL_IN;
    if (events & POLLOUT) seen |= SLIRP_POLL_OUT;
    if (events & POLLPRI) seen |= SLIRP_POLL_PRI;
    if (events & POLLERR) seen |= SLIRP_POLL_ERR;
    if (events & POLLHUP) seen |= SLIRP_POLL_HUP;
    return seen;
  }
  static void wake_up(void* opaque) { signal_event(self(opaque).wake_.get()); }
  static constexpr SlirpCb callbacks = {
      .send_packet = on_packet,
      .guest_error = [](const char*, void*) {},  // the guest's mistakes are its own
      .clock_get_ns = [](void*) { return now_ns(); },
      .timer_new = new_timer,
      .timer_free = free_timer,
      .timer_mod = set_timer,
      .register_poll_fd = [](int, void*) {},
      .unregister_poll_fd = [](int, void*) {},
      .notify = wake_up,
      .init_completed = nullptr,
      .timer_new_opaque = nullptr,
  };

  // Of one turn, in one go.
  void deliver() noexcept {
    to_guest_.set_checksums_known(checksums_known_);
    const std::lock_guard lock(card_mutex_);
    if (!card_) to_guest_.clear();  // there is nobody to wait for
    // A card that was full may itself keep the last frame, and waits to be called.
    if (!card_ || (to_guest_.empty() && !card_full_)) return;
    Card::Received result;
    do {
      result = card_->receive(0, to_guest_);
    } while (result == Card::Received::some);
    card_full_ = result == Card::Received::full;
  }
  void take_from_guest() noexcept {
    bool waits;
    {
      const std::lock_guard lock(mutex_);
      batch_.swap(from_guest_);
      waits = std::exchange(guest_waits_, false);
    }
    for (const Frame& frame : batch_)
      ::slirp_input(slirp_.get(), frame.data(), static_cast<int>(frame.size()));
    {
      const std::lock_guard lock(mutex_);
      for (Frame& frame : batch_)
        if (spare_.size() < max_spare) spare_.push_back(std::move(frame));
    }
    batch_.clear();
    const std::lock_guard lock(card_mutex_);
    if (waits && card_) card_->transmit_ready(0);
  }
  void run_timers() noexcept {
    const int64_t now = now_ns() / 1'000'000;
    for (auto timer = timers_.begin(); timer != timers_.end();) {
      auto& due = *timer++;  // its callback may free it
      if (due.expires < 0 || due.expires > now) continue;
      due.expires = -1;
      due.callback(due.opaque);
    }
  }
  uint32_t until_timer(uint32_t timeout) const noexcept {
    const int64_t now = now_ns() / 1'000'000;
    for (const SlirpTimer& timer : timers_)
      if (timer.expires >= 0)
        timeout = static_cast<uint32_t>(std::clamp<int64_t>(timer.expires - now, 0, timeout));
    return timeout;
  }

  void loop() noexcept {
    ::pthread_setname_np(::pthread_self(), "lodge-net-user");
    while (!stop_) {
      polls_.assign(1, {wake_.get(), POLLIN, 0});
      uint32_t timeout = UINT32_MAX;
      ::slirp_pollfds_fill(slirp_.get(), &timeout, add_poll, this);
      timeout = until_timer(timeout);
      const bool many = to_guest_.many();
      const int count = ::poll(polls_.data(), many ? 1 : polls_.size(),
                               timeout > 3'600'000 ? 3'600'000 : static_cast<int>(timeout));
      if (polls_[0].revents) take_event(wake_.get());
      ::slirp_pollfds_poll(slirp_.get(), many || count < 0, polled, this);
      run_timers();
      take_from_guest();
      deliver();
    }
  }

  const uint16_t mtu_;
  Fd wake_;
  std::list<SlirpTimer> timers_;
  std::vector<pollfd> polls_;
  WaitingFrames to_guest_;
  std::vector<Frame> batch_;  // of the guest's, being served

  std::mutex card_mutex_;
  Card* card_ = nullptr;
  bool card_full_ = false;  // of the thread
  std::mutex mutex_;
  static constexpr size_t max_spare = 64;
  std::vector<Frame> from_guest_, spare_;
  bool guest_waits_ = false;
  std::atomic<uint64_t> lost_ = 0;
  std::atomic<bool> checksums_known_ = false;
  std::atomic<bool> stop_ = false;
  struct Cleanup {
    void operator()(Slirp* slirp) const noexcept { ::slirp_cleanup(slirp); }
  };
  std::unique_ptr<Slirp, Cleanup> slirp_;  // the thread's while it runs
  std::unique_ptr<TcpSplice> splice_;
  std::thread thread_;
};

uint16_t parse_port(std::string_view option, std::string_view text, std::string_view whole) {
  unsigned port = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), port);
  if (error != std::errc{} || end != text.data() + text.size() || port == 0 || port > 65535)
    usage_error("{}: '{}' in '{}' is not a port from 1 to 65535; give HOST:GUEST, for example 2222:22",
                option, text, whole);
  return static_cast<uint16_t>(port);
}

}  // namespace

Forward parse_forward(std::string_view option, std::string_view text) {
  Forward forward;
  std::string_view rest = text;
  if (rest.starts_with("udp:")) forward.udp = true, rest.remove_prefix(4);
  if (rest.starts_with("tcp:")) rest.remove_prefix(4);
  const size_t last = rest.rfind(':');
  if (last == std::string_view::npos)
    usage_error("{}: '{}' is no forward; give HOST:GUEST, for example 2222:22", option, text);
  forward.guest_port = parse_port(option, rest.substr(last + 1), text);
  rest = rest.substr(0, last);
  if (const size_t colon = rest.rfind(':'); colon != std::string_view::npos) {
    forward.host = rest.substr(0, colon);
    in_addr address{};
    if (::inet_pton(AF_INET, forward.host.c_str(), &address) != 1)
      usage_error("{}: '{}' in '{}' is not an IPv4 address of this host", option, forward.host, text);
    rest = rest.substr(colon + 1);
  }
  forward.host_port = parse_port(option, rest, text);
  return forward;
}

std::unique_ptr<Backend> open_user_network(const std::vector<Forward>& forwards, uint16_t mtu) {
  return std::make_unique<UserNetwork>(forwards, mtu);
}

}  // namespace lodge::net
