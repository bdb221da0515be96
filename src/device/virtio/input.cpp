// Input device (VirtIO 1.2, section 5.8).
//
// Modelled: names, identity, the bit maps of events, axes, the event queue and of the status queue the
// lights. Reports that belong together are buffered or refused as a whole (5.8.6.2). Not modelled: serial
// numbers, properties, sounds; the driver's own key repetition (EV_REP) is announced, so that Linux repeats.
#include "device/virtio/input.hpp"

#include <linux/input.h>

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "device/key_names.hpp"

namespace lodge::device::virtio {

namespace {

constexpr unsigned eventq = 0, statusq = 1;
constexpr uint16_t queue_size = 64;
constexpr uint32_t pci_class_keyboard = 0x090000, pci_class_mouse = 0x090200;

// 5.8.4: select, subsel, size, five bytes of nothing, and 128 that depend on these.
constexpr unsigned SELECT = 0, SUBSEL = 1, SIZE = 2, PAYLOAD = 8, payload_size = 128;
enum Select : uint8_t { ID_NAME = 1, ID_DEVIDS = 3, EV_BITS = 0x11, ABS_INFO = 0x12 };

constexpr size_t event_size = 8;  // 5.8.6: type, code, value
constexpr uint16_t vendor = 0x1af4, product_keyboard = 1, product_tablet = 2, product_version = 1;
constexpr uint16_t known_lights = 1 << LED_NUML | 1 << LED_CAPSL | 1 << LED_SCROLLL;

constexpr std::array<uint16_t, 5> buttons = {BTN_LEFT, BTN_RIGHT, BTN_MIDDLE, BTN_SIDE, BTN_EXTRA};
constexpr std::array<uint16_t, 2> wheels = {REL_HWHEEL, REL_WHEEL};

using Payload = std::array<uint8_t, payload_size>;

struct InputState {
  static constexpr std::string_view name = "virtio-input";
  static constexpr unsigned version = 1;
  uint8_t select = 0, subselect = 0;
  uint32_t lights = 0;
  std::vector<uint8_t> waiting;  // event_size bytes each
  template <class V>
  void visit(V& v) {
    v("select", select), v("subselect", subselect), v("lights", lights), v("waiting", waiting);
  }
};

std::array<uint8_t, event_size> bytes_of(const InputEvent& event) {
  std::array<uint8_t, event_size> bytes;
  std::memcpy(bytes.data(), &event.type, 2);
  std::memcpy(bytes.data() + 2, &event.code, 2);
  std::memcpy(bytes.data() + 4, &event.value, 4);
  return bytes;
}

InputEvent event_of(const uint8_t* bytes) {
  InputEvent event;
  std::memcpy(&event.type, bytes, 2);
  std::memcpy(&event.code, bytes + 2, 2);
  std::memcpy(&event.value, bytes + 4, 4);
  return event;
}

// A bit for each code, and how many bytes they fill.
template <class Codes>
unsigned put_bits(Payload& out, const Codes& codes) {
  unsigned size = 0;
  for (const unsigned code : codes) {
    out[code / 8] |= static_cast<uint8_t>(1u << code % 8);
    size = std::max(size, code / 8 + 1);
  }
  return size;
}

unsigned put_words(Payload& out, std::initializer_list<uint16_t> words) {
  std::memcpy(out.data(), std::data(words), 2 * words.size());
  return static_cast<unsigned>(2 * words.size());
}

unsigned put_name(Payload& out, std::string_view name) {
  std::ranges::copy(name, out.begin());
  return static_cast<unsigned>(name.size());
}

unsigned keyboard_bits(uint8_t type, Payload& out) {
  switch (type) {
    case EV_KEY: {
      unsigned size = 0;
      for (const KeyName& key : key_names()) size = std::max(size, put_bits(out, std::array{key.code}));
      return size;
    }
    case EV_LED: return put_bits(out, std::array<uint16_t, 3>{LED_NUML, LED_CAPSL, LED_SCROLLL});
    case EV_REP: return put_bits(out, std::array<uint16_t, 2>{REP_DELAY, REP_PERIOD});
    default: return 0;
  }
}

unsigned tablet_bits(uint8_t type, Payload& out) {
  switch (type) {
    case EV_KEY: return put_bits(out, buttons);
    case EV_REL: return put_bits(out, wheels);
    case EV_ABS: return put_bits(out, std::array<uint16_t, 2>{ABS_X, ABS_Y});
    default: return 0;
  }
}

// What the driver sees when it has selected this; how many bytes of it: none for what the device does not
// have.
unsigned describe(Input::Kind kind, uint8_t select, uint8_t subselect, Payload& out) {
  const bool keyboard = kind == Input::Kind::keyboard;
  switch (select) {
    case ID_NAME:
      return subselect ? 0 : put_name(out, keyboard ? "Lodge VirtIO Keyboard" : "Lodge VirtIO Tablet");
    case ID_DEVIDS:
      return subselect ? 0
                       : put_words(out, {BUS_VIRTUAL, vendor, keyboard ? product_keyboard : product_tablet,
                                         product_version});
    case EV_BITS: return keyboard ? keyboard_bits(subselect, out) : tablet_bits(subselect, out);
    case ABS_INFO: {
      if (keyboard || (subselect != ABS_X && subselect != ABS_Y)) return 0;
      const std::array<uint32_t, 5> axis = {0, Input::largest_axis, 0, 0, 0};  // fuzz, flat, resolution: none
      std::memcpy(out.data(), axis.data(), sizeof axis);
      return sizeof axis;
    }
    default: return 0;
  }
}

}  // namespace

Input::Input(machine::GuestMemory& memory, Kind kind, const RingFeatures& rings)
    : Device({.name = kind == Kind::keyboard ? "virtio-keyboard" : "virtio-tablet",
              .type = DeviceType::input,
              .pci_class = kind == Kind::keyboard ? pci_class_keyboard : pci_class_mouse,
              .features = 0,
              .queue_sizes = {queue_size, queue_size}},
             memory, rings),
      kind_(kind) {}

// --- Configuration

unsigned Input::config_size() const noexcept {
  return PAYLOAD + payload_size;
}

void Input::config_bytes(std::span<uint8_t> out) const noexcept {
  Payload payload{};
  out[SELECT] = select_;
  out[SUBSEL] = subselect_;
  out[SIZE] = static_cast<uint8_t>(describe(kind_, select_, subselect_, payload));
  std::ranges::copy(payload, out.begin() + PAYLOAD);
}

void Input::config_written(unsigned offset, std::span<const uint8_t> data) noexcept {
  for (size_t i = 0; i < data.size(); i++) {
    if (offset + i == SELECT) select_ = data[i];
    if (offset + i == SUBSEL) subselect_ = data[i];
  }
}

// --- Events

bool Input::send(std::span<const InputEvent> events) noexcept {
  const std::lock_guard lock(mutex_);
  if (!serving(eventq) || waiting_.size() + events.size() + 1 > max_waiting) return false;
  waiting_.insert(waiting_.end(), events.begin(), events.end());
  waiting_.push_back({EV_SYN, SYN_REPORT, 0});
  deliver();
  return true;
}

// At most max_waiting buffers a call.
void Input::deliver() noexcept {
  Queue& events = queue(eventq);
  do {
    while (!waiting_.empty()) {
      const Pop result = events.pop(chain_);
      if (result == Pop::empty) break;
      // 5.8.6.1: the driver gives buffers of an event's size.
      if (result == Pop::broken || chain_.writable_size() < event_size) {
        if (result == Pop::chain) events.push(chain_, 0);
        notify(eventq);
        return needs_reset("an event buffer that breaks the rules");
      }
      events.push(chain_, static_cast<uint32_t>(chain_.write(0, bytes_of(waiting_.front()))));
      waiting_.pop_front();
    }
    // Buffers are of interest only while something waits for them.
    events.want_kicks(!waiting_.empty());
  } while (!waiting_.empty() && events.has_available());
  notify(eventq);
}

void Input::take_status() noexcept {
  drain(statusq, chain_, [this](const Chain& chain) {
    std::array<uint8_t, event_size> bytes{};
    if (chain.read(0, bytes) == event_size) {
      const InputEvent event = event_of(bytes.data());
      if (event.type == EV_LED && event.code < 16 && (known_lights >> event.code & 1)) {
        const uint32_t light = 1u << event.code;
        lights_ = event.value ? lights_ | light : lights_ & ~light;
      }
    }
    queue(statusq).push(chain, 0);
    return true;
  });
}

void Input::process(unsigned index) noexcept {
  if (index == eventq)
    deliver();
  else
    take_status();
}

bool Input::listened_to() noexcept {
  const std::lock_guard lock(mutex_);
  return serving(eventq);
}

uint32_t Input::lights() noexcept {
  const std::lock_guard lock(mutex_);
  return lights_;
}

// --- Reset and saved state

void Input::was_reset() noexcept {
  select_ = subselect_ = 0;
  lights_ = 0;
  waiting_.clear();
}

void Input::save_device(nlohmann::json& json) const {
  InputState state{select_, subselect_, lights_, {}};
  for (const InputEvent& event : waiting_) {
    const auto bytes = bytes_of(event);
    state.waiting.insert(state.waiting.end(), bytes.begin(), bytes.end());
  }
  save_state(std::move(state), json);
}

void Input::load_device(const nlohmann::json& json) {
  const auto state = load_state<InputState>(json);
  if (state.waiting.size() % event_size != 0 || state.waiting.size() / event_size > max_waiting ||
      (state.lights & ~uint32_t{known_lights}))
    usage_error("saved state of {}: events or lights that it cannot have", description().name);
  select_ = state.select, subselect_ = state.subselect;
  lights_ = state.lights;
  waiting_.clear();
  for (size_t i = 0; i < state.waiting.size(); i += event_size)
    waiting_.push_back(event_of(state.waiting.data() + i));
}

}  // namespace lodge::device::virtio
