// Two cascaded 8259A (Intel data sheet 231468-003) with the edge/level registers of PCI south bridges (ports
// 0x4d0 and 0x4d1), in the state format of KVM.
//
// Modelled: ICW1-4, OCW1-3, fixed, rotating and specific priorities, special mask, special fully nested mode,
// auto EOI with rotation, poll, edge and level inputs, spurious IRQ 7 and 15, the cascade on input 2.
//
// Missing: MCS-80 mode (no PC uses it), buffered mode and ICW3 (the cascade is wired). An edge stays
// requested when its line falls before INTA, as in KVM: the data sheet asks for a spurious interrupt instead,
// which only loses ticks.
#include "kvm/soft/irqchip/pic.hpp"

#include <bit>

namespace lodge::kvm::soft {
namespace {

constexpr unsigned master = 0;
constexpr unsigned slave = 1;
constexpr unsigned cascade_pin = 2;
constexpr unsigned spurious_pin = 7;

constexpr uint8_t icw1 = 0x10;
constexpr uint8_t icw1_needs_icw4 = 0x01;
constexpr uint8_t ocw3 = 0x08;

// Inputs that may be level triggered: not the timer, keyboard, cascade, RTC and FPU error.
constexpr uint8_t elcr_mask[2] = {0xf8, 0xde};

// Position of the highest priority bit: 0 is the highest. 8: none.
unsigned priority(const kvm_pic_state& chip, uint8_t mask) noexcept {
  if (mask == 0) return 8;
  return static_cast<unsigned>(std::countr_zero(std::rotr(mask, chip.priority_add & 7)));
}

uint8_t bit(unsigned pin) noexcept {
  return static_cast<uint8_t>(1u << (pin & 7));
}

}  // namespace

Pic::Pic(Client& client) : client_(client) {
  reset();
}

void Pic::reset() noexcept {
  const std::lock_guard lock(mutex_);
  for (unsigned i = 0; i < 2; ++i) {
    chips_[i] = kvm_pic_state{};
    chips_[i].elcr_mask = elcr_mask[i];
  }
  sources_.fill(0);
  update();
}

// ICW1: clears everything but the lines themselves and the edge/level choice.
void Pic::init_chip(unsigned index, Acked& acked) noexcept {
  kvm_pic_state& chip = chips_[index];
  // Requests that are dropped here count as completed: the 8254 waits for that before it ticks again.
  acked |= static_cast<Acked>(((chip.irr & ~chip.elcr) | chip.isr) << (index * 8));
  const uint8_t elcr = chip.elcr;
  const uint8_t mask = chip.elcr_mask;
  const uint8_t lines = chip.last_irr;
  // Level inputs that are high are requests still; edges must come anew (data sheet: "the edge sense circuit
  // is reset").
  const uint8_t levels = static_cast<uint8_t>(chip.irr & elcr);
  chip = kvm_pic_state{};
  chip.elcr = elcr;
  chip.elcr_mask = mask;
  chip.last_irr = lines;
  chip.irr = levels;
}

// --- Requests and priorities ---

int Pic::set_input(kvm_pic_state& chip, unsigned pin, bool level) noexcept {
  const uint8_t mask = bit(pin);
  int result = 1;
  if ((chip.elcr & mask) != 0) {
    if (level) {
      result = (chip.irr & mask) == 0 ? 1 : 0;
      chip.irr |= mask;
      chip.last_irr |= mask;
    } else {
      chip.irr &= static_cast<uint8_t>(~mask);
      chip.last_irr &= static_cast<uint8_t>(~mask);
    }
  } else if (level) {
    if ((chip.last_irr & mask) == 0) {
      result = (chip.irr & mask) == 0 ? 1 : 0;
      chip.irr |= mask;
    }
    chip.last_irr |= mask;
  } else {
    chip.last_irr &= static_cast<uint8_t>(~mask);
  }
  return (chip.imr & mask) != 0 ? -1 : result;
}

// The pin that the chip asks to be served, or -1.
int Pic::pending(const kvm_pic_state& chip) const noexcept {
  const unsigned wanted = priority(chip, static_cast<uint8_t>(chip.irr & ~chip.imr));
  if (wanted == 8) return -1;
  uint8_t serving = chip.isr;
  // Special mask mode: a masked interrupt in service blocks nobody. The master in special fully nested mode
  // lets further requests of the slave through while one of the slave is in service.
  if (chip.special_mask != 0) serving &= static_cast<uint8_t>(~chip.imr);
  if (chip.special_fully_nested_mode != 0 && &chip == &chips_[master])
    serving &= static_cast<uint8_t>(~bit(cascade_pin));
  if (wanted >= priority(chip, serving)) return -1;
  return static_cast<int>((wanted + chip.priority_add) & 7);
}

// Recomputes the cascade and INTR. True: the client must be told.
bool Pic::update() noexcept {
  const bool from_slave = pending(chips_[slave]) >= 0;
  // The slave's output acts as an edge for each new request, so that the master never misses one. A request
  // that goes away stays latched at the master: its INTA gives the slave's spurious vector.
  kvm_pic_state& chip = chips_[master];
  if (from_slave) {
    set_input(chip, cascade_pin, true);
    set_input(chip, cascade_pin, false);
  }
  const bool output = pending(chip) >= 0;
  output_.store(output, std::memory_order_release);
  return output;
}

void Pic::report(bool raised, Acked acked) noexcept {
  for (; acked != 0; acked &= static_cast<Acked>(acked - 1))
    client_.pic_acked(static_cast<unsigned>(std::countr_zero(acked)));
  if (raised) client_.pic_output();
}

int Pic::set_irq(unsigned irq, unsigned source, bool level) noexcept {
  irq &= 15;
  int result = 0;
  bool raised = false;
  {
    const std::lock_guard lock(mutex_);
    const uint32_t source_bit = 1u << (source & 31);
    if (level)
      sources_[irq] |= source_bit;
    else
      sources_[irq] &= ~source_bit;
    if (irq == cascade_pin) return -1;  // wired to the slave, no device can drive it
    result = set_input(chips_[irq >> 3], irq & 7, sources_[irq] != 0);
    raised = update();
  }
  report(raised && level, 0);
  return result;
}

// An interrupt enters service.
void Pic::take(unsigned chip_index, unsigned pin, Acked& acked) noexcept {
  kvm_pic_state& chip = chips_[chip_index];
  chip.isr |= bit(pin);
  if ((chip.elcr & bit(pin)) == 0) chip.irr &= static_cast<uint8_t>(~bit(pin));
  if (chip.auto_eoi == 0) return;
  if (chip.rotate_on_auto_eoi != 0) chip.priority_add = static_cast<uint8_t>((pin + 1) & 7);
  complete(chip_index, pin, acked);
}

void Pic::complete(unsigned chip_index, unsigned pin, Acked& acked) noexcept {
  chips_[chip_index].isr &= static_cast<uint8_t>(~bit(pin));
  acked |= static_cast<Acked>(1u << (chip_index * 8 + pin));
}

// The vector for the CPU; spurious ones leave no bit in service.
int Pic::vector(bool take_it, Acked& acked) noexcept {
  const int pin = pending(chips_[master]);
  if (pin < 0) return chips_[master].irq_base + static_cast<int>(spurious_pin);
  if (pin != static_cast<int>(cascade_pin)) {
    if (take_it) take(master, static_cast<unsigned>(pin), acked);
    return chips_[master].irq_base + pin;
  }
  const int slave_pin = pending(chips_[slave]);
  if (take_it) {
    take(master, cascade_pin, acked);
    if (slave_pin >= 0) take(slave, static_cast<unsigned>(slave_pin), acked);
  }
  return chips_[slave].irq_base + (slave_pin >= 0 ? slave_pin : static_cast<int>(spurious_pin));
}

int Pic::peek() noexcept {
  const std::lock_guard lock(mutex_);
  Acked none = 0;
  return output() ? vector(false, none) : -1;
}

int Pic::acknowledge() noexcept {
  Acked acked = 0;
  int result = -1;
  bool raised = false;
  {
    const std::lock_guard lock(mutex_);
    result = vector(true, acked);
    raised = update();
  }
  report(raised, acked);
  return result;
}

// --- Registers ---

void Pic::write_ocw2(unsigned index, uint8_t value, Acked& acked) noexcept {
  kvm_pic_state& chip = chips_[index];
  const unsigned level = value & 7;
  const unsigned top = priority(chip, chip.isr);
  const unsigned serving = (top + chip.priority_add) & 7;
  switch (value >> 5) {
    case 0:  // rotate in automatic EOI mode: clear, set
    case 4: chip.rotate_on_auto_eoi = value >> 7; break;
    case 1:  // non-specific EOI
    case 5:  // and rotate
      if (top == 8) break;
      complete(index, serving, acked);
      if (value >> 5 == 5) chip.priority_add = static_cast<uint8_t>((serving + 1) & 7);
      break;
    case 3:  // specific EOI
      complete(index, level, acked);
      break;
    case 6:  // set priority
      chip.priority_add = static_cast<uint8_t>((level + 1) & 7);
      break;
    case 7:  // specific EOI and rotate
      chip.priority_add = static_cast<uint8_t>((level + 1) & 7);
      complete(index, level, acked);
      break;
    default: break;  // 2: no operation
  }
}

void Pic::write_command(unsigned index, uint8_t value, Acked& acked) noexcept {
  kvm_pic_state& chip = chips_[index];
  if ((value & icw1) != 0) {
    init_chip(index, acked);
    chip.init4 = value & icw1_needs_icw4;
    chip.init_state = 1;
  } else if ((value & ocw3) != 0) {
    if ((value & 0x04) != 0) chip.poll = 1;
    if ((value & 0x02) != 0) chip.read_reg_select = value & 1;
    if ((value & 0x40) != 0) chip.special_mask = (value >> 5) & 1;
  } else {
    write_ocw2(index, value, acked);
  }
}

void Pic::write_data(unsigned index, uint8_t value) noexcept {
  kvm_pic_state& chip = chips_[index];
  switch (chip.init_state) {
    case 1:  // ICW2
      chip.irq_base = value & 0xf8;
      chip.init_state = 2;
      break;
    case 2:  // ICW3: the cascade is wired, so its value is of no use
      chip.init_state = chip.init4 != 0 ? 3 : 0;
      break;
    case 3:  // ICW4
      chip.special_fully_nested_mode = (value >> 4) & 1;
      chip.auto_eoi = (value >> 1) & 1;
      chip.init_state = 0;
      break;
    default: chip.imr = value; break;  // OCW1
  }
}

void Pic::write(uint16_t port, uint8_t value) noexcept {
  Acked acked = 0;
  bool raised = false;
  {
    const std::lock_guard lock(mutex_);
    if (port == 0x4d0 || port == 0x4d1) {
      kvm_pic_state& chip = chips_[port & 1];
      chip.elcr = value & chip.elcr_mask;
    } else if ((port & 1) == 0) {
      write_command(port >> 7, value, acked);
    } else {
      write_data(port >> 7, value);
    }
    raised = update();
  }
  report(raised, acked);
}

// Poll: an INTA cycle by register. Bit 7 says that there was a request.
uint8_t Pic::poll(unsigned index, Acked& acked) noexcept {
  const int pin = pending(chips_[index]);
  if (pin < 0) return 0;
  take(index, static_cast<unsigned>(pin), acked);
  return static_cast<uint8_t>(0x80 | pin);
}

uint8_t Pic::read(uint16_t port) noexcept {
  Acked acked = 0;
  uint8_t value = 0;
  bool raised = false;
  {
    const std::lock_guard lock(mutex_);
    if (port == 0x4d0 || port == 0x4d1) return chips_[port & 1].elcr;
    kvm_pic_state& chip = chips_[port >> 7];
    if (chip.poll != 0) {
      chip.poll = 0;
      value = poll(port >> 7, acked);
      raised = update();
    } else if ((port & 1) != 0) {
      value = chip.imr;
    } else {
      value = chip.read_reg_select != 0 ? chip.isr : chip.irr;
    }
  }
  report(raised, acked);
  return value;
}

// --- State ---

kvm_pic_state Pic::state(unsigned chip) noexcept {
  const std::lock_guard lock(mutex_);
  return chips_[chip & 1];
}

void Pic::set_state(unsigned index, const kvm_pic_state& state) noexcept {
  bool raised = false;
  {
    const std::lock_guard lock(mutex_);
    kvm_pic_state& chip = chips_[index & 1];
    chip = state;
    // Everything that a calculation relies on is brought into range: the state may come from a file.
    chip.elcr_mask = elcr_mask[index & 1];
    chip.elcr &= chip.elcr_mask;
    chip.priority_add &= 7;
    chip.irq_base &= 0xf8;
    if (chip.init_state > 3) chip.init_state = 0;
    raised = update();
  }
  report(raised, 0);
}

}  // namespace lodge::kvm::soft
