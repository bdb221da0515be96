// Socket device (VirtIO 1.2, section 5.10).
//
// Modelled: stream sockets, credit in both directions, shutdown of either direction, reset, the transport
// reset event after a restored state (connections do not outlive their process). The naming of Unix sockets
// and the greeting are those of Firecracker's and Cloud Hypervisor's hybrid sockets. Not modelled: seqpacket
// sockets, connections between guests. A packet that fits no connection is answered by a reset, one from or
// to another CID is dropped.
#include "device/virtio/vsock.hpp"

#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <nlohmann/json.hpp>

#include "base/error.hpp"

namespace lodge::device::virtio {

namespace {

constexpr unsigned receiveq = 0, transmitq = 1, eventq = 2;
constexpr uint16_t queue_size = 256, event_size = 16;
constexpr uint32_t pci_class_communication = 0x078000;
constexpr size_t longest_greeting = 32;
// Answers that wait for room in the receive queue; more of the guest's packets are not looked at then.
constexpr size_t max_waiting = 64;
constexpr uint32_t longest_data = 64 * 1024;  // of one packet: the connections take turns
constexpr unsigned events_a_turn = 64, packets_a_turn = 256;
constexpr uint64_t listener_id = 0;

struct VsockState {
  static constexpr std::string_view name = "vsock";
  static constexpr unsigned version = 1;
  uint32_t cid = 0;
  bool had_connections = false;
  template <class V>
  void visit(V& v) {
    v("cid", cid), v("had_connections", had_connections);
  }
};

}  // namespace

Vsock::Vsock(machine::GuestMemory& memory, uint32_t cid, const std::string& path, const RingFeatures& rings)
    : Device({.name = "virtio-vsock",
              .type = DeviceType::socket,
              .pci_class = pci_class_communication,
              .features = 0,
              .queue_sizes = {queue_size, queue_size, event_size}},
             memory, rings),
      cid_(cid),
      path_(path),
      listener_(path, "--vsock path="),
      epoll_(::epoll_create1(EPOLL_CLOEXEC)),
      loop_("lodge-vsock-io") {
  epoll_event event{};
  event.events = EPOLLIN | EPOLLET;
  event.data.u64 = listener_id;
  if (!epoll_ || ::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, listener_.fd(), &event) != 0)
    throw_errno("cannot watch a Unix socket");
  watch_ = loop_.watch(epoll_.get(), EPOLLIN, [this](uint32_t) { host_events(); });
}

Vsock::~Vsock() {
  watch_.reset();
}

size_t Vsock::connections() noexcept {
  const std::lock_guard lock(mutex_);
  return connections_.size();
}

void Vsock::process(unsigned index) noexcept {
  if (index == transmitq) return transmit();
  if (index == eventq) return announce_reset();
  queue(receiveq).want_kicks(false);
  fill_receive_queue();
}

// --- Connections

virtio_vsock_hdr Vsock::header_of(const Connection& connection, uint16_t operation) const noexcept {
  virtio_vsock_hdr header{};
  header.src_cid = host_cid, header.dst_cid = cid_;
  header.src_port = connection.host_port, header.dst_port = connection.guest_port;
  header.type = VIRTIO_VSOCK_TYPE_STREAM;
  header.op = operation;
  header.buf_alloc = buffer_size;
  header.fwd_cnt = connection.taken;
  return header;
}

void Vsock::tell(const Connection& connection, uint16_t operation, uint32_t flags) noexcept {
  to_guest_.push_back(header_of(connection, operation));
  to_guest_.back().flags = flags;
}

void Vsock::refuse(const virtio_vsock_hdr& header) noexcept {
  if (header.op == VIRTIO_VSOCK_OP_RST) return;
  Connection nobody;
  nobody.host_port = header.dst_port, nobody.guest_port = header.src_port;
  tell(nobody, VIRTIO_VSOCK_OP_RST);
  to_guest_.back().type = header.type;
}

void Vsock::ready(uint64_t id, Connection& connection) noexcept {
  if (!std::exchange(connection.waits, true)) ready_.push_back(id);
}

void Vsock::close(Connections::iterator connection) noexcept {
  if (connection->second.stage != Stage::greeting) tell(connection->second, VIRTIO_VSOCK_OP_RST);
  forget(connection);
}

void Vsock::forget(Connections::iterator connection) noexcept {
  const Connection& gone = connection->second;
  if (gone.stage != Stage::greeting) by_ports_.erase({gone.host_port, gone.guest_port});
  connections_.erase(connection);  // its number stays in ready_, where nobody finds it
}

bool Vsock::register_socket(uint64_t id, Connection& connection) noexcept {
  epoll_event event{};
  event.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET;
  event.data.u64 = id;
  return ::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, connection.socket.get(), &event) == 0;
}

