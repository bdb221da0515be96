// The VirtIO devices under a hostile driver: the input chooses what it does to rings, registers and buffers
// (device/virtio/testing.hpp). Afterwards saved state must load as the same again, and a driver that follows
// the rules must find a device that works.
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>

#include "device/virtio/balloon.hpp"
#include "device/virtio/block.hpp"
#include "device/virtio/console.hpp"
#include "device/virtio/entropy.hpp"
#include "device/virtio/file_system.hpp"
#include "device/virtio/input.hpp"
#include "device/virtio/network.hpp"
#include "device/virtio/testing.hpp"
#include "device/virtio/vsock.hpp"
#include "input.hpp"
#include "net/offload.hpp"

namespace {

using namespace lodge;
namespace virtio = device::virtio;

class Input : public fuzz::Bytes {
 public:
  using Bytes::Bytes;
  uint32_t below(uint32_t limit) {
    uint32_t value = 0;
    for (uint32_t reach = 1; reach < limit && reach != 0; reach <<= 8) value = value << 8 | byte();
    return value % limit;
  }
};

using Make = std::unique_ptr<virtio::Device> (*)(machine::GuestMemory&);

// A disk without contents whose requests complete within the call.
class NoDisk final : public block::Image {
 public:
  void read(std::span<const iovec>, uint64_t, block::Completion done) noexcept override { done(0); }
  void write(std::span<const iovec>, uint64_t, block::Completion done) noexcept override { done(0); }
  void flush(block::Completion done) noexcept override { done(0); }
  void discard(uint64_t, uint64_t, block::Completion done) noexcept override { done(EIO); }
  void write_zeroes(uint64_t, uint64_t, bool, block::Completion done) noexcept override { done(0); }
  void resize(uint64_t, block::Completion done) noexcept override { done(0); }
  uint64_t size() const noexcept override { return 1 << 20; }
  bool read_only() const noexcept override { return false; }
  std::string_view format() const noexcept override { return "none"; }
  int close() noexcept override { return 0; }
};

// A network with all offloads and two pairs of queues. It brings a packet whenever the card has room for one,
// of a size that the guest's last packet decides, and refuses some of what it is sent.
class EchoWire final : public net::Backend, public net::Source {
 public:
  unsigned queues() const noexcept override { return 2; }
  net::Offloads transmit_offloads() const noexcept override { return {true, true, true, true}; }
  net::Offloads receive_offloads() const noexcept override { return {true, true, true, true}; }
  void connect(net::Card& card, EventLoop&) noexcept override { card_ = &card; }
  void disconnect() noexcept override { card_ = nullptr; }
  bool send(unsigned, const net::PacketHeader& header, std::span<const iovec> pieces) noexcept override {
    frame_.resize(net::total_size(pieces));
    net::gather(pieces, frame_);
    if (frame_[0] % 8 == 7 && std::exchange(refuse_, !refuse_)) return false;
    net::segment(header, frame_, scratch_, [](std::span<const uint8_t>) {});
    waiting_ = true;
    return true;
  }
  size_t largest() noexcept override {
    return !waiting_ ? 0 : frame_[0] % 2 ? net::max_frame : frame_.size();
  }
  size_t read(net::PacketHeader& header, std::span<const iovec> room) noexcept override {
    if (!std::exchange(waiting_, false)) return 0;
    header = {};
    return net::scatter(frame_, room);
  }
  void bring(unsigned queue) {
    if (!card_) return;
    if (frame_.empty()) frame_.resize(60);
    waiting_ = true;
    card_->receive(queue, *this);
    card_->transmit_ready(queue);
  }

