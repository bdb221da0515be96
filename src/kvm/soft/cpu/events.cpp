// Delivery of exceptions and interrupts: the real-mode vector table, the gates of protected and of long mode,
// virtual-8086 mode with and without VME. SDM volume 3, chapter 6 and sections 20.2, 20.3; AMD APM volume 2,
// chapter 8.
//
// Missing: shadow stacks (CET), which CPUID never offers. SMIs are smm.cpp's.
#include "kvm/soft/cpu/events.hpp"

#include "kvm/soft/cpu/deliver.hpp"
#include "kvm/soft/cpu/segments.hpp"

namespace lodge::kvm::soft {

Rollback::Rollback(const Cpu& cpu) noexcept
    : segment_(cpu.segment),
      rsp_(cpu.gpr[rsp]),
      rip_(cpu.rip),
      system_flags_(cpu.system_flags),
      cpl_(cpu.cpl()) {}

void Rollback::undo(Cpu& cpu) const noexcept {
  cpu.segment = segment_;
  cpu.gpr[rsp] = rsp_;
  cpu.rip = rip_;
  cpu.system_flags = system_flags_;
  cpu.set_cpl(cpl_);
}

namespace {

constexpr uint32_t bit(Exception vector) {
  return 1u << static_cast<unsigned>(vector);
}
constexpr uint32_t with_error = bit(Exception::df) | bit(Exception::ts) | bit(Exception::np) |
                                bit(Exception::ss) | bit(Exception::gp) | bit(Exception::pf) |
                                bit(Exception::ac);
constexpr uint32_t contributory =
    bit(Exception::de) | bit(Exception::ts) | bit(Exception::np) | bit(Exception::ss) | bit(Exception::gp);
constexpr uint32_t with_selector =
    bit(Exception::ts) | bit(Exception::np) | bit(Exception::ss) | bit(Exception::gp);

struct Event {
  uint8_t vector = 0;
  EventKind kind = EventKind::exception;
  bool has_error = false;
  uint32_t error = 0;
  bool set_rf = false;  // in the pushed flags

