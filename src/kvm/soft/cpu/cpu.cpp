#include "kvm/soft/cpu/cpu.hpp"

#include "kvm/soft/cpu/platform.hpp"
#include "kvm/soft/decode/decoder.hpp"
#include "kvm/soft/interpret/op.hpp"

namespace lodge::kvm::soft {

Cpu::Cpu(Platform& platform, unsigned id) : platform_(platform), id_(id) {
  tlb = &tlb_sets[1];
}

void Cpu::set_reg(uint8_t byte_offset, unsigned size, uint64_t value) noexcept {
  switch (size) {
    case 1: reg<uint8_t>(byte_offset) = static_cast<uint8_t>(value); break;
    case 2: reg<uint16_t>(byte_offset) = static_cast<uint16_t>(value); break;
    case 4: reg<uint64_t>(byte_offset) = static_cast<uint32_t>(value); break;
    default: reg<uint64_t>(byte_offset) = value; break;
  }
}

uint64_t Cpu::get_reg(uint8_t byte_offset, unsigned size) noexcept {
  switch (size) {
    case 1: return reg<uint8_t>(byte_offset);
    case 2: return reg<uint16_t>(byte_offset);
    case 4: return reg<uint32_t>(byte_offset);
    default: return reg<uint64_t>(byte_offset);
  }
}

uint64_t Cpu::rflags() const noexcept {
  return system_flags | (uint64_t{arith} >> 8 & 0xd5) | uint64_t{arith & 1u} << 11 | flag::fixed;
}

void Cpu::set_rflags(uint64_t value) noexcept {
  const uint64_t changed = (value ^ system_flags) & (flag::tf | flag::vm | flag::ac | flag::rf);
  set_arith(value);
  system_flags = (value & flag::valid & ~flag::arithmetic) | flag::fixed;
  if (changed != 0) state_changed();
}

void Cpu::set_cpl(unsigned cpl) noexcept {
  cpl_ = cpl;
  state_changed();
}

void Cpu::set_smm(bool on) noexcept {
  smm = on;
  platform_.smm_changed();
  flush_tlb(false);
  state_changed();
}

unsigned Cpu::view() const noexcept {
  if (cpl_ == 3) return 0;
  return (cr4 & cr4::smap) != 0 && (system_flags & flag::ac) == 0 ? 1 : 2;
}

void Cpu::state_changed() noexcept {
  const Segment& cs = segment[seg_cs];
  if (long_mode() && cs.is_long())
    mode_ = Mode::bits64;
  else
    mode_ = protected_mode() && !v86() && cs.big() ? Mode::bits32
            : !protected_mode() && cs.big()        ? Mode::bits32
                                                   : Mode::bits16;
  const bool ac = (system_flags & flag::ac) != 0;
  const auto is_flat = [](const Segment& s) {
    return s.base == 0 && s.limit == 0xffffffff && s.present() && s.writable() && !s.expand_down();
  };
  flat = mode_ == Mode::bits64 ||
         (mode_ == Mode::bits32 && protected_mode() && cs.limit == 0xffffffff && segment[seg_ss].big() &&
          is_flat(segment[seg_ds]) && is_flat(segment[seg_es]) && is_flat(segment[seg_ss]));
  alignment_checks = ac && cpl_ == 3 && (cr0 & cr0::am) != 0;
  code_breakpoints = false;
  watchpoints = false;
  if ((active_dr7() & 0xff) != 0)
    for (unsigned i = 0; i < 4; ++i) {
      if ((active_dr7() >> 2 * i & 3) == 0) continue;
      ((active_dr7() >> (16 + 4 * i) & 3) == 0 ? code_breakpoints : watchpoints) = true;
    }
  tlb = &tlb_sets[tlb_set()];
  decode_key = soft::decode_key(*this);
  slow = (system_flags & flag::tf) != 0 || code_breakpoints || debug_step;
}

void Cpu::fp_control_changed() noexcept {
  decode_key = soft::decode_key(*this);
}

uint64_t Cpu::this_rip(const Op& op) const noexcept {
  return truncate_rip(gpr[gpr_rip] + op.offset);
}
uint64_t Cpu::next_rip(const Op& op) const noexcept {
  return truncate_rip(gpr[gpr_rip] + op.offset + op.length);
}

bool Cpu::raise(Exception which) noexcept {
  pending = {.valid = true, .vector = which};
  return false;
}

bool Cpu::raise(Exception which, uint32_t error) noexcept {
  pending = {.valid = true, .vector = which, .has_error = true, .error = error};
  return false;
}

bool Cpu::raise_page_fault(uint64_t linear, uint32_t error) noexcept {
  pending = {.valid = true, .vector = Exception::pf, .has_error = true, .error = error, .payload = linear};
  return false;
}

bool Cpu::raise_debug(uint64_t dr6_bits) noexcept {
  pending = {.valid = true, .vector = Exception::db, .payload = dr6_bits};
  return false;
}

bool Cpu::canonical(uint64_t linear) const noexcept {
  const unsigned shift = (cr4 & cr4::la57) != 0 ? 64 - 57 : 64 - 48;
  return static_cast<uint64_t>(static_cast<int64_t>(linear << shift) >> shift) == linear;
}

std::mutex& Cpu::platform_split_lock() noexcept {
  return platform_.split_lock();
}

uint64_t Cpu::effective_address(const Op& op) const noexcept {
  const uint64_t sum = gpr[op.base] + (gpr[op.index] << op.scale) + static_cast<uint64_t>(int64_t{op.disp});
  return op.address_size == 8   ? sum
         : op.address_size == 4 ? static_cast<uint32_t>(sum)
                                : static_cast<uint16_t>(sum);
}

bool Cpu::linear(const Op& op, unsigned size, bool write, uint64_t& out) noexcept {
  return linear(static_cast<SegmentName>(op.segment), effective_address(op), size, write, out);
}

bool Cpu::linear(SegmentName name, uint64_t offset, unsigned size, bool write, uint64_t& out) noexcept {
  const Segment& s = segment[name];
  if (mode_ == Mode::bits64) {
    const uint64_t address = name >= seg_fs ? s.base + offset : offset;
    out = address;
    if (canonical(address) && canonical(address + size - 1)) return true;
    return raise(name == seg_ss ? Exception::ss : Exception::gp, 0);
  }
  out = static_cast<uint32_t>(s.base + offset);
  if (name == seg_none) return true;
  const Exception violation = name == seg_ss ? Exception::ss : Exception::gp;
  if (protected_mode() && !v86()) {
    // A null selector leaves the segment unusable (attributes 0): neither present nor readable.
    if (!s.present() || (write ? !s.writable() : !s.readable())) return raise(violation, 0);
  }
  const uint64_t last = offset + size - 1;
  if (s.expand_down()) {
    const uint64_t upper = s.big() ? 0xffffffff : 0xffff;
    if (offset <= s.limit || last > upper) return raise(violation, 0);
  } else if (last > s.limit) {
    return raise(violation, 0);
  }
  return true;
}

uint64_t Cpu::stack_mask() const noexcept {
  if (mode_ == Mode::bits64) return ~uint64_t{0};
  return segment[seg_ss].big() ? 0xffffffff : 0xffff;
}

void Cpu::set_stack_pointer(uint64_t value) noexcept {
  const uint64_t mask = stack_mask();
  if (mask == 0xffff)
    gpr[rsp] = (gpr[rsp] & ~mask) | (value & mask);
  else
    gpr[rsp] = value & mask;
}

bool Cpu::push(uint64_t value, unsigned size) noexcept {
  const uint64_t top = (gpr[rsp] - size) & stack_mask();
  uint64_t address = 0;
  if (!linear(seg_ss, top, size, true, address) || !write_bytes(address, &value, size)) return false;
  set_stack_pointer(top);
  return true;
}

bool Cpu::pop(uint64_t& value, unsigned size) noexcept {
  const uint64_t top = gpr[rsp] & stack_mask();
  uint64_t address = 0;
  uint64_t data = 0;
  if (!linear(seg_ss, top, size, false, address) || !read_bytes(address, &data, size)) return false;
  value = data;
  set_stack_pointer(top + size);
  return true;
}

}  // namespace lodge::kvm::soft
