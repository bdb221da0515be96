// Power-up, INIT and SIPI. SDM volume 3, table 9-1 and section 8.4.
#include <atomic>

#include "kvm/soft/cpu/control.hpp"
#include "kvm/soft/cpu/events.hpp"

namespace lodge::kvm::soft {
namespace {

Segment reset_segment(uint16_t attributes) noexcept {
  Segment out;
  out.limit = 0xffff;
  out.attributes = attributes;
  return out;
}

// What power-up and INIT have in common.
void reset_common(Cpu& cpu, uint64_t kept_cr0) noexcept {
  cpu.gpr.fill(0);
  // Family, model and stepping, as CPUID tells them.
  cpu.gpr[rdx] = cpu.features.query(1, 0).eax;
  cpu.rip = 0xfff0;
  cpu.system_flags = flag::fixed;
  cpu.set_arith(0);
  for (Segment& segment : cpu.segment) segment = reset_segment(0x93);
  cpu.segment[seg_none] = Segment{};
  Segment& cs = cpu.segment[seg_cs];
  cs = reset_segment(0x9b);
  cs.selector = 0xf000;
  cs.base = 0xffff'0000;
  cpu.ldtr = reset_segment(0x82);
  cpu.tr = reset_segment(0x8b);
  cpu.gdtr = cpu.idtr = {.base = 0, .limit = 0xffff};
  cpu.cr0 = cr0::et | kept_cr0;
  cpu.cr2 = cpu.cr3 = cpu.cr4 = cpu.efer = 0;
  cpu.pdptr.fill(0);
  cpu.dr.fill(0);
  cpu.dr6 = 0xffff'0ff0;
  cpu.dr7 = 0x400;
  cpu.cr8 = 0;
  cpu.pending = {};
  cpu.interrupt_shadow = cpu.shadow_is_mov_ss = false;
  cpu.nmi_blocked = cpu.halted = cpu.wants_exit = false;
  cpu.nmi_blocked_before_smm = false;
  if (cpu.smm) cpu.set_smm(false);
}

void reset_vector(VectorState& vector) noexcept {
  vector = VectorState{};
  // FCW 0x40 after power-up (FNINIT makes it 0x37f), all tags empty (abridged: 0), MXCSR 0x1f80.
  vector.fx[0] = 0x40;
  vector.fx[24] = 0x80;
  vector.fx[25] = 0x1f;
}

}  // namespace

void reset_cpu(Cpu& cpu, bool init) noexcept {
  if (init) {
    reset_common(cpu, cpu.cr0 & (cr0::cd | cr0::nw));
    // Whoever sends INIT may use the memory for something else (a kernel that was started by another one).
    std::atomic_ref(cpu.msr.kvm_system_time).store(0, std::memory_order_relaxed);  // read by KVM_SET_CLOCK
    cpu.msr.kvm_steal_time = cpu.msr.kvm_pv_eoi = 0;
  } else {
    reset_common(cpu, cr0::cd | cr0::nw);
    cpu.xcr0 = 1;
    cpu.msr = MsrState{};
    reset_vector(cpu.vector);
  }
  cpu.set_cpl(0);
  cpu.flush_tlb(false);
  cpu.state_changed();
}

void start_at_sipi(Cpu& cpu, uint8_t vector) noexcept {
  Segment& cs = cpu.segment[seg_cs];
  cs.selector = static_cast<uint16_t>(vector << 8);
  cs.base = uint64_t{vector} << 12;
  cpu.rip = 0;
  cpu.halted = false;
  cpu.state_changed();
}

}  // namespace lodge::kvm::soft
