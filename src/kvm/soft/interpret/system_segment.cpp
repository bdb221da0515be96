#include "kvm/soft/cpu/deliver.hpp"
#include "kvm/soft/cpu/far.hpp"
#include "kvm/soft/cpu/segments.hpp"
#include "kvm/soft/interpret/system.hpp"

namespace lodge::kvm::soft::system {
namespace {

Step branch_if(bool done) noexcept {
  return done ? Step::branch : Step::fault;
}

// After MOV SS and POP SS one instruction runs undisturbed, to load RSP.
Step after_load(Cpu& cpu, const Op& op, SegmentName name) noexcept {
  if (name == seg_ss) cpu.interrupt_shadow = cpu.shadow_is_mov_ss = true;
  return end_block(cpu, op);
}

// A far pointer in memory: offset of the operand size, then the selector.
bool read_far_pointer(Cpu& cpu, const Op& op, uint16_t& selector, uint64_t& offset) noexcept {
  uint64_t address = 0;
  offset = 0;
  return cpu.linear(op, op.size + 2u, false, address) && cpu.read_bytes(address, &offset, op.size) &&
         cpu.read(address + op.size, selector);
}

bool base_instruction(Cpu& cpu) noexcept {
  return (cpu.cr4 & cr4::fsgsbase) != 0 || cpu.raise(Exception::ud);
}

Step write_base(Cpu& cpu, const Op& op, SegmentName name) noexcept {
  if (!base_instruction(cpu)) return Step::fault;
  const uint64_t value = cpu.get_reg(op.dst, op.size);
  if (!cpu.canonical(value)) return general_protection(cpu);
  cpu.segment[name].base = value;
  return Step::next;
}

Step read_base(Cpu& cpu, const Op& op, SegmentName name) noexcept {
  if (!base_instruction(cpu)) return Step::fault;
  cpu.set_reg(op.dst, op.size, cpu.segment[name].base);
  return Step::next;
}

}  // namespace

Step mov_from_segment(Cpu& cpu, const Op& op) noexcept {
  const uint16_t selector = cpu.segment[op.src].selector;
  if ((op.flags & Op::has_memory) == 0) {
    cpu.set_reg(op.dst, op.size, selector);
    return Step::next;
  }
  uint64_t address = 0;
  return cpu.linear(op, 2, true, address) && cpu.write(address, selector) ? Step::next : Step::fault;
}

Step mov_to_segment(Cpu& cpu, const Op& op) noexcept {
  const auto name = static_cast<SegmentName>(op.dst);
  if (name == seg_cs || name > seg_gs) return undefined_opcode(cpu, op);
  uint16_t selector = 0;
  if (!load16(cpu, op, selector) || !load_data_segment(cpu, name, selector)) return Step::fault;
  return after_load(cpu, op, name);
}

Step push_segment(Cpu& cpu, const Op& op) noexcept {
  return cpu.push(cpu.segment[op.dst].selector, op.size) ? Step::next : Step::fault;
}

Step pop_segment(Cpu& cpu, const Op& op) noexcept {
  const auto name = static_cast<SegmentName>(op.dst);
  const uint64_t sp = cpu.gpr[rsp];
  uint64_t value = 0;
  if (!cpu.pop(value, op.size)) return Step::fault;
  if (!load_data_segment(cpu, name, static_cast<uint16_t>(value))) {
    cpu.gpr[rsp] = sp;
    return Step::fault;
  }
  return after_load(cpu, op, name);
}

Step load_far_pointer(Cpu& cpu, const Op& op) noexcept {
  const auto name = static_cast<SegmentName>(op.src);
  uint16_t selector = 0;
  uint64_t offset = 0;
  if (!read_far_pointer(cpu, op, selector, offset) || !load_data_segment(cpu, name, selector))
    return Step::fault;
  cpu.set_reg(op.dst, op.size, offset);
  // No shadow: LSS loads the pointer in one go.
  return end_block(cpu, op);
}

Step jump_far(Cpu& cpu, const Op& op) noexcept {
  return branch_if(
      far_jump(cpu, static_cast<uint16_t>(op.imm >> 32), op.imm & 0xffff'ffff, op.size, cpu.next_rip(op)));
}

Step jump_far_memory(Cpu& cpu, const Op& op) noexcept {
  uint16_t selector = 0;
  uint64_t offset = 0;
  if (!read_far_pointer(cpu, op, selector, offset)) return Step::fault;
  return branch_if(far_jump(cpu, selector, offset, op.size, cpu.next_rip(op)));
}

Step call_far(Cpu& cpu, const Op& op) noexcept {
  return branch_if(
      far_call(cpu, static_cast<uint16_t>(op.imm >> 32), op.imm & 0xffff'ffff, op.size, cpu.next_rip(op)));
}

Step call_far_memory(Cpu& cpu, const Op& op) noexcept {
  uint16_t selector = 0;
  uint64_t offset = 0;
  if (!read_far_pointer(cpu, op, selector, offset)) return Step::fault;
  return branch_if(far_call(cpu, selector, offset, op.size, cpu.next_rip(op)));
}

Step return_far(Cpu& cpu, const Op& op) noexcept {
  return branch_if(far_return(cpu, op.size, static_cast<uint16_t>(op.imm)));
}

Step iret(Cpu& cpu, const Op& op) noexcept {
  return branch_if(interrupt_return(cpu, op.size, cpu.next_rip(op)));
}

Step int_n(Cpu& cpu, const Op& op) noexcept {
  return branch_if(
      software_interrupt(cpu, static_cast<uint8_t>(op.imm), EventKind::instruction, cpu.next_rip(op)));
}

// Left pending, so that a debugger outside the guest can take it first (KVM_GUESTDBG_USE_SW_BP).
Step int3(Cpu& cpu, const Op& op) noexcept {
  cpu.raise(Exception::bp);
  return end_block(cpu, op);
}

Step int1(Cpu& cpu, const Op& op) noexcept {
  return branch_if(
      software_interrupt(cpu, static_cast<uint8_t>(Exception::db), EventKind::privileged, cpu.next_rip(op)));
}

Step into(Cpu& cpu, const Op& op) noexcept {
  if ((cpu.arith & 1) == 0) return Step::next;
  return branch_if(
      software_interrupt(cpu, static_cast<uint8_t>(Exception::of), EventKind::trap, cpu.next_rip(op)));
}

Step rdfsbase(Cpu& cpu, const Op& op) noexcept {
  return read_base(cpu, op, seg_fs);
}
Step rdgsbase(Cpu& cpu, const Op& op) noexcept {
  return read_base(cpu, op, seg_gs);
}
Step wrfsbase(Cpu& cpu, const Op& op) noexcept {
  return write_base(cpu, op, seg_fs);
}
Step wrgsbase(Cpu& cpu, const Op& op) noexcept {
  return write_base(cpu, op, seg_gs);
}

Step swapgs(Cpu& cpu, const Op&) noexcept {
  if (cpu.cpl() != 0) return general_protection(cpu);
  std::swap(cpu.segment[seg_gs].base, cpu.msr.kernel_gs_base);
  return Step::next;
}

}  // namespace lodge::kvm::soft::system
