// The vCPU's state in the contract's types. What only the Cpu holds is cpu/exchange.hpp; here is what the
// vCPU adds.
#include <linux/kvm_para.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>

#include "base/error.hpp"
#include "kvm/soft/cpu/cpuid.hpp"
#include "kvm/soft/cpu/cpuid_bits.hpp"
#include "kvm/soft/cpu/exchange.hpp"
#include "kvm/soft/interpret/vector/exchange.hpp"
#include "kvm/soft/irqchip/lapic.hpp"
#include "kvm/soft/vcpu.hpp"
#include "kvm/soft/vm.hpp"

namespace lodge::kvm::soft {
namespace {

void check(int error, const char* what) {
  if (error != 0) throw_errno(error, what);
}

// Leaves with bits that are not the VMM's alone.
bool follows_state(uint32_t leaf) noexcept {
  return leaf == 1 || leaf == 7 || leaf == 0xd || leaf == 0x8000'0001;
}

bool same_entry(const kvm_cpuid_entry2& a, const kvm_cpuid_entry2& b) noexcept {
  return a.function == b.function && a.index == b.index && a.flags == b.flags && a.eax == b.eax &&
         a.ebx == b.ebx && a.ecx == b.ecx && a.edx == b.edx;
}

}  // namespace

kvm_regs SoftVcpu::regs() {
  return get_regs(cpu_);
}

void SoftVcpu::set_regs(const kvm_regs& regs) {
  soft::set_regs(cpu_, regs);
  cpu_.pending.valid = false;
}

kvm_sregs SoftVcpu::sregs() {
  kvm_sregs sregs = get_sregs(cpu_);
  if (external_ >= 0) sregs.interrupt_bitmap[external_ / 64] |= uint64_t{1} << external_ % 64;
  return sregs;
}

void SoftVcpu::set_sregs(const kvm_sregs& sregs) {
  acknowledge_memory();
  check(soft::set_sregs(cpu_, sregs), "KVM_SET_SREGS: the control registers contradict each other");
  for (int vector = 255; vector >= 0 && lapic_ == nullptr; --vector)
    if ((sregs.interrupt_bitmap[vector / 64] >> vector % 64 & 1) != 0) external_ = vector;
}

kvm_sregs2 SoftVcpu::sregs2() {
  return get_sregs2(cpu_);
}

void SoftVcpu::set_sregs2(const kvm_sregs2& sregs) {
  acknowledge_memory();
  check(soft::set_sregs2(cpu_, sregs), "KVM_SET_SREGS2: the control registers contradict each other");
}

kvm_fpu SoftVcpu::fpu() {
  kvm_fpu out{};
  get_fpu(cpu_.vector, out);
  return out;
}

void SoftVcpu::set_fpu(const kvm_fpu& fpu) {
  check(soft::set_fpu(cpu_.vector, fpu) ? 0 : EINVAL, "KVM_SET_FPU: MXCSR has reserved bits");
  cpu_.fp_control_changed();
}

kvm_xsave SoftVcpu::xsave() {
  kvm_xsave out{};
  get_xsave(cpu_.vector, {reinterpret_cast<uint8_t*>(out.region), sizeof out.region});
  return out;
}

void SoftVcpu::set_xsave(const kvm_xsave& xsave) {
  const std::span<const uint8_t> area{reinterpret_cast<const uint8_t*>(xsave.region), sizeof xsave.region};
  check(soft::set_xsave(cpu_.vector, area, supported_xcr0()) ? 0 : EINVAL,
        "KVM_SET_XSAVE: reserved bits, or components that this host does not have");
  cpu_.fp_control_changed();
}

int SoftVcpu::take_shared_registers() noexcept try {
  constexpr uint64_t known = KVM_SYNC_X86_VALID_FIELDS;
  if (((run_->kvm_dirty_regs | run_->kvm_valid_regs) & ~known) != 0) return -EINVAL;
  const kvm_sync_regs given = run_->s.regs;
  const uint64_t dirty = std::exchange(run_->kvm_dirty_regs, 0);
  if ((dirty & KVM_SYNC_X86_REGS) != 0) set_regs(given.regs);
  if ((dirty & KVM_SYNC_X86_SREGS) != 0) set_sregs(given.sregs);
  if ((dirty & KVM_SYNC_X86_EVENTS) != 0) set_vcpu_events(given.events);
  return 0;
} catch (...) {
  return -EINVAL;
}

void SoftVcpu::give_shared_registers() noexcept {
  kvm_sync_regs& out = run_->s.regs;
  const uint64_t wanted = run_->kvm_valid_regs;
  if ((wanted & KVM_SYNC_X86_REGS) != 0) out.regs = regs();
  if ((wanted & KVM_SYNC_X86_SREGS) != 0) out.sregs = sregs();
  if ((wanted & KVM_SYNC_X86_EVENTS) != 0) out.events = vcpu_events();
}

kvm_xcrs SoftVcpu::xcrs() {
  return get_xcrs(cpu_);
}
void SoftVcpu::set_xcrs(const kvm_xcrs& xcrs) {
  check(soft::set_xcrs(cpu_, xcrs), "KVM_SET_XCRS: the value is not allowed by the guest's CPUID");
  cpu_.state_changed();
}

kvm_debugregs SoftVcpu::debugregs() {
  return get_debugregs(cpu_);
}
void SoftVcpu::set_debugregs(const kvm_debugregs& debugregs) {
  check(soft::set_debugregs(cpu_, debugregs), "KVM_SET_DEBUGREGS: reserved bits");
}

unsigned SoftVcpu::msrs(std::span<kvm_msr_entry> entries) {
  return get_msrs(cpu_, entries);
}

unsigned SoftVcpu::set_msrs(std::span<const kvm_msr_entry> entries) {
  acknowledge_memory();
  return soft::set_msrs(cpu_, entries);
}

// As the guest sees them now: with the bits that follow CR4, XCR0 and the APIC.
std::vector<kvm_cpuid_entry2> SoftVcpu::present(const Features& features) {
  auto entries = features.entries();
  for (auto& entry : entries) {
    if (!follows_state(entry.function)) continue;
    const Features::Result now = cpuid(cpu_, features, entry.function, entry.index);
    entry.eax = now.eax, entry.ebx = now.ebx, entry.ecx = now.ecx, entry.edx = now.edx;
  }
  return entries;
}

std::vector<kvm_cpuid_entry2> SoftVcpu::cpuid2() {
  return present(cpu_.features);
}

void SoftVcpu::set_cpuid2(std::span<const kvm_cpuid_entry2> entries) {
  std::vector<kvm_cpuid_entry2> given(entries.begin(), entries.end());
  // Who never leaves the guest to halt cannot be woken by a hypercall.
  for (auto& entry : given)
    if (entry.function == KVM_CPUID_FEATURES && vm_.halt_in_guest()) entry.eax &= ~kvm_feature::pv_unhalt;
  Features features(given);
  if (has_run_) {
    if (!std::ranges::equal(present(features), cpuid2(), same_entry))
      throw_errno(EINVAL, "KVM_SET_CPUID2: the vCPU has run, its CPUID cannot change any more");
    return;
  }
  cpu_.features = std::move(features);
  decoder_.configure(cpu_.features);
  blocks_.clear();
  cpu_.flush_tlb(false);
  if (translator_) translator_->features_changed();
  constexpr uint32_t x2apic = 1u << 21;
  if (lapic_ != nullptr)
    lapic_->set_cpuid((cpu_.features.leaf1_ecx & x2apic) != 0, cpu_.features.physical_bits);
}

kvm_lapic_state SoftVcpu::lapic() {
  if (lapic_ == nullptr) throw_errno(EINVAL, "KVM_GET_LAPIC: the VM has no in-accelerator LAPIC");
  return lapic_->state(vm_.interrupts().x2apic_ids());
}

void SoftVcpu::set_lapic(const kvm_lapic_state& state) {
  if (lapic_ == nullptr) throw_errno(EINVAL, "KVM_SET_LAPIC: the VM has no in-accelerator LAPIC");
  check(lapic_->set_state(state, vm_.interrupts().x2apic_ids()) ? 0 : EINVAL,
        "KVM_SET_LAPIC: the APIC ID is not the vCPU's");
  post(request::interrupt);
}

kvm_vcpu_events SoftVcpu::vcpu_events() {
  kvm_vcpu_events events = get_events(cpu_);
  if (external_ >= 0) {
    events.interrupt.injected = 1;
    events.interrupt.nr = static_cast<uint8_t>(external_);
  }
  const bool nmi = nmi_pending_ || (cpu_.request.load() & request::nmi) != 0;
  events.nmi.pending = nmi ? 1 : 0;
  if ((cpu_.request.load() & request::sipi) != 0) events.sipi_vector = sipi_vector_;
  events.smi.pending = smi_pending_ || (cpu_.request.load() & request::smi) != 0 ? 1 : 0;
  events.smi.latched_init = init_latched_ ? 1 : 0;
  events.flags |=
      KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SIPI_VECTOR | KVM_VCPUEVENT_VALID_SHADOW;
  return events;
}

void SoftVcpu::set_vcpu_events(const kvm_vcpu_events& events) {
  check(valid_events(events) ? 0 : EINVAL,
        "KVM_SET_VCPU_EVENTS: unknown flags, or an exception that does not exist");
  acknowledge_memory();
  if ((events.flags & KVM_VCPUEVENT_VALID_SMM) != 0) init_latched_ = false;  // leaving the mode frees none
  set_events(cpu_, events);
  external_ = events.interrupt.injected != 0 ? events.interrupt.nr : -1;
  if ((events.flags & KVM_VCPUEVENT_VALID_NMI_PENDING) != 0) {
    nmi_pending_ = events.nmi.pending != 0;
    if (!nmi_pending_) cpu_.request.fetch_and(~request::nmi);
  }
  if ((events.flags & KVM_VCPUEVENT_VALID_SIPI_VECTOR) != 0)
    sipi_vector_ = static_cast<uint8_t>(events.sipi_vector);
  if ((events.flags & KVM_VCPUEVENT_VALID_SMM) != 0) {
    smi_pending_ = events.smi.pending != 0;
    cpu_.request.fetch_and(~request::smi);
    const bool init = events.smi.latched_init != 0;
    init_latched_ = init && events.smi.smm != 0;
    if (init && events.smi.smm == 0) post(request::init);
  }
}

kvm_mp_state SoftVcpu::mp_state() {
  const uint32_t state = mp_state_;
  const bool unhalted = unhalted_ || (cpu_.request.load() & request::unhalt) != 0;
  return {state == KVM_MP_STATE_RUNNABLE && cpu_.halted && !unhalted ? uint32_t{KVM_MP_STATE_HALTED} : state};
}

void SoftVcpu::set_mp_state(const kvm_mp_state& state) {
  switch (state.mp_state) {
    case KVM_MP_STATE_RUNNABLE:
    case KVM_MP_STATE_HALTED:
      mp_state_ = KVM_MP_STATE_RUNNABLE;
      cpu_.halted = state.mp_state == KVM_MP_STATE_HALTED;
      break;
    case KVM_MP_STATE_UNINITIALIZED:
    case KVM_MP_STATE_INIT_RECEIVED:
      if (lapic_ == nullptr)
        throw_errno(EINVAL, "KVM_SET_MP_STATE: only RUNNABLE exists without in-accelerator LAPIC");
      mp_state_ = state.mp_state;
      break;
    case KVM_MP_STATE_SIPI_RECEIVED:
      mp_state_ = KVM_MP_STATE_INIT_RECEIVED;
      post(request::sipi);
      break;
    default: throw_errno(EINVAL, "KVM_SET_MP_STATE: unknown state");
  }
}

void SoftVcpu::set_tsc_khz(uint32_t khz) {
  khz = vm_.valid_tsc_khz(khz);
  if (khz == tsc_khz_) return;
  const uint64_t now = guest_tsc();
  tsc_khz_ = khz;
  place_tsc(TscLines::Cause::frequency, now);
  cpu_.tsc_is_direct = khz == vm_.tsc_khz();
  cpu_.state_changed();
  if (lapic_ != nullptr) lapic_->tsc_changed();
  post(request::clock);
}

void SoftVcpu::set_tsc_offset(uint64_t offset) {
  store_tsc_offset(offset);
  vm_.tsc_lines().set(tsc_khz_, offset);
  if (lapic_ != nullptr) lapic_->tsc_changed();
  post(request::clock);
}

void SoftVcpu::set_guest_debug(const kvm_guest_debug& debug) {
  if ((debug.control & ~guest_debug_controls) != 0)
    throw_errno(EINVAL, "KVM_SET_GUEST_DEBUG: this control bit is not supported");
  debug_ = debug;
  const bool on = (debug.control & KVM_GUESTDBG_ENABLE) != 0;
  events_blocked_ = on && (debug.control & KVM_GUESTDBG_BLOCKIRQ) != 0;
  cpu_.debug_step = on && (debug.control & KVM_GUESTDBG_SINGLESTEP) != 0;
  cpu_.debug_registers = on && (debug.control & KVM_GUESTDBG_USE_HW_BP) != 0;
  for (unsigned i = 0; i < 4; ++i) cpu_.debug_dr[i] = debug.arch.debugreg[i];
  cpu_.debug_dr[4] = debug.arch.debugreg[7];
  cpu_.state_changed();
}

void SoftVcpu::set_tpr_access_reporting(bool on) {
  if (on) throw_errno(EINVAL, "KVM_TPR_ACCESS_REPORTING: the soft accelerator does not report TPR accesses");
}

// Without reports of TPR accesses no guest is patched to use such a page.
void SoftVcpu::set_vapic_addr(uint64_t gpa) {
  if (gpa != 0) throw_errno(EINVAL, "KVM_SET_VAPIC_ADDR: the soft accelerator has no virtual APIC page");
}

int SoftVcpu::interrupt(uint32_t vector) noexcept {
  if (vector > 255) return -EINVAL;
  if (lapic_ != nullptr) {
    if (vm_.interrupts().mode() != Irqchip::Mode::split) return -ENXIO;
    return lapic_->inject_extint(static_cast<uint8_t>(vector)) ? 0 : -EEXIST;
  }
  if (external_ >= 0) return -EEXIST;
  external_ = static_cast<int>(vector);
  return 0;
}

int SoftVcpu::smi() noexcept {
  post(request::smi);
  return 0;
}

int SoftVcpu::nmi() noexcept {
  post(request::nmi);
  return 0;
}

kvm_translation SoftVcpu::translate(uint64_t linear) {
  acknowledge_memory();
  kvm_translation out{};
  out.linear_address = linear;
  bool writable = false;
  bool user = false;
  uint64_t gpa = 0;
  out.valid = cpu_.translate_debug(linear, gpa, writable, user) ? 1 : 0;
  out.physical_address = out.valid != 0 ? gpa : ~uint64_t{0};
  out.writeable = writable ? 1 : 0;
  out.usermode = user ? 1 : 0;
  return out;
}

int SoftVcpu::pre_fault_memory(uint64_t& gpa, uint64_t& size) noexcept {
  if (((gpa | size) & page_mask) != 0 || gpa + size <= gpa) return -EINVAL;
  const auto spaces = vm_.memory();
  const MemoryMap* const map = &spaces->space[cpu_.smm ? 1 : 0];
  bool some = false;
  while (size > 0) {
    Slot* const slot = map->find(gpa);
    if (slot == nullptr) return some ? 0 : -ENOENT;
    const uint64_t part = std::min(size, slot->gpa + slot->size - gpa);
    if (::madvise(slot->host + (gpa - slot->gpa), part, MADV_POPULATE_READ) != 0)
      return some ? 0 : errno == EINVAL ? -EOPNOTSUPP : -errno;  // EINVAL: before Linux 5.14
    gpa += part;
    size -= part;
    some = true;
  }
  return 0;
}

void SoftVcpu::setup_mce(uint64_t capabilities) {
  check(setup_machine_check(cpu_.msr.machine_check, capabilities),
        "KVM_X86_SETUP_MCE: as many banks are not there, or a capability is not");
  if (lapic_ != nullptr) lapic_->offer_cmci((capabilities & MachineCheck::cmci_p) != 0);
}

void SoftVcpu::set_mce(const kvm_x86_mce& event) {
  MachineCheckEffect effect;
  check(inject_machine_check(cpu_, event, effect), "KVM_X86_SET_MCE: no such bank, or no valid error");
  shutdown_ |= effect.shutdown;
  if (effect.interrupt && lapic_ != nullptr) lapic_->local_interrupt(Lapic::Local::cmci);
}

void SoftVcpu::enable_cap(const kvm_enable_cap& cap) {
  // What the guest's CPUID hides of KVM's paravirtual features is never there on soft.
  if (cap.cap == KVM_CAP_ENFORCE_PV_FEATURE_CPUID && cap.args[0] != 0) return;
  throw_errno(EINVAL, fmt::format("the soft accelerator has no vCPU capability {} to enable", cap.cap));
}

}  // namespace lodge::kvm::soft