  bool software() const { return kind == EventKind::instruction || kind == EventKind::trap; }
};

// A gate of the IDT, or the fault for a missing or malformed one.
struct Gate {
  unsigned type = 0, ist = 0;
  uint16_t selector = 0;
  uint64_t offset = 0;
  bool interrupt() const { return (type & 1) == 0; }  // clears IF
};

bool idt_fault(Cpu& cpu, Exception vector, const Event& event) noexcept {
  return cpu.raise(vector, event.vector * 8u + 2);
}

// --- real mode ---------------------------------------------------------------------------------------------

// Enters a vector of a real-mode table at `table`, pushing `flags`: real mode itself, and the redirected
// software interrupts of virtual-8086 mode.
bool enter_vector(Cpu& cpu, uint64_t table, uint8_t vector, uint64_t flags, uint64_t return_rip) noexcept {
  uint32_t entry = 0;
  if (!cpu.read_system(table + vector * 4u, entry)) return false;
  if (!cpu.push(flags, 2) || !cpu.push(cpu.segment[seg_cs].selector, 2) || !cpu.push(return_rip, 2))
    return false;
  load_real_segment(cpu, seg_cs, static_cast<uint16_t>(entry >> 16));
  cpu.rip = entry & 0xffff;
  return true;
}

bool deliver_real(Cpu& cpu, const Event& event, uint64_t return_rip) noexcept {
  if (event.vector * 4u + 3 > cpu.idtr.limit) return idt_fault(cpu, Exception::gp, event);
  if (!enter_vector(cpu, cpu.idtr.base, event.vector, cpu.rflags() & 0xffff, return_rip)) return false;
  cpu.set_rflags(cpu.rflags() & ~(flag::tf | flag::if_ | flag::rf | flag::ac));
  cpu.state_changed();
  return true;
}

// --- virtual-8086 mode extensions --------------------------------------------------------------------------

enum class Redirect : uint8_t { to_v86, to_protected, fault };

// The software-interrupt bitmap of the TSS (SDM volume 3, 20.3): 32 bytes below the I/O map.
Redirect redirection(Cpu& cpu, uint8_t vector) noexcept {
  const unsigned iopl = static_cast<unsigned>(cpu.system_flags >> 12 & 3);
  bool redirected = false;
  if ((cpu.cr4 & cr4::vme) != 0) {
    uint16_t map = 0;
    uint8_t bits = 0;
    if (cpu.tr.limit < 103) {
      cpu.raise(Exception::gp, 0);
      return Redirect::fault;
    }
    if (!cpu.read_system(cpu.tr.base + 102, map)) return Redirect::fault;
    const uint32_t offset = map - 32u + vector / 8u;
    if (map < 32 || offset > cpu.tr.limit) {
      cpu.raise(Exception::gp, 0);
      return Redirect::fault;
    }
    if (!cpu.read_system(cpu.tr.base + offset, bits)) return Redirect::fault;
    redirected = (bits >> vector % 8 & 1) == 0;
  }
  if (redirected) return Redirect::to_v86;
  if (iopl == 3) return Redirect::to_protected;
  cpu.raise(Exception::gp, 0);
  return Redirect::fault;
}

bool deliver_redirected(Cpu& cpu, uint8_t vector, uint64_t return_rip) noexcept {
  uint64_t flags = cpu.rflags() & 0xffff;
  const bool virtual_if = (flags & flag::iopl) != flag::iopl;
  if (virtual_if) {
    flags |= flag::iopl;
    flags = (cpu.system_flags & flag::vif) != 0 ? flags | flag::if_ : flags & ~flag::if_;
  }
  if (!enter_vector(cpu, 0, vector, flags, return_rip)) return false;
  cpu.set_rflags(cpu.rflags() & ~(flag::tf | flag::nt | flag::rf | (virtual_if ? flag::vif : flag::if_)));
  cpu.state_changed();
  return true;
}

// --- protected mode ----------------------------------------------------------------------------------------

bool read_gate(Cpu& cpu, const Event& event, Gate& gate) noexcept {
  const bool long_mode = cpu.long_mode();
  const unsigned size = long_mode ? 16 : 8;
  const uint32_t offset = event.vector * size;
  if (offset + size - 1 > cpu.idtr.limit) return idt_fault(cpu, Exception::gp, event);
  uint64_t low = 0, high = 0;
  if (!cpu.read_system(cpu.idtr.base + offset, low)) return false;
  if (long_mode && !cpu.read_system(cpu.idtr.base + offset + 8, high)) return false;
  gate.type = low >> 40 & 0x1f;  // bit 4: S, which no gate has
  gate.selector = static_cast<uint16_t>(low >> 16);
  gate.offset = (low & 0xffff) | (low >> 32 & 0xffff'0000) | (long_mode ? high << 32 : 0);
  gate.ist = long_mode ? low >> 32 & 7 : 0;
  const bool known =
      gate.type == system_type::interrupt32 || gate.type == system_type::trap32 ||
      (!long_mode && (gate.type == system_type::task_gate || gate.type == system_type::trap16 ||
                      gate.type == system_type::interrupt16));
  if (!known) return idt_fault(cpu, Exception::gp, event);
  if (event.software() && (low >> 45 & 3) < cpu.cpl()) return idt_fault(cpu, Exception::gp, event);
  if ((low >> 47 & 1) == 0) return idt_fault(cpu, Exception::np, event);
  if (gate.type == system_type::interrupt16 || gate.type == system_type::trap16) gate.offset &= 0xffff;
  return true;
}

// The handler's code segment, and the privilege it runs at.
bool read_handler_segment(Cpu& cpu, const Gate& gate, Descriptor& code, unsigned& new_cpl) noexcept {
  if (null_selector(gate.selector)) return cpu.raise(Exception::gp, 0);
  if (!read_descriptor(cpu, gate.selector, Exception::gp, code)) return false;
  const Segment& cs = code.segment;
  if (!cs.code() || cs.dpl() > cpu.cpl()) return selector_fault(cpu, Exception::gp, gate.selector);
  if (cpu.long_mode() && (!cs.is_long() || cs.big())) {
    return selector_fault(cpu, Exception::gp, gate.selector);
  }
  if (!cs.present()) return selector_fault(cpu, Exception::np, gate.selector);
  new_cpl = cs.conforming() ? cpu.cpl() : cs.dpl();
  // A handler of virtual-8086 code must run at level 0.
  if (cpu.v86() && new_cpl != 0) return selector_fault(cpu, Exception::gp, gate.selector);
  return true;
}

uint64_t pushed_flags(const Cpu& cpu, const Event& event) noexcept {
  return event.set_rf ? cpu.rflags() | flag::rf : cpu.rflags();
}

void enter_handler(Cpu& cpu, const Gate& gate, Segment cs, unsigned cpl) noexcept {
  cs.selector = static_cast<uint16_t>((gate.selector & ~3) | cpl);
  cpu.segment[seg_cs] = cs;
  cpu.rip = gate.offset;
  uint64_t clear = flag::tf | flag::vm | flag::rf | flag::nt;
  if (gate.interrupt()) clear |= flag::if_;
  cpu.set_rflags(cpu.rflags() & ~clear);
  cpu.set_cpl(cpl);
}

bool push_frame(StackBuilder& stack, const Cpu& cpu, const Event& event, uint64_t return_rip,
                unsigned size) noexcept {
  return stack.push(pushed_flags(cpu, event), size) && stack.push(cpu.segment[seg_cs].selector, size) &&
         stack.push(return_rip, size) && (!event.has_error || stack.push(event.error, size));
}

bool deliver_long(Cpu& cpu, const Event& event, const Gate& gate, uint64_t return_rip) noexcept {
  Descriptor code;
  unsigned new_cpl = 0;
  if (!read_handler_segment(cpu, gate, code, new_cpl)) return false;
  const bool inner = new_cpl != cpu.cpl();
  uint64_t sp = cpu.gpr[rsp];
  if ((inner || gate.ist != 0) && !read_inner_stack64(cpu, new_cpl, gate.ist, sp)) return false;
  if (!cpu.canonical(gate.offset)) return cpu.raise(Exception::gp, 0);
  const Segment old_ss = cpu.segment[seg_ss];
  const Segment new_ss = inner ? null_stack_segment(new_cpl) : old_ss;
  StackBuilder stack(cpu, new_ss, sp & ~uint64_t{15}, true, new_cpl == 3, 0);
  if (!stack.push(old_ss.selector, 8) || !stack.push(cpu.gpr[rsp], 8) ||
      !push_frame(stack, cpu, event, return_rip, 8) || !mark_accessed(cpu, code)) {
    return false;
  }
  cpu.gpr[rsp] = stack.sp();
  cpu.segment[seg_ss] = new_ss;
  enter_handler(cpu, gate, code.segment, new_cpl);
  return true;
}

bool push_v86_segments(StackBuilder& stack, const Cpu& cpu, unsigned size) noexcept {
  for (const SegmentName name : {seg_gs, seg_fs, seg_ds, seg_es}) {
    if (!stack.push(cpu.segment[name].selector, size)) return false;
  }
  return true;
}

bool deliver_inner(Cpu& cpu, const Event& event, const Gate& gate, Descriptor& code, unsigned new_cpl,
                   uint64_t return_rip) noexcept {
  const unsigned size = (gate.type & 8) != 0 ? 4 : 2;
  const bool from_v86 = cpu.v86();
  InnerStack inner;
  if (!read_inner_stack(cpu, new_cpl, inner)) return false;
  StackBuilder stack(cpu, inner.ss, inner.sp, false, false, inner.ss.selector);
  if (from_v86 && !push_v86_segments(stack, cpu, size)) return false;
  if (!stack.push(cpu.segment[seg_ss].selector, size) || !stack.push(cpu.gpr[rsp], size) ||
      !push_frame(stack, cpu, event, return_rip, size) || !mark_accessed(cpu, code)) {
    return false;
  }
  if (from_v86) {
    for (const SegmentName name : {seg_gs, seg_fs, seg_ds, seg_es}) cpu.segment[name] = Segment{};
  }
  cpu.gpr[rsp] = stack.sp();
  cpu.segment[seg_ss] = inner.ss;
  enter_handler(cpu, gate, code.segment, new_cpl);
  return true;
}

bool deliver_protected(Cpu& cpu, const Event& event, uint64_t return_rip) noexcept {
  Gate gate;
  if (!read_gate(cpu, event, gate)) return false;
  if (gate.type == system_type::task_gate) {
    return switch_task(cpu, gate.selector, TaskSwitch::gate, return_rip,
                       event.has_error ? &event.error : nullptr, event.set_rf ? flag::rf : 0);
  }
  if (cpu.long_mode()) return deliver_long(cpu, event, gate, return_rip);
  Descriptor code;
  unsigned new_cpl = 0;
  if (!read_handler_segment(cpu, gate, code, new_cpl)) return false;
  if (!check_target(cpu, code.segment, gate.offset)) return false;
  if (new_cpl != cpu.cpl()) return deliver_inner(cpu, event, gate, code, new_cpl, return_rip);
  StackBuilder stack(cpu, cpu.segment[seg_ss], cpu.gpr[rsp], false, new_cpl == 3, 0);
  if (!push_frame(stack, cpu, event, return_rip, (gate.type & 8) != 0 ? 4 : 2)) return false;
  if (!mark_accessed(cpu, code)) return false;
  cpu.gpr[rsp] = stack.sp();
  enter_handler(cpu, gate, code.segment, new_cpl);
  return true;
}

// One attempt. False: cpu.pending holds the nested fault (or wants_exit is set), the state is as before.
bool deliver(Cpu& cpu, const Event& event, uint64_t return_rip) noexcept {
  const Rollback before(cpu);
  cpu.pending.valid = false;
  const bool entered =
      cpu.protected_mode() ? deliver_protected(cpu, event, return_rip) : deliver_real(cpu, event, return_rip);
  // EXT: the fault did not come from the program's own INT n, INT3 or INTO. Also for faults in the context of
  // a new task.
  if (cpu.pending.valid && !event.software() && (with_selector & bit(cpu.pending.vector)) != 0) {
    cpu.pending.error |= 1;
  }
  if (!entered) before.undo(cpu);
  return entered;
}

// What #PF and #DB leave in registers, once they are really delivered.
void apply_payload(Cpu& cpu, const Cpu::PendingException& exception) noexcept {
  if (exception.vector == Exception::pf) {
    cpu.cr2 = exception.payload;
  } else if (exception.vector == Exception::db) {
    constexpr uint64_t always_one = 0xffff'0ff0;
    cpu.dr6 = (cpu.dr6 & ~uint64_t{0xf}) | always_one | (exception.payload & 0xe00f);
    cpu.dr7 &= ~uint64_t{0x2000};       // GD, so that the handler can use the debug registers
    cpu.msr.debug_ctl &= ~uint64_t{3};  // LBR and BTF
    cpu.state_changed();
  }
}

Event event_of(const Cpu& cpu, const Cpu::PendingException& exception) noexcept {
  Event event;
  event.vector = static_cast<uint8_t>(exception.vector);
  const uint32_t mask = bit(exception.vector);
  event.has_error = cpu.protected_mode() && (with_error & mask) != 0;
  event.error = exception.error;
  if (exception.vector == Exception::bp || exception.vector == Exception::of) {
    event.kind = EventKind::trap;
  } else if (exception.vector == Exception::db) {
    // Faults set RF, traps and instruction breakpoints do not; of the causes of #DB only general detect is
    // such a fault.
    event.set_rf = (exception.payload & 0x2000) != 0;
  } else {
    event.set_rf = exception.vector != Exception::nmi && exception.vector != Exception::df &&
                   exception.vector != Exception::mc;
  }
  return event;
}

// SDM table 6-5: does `second`, met while delivering `first`, make a double fault?
bool doubles(Exception first, Exception second) noexcept {
  const bool second_contributory = (contributory & bit(second)) != 0;
  if (first == Exception::pf) return second_contributory || second == Exception::pf;
  return (contributory & bit(first)) != 0 && second_contributory;
}

}  // namespace

Delivery deliver_exception(Cpu& cpu) noexcept {
  // Bounded: every round either ends or climbs from benign to contributory to page fault to double fault;
  // benign faults (#AC, #DB) cannot repeat, as implicit accesses do not raise them.
  for (unsigned round = 0; round < 16; ++round) {
    const Cpu::PendingException exception = cpu.pending;
    if (!exception.valid) return Delivery::done;
    const uint64_t return_rip = cpu.rip;
    apply_payload(cpu, exception);
    if (deliver(cpu, event_of(cpu, exception), return_rip)) {
      if (!cpu.pending.valid) return Delivery::done;
      continue;  // a task switch went through, and the new task faults at its first instruction
    }
    if (cpu.wants_exit) {
      cpu.pending = exception;
      return Delivery::vmm;
    }
    // A fault that meets a breakpoint's delivery is the INT3's own.
    if (exception.vector == Exception::bp) cpu.rip = cpu.truncate_rip(return_rip - 1);
    if (exception.vector == Exception::df) {
      cpu.pending.valid = false;
      return Delivery::shutdown;
    }
    if (doubles(exception.vector, cpu.pending.vector)) {
      cpu.pending = {.valid = true, .vector = Exception::df, .has_error = true, .error = 0, .payload = 0};
    }
  }
  cpu.pending.valid = false;
  return Delivery::shutdown;
}

static Delivery deliver_asynchronous(Cpu& cpu, const Event& event) noexcept {
  if (deliver(cpu, event, cpu.rip)) return cpu.pending.valid ? deliver_exception(cpu) : Delivery::done;
  if (cpu.wants_exit) return Delivery::vmm;
  return deliver_exception(cpu);
}

Delivery deliver_external_interrupt(Cpu& cpu, uint8_t vector) noexcept {
  Event event;
  event.vector = vector;
  event.kind = EventKind::external;
  return deliver_asynchronous(cpu, event);
}

Delivery deliver_nmi(Cpu& cpu) noexcept {
  Event event;
  event.vector = static_cast<uint8_t>(Exception::nmi);
  event.kind = EventKind::nmi;
  cpu.nmi_blocked = true;
  return deliver_asynchronous(cpu, event);
}

bool software_interrupt(Cpu& cpu, uint8_t vector, EventKind kind, uint64_t return_rip) noexcept {
  Event event;
  event.vector = vector;
  event.kind = kind;
  if (cpu.v86() && kind == EventKind::instruction) {
    const Redirect way = redirection(cpu, vector);
    if (way == Redirect::fault) return false;
    if (way == Redirect::to_v86) {
      const Rollback before(cpu);
      if (deliver_redirected(cpu, vector, return_rip)) return true;
      before.undo(cpu);
      return false;
    }
  }
  return deliver(cpu, event, return_rip);
}

bool check_io_permission(Cpu& cpu, uint16_t port, unsigned size) noexcept {
  if (!cpu.protected_mode()) return true;
  if (!cpu.v86() && cpu.cpl() <= (cpu.system_flags >> 12 & 3)) return true;
  // The map begins where the word at offset 102 of a 32- or 64-bit TSS says; two bytes are read, for ports
  // that straddle a byte.
  const bool tss32 = cpu.tr.present() && (cpu.tr.type() & 0xd) == system_type::tss32;
  if (!tss32 || cpu.tr.limit < 103) return cpu.raise(Exception::gp, 0);
  uint16_t map = 0, bits = 0;
  if (!cpu.read_system(cpu.tr.base + 102, map)) return false;
  const uint32_t offset = map + port / 8u;
  if (offset + 1 > cpu.tr.limit) return cpu.raise(Exception::gp, 0);
  if (!cpu.read_system(cpu.tr.base + offset, bits)) return false;
  const unsigned mask = ((1u << size) - 1) << port % 8;
  return (bits & mask) == 0 || cpu.raise(Exception::gp, 0);
}

}  // namespace lodge::kvm::soft
