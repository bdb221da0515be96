#include "kvm/soft/cpu/segments.hpp"
#include "kvm/soft/interpret/system.hpp"

namespace lodge::kvm::soft::system {
namespace {

bool long64(const Cpu& cpu) noexcept {
  return cpu.mode() == Mode::bits64;
}

bool read_table(Cpu& cpu, const Op& op, DescriptorTable& out) noexcept {
  if (cpu.cpl() != 0) return cpu.raise(Exception::gp, 0);
  const unsigned base_size = long64(cpu) ? 8 : 4;
  uint64_t address = 0, base = 0;
  uint16_t limit = 0;
  if (!cpu.linear(op, 2 + base_size, false, address)) return false;
  if (!cpu.read(address, limit) || !cpu.read_bytes(address + 2, &base, base_size)) return false;
  if (!long64(cpu) && op.size == 2) base &= 0xff'ffff;
  if (long64(cpu) && !cpu.canonical(base)) return cpu.raise(Exception::gp, 0);
  out = {.base = base, .limit = limit};
  return true;
}

Step write_table(Cpu& cpu, const Op& op, const DescriptorTable& table) noexcept {
  if (cpu.cpl() != 0 && (cpu.cr4 & cr4::umip) != 0) return general_protection(cpu);
  const unsigned base_size = long64(cpu) ? 8 : 4;
  std::array<uint8_t, 10> image{};
  std::memcpy(image.data(), &table.limit, 2);
  std::memcpy(&image[2], &table.base, 8);
  uint64_t address = 0;
  if (!cpu.linear(op, 2 + base_size, true, address)) return Step::fault;
  return cpu.write_bytes(address, image.data(), 2 + base_size) ? Step::next : Step::fault;
}

Step store_selector(Cpu& cpu, const Op& op, uint16_t selector) noexcept {
  if (real_or_v86(cpu)) return undefined_opcode(cpu, op);
  if (cpu.cpl() != 0 && (cpu.cr4 & cr4::umip) != 0) return general_protection(cpu);
  if ((op.flags & Op::has_memory) == 0) {
    cpu.set_reg(op.dst, op.size, selector);
    return Step::next;
  }
  uint64_t address = 0;
  if (!cpu.linear(op, 2, true, address) || !cpu.write(address, selector)) return Step::fault;
  return Step::next;
}

Step load_selector(Cpu& cpu, const Op& op, bool (*load)(Cpu&, uint16_t) noexcept) noexcept {
  if (real_or_v86(cpu)) return undefined_opcode(cpu, op);
  if (cpu.cpl() != 0) return general_protection(cpu);
  uint16_t selector = 0;
  if (!load16(cpu, op, selector) || !load(cpu, selector)) return Step::fault;
  return end_block(cpu, op);
}

// What LAR, LSL, VERR and VERW look at. `visible`: the descriptor exists and privilege permits to see it.
bool inspect(Cpu& cpu, const Op& op, Descriptor& out, bool& visible) noexcept {
  uint16_t selector = 0;
  visible = false;
  if (!load16(cpu, op, selector)) return false;
  if (null_selector(selector) || !locate_descriptor(cpu, selector, 8, out.address)) return true;
  if (!cpu.read_system(out.address, out.raw)) return false;
  out.segment = decode_descriptor(out.raw, selector);
  visible =
      out.segment.conforming() || (cpu.cpl() <= out.segment.dpl() && (selector & 3u) <= out.segment.dpl());
  return true;
}

// Types of system descriptors, as bit masks, that LAR and LSL accept.
constexpr unsigned lar_types = 0x1a3e, lar_types_long = 0x1a04, lsl_types = 0x0a0e, lsl_types_long = 0x0a04;

bool has_type(const Cpu& cpu, const Segment& segment, unsigned types, unsigned types_long) noexcept {
  if (!segment.system()) return true;
  return ((cpu.long_mode() ? types_long : types) >> segment.type() & 1) != 0;
}

}  // namespace

Step lgdt(Cpu& cpu, const Op& op) noexcept {
  return read_table(cpu, op, cpu.gdtr) ? Step::next : Step::fault;
}
Step lidt(Cpu& cpu, const Op& op) noexcept {
  return read_table(cpu, op, cpu.idtr) ? Step::next : Step::fault;
}
Step sgdt(Cpu& cpu, const Op& op) noexcept {
  return write_table(cpu, op, cpu.gdtr);
}
Step sidt(Cpu& cpu, const Op& op) noexcept {
  return write_table(cpu, op, cpu.idtr);
}
Step lldt(Cpu& cpu, const Op& op) noexcept {
  return load_selector(cpu, op, load_ldtr);
}
Step sldt(Cpu& cpu, const Op& op) noexcept {
  return store_selector(cpu, op, cpu.ldtr.selector);
}
Step ltr(Cpu& cpu, const Op& op) noexcept {
  return load_selector(cpu, op, load_task_register);
}
Step str(Cpu& cpu, const Op& op) noexcept {
  return store_selector(cpu, op, cpu.tr.selector);
}

Step lar(Cpu& cpu, const Op& op) noexcept {
  if (real_or_v86(cpu)) return undefined_opcode(cpu, op);
  Descriptor descriptor;
  bool visible = false;
  if (!inspect(cpu, op, descriptor, visible)) return Step::fault;
  visible = visible && has_type(cpu, descriptor.segment, lar_types, lar_types_long);
  if (visible) cpu.set_reg(op.dst, op.size, descriptor.raw >> 32 & 0x00ff'ff00);
  cpu.set_zf(visible);
  return Step::next;
}

Step lsl(Cpu& cpu, const Op& op) noexcept {
  if (real_or_v86(cpu)) return undefined_opcode(cpu, op);
  Descriptor descriptor;
  bool visible = false;
  if (!inspect(cpu, op, descriptor, visible)) return Step::fault;
  visible = visible && has_type(cpu, descriptor.segment, lsl_types, lsl_types_long);
  if (visible) cpu.set_reg(op.dst, op.size, descriptor.segment.limit);
  cpu.set_zf(visible);
  return Step::next;
}

Step verr(Cpu& cpu, const Op& op) noexcept {
  if (real_or_v86(cpu)) return undefined_opcode(cpu, op);
  Descriptor descriptor;
  bool visible = false;
  if (!inspect(cpu, op, descriptor, visible)) return Step::fault;
  cpu.set_zf(visible && !descriptor.segment.system() && descriptor.segment.readable());
  return Step::next;
}

Step verw(Cpu& cpu, const Op& op) noexcept {
  if (real_or_v86(cpu)) return undefined_opcode(cpu, op);
  Descriptor descriptor;
  bool visible = false;
  if (!inspect(cpu, op, descriptor, visible)) return Step::fault;
  cpu.set_zf(visible && descriptor.segment.writable());
  return Step::next;
}

Step arpl(Cpu& cpu, const Op& op) noexcept {
  if (real_or_v86(cpu)) return undefined_opcode(cpu, op);
  const unsigned wanted = cpu.reg<uint16_t>(op.src) & 3u;
  uint64_t address = 0;
  uint16_t selector = 0;
  const bool memory = (op.flags & Op::has_memory) != 0;
  if (memory) {
    // Writable only where it writes.
    if (!cpu.linear(op, 2, false, address) || !cpu.read(address, selector)) return Step::fault;
  } else {
    selector = cpu.reg<uint16_t>(op.dst);
  }
  const bool raised = (selector & 3u) < wanted;
  const auto result = static_cast<uint16_t>(raised ? (selector & ~3u) | wanted : selector);
  if (memory) {
    if (raised && (!cpu.linear(op, 2, true, address) || !cpu.write(address, result))) return Step::fault;
  } else if (raised) {
    cpu.reg<uint16_t>(op.dst) = result;
  }
  cpu.set_zf(raised);
  return Step::next;
}

}  // namespace lodge::kvm::soft::system
