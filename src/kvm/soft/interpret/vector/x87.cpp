// x87. Modelled: everything; arithmetic runs natively on an image of the guest's registers (FXRSTOR, the
// instruction, FXSAVE), control instructions are done by hand. The last-instruction pointers are the guest's:
// in 64-bit code FIP and FDP are 64-bit offsets; elsewhere their upper halves hold the selectors, which is
// how FXSAVE's two layouts overlay. Missing: FERR#/IRQ 13 (see x87_pending). SDM volume 1, chapter 8.
#include "kvm/soft/interpret/vector/x87.hpp"

#include <algorithm>

#include "kvm/soft/interpret/vector/access.hpp"
#include "kvm/soft/interpret/vector/run.hpp"

namespace lodge::kvm::soft::simd {
namespace {

constexpr uint16_t exceptions = 0x3f, stack_fault = 0x40, summary = 0x80, busy = 0x8000, top_mask = 0x3800;

unsigned top(const VectorState& v) {
  return get<uint16_t>(v, image::fsw) >> 11 & 7;
}

void update_summary(VectorState& v) {
  uint16_t fsw = get<uint16_t>(v, image::fsw);
  const bool pending = (fsw & ~get<uint16_t>(v, image::fcw) & exceptions) != 0;
  fsw = static_cast<uint16_t>(pending ? fsw | summary | busy : fsw & ~(summary | busy));
  put(v, image::fsw, fsw);
}

// Non-waiting control instructions: only the enables.
bool control_available(Cpu& cpu) {
  return (cpu.cr0 & (cr0::em | cr0::ts)) == 0 || cpu.raise(Exception::nm);
}

void set_pointers(Cpu& cpu, const Op& op) {
  VectorState& v = cpu.vector;
  const bool wide = cpu.mode() == Mode::bits64;
  put(v, image::fop, static_cast<uint16_t>(op.dst << 8 | op.src));
  const uint64_t fip = cpu.this_rip(op);
  put(v, image::fip, wide ? fip : (fip & 0xffff'ffff) | uint64_t{cpu.segment[seg_cs].selector} << 32);
  if ((op.flags & Op::has_memory) == 0) return;
  const uint64_t fdp = cpu.effective_address(op);
  const unsigned segment = op.segment == seg_none ? unsigned{seg_ds} : op.segment;
  put(v, image::fdp, wide ? fdp : (fdp & 0xffff'ffff) | uint64_t{cpu.segment[segment].selector} << 32);
}

}  // namespace

void init_x87(VectorState& v) noexcept {
  std::fill_n(v.fx.begin(), image::mxcsr, uint8_t{0});
  std::fill(v.fx.begin() + image::st, v.fx.begin() + image::x87_size, uint8_t{0});
  put<uint16_t>(v, image::fcw, 0x37f);
}

void load_fcw(VectorState& v, uint16_t value) noexcept {
  put(v, image::fcw, static_cast<uint16_t>((value & 0x1f3f) | 0x40));
  update_summary(v);
}

void load_fsw(VectorState& v, uint16_t value) noexcept {
  put(v, image::fsw, value);
  update_summary(v);
}

void enter_mmx(VectorState& v) noexcept {
  const unsigned t = top(v);
  if (t != 0) {
    // ST(i) is physical register (TOP + i) mod 8, and MMi is physical register i.
    const auto st = v.fx.begin() + image::st;
    std::rotate(st, st + 16 * ((8 - t) & 7), st + 128);
    put(v, image::fsw, static_cast<uint16_t>(get<uint16_t>(v, image::fsw) & ~top_mask));
  }
  v.fx[image::ftw] = 0xff;
}

uint16_t full_tags(const VectorState& v) noexcept {
  const unsigned t = top(v);
  unsigned tags = 0;
  for (unsigned physical = 0; physical < 8; ++physical) {
    unsigned tag = 3;
    if ((v.fx[image::ftw] >> physical & 1) != 0) {
      const unsigned at = image::st + 16 * ((physical - t) & 7);
      const auto fraction = get<uint64_t>(v, at);
      const unsigned exponent = get<uint16_t>(v, at + 8) & 0x7fffu;
      if (exponent == 0) {
        tag = fraction == 0 ? 1 : 2;
      } else {
        tag = exponent != 0x7fff && fraction >> 63 != 0 ? 0 : 2;
      }
    }
    tags |= tag << 2 * physical;
  }
  return static_cast<uint16_t>(tags);
}

uint8_t abridged_tags(uint16_t full) noexcept {
  unsigned tags = 0;
  for (unsigned i = 0; i < 8; ++i) tags |= (full >> 2 * i & 3u) != 3 ? 1u << i : 0;
  return static_cast<uint8_t>(tags);
}

Step run_x87(Cpu& cpu, const Op& op) noexcept {
  const Form& form = *static_cast<const Form*>(op.aux);
  if (!available(cpu, form.need)) return Step::fault;
  VectorState& v = cpu.vector;
  Bounce bounce;
  if (form.direction == Direction::read && !load(cpu, op, form, bounce)) return Step::fault;
  // Memory faults come before the instruction's own exceptions, which may then leave memory alone.
  if (form.direction == Direction::write && !prepare_store(cpu, op, form)) return Step::fault;
  // The stub must not meet a pending exception (it would be the host's #MF): with CR0.NE clear there may be
  // one.
  const uint16_t sticky = x87_pending(cpu) ? get<uint16_t>(v, image::fsw) & exceptions : 0;
  std::memcpy(bounce.fx.data(), v.fx.data(), image::x87_size);
  const auto edit = [&](unsigned offset, auto value) {
    std::memcpy(&bounce.fx[offset], &value, sizeof(value));
  };
  edit(image::mxcsr, uint32_t{0x1f80});
  if (sticky != 0)
    edit(image::fsw, static_cast<uint16_t>(get<uint16_t>(v, image::fsw) & ~(sticky | summary | busy)));
  const uint16_t arith = cpu.arith;
  form.stub(&cpu, &bounce);

  uint16_t fsw = 0;
  std::memcpy(&fsw, &bounce.fx[image::fsw], 2);
  // Unmasked invalid, overflow and underflow leave memory alone (and the stub's buffer too).
  const bool suppressed = (fsw & ~get<uint16_t>(v, image::fcw) & 0x19) != 0;
  if (form.direction == Direction::write && !suppressed && !store(cpu, op, form, bounce)) {
    cpu.arith = arith;
    return Step::fault;
  }
  const uint32_t guest_mxcsr = mxcsr(v);
  const auto pointers = std::pair{get<uint64_t>(v, image::fip), get<uint64_t>(v, image::fdp)};
  std::memcpy(v.fx.data(), bounce.fx.data(), image::x87_size);
  set_mxcsr(v, guest_mxcsr);
  put(v, image::fip, pointers.first);
  put(v, image::fdp, pointers.second);
  if (sticky != 0) load_fsw(v, fsw | sticky);
  set_pointers(cpu, op);
  return Step::next;
}

Step run_fninit(Cpu& cpu, const Op&) noexcept {
  if (!control_available(cpu)) return Step::fault;
  VectorState& v = cpu.vector;
  // The registers keep their bits: all that changes is which of them ST(0) is.
  const unsigned t = top(v);
  const auto st = v.fx.begin() + image::st;
  std::rotate(st, st + 16 * ((8 - t) & 7), st + 128);
  std::fill_n(v.fx.begin(), image::mxcsr, uint8_t{0});
  put<uint16_t>(v, image::fcw, 0x37f);
  cpu.fp_control_changed();
  return Step::next;
}

Step run_fnclex(Cpu& cpu, const Op&) noexcept {
  if (!control_available(cpu)) return Step::fault;
  VectorState& v = cpu.vector;
  put(v, image::fsw,
      static_cast<uint16_t>(get<uint16_t>(v, image::fsw) & ~(exceptions | stack_fault | summary | busy)));
  return Step::next;
}

Step run_fwait(Cpu& cpu, const Op&) noexcept {
  if ((cpu.cr0 & (cr0::mp | cr0::ts)) == (cr0::mp | cr0::ts)) {
    cpu.raise(Exception::nm);
    return Step::fault;
  }
  return x87_ready(cpu) ? Step::next : Step::fault;
}

Step run_x87_nop(Cpu& cpu, const Op&) noexcept {
  return control_available(cpu) ? Step::next : Step::fault;
}

Step run_fnstsw_ax(Cpu& cpu, const Op&) noexcept {
  if (!control_available(cpu)) return Step::fault;
  cpu.reg<uint16_t>(0) = get<uint16_t>(cpu.vector, image::fsw);
  return Step::next;
}

namespace {

Step store_word(Cpu& cpu, const Op& op, unsigned offset) {
  uint64_t linear = 0;
  if (!control_available(cpu) || !locate(cpu, op, 2, true, 0, linear) ||
      !cpu.write(linear, get<uint16_t>(cpu.vector, offset)))
    return Step::fault;
  return Step::next;
}

// ---- Environment: 14 or 28 bytes, in the real or the protected format ------------------------------------

bool real_format(const Cpu& cpu) {
  return !cpu.protected_mode() || cpu.v86();
}

struct Environment {
  std::array<uint8_t, 28> bytes{};

  void put16(unsigned at, uint64_t value) {
    const auto word = static_cast<uint16_t>(value);
    std::memcpy(&bytes[at], &word, 2);
  }
  void put32(unsigned at, uint64_t value) {
    const auto word = static_cast<uint32_t>(value);
    std::memcpy(&bytes[at], &word, 4);
  }
  uint64_t get(unsigned at, unsigned size) const {
    uint64_t value = 0;
    std::memcpy(&value, &bytes[at], size);
    return value;
  }
};

// Real-mode formats hold linear addresses of 20 (32) bits.
uint64_t flat(uint64_t pointer) {
  return (pointer & 0xffff'ffff) + ((pointer >> 32 & 0xffff) << 4);
}

Environment environment_of(const Cpu& cpu, unsigned width) {
  const VectorState& v = cpu.vector;
  const uint64_t fip = get<uint64_t>(v, image::fip), fdp = get<uint64_t>(v, image::fdp);
  const uint16_t fop = get<uint16_t>(v, image::fop) & 0x7ff;
  Environment e;
  const std::array<uint16_t, 3> words = {get<uint16_t>(v, image::fcw), get<uint16_t>(v, image::fsw),
                                         full_tags(v)};
  for (unsigned i = 0; i < 3; ++i) {
    if (width == 4) {
      e.put32(4 * i, 0xffff'0000u | words[i]);
    } else {
      e.put16(2 * i, words[i]);
    }
  }
  // 64-bit code stores no selectors: their place in the image belongs to the offset.
  const bool code64 = cpu.mode() == Mode::bits64;
  const uint64_t fcs = code64 ? 0 : fip >> 32 & 0xffff, fds = code64 ? 0 : fdp >> 32 & 0xffff;
  if (width == 4 && real_format(cpu)) {
    e.put32(12, flat(fip) & 0xffff);
    e.put32(16, (flat(fip) >> 16 & 0xffff) << 12 | fop);
    e.put32(20, flat(fdp) & 0xffff);
    e.put32(24, (flat(fdp) >> 16 & 0xffff) << 12);
  } else if (width == 4) {
    e.put32(12, fip);
    e.put32(16, fcs | static_cast<uint32_t>(fop) << 16);
    e.put32(20, fdp);
    e.put32(24, 0xffff'0000u | fds);
  } else if (real_format(cpu)) {
    e.put16(6, flat(fip));
    e.put16(8, (flat(fip) >> 16 & 0xf) << 12 | fop);
    e.put16(10, flat(fdp));
    e.put16(12, (flat(fdp) >> 16 & 0xf) << 12);
  } else {
    e.put16(6, fip);
    e.put16(8, fcs);
    e.put16(10, fdp);
    e.put16(12, fds);
  }
  return e;
}

void load_environment(Cpu& cpu, const Environment& e, unsigned width) {
  VectorState& v = cpu.vector;
  const auto word = [&](unsigned i) { return static_cast<uint16_t>(e.get(i * width, 2)); };
  // Registers stay where they are physically: the image is by ST(i), so it turns with TOP.
  const unsigned old_top = top(v), new_top = word(1) >> 11 & 7u;
  const auto st = v.fx.begin() + image::st;
  std::rotate(st, st + 16 * ((new_top - old_top) & 7), st + 128);
  load_fcw(v, word(0));
  load_fsw(v, word(1));
  v.fx[image::ftw] = abridged_tags(word(2));
  uint64_t fip = 0, fdp = 0, fop = 0;
  const bool code64 = cpu.mode() == Mode::bits64;
  if (real_format(cpu)) {
    fip = e.get(3 * width, 2) | e.get(4 * width, width) >> 12 << 16;
    fop = e.get(4 * width, 2) & 0x7ff;
    fdp = e.get(5 * width, 2) | e.get(6 * width, width) >> 12 << 16;
  } else if (width == 4) {
    fip = e.get(12, 4) | (code64 ? 0 : e.get(16, 2) << 32);
    fop = e.get(18, 2) & 0x7ff;
    fdp = e.get(20, 4) | (code64 ? 0 : e.get(24, 2) << 32);
  } else {
    fip = e.get(6, 2) | (code64 ? 0 : e.get(8, 2) << 32);
    fdp = e.get(10, 2) | (code64 ? 0 : e.get(12, 2) << 32);
  }
  put(v, image::fip, fip);
  put(v, image::fdp, fdp);
  put(v, image::fop, static_cast<uint16_t>(fop));
}

}  // namespace

Step run_fnstsw(Cpu& cpu, const Op& op) noexcept {
  return store_word(cpu, op, image::fsw);
}
Step run_fnstcw(Cpu& cpu, const Op& op) noexcept {
  return store_word(cpu, op, image::fcw);
}

Step run_fldcw(Cpu& cpu, const Op& op) noexcept {
  uint64_t linear = 0;
  uint16_t value = 0;
  if (!available(cpu, Need::x87) || !locate(cpu, op, 2, false, 0, linear) || !cpu.read(linear, value))
    return Step::fault;
  load_fcw(cpu.vector, value);
  cpu.fp_control_changed();
  return Step::next;
}

Step run_fnstenv(Cpu& cpu, const Op& op) noexcept {
  const unsigned width = op.size == 2 ? 2 : 4;
  uint64_t linear = 0;
  if (!control_available(cpu) || !cpu.linear(op, 7 * width, true, linear) || !check_ac(cpu, linear, width))
    return Step::fault;
  const Environment e = environment_of(cpu, width);
  if (!cpu.write_bytes(linear, e.bytes.data(), 7 * width)) return Step::fault;
  // All exceptions are masked after the store.
  load_fcw(cpu.vector, get<uint16_t>(cpu.vector, image::fcw) | exceptions);
  cpu.fp_control_changed();
  return Step::next;
}

Step run_fldenv(Cpu& cpu, const Op& op) noexcept {
  const unsigned width = op.size == 2 ? 2 : 4;
  uint64_t linear = 0;
  Environment e;
  if (!available(cpu, Need::x87) || !cpu.linear(op, 7 * width, false, linear) ||
      !check_ac(cpu, linear, width) || !cpu.read_bytes(linear, e.bytes.data(), 7 * width))
    return Step::fault;
  load_environment(cpu, e, width);
  cpu.fp_control_changed();
  return Step::next;
}

Step run_fnsave(Cpu& cpu, const Op& op) noexcept {
  const unsigned width = op.size == 2 ? 2 : 4, head = 7 * width;
  uint64_t linear = 0;
  if (!control_available(cpu) || !cpu.linear(op, head + 80, true, linear) || !check_ac(cpu, linear, width))
    return Step::fault;
  std::array<uint8_t, 108> area;
  const Environment e = environment_of(cpu, width);
  std::memcpy(area.data(), e.bytes.data(), head);
  for (unsigned i = 0; i < 8; ++i) std::memcpy(&area[head + 10 * i], &cpu.vector.fx[image::st + 16 * i], 10);
  if (!cpu.write_bytes(linear, area.data(), head + 80)) return Step::fault;
  return run_fninit(cpu, op);
}

Step run_frstor(Cpu& cpu, const Op& op) noexcept {
  const unsigned width = op.size == 2 ? 2 : 4, head = 7 * width;
  uint64_t linear = 0;
  std::array<uint8_t, 108> area;
  if (!available(cpu, Need::x87) || !cpu.linear(op, head + 80, false, linear) ||
      !check_ac(cpu, linear, width) || !cpu.read_bytes(linear, area.data(), head + 80))
    return Step::fault;
  Environment e;
  std::memcpy(e.bytes.data(), area.data(), head);
  load_environment(cpu, e, width);
  for (unsigned i = 0; i < 8; ++i) {
    std::memcpy(&cpu.vector.fx[image::st + 16 * i], &area[head + 10 * i], 10);
    std::memset(&cpu.vector.fx[image::st + 16 * i + 10], 0, 6);
  }
  cpu.fp_control_changed();
  return Step::next;
}

}  // namespace lodge::kvm::soft::simd
