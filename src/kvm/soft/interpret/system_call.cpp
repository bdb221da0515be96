#include "kvm/soft/cpu/platform.hpp"
#include "kvm/soft/cpu/segments.hpp"
#include "kvm/soft/interpret/system.hpp"
#include "kvm/soft/mmu/memory_map.hpp"

namespace lodge::kvm::soft::system {
namespace {

Segment flat_segment(uint64_t selector, uint16_t attributes, unsigned dpl) noexcept {
  Segment out;
  out.selector = static_cast<uint16_t>((selector & 0xfffc) | dpl);
  out.limit = 0xffff'ffff;
  out.attributes = static_cast<uint16_t>(attributes | dpl << 5);
  return out;
}

void load_flat(Cpu& cpu, uint64_t cs, uint16_t code, uint64_t ss, unsigned cpl) noexcept {
  cpu.segment[seg_cs] = flat_segment(cs, code, cpl);
  cpu.segment[seg_ss] = flat_segment(ss, flat_data, cpl);
  cpu.set_cpl(cpl);
}

bool syscall_enabled(const Cpu& cpu) noexcept {
  // Intel has the pair in 64-bit mode only.
  return (cpu.efer & efer::sce) != 0 && cpu.protected_mode() &&
         (cpu.features.amd_like || cpu.mode() == Mode::bits64);
}

}  // namespace

Step syscall(Cpu& cpu, const Op& op) noexcept {
  if (!syscall_enabled(cpu)) return undefined_opcode(cpu, op);
  const uint64_t next = cpu.next_rip(op);
  const uint64_t selector = cpu.msr.star >> 32 & 0xffff;
  if (cpu.long_mode()) {
    cpu.gpr[rcx] = next;
    cpu.gpr[r11] = cpu.rflags() & ~flag::rf;
    cpu.rip = cpu.mode() == Mode::bits64 ? cpu.msr.lstar : cpu.msr.cstar;
    cpu.set_rflags((cpu.rflags() & ~(cpu.msr.sfmask | flag::rf)) | flag::fixed);
    load_flat(cpu, selector, flat_code64, selector + 8, 0);
  } else {
    cpu.gpr[rcx] = next;
    cpu.rip = cpu.msr.star & 0xffff'ffff;
    cpu.set_rflags(cpu.rflags() & ~(flag::vm | flag::if_ | flag::rf));
    load_flat(cpu, selector, flat_code32, selector + 8, 0);
  }
  return Step::branch;
}

Step sysret(Cpu& cpu, const Op& op) noexcept {
  if (!syscall_enabled(cpu)) return undefined_opcode(cpu, op);
  if (cpu.cpl() != 0) return general_protection(cpu);
  const uint64_t selector = cpu.msr.star >> 48;
  const bool wide = op.size == 8;
  // Intel faults here, in level 0; AMD after the return.
  if (wide && !cpu.features.amd_like && !cpu.canonical(cpu.gpr[rcx])) return general_protection(cpu);
  const uint64_t target = wide ? cpu.gpr[rcx] : cpu.gpr[rcx] & 0xffff'ffff;
  if (cpu.long_mode()) {
    cpu.set_rflags((cpu.gpr[r11] & 0x3c'7fd7) | flag::fixed);
  } else {
    cpu.set_rflags(cpu.rflags() | flag::if_);
  }
  cpu.rip = target;
  load_flat(cpu, wide ? selector + 16 : selector, wide ? flat_code64 : flat_code32, selector + 8, 3);
  return Step::branch;
}

Step sysenter(Cpu& cpu, const Op& op) noexcept {
  if (cpu.features.amd_like && cpu.long_mode()) return undefined_opcode(cpu, op);
  const uint64_t selector = cpu.msr.sysenter_cs & 0xfffc;
  if (!cpu.protected_mode() || selector == 0) return general_protection(cpu);
  const bool wide = cpu.long_mode();
  cpu.set_rflags(cpu.rflags() & ~(flag::vm | flag::if_ | flag::rf));
  cpu.gpr[rsp] = wide ? cpu.msr.sysenter_esp : cpu.msr.sysenter_esp & 0xffff'ffff;
  cpu.rip = wide ? cpu.msr.sysenter_eip : cpu.msr.sysenter_eip & 0xffff'ffff;
  load_flat(cpu, selector, wide ? flat_code64 : flat_code32, selector + 8, 0);
  return Step::branch;
}

Step sysexit(Cpu& cpu, const Op& op) noexcept {
  if (cpu.features.amd_like && cpu.long_mode()) return undefined_opcode(cpu, op);
  const uint64_t selector = cpu.msr.sysenter_cs & 0xfffc;
  if (!cpu.protected_mode() || selector == 0 || cpu.cpl() != 0) return general_protection(cpu);
  const bool wide = op.size == 8;
  if (wide && (!cpu.canonical(cpu.gpr[rcx]) || !cpu.canonical(cpu.gpr[rdx]))) return general_protection(cpu);
  const uint64_t mask = wide ? ~uint64_t{0} : 0xffff'ffff;
  const uint64_t cs = selector + (wide ? 32 : 16);
  cpu.gpr[rsp] = cpu.gpr[rcx] & mask;
  cpu.rip = cpu.gpr[rdx] & mask;
  load_flat(cpu, cs, wide ? flat_code64 : flat_code32, cs + 8, 3);
  return Step::branch;
}

namespace {

Step hypercall(Cpu& cpu, const Op& op) noexcept {
  constexpr uint64_t not_permitted = ~uint64_t{0};  // -KVM_EPERM
  // Outside 64-bit mode the arguments are 32 bits wide.
  const uint64_t mask = cpu.mode() == Mode::bits64 ? ~uint64_t{0} : 0xffff'ffff;
  uint64_t result = not_permitted;
  if (cpu.cpl() == 0) {
    const uint64_t arguments[4] = {cpu.gpr[rbx] & mask, cpu.gpr[rcx] & mask, cpu.gpr[rdx] & mask,
                                   cpu.gpr[rsi] & mask};
    result = cpu.platform().hypercall(cpu.gpr[rax] & mask, arguments);
  }
  cpu.gpr[rax] = result & mask;
  return end_block(cpu, op);
}

bool is_writable_ram(Cpu& cpu, uint64_t linear) noexcept {
  uint64_t gpa = 0;
  bool writable = false;
  bool user = false;
  if (!cpu.translate_debug(linear, gpa, writable, user) || !writable) return false;
  const Slot* const slot = cpu.memory->find(gpa);
  return slot != nullptr && !slot->read_only;
}

// VMCALL is Intel's instruction, VMMCALL AMD's. The other vendor's is #UD, unless KVM's quirk is on, which
// writes the right one over it where it can and does what was asked for in any case.
Step foreign_hypercall(Cpu& cpu, const Op& op) noexcept {
  if ((cpu.platform().settings().disabled_quirks & VmSettings::quirk_fix_hypercall) != 0)
    return undefined_opcode(cpu, op);
  const bool wide = cpu.mode() == Mode::bits64;
  const uint64_t end =
      wide ? cpu.next_rip(op) : static_cast<uint32_t>(cpu.segment[seg_cs].base + cpu.next_rip(op));
  const uint8_t native = cpu.features.amd_like ? 0xd9 : 0xc1;  // behind 0F 01
  if (cpu.cpl() == 0 && is_writable_ram(cpu, end - 1) && !cpu.write(end - 1, native)) {
    if (!cpu.pending.valid) return Step::fault;  // once more, alone: the code that runs is written to
    cpu.pending.valid = false;
  }
  return hypercall(cpu, op);
}

}  // namespace

Step vmcall(Cpu& cpu, const Op& op) noexcept {
  return cpu.features.amd_like ? foreign_hypercall(cpu, op) : hypercall(cpu, op);
}
Step vmmcall(Cpu& cpu, const Op& op) noexcept {
  return cpu.features.amd_like ? hypercall(cpu, op) : foreign_hypercall(cpu, op);
}

}  // namespace lodge::kvm::soft::system
