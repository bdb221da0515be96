// UART 16550A (National Semiconductor PC16550D data sheet, section 8 "Registers").
//
// Modelled: all registers, both FIFOs with trigger levels, the character time-out, the interrupt priorities,
// the modem lines with their delta bits, loopback, break reception, and OUT2 as the PC's interrupt gate (IBM
// PC/AT technical reference, serial adapter). Not modelled: time on the wire (a byte leaves at once, as fast
// as the back end takes it: nobody wants a slow console), parity and framing errors (the host's streams have
// none), DMA mode (the pins are not wired in a PC).
#include "device/serial.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/error.hpp"

namespace lodge::device {

namespace {

enum Register : uint64_t { RBR_THR, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR };

constexpr uint8_t IER_RDA = 1, IER_THRE = 2, IER_RLS = 4, IER_MSI = 8, IER_MASK = 0x0f;
constexpr uint8_t IIR_MSI = 0x0, IIR_NONE = 0x1, IIR_THRE = 0x2, IIR_RDA = 0x4, IIR_RLS = 0x6,
                  IIR_TIMEOUT = 0xc, IIR_FIFO = 0xc0;
constexpr uint8_t FCR_ENABLE = 1, FCR_CLEAR_RX = 2, FCR_CLEAR_TX = 4, FCR_STICKY = 0xc9;
constexpr uint8_t LCR_DLAB = 0x80;
constexpr uint8_t MCR_DTR = 1, MCR_RTS = 2, MCR_OUT1 = 4, MCR_OUT2 = 8, MCR_LOOP = 0x10, MCR_MASK = 0x1f;
constexpr uint8_t LSR_DR = 1, LSR_OE = 2, LSR_BI = 0x10, LSR_THRE = 0x20, LSR_TEMT = 0x40,
                  LSR_FIFO_ERROR = 0x80,
                  LSR_ERRORS = 0x1e;  // overrun, parity, framing, break
constexpr uint8_t MSR_TERI = 4, MSR_CTS = 0x10, MSR_DSR = 0x20, MSR_RI = 0x40, MSR_DCD = 0x80;

constexpr uint64_t uart_clock = 115'200;  // 1.8432 MHz / 16

}  // namespace

Serial::Serial(Clock& clock, machine::Interrupt& interrupt, CharBackend& backend)
    : clock_(clock),
      interrupt_(interrupt),
      backend_(backend),
      timer_(clock.make_timer([this] { on_timeout(); })) {
  state_.lines = modem_lines();
}

bool Serial::fifo_enabled() const noexcept {
  return (state_.fcr & FCR_ENABLE) != 0;
}
bool Serial::loopback() const noexcept {
  return (state_.mcr & MCR_LOOP) != 0;
}
unsigned Serial::rx_capacity() const noexcept {
  return fifo_enabled() ? serial_fifo_size : 1;
}

unsigned Serial::rx_trigger() const noexcept {
  static constexpr std::array<uint8_t, 4> levels{1, 4, 8, 14};
  return fifo_enabled() ? levels[state_.fcr >> 6] : 1;
}

// --- Interrupts
// ----------------------------------------------------------------------------------------------

// The highest enabled source, as IIR names it.
uint8_t Serial::pending_source() const noexcept {
  if ((state_.ier & IER_RLS) && state_.errors) return IIR_RLS;
  if ((state_.ier & IER_RDA) && state_.rx_count >= rx_trigger()) return IIR_RDA;
  if ((state_.ier & IER_RDA) && state_.timeout_pending) return IIR_TIMEOUT;
  if ((state_.ier & IER_THRE) && state_.thre_pending) return IIR_THRE;
  if ((state_.ier & IER_MSI) && state_.deltas) return IIR_MSI;
  return IIR_NONE;
}

void Serial::update_interrupt() noexcept {
  bool level = pending_source() != IIR_NONE && (state_.mcr & MCR_OUT2);
  if (level == level_) return;
  level_ = level;
  interrupt_.set(level);
}

// Reading IIR acknowledges THRE, but only when THRE is what it reports.
uint8_t Serial::read_interrupt_id() noexcept {
  uint8_t source = pending_source();
  if (source == IIR_THRE) {
    state_.thre_pending = false;
    update_interrupt();
  }
  return source | (fifo_enabled() ? IIR_FIFO : 0);
}

void Serial::set_ier(uint8_t value) noexcept {
  bool thre_enabled = !(state_.ier & IER_THRE) && (value & IER_THRE);
  state_.ier = value & IER_MASK;
  // Drivers start a transmission by enabling the source while the transmitter is idle, and expect an
  // interrupt.
  if (thre_enabled && state_.tx_count == 0) state_.thre_pending = true;
  update_interrupt();
}

// --- Receiver
// ------------------------------------------------------------------------------------------------

void Serial::push(uint8_t byte, uint8_t errors) noexcept {
  if (state_.rx_count >= rx_capacity()) {
    state_.errors |= LSR_OE;
    // Without a FIFO the new byte overwrites the old one; with it the byte in the shift register is lost.
    if (!fifo_enabled()) state_.rx[0] = byte;
    return;
  }
  state_.rx[state_.rx_count] = byte;
  state_.rx_errors[state_.rx_count] = errors;
  if (state_.rx_count++ == 0) state_.errors |= errors;  // LSR shows the errors of the byte at the head
}

uint8_t Serial::pop() noexcept {
  state_.timeout_pending = false;
  if (state_.rx_count == 0) return 0;
  uint8_t byte = state_.rx[0];
  std::copy(state_.rx.begin() + 1, state_.rx.begin() + state_.rx_count, state_.rx.begin());
  std::copy(state_.rx_errors.begin() + 1, state_.rx_errors.begin() + state_.rx_count,
            state_.rx_errors.begin());
  if (--state_.rx_count > 0) state_.errors |= state_.rx_errors[0];
  restart_timeout();
  update_interrupt();
  return byte;
}

// A byte that waits below the trigger level is announced after four character times of silence.
void Serial::restart_timeout() noexcept {
  if (!fifo_enabled() || state_.rx_count == 0 || state_.timeout_pending) return timer_->cancel();
  if (state_.rx_count >= rx_trigger()) return timer_->cancel();
  uint64_t divisor = std::max<uint64_t>(1, state_.dll | state_.dlm << 8);
  constexpr uint64_t bits = 4 * 10;  // start, 8 data, stop
  timer_->arm(clock_.now() + bits * divisor * 1'000'000'000 / uart_clock);
}

void Serial::on_timeout() noexcept {
  std::lock_guard lock(mutex_);
  // The guest may have read the FIFO empty while the timer fired.
  if (!fifo_enabled() || state_.rx_count == 0) return;
  state_.timeout_pending = true;
  update_interrupt();
}

size_t Serial::receive(std::span<const uint8_t> bytes) noexcept {
  std::lock_guard lock(mutex_);
  // The receiver is cut off from the line during loopback: hold the input back, a test should not eat it.
  unsigned room = loopback() ? 0 : rx_capacity() - std::min<unsigned>(rx_capacity(), state_.rx_count);
  size_t count = std::min<size_t>(bytes.size(), room);
  for (uint8_t byte : bytes.first(count)) push(byte, 0);
  if (count < bytes.size()) input_refused_ = true;
  if (count > 0) {
    restart_timeout();
    update_interrupt();
  }
  return count;
}

bool Serial::receive_break() noexcept {
  std::lock_guard lock(mutex_);
  if (loopback() || state_.rx_count >= rx_capacity()) return false;
  push(0, LSR_BI);
  restart_timeout();
  update_interrupt();
  return true;
}

// Whether the back end waits for room and there is some.
bool Serial::take_ready() noexcept {
  if (!input_refused_ || loopback() || state_.rx_count >= rx_capacity()) return false;
  input_refused_ = false;
  return true;
}

// --- Transmitter
// ---------------------------------------------------------------------------------------------

void Serial::transmit(uint8_t byte) noexcept {
  // The edge matters: a driver that never reads IIR must still see the line fall and rise with every byte.
  state_.thre_pending = false;
  update_interrupt();
  if (loopback()) {
    push(byte, 0);
    restart_timeout();
    state_.thre_pending = true;
    return update_interrupt();
  }
  unsigned capacity = fifo_enabled() ? serial_fifo_size : 1;
  if (state_.tx_count < capacity)
    state_.tx[state_.tx_count++] = byte;  // else overrun: the guest ignored THRE
  drain();
}

// Gives the transmit FIFO to the back end as far as that takes it.
void Serial::drain() noexcept {
  if (state_.tx_count == 0) return;
  size_t taken = std::min<size_t>(backend_.write({state_.tx.data(), state_.tx_count}), state_.tx_count);
  std::copy(state_.tx.begin() + static_cast<ptrdiff_t>(taken), state_.tx.begin() + state_.tx_count,
            state_.tx.begin());
  state_.tx_count = static_cast<uint8_t>(state_.tx_count - taken);
  if (state_.tx_count > 0) return;
  state_.thre_pending = true;
  update_interrupt();
}

void Serial::transmit_ready() noexcept {
  std::lock_guard lock(mutex_);
  drain();
}

void Serial::set_fcr(uint8_t value) noexcept {
  bool toggled = (state_.fcr ^ value) & FCR_ENABLE;  // changing the mode clears both FIFOs
  if (toggled || (value & FCR_CLEAR_RX)) {
    state_.rx_count = 0;
    state_.timeout_pending = false;
  }
  if ((toggled || (value & FCR_CLEAR_TX)) && state_.tx_count > 0) {
    state_.tx_count = 0;
    state_.thre_pending = true;
  }
  // Bit 0 must be set for the others to be programmed.
  state_.fcr = (value & FCR_ENABLE) ? value & FCR_STICKY : 0;
  restart_timeout();
  update_interrupt();
}

// --- Line and modem status
// -----------------------------------------------------------------------------------

uint8_t Serial::line_status() const noexcept {
  uint8_t status = state_.errors;
  if (state_.rx_count > 0) status |= LSR_DR;
  if (state_.tx_count == 0) status |= LSR_THRE | LSR_TEMT;
  if (fifo_enabled() && std::any_of(state_.rx_errors.begin(), state_.rx_errors.begin() + state_.rx_count,
                                    [](uint8_t errors) { return errors != 0; }))
    status |= LSR_FIFO_ERROR;
  return status;
}

uint8_t Serial::read_line_status() noexcept {
  uint8_t status = line_status();
  if (state_.errors) {
    state_.errors = 0;
    if (state_.rx_count > 0) state_.rx_errors[0] = 0;
    update_interrupt();
  }
  return status;
}

// A connected terminal is ready and its carrier is on; in loopback the outputs of MCR appear instead.
uint8_t Serial::modem_lines() const noexcept {
  if (!loopback()) return MSR_CTS | MSR_DSR | MSR_DCD;
  return static_cast<uint8_t>((state_.mcr & MCR_RTS ? MSR_CTS : 0) | (state_.mcr & MCR_DTR ? MSR_DSR : 0) |
                              (state_.mcr & MCR_OUT1 ? MSR_RI : 0) | (state_.mcr & MCR_OUT2 ? MSR_DCD : 0));
}

void Serial::update_modem_lines() noexcept {
  uint8_t lines = modem_lines();
  auto changed = static_cast<uint8_t>(lines ^ state_.lines);
  state_.deltas |= (changed & (MSR_CTS | MSR_DSR | MSR_DCD)) >> 4;
  if ((changed & MSR_RI) && !(lines & MSR_RI)) state_.deltas |= MSR_TERI;  // the trailing edge only
  state_.lines = lines;
}

uint8_t Serial::read_modem_status() noexcept {
  uint8_t status = state_.lines | state_.deltas;
  state_.deltas = 0;
  update_interrupt();
  return status;
}

void Serial::set_mcr(uint8_t value) noexcept {
  state_.mcr = value & MCR_MASK;
  update_modem_lines();
  update_interrupt();
}

// --- Ports
// ---------------------------------------------------------------------------------------------------

uint8_t Serial::read_byte(uint64_t offset) noexcept {
  std::unique_lock lock(mutex_);
  bool dlab = (state_.lcr & LCR_DLAB) != 0;
  switch (offset) {
    case RBR_THR: {
      if (dlab) return state_.dll;
      uint8_t byte = pop();
      bool ready = take_ready();
      lock.unlock();
      if (ready) backend_.receive_ready();
      return byte;
    }
    case IER: return dlab ? state_.dlm : state_.ier;
    case IIR_FCR: return read_interrupt_id();
    case LCR: return state_.lcr;
    case MCR: return state_.mcr;
    case LSR: return read_line_status();
    case MSR: return read_modem_status();
    case SCR: return state_.scr;
    default: return 0xff;
  }
}

void Serial::write_byte(uint64_t offset, uint8_t value) noexcept {
  std::unique_lock lock(mutex_);
  bool dlab = (state_.lcr & LCR_DLAB) != 0;
  switch (offset) {
    case RBR_THR:
      if (dlab)
        state_.dll = value;
      else
        transmit(value);
      break;
    case IER:
      if (dlab)
        state_.dlm = value;
      else
        set_ier(value);
      break;
    case IIR_FCR: set_fcr(value); break;
    case LCR: state_.lcr = value; break;
    case MCR: set_mcr(value); break;
    case SCR: state_.scr = value; break;
    default: break;  // LSR and MSR are read-only outside the factory test
  }
  bool ready = take_ready();
  lock.unlock();
  if (ready) backend_.receive_ready();
}

// --- Saved state
// ---------------------------------------------------------------------------------------------

void Serial::save(nlohmann::json& json) const {
  std::lock_guard lock(mutex_);
  save_state(state_, json);
}

void Serial::load(const nlohmann::json& json) {
  auto state = load_state<SerialState>(json);
  if (state.rx_count > serial_fifo_size || state.tx_count > serial_fifo_size)
    usage_error("saved state of serial: a FIFO holds more than {} bytes", serial_fifo_size);
  // Bits that the chip does not have stay clear, whatever the file says.
  state.ier &= IER_MASK;
  state.fcr &= FCR_STICKY;
  state.mcr &= MCR_MASK;
  state.errors &= LSR_ERRORS;
  state.lines &= MSR_CTS | MSR_DSR | MSR_RI | MSR_DCD;
  state.deltas &= 0x0f;
  for (uint8_t& errors : state.rx_errors) errors &= LSR_ERRORS;
  std::lock_guard lock(mutex_);
  state_ = state;
  level_ = pending_source() != IIR_NONE && (state_.mcr & MCR_OUT2);
  interrupt_.set(level_);
  restart_timeout();
}

}  // namespace lodge::device
