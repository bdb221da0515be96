// The stack and near branches, where the hot handlers do not apply.
#include "kvm/soft/interpret/integer_operands.hpp"

namespace lodge::kvm::soft::integer {

// --- stack
// ----------------------------------------------------------------------------------------------------------

Step push_register(Cpu& cpu, const Op& op) noexcept {
  return done(cpu.push(cpu.get_reg(op.dst, op.size), op.size));
}
Step push_immediate(Cpu& cpu, const Op& op) noexcept {
  return done(cpu.push(op.imm, op.size));
}

Step push_memory(Cpu& cpu, const Op& op) noexcept {
  uint64_t value = 0;
  return done(load_destination(cpu, op, op.size, value) && cpu.push(value, op.size));
}

Step pop_register(Cpu& cpu, const Op& op) noexcept {
  uint64_t value = 0;
  if (!cpu.pop(value, op.size)) return Step::fault;
  cpu.set_reg(op.dst, op.size, value);
  return Step::next;
}

// The address is computed with the incremented RSP.
Step pop_memory(Cpu& cpu, const Op& op) noexcept {
  const uint64_t old = cpu.gpr[rsp];
  uint64_t value = 0;
  if (!cpu.pop(value, op.size)) return Step::fault;
  if (store_destination(cpu, op, op.size, value)) return Step::next;
  cpu.gpr[rsp] = old;
  return Step::fault;
}

// PUSHA and POPA: all eight or none.
Step pusha(Cpu& cpu, const Op& op) noexcept {
  const uint64_t old = cpu.gpr[rsp];
  for (uint8_t i = 0; i < 8; ++i)
    if (!cpu.push(i == rsp ? old : cpu.gpr[i], op.size)) {
      cpu.gpr[rsp] = old;
      return Step::fault;
    }
  return Step::next;
}

Step popa(Cpu& cpu, const Op& op) noexcept {
  const uint64_t old = cpu.gpr[rsp];
  uint64_t values[8];
  for (unsigned i = 8; i-- > 0;)
    if (!cpu.pop(values[i], op.size)) {
      cpu.gpr[rsp] = old;
      return Step::fault;
    }
  for (uint8_t i = 0; i < 8; ++i)
    if (i != rsp) cpu.set_reg(i * 8, op.size, values[i]);
  return Step::next;
}

// imm: frame size, nesting level in bits 16-20.
Step enter(Cpu& cpu, const Op& op) noexcept {
  const uint64_t old_sp = cpu.gpr[rsp];
  const uint64_t frame_size = op.imm & 0xffff;
  const unsigned level = op.imm >> 16 & 31;
  const auto fail = [&] {
    cpu.gpr[rsp] = old_sp;
    return Step::fault;
  };
  if (!cpu.push(cpu.gpr[rbp], op.size)) return fail();
  const uint64_t frame = cpu.gpr[rsp];
  for (unsigned i = 1; i < level; ++i) {
    uint64_t lin = 0;
    const uint64_t from = (cpu.gpr[rbp] - uint64_t{i} * op.size) & cpu.stack_mask();
    if (!cpu.linear(seg_ss, from, op.size, false, lin) || !cpu.load_slow(lin, op.size)) return fail();
    if (!cpu.push(cpu.scratch, op.size)) return fail();
  }
  if (level > 0 && !cpu.push(frame, op.size)) return fail();
  const uint64_t top = cpu.gpr[rsp] - frame_size;
  // The new top of stack must be writable (SDM volume 2, ENTER).
  uint64_t lin = 0;
  if (!cpu.linear(seg_ss, top & cpu.stack_mask(), op.size, true, lin) || !cpu.probe_write(lin, 1))
    return fail();
  cpu.set_reg(rbp * 8, op.size, frame);
  cpu.set_stack_pointer(top);
  return Step::next;
}

Step leave_frame(Cpu& cpu, const Op& op) noexcept {
  const uint64_t old = cpu.gpr[rsp];
  cpu.set_stack_pointer(cpu.gpr[rbp]);
  uint64_t value = 0;
  if (!cpu.pop(value, op.size)) {
    cpu.gpr[rsp] = old;
    return Step::fault;
  }
  cpu.set_reg(rbp * 8, op.size, value);
  return Step::next;
}

// --- near branches
// --------------------------------------------------------------------------------------------------

namespace {
// False (with #GP(0)) when a near branch would leave CS.
bool branch_to(Cpu& cpu, uint64_t target, unsigned size) noexcept {
  target = cpu.truncate_branch(target, size);
  if (cpu.mode() == Mode::bits64 ? !cpu.canonical(target) : target > cpu.segment[seg_cs].limit)
    return cpu.raise(Exception::gp, 0);
  cpu.rip = target;
  return true;
}
Step branched(bool ok) noexcept {
  return ok ? Step::branch : Step::fault;
}

// The target is judged before the return address is written, but after its place is found to be writable.
Step call(Cpu& cpu, const Op& op, uint64_t target) noexcept {
  const uint64_t old = cpu.rip;
  if (!branch_to(cpu, target, op.size)) {
    uint64_t place = 0;
    const uint64_t top = (cpu.gpr[rsp] - op.size) & cpu.stack_mask();
    if (cpu.linear(seg_ss, top, op.size, true, place) && check_alignment(cpu, place, op.size) &&
        cpu.probe_write(place, op.size))
      cpu.raise(Exception::gp, 0);
    return Step::fault;
  }
  if (cpu.push(cpu.next_rip(op), op.size)) return Step::branch;
  cpu.rip = old;
  return Step::fault;
}
}  // namespace

Step jmp_indirect(Cpu& cpu, const Op& op) noexcept {
  uint64_t target = 0;
  return branched(load_destination(cpu, op, op.size, target) && branch_to(cpu, target, op.size));
}

Step call_indirect(Cpu& cpu, const Op& op) noexcept {
  uint64_t target = 0;
  if (!load_destination(cpu, op, op.size, target)) return Step::fault;
  return call(cpu, op, target);
}

Step call_relative(Cpu& cpu, const Op& op) noexcept {
  return call(cpu, op, cpu.gpr[gpr_rip] + op.imm);
}

Step jmp_relative(Cpu& cpu, const Op& op) noexcept {
  return branched(branch_to(cpu, cpu.gpr[gpr_rip] + op.imm, op.size));
}

// imm: target; src: condition code.
Step jcc_relative(Cpu& cpu, const Op& op) noexcept {
  if (!condition(op.src, cpu.arith)) return cpu.rip = cpu.next_rip(op), Step::branch;
  return jmp_relative(cpu, op);
}

Step ret_near(Cpu& cpu, const Op& op) noexcept {
  const uint64_t old = cpu.gpr[rsp];
  uint64_t target = 0;
  if (!cpu.pop(target, op.size)) return Step::fault;
  if (!branch_to(cpu, target, op.size)) {
    cpu.gpr[rsp] = old;
    return Step::fault;
  }
  cpu.set_stack_pointer((cpu.gpr[rsp] & cpu.stack_mask()) + op.imm);
  return Step::branch;
}

namespace {
uint64_t counter(Cpu& cpu, const Op& op) noexcept {
  return cpu.get_reg(rcx * 8, op.address_size);
}
}  // namespace

Step jcxz(Cpu& cpu, const Op& op) noexcept {
  if (counter(cpu, op) != 0) return cpu.rip = cpu.next_rip(op), Step::branch;
  return jmp_relative(cpu, op);
}

// LOOP (kind 0), LOOPE (1), LOOPNE (2).
template <unsigned Kind>
Step loop(Cpu& cpu, const Op& op) noexcept {
  const uint64_t left = counter(cpu, op) - 1;
  const uint64_t mask = op.address_size == 8 ? ~uint64_t{0} : op.address_size == 4 ? 0xffffffff : 0xffff;
  const bool go = (left & mask) != 0 && (Kind == 0 || cpu.zf() == (Kind == 1));
  if (go) {
    if (!branch_to(cpu, cpu.gpr[gpr_rip] + op.imm, op.size)) return Step::fault;
  } else {
    cpu.rip = cpu.next_rip(op);
  }
  cpu.set_reg(rcx * 8, op.address_size, left);
  return Step::branch;
}

Complex branch_instruction(ZydisMnemonic mnemonic) noexcept {
  switch (mnemonic) {
    case ZYDIS_MNEMONIC_ENTER: return enter;
    case ZYDIS_MNEMONIC_LEAVE: return leave_frame;
    case ZYDIS_MNEMONIC_PUSHA:
    case ZYDIS_MNEMONIC_PUSHAD: return pusha;
    case ZYDIS_MNEMONIC_POPA:
    case ZYDIS_MNEMONIC_POPAD: return popa;
    case ZYDIS_MNEMONIC_JCXZ:
    case ZYDIS_MNEMONIC_JECXZ:
    case ZYDIS_MNEMONIC_JRCXZ: return jcxz;
    case ZYDIS_MNEMONIC_LOOP: return loop<0>;
    case ZYDIS_MNEMONIC_LOOPE: return loop<1>;
    case ZYDIS_MNEMONIC_LOOPNE: return loop<2>;
    default: return nullptr;
  }
}

}  // namespace lodge::kvm::soft::integer