uint32_t Vsock::free_host_port() noexcept {
  for (;;) {  // there are far fewer connections than numbers
    const uint32_t port = next_port_;
    next_port_ = std::max(1u << 30, next_port_ + 1);
    const auto used = by_ports_.lower_bound({port, 0});
    if (used == by_ports_.end() || used->first.first != port) return port;
  }
}

// --- The host's side

void Vsock::host_events() noexcept {
  const std::lock_guard lock(mutex_);
  std::array<epoll_event, events_a_turn> events;
  const int count = ::epoll_wait(epoll_.get(), events.data(), static_cast<int>(events.size()), 0);
  for (int i = 0; i < count; i++) {
    const uint64_t id = events[static_cast<size_t>(i)].data.u64;
    if (id == listener_id) {
      accept_clients();
      continue;
    }
    const auto connection = connections_.find(id);
    if (connection == connections_.end()) continue;
    ready(id, connection->second);
    if (connection->second.stage == Stage::greeting)
      greet(connection);
    else
      pass_on(connection);
  }
  fill_receive_queue();
}

void Vsock::accept_clients() noexcept {
  while (Fd client = listener_.accept()) {
    if (!running() || connections_.size() >= max_connections) continue;  // it is closed
    const uint64_t id = next_id_++;
    Connection& connection = connections_[id];
    connection.socket = std::move(client);
    connection.stage = Stage::greeting;
    if (!register_socket(id, connection)) connections_.erase(id);
  }
}

// What follows the line belongs to the guest, so it is only looked at.
void Vsock::greet(Connections::iterator at) noexcept {
  constexpr std::string_view word = "CONNECT ";
  Connection& connection = at->second;
  std::array<char, longest_greeting> text;
  const ssize_t count = ::recv(connection.socket.get(), text.data(), text.size(), MSG_PEEK);
  if (count < 0 && (errno == EAGAIN || errno == EINTR)) return;
  const std::string_view seen(text.data(), static_cast<size_t>(std::max<ssize_t>(count, 0)));
  const size_t end = seen.find('\n');
  if (end == std::string_view::npos && count > 0 && seen.size() < longest_greeting) return;
  uint32_t port = 0;
  if (end == std::string_view::npos || !seen.starts_with(word)) return forget(at);
  const std::string_view digits = seen.substr(word.size(), end - word.size());
  const auto [stop, error] = std::from_chars(digits.data(), digits.data() + digits.size(), port);
  if (error != std::errc{} || stop != digits.data() + digits.size() || !running()) return forget(at);
  if (::recv(connection.socket.get(), text.data(), end + 1, 0) != static_cast<ssize_t>(end + 1))
    return forget(at);
  connection.host_port = free_host_port();
  connection.guest_port = port;
  connection.stage = Stage::requested;
  by_ports_[{connection.host_port, port}] = at->first;
  tell(connection, VIRTIO_VSOCK_OP_REQUEST);
}

// Gives the socket what it takes of the guest's data, and then perhaps the end of it.
void Vsock::pass_on(Connections::iterator at) noexcept {
  Connection& connection = at->second;
  size_t done = 0;
  while (done < connection.to_host.size()) {
    const ssize_t count = ::send(connection.socket.get(), connection.to_host.data() + done,
                                 connection.to_host.size() - done, MSG_NOSIGNAL);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0 && errno == EAGAIN) break;
    if (count < 0) return close(at);
    done += static_cast<size_t>(count);
  }
  connection.to_host.erase(connection.to_host.begin(),
                           connection.to_host.begin() + static_cast<ssize_t>(done));
  connection.taken += static_cast<uint32_t>(done);
  if (!connection.to_host.empty()) return;
  if (!connection.guest_sends && !connection.guest_receives) return close(at);
  if (!connection.guest_sends) ::shutdown(connection.socket.get(), SHUT_WR);
  // A quarter at a time: the guest goes on before it has used up what it knows of.
  if (connection.taken - connection.announced >= buffer_size / 4) {
    connection.announced = connection.taken;
    tell(connection, VIRTIO_VSOCK_OP_CREDIT_UPDATE);
  }
}

// --- From the guest

void Vsock::transmit() noexcept {
  transmit_waits_ = false;
  drain(transmitq, chain_, [this](const Chain& chain) {
    if (to_guest_.size() >= max_waiting) {
      transmit_waits_ = true;
      return false;
    }
    take(chain);
    queue(transmitq).push(chain, 0);
    return true;
  });
  fill_receive_queue();
}

