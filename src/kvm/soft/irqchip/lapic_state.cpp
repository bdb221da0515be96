// The local APIC's modes (IA32_APIC_BASE, SDM vol. 3, 11.4.3 and 11.12.5), resets (11.4.7) and the exchange
// of its state as KVM's register page (KVM_GET_LAPIC, KVM_SET_LAPIC).
#include <algorithm>
#include <cstring>

#include "kvm/soft/irqchip/lapic.hpp"
#include "kvm/soft/irqchip/lapic_registers.hpp"

namespace lodge::kvm::soft {

using namespace apic;

namespace {

constexpr uint64_t modes = Lapic::base_enable | Lapic::base_x2apic;

}  // namespace

uint64_t Lapic::reserved_base(bool x2apic, unsigned physical_bits) noexcept {
  const unsigned bits = std::clamp(physical_bits, 32u, 52u);
  return ~((uint64_t{1} << bits) - 1) | 0x2ff | (x2apic ? 0 : base_x2apic);
}

bool Lapic::valid_base(uint64_t old, uint64_t value, uint64_t reserved, bool host) noexcept {
  if ((value & reserved) != 0 || (value & modes) == base_x2apic) return false;
  if (host) return true;
  // Figure 11-27: x2APIC is entered from xAPIC only and left through "disabled" only.
  if ((old & modes) == modes && (value & modes) == base_enable) return false;
  return (old & modes) != 0 || (value & modes) != modes;
}

bool Lapic::set_apic_base(uint64_t value, bool host) noexcept {
  const std::lock_guard lock(mutex_);
  const uint64_t old = base_.load(std::memory_order_relaxed);
  if (!valid_base(old, value, base_reserved_, host)) return false;
  base_.store(value, std::memory_order_relaxed);
  if (!host && (old & base_enable) != 0 && (value & base_enable) == 0) reset_registers();
  if ((value & modes) == modes && (old & modes) != modes && !host) regs_[reg_icr_high] = 0;
  publish_ids();
  update();
  return true;
}

void Lapic::reset_registers() noexcept {
  stop_timer();
  regs_.fill(0);
  error_pending_ = 0;
  eoi_deferred_ = false;
  regs_[reg_id] = id_ << 24;
  regs_[reg_dfr] = 0xffffffff;
  regs_[reg_svr] = 0xff;
  for (unsigned reg = reg_lvt_timer; reg <= reg_lvt_error; ++reg) regs_[reg] = lvt_masked;
  regs_[reg_lvt_cmci] = lvt_masked;
}

void Lapic::reset() noexcept {
  const std::lock_guard lock(mutex_);
  base_.store(default_base | base_enable | (options_.boot ? base_bsp : 0), std::memory_order_relaxed);
  reset_registers();
  injected_.store(-1, std::memory_order_relaxed);
  eoi_exit_.store(-1, std::memory_order_relaxed);
  if (options_.boot) regs_[reg_lvt_lint0] = static_cast<uint32_t>(DeliveryMode::extint) << 8;
  publish_ids();
  update();
}

void Lapic::init_reset() noexcept {
  const std::lock_guard lock(mutex_);
  const uint32_t id = regs_[reg_id];
  reset_registers();
  regs_[reg_id] = id;
  injected_.store(-1, std::memory_order_relaxed);
  if (options_.boot) regs_[reg_lvt_lint0] = static_cast<uint32_t>(DeliveryMode::extint) << 8;
  publish_ids();
  update();
}

kvm_lapic_state Lapic::state(bool x2apic_ids) noexcept {
  const std::lock_guard lock(mutex_);
  check_timer();  // the timer of a vCPU that does not run may be due
  kvm_lapic_state page{};
  for (unsigned reg = 0; reg < regs_.size(); ++reg) {
    uint32_t value = readable(reg, false) ? read_register(reg) : 0;
    if (reg == reg_id && x2apic() && !x2apic_ids) value = id_ << 24;
    std::memcpy(page.regs + reg * 16, &value, sizeof value);
  }
  return page;
}

bool Lapic::set_state(const kvm_lapic_state& page, bool x2apic_ids) noexcept {
  const std::lock_guard lock(mutex_);
  Registers in{};
  for (unsigned reg = 0; reg < in.size(); ++reg) std::memcpy(&in[reg], page.regs + reg * 16, sizeof in[reg]);
  if (x2apic() && x2apic_ids && in[reg_id] != id_) return false;
  reset_registers();
  if (!x2apic()) regs_[reg_id] = in[reg_id] & 0xff000000;
  regs_[reg_tpr] = in[reg_tpr] & 0xff;
  regs_[reg_ldr] = in[reg_ldr] & 0xff000000;
  regs_[reg_dfr] = in[reg_dfr] | 0x0fffffff;
  // LVT entries first: a disabled LAPIC's stay as they were saved.
  for (unsigned reg = reg_lvt_timer; reg <= reg_lvt_error; ++reg) regs_[reg] = in[reg] & lvt_writable(reg);
  if (cmci_) regs_[reg_lvt_cmci] = in[reg_lvt_cmci] & lvt_writable(reg_lvt_cmci);
  write_svr(in[reg_svr]);
  // As they are, vectors 0-15 included: those are never taken, their priority class being the lowest there
  // is.
  for (unsigned reg = reg_isr; reg < reg_irr + 8; ++reg) regs_[reg] = in[reg];
  regs_[reg_esr] = in[reg_esr] & 0xff;
  regs_[reg_icr] = in[reg_icr] & ~icr_busy;
  regs_[reg_icr_high] = x2apic() ? in[reg_icr_high] : in[reg_icr_high] & 0xff000000;
  regs_[reg_divide] = in[reg_divide] & 0xb;
  regs_[reg_initial_count] = in[reg_initial_count];
  if (timer_mode() != tsc_deadline_mode && in[reg_current_count] != 0)
    start_timer(std::min(in[reg_current_count], in[reg_initial_count]));
  publish_ids();
  update();
  return true;
}

}  // namespace lodge::kvm::soft
