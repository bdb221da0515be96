// The registers that Linux, the BSDs and Windows touch. Those that steer nothing in a virtual processor
// (power limits, micro-architectural switches) read as what a reset chip has and ignore writes; unknown ones
// are #GP.
//
// Missing: machine-check banks (MCG_CAP says 0), performance counters, debug store, LBR records, VMX and SVM.
#include "kvm/soft/cpu/msr.hpp"

#include <array>
#include <atomic>

#include "kvm/soft/cpu/control.hpp"
#include "kvm/soft/cpu/cpuid_bits.hpp"
#include "kvm/soft/cpu/kvmclock.hpp"
#include "kvm/soft/cpu/platform.hpp"

namespace lodge::kvm::soft {
namespace {

enum Index : uint32_t {
  p5_mc_addr = 0x0,
  p5_mc_type = 0x1,
  ia32_tsc = 0x10,
  kvm_wall_clock_old = 0x11,
  kvm_system_time_old = 0x12,
  ia32_platform_id = 0x17,
  ia32_apic_base = 0x1b,
  ebl_cr_poweron = 0x2a,
  ebc_frequency_id = 0x2c,
  ia32_feature_control = 0x3a,
  msr_smi_count = 0x34,
  ia32_tsc_adjust = 0x3b,
  ia32_spec_ctrl = 0x48,
  ia32_pred_cmd = 0x49,
  ia32_bios_updt_trig = 0x79,
  ia32_bios_sign_id = 0x8b,
  ia32_smbase = 0x9e,
  msr_fsb_freq = 0xcd,
  msr_platform_info = 0xce,
  ia32_mtrrcap = 0xfe,
  ia32_arch_capabilities = 0x10a,
  ia32_flush_cmd = 0x10b,
  bbl_cr_ctl3 = 0x11e,
  misc_features_enables = 0x140,
  ia32_sysenter_cs = 0x174,
  ia32_sysenter_esp = 0x175,
  ia32_sysenter_eip = 0x176,
  ia32_mcg_cap = 0x179,
  ia32_mcg_status = 0x17a,
  ia32_mcg_ctl = 0x17b,
  ia32_perf_status = 0x198,
  ia32_perf_ctl = 0x199,
  ia32_clock_modulation = 0x19a,
  ia32_therm_interrupt = 0x19b,
  ia32_therm_status = 0x19c,
  ia32_misc_enable = 0x1a0,
  ia32_energy_perf_bias = 0x1b0,
  ia32_debugctl = 0x1d9,
  last_branch_from = 0x1db,
  last_int_to = 0x1de,
  power_ctl = 0x1fc,
  ia32_mtrr_physbase0 = 0x200,
  mtrr_variable_end = 0x210,  // 8 pairs
  ia32_mtrr_fix64k = 0x250,
  ia32_mtrr_fix16k_80000 = 0x258,
  ia32_mtrr_fix16k_a0000 = 0x259,
  ia32_mtrr_fix4k_first = 0x268,
  ia32_mtrr_fix4k_last = 0x26f,
  ia32_pat = 0x277,
  ia32_mtrr_def_type = 0x2ff,
  rapl_power_unit = 0x606,
  pkg_energy_status = 0x611,
  dram_energy_status = 0x619,
  pp0_energy_status = 0x639,
  pp1_energy_status = 0x641,
  ia32_tsc_deadline = 0x6e0,
  x2apic_first = 0x800,
  x2apic_last = 0x8ff,
  ia32_xss = 0xda0,
  kvm_wall_clock_new = 0x4b56'4d00,
  kvm_system_time_new = 0x4b56'4d01,
  kvm_steal_time = 0x4b56'4d03,
  kvm_pv_eoi = 0x4b56'4d04,
  ia32_efer = 0xc000'0080,
  ia32_star = 0xc000'0081,
  ia32_lstar = 0xc000'0082,
  ia32_cstar = 0xc000'0083,
  ia32_fmask = 0xc000'0084,
  ia32_fs_base = 0xc000'0100,
  ia32_gs_base = 0xc000'0101,
  ia32_kernel_gs_base = 0xc000'0102,
  ia32_tsc_aux = 0xc000'0103,
  amd_perf_first = 0xc001'0000,  // PERF_CTL0-3 and PERF_CTR0-3
  amd_perf_last = 0xc001'0007,
  amd_syscfg = 0xc001'0010,
  amd_hwcr = 0xc001'0015,
  amd_iorr_first = 0xc001'0016,
  amd_iorr_last = 0xc001'0019,
  amd_top_mem = 0xc001'001a,
  amd_clk_ctl = 0xc001'001b,
  amd_top_mem2 = 0xc001'001d,
  amd_nb_cfg = 0xc001'001f,
  amd_patch_loader = 0xc001'0020,
  amd_int_pending = 0xc001'0055,
  amd_mmio_conf_base = 0xc001'0058,
  amd_pstate_limit = 0xc001'0061,
  amd_pstate_status = 0xc001'0063,
  amd_osvw_length = 0xc001'0140,
  amd_osvw_status = 0xc001'0141,
  amd_perf_core_first = 0xc001'0200,  // the same six counters under their newer numbers
  amd_perf_core_last = 0xc001'020b,
  amd_ls_cfg = 0xc001'1020,
  amd_ic_cfg = 0xc001'1021,
  amd_dc_cfg = 0xc001'1022,
  amd_bu_cfg = 0xc001'1023,
  amd_fp_cfg = 0xc001'1028,
  amd_bu_cfg2 = 0xc001'102a,
  amd_de_cfg = 0xc001'1029,
};

// Bits of HWCR that a guest may write and that do nothing here: TLB cache, flush filter, IGNNE emulation.
constexpr uint64_t hwcr_ignored = 1u << 3 | 1u << 6 | 1u << 8;
// IA32_ARCH_CAPABILITIES: guest code is interpreted, so the flaws that native code could use are not there:
// RDCL_NO, SKIP_L1DFL, SSB_NO, MDS_NO, PSCHANGE_MC_NO, TAA_NO, SBDR_SSDP_NO, FBSDP_NO, PSDP_NO, BHI_NO,
// PBRSB_NO, GDS_NO, RFDS_NO, ITS_NO.
constexpr uint64_t arch_capabilities = 0x1 | 0x8 | 0x10 | 0x20 | 0x40 | 0x100 | 0xe000 | 1u << 20 | 1u << 24 |
                                       1u << 26 | 1u << 27 | uint64_t{1} << 62;
constexpr uint64_t mtrrcap = 8 | 1u << 8 | 1u << 10;  // 8 variable ranges, fixed ranges, write combining
constexpr uint64_t default_revision = uint64_t{1} << 32, amd_revision = 0x0100'0065;
// MISC_ENABLE: fast strings, branch trace and PEBS unavailable.
constexpr uint64_t misc_enable_fixed = 1u << 11 | 1u << 12;
constexpr uint64_t de_cfg_lfence_serializing = 2;

bool memory_type(uint64_t type) noexcept {
  return type < 8 && (0x73u >> type & 1) != 0;
}  // 0 1 4 5 6
bool pat_type(uint64_t type) noexcept {
  return type < 8 && (0xf3u >> type & 1) != 0;
}  // and 7 (UC-)

bool each_byte(uint64_t value, bool (*valid)(uint64_t) noexcept) noexcept {
  for (unsigned i = 0; i < 8; ++i) {
    if (!valid(value >> i * 8 & 0xff)) return false;
  }
  return true;
}

uint64_t* fixed_mtrr(Cpu& cpu, uint32_t index) noexcept {
  auto& fixed = cpu.msr.mtrr_fixed;
  if (index == ia32_mtrr_fix64k) return fixed.data();
  if (index == ia32_mtrr_fix16k_80000) return &fixed[1];
  if (index == ia32_mtrr_fix16k_a0000) return &fixed[2];
  if (index >= ia32_mtrr_fix4k_first && index <= ia32_mtrr_fix4k_last) {
    return &fixed[3 + index - ia32_mtrr_fix4k_first];
  }
  return nullptr;
}

// Registers that hold 64 bits and take any value.
uint64_t* plain(Cpu& cpu, uint32_t index) noexcept {
  switch (index) {
    case ia32_star: return &cpu.msr.star;
    case ia32_sysenter_cs: return &cpu.msr.sysenter_cs;
    case ia32_smbase: return &cpu.msr.smbase;
    default: return nullptr;
  }
}

// Registers that hold a linear address.
uint64_t* address(Cpu& cpu, uint32_t index) noexcept {
  switch (index) {
    case ia32_lstar: return &cpu.msr.lstar;
    case ia32_cstar: return &cpu.msr.cstar;
    case ia32_kernel_gs_base: return &cpu.msr.kernel_gs_base;
    case ia32_fs_base: return &cpu.segment[seg_fs].base;
    case ia32_gs_base: return &cpu.segment[seg_gs].base;
    case ia32_sysenter_esp: return &cpu.msr.sysenter_esp;
    case ia32_sysenter_eip: return &cpu.msr.sysenter_eip;
    default: return nullptr;
  }
}

// Registers that the guest meets on its vendor's chips only. KVM gives guests of all vendors POWER_CTL,
// PLATFORM_INFO and MISC_FEATURES_ENABLES.
bool intel_only(uint32_t index) noexcept {
  switch (index) {
    case ia32_platform_id:
    case ebl_cr_poweron:
    case ia32_feature_control:
    case msr_fsb_freq:
    case bbl_cr_ctl3:
    case ia32_perf_status:
    case ia32_perf_ctl:
    case ia32_clock_modulation:
    case ia32_therm_interrupt:
    case ia32_therm_status:
    case ia32_misc_enable:
    case ia32_energy_perf_bias:
    case ia32_bios_updt_trig:
    case ebc_frequency_id: return true;
    default: return false;
  }
}

// Harmless registers: the value they read, writes ignored.
bool constant(const Cpu& cpu, uint32_t index, uint64_t& value) noexcept {
  value = 0;
  if (index >= amd_perf_first && index <= amd_perf_last) return true;
  if (index >= amd_perf_core_first && index <= amd_perf_core_last) return true;
  if (index >= amd_iorr_first && index <= amd_iorr_last) return true;
  if (index >= last_branch_from && index <= last_int_to) return true;
  switch (index) {
    case ia32_platform_id:
    case ebl_cr_poweron:
    case p5_mc_addr:
    case p5_mc_type:
    case ia32_clock_modulation:
    case ia32_therm_interrupt:
    case ia32_therm_status:
    case ia32_perf_ctl:
    case ia32_energy_perf_bias:
    case ia32_bios_updt_trig:
    case rapl_power_unit:
    case pkg_energy_status:
    case dram_energy_status:
    case pp0_energy_status:
    case pp1_energy_status:
    case power_ctl:
    case amd_syscfg:
    case amd_top_mem2:
    case amd_nb_cfg:
    case amd_patch_loader:
    case amd_int_pending:
    case amd_pstate_limit:
    case amd_pstate_status:
    case amd_osvw_length:
    case amd_osvw_status:
    case amd_ls_cfg:
    case amd_ic_cfg:
    case amd_dc_cfg:
    case amd_bu_cfg:
    case amd_fp_cfg:
    case amd_mmio_conf_base:
    case amd_bu_cfg2: return true;
    case amd_clk_ctl: value = 0x2000'0000; return true;
    case ebc_frequency_id: value = 1u << 24; return true;
    case amd_top_mem: value = 0; return true;
    case amd_de_cfg: value = de_cfg_lfence_serializing; return true;
    case ia32_perf_status: value = 1000; return true;
    case bbl_cr_ctl3: value = 0xbe70'2111; return true;
    case msr_fsb_freq: value = 3; return true;
    case ia32_feature_control: value = 1; return true;  // locked, everything off
    case ia32_mtrrcap: value = mtrrcap; return (cpu.features.leaf1_edx & cpuid1_edx::mtrr) != 0;
    default: return false;
  }
}

bool offers_spec_ctrl(const Features& f) noexcept {
  return (f.leaf7_edx & cpuid7_edx::spec_ctrl) != 0 ||
         (f.ext8_ebx & (cpuid_ext8_ebx::ibrs | cpuid_ext8_ebx::stibp | cpuid_ext8_ebx::amd_ssbd)) != 0;
}
bool offers_pred_cmd(const Features& f) noexcept {
  return (f.leaf7_edx & cpuid7_edx::spec_ctrl) != 0 || (f.ext8_ebx & cpuid_ext8_ebx::ibpb) != 0;
}
bool offers_tsc_aux(const Features& f) noexcept {
  return (f.ext1_edx & cpuid_ext_edx::rdtscp) != 0 || (f.leaf7_ecx & cpuid7_ecx::rdpid) != 0;
}

// Is the register there for this guest? Those that CPUID announces only.
bool announced(const Cpu& cpu, uint32_t index) noexcept {
  const Features& f = cpu.features;
  switch (index) {
    case ia32_smbase: return false;  // the VMM's: the guest moves it by its save area
    case ia32_spec_ctrl: return offers_spec_ctrl(f);
    case ia32_pred_cmd: return offers_pred_cmd(f);
    case ia32_flush_cmd: return (f.leaf7_edx & cpuid7_edx::flush_l1d) != 0;
    case ia32_arch_capabilities: return (f.leaf7_edx & cpuid7_edx::arch_capabilities) != 0;
    case ia32_tsc_adjust: return (f.leaf7_ebx & cpuid7_ebx::tsc_adjust) != 0;
    case ia32_tsc_aux: return offers_tsc_aux(f);
    case ia32_xss: return (f.leaf_d_1_eax & cpuid_d_1_eax::xsaves) != 0;
    case ia32_star:
    case ia32_efer:
      return (f.ext1_edx & (cpuid_ext_edx::syscall | cpuid_ext_edx::nx | cpuid_ext_edx::lm)) != 0;
    case ia32_lstar:
    case ia32_cstar:
    case ia32_fmask:
    case ia32_fs_base:
    case ia32_gs_base:
    case ia32_kernel_gs_base: return (f.ext1_edx & cpuid_ext_edx::lm) != 0;
    case kvm_wall_clock_old:
    case kvm_system_time_old: return (f.kvm_features & kvm_feature::clocksource) != 0;
    case kvm_wall_clock_new:
    case kvm_system_time_new: return (f.kvm_features & kvm_feature::clocksource2) != 0;
    case kvm_steal_time: return (f.kvm_features & kvm_feature::steal_time) != 0;
    case kvm_pv_eoi: return (f.kvm_features & kvm_feature::pv_eoi) != 0;
    default:
      if (f.amd_like) return !intel_only(index);
      return (index >> 16) != 0xc001;
  }
}

// The VMM may take it away from its guests (KVM_CAP_MSR_PLATFORM_INFO).
bool hidden_from_guest(Cpu& cpu, uint32_t index) noexcept {
  return !announced(cpu, index) || (index == msr_platform_info && !cpu.platform().settings().platform_info);
}

bool is_apic(uint32_t index) noexcept {
  return index == ia32_apic_base || index == ia32_tsc_deadline ||
         (index >= x2apic_first && index <= x2apic_last);
}

bool read_other(Cpu& cpu, uint32_t index, uint64_t& value) noexcept {
  switch (index) {
    case ia32_tsc: value = cpu.platform().tsc(); return true;
    case msr_smi_count: value = cpu.msr.smi_count; return true;
    case ia32_tsc_adjust: value = cpu.msr.tsc_adjust; return true;
    case ia32_spec_ctrl: value = cpu.msr.spec_ctrl; return true;
    case ia32_arch_capabilities: value = arch_capabilities & ~cpu.msr.arch_capabilities_hidden; return true;
    case ia32_bios_sign_id:
      value = cpu.msr.bios_sign_id != 0 ? cpu.msr.bios_sign_id
              : cpu.features.amd_like   ? amd_revision
                                        : default_revision;
      return true;
    case ia32_misc_enable: value = cpu.msr.misc_enable | misc_enable_fixed; return true;
    case msr_platform_info: value = cpu.msr.platform_info; return true;
    case misc_features_enables: value = cpu.msr.misc_features; return true;
    case ia32_debugctl: value = cpu.msr.debug_ctl; return true;
    case amd_hwcr: value = cpu.msr.hwcr; return true;
    case ia32_pat: value = cpu.msr.pat; return true;
    case ia32_mtrr_def_type: value = cpu.msr.mtrr_def_type; return true;
    case ia32_xss: value = cpu.msr.xss; return true;
    case ia32_efer: value = cpu.efer; return true;
    case ia32_fmask: value = cpu.msr.sfmask; return true;
    case ia32_tsc_aux: value = cpu.msr.tsc_aux; return true;
    case kvm_wall_clock_old:
    case kvm_wall_clock_new: value = cpu.msr.kvm_wall_clock; return true;
    case kvm_system_time_old:
    case kvm_system_time_new: value = cpu.msr.kvm_system_time; return true;
    case kvm_steal_time: value = cpu.msr.kvm_steal_time; return true;
    case kvm_pv_eoi: value = cpu.msr.kvm_pv_eoi; return true;
    default: return constant(cpu, index, value);
  }
}

bool write_mtrr_variable(Cpu& cpu, uint32_t index, uint64_t value) noexcept {
  const uint64_t too_high = ~uint64_t{0} << cpu.features.physical_bits;
  const bool is_mask = (index & 1) != 0;
  if ((value & too_high) != 0) return false;
  if (is_mask ? (value & 0x7ff) != 0 : (value & 0xf00) != 0 || !memory_type(value & 0xff)) return false;
  cpu.msr.mtrr_variable[index - ia32_mtrr_physbase0] = value;
  return true;
}

// The guest's write moves the TSC by the difference, as the SDM wants (volume 3, 17.17.3).
void write_tsc_adjust(Cpu& cpu, uint64_t value, bool host_initiated) noexcept {
  if (!host_initiated) cpu.platform().set_tsc(cpu.platform().tsc() + (value - cpu.msr.tsc_adjust));
  cpu.msr.tsc_adjust = value;
  if (!host_initiated) update_kvmclock(cpu);
}

void write_tsc(Cpu& cpu, uint64_t value, bool host_initiated) noexcept {
  if (host_initiated) {
    cpu.platform().synchronize_tsc(value);
  } else {
    cpu.msr.tsc_adjust += value - cpu.platform().tsc();
    cpu.platform().set_tsc(value);
  }
  update_kvmclock(cpu);
}

bool write_efer(Cpu& cpu, uint64_t value, bool host_initiated) noexcept {
  if (!host_initiated) return set_efer(cpu, value);
  if ((value & ~(valid_efer(cpu.features) | efer::lma)) != 0) return false;
  cpu.efer = value;
  cpu.flush_tlb(false);
  cpu.state_changed();
  return true;
}

bool write_clock(Cpu& cpu, uint32_t index, uint64_t value) noexcept {
  if (index == kvm_wall_clock_old || index == kvm_wall_clock_new) {
    cpu.msr.kvm_wall_clock = value;
    if (value != 0) write_wall_clock(cpu, value & ~uint64_t{3});
  } else {
    // KVM_SET_CLOCK looks at it from another thread.
    std::atomic_ref(cpu.msr.kvm_system_time).store(value, std::memory_order_relaxed);
    update_kvmclock(cpu);
  }
  return true;
}

bool write_other(Cpu& cpu, uint32_t index, uint64_t value, bool host_initiated) noexcept {
  switch (index) {
    case ia32_tsc: write_tsc(cpu, value, host_initiated); return true;
    case msr_smi_count:
      if (host_initiated) cpu.msr.smi_count = value;
      return host_initiated;
    case ia32_tsc_adjust: write_tsc_adjust(cpu, value, host_initiated); return true;
    case ia32_spec_ctrl:
      if ((value & ~uint64_t{7}) != 0) return false;
      cpu.msr.spec_ctrl = value;
      return true;
    // Commands: a barrier or a flush of what soft does not have.
    case ia32_pred_cmd:
    case ia32_flush_cmd: return (value & ~uint64_t{1}) == 0;
    case ia32_arch_capabilities:
      if (!host_initiated || (value & ~arch_capabilities) != 0) return false;
      cpu.msr.arch_capabilities_hidden = arch_capabilities & ~value;
      return true;
    case ia32_bios_sign_id:
      // The guest writes 0 before it asks for the revision with CPUID.
      if (host_initiated) cpu.msr.bios_sign_id = value;
      return host_initiated || value == 0;
    case ia32_misc_enable: cpu.msr.misc_enable = value; return true;
    case msr_platform_info:
      if (!host_initiated || ((value & MsrState::platform_cpuid_fault) == 0 &&
                              (cpu.msr.misc_features & MsrState::cpuid_fault) != 0))
        return false;
      cpu.msr.platform_info = value;
      return true;
    case misc_features_enables:
      if ((value & ~MsrState::cpuid_fault) != 0 ||
          ((value & MsrState::cpuid_fault) != 0 &&
           (cpu.msr.platform_info & MsrState::platform_cpuid_fault) == 0))
        return false;
      cpu.msr.misc_features = value;
      return true;
    case ia32_debugctl:
      if ((value & ~uint64_t{3}) != 0) return false;
      cpu.msr.debug_ctl = value;
      cpu.state_changed();
      return true;
    case amd_hwcr:
      value &= ~hwcr_ignored;
      if ((value & ~(hwcr::mc_status_write_enable | hwcr::tsc_freq_sel)) != 0) return false;
      cpu.msr.hwcr = value;
      return true;
    case ia32_pat:
      if (!each_byte(value, pat_type)) return false;
      cpu.msr.pat = value;
      return true;
    case ia32_mtrr_def_type:
      if ((value & ~uint64_t{0xcff}) != 0 || !memory_type(value & 0xff)) return false;
      cpu.msr.mtrr_def_type = value;
      return true;
    case ia32_xss: return value == 0;  // no supervisor components are offered
    case ia32_efer: return write_efer(cpu, value, host_initiated);
    case ia32_fmask: cpu.msr.sfmask = value & 0xffff'ffff; return true;
    case ia32_tsc_aux:
      if (value >> 32 != 0) return false;
      cpu.msr.tsc_aux = value;
      return true;
    case kvm_wall_clock_old:
    case kvm_wall_clock_new:
    case kvm_system_time_old:
    case kvm_system_time_new: return write_clock(cpu, index, value);
    case kvm_steal_time:
      if ((value & 0x3e) != 0) return false;
      cpu.platform().paravirt_changing();
      cpu.msr.kvm_steal_time = value;
      cpu.platform().paravirt_changed();
      return true;
    case kvm_pv_eoi:
      if ((value & 2) != 0) return false;
      cpu.platform().paravirt_changing();
      cpu.msr.kvm_pv_eoi = value;
      return true;
    default: {
      uint64_t ignored = 0;
      if (index == ia32_mtrrcap || index == ia32_platform_id || index == ia32_perf_status)
        return host_initiated;
      return constant(cpu, index, ignored);
    }
  }
}

// HWCR.McStatusWrEn lets AMD's guests write what they read from a bank (APM volume 2, 3.2.10).
bool may_write_bank_status(const Cpu& cpu, uint32_t index) noexcept {
  return cpu.features.amd_like && (cpu.msr.hwcr & hwcr::mc_status_write_enable) != 0 &&
         is_machine_check_bank_status(index);
}

constexpr std::array index_list = {
    // EFER first: it decides what others may hold. TSC_ADJUST before the TSC.
    uint32_t{ia32_efer},
    uint32_t{ia32_star},
    uint32_t{ia32_lstar},
    uint32_t{ia32_cstar},
    uint32_t{ia32_fmask},
    uint32_t{ia32_fs_base},
    uint32_t{ia32_gs_base},
    uint32_t{ia32_kernel_gs_base},
    uint32_t{ia32_tsc_aux},
    uint32_t{ia32_sysenter_cs},
    uint32_t{ia32_sysenter_esp},
    uint32_t{ia32_sysenter_eip},
    uint32_t{ia32_pat},
    uint32_t{ia32_mtrr_def_type},
    0x200u,
    0x201u,
    0x202u,
    0x203u,
    0x204u,
    0x205u,
    0x206u,
    0x207u,
    0x208u,
    0x209u,
    0x20au,
    0x20bu,
    0x20cu,
    0x20du,
    0x20eu,
    0x20fu,
    0x250u,
    0x258u,
    0x259u,
    0x268u,
    0x269u,
    0x26au,
    0x26bu,
    0x26cu,
    0x26du,
    0x26eu,
    0x26fu,
    uint32_t{ia32_misc_enable},
    uint32_t{msr_platform_info},
    uint32_t{misc_features_enables},
    uint32_t{ia32_mcg_status},
    uint32_t{ia32_mcg_ctl},
    uint32_t{ia32_spec_ctrl},
    uint32_t{ia32_bios_sign_id},
    uint32_t{ia32_smbase},
    uint32_t{msr_smi_count},
    uint32_t{ia32_debugctl},
    uint32_t{amd_hwcr},
    uint32_t{ia32_xss},
    uint32_t{ia32_tsc_adjust},
    uint32_t{ia32_tsc},
    uint32_t{ia32_tsc_deadline},
    uint32_t{kvm_wall_clock_new},
    uint32_t{kvm_system_time_new},
    uint32_t{kvm_steal_time},
    uint32_t{kvm_pv_eoi},
    uint32_t{ia32_arch_capabilities}};

constexpr std::array feature_list = {uint32_t{ia32_bios_sign_id}, uint32_t{ia32_arch_capabilities},
                                     uint32_t{amd_de_cfg}};

}  // namespace

bool read_msr(Cpu& cpu, uint32_t index, uint64_t& value, bool host_initiated) noexcept {
  if (is_apic(index)) return cpu.platform().read_apic_msr(index, value);
  if (is_machine_check_msr(index))
    return read_machine_check(cpu.msr.machine_check, index, value, host_initiated);
  if (!host_initiated && hidden_from_guest(cpu, index)) return false;
  if (index >= ia32_mtrr_physbase0 && index < mtrr_variable_end) {
    value = cpu.msr.mtrr_variable[index - ia32_mtrr_physbase0];
    return true;
  }
  for (uint64_t* const home : {fixed_mtrr(cpu, index), plain(cpu, index), address(cpu, index)}) {
    if (home != nullptr) {
      value = *home;
      return true;
    }
  }
  return read_other(cpu, index, value);
}

bool write_msr(Cpu& cpu, uint32_t index, uint64_t value, bool host_initiated) noexcept {
  if (is_apic(index)) return cpu.platform().write_apic_msr(index, value, host_initiated);
  if (is_machine_check_msr(index))
    return write_machine_check(cpu.msr.machine_check, index, value,
                               host_initiated || may_write_bank_status(cpu, index));
  if (!host_initiated && !announced(cpu, index)) return false;
  if (index >= ia32_mtrr_physbase0 && index < mtrr_variable_end)
    return write_mtrr_variable(cpu, index, value);
  if (uint64_t* const home = fixed_mtrr(cpu, index)) {
    if (!each_byte(value, memory_type)) return false;
    *home = value;
    return true;
  }
  if (uint64_t* const home = plain(cpu, index)) {
    *home = value;
    return true;
  }
  if (uint64_t* const home = address(cpu, index)) {
    if (!cpu.canonical(value)) return false;
    *home = value;
    return true;
  }
  return write_other(cpu, index, value, host_initiated);
}

bool knows_msr(Cpu& cpu, uint32_t index) noexcept {
  uint64_t ignored = 0;
  return is_apic(index) || index == ia32_pred_cmd || index == ia32_flush_cmd ||
         read_msr(cpu, index, ignored, true);
}

std::span<const uint32_t> msr_index_list() noexcept {
  return index_list;
}
std::span<const uint32_t> msr_feature_index_list() noexcept {
  return feature_list;
}

bool read_feature_msr(uint32_t index, uint64_t& value) noexcept {
  switch (index) {
    case ia32_bios_sign_id: value = default_revision; return true;
    case ia32_arch_capabilities: value = arch_capabilities; return true;
    case amd_de_cfg: value = de_cfg_lfence_serializing; return true;
    default: return false;
  }
}

}  // namespace lodge::kvm::soft
