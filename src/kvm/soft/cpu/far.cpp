#include "kvm/soft/cpu/far.hpp"

#include "kvm/soft/cpu/deliver.hpp"
#include "kvm/soft/cpu/segments.hpp"

namespace lodge::kvm::soft {
namespace {

uint64_t truncate(uint64_t value, unsigned size) noexcept {
  return size == 8 ? value : size == 4 ? value & 0xffff'ffff : value & 0xffff;
}

bool real_or_v86(const Cpu& cpu) noexcept {
  return !cpu.protected_mode() || cpu.v86();
}

// L and D together are reserved in long mode.
bool valid_code_form(const Cpu& cpu, const Segment& cs) noexcept {
  return cs.code() && !(cpu.long_mode() && cs.is_long() && cs.big());
}

void enter_code(Cpu& cpu, const Segment& cs, unsigned cpl, uint64_t rip) noexcept {
  cpu.segment[seg_cs] = cs;
  cpu.segment[seg_cs].selector = static_cast<uint16_t>((cs.selector & ~3) | cpl);
  cpu.rip = rip;
  cpu.set_cpl(cpl);
}

// Reads `size` bytes of the present stack, `offset` bytes above RSP.
bool peek(Cpu& cpu, uint64_t offset, unsigned size, uint64_t& value) noexcept {
  uint64_t address = 0;
  value = 0;
  return cpu.linear(seg_ss, (cpu.gpr[rsp] + offset) & cpu.stack_mask(), size, false, address) &&
         cpu.read_bytes(address, &value, size);
}

// The same-level part of a direct far jump or call: privilege and presence of the code segment.
bool check_direct(Cpu& cpu, const Segment& cs) noexcept {
  const unsigned cpl = cpu.cpl(), rpl = cs.selector & 3;
  const bool allowed = cs.conforming() ? cs.dpl() <= cpl : rpl <= cpl && cs.dpl() == cpl;
  if (!valid_code_form(cpu, cs) || !allowed) return selector_fault(cpu, Exception::gp, cs.selector);
  return cs.present() || selector_fault(cpu, Exception::np, cs.selector);
}

struct CallGate {
  Descriptor code;
  uint64_t offset = 0;
  unsigned size = 0;        // bytes of a stack slot
  unsigned parameters = 0;  // slots
};

// Gate and code segment of a call gate, checked for a CALL or a JMP.
bool read_call_gate(Cpu& cpu, const Descriptor& descriptor, bool call, CallGate& gate) noexcept {
  const Segment& segment = descriptor.segment;
  const uint16_t selector = segment.selector;
  if (segment.dpl() < cpu.cpl() || segment.dpl() < (selector & 3u)) {
    return selector_fault(cpu, Exception::gp, selector);
  }
  const bool long_mode = cpu.long_mode();
  uint32_t upper = 0;
  if (long_mode && !read_upper_half(cpu, descriptor, upper)) return false;
  if (!segment.present()) return selector_fault(cpu, Exception::np, selector);
  const bool wide = segment.type() == system_type::call32;
  const auto code_selector = static_cast<uint16_t>(descriptor.raw >> 16);
  gate.offset = (descriptor.raw & 0xffff) | (wide ? descriptor.raw >> 32 & 0xffff'0000 : 0);
  if (long_mode) gate.offset |= uint64_t{upper} << 32;
  gate.size = long_mode ? 8 : wide ? 4 : 2;
  gate.parameters = long_mode ? 0 : descriptor.raw >> 32 & 0x1f;
  if (null_selector(code_selector)) return cpu.raise(Exception::gp, 0);
  if (!read_descriptor(cpu, code_selector, Exception::gp, gate.code)) return false;
  const Segment& cs = gate.code.segment;
  bool valid = cs.code() && cs.dpl() <= cpu.cpl();
  if (!call && !cs.conforming()) valid = valid && cs.dpl() == cpu.cpl();
  if (long_mode) valid = valid && cs.is_long() && !cs.big();
  if (!valid) return selector_fault(cpu, Exception::gp, code_selector);
  return cs.present() || selector_fault(cpu, Exception::np, code_selector);
}

bool jump_gate(Cpu& cpu, const Descriptor& descriptor) noexcept {
  CallGate gate;
  if (!read_call_gate(cpu, descriptor, false, gate)) return false;
  if (!check_target(cpu, gate.code.segment, gate.offset) || !mark_accessed(cpu, gate.code)) return false;
  enter_code(cpu, gate.code.segment, cpu.cpl(), gate.offset);
  return true;
}

// Parameters move from the caller's stack to the inner one, the last pushed last.
bool copy_parameters(Cpu& cpu, StackBuilder& stack, const CallGate& gate) noexcept {
  for (unsigned i = gate.parameters; i-- > 0;) {
    uint64_t value = 0;
    if (!peek(cpu, uint64_t{i} * gate.size, gate.size, value) || !stack.push(value, gate.size)) return false;
  }
  return true;
}

bool call_inner(Cpu& cpu, CallGate& gate, uint64_t return_rip) noexcept {
  const unsigned new_cpl = gate.code.segment.dpl();
  const bool long_mode = cpu.long_mode();
  InnerStack inner;
  if (long_mode) {
    if (!read_inner_stack64(cpu, new_cpl, 0, inner.sp)) return false;
    inner.ss = null_stack_segment(new_cpl);
  } else if (!read_inner_stack(cpu, new_cpl, inner)) {
    return false;
  }
  if (!check_target(cpu, gate.code.segment, gate.offset)) return false;
  StackBuilder stack(cpu, inner.ss, inner.sp, long_mode, false, long_mode ? 0 : inner.ss.selector);
  if (!stack.push(cpu.segment[seg_ss].selector, gate.size) || !stack.push(cpu.gpr[rsp], gate.size) ||
      !copy_parameters(cpu, stack, gate) || !stack.push(cpu.segment[seg_cs].selector, gate.size) ||
      !stack.push(return_rip, gate.size) || !mark_accessed(cpu, gate.code)) {
    return false;
  }
  cpu.segment[seg_ss] = inner.ss;
  cpu.gpr[rsp] = stack.sp();
  enter_code(cpu, gate.code.segment, new_cpl, gate.offset);
  return true;
}

// Pushes CS and the return address on the present stack and goes to `cs`.
bool call_same_level(Cpu& cpu, Descriptor& code, uint64_t offset, unsigned size,
                     uint64_t return_rip) noexcept {
  if (!check_target(cpu, code.segment, offset)) return false;
  StackBuilder stack(cpu, cpu.segment[seg_ss], cpu.gpr[rsp], cpu.mode() == Mode::bits64, cpu.cpl() == 3, 0);
  if (!stack.push(cpu.segment[seg_cs].selector, size) || !stack.push(return_rip, size) ||
      !mark_accessed(cpu, code)) {
    return false;
  }
  cpu.gpr[rsp] = stack.sp();
  enter_code(cpu, code.segment, cpu.cpl(), offset);
  return true;
}

bool call_gate(Cpu& cpu, const Descriptor& descriptor, uint64_t return_rip) noexcept {
  CallGate gate;
  if (!read_call_gate(cpu, descriptor, true, gate)) return false;
  const Segment& cs = gate.code.segment;
  if (!cs.conforming() && cs.dpl() < cpu.cpl()) return call_inner(cpu, gate, return_rip);
  return call_same_level(cpu, gate.code, gate.offset, gate.size, return_rip);
}

// A TSS or a task gate as the target of JMP or CALL.
bool transfer_task(Cpu& cpu, const Descriptor& descriptor, TaskSwitch why, uint64_t return_rip) noexcept {
  const Segment& segment = descriptor.segment;
  const uint16_t selector = segment.selector;
  if (segment.dpl() < cpu.cpl() || segment.dpl() < (selector & 3u)) {
    return selector_fault(cpu, Exception::gp, selector);
  }
  if (segment.type() != system_type::task_gate) return switch_task(cpu, selector, why, return_rip, nullptr);
  if (!segment.present()) return selector_fault(cpu, Exception::np, selector);
  return switch_task(cpu, static_cast<uint16_t>(descriptor.raw >> 16), why, return_rip, nullptr);
}

// JMP or CALL to a system descriptor.
bool transfer_system(Cpu& cpu, const Descriptor& descriptor, bool call, uint64_t return_rip) noexcept {
  const unsigned type = descriptor.segment.type();
  const bool gate = type == system_type::call32 || (type == system_type::call16 && !cpu.long_mode());
  if (gate) return call ? call_gate(cpu, descriptor, return_rip) : jump_gate(cpu, descriptor);
  const bool task =
      type == system_type::task_gate || type == system_type::tss16 || type == system_type::tss32;
  if (!task || cpu.long_mode()) return selector_fault(cpu, Exception::gp, descriptor.segment.selector);
  return transfer_task(cpu, descriptor, call ? TaskSwitch::call : TaskSwitch::jump, return_rip);
}

// The offset of a far pointer, as wide as the target's code.
uint64_t target_offset(const Cpu& cpu, const Segment& cs, uint64_t offset, unsigned size) noexcept {
  offset = truncate(offset, size);
  return cpu.long_mode() && cs.is_long() ? offset : offset & 0xffff'ffff;
}

bool real_transfer(Cpu& cpu, uint16_t selector, uint64_t offset) noexcept {
  if (offset > cpu.segment[seg_cs].limit) return cpu.raise(Exception::gp, 0);
  load_real_segment(cpu, seg_cs, selector);
  cpu.rip = offset;
  cpu.state_changed();
  return true;
}

}  // namespace

bool far_jump(Cpu& cpu, uint16_t selector, uint64_t offset, unsigned size, uint64_t return_rip) noexcept {
  if (real_or_v86(cpu)) return real_transfer(cpu, selector, truncate(offset, size));
  if (null_selector(selector)) return cpu.raise(Exception::gp, 0);
  Descriptor code;
  if (!read_descriptor(cpu, selector, Exception::gp, code)) return false;
  if (code.segment.system()) return transfer_system(cpu, code, false, return_rip);
  if (!check_direct(cpu, code.segment)) return false;
  const uint64_t target = target_offset(cpu, code.segment, offset, size);
  if (!check_target(cpu, code.segment, target) || !mark_accessed(cpu, code)) return false;
  enter_code(cpu, code.segment, cpu.cpl(), target);
  return true;
}

bool far_call(Cpu& cpu, uint16_t selector, uint64_t offset, unsigned size, uint64_t return_rip) noexcept {
  if (real_or_v86(cpu)) {
    offset = truncate(offset, size);
    if (offset > cpu.segment[seg_cs].limit) return cpu.raise(Exception::gp, 0);
    const uint64_t sp = cpu.gpr[rsp];
    if (!cpu.push(cpu.segment[seg_cs].selector, size) || !cpu.push(return_rip, size)) {
      cpu.gpr[rsp] = sp;
      return false;
    }
    return real_transfer(cpu, selector, offset);
  }
  if (null_selector(selector)) return cpu.raise(Exception::gp, 0);
  Descriptor code;
  if (!read_descriptor(cpu, selector, Exception::gp, code)) return false;
  if (code.segment.system()) return transfer_system(cpu, code, true, return_rip);
  if (!check_direct(cpu, code.segment)) return false;
  return call_same_level(cpu, code, target_offset(cpu, code.segment, offset, size), size, return_rip);
}

// --- returns -----------------------------------------------------------------------------------------------

namespace {

// The code segment that RET or IRET goes back to.
bool check_return_code(Cpu& cpu, uint16_t selector, Descriptor& code) noexcept {
  if (null_selector(selector)) return cpu.raise(Exception::gp, 0);
  if (!read_descriptor(cpu, selector, Exception::gp, code)) return false;
  const Segment& cs = code.segment;
  const unsigned rpl = selector & 3;
  const bool privilege = rpl >= cpu.cpl() && (cs.conforming() ? cs.dpl() <= rpl : cs.dpl() == rpl);
  if (!valid_code_form(cpu, cs) || !privilege) return selector_fault(cpu, Exception::gp, selector);
  return cs.present() || selector_fault(cpu, Exception::np, selector);
}

// The stack segment that comes with it. Long mode permits a null one below level 3 of 64-bit code.
bool check_return_stack(Cpu& cpu, uint16_t selector, const Segment& cs, Segment& ss) noexcept {
  const unsigned cpl = cs.selector & 3;
  if (null_selector(selector)) {
    if (!cpu.long_mode() || !cs.is_long() || cpl == 3 || (selector & 3u) != cpl) {
      return cpu.raise(Exception::gp, 0);
    }
    ss = null_stack_segment(cpl);
    return true;
  }
  Descriptor descriptor;
  if (!check_stack_segment(cpu, selector, cpl, Exception::gp, descriptor)) return false;
  if (!mark_accessed(cpu, descriptor)) return false;
  ss = descriptor.segment;
  return true;
}

void load_return_stack(Cpu& cpu, const Segment& cs, const Segment& ss, uint64_t sp) noexcept {
  cpu.segment[seg_ss] = ss;
  if (cpu.long_mode() && cs.is_long()) {
    cpu.gpr[rsp] = sp;
  } else if (ss.big()) {
    cpu.gpr[rsp] = sp & 0xffff'ffff;
  } else {
    cpu.gpr[rsp] = (cpu.gpr[rsp] & ~uint64_t{0xffff}) | (sp & 0xffff);
  }
}

uint64_t return_target(const Cpu& cpu, const Segment& cs, uint64_t rip) noexcept {
  return cpu.long_mode() && cs.is_long() ? rip : rip & 0xffff'ffff;
}

}  // namespace

bool far_return(Cpu& cpu, unsigned size, uint16_t release) noexcept {
  uint64_t rip = 0, cs_selector = 0;
  if (!peek(cpu, 0, size, rip) || !peek(cpu, size, size, cs_selector)) return false;
  const auto selector = static_cast<uint16_t>(cs_selector);
  const uint64_t popped = 2 * size;
  if (real_or_v86(cpu)) {
    if (!real_transfer(cpu, selector, rip)) return false;
    cpu.set_stack_pointer(cpu.gpr[rsp] + popped + release);
    return true;
  }
  Descriptor code;
  if (!check_return_code(cpu, selector, code)) return false;
  rip = return_target(cpu, code.segment, rip);
  if ((selector & 3u) == cpu.cpl()) {
    if (!check_target(cpu, code.segment, rip) || !mark_accessed(cpu, code)) return false;
    cpu.set_stack_pointer(cpu.gpr[rsp] + popped + release);
    enter_code(cpu, code.segment, cpu.cpl(), rip);
    return true;
  }
  uint64_t sp = 0, ss_selector = 0;
  if (!peek(cpu, popped + release, size, sp)) return false;
  if (!peek(cpu, popped + release + size, size, ss_selector)) return false;
  Segment ss;
  if (!check_return_stack(cpu, static_cast<uint16_t>(ss_selector), code.segment, ss)) return false;
  if (!check_target(cpu, code.segment, rip) || !mark_accessed(cpu, code)) return false;
  load_return_stack(cpu, code.segment, ss, sp);
  enter_code(cpu, code.segment, selector & 3, rip);
  // The parameters lie on the outer stack as well.
  cpu.set_stack_pointer(cpu.gpr[rsp] + release);
  drop_inaccessible_segments(cpu);
  cpu.state_changed();
  return true;
}

// --- IRET --------------------------------------------------------------------------------------------------

namespace {

struct Frame {
  uint64_t rip = 0, cs = 0, flags = 0;
};

constexpr uint64_t flags16 = 0xffff;

// RF only matters to instruction breakpoints, and nothing clears it for the next instruction while there are
// none.
uint64_t restorable(const Cpu& cpu) noexcept {
  return cpu.code_breakpoints ? flag::rf | flag::ac | flag::id : flag::ac | flag::id;
}

// The flags that IRET may change at this privilege, the others as they are.
uint64_t merge_flags(const Cpu& cpu, uint64_t popped, unsigned size) noexcept {
  uint64_t mask = flag::arithmetic | flag::tf | flag::df | flag::nt;
  if (size > 2) mask |= restorable(cpu);
  if (cpu.cpl() <= (cpu.system_flags >> 12 & 3)) mask |= flag::if_;
  if (cpu.cpl() == 0) {
    mask |= flag::iopl;
    if (size > 2) mask |= flag::vif | flag::vip;
  }
  return (cpu.rflags() & ~mask) | (popped & mask);
}

bool iret_real(Cpu& cpu, const Frame& frame, unsigned size) noexcept {
  constexpr uint64_t kept = flag::vm | flag::vif | flag::vip;
  if (!real_transfer(cpu, static_cast<uint16_t>(frame.cs), frame.rip)) return false;
  cpu.set_stack_pointer(cpu.gpr[rsp] + 3 * size);
  const uint64_t mask = size == 2 ? flags16 & flag::valid : flag::valid & ~kept;
  const uint64_t dropped = cpu.code_breakpoints ? 0 : flag::rf;
  cpu.set_rflags((cpu.rflags() & ~mask) | (frame.flags & mask & ~dropped) | flag::fixed);
  return true;
}

bool iret_v86(Cpu& cpu, const Frame& frame, unsigned size) noexcept {
  const bool iopl3 = (cpu.system_flags & flag::iopl) == flag::iopl;
  if (!iopl3 && ((cpu.cr4 & cr4::vme) == 0 || size != 2)) return cpu.raise(Exception::gp, 0);
  uint64_t mask = flag::arithmetic | flag::tf | flag::df | flag::nt;
  if (size > 2) mask |= restorable(cpu);
  uint64_t flags = cpu.rflags();
  if (iopl3) {
    mask |= flag::if_;
  } else {
    const bool wants_if = (frame.flags & flag::if_) != 0;
    if ((frame.flags & flag::tf) != 0 || (wants_if && (flags & flag::vip) != 0)) {
      return cpu.raise(Exception::gp, 0);
    }
    flags = wants_if ? flags | flag::vif : flags & ~flag::vif;
  }
  if (!real_transfer(cpu, static_cast<uint16_t>(frame.cs), frame.rip)) return false;
  cpu.set_stack_pointer(cpu.gpr[rsp] + 3 * size);
  cpu.set_rflags((flags & ~mask) | (frame.flags & mask));
  return true;
}

// From level 0 into virtual-8086 mode: nine words on the stack.
bool iret_to_v86(Cpu& cpu, const Frame& frame) noexcept {
  uint64_t word[6];  // ESP, SS, ES, DS, FS, GS
  for (unsigned i = 0; i < 6; ++i) {
    if (!peek(cpu, 12 + i * 4, 4, word[i])) return false;
  }
  if ((frame.rip & 0xffff'ffff) > 0xffff) return cpu.raise(Exception::gp, 0);
  constexpr SegmentName order[] = {seg_ss, seg_es, seg_ds, seg_fs, seg_gs};
  for (unsigned i = 0; i < 5; ++i) cpu.segment[order[i]] = v86_segment(static_cast<uint16_t>(word[i + 1]));
  cpu.segment[seg_cs] = v86_segment(static_cast<uint16_t>(frame.cs));
  cpu.gpr[rsp] = word[0];
  cpu.rip = frame.rip & 0xffff;
  const uint64_t dropped = cpu.code_breakpoints ? 0 : flag::rf;
  cpu.set_rflags((frame.flags & flag::valid & ~dropped) | flag::fixed);
  cpu.set_cpl(3);
  return true;
}

bool iret_task(Cpu& cpu, uint64_t return_rip) noexcept {
  if (cpu.long_mode()) return cpu.raise(Exception::gp, 0);
  uint16_t link = 0;
  if (!cpu.read_system(cpu.tr.base, link)) return false;
  if ((link & 4) != 0 || null_selector(link)) return selector_fault(cpu, Exception::ts, link);
  return switch_task(cpu, link, TaskSwitch::iret, return_rip, nullptr);
}

bool iret_protected(Cpu& cpu, const Frame& frame, unsigned size) noexcept {
  const auto selector = static_cast<uint16_t>(frame.cs);
  Descriptor code;
  if (!check_return_code(cpu, selector, code)) return false;
  const uint64_t rip = return_target(cpu, code.segment, frame.rip);
  const unsigned new_cpl = selector & 3;
  // 64-bit code pops SS:RSP whatever the privilege.
  const bool pops_stack = cpu.mode() == Mode::bits64 || new_cpl != cpu.cpl();
  uint64_t sp = 0, ss_selector = 0;
  Segment ss;
  if (pops_stack) {
    if (!peek(cpu, 3 * size, size, sp) || !peek(cpu, 4 * size, size, ss_selector)) return false;
    if (!check_return_stack(cpu, static_cast<uint16_t>(ss_selector), code.segment, ss)) return false;
  }
  if (!check_target(cpu, code.segment, rip) || !mark_accessed(cpu, code)) return false;
  const uint64_t flags = merge_flags(cpu, frame.flags, size);
  const bool outer = new_cpl != cpu.cpl();
  if (pops_stack) {
    load_return_stack(cpu, code.segment, ss, sp);
  } else {
    cpu.set_stack_pointer(cpu.gpr[rsp] + 3 * size);
  }
  cpu.set_rflags(flags);
  enter_code(cpu, code.segment, new_cpl, rip);
  if (outer) {
    drop_inaccessible_segments(cpu);
    cpu.state_changed();
  }
  return true;
}

}  // namespace

bool interrupt_return(Cpu& cpu, unsigned size, uint64_t return_rip) noexcept {
  // NMIs are unblocked even when IRET itself faults.
  cpu.nmi_blocked = false;
  const bool simple = real_or_v86(cpu);
  if (!simple && (cpu.system_flags & flag::nt) != 0) return iret_task(cpu, return_rip);
  Frame frame;
  if (!peek(cpu, 0, size, frame.rip) || !peek(cpu, size, size, frame.cs) ||
      !peek(cpu, 2 * size, size, frame.flags)) {
    return false;
  }
  if (!cpu.protected_mode()) return iret_real(cpu, frame, size);
  if (simple) return iret_v86(cpu, frame, size);
  if ((frame.flags & flag::vm) != 0 && size == 4 && cpu.cpl() == 0 && !cpu.long_mode()) {
    return iret_to_v86(cpu, frame);
  }
  return iret_protected(cpu, frame, size);
}

}  // namespace lodge::kvm::soft
