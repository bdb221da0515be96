// The interrupt flag and what virtual-8086 mode (VME) and protected-mode virtual interrupts (PVI) make of it.
// SDM volume 3, chapter 20; volume 2, CLI, STI, PUSHF, POPF. HLT and its relatives, RSM.
#include <ctime>

#include "kvm/soft/cpu/platform.hpp"
#include "kvm/soft/cpu/smm.hpp"
#include "kvm/soft/interpret/system.hpp"

namespace lodge::kvm::soft::system {
namespace {

enum class Access : uint8_t { real, virtualized, denied };  // to IF itself, to VIF in its place, to none

Access interrupt_flag(const Cpu& cpu) noexcept {
  if (!cpu.protected_mode()) return Access::real;
  if (cpu.v86()) {
    if (iopl(cpu) == 3) return Access::real;
    return (cpu.cr4 & cr4::vme) != 0 ? Access::virtualized : Access::denied;
  }
  if (cpu.cpl() <= iopl(cpu)) return Access::real;
  return cpu.cpl() == 3 && (cpu.cr4 & cr4::pvi) != 0 ? Access::virtualized : Access::denied;
}

// POPF in virtual-8086 mode with IOPL below 3: IF means VIF.
Step popf_vme(Cpu& cpu, const Op& op, uint64_t popped, uint64_t sp) noexcept {
  const uint64_t flags = cpu.rflags();
  const bool wants_if = (popped & flag::if_) != 0;
  if ((popped & flag::tf) != 0 || (wants_if && (flags & flag::vip) != 0)) {
    cpu.gpr[rsp] = sp;
    return general_protection(cpu);
  }
  constexpr uint64_t mask = flag::arithmetic | flag::df | flag::nt | flag::tf;
  const uint64_t merged = (flags & ~(mask | flag::vif)) | (popped & mask) | (wants_if ? flag::vif : 0);
  cpu.set_rflags(merged);
  return end_block(cpu, op);
}

uint64_t popf_mask(const Cpu& cpu, unsigned size) noexcept {
  uint64_t mask = flag::arithmetic | flag::tf | flag::df | flag::nt;
  if (size > 2) mask |= flag::ac | flag::id | flag::rf;
  if (!cpu.protected_mode() || cpu.cpl() == 0) mask |= flag::iopl;
  if (!cpu.protected_mode() || cpu.cpl() <= iopl(cpu)) mask |= flag::if_;
  return mask;
}

// Monitored memory is not watched: MWAIT may end for any reason, and does so at once. CPUID hides the pair
// unless the VMM offers it.
Step monitor_address(Cpu& cpu, const Op& op) noexcept {
  if (static_cast<uint32_t>(cpu.gpr[rcx]) != 0) return general_protection(cpu);
  uint64_t address = 0, offset = cpu.gpr[rax];
  if (op.address_size < 8) offset &= op.address_size == 4 ? 0xffff'ffff : 0xffff;
  uint8_t byte = 0;
  const auto name = op.segment < seg_none ? static_cast<SegmentName>(op.segment) : seg_ds;
  return cpu.linear(name, offset, 1, false, address) && cpu.read(address, byte) ? Step::next : Step::fault;
}

// A nap in place of watching: short against what a waker expects, long against the interpreter's own work, so
// that an idle loop of MWAIT costs little. A signal to the vCPU's thread ends it.
Step wait(Cpu& cpu, const Op& op) noexcept {
  if ((static_cast<uint32_t>(cpu.gpr[rcx]) & ~3u) != 0) return general_protection(cpu);
  constexpr timespec nap{.tv_sec = 0, .tv_nsec = 50'000};
  if (cpu.request.load(std::memory_order_relaxed) == 0) nanosleep(&nap, nullptr);
  return end_block(cpu, op);
}

}  // namespace

Step cli(Cpu& cpu, const Op&) noexcept {
  switch (interrupt_flag(cpu)) {
    case Access::real: cpu.system_flags &= ~flag::if_; return Step::next;
    case Access::virtualized: cpu.system_flags &= ~flag::vif; return Step::next;
    default: return general_protection(cpu);
  }
}

Step sti(Cpu& cpu, const Op& op) noexcept {
  switch (interrupt_flag(cpu)) {
    case Access::real:
      // The shadow only follows a change, or a loop of STI would never be interrupted.
      if ((cpu.system_flags & flag::if_) != 0) return Step::next;
      cpu.interrupt_shadow = true;
      cpu.shadow_is_mov_ss = false;
      cpu.system_flags |= flag::if_;
      return end_block(cpu, op);
    case Access::virtualized:
      if ((cpu.system_flags & flag::vip) != 0) return general_protection(cpu);
      cpu.system_flags |= flag::vif;
      return Step::next;
    default: return general_protection(cpu);
  }
}

Step pushf(Cpu& cpu, const Op& op) noexcept {
  uint64_t flags = cpu.rflags() & ~(flag::vm | flag::rf);
  if (cpu.v86() && iopl(cpu) < 3) {
    if ((cpu.cr4 & cr4::vme) == 0 || op.size != 2) return general_protection(cpu);
    flags |= flag::iopl;
    flags = (flags & flag::vif) != 0 ? flags | flag::if_ : flags & ~flag::if_;
  }
  return cpu.push(flags, op.size) ? Step::next : Step::fault;
}

Step popf(Cpu& cpu, const Op& op) noexcept {
  const bool vme = cpu.v86() && iopl(cpu) < 3;
  if (vme && ((cpu.cr4 & cr4::vme) == 0 || op.size != 2)) return general_protection(cpu);
  const uint64_t sp = cpu.gpr[rsp];
  uint64_t popped = 0;
  if (!cpu.pop(popped, op.size)) return Step::fault;
  if (vme) return popf_vme(cpu, op, popped, sp);
  const uint64_t before = cpu.rflags(), mask = popf_mask(cpu, op.size);
  const uint64_t after = (before & ~mask) | (popped & mask & ~flag::rf);
  cpu.set_rflags(after);
  // The block goes on unless something outside it may change now.
  constexpr uint64_t steering = flag::tf | flag::if_ | flag::ac | flag::iopl;
  return ((before ^ after) & steering) == 0 && (after & flag::tf) == 0 ? Step::next : end_block(cpu, op);
}

static Step set_ac(Cpu& cpu, const Op& op, bool on) noexcept {
  if (cpu.cpl() != 0) return undefined_opcode(cpu, op);
  cpu.system_flags = on ? cpu.system_flags | flag::ac : cpu.system_flags & ~flag::ac;
  cpu.state_changed();
  return end_block(cpu, op);
}

Step stac(Cpu& cpu, const Op& op) noexcept {
  return set_ac(cpu, op, true);
}
Step clac(Cpu& cpu, const Op& op) noexcept {
  return set_ac(cpu, op, false);
}

Step hlt(Cpu& cpu, const Op& op) noexcept {
  if (cpu.cpl() != 0) return general_protection(cpu);
  cpu.halted = true;
  return end_block(cpu, op);
}

Step rsm(Cpu& cpu, const Op& op) noexcept {
  if (!cpu.smm) return undefined_opcode(cpu, op);
  if (leave_smm(cpu)) return Step::branch;
  cpu.platform().shutdown();
  return Step::exit;
}

Step monitor(Cpu& cpu, const Op& op) noexcept {
  return cpu.cpl() != 0 ? undefined_opcode(cpu, op) : monitor_address(cpu, op);
}
Step mwait(Cpu& cpu, const Op& op) noexcept {
  return cpu.cpl() != 0 ? undefined_opcode(cpu, op) : wait(cpu, op);
}
Step monitorx(Cpu& cpu, const Op& op) noexcept {
  return monitor_address(cpu, op);
}
Step mwaitx(Cpu& cpu, const Op& op) noexcept {
  return wait(cpu, op);
}

}  // namespace lodge::kvm::soft::system