 private:
  net::Card* card_ = nullptr;
  std::vector<uint8_t> frame_, scratch_;
  bool waiting_ = false, refuse_ = true;
};

// The last one that was made, for packets that arrive between the driver's steps.
std::weak_ptr<EchoWire> current_wire;

std::unique_ptr<virtio::Device> make_network(machine::GuestMemory& memory) {
  static EventLoop loop("fuzz");
  const auto wire = std::make_shared<EchoWire>();
  current_wire = wire;
  auto network = std::make_unique<virtio::Network>(memory, wire, virtio::Network::Config{});
  network->plug_in(loop);
  return network;
}

// Nothing is in it, and what the input makes of it stays small: share_fuzz is about requests that make sense.
std::shared_ptr<const share::Folder> empty_folder() {
  static const std::shared_ptr<const share::Folder> folder = [] {
    std::string pattern = "/tmp/lodge-virtio-fuzz-XXXXXX";
    const char* path = ::mkdtemp(pattern.data());
    auto opened = std::make_shared<share::Folder>(path);
    ::rmdir(path);
    return opened;
  }();
  return folder;
}

// The one that was made last in this run, for events between the driver's steps.
virtio::Input* current_input = nullptr;

void type(uint32_t chosen) {
  if (!current_input) return;
  const auto code = static_cast<uint16_t>(chosen % 256);
  const std::array<virtio::InputEvent, 2> events = {{{1, code, 1}, {1, code, 0}}};
  current_input->send(std::span(events).first(1 + chosen % 2));
}

constexpr Make makers[] = {
    [](machine::GuestMemory& memory) -> std::unique_ptr<virtio::Device> {
      auto input = std::make_unique<virtio::Input>(memory, virtio::Input::Kind::keyboard);
      current_input = input.get();
      return input;
    },
    [](machine::GuestMemory& memory) -> std::unique_ptr<virtio::Device> {
      return std::make_unique<virtio::FileSystem>(
          memory, empty_folder(), "tag",
          share::FuseServer::Config{false, share::owners_of_process("", "0:0"), 16});
    },
    [](machine::GuestMemory& memory) -> std::unique_ptr<virtio::Device> {
      return std::make_unique<virtio::Balloon>(memory);
    },
    [](machine::GuestMemory& memory) -> std::unique_ptr<virtio::Device> {
      static unsigned number = 0;  // a device and its twin listen at the same time
      return std::make_unique<virtio::Vsock>(
          memory, 3,
          "/tmp/lodge-vsock-fuzz-" + std::to_string(::getpid()) + "-" + std::to_string(number++ % 2));
    },
    make_network,
    [](machine::GuestMemory& memory) -> std::unique_ptr<virtio::Device> {
      return std::make_unique<virtio::Block>(memory, std::make_shared<NoDisk>(),
                                             virtio::Block::Config{"", 2});
    },
    [](machine::GuestMemory& memory) -> std::unique_ptr<virtio::Device> {
      const auto nowhere = std::make_shared<device::NullBackend>();
      return std::make_unique<virtio::Console>(
          memory, std::vector<virtio::Console::PortConfig>{{"", nowhere}, {"name", nowhere}});
    },
    [](machine::GuestMemory& memory) -> std::unique_ptr<virtio::Device> {
      return std::make_unique<virtio::Entropy>(memory, virtio::RingFeatures{}, [](std::span<uint8_t>) {});
    },
};

void check_state(virtio::Device& device, virtio::Device& twin) {
  nlohmann::json first, second;
  device.save(first);
  twin.load(first);
  twin.save(second);
  if (first != second) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static machine::GuestMemory memory(2 * machine::layout::MiB);
  Input input({data, size});
  current_input = nullptr;
  const Make make = makers[input.byte() % std::size(makers)];
  const auto twin = make(memory), device = make(memory);
  virtio::testing::FakeDriver driver(*device, memory);
  virtio::testing::attack(*device, memory, static_cast<unsigned>(std::min<size_t>(size / 4, 300)),
                          [&](uint32_t below) {
                            const uint32_t chosen = input.below(below);
                            if (const auto wire = current_wire.lock(); wire && chosen % 16 == 3)
                              wire->bring(chosen / 16 % 2);
                            if (chosen % 16 == 5) type(chosen / 16);
                            return chosen;
                          });
  check_state(*device, *twin);
  if (!driver.start(virtio::F_RING_PACKED) || driver.needs_reset()) std::abort();
  check_state(*device, *twin);
  return 0;
}
