#include "kvm/soft/cpu/control.hpp"
#include "kvm/soft/cpu/cpuid_bits.hpp"
#include "kvm/soft/cpu/msr.hpp"
#include "kvm/soft/cpu/platform.hpp"
#include "kvm/soft/interpret/system.hpp"

namespace lodge::kvm::soft::system {
namespace {

// MOV to and from control and debug registers is 64 bits wide in 64-bit mode, 32 elsewhere.
unsigned register_size(const Cpu& cpu) noexcept {
  return cpu.mode() == Mode::bits64 ? 8 : 4;
}

// CR1, CR5 to CR7 and CR9 to CR15 do not exist.
bool known_cr(Cpu& cpu, unsigned number) noexcept {
  const bool known = number == 0 || (number >= 2 && number <= 4) || number == 8;
  return known || cpu.raise(Exception::ud);
}

bool debug_access(Cpu& cpu) noexcept {
  if (cpu.cpl() != 0) return cpu.raise(Exception::gp, 0);
  constexpr uint64_t general_detect = 0x2000;
  return (cpu.active_dr7() & general_detect) == 0 || cpu.raise_debug(general_detect);
}

Step msr_fault(Cpu& cpu, uint32_t index, bool write, uint64_t value, uint32_t reason) noexcept {
  if (cpu.platform().exit_for_msr(index, write, value, reason)) {
    cpu.wants_exit = true;
    return Step::fault;
  }
  return general_protection(cpu);
}

uint32_t refusal(Cpu& cpu, uint32_t index) noexcept {
  return knows_msr(cpu, index) ? KVM_MSR_EXIT_REASON_INVAL : KVM_MSR_EXIT_REASON_UNKNOWN;
}

}  // namespace

Step mov_from_cr(Cpu& cpu, const Op& op) noexcept {
  if (!known_cr(cpu, op.src)) return Step::fault;
  if (cpu.cpl() != 0) return general_protection(cpu);
  uint64_t value = 0;
  switch (op.src) {
    case 0: value = cpu.cr0; break;
    case 2: value = cpu.cr2; break;
    case 3: value = cpu.cr3; break;
    case 4: value = cpu.cr4; break;
    default: value = cpu.platform().tpr(); break;
  }
  cpu.set_reg(op.dst, register_size(cpu), value);
  return Step::next;
}

Step mov_to_cr(Cpu& cpu, const Op& op) noexcept {
  if (!known_cr(cpu, op.dst)) return Step::fault;
  if (cpu.cpl() != 0) return general_protection(cpu);
  const uint64_t value = cpu.get_reg(op.src, register_size(cpu));
  // RIP first: its width is that of the mode before.
  const uint64_t next = cpu.next_rip(op);
  bool accepted = true;
  switch (op.dst) {
    case 0: accepted = set_cr0(cpu, value); break;
    case 2: cpu.cr2 = value; break;
    case 3: accepted = set_cr3(cpu, value); break;
    case 4: accepted = set_cr4(cpu, value); break;
    default: accepted = set_cr8(cpu, value); break;
  }
  if (!accepted) return Step::fault;
  cpu.rip = next;
  return Step::branch;
}

Step mov_from_dr(Cpu& cpu, const Op& op) noexcept {
  uint64_t value = 0;
  if (!debug_access(cpu) || !read_dr(cpu, op.src, value)) return Step::fault;
  cpu.set_reg(op.dst, register_size(cpu), value);
  return Step::next;
}

Step mov_to_dr(Cpu& cpu, const Op& op) noexcept {
  if (!debug_access(cpu)) return Step::fault;
  if (!write_dr(cpu, op.dst, cpu.get_reg(op.src, register_size(cpu)))) return Step::fault;
  return end_block(cpu, op);
}

Step clts(Cpu& cpu, const Op& op) noexcept {
  if (cpu.cpl() != 0) return general_protection(cpu);
  cpu.cr0 &= ~cr0::ts;
  cpu.state_changed();
  return end_block(cpu, op);
}

Step lmsw(Cpu& cpu, const Op& op) noexcept {
  if (cpu.cpl() != 0) return general_protection(cpu);
  uint16_t value = 0;
  if (!load16(cpu, op, value)) return Step::fault;
  const uint64_t next = cpu.next_rip(op);
  // PE can be set, not cleared.
  const uint64_t low = (value & 0xfu) | (cpu.cr0 & cr0::pe);
  if (!set_cr0(cpu, (cpu.cr0 & ~uint64_t{0xf}) | low)) return Step::fault;
  cpu.rip = next;
  return Step::branch;
}

Step smsw(Cpu& cpu, const Op& op) noexcept {
  if (cpu.cpl() != 0 && (cpu.cr4 & cr4::umip) != 0) return general_protection(cpu);
  if ((op.flags & Op::has_memory) == 0) {
    cpu.set_reg(op.dst, op.size, cpu.cr0);
    return Step::next;
  }
  uint64_t address = 0;
  if (!cpu.linear(op, 2, true, address) || !cpu.write(address, static_cast<uint16_t>(cpu.cr0)))
    return Step::fault;
  return Step::next;
}

Step rdmsr(Cpu& cpu, const Op&) noexcept {
  if (cpu.cpl() != 0) return general_protection(cpu);
  const auto index = static_cast<uint32_t>(cpu.gpr[rcx]);
  uint64_t value = 0;
  if (const auto answer = cpu.platform().msr_answer()) {
    if (answer->refused) return general_protection(cpu);
    value = answer->value;
  } else if (!cpu.platform().settings().allows_msr(index, false)) {
    return msr_fault(cpu, index, false, 0, KVM_MSR_EXIT_REASON_FILTER);
  } else if (!read_msr(cpu, index, value, false)) {
    return msr_fault(cpu, index, false, 0, refusal(cpu, index));
  }
  set_edx_eax(cpu, value);
  return Step::next;
}

Step wrmsr(Cpu& cpu, const Op& op) noexcept {
  if (cpu.cpl() != 0) return general_protection(cpu);
  const auto index = static_cast<uint32_t>(cpu.gpr[rcx]);
  const uint64_t value = edx_eax(cpu);
  if (const auto answer = cpu.platform().msr_answer()) {
    if (answer->refused) return general_protection(cpu);
  } else if (!cpu.platform().settings().allows_msr(index, true)) {
    return msr_fault(cpu, index, true, value, KVM_MSR_EXIT_REASON_FILTER);
  } else if (!write_msr(cpu, index, value, false)) {
    return msr_fault(cpu, index, true, value, refusal(cpu, index));
  }
  return end_block(cpu, op);
}

Step xgetbv(Cpu& cpu, const Op&) noexcept {
  if ((cpu.cr4 & cr4::osxsave) == 0) {
    cpu.raise(Exception::ud);
    return Step::fault;
  }
  const auto index = static_cast<uint32_t>(cpu.gpr[rcx]);
  // Index 1: XCR0 and the components in use. A component may always count as in use.
  const bool in_use = index == 1 && (cpu.features.leaf_d_1_eax & cpuid_d_1_eax::xgetbv1) != 0;
  if (index != 0 && !in_use) return general_protection(cpu);
  set_edx_eax(cpu, cpu.xcr0);
  return Step::next;
}

Step xsetbv(Cpu& cpu, const Op& op) noexcept {
  if ((cpu.cr4 & cr4::osxsave) == 0) {
    cpu.raise(Exception::ud);
    return Step::fault;
  }
  if (cpu.cpl() != 0 || static_cast<uint32_t>(cpu.gpr[rcx]) != 0) return general_protection(cpu);
  if (!set_xcr0(cpu, edx_eax(cpu))) return Step::fault;
  return end_block(cpu, op);
}

Step rdpkru(Cpu& cpu, const Op&) noexcept {
  if ((cpu.cr4 & cr4::pke) == 0) {
    cpu.raise(Exception::ud);
    return Step::fault;
  }
  if (static_cast<uint32_t>(cpu.gpr[rcx]) != 0) return general_protection(cpu);
  set_edx_eax(cpu, cpu.vector.pkru);
  return Step::next;
}

Step wrpkru(Cpu& cpu, const Op& op) noexcept {
  if ((cpu.cr4 & cr4::pke) == 0) {
    cpu.raise(Exception::ud);
    return Step::fault;
  }
  if (static_cast<uint32_t>(cpu.gpr[rcx]) != 0 || static_cast<uint32_t>(cpu.gpr[rdx]) != 0) {
    return general_protection(cpu);
  }
  cpu.vector.pkru = static_cast<uint32_t>(cpu.gpr[rax]);
  cpu.flush_tlb(false);
  return end_block(cpu, op);
}

Step invlpg(Cpu& cpu, const Op& op) noexcept {
  if (cpu.cpl() != 0) return general_protection(cpu);
  // No limit check, and a non-canonical address is a NOP.
  uint64_t address = cpu.effective_address(op);
  const bool based = cpu.mode() != Mode::bits64 || op.segment == seg_fs || op.segment == seg_gs;
  if (based) address += cpu.segment[op.segment].base;
  if (cpu.mode() != Mode::bits64) address &= 0xffff'ffff;
  if (cpu.canonical(address)) cpu.flush_page(address);
  return end_block(cpu, op);
}

Step invpcid(Cpu& cpu, const Op& op) noexcept {
  if (cpu.cpl() != 0) return general_protection(cpu);
  const uint64_t type = cpu.get_reg(op.dst, register_size(cpu));
  uint64_t address = 0;
  std::array<uint64_t, 2> descriptor{};  // PCID, linear address
  if (!cpu.linear(op, 16, false, address) || !cpu.read(address, descriptor)) return Step::fault;
  if (type > 3 || descriptor[0] >> 12 != 0) return general_protection(cpu);
  if (type <= 1 && (cpu.cr4 & cr4::pcide) == 0 && descriptor[0] != 0) return general_protection(cpu);
  if (type == 0 && !cpu.canonical(descriptor[1])) return general_protection(cpu);
  // The TLB knows only the present PCID's translations: those of another one are gone since the last MOV
  // to CR3. Types: 0 one address, 1 one PCID, 2 everything, 3 everything but global pages.
  if (type == 0) {
    cpu.flush_page(descriptor[1]);
  } else {
    cpu.flush_tlb(type != 2);
  }
  return end_block(cpu, op);
}

Step invd(Cpu& cpu, const Op&) noexcept {
  return cpu.cpl() != 0 ? general_protection(cpu) : Step::next;
}

}  // namespace lodge::kvm::soft::system
