// Taps (kernel Documentation/networking/tuntap.rst, <linux/if_tun.h>).
//
// Packets go from guest memory to the kernel and back in one system call each, with the VirtIO header before
// them, which the kernel reads and writes itself (IFF_VNET_HDR). All is served by the card's loop. A
// descriptor without that header, which only others can hand over, carries complete frames.
#include "net/tap.hpp"

#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>

#include "base/error.hpp"
#include "base/fd.hpp"
#include "net/offload.hpp"

namespace lodge::net {

namespace {

// What TUNSETVNETHDRSZ allows; num_buffers behind the header is the card's own matter.
constexpr int vnet_header = sizeof(PacketHeader);
constexpr size_t max_pieces = 1024;  // IOV_MAX

class Tap;

// By edges, because a queue that is detached has an error all the time, which epoll(7) cannot leave out.
constexpr uint32_t wanted_always = EPOLLET;

// One descriptor.
class TapQueue final : public Source {
 public:
  TapQueue(Tap& tap, unsigned index, Fd fd) : tap_(tap), index_(index), fd_(std::move(fd)) {}

  size_t largest() noexcept override;
  size_t read(PacketHeader& header, std::span<const iovec> room) noexcept override;
  bool send(const PacketHeader& header, std::span<const iovec> frame) noexcept;
  void attach(bool attached) noexcept;
  void has_room() noexcept;
  void watch(EventLoop& loop) noexcept;
  void unwatch() noexcept { watch_.reset(); }
  int fd() const noexcept { return fd_.get(); }

 private:
  void ready(uint32_t events) noexcept;
  void take_packets() noexcept;
  void want(uint32_t events, bool wanted) noexcept;
  void look_again() noexcept;
  bool is_gone() const noexcept;

  Tap& tap_;
  const unsigned index_;
  Fd fd_;
  std::atomic<bool> attached_ = true;
  std::atomic<unsigned> rooms_ = 0;  // how often the card has said that it has room
  std::mutex events_mutex_;
  uint32_t events_ = wanted_always | EPOLLIN;
  EventLoop::Watch watch_;
  std::vector<iovec> pieces_;       // of the loop's thread
  std::vector<iovec> sent_pieces_;  // under the card's lock
  std::vector<uint8_t> flat_;
};

class Tap final : public Backend {
 public:
  Tap(std::vector<Fd> fds, std::string name, bool vnet) : name_(std::move(name)), vnet_(vnet) {
    for (Fd& fd : fds)
      queues_.push_back(
          std::make_unique<TapQueue>(*this, static_cast<unsigned>(queues_.size()), std::move(fd)));
    if (vnet_) probe_offloads();
    use_queues(1);
  }

  unsigned queues() const noexcept override { return static_cast<unsigned>(queues_.size()); }
  Offloads transmit_offloads() const noexcept override {
    return vnet_ ? Offloads{true, true, true, true} : Offloads{.checksum = true};
  }
  Offloads receive_offloads() const noexcept override { return possible_; }

  void connect(Card& card, EventLoop& loop) noexcept override {
    card_ = &card;
    find_mtu();
    for (auto& queue : queues_) queue->watch(loop);
  }
  void disconnect() noexcept override {
    for (auto& queue : queues_) queue->unwatch();
    card_ = nullptr;
    accept({});
    use_queues(1);
  }
  void accept(const Offloads& offloads) noexcept override {
    if (set_offloads(offloads)) segments_come_ = offloads.segmentation();
  }
  void use_queues(unsigned pairs) noexcept override {
    if (queues_.size() == 1) return;
    for (unsigned i = 0; i < queues_.size(); i++) queues_[i]->attach(i < pairs);
  }
  bool send(unsigned queue, const PacketHeader& header, std::span<const iovec> frame) noexcept override {
    return queues_[queue]->send(header, frame);
  }
  void receive_ready(unsigned queue) noexcept override { queues_[queue]->has_room(); }
  Losses losses() const noexcept override { return {.from_guest = lost_}; }
  void note_loss() noexcept { lost_++; }

  Card& card() noexcept { return *card_; }
  bool vnet() const noexcept { return vnet_; }
  size_t largest() const noexcept { return segments_come_ ? max_frame : largest_frame_.load(); }

