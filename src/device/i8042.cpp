// PS/2 keyboard controller 8042 (IBM PS/2 hardware interface technical reference, "Keyboard and Auxiliary
// Device Controller").
//
// Modelled: the controller and its commands: command byte and RAM, self test, interface tests, enabling, the
// output port with the reset line, pulses, the loop-back commands 0xd2 and 0xd3, both interrupts. Not
// modelled yet: a keyboard and a mouse. The controller answers as a real one with nothing plugged in: a byte
// sent to a device brings the time-out error and 0xfe. The A20 gate is remembered, not obeyed (see
// reset.cpp).
#include "device/i8042.hpp"

#include <nlohmann/json.hpp>

namespace lodge::device {

namespace {

constexpr uint8_t STATUS_OBF = 0x01, STATUS_SYS = 0x04, STATUS_COMMAND = 0x08, STATUS_UNLOCKED = 0x10,
                  STATUS_AUX = 0x20, STATUS_TIMEOUT = 0x40;
constexpr uint8_t CTR_KEYBOARD_INT = 0x01, CTR_AUX_INT = 0x02, CTR_SYS = 0x04, CTR_KEYBOARD_DISABLE = 0x10,
                  CTR_AUX_DISABLE = 0x20;
constexpr uint8_t OUT_RESET = 0x01, OUT_KEYBOARD_FULL = 0x10, OUT_AUX_FULL = 0x20;
constexpr uint8_t SELF_TEST_PASSED = 0x55, INTERFACE_OK = 0x00, RESEND = 0xfe;

enum Command : uint8_t {
  ReadRam = 0x20,
  WriteRam = 0x60,
  DisableAux = 0xa7,
  EnableAux = 0xa8,
  TestAux = 0xa9,
  SelfTest = 0xaa,
  TestKeyboard = 0xab,
  DisableKeyboard = 0xad,
  EnableKeyboard = 0xae,
  ReadInputPort = 0xc0,
  ReadOutputPort = 0xd0,
  WriteOutputPort = 0xd1,
  LoopKeyboard = 0xd2,
  LoopAux = 0xd3,
  WriteAux = 0xd4,
  ReadTestInputs = 0xe0,
  Pulse = 0xf0
};

}  // namespace

I8042::I8042(machine::Interrupt& keyboard, machine::Interrupt& mouse, machine::Power& power)
    : keyboard_(keyboard), mouse_(mouse), power_(power) {}

void I8042::update_interrupts() noexcept {
  bool full = (state_.status & STATUS_OBF) != 0, aux = (state_.status & STATUS_AUX) != 0;
  keyboard_.set(full && !aux && (state_.ram[0] & CTR_KEYBOARD_INT));
  mouse_.set(full && aux && (state_.ram[0] & CTR_AUX_INT));
}

// There is one output buffer: an answer that nobody has fetched is overwritten.
void I8042::respond(uint8_t byte, uint8_t flags) noexcept {
  state_.output = byte;
  state_.status &= static_cast<uint8_t>(~(STATUS_AUX | STATUS_TIMEOUT));
  state_.status |= STATUS_OBF | flags;
  // The line falls first, so that an edge-triggered input sees every byte.
  keyboard_.set(false);
  mouse_.set(false);
  update_interrupts();
}

uint8_t I8042::read_data() noexcept {
  std::lock_guard lock(mutex_);
  state_.status &= static_cast<uint8_t>(~(STATUS_OBF | STATUS_AUX | STATUS_TIMEOUT));
  update_interrupts();
  return state_.output;
}

uint8_t I8042::read_status() noexcept {
  std::lock_guard lock(mutex_);
  return state_.status;
}

bool I8042::run_command(uint8_t command) noexcept {
  if (command >= Pulse) return !(command & OUT_RESET);  // bits that are 0 pulse their line low
  if (command >= ReadRam && command < ReadRam + 32) {
    respond(state_.ram[command - ReadRam]);
    return false;
  }
  if (command >= WriteRam && command < WriteRam + 32) {
    state_.command = command;
    return false;
  }
  switch (command) {
    case WriteOutputPort:
    case LoopKeyboard:
    case LoopAux:
    case WriteAux: state_.command = command; break;
    case DisableAux: state_.ram[0] |= CTR_AUX_DISABLE; break;
    case EnableAux: state_.ram[0] &= static_cast<uint8_t>(~CTR_AUX_DISABLE); break;
    case DisableKeyboard: state_.ram[0] |= CTR_KEYBOARD_DISABLE; break;
    case EnableKeyboard: state_.ram[0] &= static_cast<uint8_t>(~CTR_KEYBOARD_DISABLE); break;
    case TestAux:
    case TestKeyboard: respond(INTERFACE_OK); break;
    case SelfTest:
      state_.status |= STATUS_SYS;
      respond(SELF_TEST_PASSED);
      break;
    case ReadInputPort: respond(0x80); break;  // keyboard not locked
    case ReadOutputPort: {
      uint8_t full = 0;
      if (state_.status & STATUS_OBF) full = state_.status & STATUS_AUX ? OUT_AUX_FULL : OUT_KEYBOARD_FULL;
      respond(state_.output_port | full);
      break;
    }
    case ReadTestInputs: respond(0x00); break;  // both clock lines low
    default: break;                             // unknown commands are ignored
  }
  return false;
}

bool I8042::run_command_with_data(uint8_t command, uint8_t value) noexcept {
  if (command >= WriteRam && command < WriteRam + 32) {
    state_.ram[command - WriteRam] = value;
    if (command == WriteRam) {
      state_.status = static_cast<uint8_t>((state_.status & ~STATUS_SYS) | (value & CTR_SYS));
      update_interrupts();
    }
    return false;
  }
  switch (command) {
    case WriteOutputPort: state_.output_port = value & 0x0f; return !(value & OUT_RESET);
    case LoopKeyboard: respond(value); return false;
    case LoopAux: respond(value, STATUS_AUX); return false;
    case WriteAux: respond(RESEND, STATUS_AUX | STATUS_TIMEOUT); return false;
    default: respond(RESEND, STATUS_TIMEOUT); return false;  // for the keyboard
  }
}

void I8042::write_data(uint8_t value) noexcept {
  bool reset;
  {
    std::lock_guard lock(mutex_);
    state_.status &= static_cast<uint8_t>(~STATUS_COMMAND);
    uint8_t command = std::exchange(state_.command, uint8_t{0});
    reset = run_command_with_data(command, value);
  }
  if (reset) power_.request(machine::PowerRequest::reset);
}

void I8042::write_command(uint8_t value) noexcept {
  bool reset;
  {
    std::lock_guard lock(mutex_);
    state_.status |= STATUS_COMMAND;
    state_.command = 0;
    reset = run_command(value);
  }
  if (reset) power_.request(machine::PowerRequest::reset);
}

void I8042::reset() noexcept {
  std::lock_guard lock(mutex_);
  state_ = {};
  update_interrupts();
}

void I8042::save(nlohmann::json& json) const {
  std::lock_guard lock(mutex_);
  save_state(state_, json);
}

void I8042::load(const nlohmann::json& json) {
  auto state = load_state<I8042State>(json);
  state.status |= STATUS_UNLOCKED;  // there is no lock that could be turned
  std::lock_guard lock(mutex_);
  state_ = state;
  update_interrupts();
}

}  // namespace lodge::device
