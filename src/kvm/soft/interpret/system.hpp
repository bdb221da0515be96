// The system instructions, by file. Handlers of the family; decode_system() chooses among them.
#pragma once

#include "kvm/soft/interpret/op.hpp"

namespace lodge::kvm::soft::system {

// The end of an instruction that ends its block: RIP moves on.
inline Step end_block(Cpu& cpu, const Op& op) noexcept {
  cpu.rip = cpu.next_rip(op);
  return Step::branch;
}
inline Step general_protection(Cpu& cpu) noexcept {
  cpu.raise(Exception::gp, 0);
  return Step::fault;
}
inline bool real_or_v86(const Cpu& cpu) noexcept {
  return !cpu.protected_mode() || cpu.v86();
}
inline unsigned iopl(const Cpu& cpu) noexcept {
  return static_cast<unsigned>(cpu.system_flags >> 12 & 3);
}
// EDX:EAX, and a 64-bit value into it (upper halves cleared).
inline uint64_t edx_eax(const Cpu& cpu) noexcept {
  return cpu.gpr[rdx] << 32 | (cpu.gpr[rax] & 0xffff'ffff);
}
inline void set_edx_eax(Cpu& cpu, uint64_t value) noexcept {
  cpu.gpr[rax] = value & 0xffff'ffff;
  cpu.gpr[rdx] = value >> 32;
}
// A 16-bit operand in a register (`op.src`) or in memory.
bool load16(Cpu& cpu, const Op& op, uint16_t& value) noexcept;

// system_control.cpp: control, debug and model-specific registers, the TLB.
Step mov_from_cr(Cpu&, const Op&) noexcept;
Step mov_to_cr(Cpu&, const Op&) noexcept;
Step mov_from_dr(Cpu&, const Op&) noexcept;
Step mov_to_dr(Cpu&, const Op&) noexcept;
Step clts(Cpu&, const Op&) noexcept;
Step lmsw(Cpu&, const Op&) noexcept;
Step smsw(Cpu&, const Op&) noexcept;
Step rdmsr(Cpu&, const Op&) noexcept;
Step wrmsr(Cpu&, const Op&) noexcept;
Step xgetbv(Cpu&, const Op&) noexcept;
Step xsetbv(Cpu&, const Op&) noexcept;
Step rdpkru(Cpu&, const Op&) noexcept;
Step wrpkru(Cpu&, const Op&) noexcept;
Step invlpg(Cpu&, const Op&) noexcept;
Step invpcid(Cpu&, const Op&) noexcept;
Step invd(Cpu&, const Op&) noexcept;

// system_table.cpp: descriptor tables and what inspects descriptors.
Step lgdt(Cpu&, const Op&) noexcept;
Step lidt(Cpu&, const Op&) noexcept;
Step sgdt(Cpu&, const Op&) noexcept;
Step sidt(Cpu&, const Op&) noexcept;
Step lldt(Cpu&, const Op&) noexcept;
Step sldt(Cpu&, const Op&) noexcept;
Step ltr(Cpu&, const Op&) noexcept;
Step str(Cpu&, const Op&) noexcept;
Step lar(Cpu&, const Op&) noexcept;
Step lsl(Cpu&, const Op&) noexcept;
Step verr(Cpu&, const Op&) noexcept;
Step verw(Cpu&, const Op&) noexcept;
Step arpl(Cpu&, const Op&) noexcept;

// system_segment.cpp: segment registers and far transfers.
Step mov_from_segment(Cpu&, const Op&) noexcept;
Step mov_to_segment(Cpu&, const Op&) noexcept;
Step push_segment(Cpu&, const Op&) noexcept;
Step pop_segment(Cpu&, const Op&) noexcept;
Step load_far_pointer(Cpu&, const Op&) noexcept;
Step jump_far(Cpu&, const Op&) noexcept;
Step jump_far_memory(Cpu&, const Op&) noexcept;
Step call_far(Cpu&, const Op&) noexcept;
Step call_far_memory(Cpu&, const Op&) noexcept;
Step return_far(Cpu&, const Op&) noexcept;
Step iret(Cpu&, const Op&) noexcept;
Step int_n(Cpu&, const Op&) noexcept;
Step int3(Cpu&, const Op&) noexcept;
Step int1(Cpu&, const Op&) noexcept;
Step into(Cpu&, const Op&) noexcept;
Step rdfsbase(Cpu&, const Op&) noexcept;
Step rdgsbase(Cpu&, const Op&) noexcept;
Step wrfsbase(Cpu&, const Op&) noexcept;
Step wrgsbase(Cpu&, const Op&) noexcept;
Step swapgs(Cpu&, const Op&) noexcept;

// system_call.cpp: SYSCALL, SYSENTER and their returns; hypercalls.
Step syscall(Cpu&, const Op&) noexcept;
Step sysret(Cpu&, const Op&) noexcept;
Step sysenter(Cpu&, const Op&) noexcept;
Step sysexit(Cpu&, const Op&) noexcept;
Step vmcall(Cpu&, const Op&) noexcept;
Step vmmcall(Cpu&, const Op&) noexcept;

// system_flag.cpp: interrupt flag, PUSHF and POPF, HLT, RSM.
Step cli(Cpu&, const Op&) noexcept;
Step sti(Cpu&, const Op&) noexcept;
Step pushf(Cpu&, const Op&) noexcept;
Step popf(Cpu&, const Op&) noexcept;
Step stac(Cpu&, const Op&) noexcept;
Step clac(Cpu&, const Op&) noexcept;
Step hlt(Cpu&, const Op&) noexcept;
Step monitor(Cpu&, const Op&) noexcept;
Step mwait(Cpu&, const Op&) noexcept;
Step monitorx(Cpu&, const Op&) noexcept;
Step mwaitx(Cpu&, const Op&) noexcept;
Step rsm(Cpu&, const Op&) noexcept;

// system_misc.cpp: identification, time, random numbers, caches and fences.
Step cpuid_instruction(Cpu&, const Op&) noexcept;
Step rdtsc(Cpu&, const Op&) noexcept;
Step rdtscp(Cpu&, const Op&) noexcept;
Step rdpmc(Cpu&, const Op&) noexcept;
Step rdpid(Cpu&, const Op&) noexcept;
Step rdrand(Cpu&, const Op&) noexcept;
Step rdseed(Cpu&, const Op&) noexcept;
Step nop(Cpu&, const Op&) noexcept;
Step pause(Cpu&, const Op&) noexcept;
Step mfence(Cpu&, const Op&) noexcept;
Step clflush(Cpu&, const Op&) noexcept;
Step clzero(Cpu&, const Op&) noexcept;
Step serialize(Cpu&, const Op&) noexcept;

}  // namespace lodge::kvm::soft::system