 private:
  bool set_offloads(const Offloads& offloads) noexcept {
    unsigned flags = 0;
    if (offloads.checksum) flags |= TUN_F_CSUM;
    if (offloads.tso4) flags |= TUN_F_TSO4;
    if (offloads.tso6) flags |= TUN_F_TSO6;
    if (offloads.ecn && offloads.segmentation()) flags |= TUN_F_TSO_ECN;
    return vnet_ && ::ioctl(queues_[0]->fd(), TUNSETOFFLOAD, flags) == 0;
  }
  void probe_offloads() noexcept {
    for (const Offloads& some :
         {Offloads{true, true, true, true}, Offloads{true, true, true, false}, Offloads{true}}) {
      if (!set_offloads(some)) continue;
      possible_ = some;
      break;
    }
    set_offloads({});
  }
  // Of packets that are not cut into segments. Without the right to ask: that of Ethernet.
  void find_mtu() noexcept {
    const Fd socket(::socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0));
    ifreq request{};
    name_.copy(request.ifr_name, IFNAMSIZ - 1);
    size_t mtu = 1500;
    if (socket && ::ioctl(socket.get(), SIOCGIFMTU, &request) == 0 && request.ifr_mtu > 0)
      mtu = std::max<size_t>(mtu, static_cast<size_t>(request.ifr_mtu));
    largest_frame_ = std::min(max_frame, mtu + ethernet_header + vlan_tag);
  }

  const std::string name_;
  const bool vnet_;
  Offloads possible_;
  std::vector<std::unique_ptr<TapQueue>> queues_;
  std::atomic<size_t> largest_frame_ = 1500 + ethernet_header + vlan_tag;
  std::atomic<bool> segments_come_ = false;
  std::atomic<uint64_t> lost_ = 0;
  Card* card_ = nullptr;  // set while nothing is watched
};

size_t TapQueue::largest() noexcept {
  return tap_.largest();
}

size_t TapQueue::read(PacketHeader& header, std::span<const iovec> room) noexcept {
  pieces_.clear();
  if (tap_.vnet()) pieces_.push_back({&header, sizeof header});
  const size_t before = tap_.vnet() ? sizeof header : 0;
  pieces_.insert(pieces_.end(), room.begin(), room.end());
  const size_t most = before + total_size(room);
  for (;;) {
    const ssize_t count =
        ::readv(fd_.get(), pieces_.data(), static_cast<int>(std::min(pieces_.size(), max_pieces)));
    if (count < 0) return 0;  // EAGAIN: none. Anything else ends with the descriptor's next event.
    // The kernel tells the whole length of a packet that it had to cut short (an MTU that was raised since).
    const auto size = static_cast<size_t>(count);
    if (size >= before + ethernet_header && size <= most) return size - before;
  }
}

bool TapQueue::send(const PacketHeader& header, std::span<const iovec> frame) noexcept {
  PacketHeader copy = header;
  sent_pieces_.clear();
  if (tap_.vnet()) sent_pieces_.push_back({&copy, sizeof copy});
  if (frame.size() + 1 > max_pieces || (!tap_.vnet() && header.flags != 0)) {
    flat_.resize(total_size(frame));
    gather(frame, flat_);
    if (!tap_.vnet() && !finish_checksum(header, flat_)) {
      tap_.note_loss();
      return true;
    }
    sent_pieces_.push_back({flat_.data(), flat_.size()});
  } else {
    sent_pieces_.insert(sent_pieces_.end(), frame.begin(), frame.end());
  }
  const ssize_t count = ::writev(fd_.get(), sent_pieces_.data(), static_cast<int>(sent_pieces_.size()));
  if (count >= 0) return true;
  if (errno != EAGAIN && errno != ENOBUFS) {  // what the kernel refuses is lost
    tap_.note_loss();
    return true;
  }
  want(EPOLLOUT, true);
  return false;
}

void TapQueue::attach(bool attached) noexcept {
  if (attached_ == attached) return;
  ifreq request{};
  request.ifr_flags = attached ? IFF_ATTACH_QUEUE : IFF_DETACH_QUEUE;
  if (::ioctl(fd_.get(), TUNSETQUEUE, &request) != 0) return;
  attached_ = attached;
  if (attached) look_again();
}

void TapQueue::watch(EventLoop& loop) noexcept {
  const std::lock_guard lock(events_mutex_);
  events_ = wanted_always | EPOLLIN;
  watch_ = loop.watch(fd_.get(), events_, [this](uint32_t events) { ready(events); });
}

void TapQueue::want(uint32_t events, bool wanted) noexcept {
  const std::lock_guard lock(events_mutex_);
  const uint32_t before = events_;
  events_ = wanted ? events_ | events : events_ & ~events;
  if (events_ != before) watch_.set_events(events_);
}

// An edge for what is there already.
void TapQueue::look_again() noexcept {
  const std::lock_guard lock(events_mutex_);
  watch_.set_events(events_);
}

void TapQueue::has_room() noexcept {
  rooms_++;
  want(EPOLLIN, true);
}

void TapQueue::ready(uint32_t events) noexcept {
  if (events & EPOLLOUT) {
    want(EPOLLOUT, false);
    tap_.card().transmit_ready(index_);
  }
  if (events & EPOLLIN) take_packets();
  if ((events & EPOLLERR) && is_gone()) tap_.card().set_link(false);
}

// While the card is full, packets that come make no events.
void TapQueue::take_packets() noexcept {
  const unsigned rooms = rooms_;
  switch (tap_.card().receive(index_, *this)) {
    case Card::Received::all: return;
    case Card::Received::some: return look_again();
    case Card::Received::full: break;
  }
  want(EPOLLIN, false);
  if (rooms_ != rooms) want(EPOLLIN, true);
}

bool TapQueue::is_gone() const noexcept {
  ifreq request{};
  return attached_ && ::ioctl(fd_.get(), TUNGETIFF, &request) != 0 && errno == EBADFD;
}

// --- Opening

[[noreturn]] void refuse(const std::string& option, int error, unsigned queues) {
  const char* queue_flag = queues > 1 ? " multi_queue" : "";
  if (error == EPERM || error == EACCES)
    usage_error(
        "{}: not permitted; let root make it for you: ip tuntap add NAME mode tap user $USER vnet_hdr{}",
        option, queue_flag);
  if (error == EBUSY) usage_error("{}: another process has this interface; give another name", option);
  if (error == ENOENT || error == ENODEV || error == ENXIO)
    usage_error("{}: this host has no /dev/net/tun; load the module: modprobe tun", option);
  if (error == EINVAL)
    usage_error("{}: the interface is of another kind; make it with: ip tuntap add NAME mode tap vnet_hdr{}",
                option, queue_flag);
  usage_error("{}: {}; give the name of a tap", option, std::strerror(error));
}

Fd open_queue(const std::string& name, const std::string& option, bool several) {
  Fd fd(::open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC));
  if (!fd) refuse(option, errno, several ? 2 : 1);
  ifreq request{};
  name.copy(request.ifr_name, IFNAMSIZ - 1);
  constexpr short kind = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
  // A tap that was made for several queues takes even a single one only so.
  for (const short multi : {short{0}, short{IFF_MULTI_QUEUE}}) {
    if (several && multi == 0) continue;
    request.ifr_flags = static_cast<short>(kind | multi);
    if (::ioctl(fd.get(), TUNSETIFF, &request) == 0) return fd;
    if (errno != EINVAL) break;
  }
  refuse(option, errno, several ? 2 : 1);
}

