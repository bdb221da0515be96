// Network device (VirtIO 1.2, section 5.1).
//
// Modelled: one pair of queues, merged receive buffers, MAC, MTU, link status, the control queue's receive
// filters (accepted: everything is let through, as 5.1.6.5.1 allows). Not modelled: checksum and segmentation
// offload, more pairs of queues: the user-mode back end has use for neither.
#include "device/virtio/network.hpp"

#include <algorithm>
#include <cstring>

namespace lodge::device::virtio {

namespace {

constexpr uint64_t F_MTU = feature(3), F_MAC = feature(5), F_MRG_RXBUF = feature(15), F_STATUS = feature(16),
                   F_CTRL_VQ = feature(17), F_CTRL_RX = feature(18);
constexpr unsigned receiveq = 0, transmitq = 1, controlq = 2;
constexpr uint16_t queue_size = 256, control_size = 64;
constexpr uint32_t pci_class_ethernet = 0x020000;
constexpr size_t ethernet_header = 14;

// 5.1.6 struct virtio_net_hdr: num_buffers are the last two bytes, which old drivers do not have.
constexpr size_t NUM_BUFFERS = 10, long_header = 12, short_header = 10;

// 5.1.6.5 Control virtqueue
constexpr uint8_t CTRL_RX = 0, CTRL_MAC = 1, CTRL_MAC_TABLE_SET = 0, CTRL_OK = 0, CTRL_ERR = 1;
constexpr uint8_t ctrl_rx_commands = 6;

}  // namespace

Network::Network(machine::GuestMemory& memory, std::shared_ptr<net::Backend> backend, const Config& config,
                 const RingFeatures& rings)
    : Device({.name = "virtio-net",
              .type = DeviceType::network,
              .pci_class = pci_class_ethernet,
              .features = F_MAC | F_MRG_RXBUF | F_STATUS | F_CTRL_VQ | F_CTRL_RX |
                          (config.mtu != 0 ? F_MTU : uint64_t{0}),
              .queue_sizes = {queue_size, queue_size, control_size}},
             memory, rings),
      backend_(std::move(backend)),
      config_(config) {
  backend_->connect(*this);
}

Network::~Network() {
  backend_->disconnect();
}

size_t Network::header_size() const noexcept {
  return has_feature(F_VERSION_1) || has_feature(F_MRG_RXBUF) ? long_header : short_header;
}

void Network::process(unsigned index) noexcept {
  if (index == transmitq) return transmit();
  if (index == controlq) return control();
  queue(receiveq).want_kicks(false);  // the next frame that finds no room asks for one
  backend_->receive_ready();
}

// --- To the guest

bool Network::receive(std::span<const uint8_t> frame) noexcept {
  const std::lock_guard lock(mutex_);
  if (!running() || !queue(receiveq).active()) return true;  // no link: the frame is lost
  do {
    if (place(frame)) {
      notify(receiveq);
      return true;
    }
    if (!running()) return true;
    queue(receiveq).want_kicks(true);
  } while (queue(receiveq).has_available());
  return false;
}

// Puts header and frame into as many buffers as it takes; false when there is none at all. A frame that the
// buffers do not hold is lost: waiting for more would need a kick that a driver with buffers left does not
// give.
bool Network::place(std::span<const uint8_t> frame) noexcept {
  const size_t header = header_size(), needed = header + frame.size();
  const bool merge = has_feature(F_MRG_RXBUF);
  uint64_t room = 0;
  taken_.clear();
  while (room < needed) {
    const Pop result = queue(receiveq).pop(chain_);
    if (result == Pop::broken) needs_reset("a receive buffer that breaks the rules");
    if (result != Pop::chain) {
      for (auto chain = taken_.rbegin(); chain != taken_.rend(); ++chain) queue(receiveq).undo_pop(*chain);
      return !taken_.empty();
    }
    if (chain_.writable_size() < header || (!merge && chain_.writable_size() < needed)) {
      // 5.1.6.3.1: too small for what the driver has asked for. It gets its buffer back, the frame is lost.
      for (const Chain& chain : taken_) queue(receiveq).push(chain, 0);
      queue(receiveq).push(chain_, 0);
      taken_.clear();
      return true;
    }
    room += chain_.writable_size();
    taken_.push_back(chain_);
  }
  std::array<uint8_t, long_header> head{};
  head[NUM_BUFFERS] = static_cast<uint8_t>(taken_.size());
  head[NUM_BUFFERS + 1] = static_cast<uint8_t>(taken_.size() >> 8);
  size_t done = 0;
  for (const Chain& chain : taken_) {
    size_t written = 0;
    if (&chain == &taken_.front()) written = chain.write(0, std::span(head).first(header));
    const size_t count = chain.write(written, frame.subspan(done));
    done += count;
    queue(receiveq).push(chain, static_cast<uint32_t>(written + count));
  }
  taken_.clear();
  return true;
}

// --- From the guest

void Network::transmit() noexcept {
  drain(transmitq, chain_, [this](const Chain& chain) {
    const size_t header = header_size();
    const uint64_t size = chain.readable_size() - std::min<uint64_t>(chain.readable_size(), header);
    if (size >= ethernet_header && size <= net::max_frame) {
      frame_.resize(size);
      chain.read(header, frame_);
      backend_->send(frame_);
    }
    queue(transmitq).push(chain, 0);
    return true;
  });
}

void Network::control() noexcept {
  drain(controlq, chain_, [this](const Chain& chain) {
    std::array<uint8_t, 2> command{};
    const bool whole = chain.read(0, command) == command.size();
    const bool known = (command[0] == CTRL_RX && command[1] < ctrl_rx_commands) ||
                       (command[0] == CTRL_MAC && command[1] == CTRL_MAC_TABLE_SET);
    const uint8_t answer = whole && known ? CTRL_OK : CTRL_ERR;
    queue(controlq).push(chain, static_cast<uint32_t>(chain.write(0, {&answer, 1})));
    return true;
  });
}

// --- Configuration

unsigned Network::config_size() const noexcept {
  return 12;
}

void Network::config_bytes(std::span<uint8_t> out) const noexcept {
  std::ranges::copy(config_.mac, out.begin());
  out[6] = 1;  // VIRTIO_NET_S_LINK_UP
  out[8] = 1;  // pairs of queues
  out[10] = static_cast<uint8_t>(config_.mtu);
  out[11] = static_cast<uint8_t>(config_.mtu >> 8);
}

}  // namespace lodge::device::virtio