void Vsock::take(const Chain& chain) noexcept {
  virtio_vsock_hdr header{};
  if (chain.read(0, {reinterpret_cast<uint8_t*>(&header), sizeof header}) != sizeof header ||
      header.len > chain.readable_size() - sizeof header || header.src_cid != cid_ ||
      header.dst_cid != host_cid)
    return;
  if (header.type != VIRTIO_VSOCK_TYPE_STREAM) return refuse(header);
  const auto known = by_ports_.find(Ports(+header.dst_port, +header.src_port));
  if (known != by_ports_.end()) return take_for(connections_.find(known->second), header, chain);
  if (header.op == VIRTIO_VSOCK_OP_REQUEST) return open_for_guest(header);
  refuse(header);
}

void Vsock::open_for_guest(const virtio_vsock_hdr& header) noexcept {
  if (connections_.size() >= max_connections) return refuse(header);
  const uint64_t id = next_id_++;
  Connection connection;
  connection.socket = net::connect_unix(path_ + "_" + std::to_string(header.dst_port));
  connection.host_port = header.dst_port, connection.guest_port = header.src_port;
  connection.peer_room = header.buf_alloc, connection.peer_taken = header.fwd_cnt;
  if (!connection.socket || !register_socket(id, connection)) return refuse(header);
  tell(connection, VIRTIO_VSOCK_OP_RESPONSE);
  by_ports_[{connection.host_port, connection.guest_port}] = id;
  connections_.emplace(id, std::move(connection));
}

void Vsock::take_for(Connections::iterator at, const virtio_vsock_hdr& header, const Chain& chain) noexcept {
  Connection& connection = at->second;
  connection.peer_room = header.buf_alloc, connection.peer_taken = header.fwd_cnt;
  const bool open = connection.stage == Stage::open;
  if (open) ready(at->first, connection);  // there may be credit now
  switch (header.op) {
    case VIRTIO_VSOCK_OP_RST: return forget(at);
    case VIRTIO_VSOCK_OP_RESPONSE: {
      if (open) return close(at);
      connection.stage = Stage::open;
      const std::string answer = "OK " + std::to_string(connection.host_port) + "\n";
      const ssize_t count = ::send(connection.socket.get(), answer.data(), answer.size(), MSG_NOSIGNAL);
      if (count != static_cast<ssize_t>(answer.size())) return close(at);
      return ready(at->first, connection);
    }
    case VIRTIO_VSOCK_OP_RW: return open ? take_data(at, header, chain) : close(at);
    case VIRTIO_VSOCK_OP_SHUTDOWN: return open ? take_shutdown(at, header.flags) : close(at);
    case VIRTIO_VSOCK_OP_CREDIT_UPDATE: return;
    case VIRTIO_VSOCK_OP_CREDIT_REQUEST:
      connection.announced = connection.taken;
      return tell(connection, VIRTIO_VSOCK_OP_CREDIT_UPDATE);
    default: return close(at);
  }
}

void Vsock::take_data(Connections::iterator at, const virtio_vsock_hdr& header, const Chain& chain) noexcept {
  Connection& connection = at->second;
  // 5.10.6.3: more than the credit, or after having said that no more comes.
  if (header.len > buffer_size - connection.to_host.size() || !connection.guest_sends) return close(at);
  const size_t before = connection.to_host.size();
  connection.to_host.resize(before + header.len);
  chain.read(sizeof header, std::span(connection.to_host).subspan(before));
  pass_on(at);
}

void Vsock::take_shutdown(Connections::iterator at, uint32_t flags) noexcept {
  Connection& connection = at->second;
  if (flags & VIRTIO_VSOCK_SHUTDOWN_RCV) connection.guest_receives = false;
  if (flags & VIRTIO_VSOCK_SHUTDOWN_SEND) connection.guest_sends = false;
  pass_on(at);
}

// --- To the guest

// A bounded number a call: what is left comes with the next kick or event, and the loop is told to call
// again.
void Vsock::fill_receive_queue() noexcept {
  if (!running() || !queue(receiveq).active()) return;
  unsigned placed = 0;
  bool room = true;
  while (placed < packets_a_turn && (!to_guest_.empty() || !ready_.empty())) {
    if (to_guest_.empty() ? place_data() : place_packet()) {
      placed++;
      continue;
    }
    if (!running()) return;
    if (to_guest_.empty() && ready_.empty()) break;
    queue(receiveq).want_kicks(true);
    if (queue(receiveq).has_available()) {
      queue(receiveq).want_kicks(false);
      continue;
    }
    room = false;
    break;
  }
  if (placed > 0) notify(receiveq);
  if (room && placed >= packets_a_turn) kick_later(receiveq);
  if (transmit_waits_ && to_guest_.size() < max_waiting) {
    transmit_waits_ = false;
    kick_later(transmitq);
  }
}

