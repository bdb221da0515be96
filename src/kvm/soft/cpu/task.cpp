// Hardware task switches. SDM volume 3, chapter 7.
//
// As the manual's steps 1 to 16: checks in the old task's context, then the outgoing state is saved and the
// incoming state becomes the processor's; what is wrong with the new task's selectors is a fault of the new
// task, delivered with its state.
#include "kvm/soft/cpu/deliver.hpp"
#include "kvm/soft/cpu/segments.hpp"

namespace lodge::kvm::soft {
namespace {

// A TSS as both formats have it.
struct TaskState {
  uint32_t cr3 = 0, eip = 0, eflags = 0;
  std::array<uint32_t, 8> gpr{};
  std::array<uint16_t, 6> selector{};  // by SegmentName
  uint16_t ldt = 0;
  bool trap = false;
};

constexpr uint32_t tss32_size = 0x68, tss16_size = 0x2c;
constexpr unsigned busy = 2;

bool is_32bit(const Segment& tss) noexcept {
  return (tss.type() & 8) != 0;
}

template <class T>
bool save_fields(Cpu& cpu, uint64_t at, uint32_t eip, uint32_t eflags, unsigned segments) noexcept {
  if (!cpu.write_system(at, static_cast<T>(eip))) return false;
  if (!cpu.write_system(at + sizeof(T), static_cast<T>(eflags))) return false;
  at += 2 * sizeof(T);
  for (unsigned i = 0; i < 8; ++i, at += sizeof(T)) {
    if (!cpu.write_system(at, static_cast<T>(cpu.gpr[i]))) return false;
  }
  // Selectors are 16 bits wide in either format; their slots are as wide as the others.
  for (unsigned i = 0; i < segments; ++i, at += sizeof(T)) {
    if (!cpu.write_system(at, cpu.segment[i].selector)) return false;
  }
  return true;
}

// The dynamic fields of the outgoing task. Segment registers are in the order of their numbers.
bool save_task(Cpu& cpu, const Segment& tss, uint32_t eip, uint32_t eflags) noexcept {
  return is_32bit(tss) ? save_fields<uint32_t>(cpu, tss.base + 0x20, eip, eflags, 6)
                       : save_fields<uint16_t>(cpu, tss.base + 0x0e, eip, eflags, 4);
}

template <class T>
bool load_fields(Cpu& cpu, uint64_t at, TaskState& out, unsigned segments) noexcept {
  T value = 0;
  if (!cpu.read_system(at, value)) return false;
  out.eip = value;
  if (!cpu.read_system(at + sizeof(T), value)) return false;
  out.eflags = value;
  at += 2 * sizeof(T);
  for (unsigned i = 0; i < 8; ++i, at += sizeof(T)) {
    if (!cpu.read_system(at, value)) return false;
    out.gpr[i] = value;
  }
  for (unsigned i = 0; i < segments; ++i, at += sizeof(T)) {
    if (!cpu.read_system(at, out.selector[i])) return false;
  }
  return cpu.read_system(at, out.ldt);
}

bool load_task(Cpu& cpu, const Segment& tss, TaskState& out) noexcept {
  if (!is_32bit(tss)) return load_fields<uint16_t>(cpu, tss.base + 0x0e, out, 4);
  uint16_t trap = 0;
  if (!cpu.read_system(tss.base + 0x1c, out.cr3)) return false;
  if (!load_fields<uint32_t>(cpu, tss.base + 0x20, out, 6)) return false;
  if (!cpu.read_system(tss.base + 0x64, trap)) return false;
  out.trap = (trap & 1) != 0;
  return true;
}

bool set_busy(Cpu& cpu, uint16_t selector, bool on) noexcept {
  uint64_t address = 0;
  uint8_t access = 0;
  if (!locate_descriptor(cpu, selector, 8, address)) return true;  // the GDT moved: nothing to mark
  if (!cpu.read_system(address + 5, access)) return false;
  return cpu.write_system(address + 5, static_cast<uint8_t>(on ? access | busy : access & ~busy));
}

// Steps 2 to 7: the incoming TSS descriptor.
bool read_new_tss(Cpu& cpu, uint16_t selector, TaskSwitch why, Descriptor& tss) noexcept {
  const Exception fault = why == TaskSwitch::iret ? Exception::ts : Exception::gp;
  if (null_selector(selector) || (selector & 4) != 0) return selector_fault(cpu, fault, selector);
  if (!read_descriptor(cpu, selector, fault, tss)) return false;
  const unsigned type = tss.segment.type();
  const bool is_tss = tss.segment.system() && (type & 5) == 1;  // 1, 3, 9 or 11
  const bool is_busy = (type & busy) != 0;
  if (!is_tss || is_busy != (why == TaskSwitch::iret)) return selector_fault(cpu, fault, selector);
  if (!tss.segment.present()) return selector_fault(cpu, Exception::np, selector);
  const uint32_t size = is_32bit(tss.segment) ? tss32_size : tss16_size;
  if (tss.segment.limit < size - 1) return selector_fault(cpu, Exception::ts, selector);
  return true;
}

// --- the incoming task's segments, after the commit point --------------------------------------------------

bool load_new_ldt(Cpu& cpu, uint16_t selector) noexcept {
  cpu.ldtr = Segment{};
  cpu.ldtr.selector = selector;
  if (null_selector(selector)) return true;
  if ((selector & 4) != 0) return selector_fault(cpu, Exception::ts, selector);
  Descriptor descriptor;
  if (!read_descriptor(cpu, selector, Exception::ts, descriptor)) return false;
  const Segment& segment = descriptor.segment;
  if (!segment.system() || segment.type() != system_type::ldt || !segment.present()) {
    return selector_fault(cpu, Exception::ts, selector);
  }
  cpu.ldtr = segment;
  return true;
}

bool load_new_cs(Cpu& cpu, uint16_t selector) noexcept {
  if (null_selector(selector)) return selector_fault(cpu, Exception::ts, selector);
  Descriptor descriptor;
  if (!read_descriptor(cpu, selector, Exception::ts, descriptor)) return false;
  const Segment& cs = descriptor.segment;
  const unsigned rpl = selector & 3;
  const bool valid = cs.code() && (cs.conforming() ? cs.dpl() <= rpl : cs.dpl() == rpl);
  if (!valid) return selector_fault(cpu, Exception::ts, selector);
  if (!cs.present()) return selector_fault(cpu, Exception::np, selector);
  if (!mark_accessed(cpu, descriptor)) return false;
  cpu.segment[seg_cs] = cs;
  return true;
}

bool load_new_ss(Cpu& cpu, uint16_t selector) noexcept {
  Descriptor descriptor;
  if (!check_stack_segment(cpu, selector, cpu.cpl(), Exception::ts, descriptor)) return false;
  if (!mark_accessed(cpu, descriptor)) return false;
  cpu.segment[seg_ss] = descriptor.segment;
  return true;
}

bool load_new_data(Cpu& cpu, SegmentName name, uint16_t selector) noexcept {
  if (null_selector(selector)) return true;
  Descriptor descriptor;
  if (!read_descriptor(cpu, selector, Exception::ts, descriptor)) return false;
  const Segment& segment = descriptor.segment;
  const bool privilege =
      segment.conforming() || ((selector & 3u) <= segment.dpl() && cpu.cpl() <= segment.dpl());
  if (segment.system() || !segment.readable() || !privilege)
    return selector_fault(cpu, Exception::ts, selector);
  if (!segment.present()) return selector_fault(cpu, Exception::np, selector);
  if (!mark_accessed(cpu, descriptor)) return false;
  cpu.segment[name] = segment;
  return true;
}

bool load_new_segments(Cpu& cpu, const TaskState& task) noexcept {
  // Until its descriptor is checked, each register holds its selector and is unusable.
  for (unsigned i = seg_es; i <= seg_gs; ++i) {
    cpu.segment[i] = Segment{};
    cpu.segment[i].selector = task.selector[i];
  }
  if (!load_new_ldt(cpu, task.ldt)) return false;
  if ((task.eflags & flag::vm) != 0) {
    for (unsigned i = seg_es; i <= seg_gs; ++i) cpu.segment[i] = v86_segment(task.selector[i]);
    cpu.set_cpl(3);
    return true;
  }
  // The CPL is the RPL of the new CS, even while that is being checked.
  cpu.set_cpl(task.selector[seg_cs] & 3);
  if (!load_new_cs(cpu, task.selector[seg_cs]) || !load_new_ss(cpu, task.selector[seg_ss])) return false;
  for (const SegmentName name : {seg_es, seg_ds, seg_fs, seg_gs}) {
    if (!load_new_data(cpu, name, task.selector[name])) return false;
  }
  return true;
}

bool push_error(Cpu& cpu, const Segment& tss, uint32_t error) noexcept {
  return cpu.push(error, is_32bit(tss) ? 4 : 2);
}

// Step 8 to 12: everything that still can fault in the old task's context. Memory of both TSSs is probed
// first, so that a page fault leaves no half-saved task.
bool exchange_memory(Cpu& cpu, const Descriptor& tss, TaskSwitch why, uint32_t old_eip, uint64_t saved_flags,
                     TaskState& task) noexcept {
  const Segment old = cpu.tr;
  const uint32_t old_size = is_32bit(old) ? tss32_size : tss16_size;
  if (old.limit < old_size - 1) return selector_fault(cpu, Exception::ts, old.selector);
  if (!cpu.probe_write_system(old.base, old_size)) return false;
  if (!cpu.probe_write_system(tss.segment.base, 2)) return false;
  if (!load_task(cpu, tss.segment, task)) return false;
  const bool nested = why == TaskSwitch::call || why == TaskSwitch::gate;
  uint64_t flags = cpu.rflags() | saved_flags;
  if (why == TaskSwitch::iret) flags &= ~flag::nt;
  if (!nested && !set_busy(cpu, old.selector, false)) return false;
  if (!save_task(cpu, old, old_eip, static_cast<uint32_t>(flags))) return false;
  if (nested && !cpu.write_system(tss.segment.base, old.selector)) return false;
  return why == TaskSwitch::iret || set_busy(cpu, tss.segment.selector, true);
}

}  // namespace

bool switch_task(Cpu& cpu, uint16_t selector, TaskSwitch why, uint64_t return_rip, const uint32_t* error,
                 uint64_t saved_flags) noexcept {
  Descriptor tss;
  TaskState task;
  if (!read_new_tss(cpu, selector, why, tss)) return false;
  const bool paging = (cpu.cr0 & cr0::pg) != 0 && is_32bit(tss.segment);
  if (!exchange_memory(cpu, tss, why, static_cast<uint32_t>(return_rip), saved_flags, task)) return false;
  if (paging) {
    if ((cpu.cr4 & cr4::pae) != 0 && !cpu.load_pdptrs(task.cr3)) return false;
    cpu.cr3 = task.cr3;
    cpu.flush_tlb(true);
  }
  // The commit point: from here on faults are the new task's.
  cpu.tr = tss.segment;
  cpu.tr.attributes |= busy;
  cpu.cr0 |= cr0::ts;
  cpu.dr7 &= ~uint64_t{0x155};  // local breakpoints belong to a task
  for (unsigned i = 0; i < 8; ++i) cpu.gpr[i] = task.gpr[i];
  cpu.rip = task.eip;
  uint64_t flags = task.eflags;
  if (why == TaskSwitch::call || why == TaskSwitch::gate) flags |= flag::nt;
  if (!is_32bit(tss.segment)) flags &= 0xffff;
  cpu.set_rflags((flags & flag::valid) | flag::fixed);
  const bool loaded = load_new_segments(cpu, task);
  cpu.state_changed();
  if (!loaded) return true;
  if (error != nullptr && !push_error(cpu, tss.segment, *error)) return true;
  if (cpu.rip > cpu.segment[seg_cs].limit) {
    cpu.raise(Exception::gp, 0);
  } else if (task.trap) {
    cpu.raise_debug(0x8000);  // BT
  }
  return true;
}

}  // namespace lodge::kvm::soft
