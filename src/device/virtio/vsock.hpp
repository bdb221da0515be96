// Sockets between guest and host (AF_VSOCK in the guest, Unix sockets on the host).
#pragma once

#include <linux/virtio_vsock.h>

#include <deque>
#include <map>
#include <string>
#include <vector>

#include "device/virtio/device.hpp"
#include "net/unix_socket.hpp"

namespace lodge::device::virtio {

// A program on the host connects to `path`, writes "CONNECT PORT\n", reads "OK NUMBER\n" and is then
// connected to the guest's port; a program in the guest that connects to port P of CID 2 reaches who listens
// at `path`_P. No kernel module is involved.
//
// Threads: the kicks', and one of its own for the host's sockets; none of them waits for a peer.
class Vsock final : public Device {
 public:
  static constexpr uint64_t host_cid = 2, first_guest_cid = 3, last_guest_cid = 0xffff'fffe;
  static constexpr size_t max_path = 90;  // the longest port's name still fits a socket address
  static constexpr size_t max_connections = 512;
  static constexpr uint32_t buffer_size = 128 * 1024;  // of one connection, towards the host

  // Throws UsageError when nobody can listen at `path`.
  Vsock(machine::GuestMemory& memory, uint32_t cid, const std::string& path, const RingFeatures& rings = {});
  // Closes all connections.
  ~Vsock() override;

  size_t connections() noexcept;

 private:
  enum class Stage {
    greeting,   // the host's program has not yet said which port
    requested,  // the guest has not yet answered
    open,
  };
  struct Connection {
    Fd socket;
    Stage stage = Stage::open;
    uint32_t host_port = 0, guest_port = 0;
    bool waits = false;                              // in ready_: the socket may have something
    bool guest_receives = true, guest_sends = true;  // until it shuts down
    bool ended = false;                              // by the host: the guest has been told
    // Credit (5.10.6.3); all of them count modulo 2^32.
    uint32_t sent = 0, peer_taken = 0, peer_room = 0;  // towards the guest
    uint32_t taken = 0, announced = 0;                 // from the guest
    std::vector<uint8_t> to_host;                      // what the socket has not taken
  };
  using Connections = std::map<uint64_t, Connection>;
  using Ports = std::pair<uint32_t, uint32_t>;  // the host's, the guest's

  void process(unsigned queue) noexcept override;
  unsigned config_size() const noexcept override { return sizeof(uint64_t); }
  void config_bytes(std::span<uint8_t> out) const noexcept override;
  void was_reset() noexcept override;
  void save_device(nlohmann::json& json) const override;
  void load_device(const nlohmann::json& json) override;

  // --- The host's side
  void host_events() noexcept;
  void accept_clients() noexcept;
  void greet(Connections::iterator connection) noexcept;
  void pass_on(Connections::iterator connection) noexcept;
  bool register_socket(uint64_t id, Connection& connection) noexcept;

  // --- From the guest
  void transmit() noexcept;
  void take(const Chain& chain) noexcept;
  void take_for(Connections::iterator connection, const virtio_vsock_hdr& header,
                const Chain& chain) noexcept;
  void open_for_guest(const virtio_vsock_hdr& header) noexcept;
  void take_data(Connections::iterator connection, const virtio_vsock_hdr& header,
                 const Chain& chain) noexcept;
  void take_shutdown(Connections::iterator connection, uint32_t flags) noexcept;

  // --- To the guest
  void fill_receive_queue() noexcept;
  bool place_packet() noexcept;
  bool place_data() noexcept;
  void tell(const Connection& connection, uint16_t operation, uint32_t flags = 0) noexcept;
  void refuse(const virtio_vsock_hdr& header) noexcept;
  void announce_reset() noexcept;

  virtio_vsock_hdr header_of(const Connection& connection, uint16_t operation) const noexcept;
  void ready(uint64_t id, Connection& connection) noexcept;
  // Ends it, and tells the guest when it knows of it.
  void close(Connections::iterator connection) noexcept;
  void forget(Connections::iterator connection) noexcept;
  uint32_t free_host_port() noexcept;

  uint32_t cid_;
  std::string path_;
  net::UnixListener listener_;
  Fd epoll_;  // all of the host's sockets
  Connections connections_;
  std::map<Ports, uint64_t> by_ports_;
  uint64_t next_id_ = 1;
  uint32_t next_port_ = 1u << 30;
  std::deque<uint64_t> ready_;             // whose sockets may have something to read, in turn
  std::deque<virtio_vsock_hdr> to_guest_;  // packets without data
  bool reset_due_ = false;                 // the guest must be told that its connections are gone
  bool transmit_waits_ = false;            // until to_guest_ is shorter
  Chain chain_;
  std::vector<Segment> segments_;
  EventLoop loop_;
  EventLoop::Watch watch_;
};

}  // namespace lodge::device::virtio