// False when there is no buffer.
bool Vsock::place_packet() noexcept {
  const Pop result = queue(receiveq).pop(chain_);
  if (result == Pop::broken) needs_reset("a receive buffer that breaks the rules");
  if (result != Pop::chain) return false;
  const virtio_vsock_hdr header = to_guest_.front();
  const size_t written = chain_.write(0, {reinterpret_cast<const uint8_t*>(&header), sizeof header});
  if (written == sizeof header) to_guest_.pop_front();  // else the buffer is too small for anything
  queue(receiveq).push(chain_, static_cast<uint32_t>(written));
  return true;
}

// From the connection whose turn it is. False when there is no buffer, or nothing to place after all.
bool Vsock::place_data() noexcept {
  while (!ready_.empty()) {
    const uint64_t id = ready_.front();
    const auto at = connections_.find(id);
    Connection* connection = at == connections_.end() ? nullptr : &at->second;
    // Without credit it waits for the guest, which makes it ready again.
    const uint32_t used = connection ? connection->sent - connection->peer_taken : 0;
    const uint32_t credit = connection && used < connection->peer_room ? connection->peer_room - used : 0;
    if (credit == 0 || connection->stage != Stage::open || connection->ended) {
      if (connection) connection->waits = false;
      ready_.pop_front();
      continue;
    }
    const Pop result = queue(receiveq).pop(chain_);
    if (result == Pop::broken) needs_reset("a receive buffer that breaks the rules");
    if (result != Pop::chain) return false;
    constexpr size_t head = sizeof(virtio_vsock_hdr);
    if (chain_.writable_size() <= head) {  // of no use
      queue(receiveq).push(chain_, 0);
      return true;
    }
    segments_.clear();
    chain_.cut_writable(head, std::min(credit, longest_data), segments_);
    std::vector<iovec> pieces;
    for (const Segment& segment : segments_) pieces.push_back({segment.bytes.data(), segment.bytes.size()});
    const ssize_t count = ::readv(connection->socket.get(), pieces.data(), static_cast<int>(pieces.size()));
    const bool nothing = count < 0 && (errno == EAGAIN || errno == EINTR);
    ready_.pop_front();
    connection->waits = false;
    if (count <= 0) {
      queue(receiveq).undo_pop(chain_);
      if (nothing) continue;
      if (count < 0) {
        close(at);
      } else {
        connection->ended = true;
        tell(*connection, VIRTIO_VSOCK_OP_SHUTDOWN, VIRTIO_VSOCK_SHUTDOWN_SEND);
      }
      return place_packet();
    }
    connection->sent += static_cast<uint32_t>(count);
    if (connection->guest_receives) {
      virtio_vsock_hdr header = header_of(*connection, VIRTIO_VSOCK_OP_RW);
      header.len = static_cast<uint32_t>(count);
      connection->announced = connection->taken;
      chain_.write(0, {reinterpret_cast<const uint8_t*>(&header), head});
      queue(receiveq).push(chain_, static_cast<uint32_t>(head + static_cast<size_t>(count)));
    } else {  // nobody wants it
      connection->sent -= static_cast<uint32_t>(count);
      queue(receiveq).undo_pop(chain_);
    }
    ready(id, *connection);
    return true;
  }
  return false;
}

// 5.10.6.7: the driver ends its connections, which did not come along with the saved state.
void Vsock::announce_reset() noexcept {
  if (!reset_due_ || !queue(eventq).active()) return;
  const Pop result = queue(eventq).pop(chain_);
  if (result == Pop::broken) needs_reset("an event buffer that breaks the rules");
  if (result != Pop::chain) return;
  const virtio_vsock_event event{VIRTIO_VSOCK_EVENT_TRANSPORT_RESET};
  const size_t written = chain_.write(0, {reinterpret_cast<const uint8_t*>(&event), sizeof event});
  queue(eventq).push(chain_, static_cast<uint32_t>(written));
  reset_due_ = false;
  notify(eventq);
}

// --- Configuration and state

void Vsock::config_bytes(std::span<uint8_t> out) const noexcept {
  const uint64_t cid = cid_;
  std::memcpy(out.data(), &cid, sizeof cid);
}

void Vsock::was_reset() noexcept {
  connections_.clear();
  by_ports_.clear();
  ready_.clear();
  to_guest_.clear();
  reset_due_ = transmit_waits_ = false;
}

void Vsock::save_device(nlohmann::json& json) const {
  save_state(VsockState{cid_, reset_due_ || !by_ports_.empty()}, json);
}

void Vsock::load_device(const nlohmann::json& json) {
  const auto state = load_state<VsockState>(json);
  if (state.cid != cid_)
    usage_error("saved state of virtio-vsock: its guest has CID {}; give --vsock cid={}", state.cid,
                state.cid);
  was_reset();
  reset_due_ = state.had_connections;
}

}  // namespace lodge::device::virtio
