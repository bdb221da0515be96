// Assembles the chips and carries interrupts between them, as KVM does (kernel
// Documentation/virt/kvm/api.rst).
//
// Lock order: Irqfds, then (each released before the next is taken, unless indented) PIT; PIC; IOAPIC >
// LAPIC. No chip calls another one with a lock held, save the IOAPIC, which delivers to LAPICs.
#include "kvm/soft/irqchip/irqchip.hpp"

#include <algorithm>
#include <cerrno>
#include <utility>

#include "base/error.hpp"

namespace lodge::kvm::soft {

Irqchip::Irqchip(Clock& clock) : clock_(clock), routing_(std::make_shared<GsiRouting>()), irqfds_(*this) {}

Irqchip::~Irqchip() {
  // Timers may still fire while the chips go: with its port gone a LAPIC does nothing then.
  for (const auto& lapic : owned_) lapic->detach();
}

// --- Set-up ---

void Irqchip::create_full() {
  const std::lock_guard lock(setup_);
  if (mode() != Mode::none) throw_errno(EEXIST, "the VM has an irqchip already");
  auto routing = std::make_shared<const GsiRouting>(GsiRouting::standard());
  pic_ = std::make_unique<Pic>(static_cast<Pic::Client&>(*this));
  ioapic_ = std::make_unique<Ioapic>(static_cast<Ioapic::Client&>(*this));
  {
    const std::lock_guard routing_lock(routing_mutex_);
    routing_ = std::move(routing);
  }
  mode_.store(Mode::full, std::memory_order_release);
}

void Irqchip::create_split(uint64_t pins) {
  const std::lock_guard lock(setup_);
  if (pins > GsiRouting::max_gsis) throw_errno(EINVAL, "too many IOAPIC pins for a split irqchip");
  if (mode() != Mode::none) throw_errno(EEXIST, "the VM has an irqchip already");
  split_pins_ = static_cast<unsigned>(pins);
  mode_.store(Mode::split, std::memory_order_release);
}

void Irqchip::create_pit(const kvm_pit_config& config) {
  const std::lock_guard lock(setup_);
  if (pit_) throw_errno(EEXIST, "the VM has a PIT already");
  if (mode() != Mode::full) throw_errno(ENOENT, "the PIT needs the full irqchip");
  if ((config.flags & ~static_cast<uint32_t>(KVM_PIT_SPEAKER_DUMMY)) != 0)
    throw_errno(EINVAL, "unknown PIT flags");
  pit_ = std::make_unique<Pit>(static_cast<Pit::Client&>(*this), clock_,
                               (config.flags & KVM_PIT_SPEAKER_DUMMY) != 0);
  pit_published_.store(pit_.get(), std::memory_order_release);
}

void Irqchip::set_reinject(const kvm_reinject_control& control) {
  Pit* pit = pit_published_.load(std::memory_order_acquire);
  if (pit == nullptr) throw_errno(ENXIO, "the VM has no PIT");
  pit->set_reinject(control.pit_reinject != 0);
}

void Irqchip::set_x2apic_api(uint64_t flags) {
  if ((flags & ~(KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK)) != 0)
    throw_errno(EINVAL, "unknown flags of KVM_CAP_X2APIC_API");
  x2apic_api_.fetch_or(flags);
}

void Irqchip::set_bus_period(uint64_t nanoseconds) {
  const std::lock_guard lock(setup_);
  if (mode() == Mode::none) throw_errno(ENXIO, "the VM has no LAPICs");
  constexpr uint64_t longest_count = uint64_t{UINT32_MAX} * 128;
  if (nanoseconds == 0 || nanoseconds > UINT64_MAX / longest_count || lapic_count_.load() != 0)
    throw_errno(EINVAL, "the LAPIC timers' period is out of range, or comes after a vCPU");
  bus_period_ns_ = nanoseconds;
}

Lapic& Irqchip::add_vcpu(uint32_t id, VcpuPort& port) {
  const std::lock_guard lock(setup_);
  if (mode() == Mode::none) throw_errno(ENXIO, "the VM has no irqchip");
  const unsigned count = lapic_count_.load(std::memory_order_relaxed);
  if (count == max_vcpus) throw_errno(EINVAL, "too many vCPUs");
  for (const auto& lapic : owned_)
    if (lapic->id() == id && !lapic->detached()) throw_errno(EEXIST, "the vCPU exists already");
  owned_.push_back(std::make_unique<Lapic>(id, port, *this, clock_,
                                           Lapic::Options{.eoi_suppression = mode() == Mode::split,
                                                          .boot = id == boot_id_,
                                                          .bus_period_ns = bus_period_ns_}));
  lapics_[count].store(owned_.back().get(), std::memory_order_relaxed);
  lapic_count_.store(count + 1, std::memory_order_release);
  return *owned_.back();
}

// --- Guest accesses ---

bool Irqchip::handles_port(uint16_t port) const noexcept {
  if (mode() != Mode::full) return false;
  const Pit* pit = pit_published_.load(std::memory_order_acquire);
  return Pic::handles_port(port) || (pit != nullptr && pit->handles_port(port));
}

// The chips are 8 bits wide: a wider access is one to each of the following ports, as on the ISA bus.
void Irqchip::port_read(uint16_t port, void* data, unsigned size) noexcept {
  auto* bytes = static_cast<uint8_t*>(data);
  for (unsigned i = 0; i < size; ++i) {
    const auto at = static_cast<uint16_t>(port + i);
    if (!handles_port(at))
      bytes[i] = 0xff;
    else
      bytes[i] = Pic::handles_port(at) ? pic_->read(at) : pit_->read(at);
  }
}

void Irqchip::port_write(uint16_t port, const void* data, unsigned size) noexcept {
  const auto* bytes = static_cast<const uint8_t*>(data);
  for (unsigned i = 0; i < size; ++i) {
    const auto at = static_cast<uint16_t>(port + i);
    if (!handles_port(at)) continue;
    if (Pic::handles_port(at))
      pic_->write(at, bytes[i]);
    else
      pit_->write(at, bytes[i]);
  }
}

void Irqchip::mmio_read(uint64_t gpa, void* data, unsigned size) noexcept {
  if (handles_gpa(gpa)) ioapic_->read(static_cast<uint32_t>(gpa - Ioapic::default_base), data, size);
}

void Irqchip::mmio_write(uint64_t gpa, const void* data, unsigned size) noexcept {
  if (handles_gpa(gpa)) ioapic_->write(static_cast<uint32_t>(gpa - Ioapic::default_base), data, size);
}

// --- Delivery to LAPICs ---

int Irqchip::deliver(const ApicMessage& message) noexcept {
  const bool quirk =
      (x2apic_api_.load(std::memory_order_relaxed) & KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK) == 0;
  const auto targets = lapics();
  if (message.mode == DeliveryMode::lowest_priority) {
    // One of those that match, chosen by the vector: a vector stays on its vCPU, different vectors spread.
    unsigned count = 0;
    const auto takes = [&](const Lapic& lapic) {
      return lapic.present() && lapic.software_enabled() && lapic.matches(message, quirk);
    };
    for (const auto& target : targets) count += takes(*target.load(std::memory_order_relaxed)) ? 1 : 0;
    if (count == 0) return 0;
    unsigned skip = message.vector % count;
    for (const auto& target : targets) {
      Lapic& lapic = *target.load(std::memory_order_relaxed);
      if (takes(lapic) && skip-- == 0) return lapic.deliver(message) ? 1 : 0;
    }
    return 0;  // it was switched off meanwhile
  }
  int taken = 0;
  for (const auto& target : targets) {
    Lapic& lapic = *target.load(std::memory_order_relaxed);
    if (lapic.present() && lapic.matches(message, quirk) && lapic.deliver(message)) ++taken;
  }
  return taken;
}

void Irqchip::send_ipi(const ApicMessage& message) noexcept {
  deliver(message);
}

void Irqchip::send_ipi(const ApicMessage& message, Lapic& source, Shorthand shorthand) noexcept {
  if (shorthand == Shorthand::self_only) {
    source.deliver(message);
    return;
  }
  for (const auto& target : lapics()) {
    Lapic& lapic = *target.load(std::memory_order_relaxed);
    if (!lapic.present() || (&lapic == &source && shorthand == Shorthand::others)) continue;
    lapic.deliver(message);
  }
}

int Irqchip::send_ipis(std::span<const uint64_t> targets, uint64_t first, uint64_t icr) noexcept {
  constexpr uint64_t logical = 0x800, shorthand = 0xc0000, level = 0x8000, assert = 0x4000;
  if ((icr & (logical | shorthand)) != 0) return -EINVAL;
  ApicMessage message;
  message.vector = static_cast<uint8_t>(icr);
  message.mode = static_cast<DeliveryMode>(icr >> 8 & 7);
  // INIT level de-assert only synchronized arbitration IDs (SDM 11.6.1).
  if (message.mode == DeliveryMode::init && (icr & (level | assert)) == level) return 0;
  message.from_ipi = true;
  int taken = 0;
  for (const auto& target : lapics()) {
    Lapic& lapic = *target.load(std::memory_order_relaxed);
    const uint64_t bit = uint64_t{lapic.physical_id()} - first;
    if (bit >= targets.size() * 64 || (targets[bit / 64] >> bit % 64 & 1) == 0) continue;
    if (lapic.present() && lapic.deliver(message)) ++taken;
  }
  return taken;
}

void Irqchip::unhalt(uint32_t apic_id) noexcept {
  for (const auto& target : lapics()) {
    Lapic& lapic = *target.load(std::memory_order_relaxed);
    if (lapic.present() && lapic.physical_id() == apic_id) lapic.unhalt();
  }
}

bool Irqchip::has_lapic(uint32_t apic_id) const noexcept {
  return std::ranges::any_of(lapics(), [&](const auto& target) {
    const Lapic& lapic = *target.load(std::memory_order_relaxed);
    return lapic.present() && lapic.physical_id() == apic_id;
  });
}

bool Irqchip::end_of_interrupt(Lapic& /*source*/, uint8_t vector, bool broadcast) noexcept {
  if (mode() == Mode::full) ioapic_->end_of_interrupt(vector, broadcast);
  return broadcast && mode() == Mode::split && eoi_needs_exit(vector);
}

bool Irqchip::eoi_needs_exit(uint8_t vector) noexcept {
  return routing()->level_msi(vector, split_pins_);
}

// --- Lines ---

std::shared_ptr<const GsiRouting> Irqchip::routing() noexcept {
  const std::lock_guard lock(routing_mutex_);
  return routing_;
}

int Irqchip::set_irq(uint32_t gsi, unsigned source, bool level) noexcept {
  const auto table = routing();
  int result = -1;
  for (const GsiRouting::Route& route : table->routes(gsi)) {
    int one = -1;
    switch (route.kind) {
      case GsiRouting::Route::Kind::pic: one = pic_->set_irq(route.pin, source, level); break;
      case GsiRouting::Route::Kind::ioapic: one = ioapic_->set_irq(route.pin, source, level); break;
      case GsiRouting::Route::Kind::msi:
        if (level) one = deliver(decode_msi(route.address_lo, route.address_hi, route.data, x2apic_ids()));
        break;
    }
    if (one >= 0) result = (result < 0 ? 0 : result) + one;
  }
  return result;
}

int Irqchip::irq_line(uint32_t gsi, bool level) noexcept {
  return mode() == Mode::none ? -ENXIO : set_irq(gsi, Irqfds::source_user, level);
}

int Irqchip::signal_msi(const kvm_msi& msi) noexcept {
  if (mode() == Mode::none || msi.flags != 0) return -EINVAL;
  if (x2apic_ids() && (msi.address_hi & 0xff) != 0) return -EINVAL;
  return deliver(decode_msi(msi.address_lo, msi.address_hi, msi.data, x2apic_ids()));
}

void Irqchip::set_gsi_routing(std::span<const kvm_irq_routing_entry> entries) {
  if (mode() == Mode::none) throw_errno(EINVAL, "GSI routing needs an irqchip");
  auto table = std::make_shared<const GsiRouting>(entries, mode() == Mode::full, x2apic_ids());
  const std::lock_guard lock(routing_mutex_);
  routing_.swap(table);
}

void Irqchip::irqfd(const kvm_irqfd& request) {
  const bool resample = (request.flags & KVM_IRQFD_FLAG_RESAMPLE) != 0;
  if (mode() == Mode::none || (resample && mode() != Mode::full))
    throw_errno(EINVAL, "this irqfd needs an in-accelerator irqchip");
  irqfds_.set(request);
}

void Irqchip::pic_output() noexcept {
  for (const auto& lapic : lapics()) lapic.load(std::memory_order_relaxed)->poke_extint();
}

void Irqchip::acked(int gsi) noexcept {
  if (gsi < 0) return;
  if (Pit* pit = pit_published_.load(std::memory_order_acquire); pit != nullptr && gsi == 0)
    pit->acknowledged();
  irqfds_.acked(static_cast<uint32_t>(gsi));
}

void Irqchip::pic_acked(unsigned irq) noexcept {
  acked(routing()->gsi_of_pic(irq));
}
void Irqchip::ioapic_acked(unsigned pin) noexcept {
  acked(routing()->gsi_of_ioapic(pin));
}

int Irqchip::pit_interrupt() noexcept {
  const int result = set_irq(0, source_pit, true);
  set_irq(0, source_pit, false);
  // LINT0 in NMI mode: the 8254 as a watchdog, wired through the 8259.
  for (const auto& lapic : lapics()) lapic.load(std::memory_order_relaxed)->pit_tick();
  return result;
}

// --- State ---

kvm_irqchip Irqchip::chip(uint32_t chip_id) {
  if (mode() != Mode::full) throw_errno(ENXIO, "the VM has no full irqchip");
  kvm_irqchip chip{};
  chip.chip_id = chip_id;
  switch (chip_id) {
    case KVM_IRQCHIP_PIC_MASTER:
    case KVM_IRQCHIP_PIC_SLAVE: chip.chip.pic = pic_->state(chip_id); break;
    case KVM_IRQCHIP_IOAPIC: chip.chip.ioapic = ioapic_->state(); break;
    default: throw_errno(EINVAL, "unknown irqchip number");
  }
  return chip;
}

void Irqchip::set_chip(const kvm_irqchip& chip) {
  if (mode() != Mode::full) throw_errno(ENXIO, "the VM has no full irqchip");
  switch (chip.chip_id) {
    case KVM_IRQCHIP_PIC_MASTER:
    case KVM_IRQCHIP_PIC_SLAVE: pic_->set_state(chip.chip_id, chip.chip.pic); break;
    case KVM_IRQCHIP_IOAPIC: ioapic_->set_state(chip.chip.ioapic); break;
    default: throw_errno(EINVAL, "unknown irqchip number");
  }
}

kvm_pit_state2 Irqchip::pit2() {
  if (!pit_) throw_errno(ENXIO, "the VM has no PIT");
  return pit_->state();
}

void Irqchip::set_pit2(const kvm_pit_state2& state) {
  if (!pit_) throw_errno(ENXIO, "the VM has no PIT");
  pit_->set_state(state);
}

}  // namespace lodge::kvm::soft
