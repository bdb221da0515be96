#include "kvm/soft/cpu/exchange.hpp"

#include <cerrno>

#include "kvm/soft/cpu/control.hpp"
#include "kvm/soft/cpu/cpuid.hpp"
#include "kvm/soft/cpu/msr.hpp"
#include "kvm/soft/cpu/platform.hpp"
#include "kvm/soft/cpu/segments.hpp"

namespace lodge::kvm::soft {
namespace {

constexpr uint32_t msr_apic_base = 0x1b;

bool has_exception(const kvm_vcpu_events& events) noexcept {
  return events.exception.injected != 0 || events.exception.pending != 0;
}

kvm_segment to_kvm(const Segment& from) noexcept {
  kvm_segment to{};
  to.base = from.base;
  to.limit = from.limit;
  to.selector = from.selector;
  to.type = static_cast<uint8_t>(from.type());
  to.s = from.system() ? 0 : 1;
  to.dpl = static_cast<uint8_t>(from.dpl());
  to.present = from.present() ? 1 : 0;
  to.avl = (from.attributes & Segment::available) != 0 ? 1 : 0;
  to.l = from.is_long() ? 1 : 0;
  to.db = from.big() ? 1 : 0;
  to.g = (from.attributes & Segment::granular_bit) != 0 ? 1 : 0;
  to.unusable = from.present() ? 0 : 1;
  return to;
}

Segment from_kvm(const kvm_segment& from) noexcept {
  Segment to;
  to.base = from.base;
  to.limit = from.limit;
  to.selector = from.selector;
  unsigned attributes = (from.type & 0xfu) | (from.dpl & 3u) << 5;
  if (from.s != 0) attributes |= Segment::non_system;
  if (from.present != 0 && from.unusable == 0) attributes |= Segment::present_bit;
  if (from.avl != 0) attributes |= Segment::available;
  if (from.l != 0) attributes |= Segment::long_bit;
  if (from.db != 0) attributes |= Segment::big_bit;
  if (from.g != 0) attributes |= Segment::granular_bit;
  to.attributes = static_cast<uint16_t>(attributes);
  return to;
}

kvm_dtable to_kvm(const DescriptorTable& from) noexcept {
  kvm_dtable to{};
  to.base = from.base;
  to.limit = from.limit;
  return to;
}

// What both forms of the special registers have in common.
template <class Sregs>
void get_common(Cpu& cpu, Sregs& out) noexcept {
  out.cs = to_kvm(cpu.segment[seg_cs]);
  out.ds = to_kvm(cpu.segment[seg_ds]);
  out.es = to_kvm(cpu.segment[seg_es]);
  out.fs = to_kvm(cpu.segment[seg_fs]);
  out.gs = to_kvm(cpu.segment[seg_gs]);
  out.ss = to_kvm(cpu.segment[seg_ss]);
  out.tr = to_kvm(cpu.tr);
  out.ldt = to_kvm(cpu.ldtr);
  out.gdt = to_kvm(cpu.gdtr);
  out.idt = to_kvm(cpu.idtr);
  out.cr0 = cpu.cr0;
  out.cr2 = cpu.cr2;
  out.cr3 = cpu.cr3;
  out.cr4 = cpu.cr4;
  out.cr8 = cpu.platform().tpr();
  out.efer = cpu.efer;
  uint64_t apic_base = 0;
  out.apic_base = cpu.platform().read_apic_msr(msr_apic_base, apic_base) ? apic_base : 0;
}

// The bits of CR4 and EFER that a VMM may set: before it has said what the guest's CPUID offers, all that
// there are.
struct Allowed {
  uint64_t cr4, efer;
};
Allowed allowed(const Cpu& cpu) {
  const auto of = [](const Features& features) {
    return Allowed{.cr4 = valid_cr4(features), .efer = valid_efer(features) | efer::lma};
  };
  return cpu.features.entries().empty() ? of(Features(host_cpuid())) : of(cpu.features);
}

template <class Sregs>
int set_common(Cpu& cpu, const Sregs& in) {
  if (!valid_control(
          cpu, {.cr0 = in.cr0, .cr3 = in.cr3, .cr4 = in.cr4, .efer = in.efer, .long_code = in.cs.l != 0}))
    return EINVAL;
  uint64_t apic_base = 0;
  if (cpu.platform().read_apic_msr(msr_apic_base, apic_base) && apic_base != in.apic_base &&
      !cpu.platform().write_apic_msr(msr_apic_base, in.apic_base, true)) {
    return EINVAL;
  }
  cpu.segment[seg_cs] = from_kvm(in.cs);
  cpu.segment[seg_ds] = from_kvm(in.ds);
  cpu.segment[seg_es] = from_kvm(in.es);
  cpu.segment[seg_fs] = from_kvm(in.fs);
  cpu.segment[seg_gs] = from_kvm(in.gs);
  cpu.segment[seg_ss] = from_kvm(in.ss);
  cpu.tr = from_kvm(in.tr);
  cpu.ldtr = from_kvm(in.ldt);
  cpu.gdtr = {.base = in.gdt.base, .limit = in.gdt.limit};
  cpu.idtr = {.base = in.idt.base, .limit = in.idt.limit};
  cpu.cr0 = in.cr0 | cr0::et;
  cpu.cr2 = in.cr2;
  cpu.cr3 = in.cr3;
  cpu.cr4 = in.cr4;
  cpu.efer = in.efer;
  cpu.cr8 = static_cast<uint8_t>(in.cr8 & 15);
  cpu.platform().set_tpr(cpu.cr8);
  const bool real = (in.cr0 & cr0::pe) == 0;
  cpu.flush_tlb(false);
  cpu.set_cpl(real ? 0 : cpu.v86() ? 3 : cpu.segment[seg_ss].dpl());
  cpu.state_changed();
  return 0;
}

bool pae_paging(const Cpu& cpu) noexcept {
  return (cpu.cr0 & cr0::pg) != 0 && (cpu.cr4 & cr4::pae) != 0 && !cpu.long_mode();
}

}  // namespace

bool valid_control(const Cpu& cpu, const ControlRegisters& in) {
  constexpr uint64_t both = efer::lme | efer::lma;
  const Allowed bits = allowed(cpu);
  if (in.cr0 >> 32 != 0 || (in.cr4 & ~bits.cr4) != 0 || (in.efer & ~bits.efer) != 0) return false;
  if ((in.cr0 & cr0::pg) != 0 && (in.cr0 & cr0::pe) == 0) return false;
  if ((in.cr0 & cr0::nw) != 0 && (in.cr0 & cr0::cd) == 0) return false;
  if ((in.efer & efer::lme) != 0 && (in.cr0 & cr0::pg) != 0) {
    if ((in.cr4 & cr4::pae) == 0 || (in.efer & both) != both) return false;
    if ((in.cr3 & reserved_cr3(cpu.features)) != 0) return false;
  } else if ((in.efer & efer::lma) != 0 || in.long_code) {
    return false;
  }
  return true;
}

kvm_regs get_regs(const Cpu& cpu) noexcept {
  kvm_regs out{};
  out.rax = cpu.gpr[rax];
  out.rbx = cpu.gpr[rbx];
  out.rcx = cpu.gpr[rcx];
  out.rdx = cpu.gpr[rdx];
  out.rsi = cpu.gpr[rsi];
  out.rdi = cpu.gpr[rdi];
  out.rsp = cpu.gpr[rsp];
  out.rbp = cpu.gpr[rbp];
  out.r8 = cpu.gpr[r8];
  out.r9 = cpu.gpr[r9];
  out.r10 = cpu.gpr[r10];
  out.r11 = cpu.gpr[r11];
  out.r12 = cpu.gpr[r12];
  out.r13 = cpu.gpr[r13];
  out.r14 = cpu.gpr[r14];
  out.r15 = cpu.gpr[r15];
  out.rip = cpu.rip;
  out.rflags = cpu.rflags();
  return out;
}

void set_regs(Cpu& cpu, const kvm_regs& in) noexcept {
  cpu.gpr[rax] = in.rax;
  cpu.gpr[rbx] = in.rbx;
  cpu.gpr[rcx] = in.rcx;
  cpu.gpr[rdx] = in.rdx;
  cpu.gpr[rsi] = in.rsi;
  cpu.gpr[rdi] = in.rdi;
  cpu.gpr[rsp] = in.rsp;
  cpu.gpr[rbp] = in.rbp;
  cpu.gpr[r8] = in.r8;
  cpu.gpr[r9] = in.r9;
  cpu.gpr[r10] = in.r10;
  cpu.gpr[r11] = in.r11;
  cpu.gpr[r12] = in.r12;
  cpu.gpr[r13] = in.r13;
  cpu.gpr[r14] = in.r14;
  cpu.gpr[r15] = in.r15;
  cpu.rip = in.rip;
  cpu.set_rflags((in.rflags & flag::valid) | flag::fixed);
  // KVM drops a pending exception: new registers have nothing to do with it.
  cpu.pending = {};
  cpu.state_changed();
}

kvm_sregs get_sregs(Cpu& cpu) noexcept {
  kvm_sregs out{};
  get_common(cpu, out);
  return out;
}

int set_sregs(Cpu& cpu, const kvm_sregs& in) {
  const int error = set_common(cpu, in);
  if (error != 0) return error;
  // The old form reads the PDPTEs from memory. Bad ones show up at the first access.
  if (pae_paging(cpu) && !cpu.load_pdptrs(cpu.cr3)) cpu.pending = {};
  return 0;
}

kvm_sregs2 get_sregs2(Cpu& cpu) noexcept {
  kvm_sregs2 out{};
  get_common(cpu, out);
  if (pae_paging(cpu)) {
    out.flags = KVM_SREGS2_FLAGS_PDPTRS_VALID;
    for (unsigned i = 0; i < 4; ++i) out.pdptrs[i] = cpu.pdptr[i];
  }
  return out;
}

int set_sregs2(Cpu& cpu, const kvm_sregs2& in) {
  if ((in.flags & ~uint64_t{KVM_SREGS2_FLAGS_PDPTRS_VALID}) != 0) return EINVAL;
  const bool with_pdptrs = (in.flags & KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0;
  const bool pae = (in.cr0 & cr0::pg) != 0 && (in.cr4 & cr4::pae) != 0 && (in.efer & efer::lma) == 0;
  if (with_pdptrs && !pae) return EINVAL;
  const int error = set_common(cpu, in);
  if (error != 0) return error;
  if (with_pdptrs) {
    for (unsigned i = 0; i < 4; ++i) cpu.pdptr[i] = in.pdptrs[i];
  } else if (pae && !cpu.load_pdptrs(cpu.cr3)) {
    cpu.pending = {};
  }
  return 0;
}

kvm_debugregs get_debugregs(const Cpu& cpu) noexcept {
  kvm_debugregs out{};
  for (unsigned i = 0; i < 4; ++i) out.db[i] = cpu.dr[i];
  out.dr6 = cpu.dr6;
  out.dr7 = cpu.dr7;
  return out;
}

int set_debugregs(Cpu& cpu, const kvm_debugregs& in) noexcept {
  if (in.flags != 0 || in.dr6 >> 32 != 0 || in.dr7 >> 32 != 0) return EINVAL;
  for (unsigned i = 0; i < 4; ++i) cpu.dr[i] = in.db[i];
  write_dr(cpu, 6, in.dr6);
  write_dr(cpu, 7, in.dr7);
  return 0;
}

kvm_xcrs get_xcrs(const Cpu& cpu) noexcept {
  kvm_xcrs out{};
  out.nr_xcrs = 1;
  out.xcrs[0].xcr = 0;
  out.xcrs[0].value = cpu.xcr0;
  return out;
}

int set_xcrs(Cpu& cpu, const kvm_xcrs& in) noexcept {
  if (in.nr_xcrs > KVM_MAX_XCRS || in.flags != 0) return EINVAL;
  for (unsigned i = 0; i < in.nr_xcrs; ++i) {
    if (in.xcrs[i].xcr != 0) continue;
    if (!valid_xcr0(cpu.features, in.xcrs[i].value)) return EINVAL;
    cpu.xcr0 = in.xcrs[i].value;
    cpu.state_changed();
    break;
  }
  return 0;
}

unsigned get_msrs(Cpu& cpu, std::span<kvm_msr_entry> entries) noexcept {
  unsigned done = 0;
  for (kvm_msr_entry& entry : entries) {
    uint64_t value = 0;
    if (!read_msr(cpu, entry.index, value, true)) break;
    entry.data = value;
    ++done;
  }
  return done;
}

unsigned set_msrs(Cpu& cpu, std::span<const kvm_msr_entry> entries) noexcept {
  unsigned done = 0;
  for (const kvm_msr_entry& entry : entries) {
    if (!write_msr(cpu, entry.index, entry.data, true)) break;
    ++done;
  }
  return done;
}

kvm_vcpu_events get_events(const Cpu& cpu) noexcept {
  kvm_vcpu_events out{};
  const Cpu::PendingException& pending = cpu.pending;
  out.exception.injected = pending.valid ? 1 : 0;
  out.exception.nr = static_cast<uint8_t>(pending.vector);
  out.exception.has_error_code = pending.has_error ? 1 : 0;
  out.exception.error_code = pending.error;
  if (cpu.interrupt_shadow) {
    out.interrupt.shadow = cpu.shadow_is_mov_ss ? KVM_X86_SHADOW_INT_MOV_SS : KVM_X86_SHADOW_INT_STI;
  }
  out.nmi.pending = (cpu.request.load() & request::nmi) != 0 ? 1 : 0;
  out.nmi.masked = cpu.nmi_blocked ? 1 : 0;
  out.smi.smm = cpu.smm ? 1 : 0;
  out.smi.smm_inside_nmi = cpu.smm && cpu.nmi_blocked_before_smm ? 1 : 0;
  out.flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_SMM;
  return out;
}

bool valid_events(const kvm_vcpu_events& in) noexcept {
  constexpr uint32_t known = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SIPI_VECTOR |
                             KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_SMM |
                             KVM_VCPUEVENT_VALID_PAYLOAD;
  if ((in.flags & ~known) != 0) return false;
  return !has_exception(in) || (in.exception.nr <= 31 && in.exception.nr != 2);
}

void set_events(Cpu& cpu, const kvm_vcpu_events& in) noexcept {
  cpu.pending = {};
  if (has_exception(in)) {
    cpu.pending.valid = true;
    cpu.pending.vector = static_cast<Exception>(in.exception.nr);
    cpu.pending.has_error = in.exception.has_error_code != 0;
    cpu.pending.error = in.exception.error_code;
    // An injected #PF carries no address here: CR2 is already set.
    cpu.pending.payload = in.exception.nr == static_cast<uint8_t>(Exception::pf) ? cpu.cr2 : 0;
    if ((in.flags & KVM_VCPUEVENT_VALID_PAYLOAD) != 0 && in.exception_has_payload != 0) {
      cpu.pending.payload = in.exception_payload;
    }
  }
  if ((in.flags & KVM_VCPUEVENT_VALID_SHADOW) != 0) {
    cpu.interrupt_shadow = in.interrupt.shadow != 0;
    cpu.shadow_is_mov_ss = (in.interrupt.shadow & KVM_X86_SHADOW_INT_MOV_SS) != 0;
  }
  if ((in.flags & KVM_VCPUEVENT_VALID_NMI_PENDING) != 0) {
    if (in.nmi.pending != 0) {
      cpu.request.fetch_or(request::nmi);
    } else {
      cpu.request.fetch_and(~request::nmi);
    }
  }
  cpu.nmi_blocked = in.nmi.masked != 0;
  if ((in.flags & KVM_VCPUEVENT_VALID_SMM) != 0) {
    if (cpu.smm != (in.smi.smm != 0)) cpu.set_smm(in.smi.smm != 0);
    cpu.nmi_blocked_before_smm = in.smi.smm_inside_nmi != 0;
  }
}

}  // namespace lodge::kvm::soft
