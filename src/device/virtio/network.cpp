// Network device (VirtIO 1.2, section 5.1).
//
// Modelled: pairs of queues as many as the back end has, merged receive buffers, checksum and TCP
// segmentation offload in both directions as far as the back end has them, MAC, MTU, link status, the control
// queue: receive modes, address and VLAN filters, the driver's own MAC, announcements, pairs in use, offloads
// in use. Not modelled: UDP segmentation and fragmentation offload (few guests use the former with this
// kernel interface, the latter is deprecated), receive-side scaling and hashes (the back end chooses the
// queue), coalescing commands.
#include "device/virtio/network.hpp"

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>

#include "base/error.hpp"

namespace lodge::device::virtio {

namespace {

// 5.1.3 Feature bits
constexpr uint64_t F_CSUM = feature(0), F_GUEST_CSUM = feature(1), F_CTRL_GUEST_OFFLOADS = feature(2),
                   F_MTU = feature(3), F_MAC = feature(5), F_GUEST_TSO4 = feature(7),
                   F_GUEST_TSO6 = feature(8), F_GUEST_ECN = feature(9), F_HOST_TSO4 = feature(11),
                   F_HOST_TSO6 = feature(12), F_HOST_ECN = feature(13), F_MRG_RXBUF = feature(15),
                   F_STATUS = feature(16), F_CTRL_VQ = feature(17), F_CTRL_RX = feature(18),
                   F_CTRL_VLAN = feature(19), F_CTRL_RX_EXTRA = feature(20), F_GUEST_ANNOUNCE = feature(21),
                   F_MQ = feature(22), F_CTRL_MAC_ADDR = feature(23);
constexpr uint64_t guest_offloads = F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN;

constexpr uint16_t queue_size = 256, control_size = 64;
constexpr uint32_t pci_class_ethernet = 0x020000;
// 5.1.6 struct virtio_net_hdr: num_buffers are the last two bytes, which old drivers do not have.
constexpr size_t long_header = 12, short_header = 10;
constexpr unsigned packets_a_turn = 64;

// 5.1.4 status
constexpr uint8_t S_LINK_UP = 1, S_ANNOUNCE = 2;

// 5.1.6.5 Control virtqueue: classes and commands
enum Class : uint8_t { CTRL_RX, CTRL_MAC, CTRL_VLAN, CTRL_ANNOUNCE, CTRL_MQ, CTRL_GUEST_OFFLOADS };
constexpr uint8_t MAC_TABLE_SET = 0, MAC_ADDR_SET = 1;
constexpr uint8_t CTRL_OK = 0, CTRL_ERR = 1;
constexpr size_t max_command = 8192;  // two tables of a few hundred addresses

uint64_t features_of(const net::Backend& backend, bool mtu) {
  uint64_t features = F_MAC | F_MRG_RXBUF | F_STATUS | F_CTRL_VQ | F_CTRL_RX | F_CTRL_RX_EXTRA | F_CTRL_VLAN |
                      F_CTRL_MAC_ADDR | F_GUEST_ANNOUNCE;
  if (mtu) features |= F_MTU;
  if (backend.queues() > 1) features |= F_MQ;
  const net::Offloads sent = backend.transmit_offloads(), received = backend.receive_offloads();
  if (sent.checksum) features |= F_CSUM;
  if (sent.tso4) features |= F_HOST_TSO4;
  if (sent.tso6) features |= F_HOST_TSO6;
  if (sent.ecn) features |= F_HOST_ECN;
  if (received.checksum) features |= F_GUEST_CSUM | F_CTRL_GUEST_OFFLOADS;
  if (received.tso4) features |= F_GUEST_TSO4;
  if (received.tso6) features |= F_GUEST_TSO6;
  if (received.ecn) features |= F_GUEST_ECN;
  return features;
}

// Receive and transmit queues in turn, then the control queue (5.1.2).
std::vector<uint16_t> queue_sizes(unsigned pairs) {
  std::vector<uint16_t> sizes(size_t{2} * pairs, queue_size);
  sizes.push_back(control_size);
  return sizes;
}

struct NetworkState {
  static constexpr std::string_view name = "virtio-net";
  static constexpr unsigned version = 1;
  Mac mac{};
  uint16_t pairs = 1;
  uint64_t offloads = 0;
  bool announce = false;
  template <class V>
  void visit(V& v) {
    v("mac", mac), v("pairs", pairs), v("offloads", offloads), v("announce", announce);
  }
};

}  // namespace

Network::Network(machine::GuestMemory& memory, std::shared_ptr<net::Backend> backend, const Config& config,
                 const RingFeatures& rings)
    : Device({.name = "virtio-net",
              .type = DeviceType::network,
              .pci_class = pci_class_ethernet,
              .features = features_of(*backend, config.mtu != 0 || backend->mtu() != 0),
              .queue_sizes = queue_sizes(backend->queues())},
             memory, rings),
      backend_(std::move(backend)),
      config_(config),
      mac_(config.mac),
      max_pairs_(backend_->queues()),
      receivers_(max_pairs_) {
  if (config_.mtu == 0) config_.mtu = backend_->mtu();
}

Network::~Network() {
  backend_->disconnect();
}

size_t Network::header_size() const noexcept {
  return has_feature(F_VERSION_1) || has_feature(F_MRG_RXBUF) ? long_header : short_header;
}

// 5.1.2: a driver that knows no pairs finds it behind the first one.
unsigned Network::control_queue() const noexcept {
  return has_feature(F_MQ) ? 2 * max_pairs_ : 2;
}

void Network::process(unsigned index) noexcept {
  if (std::exchange(announce_at_start_, false) && has_feature(F_GUEST_ANNOUNCE)) {
    announce_ = true;
    config_changed();
  }
  if (index == control_queue()) return control(index);
  const unsigned pair = index / 2;
  if (pair >= pairs_) return;  // 5.1.6.5.5: not in use
  if (index % 2) return transmit(pair);
  queue(index).want_kicks(false);  // the next packet that finds no room asks for one
  backend_->receive_ready(pair);
}

// --- To the guest

net::Card::Received Network::receive(unsigned pair, net::Source& source) noexcept {
  using Outcome = PacketReceiver::Outcome;
  const std::lock_guard lock(mutex_);
  const unsigned index = 2 * pair;
  const PacketReceiver::Format format{header_size(), has_feature(F_MRG_RXBUF)};
  const bool vlans = has_feature(F_CTRL_VLAN);
  const PacketReceiver::Wanted wanted = [&](std::span<const uint8_t> beginning) {
    return filter_.accepts(beginning, mac_, vlans);
  };
  if (!running() || pair >= pairs_ || !queue(index).active()) {
    // No link: what comes is lost.
    net::PacketHeader header;
    for (unsigned i = 0; i < packets_a_turn; i++) {
      lost_.resize(std::max(lost_.size(), source.largest()));
      const iovec all{lost_.data(), lost_.size()};
      if (source.largest() == 0 || source.read(header, {&all, 1}) == 0) return Received::all;
      lost_packets_++;
    }
    return Received::some;
  }
  Received result = Received::some;
  for (unsigned i = 0; i < packets_a_turn; i++) {
    const Outcome outcome = receivers_[pair].receive(queue(index), format, source, wanted);
    if (outcome == Outcome::some) continue;
    if (outcome == Outcome::broken) {
      needs_reset("a receive buffer that breaks the rules");
      break;
    }
    if (outcome == Outcome::nothing) {
      result = Received::all;
      break;
    }
    queue(index).want_kicks(true);
    if (queue(index).has_available()) continue;
    result = Received::full;
    break;
  }
  notify(index);
  return result;
}

void Network::set_link(bool up) noexcept {
  const std::lock_guard lock(mutex_);
  if (std::exchange(link_, up) != up) config_changed();
}

// --- From the guest

void Network::transmit(unsigned pair) noexcept {
  drain(2 * pair + 1, chain_, [this, pair](const Chain& chain) {
    if (!send(pair, chain)) return false;
    queue(2 * pair + 1).push(chain, 0);
    return true;
  });
  backend_->flush(pair);
}

// False: it has to wait. What breaks a rule is dropped.
bool Network::send(unsigned pair, const Chain& chain) noexcept {
  const size_t before = header_size();
  if (chain.readable_size() < before + net::ethernet_header ||
      chain.readable_size() > before + net::max_frame) {
    sent_.dropped++;
    return true;
  }
  net::PacketHeader header;
  std::array<uint8_t, sizeof header> bytes;
  chain.read(0, bytes);
  std::memcpy(&header, bytes.data(), sizeof header);
  // 5.1.6.2: only what was negotiated.
  header.flags &= has_feature(F_CSUM) ? net::PacketHeader::NEEDS_CSUM : uint8_t{0};
  const uint8_t type = header.gso_type & ~net::PacketHeader::ECN;
  const bool allowed = type == net::PacketHeader::GSO_NONE ||
                       (type == net::PacketHeader::GSO_TCPV4 && has_feature(F_HOST_TSO4)) ||
                       (type == net::PacketHeader::GSO_TCPV6 && has_feature(F_HOST_TSO6));
  if (!allowed || (type != net::PacketHeader::GSO_NONE && !(header.flags & net::PacketHeader::NEEDS_CSUM))) {
    sent_.dropped++;
    return true;
  }
  if (type == net::PacketHeader::GSO_NONE) header.gso_type = type;
  segments_.clear();
  chain.cut_readable(before, chain.readable_size() - before, segments_);
  pieces_.clear();
  for (const Segment& piece : segments_) pieces_.push_back({piece.bytes.data(), piece.bytes.size()});
  if (!backend_->send(pair, header, pieces_)) return false;
  sent_.count(chain.readable_size() - before);
  return true;
}

void Network::transmit_ready(unsigned pair) noexcept {
  const std::lock_guard lock(mutex_);
  if (running() && pair < pairs_ && queue(2 * pair + 1).active()) transmit(pair);
}

Network::Counters Network::counters() const noexcept {
  const net::Backend::Losses losses = backend_->losses();
  const std::lock_guard lock(mutex_);
  Counters all{.mac = mac_, .to_guest = {}, .from_guest = sent_};
  for (const PacketReceiver& receiver : receivers_) {
    const net::Traffic& one = receiver.traffic();
    all.to_guest.packets += one.packets;
    all.to_guest.bytes += one.bytes;
    all.to_guest.dropped += one.dropped;
  }
  all.to_guest.dropped += lost_packets_ + losses.to_guest;
  all.from_guest.dropped += losses.from_guest;
  return all;
}

// --- Control queue

void Network::control(unsigned index) noexcept {
  drain(index, chain_, [this, index](const Chain& chain) {
    uint8_t answer = CTRL_ERR;
    if (chain.readable_size() >= 2 && chain.readable_size() <= max_command) {
      command_.resize(chain.readable_size());
      chain.read(0, command_);
      if (command(command_[0], command_[1], std::span<const uint8_t>(command_).subspan(2))) answer = CTRL_OK;
    }
    queue(index).push(chain, static_cast<uint32_t>(chain.write(0, {&answer, 1})));
    return true;
  });
}

bool Network::command(uint8_t group, uint8_t command, std::span<const uint8_t> data) noexcept {
  switch (group) {
    case CTRL_RX: return has_feature(F_CTRL_RX) && filter_.set_mode(command, data);
    case CTRL_MAC:
      if (command == MAC_TABLE_SET) return has_feature(F_CTRL_RX) && filter_.set_tables(data);
      if (command != MAC_ADDR_SET || !has_feature(F_CTRL_MAC_ADDR) || data.size() < mac_.size()) return false;
      std::copy_n(data.begin(), mac_.size(), mac_.begin());
      return true;
    case CTRL_VLAN: return has_feature(F_CTRL_VLAN) && filter_.set_vlan(command, data);
    case CTRL_ANNOUNCE:
      if (command != 0 || !has_feature(F_GUEST_ANNOUNCE)) return false;
      announce_ = false;
      return true;
    case CTRL_MQ: return command == 0 && has_feature(F_MQ) && use_pairs(data);
    case CTRL_GUEST_OFFLOADS: return command == 0 && has_feature(F_CTRL_GUEST_OFFLOADS) && use_offloads(data);
    default: return false;
  }
}

bool Network::use_pairs(std::span<const uint8_t> data) noexcept {
  if (data.size() < 2) return false;
  const unsigned pairs = data[0] | unsigned{data[1]} << 8;
  if (pairs < 1 || pairs > max_pairs_) return false;
  pairs_ = pairs;
  backend_->use_queues(pairs);
  // What came before is looked at now: kicks of queues that are not in use go unheard.
  for (unsigned i = 0; i < 2 * pairs; i++)
    if (queue(i).active()) kick_later(i);
  return true;
}

bool Network::use_offloads(std::span<const uint8_t> data) noexcept {
  uint64_t offloads = 0;
  if (data.size() < sizeof offloads) return false;
  std::memcpy(&offloads, data.data(), sizeof offloads);
  if ((offloads & ~guest_offloads) != 0 || !has_feature(offloads)) return false;
  accept(offloads);
  return true;
}

// A packet without a checksum is the least of what segmentation means (5.1.3.1).
void Network::accept(uint64_t offloads) noexcept {
  offloads_ = offloads;
  const auto has = [offloads](uint64_t bit) { return (offloads & F_GUEST_CSUM) && (offloads & bit); };
  backend_->accept({has(F_GUEST_CSUM), has(F_GUEST_TSO4), has(F_GUEST_TSO6), has(F_GUEST_ECN)});
}

// --- Life

void Network::started() noexcept {
  uint64_t wanted = 0;
  for (const uint64_t bit : {F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_TSO6, F_GUEST_ECN})
    if (has_feature(bit)) wanted |= bit;
  accept(wanted);
}

void Network::quiesce(std::unique_lock<std::mutex>&, int index) noexcept {
  for (unsigned pair = 0; pair < max_pairs_; pair++)
    if (index < 0 || static_cast<unsigned>(index) == 2 * pair) receivers_[pair].give_back(queue(2 * pair));
}

void Network::was_reset() noexcept {
  mac_ = config_.mac;
  pairs_ = 1;
  filter_ = {};
  announce_ = announce_at_start_ = false;
  accept(0);
  backend_->use_queues(1);
}

unsigned Network::config_size() const noexcept {
  return 12;
}

void Network::config_bytes(std::span<uint8_t> out) const noexcept {
  std::ranges::copy(mac_, out.begin());
  out[6] = static_cast<uint8_t>((link_ ? S_LINK_UP : 0) | (announce_ ? S_ANNOUNCE : 0));
  out[8] = static_cast<uint8_t>(max_pairs_);
  out[9] = static_cast<uint8_t>(max_pairs_ >> 8);
  out[10] = static_cast<uint8_t>(config_.mtu);
  out[11] = static_cast<uint8_t>(config_.mtu >> 8);
}

void Network::save_device(nlohmann::json& json) const {
  save_state(NetworkState{mac_, static_cast<uint16_t>(pairs_), offloads_, announce_}, json);
  save_state(filter_.state(), json["filter"]);
}

void Network::load_device(const nlohmann::json& json) {
  const auto state = load_state<NetworkState>(json);
  if (state.pairs < 1 || state.pairs > max_pairs_)
    usage_error("saved state of virtio-net: {} pairs of queues, but there are {}", state.pairs, max_pairs_);
  if (state.offloads & ~guest_offloads) usage_error("saved state of virtio-net: unknown offloads");
  if (!json.contains("filter")) usage_error("saved state of virtio-net: field 'filter' is missing");
  if (!filter_.set_state(load_state<FilterState>(json["filter"])))
    usage_error("saved state of virtio-net: a table of addresses is too long");
  mac_ = state.mac;
  pairs_ = state.pairs;
  backend_->use_queues(pairs_);
  accept(state.offloads);
  // The network has to learn where the guest is now.
  announce_ = state.announce;
  announce_at_start_ = true;
}

}  // namespace lodge::device::virtio