// An interface that was made just now is down; one that was there is the business of whoever made it.
void bring_up(const std::string& name) noexcept {
  const Fd socket(::socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  ifreq request{};
  name.copy(request.ifr_name, IFNAMSIZ - 1);
  if (!socket || ::ioctl(socket.get(), SIOCGIFFLAGS, &request) != 0) return;
  request.ifr_flags |= IFF_UP;
  ::ioctl(socket.get(), SIOCSIFFLAGS, &request);
}

std::unique_ptr<Backend> take_over(const std::vector<int>& fds) {
  std::vector<Fd> queues;
  std::string name;
  bool vnet = true;
  for (const int fd : fds) {
    const std::string option = fmt::format("--net tap,fd={}", fd);
    ifreq request{};
    if (::ioctl(fd, TUNGETIFF, &request) != 0 || !(request.ifr_flags & IFF_TAP))
      usage_error("{}: this is no descriptor of an open tap", option);
    if (!(request.ifr_flags & IFF_NO_PI)) usage_error("{}: open the tap with IFF_NO_PI", option);
    vnet = vnet && (request.ifr_flags & IFF_VNET_HDR);
    name.assign(request.ifr_name, ::strnlen(request.ifr_name, IFNAMSIZ));
    queues.push_back(Fd::duplicate(fd));
    ::fcntl(queues.back().get(), F_SETFL, ::fcntl(fd, F_GETFL) | O_NONBLOCK);
  }
  for (const Fd& queue : queues)
    if (vnet && ::ioctl(queue.get(), TUNSETVNETHDRSZ, &vnet_header) != 0)
      throw_errno("--net tap,fd=: TUNSETVNETHDRSZ");
  return std::make_unique<Tap>(std::move(queues), name, vnet);
}

}  // namespace

std::unique_ptr<Backend> open_tap(const TapConfig& config) {
  if (!config.fds.empty()) return take_over(config.fds);
  const std::string option = fmt::format("--net tap,ifname={}", config.name);
  if (config.name.empty() || config.name.size() >= IFNAMSIZ)
    usage_error("{}: give a name of 1 to {} characters", option, IFNAMSIZ - 1);
  const bool existed = ::if_nametoindex(config.name.c_str()) != 0;
  std::vector<Fd> queues;
  for (unsigned i = 0; i < config.queues; i++) {
    queues.push_back(open_queue(config.name, option, config.queues > 1));
    if (::ioctl(queues.back().get(), TUNSETVNETHDRSZ, &vnet_header) != 0) throw_errno("TUNSETVNETHDRSZ");
  }
  if (!existed) bring_up(config.name);
  return std::make_unique<Tap>(std::move(queues), config.name, true);
}

}  // namespace lodge::net
