// What stands between a card and its network and looks at the packets, or lets them through only now and
// then. Everything is passed on; who derives from it overrides what it is for.
#pragma once

#include <memory>

#include "net/backend.hpp"

namespace lodge::net {

class Interposer : public Backend, protected Card {
 public:
  explicit Interposer(std::unique_ptr<Backend> network) : network_(std::move(network)) {}

  unsigned queues() const noexcept override { return network_->queues(); }
  Offloads transmit_offloads() const noexcept override { return network_->transmit_offloads(); }
  Offloads receive_offloads() const noexcept override { return network_->receive_offloads(); }
  uint16_t mtu() const noexcept override { return network_->mtu(); }
  Losses losses() const noexcept override { return network_->losses(); }
  void keep() noexcept override { network_->keep(); }
  void connect(Card& plugged, EventLoop& loop) noexcept override {
    card_ = &plugged;
    network_->connect(*this, loop);
  }
  void disconnect() noexcept override { network_->disconnect(); }
  void accept(const Offloads& offloads) noexcept override { network_->accept(offloads); }
  void use_queues(unsigned pairs) noexcept override { network_->use_queues(pairs); }
  bool send(unsigned queue, const PacketHeader& header, std::span<const iovec> frame) noexcept override {
    return network_->send(queue, header, frame);
  }
  void flush(unsigned queue) noexcept override { network_->flush(queue); }
  void receive_ready(unsigned queue) noexcept override { network_->receive_ready(queue); }

 protected:
  Received receive(unsigned queue, Source& source) noexcept override { return card_->receive(queue, source); }
  void transmit_ready(unsigned queue) noexcept override { card_->transmit_ready(queue); }
  void set_link(bool up) noexcept override { card_->set_link(up); }

  Card& card() noexcept { return *card_; }
  Backend& network() noexcept { return *network_; }

 private:
  std::unique_ptr<Backend> network_;
  Card* card_ = nullptr;  // while the network may call it
};

// A back end that writes all packets that go through `network` to the file at `path`, in the pcap format, as
// the card sees them: what is to be segmented is not yet. Never waits for the file: what it cannot take in
// time is missing in it. Until keep() the file is as it was, and nothing is written; one that capture() has
// made goes again without that. Throws UsageError naming the option when the file cannot be made.
std::unique_ptr<Backend> capture(std::unique_ptr<Backend> network, const std::string& path);

// A back end that lets at most `rate` bytes a second through `network` in each direction; up to `burst` (0: a
// tenth of a second's worth) at once after a pause. Packets wait, none is dropped.
struct RateLimit {
  uint64_t rate = 0, burst = 0;
};
std::unique_ptr<Backend> limit_rate(std::unique_ptr<Backend> network, const RateLimit& limit);

}  // namespace lodge::net
