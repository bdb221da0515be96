// What KVM offers to guests that know that they are guests (kernel Documentation/virt/kvm/x86/hypercalls.rst
// and msr.rst), as far as it is a vCPU's affair: hypercalls, paravirtual EOI, and telling whether the vCPU is
// in the guest. kvmclock and the steal time's area are cpu/.
#include <linux/kvm_para.h>
#include <sched.h>

#include <utility>

#include "kvm/soft/cpu/cpuid_bits.hpp"
#include "kvm/soft/irqchip/lapic.hpp"
#include "kvm/soft/vcpu.hpp"
#include "kvm/soft/vm.hpp"

namespace lodge::kvm::soft {
namespace {

constexpr uint64_t pv_eoi_enabled = 1;

constexpr uint64_t error(int number) {
  return static_cast<uint64_t>(-number);
}

}  // namespace

void SoftVcpu::enter_guest() noexcept {
  in_guest_.store(true);
  acknowledge_memory();  // what comes before service() sees today's slots
  if (cpu_.msr.kvm_steal_time == 0) return;
  steal_.enter();
  steal_.update();
}

void SoftVcpu::leave_guest() noexcept {
  settle_pv_eoi();
  // Not in the middle of an instruction whose access the VMM carries out: it was translated already, so a TLB
  // flush must wait for it.
  if (!mmio_asked_ && port_io_ != PortIo::asked) steal_.leave();
  steal_.left();
  in_guest_.store(false);
}

void SoftVcpu::offer_pv_eoi() noexcept {
  if ((cpu_.msr.kvm_pv_eoi & pv_eoi_enabled) == 0 || lapic_ == nullptr || !lapic_->defer_eoi()) return;
  constexpr uint8_t skip = 1;
  pv_eoi_offered_ = cpu_.paravirt_memory->write(cpu_.msr.kvm_pv_eoi & ~pv_eoi_enabled, &skip, sizeof skip);
  if (!pv_eoi_offered_) lapic_->settle_eoi(false);
}

void SoftVcpu::settle_pv_eoi() noexcept {
  if (!std::exchange(pv_eoi_offered_, false)) return;
  const uint64_t gpa = cpu_.msr.kvm_pv_eoi & ~pv_eoi_enabled;
  uint8_t word = 0;
  cpu_.paravirt_memory->read(gpa, &word, sizeof word);
  const bool completed = (word & 1) == 0;
  if (!completed) {
    word &= 0xfe;
    cpu_.paravirt_memory->write(gpa, &word, sizeof word);
  }
  lapic_->settle_eoi(completed);
}

uint64_t SoftVcpu::hypercall(uint64_t number, const uint64_t (&arguments)[4]) noexcept {
  events_.count(hypercalls);
  const auto offered = [&](uint32_t feature) {
    return lapic_ != nullptr && (cpu_.features.kvm_features & feature) != 0;
  };
  switch (number) {
    case KVM_HC_VAPIC_POLL_IRQ: return 0;  // interrupts are looked at between blocks anyway
    case KVM_HC_KICK_CPU:
      if (!offered(kvm_feature::pv_unhalt)) break;
      vm_.interrupts().unhalt(static_cast<uint32_t>(arguments[1]));
      return 0;
    case KVM_HC_SEND_IPI: {
      if (!offered(kvm_feature::pv_send_ipi)) break;
      // Two words of the caller's width, one after the other.
      const bool wide = cpu_.mode() == Mode::bits64;
      const uint64_t targets[2] = {wide ? arguments[0] : arguments[0] | arguments[1] << 32,
                                   wide ? arguments[1] : 0};
      return static_cast<uint64_t>(
          int64_t{vm_.interrupts().send_ipis(targets, static_cast<uint32_t>(arguments[2]), arguments[3])});
    }
    case KVM_HC_SCHED_YIELD:
      if (!offered(kvm_feature::pv_sched_yield)) break;
      // Linux has no way to yield to a certain thread of user space.
      if (vm_.interrupts().has_lapic(static_cast<uint32_t>(arguments[0]))) ::sched_yield();
      return 0;
    default: break;
  }
  return error(KVM_ENOSYS);
}

}  // namespace lodge::kvm::soft
