// The architectural state of one soft vCPU: everything the manuals define, in plain fields. Intel SDM volume
// 3, chapters 2, 3 and 17; AMD APM volume 2, chapters 1 to 4.
#pragma once

#include <array>
#include <cstdint>

#include "kvm/soft/cpu/machine_check.hpp"

namespace lodge::kvm::soft {

enum GprName : uint8_t { rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15 };
// Two more slots of the register file make address computation uniform (Op::base, Op::index).
inline constexpr uint8_t gpr_rip = 16;   // RIP at the running block's entry
inline constexpr uint8_t gpr_zero = 17;  // always 0

enum SegmentName : uint8_t { seg_es, seg_cs, seg_ss, seg_ds, seg_fs, seg_gs, seg_none };

// A segment register with its hidden part. seg_none is a flat pseudo segment with base 0.
struct Segment {
  uint64_t base = 0;
  uint32_t limit = 0;  // in bytes, granularity applied
  uint16_t selector = 0;
  uint16_t attributes = 0;  // descriptor bits 40-47 (bits 0-7 here) and 52-55 (bits 12-15 here)

  static constexpr uint16_t type_mask = 0xf, non_system = 0x10, present_bit = 0x80, available = 0x1000,
                            long_bit = 0x2000, big_bit = 0x4000, granular_bit = 0x8000;
  unsigned type() const { return attributes & type_mask; }
  bool system() const { return (attributes & non_system) == 0; }
  unsigned dpl() const { return attributes >> 5 & 3; }
  bool present() const { return (attributes & present_bit) != 0; }
  bool is_long() const { return (attributes & long_bit) != 0; }
  bool big() const { return (attributes & big_bit) != 0; }
  bool code() const { return (attributes & 0x18) == 0x18; }
  bool conforming() const { return (attributes & 0x1c) == 0x1c; }
  bool expand_down() const { return (attributes & 0x1c) == 0x14; }
  bool writable() const { return (attributes & 0x1a) == 0x12; }
  bool readable() const { return (attributes & 0x18) == 0x10 || (attributes & 0x1a) == 0x1a; }
};

struct DescriptorTable {
  uint64_t base = 0;
  uint16_t limit = 0;
};

// Bits of RFLAGS.
namespace flag {
inline constexpr uint64_t cf = 1, fixed = 2, pf = 4, af = 0x10, zf = 0x40, sf = 0x80, tf = 0x100, if_ = 0x200,
                          df = 0x400, of = 0x800, iopl = 0x3000, nt = 0x4000, rf = 0x10000, vm = 0x20000,
                          ac = 0x40000, vif = 0x80000, vip = 0x100000, id = 0x200000;
inline constexpr uint64_t arithmetic = cf | pf | af | zf | sf | of;
inline constexpr uint64_t valid = arithmetic | tf | if_ | df | iopl | nt | rf | vm | ac | vif | vip | id;
}  // namespace flag

namespace cr0 {
inline constexpr uint64_t pe = 1, mp = 2, em = 4, ts = 8, et = 0x10, ne = 0x20, wp = 0x10000, am = 0x40000,
                          nw = 0x2000'0000, cd = 0x4000'0000, pg = 0x8000'0000;
}
namespace cr4 {
inline constexpr uint64_t vme = 1, pvi = 2, tsd = 4, de = 8, pse = 0x10, pae = 0x20, mce = 0x40, pge = 0x80,
                          pce = 0x100, osfxsr = 0x200, osxmmexcpt = 0x400, umip = 0x800, la57 = 0x1000,
                          fsgsbase = 0x10000, pcide = 0x20000, osxsave = 0x40000, smep = 0x10'0000,
                          smap = 0x20'0000, pke = 0x40'0000;
}
namespace efer {
inline constexpr uint64_t sce = 1, lme = 0x100, lma = 0x400, nxe = 0x800, ffxsr = 0x4000,
                          autoibrs = 0x20'0000;
}

// x87, SSE, AVX, AVX-512 and protection keys. `fx` is in FXSAVE64 layout and is the home of x87/MMX (ST/MM,
// FCW, FSW, FTW abridged, FOP, FIP, FDP) and of MXCSR; its XMM area is unused: vector registers live in zmm.
struct alignas(64) VectorState {
  std::array<std::array<uint8_t, 64>, 32> zmm{};
  std::array<uint64_t, 8> k{};
  alignas(64) std::array<uint8_t, 512> fx{};
  uint32_t pkru = 0;
};

// AMD's hardware configuration register.
namespace hwcr {
inline constexpr uint64_t mc_status_write_enable = 1u << 18, tsc_freq_sel = 1u << 24;
}

// MSRs that have no other home.
struct MsrState {
  MachineCheck machine_check;
  uint64_t star = 0, lstar = 0, cstar = 0, sfmask = 0, kernel_gs_base = 0;
  uint64_t sysenter_cs = 0, sysenter_esp = 0, sysenter_eip = 0;
  uint64_t pat = 0x0007'0406'0007'0406;
  uint64_t tsc_aux = 0, misc_enable = 1, mtrr_def_type = 0, spec_ctrl = 0, xss = 0, tsc_adjust = 0;
  uint64_t bios_sign_id = 0, debug_ctl = 0, umwait_control = 0;
  std::array<uint64_t, 11> mtrr_fixed{};
  std::array<uint64_t, 16> mtrr_variable{};
  uint64_t kvm_wall_clock = 0, kvm_system_time = 0, kvm_async_pf_en = 0, kvm_steal_time = 0, kvm_pv_eoi = 0,
           kvm_poll_control = 1, kvm_async_pf_int = 0, kvm_migration_control = 0;
  uint64_t smbase = 0x30000, smi_count = 0;
  static constexpr uint64_t platform_cpuid_fault = uint64_t{1} << 31, cpuid_fault = 1;
  uint64_t platform_info = platform_cpuid_fault;  // MSR_PLATFORM_INFO: CPUID faulting is there
  uint64_t misc_features = 0;                     // MISC_FEATURES_ENABLES: CPUID faults outside of CPL 0
  uint64_t hwcr = 0;
  uint64_t arch_capabilities_hidden = 0;  // bits of IA32_ARCH_CAPABILITIES that the VMM has taken away
};

struct CpuState {
  std::array<uint64_t, 18> gpr{};  // [gpr_rip], [gpr_zero]: see above
  uint64_t rip = 0;                // valid between blocks; inside a block: gpr[gpr_rip] + Op::offset
  // Arithmetic flags as LAHF and SETO give them: bits 8-15 SF ZF 0 AF 0 PF 1 CF, bits 0-7 OF (0 or 1).
  uint16_t arith = 0x0200;
  uint64_t system_flags = flag::fixed;  // all of RFLAGS but the arithmetic flags

  std::array<Segment, 7> segment{};  // by SegmentName
  Segment ldtr, tr;
  DescriptorTable gdtr, idtr;
  uint64_t cr0 = cr0::et | cr0::cd | cr0::nw, cr2 = 0, cr3 = 0, cr4 = 0, efer = 0, xcr0 = 1;
  uint8_t cr8 = 0;  // used only without in-accelerator LAPIC, which is TPR's home otherwise
  std::array<uint64_t, 4> dr{};
  uint64_t dr6 = 0xffff0ff0, dr7 = 0x400;
  MsrState msr;
  VectorState vector;
};

}  // namespace lodge::kvm::soft
