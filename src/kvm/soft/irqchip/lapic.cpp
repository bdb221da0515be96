// Local APIC (SDM vol. 3, chapter 11: "Advanced Programmable Interrupt Controller").
//
// Modelled: the xAPIC page and the x2APIC MSRs; all IA32_APIC_BASE transitions; fixed and lowest-priority
// delivery with IRR, ISR, TMR and priorities; NMI, SMI, INIT and start-up IPIs with every shorthand; flat,
// cluster and x2APIC logical destinations; LVT timer (lapic_timer.cpp), LINT0, LINT1, error, performance and
// thermal; the ESR.
//
// Missing: CMCI (the guest's MCG_CAP does not offer it), APR and remote read (gone since the Pentium 4),
// interrupt remapping. The delivery status bits are always idle, because delivery happens within the write.
//
// Where the manual leaves freedom KVM's choice is taken: LINT0 of the boot processor is open for the 8259
// after reset (guests started without firmware need it), the lowest-priority target is chosen by the Irqchip.
#include "kvm/soft/irqchip/lapic.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>
#include <span>
#include <utility>

#include "kvm/soft/irqchip/lapic_registers.hpp"

namespace lodge::kvm::soft {

using namespace apic;

namespace {

// The highest vector set in the 256-bit register that starts at `first`, or -1.
int highest(const std::array<uint32_t, 64>& regs, unsigned first) noexcept {
  for (int word = 7; word >= 0; --word) {
    const uint32_t bits = regs[first + static_cast<unsigned>(word)];
    if (bits != 0) return word * 32 + 31 - std::countl_zero(bits);
  }
  return -1;
}

bool test(const std::array<uint32_t, 64>& regs, unsigned first, unsigned vector) noexcept {
  return ((regs[first + vector / 32] >> (vector % 32)) & 1) != 0;
}

void assign(std::array<uint32_t, 64>& regs, unsigned first, unsigned vector, bool value) noexcept {
  const uint32_t bit = 1u << (vector % 32);
  if (value)
    regs[first + vector / 32] |= bit;
  else
    regs[first + vector / 32] &= ~bit;
}

bool writable(unsigned reg, bool x2apic) noexcept {
  if (reg >= reg_icr && reg <= reg_initial_count) return reg != reg_icr_high || !x2apic;
  switch (reg) {
    case reg_tpr:
    case reg_eoi:
    case reg_svr:
    case reg_esr:
    case reg_divide: return true;
    case reg_id:
    case reg_ldr:
    case reg_dfr: return !x2apic;
    case reg_self_ipi: return x2apic;
    default: return false;
  }
}

}  // namespace

// What a register write asks for once the lock is released: other LAPICs and the IOAPIC have locks of their
// own.
struct Lapic::Effects {
  bool ipi = false;
  unsigned shorthand = 0;
  ApicMessage message;
  int eoi = -1;
  bool broadcast = false;
};

Lapic::Lapic(uint32_t id, VcpuPort& port, ApicFabric& fabric, Clock& clock, Options options)
    : id_(id), options_(options), fabric_(fabric), clock_(clock), port_(&port), base_(0) {
  set_cpuid(true, 52);
  timer_ = port.make_timer(clock_, [this] { timer_expired(); });
  reset();
}

Lapic::~Lapic() {
  detach();
}

void Lapic::set_cpuid(bool x2apic_offered, unsigned physical_bits) noexcept {
  const std::lock_guard lock(mutex_);
  x2apic_offered_ = x2apic_offered;
  base_reserved_ = reserved_base(x2apic_offered, physical_bits);
}

// --- State that other threads look at ---

bool Lapic::present() const noexcept {
  return (base_.load(std::memory_order_relaxed) & base_enable) != 0 && !detached();
}

void Lapic::publish_ids() noexcept {
  xapic_id_.store(regs_[reg_id] >> 24, std::memory_order_relaxed);
  dfr_.store(regs_[reg_dfr], std::memory_order_relaxed);
  // Cluster and bit of an x2APIC follow from its ID (11.12.10.2).
  if (x2apic()) regs_[reg_ldr] = ((id_ >> 4) << 16) | (1u << (id_ & 15));
  ldr_.store(regs_[reg_ldr], std::memory_order_relaxed);
}

uint32_t Lapic::ppr() const noexcept {
  const int in_service = highest(regs_, reg_isr);
  const uint32_t service_class = in_service < 0 ? 0 : static_cast<uint32_t>(in_service) & 0xf0;
  const uint32_t tpr = regs_[reg_tpr];
  return (tpr & 0xf0) >= service_class ? tpr : service_class;
}

// To be called after every change of registers, with the lock held.
void Lapic::update() noexcept {
  const bool hardware_enabled = (base_.load(std::memory_order_relaxed) & base_enable) != 0;
  cr8_.store(static_cast<uint8_t>(regs_[reg_tpr] >> 4), std::memory_order_relaxed);
  enabled_.store(hardware_enabled && (regs_[reg_svr] & svr_enable) != 0, std::memory_order_relaxed);
  const uint32_t lint0 = regs_[reg_lvt_lint0];
  const bool extint =
      !hardware_enabled ||
      ((lint0 & lvt_masked) == 0 && static_cast<DeliveryMode>((lint0 >> 8) & 7) == DeliveryMode::extint);
  accepts_extint_.store(extint, std::memory_order_relaxed);
  int vector = hardware_enabled ? highest(regs_, reg_irr) : -1;
  const bool settle = eoi_deferred_ && vector >= 0;
  if (vector >= 0 && (static_cast<uint32_t>(vector) & 0xf0) <= (ppr() & 0xf0)) vector = -1;
  own_vector_.store(vector, std::memory_order_release);
  if (port_ != nullptr && (vector >= 0 || settle || (extint && fabric_.extint_asserted())))
    port_->interrupt_changed();
}

bool Lapic::matches(const ApicMessage& message, bool broadcast_quirk) const noexcept {
  const uint32_t destination = message.destination;
  const uint32_t ldr = ldr_.load(std::memory_order_relaxed);
  if (x2apic()) {
    if (destination == 0xffffffff) return true;
    // An 8-bit source cannot say 0xffffffff; KVM lets its 0xff mean everybody unless told otherwise.
    if (destination == 0xff && (message.from_ipi ? !message.from_x2apic : broadcast_quirk)) return true;
    if (!message.logical) return destination == id_;
    return ldr >> 16 == destination >> 16 && (ldr & destination & 0xffff) != 0;
  }
  if (destination == 0xffffffff || destination == 0xff) return true;
  if (!message.logical) {
    // An ID above 255 has no xAPIC form: such a LAPIC can be addressed before it is switched to x2APIC mode.
    return destination == xapic_id_.load(std::memory_order_relaxed) || (id_ > 0xff && destination == id_);
  }
  const uint32_t logical = ldr >> 24;
  const uint32_t model = dfr_.load(std::memory_order_relaxed) >> 28;
  if (model == 0xf) return (logical & destination & 0xff) != 0;
  return model == 0 && logical >> 4 == (destination >> 4 & 0xf) && (logical & destination & 0xf) != 0;
}

// --- Delivery ---

// Requests a fixed interrupt. False: the LAPIC takes none.
bool Lapic::request(uint8_t vector, bool level) noexcept {
  if (!enabled_.load(std::memory_order_relaxed)) return false;
  if (vector < 16) {
    error(esr_receive_illegal);
    return false;
  }
  assign(regs_, reg_irr, vector, true);
  assign(regs_, reg_tmr, vector, level);
  return true;
}

void Lapic::error(uint32_t bit) noexcept {
  error_pending_ |= bit;
  const uint32_t lvt = regs_[reg_lvt_error];
  const uint32_t vector = lvt & lvt_vector;
  // An illegal vector in the error entry itself is only recorded: it must not report itself again.
  if ((lvt & lvt_masked) != 0 || !enabled_.load(std::memory_order_relaxed)) return;
  if (vector < 16) {
    error_pending_ |= esr_receive_illegal;
    return;
  }
  assign(regs_, reg_irr, vector, true);
  assign(regs_, reg_tmr, vector, false);
}

bool Lapic::fire_lvt(unsigned reg) noexcept {
  const uint32_t lvt = regs_[reg];
  if ((lvt & lvt_masked) != 0 || port_ == nullptr ||
      (base_.load(std::memory_order_relaxed) & base_enable) == 0)
    return false;
  const auto mode = reg == reg_lvt_timer || reg == reg_lvt_error ? DeliveryMode::fixed
                                                                 : static_cast<DeliveryMode>((lvt >> 8) & 7);
  switch (mode) {
    case DeliveryMode::fixed: return request(static_cast<uint8_t>(lvt), (lvt & lvt_level) != 0);
    case DeliveryMode::nmi: port_->nmi(); return true;
    case DeliveryMode::smi: port_->smi(); return true;
    case DeliveryMode::init: port_->init(); return true;
    default: return false;  // ExtINT is a level that accepts_extint() passes on
  }
}

bool Lapic::deliver(const ApicMessage& message) noexcept {
  const std::lock_guard lock(mutex_);
  if (port_ == nullptr) return false;
  switch (message.mode) {
    case DeliveryMode::fixed:
    case DeliveryMode::lowest_priority: {
      const bool taken = request(message.vector, message.level);
      update();
      return taken;
    }
    case DeliveryMode::nmi: port_->nmi(); return true;
    case DeliveryMode::smi: port_->smi(); return true;
    case DeliveryMode::init: port_->init(); return true;
    case DeliveryMode::startup: port_->sipi(message.vector); return true;
    default: return false;
  }
}

void Lapic::unhalt() noexcept {
  const std::lock_guard lock(mutex_);
  if (port_ != nullptr) port_->unhalt();
}

void Lapic::offer_cmci(bool offered) noexcept {
  const std::lock_guard lock(mutex_);
  cmci_ = offered;
  regs_[reg_lvt_cmci] = lvt_masked;
}

bool Lapic::readable(unsigned reg, bool in_x2apic) const noexcept {
  return reg == reg_lvt_cmci ? cmci_ : reg_readable(reg, in_x2apic);
}

void Lapic::local_interrupt(Local source) noexcept {
  const std::lock_guard lock(mutex_);
  const auto reg = static_cast<unsigned>(source);
  fire_lvt(reg);
  if (source == Local::performance) regs_[reg] |= lvt_masked;
  update();
}

void Lapic::poke_extint() noexcept {
  const std::lock_guard lock(mutex_);
  if (port_ != nullptr && accepts_extint_.load(std::memory_order_relaxed)) port_->interrupt_changed();
}

void Lapic::pit_tick() noexcept {
  const std::lock_guard lock(mutex_);
  if (static_cast<DeliveryMode>((regs_[reg_lvt_lint0] >> 8) & 7) == DeliveryMode::nmi)
    fire_lvt(reg_lvt_lint0);
}

bool Lapic::in_flight(uint8_t vector) noexcept {
  const std::lock_guard lock(mutex_);
  return test(regs_, reg_irr, vector) || test(regs_, reg_isr, vector);
}

void Lapic::detach() noexcept {
  const std::lock_guard lock(mutex_);
  port_ = nullptr;
  detached_.store(true, std::memory_order_relaxed);
  stop_timer();
}

// --- The vCPU takes interrupts ---

bool Lapic::maybe_pending() const noexcept {
  if (own_vector_.load(std::memory_order_relaxed) >= 0) return true;
  return accepts_extint() && (injected_extint() >= 0 || fabric_.extint_asserted());
}

int Lapic::pending_vector() noexcept {
  if (accepts_extint()) {
    const int injected = injected_extint();
    if (injected >= 0) return injected;
    if (fabric_.extint_asserted()) return fabric_.extint_peek();
  }
  return own_vector_.load(std::memory_order_acquire);
}

int Lapic::acknowledge() noexcept {
  if (accepts_extint()) {
    const int injected = injected_.exchange(-1, std::memory_order_acq_rel);
    if (injected >= 0) return injected;
    const int external = fabric_.extint_asserted() ? fabric_.extint_acknowledge() : -1;
    if (external >= 0) return external;
  }
  const std::lock_guard lock(mutex_);
  const int vector = own_vector_.load(std::memory_order_relaxed);
  if (vector < 0) return -1;
  assign(regs_, reg_irr, static_cast<unsigned>(vector), false);
  assign(regs_, reg_isr, static_cast<unsigned>(vector), true);
  update();
  return vector;
}

bool Lapic::inject_extint(uint8_t vector) noexcept {
  int none = -1;
  if (!injected_.compare_exchange_strong(none, vector, std::memory_order_acq_rel)) return false;
  poke_extint();
  return true;
}

void Lapic::set_cr8(uint8_t value) noexcept {
  const std::lock_guard lock(mutex_);
  regs_[reg_tpr] = static_cast<uint32_t>(value & 0xf) << 4;
  update();
}

void Lapic::end_of_interrupt(Effects& effects) noexcept {
  const int vector = highest(regs_, reg_isr);
  if (vector < 0) return;
  assign(regs_, reg_isr, static_cast<unsigned>(vector), false);
  effects.eoi = vector;
  effects.broadcast =
      test(regs_, reg_tmr, static_cast<unsigned>(vector)) && (regs_[reg_svr] & svr_no_broadcast) == 0;
}

bool Lapic::defer_eoi() noexcept {
  const std::lock_guard lock(mutex_);
  const int vector = highest(regs_, reg_isr);
  if (vector < 0 || highest(regs_, reg_irr) >= 0) return false;
  const auto in_service = std::span(regs_).subspan(reg_isr, 8);
  const auto bits = [](int sum, uint32_t word) { return sum + std::popcount(word); };
  if (std::accumulate(in_service.begin(), in_service.end(), 0, bits) != 1) return false;
  // A level must be re-evaluated when it ends, and listeners want to know when.
  if (test(regs_, reg_tmr, static_cast<unsigned>(vector)) ||
      fabric_.watches_eoi(static_cast<uint8_t>(vector)))
    return false;
  eoi_deferred_ = true;
  return true;
}

void Lapic::settle_eoi(bool completed) noexcept {
  Effects effects;
  {
    const std::lock_guard lock(mutex_);
    if (!std::exchange(eoi_deferred_, false) || !completed) return;
    end_of_interrupt(effects);
    update();
  }
  finish(effects);
}

// --- Registers ---

uint32_t Lapic::read_register(unsigned reg) noexcept {
  switch (reg) {
    case reg_id: return x2apic() ? id_ : regs_[reg_id];
    case reg_version:  // 6 LVT entries, or 7
      return 0x14 | (cmci_ ? 6u : 5u) << 16 | (options_.eoi_suppression ? 1u << 24 : 0);
    case reg_ppr: return ppr();
    case reg_current_count: return current_count();
    case reg_eoi:
    case reg_apr: return 0;
    default: return regs_[reg];
  }
}

void Lapic::write_icr(Effects& effects) noexcept {
  const uint32_t icr = regs_[reg_icr];
  ApicMessage& message = effects.message;
  message.vector = static_cast<uint8_t>(icr);
  message.mode = static_cast<DeliveryMode>((icr >> 8) & 7);
  message.logical = (icr & icr_logical) != 0;
  message.from_ipi = true;
  message.from_x2apic = x2apic();
  message.destination = message.from_x2apic ? regs_[reg_icr_high] : regs_[reg_icr_high] >> 24;
  effects.shorthand = (icr >> 18) & 3;
  switch (message.mode) {
    case DeliveryMode::fixed:
    case DeliveryMode::lowest_priority:
      effects.ipi = message.vector >= 16;
      if (!effects.ipi) error(esr_send_illegal);
      break;
    case DeliveryMode::init:
      // INIT level de-assert only synchronized arbitration IDs, on processors that had any (11.6.1).
      effects.ipi = (icr & icr_level) == 0 || (icr & icr_assert) != 0;
      break;
    case DeliveryMode::smi:
    case DeliveryMode::nmi:
    case DeliveryMode::startup: effects.ipi = true; break;
    default: break;
  }
}

void Lapic::write_svr(uint32_t value) noexcept {
  regs_[reg_svr] = value & (0x3ff | (options_.eoi_suppression ? svr_no_broadcast : 0));
  if ((regs_[reg_svr] & svr_enable) != 0) return;
  for (unsigned reg = reg_lvt_timer; reg <= reg_lvt_error; ++reg) regs_[reg] |= lvt_masked;
  regs_[reg_lvt_cmci] |= lvt_masked;
}

void Lapic::write_lvt(unsigned reg, uint32_t value) noexcept {
  value &= lvt_writable(reg);
  if ((regs_[reg_svr] & svr_enable) == 0) value |= lvt_masked;
  const unsigned old_mode = timer_mode();
  regs_[reg] = value;
  if (reg != reg_lvt_timer || timer_mode() == old_mode) return;
  // Between the TSC-deadline mode and the counting ones nothing carries over (11.5.4.1).
  if (old_mode == tsc_deadline_mode || timer_mode() == tsc_deadline_mode) {
    stop_timer();
    regs_[reg_initial_count] = 0;
  } else {
    const uint32_t left = current_count();
    if (left != 0) start_timer(left);
  }
}

void Lapic::write_register(unsigned reg, uint32_t value, Effects& effects) noexcept {
  switch (reg) {
    case reg_id:
    case reg_ldr:
      regs_[reg] = value & 0xff000000;
      publish_ids();
      break;
    case reg_dfr:
      regs_[reg] = value | 0x0fffffff;
      publish_ids();
      break;
    case reg_tpr: regs_[reg] = value & 0xff; break;
    case reg_eoi: end_of_interrupt(effects); break;
    case reg_svr: write_svr(value); break;
    case reg_esr: regs_[reg] = std::exchange(error_pending_, 0); break;
    case reg_icr:
      regs_[reg] = value & ~icr_busy;  // the reserved bits read as written
      write_icr(effects);
      break;
    case reg_icr_high: regs_[reg] = value & 0xff000000; break;
    case reg_self_ipi:
      effects.ipi = true;
      effects.shorthand = static_cast<unsigned>(ApicFabric::Shorthand::self_only);
      effects.message.vector = static_cast<uint8_t>(value);
      effects.message.from_ipi = true;
      effects.message.from_x2apic = true;
      if (effects.message.vector < 16) {
        effects.ipi = false;
        error(esr_send_illegal);
      }
      break;
    case reg_initial_count:
      if (timer_mode() == tsc_deadline_mode) break;  // ignored there (11.5.4.1)
      regs_[reg] = value;
      start_timer(value);
      break;
    case reg_divide: {
      const uint32_t left = current_count();
      regs_[reg] = value & 0xb;
      if (left != 0) start_timer(left);
      break;
    }
    default: write_lvt(reg, value); break;  // writable() leaves the LVT entries
  }
  update();
}

void Lapic::finish(const Effects& effects) noexcept {
  if (effects.eoi >= 0 &&
      fabric_.end_of_interrupt(*this, static_cast<uint8_t>(effects.eoi), effects.broadcast))
    eoi_exit_.store(effects.eoi, std::memory_order_relaxed);
  if (!effects.ipi) return;
  if (effects.shorthand == 0)
    fabric_.send_ipi(effects.message);
  else
    fabric_.send_ipi(effects.message, *this, static_cast<ApicFabric::Shorthand>(effects.shorthand));
}

uint32_t Lapic::mmio_read(uint32_t offset) noexcept {
  const std::lock_guard lock(mutex_);
  const unsigned reg = (offset >> 4) & 0x3f;
  if (x2apic() || offset > 0xfff) return 0xffffffff;
  if (offset < 0x400 && readable(reg, false)) return read_register(reg);
  error(esr_illegal_register);
  update();
  return 0;
}

void Lapic::mmio_write(uint32_t offset, uint32_t value) noexcept {
  Effects effects;
  {
    const std::lock_guard lock(mutex_);
    if (x2apic() || offset > 0xfff) return;
    const unsigned reg = (offset >> 4) & 0x3f;
    if (offset < 0x400 && (writable(reg, false) || (cmci_ && reg == reg_lvt_cmci))) {
      write_register(reg, value, effects);
    } else if (offset >= 0x400 || !readable(reg, false)) {  // read-only registers ignore writes silently
      error(esr_illegal_register);
      update();
    }
  }
  finish(effects);
}

void Lapic::mmio(uint32_t offset, bool write, void* data, unsigned size) noexcept {
  if (write) {
    if (size != 4 || (offset & 15) != 0) return;
    uint32_t value = 0;
    std::memcpy(&value, data, sizeof value);
    mmio_write(offset, value);
    return;
  }
  auto* bytes = static_cast<uint8_t*>(data);
  std::memset(bytes, 0, size);
  const uint32_t value = mmio_read(offset);
  // Each register owns 4 bytes out of 16; the rest reads as zero.
  for (unsigned i = 0; i < size && (offset & 15) + i < 4; ++i)
    bytes[i] = static_cast<uint8_t>(value >> (((offset & 3) + i) * 8));
}

bool Lapic::msr_read(uint32_t index, uint64_t& value) noexcept {
  const std::lock_guard lock(mutex_);
  const unsigned reg = index - 0x800;
  if (!x2apic() || reg >= regs_.size() || !readable(reg, true)) return false;
  value = read_register(reg);
  if (reg == reg_icr) value |= static_cast<uint64_t>(regs_[reg_icr_high]) << 32;
  return true;
}

bool Lapic::msr_write(uint32_t index, uint64_t value) noexcept {
  Effects effects;
  {
    const std::lock_guard lock(mutex_);
    const unsigned reg = index - 0x800;
    if (!x2apic() || reg >= regs_.size() || !(writable(reg, true) || (cmci_ && reg == reg_lvt_cmci)))
      return false;
    if (reg == reg_icr) {
      if ((value & 0xfff32000) != 0) return false;
      regs_[reg_icr_high] = static_cast<uint32_t>(value >> 32);
    } else if (value >> 32 != 0) {
      return false;
    }
    // Reserved values fault (11.12.1.2): only 0 may be written to EOI and ESR, 8 bits to TPR and SELF IPI.
    if ((reg == reg_eoi || reg == reg_esr) && value != 0) return false;
    if ((reg == reg_tpr || reg == reg_self_ipi) && value > 0xff) return false;
    write_register(reg, static_cast<uint32_t>(value), effects);
  }
  finish(effects);
  return true;
}

}  // namespace lodge::kvm::soft
