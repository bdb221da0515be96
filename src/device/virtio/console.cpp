// Console device (VirtIO 1.2, section 5.3).
//
// Modelled: several ports, names, open and close, the size of the console, emergency write. Output that a
// back end does not take stays in its queue, so a slow reader slows the guest down and nothing is lost; input
// stays with the back end until the driver has buffers and has opened the port. Not modelled: ports that come
// and go while the guest runs.
#include "device/virtio/console.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <nlohmann/json.hpp>

#include "base/error.hpp"

namespace lodge::device::virtio {

namespace {

constexpr uint64_t F_SIZE = feature(0), F_MULTIPORT = feature(1), F_EMERG_WRITE = feature(2);
constexpr uint16_t queue_size = 64;
constexpr uint32_t pci_class_communication_other = 0x078000;

// 5.3.6.2 Control messages
enum Event : uint16_t {
  READY = 0,
  ADD = 1,
  PORT_READY = 3,
  CONSOLE_PORT = 4,
  RESIZE = 5,
  OPEN = 6,
  NAME = 7
};

// 5.3.2: port 0, then control, then the others.
constexpr unsigned control_receiveq = 2, control_transmitq = 3;
constexpr unsigned receiveq(unsigned port) {
  return port == 0 ? 0 : 2 + 2 * port;
}
constexpr unsigned transmitq(unsigned port) {
  return receiveq(port) + 1;
}

constexpr unsigned EMERG_WRITE = 8;

struct ConsoleState {
  static constexpr std::string_view name = "virtio-console";
  static constexpr unsigned version = 1;
  std::vector<uint8_t> open;     // a port each: 0 or 1
  std::vector<uint8_t> sent;     // 4 bytes each
  std::vector<uint8_t> waiting;  // control messages, 8 bytes each
  template <class V>
  void visit(V& v) {
    v("open", open), v("sent", sent), v("waiting", waiting);
  }
};

template <class Value>
void append(std::vector<uint8_t>& bytes, Value value) {
  for (size_t i = 0; i < sizeof value; i++) bytes.push_back(static_cast<uint8_t>(uint64_t{value} >> (i * 8)));
}

template <class Value>
Value take(const std::vector<uint8_t>& bytes, size_t at) {
  uint64_t value = 0;
  for (size_t i = 0; i < sizeof(Value); i++) value |= uint64_t{bytes[at + i]} << (i * 8);
  return static_cast<Value>(value);
}

}  // namespace

Console::Console(machine::GuestMemory& memory, std::vector<PortConfig> ports, const RingFeatures& rings)
    : Device({.name = "virtio-console",
              .type = DeviceType::console,
              .pci_class = pci_class_communication_other,
              .features = F_SIZE | F_MULTIPORT | F_EMERG_WRITE,
              .queue_sizes = std::vector<uint16_t>(2 + 2 * ports.size(), queue_size)},
             memory, rings) {
  for (unsigned i = 0; i < ports.size(); i++)
    ports_.push_back(std::make_unique<Port>(*this, i, std::move(ports[i])));
}

Console::~Console() {
  if (!connected_) return;
  for (auto& port : ports_) port->config.backend->disconnect();
}

void Console::connect_backends() {
  connected_ = true;
  for (auto& port : ports_) port->config.backend->connect(*port);
}

// --- Data

// Without MULTIPORT there is one port, and it is always open.
bool Console::listening(unsigned port) const noexcept {
  if (!running()) return false;
  return has_feature(F_MULTIPORT) ? ports_[port]->guest_open : port == 0;
}

size_t Console::receive(unsigned port, std::span<const uint8_t> bytes) noexcept {
  const std::lock_guard lock(mutex_);
  if (!listening(port)) return 0;
  const unsigned index = receiveq(port);
  size_t taken = 0;
  do {
    while (taken < bytes.size()) {
      const Pop result = queue(index).pop(chain_);
      if (result == Pop::broken) needs_reset("a receive buffer that breaks the rules");
      if (result != Pop::chain) break;
      const size_t count = chain_.write(0, bytes.subspan(taken));
      queue(index).push(chain_, static_cast<uint32_t>(count));
      taken += count;
    }
    if (taken == bytes.size()) break;
    queue(index).want_kicks(true);  // the back end waits for new buffers
  } while (queue(index).has_available());
  notify(index);
  return taken;
}

void Console::transmit_ready(unsigned port) noexcept {
  const std::lock_guard lock(mutex_);
  if (running()) transmit(port);
}

void Console::transmit(unsigned port) noexcept {
  Port& out = *ports_[port];
  drain(transmitq(port), chain_, [&](const Chain& chain) {
    std::array<uint8_t, 4096> piece;
    while (out.sent < chain.readable_size()) {
      const size_t size = chain.read(out.sent, piece);
      const size_t taken = out.config.backend->write({piece.data(), size});
      out.sent += static_cast<uint32_t>(taken);
      if (taken < size) return false;  // transmit_ready() goes on from here
    }
    out.sent = 0;
    queue(transmitq(port)).push(chain, 0);
    return true;
  });
}

void Console::process(unsigned index) noexcept {
  if (index == control_receiveq) return send_control();
  if (index == control_transmitq) return take_control();
  const unsigned port = index < 2 ? 0 : (index - 2) / 2;
  if (index == transmitq(port)) return transmit(port);
  queue(index).want_kicks(true);
  ports_[port]->config.backend->receive_ready();
}

// --- Control

void Console::take_control() noexcept {
  drain(control_transmitq, chain_, [this](const Chain& chain) {
    std::array<uint8_t, 8> bytes{};
    if (chain.read(0, bytes) == bytes.size()) {
      Control message;
      std::memcpy(&message, bytes.data(), sizeof message);
      handle(message);
    }
    queue(control_transmitq).push(chain, 0);
    return true;
  });
  send_control();
}

void Console::handle(const Control& message) noexcept {
  if (message.event == READY) {
    if (message.value == 1)
      for (uint32_t id = 0; id < ports_.size(); id++) tell({id, ADD, 0});
    return;
  }
  if (message.id >= ports_.size()) return;
  Port& port = *ports_[message.id];
  if (message.event == PORT_READY && message.value == 1) {
    if (port.config.name.empty()) {
      tell({message.id, CONSOLE_PORT, 1});
      tell({message.id, RESIZE, 0});
    } else {
      tell({message.id, NAME, 0});
    }
    tell({message.id, OPEN, 1});
  } else if (message.event == OPEN) {
    port.guest_open = message.value != 0;
    if (port.guest_open) port.config.backend->receive_ready();
  }
}

// A driver that asks again before it has been answered is answered once: the list cannot grow without bound.
void Console::tell(const Control& message) noexcept {
  if (std::ranges::find(to_driver_, message) == to_driver_.end()) to_driver_.push_back(message);
}

void Console::send_control() noexcept {
  if (!has_feature(F_MULTIPORT)) return;
  drain(control_receiveq, chain_, [this](const Chain& chain) {
    if (to_driver_.empty()) return false;
    const Control message = to_driver_.front();
    std::vector<uint8_t> bytes;
    append(bytes, message.id);
    append(bytes, message.event);
    append(bytes, message.value);
    if (message.event == RESIZE) {
      append(bytes, columns_);
      append(bytes, rows_);
    } else if (message.event == NAME) {
      const std::string& name = ports_[message.id]->config.name;
      bytes.insert(bytes.end(), name.begin(), name.end());
    }
    to_driver_.pop_front();
    queue(control_receiveq).push(chain, static_cast<uint32_t>(chain.write(0, bytes)));
    return true;
  });
  // With nothing to say the buffers stay where they are, and more of them are no news.
  queue(control_receiveq).want_kicks(!to_driver_.empty());
}

void Console::resize(uint16_t columns, uint16_t rows) noexcept {
  const std::lock_guard lock(mutex_);
  if (columns == columns_ && rows == rows_) return;
  columns_ = columns;
  rows_ = rows;
  if (!running()) return;
  if (has_feature(F_MULTIPORT)) {
    if (!ports_[0]->guest_open) return;  // it is told when it gets ready
    tell({0, RESIZE, 0});
    send_control();
  } else {
    config_changed();
  }
}

// --- Configuration and state

unsigned Console::config_size() const noexcept {
  return 12;
}

void Console::config_bytes(std::span<uint8_t> out) const noexcept {
  const struct {
    uint16_t columns, rows;
    uint32_t max_ports, emergency;
  } config{columns_, rows_, static_cast<uint32_t>(ports_.size()), 0};
  static_assert(sizeof config == 12);
  std::memcpy(out.data(), &config, sizeof config);
}

void Console::config_written(unsigned offset, std::span<const uint8_t> data) noexcept {
  if (offset == EMERG_WRITE) ports_[0]->config.backend->write(data.first(1));
}

void Console::was_reset() noexcept {
  to_driver_.clear();
  for (auto& port : ports_) {
    port->guest_open = false;
    port->sent = 0;
  }
}

void Console::save_device(nlohmann::json& json) const {
  ConsoleState state;
  for (const auto& port : ports_) {
    state.open.push_back(port->guest_open);
    append(state.sent, port->sent);
  }
  for (const Control& message : to_driver_) {
    append(state.waiting, message.id);
    append(state.waiting, message.event);
    append(state.waiting, message.value);
  }
  save_state(std::move(state), json);
}

void Console::load_device(const nlohmann::json& json) {
  const auto state = load_state<ConsoleState>(json);
  if (state.open.size() != ports_.size() || state.sent.size() != ports_.size() * 4 ||
      state.waiting.size() % 8 != 0)
    usage_error("saved state of virtio-console: {} ports, expected {}", state.open.size(), ports_.size());
  std::deque<Control> waiting;
  for (size_t at = 0; at < state.waiting.size(); at += 8) {
    waiting.push_back({take<uint32_t>(state.waiting, at), take<uint16_t>(state.waiting, at + 4),
                       take<uint16_t>(state.waiting, at + 6)});
    if (waiting.back().id >= ports_.size())
      usage_error("saved state of virtio-console: a message for port {}", waiting.back().id);
  }
  to_driver_ = std::move(waiting);
  for (size_t i = 0; i < ports_.size(); i++) {
    ports_[i]->guest_open = state.open[i] & 1;
    ports_[i]->sent = take<uint32_t>(state.sent, i * 4);
  }
}

}  // namespace lodge::device::virtio
