#include "kvm/soft/cpu/segments.hpp"

namespace lodge::kvm::soft {
namespace {

constexpr uint64_t accessed = uint64_t{1} << 40;

bool long64(const Cpu& cpu) noexcept {
  return cpu.mode() == Mode::bits64;
}

// A readable segment for the data registers: type and privilege (SDM volume 3, 5.6 and 5.7).
bool usable_data(const Segment& segment, unsigned cpl, unsigned rpl) noexcept {
  if (segment.system() || !segment.readable()) return false;
  return segment.conforming() || (rpl <= segment.dpl() && cpl <= segment.dpl());
}

}  // namespace

Segment decode_descriptor(uint64_t raw, uint16_t selector) noexcept {
  Segment out;
  out.selector = selector;
  out.attributes = static_cast<uint16_t>(raw >> 40 & 0xf0ff);
  out.base = (raw >> 16 & 0xffffff) | (raw >> 32 & 0xff00'0000);
  out.limit = static_cast<uint32_t>((raw & 0xffff) | (raw >> 32 & 0xf0000));
  if ((out.attributes & Segment::granular_bit) != 0) out.limit = out.limit << 12 | 0xfff;
  return out;
}

bool locate_descriptor(const Cpu& cpu, uint16_t selector, unsigned size, uint64_t& address) noexcept {
  const uint32_t offset = selector & 0xfff8u;
  if ((selector & 4) != 0) {
    if (!cpu.ldtr.present() || offset + size - 1 > cpu.ldtr.limit) return false;
    address = cpu.ldtr.base + offset;
  } else {
    if (offset + size - 1 > cpu.gdtr.limit) return false;
    address = cpu.gdtr.base + offset;
  }
  // Outside long mode table addresses wrap at 4 GiB.
  if (!cpu.long_mode()) address &= 0xffff'ffff;
  return true;
}

bool read_descriptor(Cpu& cpu, uint16_t selector, Exception fault, Descriptor& out) noexcept {
  if (!locate_descriptor(cpu, selector, 8, out.address)) return selector_fault(cpu, fault, selector);
  if (!cpu.read_system(out.address, out.raw)) return false;
  out.segment = decode_descriptor(out.raw, selector);
  return true;
}

bool mark_accessed(Cpu& cpu, Descriptor& descriptor) noexcept {
  if ((descriptor.raw & accessed) != 0) return true;
  descriptor.raw |= accessed;
  if (!cpu.write_system(descriptor.address + 5, static_cast<uint8_t>(descriptor.raw >> 40))) return false;
  descriptor.segment.attributes |= 1;
  return true;
}

bool read_upper_half(Cpu& cpu, const Descriptor& descriptor, uint32_t& upper) noexcept {
  const uint16_t selector = descriptor.segment.selector;
  uint64_t address = 0, raw = 0;
  if (!locate_descriptor(cpu, selector, 16, address)) return selector_fault(cpu, Exception::gp, selector);
  if (!cpu.read_system(address + 8, raw)) return false;
  if ((raw >> 40 & 0x1f) != 0) return selector_fault(cpu, Exception::gp, selector);
  upper = static_cast<uint32_t>(raw);
  return true;
}

Segment v86_segment(uint16_t selector) noexcept {
  Segment out;
  out.selector = selector;
  out.base = uint64_t{selector} << 4;
  out.limit = 0xffff;
  out.attributes = 0xf3;
  return out;
}

void load_real_segment(Cpu& cpu, SegmentName name, uint16_t selector) noexcept {
  Segment& segment = cpu.segment[name];
  if (cpu.v86()) {
    segment = v86_segment(selector);
    return;
  }
  // Limit and attributes stay: "unreal mode" relies on it. A segment that protected mode left null becomes
  // usable.
  segment.selector = selector;
  segment.base = uint64_t{selector} << 4;
  if (!segment.present()) {
    segment.attributes = 0x93;
    segment.limit = 0xffff;
  }
}

Segment null_stack_segment(unsigned cpl) noexcept {
  Segment out;
  out.selector = static_cast<uint16_t>(cpl);
  out.attributes = static_cast<uint16_t>(cpl << 5);  // the DPL of SS is what snapshots take the CPL from
  return out;
}

static bool load_ss(Cpu& cpu, uint16_t selector) noexcept {
  const unsigned cpl = cpu.cpl(), rpl = selector & 3;
  if (null_selector(selector)) {
    if (!long64(cpu) || cpl == 3 || rpl != cpl) return cpu.raise(Exception::gp, 0);
    cpu.segment[seg_ss] = null_stack_segment(cpl);
    return true;
  }
  Descriptor descriptor;
  if (!check_stack_segment(cpu, selector, cpl, Exception::gp, descriptor)) return false;
  if (!mark_accessed(cpu, descriptor)) return false;
  cpu.segment[seg_ss] = descriptor.segment;
  return true;
}

static bool load_data(Cpu& cpu, SegmentName name, uint16_t selector) noexcept {
  Segment& segment = cpu.segment[name];
  if (null_selector(selector)) {
    segment = Segment{};
    segment.selector = selector;
    return true;
  }
  Descriptor descriptor;
  if (!read_descriptor(cpu, selector, Exception::gp, descriptor)) return false;
  if (!usable_data(descriptor.segment, cpu.cpl(), selector & 3)) {
    return selector_fault(cpu, Exception::gp, selector);
  }
  if (!descriptor.segment.present()) return selector_fault(cpu, Exception::np, selector);
  if (!mark_accessed(cpu, descriptor)) return false;
  segment = descriptor.segment;
  return true;
}

bool load_data_segment(Cpu& cpu, SegmentName name, uint16_t selector) noexcept {
  if (!cpu.protected_mode() || cpu.v86()) {
    load_real_segment(cpu, name, selector);
  } else if (!(name == seg_ss ? load_ss(cpu, selector) : load_data(cpu, name, selector))) {
    return false;
  }
  // Nothing that a block depends on follows FS and GS.
  if (name <= seg_ds) cpu.state_changed();
  return true;
}

void drop_inaccessible_segments(Cpu& cpu) noexcept {
  for (const SegmentName name : {seg_es, seg_ds, seg_fs, seg_gs}) {
    Segment& segment = cpu.segment[name];
    if (segment.present() && segment.dpl() < cpu.cpl() && !segment.conforming()) {
      segment.selector = 0;
      segment.attributes = 0;
    }
  }
}

bool check_stack_segment(Cpu& cpu, uint16_t selector, unsigned cpl, Exception fault,
                         Descriptor& out) noexcept {
  if (null_selector(selector)) return selector_fault(cpu, fault, selector);
  if (!read_descriptor(cpu, selector, fault, out)) return false;
  if ((selector & 3u) != cpl || !out.segment.writable() || out.segment.dpl() != cpl) {
    return selector_fault(cpu, fault, selector);
  }
  if (!out.segment.present()) return selector_fault(cpu, Exception::ss, selector);
  return true;
}

bool check_target(Cpu& cpu, const Segment& cs, uint64_t rip) noexcept {
  const bool valid = cpu.long_mode() && cs.is_long() ? cpu.canonical(rip) : rip <= cs.limit;
  return valid || cpu.raise(Exception::gp, 0);
}

bool load_ldtr(Cpu& cpu, uint16_t selector) noexcept {
  if (null_selector(selector)) {
    cpu.ldtr = Segment{};
    cpu.ldtr.selector = selector;
    return true;
  }
  if ((selector & 4) != 0) return selector_fault(cpu, Exception::gp, selector);
  Descriptor descriptor;
  if (!read_descriptor(cpu, selector, Exception::gp, descriptor)) return false;
  if (!descriptor.segment.system() || descriptor.segment.type() != system_type::ldt) {
    return selector_fault(cpu, Exception::gp, selector);
  }
  if (!descriptor.segment.present()) return selector_fault(cpu, Exception::np, selector);
  if (cpu.long_mode()) {
    uint32_t upper = 0;
    if (!read_upper_half(cpu, descriptor, upper)) return false;
    descriptor.segment.base |= uint64_t{upper} << 32;
    if (!cpu.canonical(descriptor.segment.base)) return selector_fault(cpu, Exception::gp, selector);
  }
  cpu.ldtr = descriptor.segment;
  return true;
}

bool load_task_register(Cpu& cpu, uint16_t selector) noexcept {
  if (null_selector(selector)) return cpu.raise(Exception::gp, 0);
  if ((selector & 4) != 0) return selector_fault(cpu, Exception::gp, selector);
  Descriptor descriptor;
  if (!read_descriptor(cpu, selector, Exception::gp, descriptor)) return false;
  const unsigned type = descriptor.segment.type();
  const bool available = type == system_type::tss32 || (type == system_type::tss16 && !cpu.long_mode());
  if (!descriptor.segment.system() || !available) return selector_fault(cpu, Exception::gp, selector);
  if (!descriptor.segment.present()) return selector_fault(cpu, Exception::np, selector);
  if (cpu.long_mode()) {
    uint32_t upper = 0;
    if (!read_upper_half(cpu, descriptor, upper)) return false;
    descriptor.segment.base |= uint64_t{upper} << 32;
    if (!cpu.canonical(descriptor.segment.base)) return selector_fault(cpu, Exception::gp, selector);
  }
  descriptor.segment.attributes |= 2;  // busy
  if (!cpu.write_system(descriptor.address + 5, static_cast<uint8_t>(descriptor.segment.attributes))) {
    return false;
  }
  cpu.tr = descriptor.segment;
  return true;
}

bool within_limit(const Segment& segment, uint64_t offset, unsigned size) noexcept {
  const uint64_t last = offset + size - 1;
  if (!segment.expand_down()) return last <= segment.limit;
  return offset > segment.limit && last <= (segment.big() ? 0xffff'ffff : 0xffff);
}

StackBuilder::StackBuilder(Cpu& cpu, const Segment& ss, uint64_t sp, bool flat64, bool user,
                           uint16_t selector_error) noexcept
    : cpu_(cpu), ss_(ss), sp_(sp), flat64_(flat64), user_(user), selector_error_(selector_error) {
  mask_ = flat64 ? ~uint64_t{0} : ss.big() ? 0xffff'ffff : 0xffff;
}

bool StackBuilder::push(uint64_t value, unsigned size) noexcept {
  const uint64_t offset = (sp_ - size) & mask_;
  uint64_t address = offset;
  if (flat64_) {
    if (!cpu_.canonical(offset) || !cpu_.canonical(offset + size - 1)) {
      return selector_fault(cpu_, Exception::ss, selector_error_);
    }
  } else {
    if (!within_limit(ss_, offset, size)) return selector_fault(cpu_, Exception::ss, selector_error_);
    address = (ss_.base + offset) & 0xffff'ffff;
  }
  bool written = false;
  if (user_) {
    written = cpu_.write_bytes(address, &value, size);
  } else if (size == 8) {
    written = cpu_.write_system(address, value);
  } else if (size == 4) {
    written = cpu_.write_system(address, static_cast<uint32_t>(value));
  } else {
    written = cpu_.write_system(address, static_cast<uint16_t>(value));
  }
  if (!written) return false;
  sp_ = (sp_ & ~mask_) | offset;
  return true;
}

bool read_inner_stack(Cpu& cpu, unsigned cpl, InnerStack& out) noexcept {
  const bool tss32 = (cpu.tr.type() & 8) != 0;
  const uint32_t offset = tss32 ? 4 + cpl * 8 : 2 + cpl * 4;
  const uint32_t last = offset + (tss32 ? 5 : 3);
  if (!cpu.tr.present() || last > cpu.tr.limit) return selector_fault(cpu, Exception::ts, cpu.tr.selector);
  uint16_t selector = 0;
  if (tss32) {
    uint32_t sp = 0;
    if (!cpu.read_system(cpu.tr.base + offset, sp)) return false;
    if (!cpu.read_system(cpu.tr.base + offset + 4, selector)) return false;
    out.sp = sp;
  } else {
    uint16_t sp = 0;
    if (!cpu.read_system(cpu.tr.base + offset, sp)) return false;
    if (!cpu.read_system(cpu.tr.base + offset + 2, selector)) return false;
    out.sp = sp;
  }
  Descriptor descriptor;
  if (!check_stack_segment(cpu, selector, cpl, Exception::ts, descriptor)) return false;
  if (!mark_accessed(cpu, descriptor)) return false;
  out.ss = descriptor.segment;
  return true;
}

bool read_inner_stack64(Cpu& cpu, unsigned cpl, unsigned ist, uint64_t& sp) noexcept {
  const uint32_t offset = ist != 0 ? 0x1c + ist * 8 : 4 + cpl * 8;
  if (!cpu.tr.present() || offset + 7 > cpu.tr.limit) {
    return selector_fault(cpu, Exception::ts, cpu.tr.selector);
  }
  return cpu.read_system(cpu.tr.base + offset, sp);
}

}  // namespace lodge::kvm::soft
