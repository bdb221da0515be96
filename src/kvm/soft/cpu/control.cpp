#include "kvm/soft/cpu/control.hpp"

#include "kvm/soft/cpu/cpuid_bits.hpp"
#include "kvm/soft/cpu/platform.hpp"

namespace lodge::kvm::soft {
namespace {

constexpr uint64_t cr0_valid = cr0::pe | cr0::mp | cr0::em | cr0::ts | cr0::et | cr0::ne | cr0::wp | cr0::am |
                               cr0::nw | cr0::cd | cr0::pg;
constexpr uint64_t dr6_fixed = 0xffff'0ff0, dr6_writable = 0xe00f;
constexpr uint64_t dr7_fixed = 0x400, dr7_writable = 0xffff'23ff;

bool refuse(Cpu& cpu) noexcept {
  return cpu.raise(Exception::gp, 0);
}

bool pae_paging(uint64_t cr0, uint64_t cr4, uint64_t efer) noexcept {
  return (cr0 & cr0::pg) != 0 && (cr4 & cr4::pae) != 0 && (efer & efer::lme) == 0;
}

// May paging be switched on now, with respect to long mode?
bool may_enter_long_mode(const Cpu& cpu) noexcept {
  return (cpu.cr4 & cr4::pae) != 0 && !cpu.segment[seg_cs].is_long();
}

}  // namespace

bool set_cr0(Cpu& cpu, uint64_t value) noexcept {
  if (value >> 32 != 0) return refuse(cpu);
  value = (value & cr0_valid) | cr0::et;
  const uint64_t changed = value ^ cpu.cr0;
  if ((value & cr0::pg) != 0 && (value & cr0::pe) == 0) return refuse(cpu);
  if ((value & cr0::nw) != 0 && (value & cr0::cd) == 0) return refuse(cpu);
  uint64_t efer = cpu.efer;
  if ((changed & cr0::pg) != 0) {
    if ((value & cr0::pg) != 0) {
      if ((efer & efer::lme) != 0) {
        if (!may_enter_long_mode(cpu)) return refuse(cpu);
        efer |= efer::lma;
      }
    } else {
      if ((cpu.cr4 & cr4::pcide) != 0) return refuse(cpu);
      if (cpu.mode() == Mode::bits64) return refuse(cpu);
      efer &= ~efer::lma;
    }
  }
  // PDPTEs are read when PAE paging begins, and again when its caching changes (SDM volume 3, 4.4.1).
  if (pae_paging(value, cpu.cr4, efer) && (changed & (cr0::pg | cr0::cd | cr0::nw)) != 0 &&
      !cpu.load_pdptrs(cpu.cr3)) {
    return false;
  }
  cpu.cr0 = value;
  cpu.efer = efer;
  if ((changed & (cr0::pg | cr0::pe | cr0::wp)) != 0) cpu.flush_tlb(false);
  cpu.state_changed();
  return true;
}

uint64_t reserved_cr3(const Features& features) noexcept {
  return ~uint64_t{0} << (features.physical_bits < 52 ? features.physical_bits : 52);
}

bool set_cr3(Cpu& cpu, uint64_t value) noexcept {
  constexpr uint64_t no_flush = uint64_t{1} << 63;
  if (cpu.long_mode()) {
    // Bit 63 spares the TLB entries of the PCID; it is never stored. This TLB has no tags, so that a load
    // always flushes, which the architecture permits.
    if ((cpu.cr4 & cr4::pcide) != 0) value &= ~no_flush;
    if ((value & reserved_cr3(cpu.features)) != 0) return refuse(cpu);
  } else {
    value &= 0xffff'ffff;
    if (pae_paging(cpu.cr0, cpu.cr4, cpu.efer) && !cpu.load_pdptrs(value)) return false;
  }
  cpu.cr3 = value;
  cpu.flush_tlb(true);
  return true;
}

uint64_t valid_cr4(const Features& features) noexcept {
  struct Rule {
    uint64_t bits;
    bool offered;
  };
  const Features& f = features;
  const Rule rules[] = {
      {cr4::vme | cr4::pvi, (f.leaf1_edx & cpuid1_edx::vme) != 0},
      {cr4::tsd, (f.leaf1_edx & cpuid1_edx::tsc) != 0},
      {cr4::de, (f.leaf1_edx & cpuid1_edx::de) != 0},
      {cr4::pse, (f.leaf1_edx & cpuid1_edx::pse) != 0},
      {cr4::pae, (f.leaf1_edx & cpuid1_edx::pae) != 0},
      {cr4::mce, (f.leaf1_edx & cpuid1_edx::mce) != 0},
      {cr4::pge, (f.leaf1_edx & cpuid1_edx::pge) != 0},
      {cr4::pce, true},
      {cr4::osfxsr, (f.leaf1_edx & cpuid1_edx::fxsr) != 0},
      {cr4::osxmmexcpt, (f.leaf1_edx & cpuid1_edx::sse) != 0},
      {cr4::umip, (f.leaf7_ecx & cpuid7_ecx::umip) != 0},
      {cr4::la57, (f.leaf7_ecx & cpuid7_ecx::la57) != 0},
      {cr4::fsgsbase, (f.leaf7_ebx & cpuid7_ebx::fsgsbase) != 0},
      {cr4::pcide, (f.leaf1_ecx & cpuid1_ecx::pcid) != 0},
      {cr4::osxsave, (f.leaf1_ecx & cpuid1_ecx::xsave) != 0},
      {cr4::smep, (f.leaf7_ebx & cpuid7_ebx::smep) != 0},
      {cr4::smap, (f.leaf7_ebx & cpuid7_ebx::smap) != 0},
      {cr4::pke, (f.leaf7_ecx & cpuid7_ecx::pku) != 0},
  };
  uint64_t valid = 0;
  for (const Rule& rule : rules) valid |= rule.offered ? rule.bits : 0;
  return valid;
}

bool set_cr4(Cpu& cpu, uint64_t value) noexcept {
  if ((value & ~valid_cr4(cpu.features)) != 0) return refuse(cpu);
  const uint64_t changed = value ^ cpu.cr4;
  if (cpu.long_mode()) {
    if ((value & cr4::pae) == 0 || (changed & cr4::la57) != 0) return refuse(cpu);
  }
  if ((changed & value & cr4::pcide) != 0 && (!cpu.long_mode() || (cpu.cr3 & 0xfff) != 0)) return refuse(cpu);
  constexpr uint64_t paging =
      cr4::pse | cr4::pae | cr4::pge | cr4::smep | cr4::smap | cr4::pke | cr4::la57 | cr4::pcide;
  if (pae_paging(cpu.cr0, value, cpu.efer) && (changed & (cr4::pse | cr4::pae | cr4::pge | cr4::smep)) != 0 &&
      !cpu.load_pdptrs(cpu.cr3)) {
    return false;
  }
  cpu.cr4 = value;
  if ((changed & paging) != 0) cpu.flush_tlb(false);
  cpu.state_changed();
  return true;
}

bool set_cr8(Cpu& cpu, uint64_t value) noexcept {
  if (value > 15) return refuse(cpu);
  cpu.platform().set_tpr(static_cast<uint8_t>(value));  // compares with the old value
  cpu.cr8 = static_cast<uint8_t>(value);
  return true;
}

uint64_t valid_efer(const Features& features) noexcept {
  uint64_t valid = 0;
  if ((features.ext1_edx & cpuid_ext_edx::syscall) != 0) valid |= efer::sce;
  if ((features.ext1_edx & cpuid_ext_edx::lm) != 0) valid |= efer::lme | efer::lma;
  if ((features.ext1_edx & cpuid_ext_edx::nx) != 0) valid |= efer::nxe;
  if ((features.ext1_edx & cpuid_ext_edx::fxsr_opt) != 0) valid |= efer::ffxsr;
  if ((features.query(0x8000'0021, 0).eax & cpuid_ext21_eax::auto_ibrs) != 0) valid |= efer::autoibrs;
  return valid;
}

bool set_efer(Cpu& cpu, uint64_t value) noexcept {
  if ((value & ~valid_efer(cpu.features)) != 0) return false;
  const uint64_t changed = value ^ cpu.efer;
  if ((changed & efer::lme) != 0 && (cpu.cr0 & cr0::pg) != 0) return false;
  cpu.efer = (value & ~efer::lma) | (cpu.efer & efer::lma);  // LMA follows CR0.PG
  if ((changed & efer::nxe) != 0) cpu.flush_tlb(false);
  cpu.state_changed();
  return true;
}

bool valid_xcr0(const Features& features, uint64_t value) noexcept {
  constexpr uint64_t x87 = 1, sse = 2, avx = 4, avx512 = 0xe0;
  if ((value & ~features.xcr0_valid) != 0 || (value & x87) == 0) return false;
  if ((value & avx) != 0 && (value & sse) == 0) return false;
  if ((value & avx512) != 0) return (value & avx512) == avx512 && (value & avx) != 0;
  return true;
}

bool set_xcr0(Cpu& cpu, uint64_t value) noexcept {
  if (!valid_xcr0(cpu.features, value)) return refuse(cpu);
  cpu.xcr0 = value;
  cpu.state_changed();
  return true;
}

// DR4 and DR5 name DR6 and DR7 unless debugging extensions reserve them.
static bool alias(Cpu& cpu, unsigned& number) noexcept {
  if (number != 4 && number != 5) return number < 8 || cpu.raise(Exception::ud);
  if ((cpu.cr4 & cr4::de) != 0) return cpu.raise(Exception::ud);
  number += 2;
  return true;
}

bool read_dr(Cpu& cpu, unsigned number, uint64_t& value) noexcept {
  if (!alias(cpu, number)) return false;
  value = number < 4 ? cpu.dr[number] : number == 6 ? cpu.dr6 : cpu.dr7;
  return true;
}

bool write_dr(Cpu& cpu, unsigned number, uint64_t value) noexcept {
  if (!alias(cpu, number)) return false;
  if (number >= 6 && value >> 32 != 0) return refuse(cpu);
  if (number < 4) {
    cpu.dr[number] = value;
  } else if (number == 6) {
    cpu.dr6 = (value & dr6_writable) | dr6_fixed;
  } else {
    cpu.dr7 = (value & dr7_writable) | dr7_fixed;
  }
  cpu.state_changed();
  return true;
}

}  // namespace lodge::kvm::soft
