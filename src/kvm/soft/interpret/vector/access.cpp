#include "kvm/soft/interpret/vector/access.hpp"

#include <bit>

#include "kvm/soft/interpret/vector/host.hpp"

namespace lodge::kvm::soft::simd {
namespace {

constexpr uint32_t mxcsr_mm = 1u << 17;

uint16_t word_of(const Cpu& cpu, unsigned offset) {
  uint16_t value = 0;
  std::memcpy(&value, &cpu.vector.fx[offset], 2);
  return value;
}

bool not_task_switched(Cpu& cpu) {
  return (cpu.cr0 & cr0::ts) == 0 || cpu.raise(Exception::nm);
}

// VEX and EVEX: protected mode, and the components in XCR0.
bool extended(Cpu& cpu, uint64_t components) {
  if (!cpu.protected_mode() || cpu.v86() || (cpu.cr4 & cr4::osxsave) == 0 ||
      (cpu.xcr0 & components) != components)
    return cpu.raise(Exception::ud);
  return not_task_switched(cpu);
}

// One bit for each memory element that is touched.
uint64_t active_elements(const Cpu& cpu, const Form& form) {
  const uint64_t all = form.elements >= 64 ? ~uint64_t{0} : (uint64_t{1} << form.elements) - 1;
  if (form.masking == Masking::none) return all;
  uint64_t bits = 0;
  if (form.masking == Masking::vector) {
    const auto& reg = cpu.vector.zmm[form.mask];
    for (unsigned i = 0; i < form.elements; ++i)
      bits |= uint64_t{reg[(i + 1u) * form.element_size - 1u]} >> 7 << i;
    return bits;
  }
  const uint64_t wanted = form.mask_elements >= 64 ? ~uint64_t{0} : (uint64_t{1} << form.mask_elements) - 1;
  const uint64_t mask = cpu.vector.k[form.mask] & wanted;
  if (form.masking == Masking::compress) {
    const auto count = static_cast<unsigned>(std::popcount(mask));
    return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
  }
  if (form.elements == form.mask_elements) return mask;
  // Broadcasts use an element for several bits of the mask, dot products several elements for one bit.
  for (unsigned i = 0; i < form.mask_elements; ++i) {
    if ((mask >> i & 1) == 0) continue;
    if (form.elements < form.mask_elements) {
      bits |= uint64_t{1} << i % form.elements;
    } else {
      const unsigned run = form.elements / form.mask_elements;
      bits |= ((uint64_t{1} << run) - 1) << i * run;
    }
  }
  return bits & all;
}

unsigned required_alignment(const Cpu& cpu, const Form& form) {
  if (!form.relaxed_by_mm) return form.alignment;
  uint32_t mxcsr = 0;
  std::memcpy(&mxcsr, &cpu.vector.fx[24], 4);
  return (mxcsr & mxcsr_mm) != 0 ? 0 : form.alignment;
}

// Calls act(linear, offset in the operand, size) for each run of active elements.
template <class Act>
bool for_runs(Cpu& cpu, const Op& op, const Form& form, bool write, Act act) {
  uint64_t bits = active_elements(cpu, form);
  const uint64_t start = cpu.effective_address(op);
  const uint64_t address_mask = op.address_size == 8   ? ~uint64_t{0}
                                : op.address_size == 4 ? 0xffff'ffffu
                                                       : 0xffffu;
  while (bits != 0) {
    const auto first = static_cast<unsigned>(std::countr_zero(bits));
    const auto count = static_cast<unsigned>(std::countr_one(bits >> first));
    const unsigned offset = first * form.element_size, size = count * form.element_size;
    uint64_t linear = 0;
    if (!cpu.linear(static_cast<SegmentName>(op.segment), (start + offset) & address_mask, size, write,
                    linear))
      return false;
    // Masked accesses are never #AC: in pieces of one byte, none is misaligned.
    const unsigned piece = cpu.alignment_checks ? 1 : size;
    for (unsigned done = 0; done < size; done += piece)
      if (!act(linear + done, offset + done, piece)) return false;
    bits = first + count >= 64 ? 0 : bits & ~uint64_t{0} << (first + count);
  }
  return true;
}

bool partly_masked(const Cpu& cpu, const Form& form) {
  if (form.masking == Masking::none) return false;
  const uint64_t all = form.elements >= 64 ? ~uint64_t{0} : (uint64_t{1} << form.elements) - 1;
  return active_elements(cpu, form) != all;
}

// An aligned masked move checks the whole operand's address, whatever the mask.
bool check_masked_alignment(Cpu& cpu, const Op& op, const Form& form, bool write) {
  if (form.alignment == 0 || active_elements(cpu, form) == 0) return true;
  uint64_t linear = 0;
  if (!cpu.linear(static_cast<SegmentName>(op.segment), cpu.effective_address(op), 1, write, linear))
    return false;
  return (linear & (form.alignment - 1u)) == 0 || cpu.raise(Exception::gp, 0);
}

}  // namespace

bool x87_pending(const Cpu& cpu) noexcept {
  const unsigned unmasked = word_of(cpu, 2) & ~unsigned{word_of(cpu, 0)} & 0x3f;
  return unmasked != 0;
}

bool x87_ready(Cpu& cpu) noexcept {
  return !x87_pending(cpu) || (cpu.cr0 & cr0::ne) == 0 || cpu.raise(Exception::mf);
}

bool available(Cpu& cpu, Need need) noexcept {
  switch (need) {
    case Need::nothing: return true;
    case Need::x87:
      if ((cpu.cr0 & (cr0::em | cr0::ts)) != 0) return cpu.raise(Exception::nm);
      return x87_ready(cpu);
    case Need::mmx:
      if ((cpu.cr0 & cr0::em) != 0) return cpu.raise(Exception::ud);
      return not_task_switched(cpu) && x87_ready(cpu);
    case Need::sse:
    case Need::sse_mmx:
      if ((cpu.cr0 & cr0::em) != 0 || (cpu.cr4 & cr4::osfxsr) == 0) return cpu.raise(Exception::ud);
      return not_task_switched(cpu) && (need == Need::sse || x87_ready(cpu));
    case Need::avx: return extended(cpu, component::avx_bits);
    case Need::avx512: return extended(cpu, component::avx512_bits);
  }
  return cpu.raise(Exception::ud);
}

bool check_ac(Cpu& cpu, uint64_t linear, unsigned size) noexcept {
  if ((cpu.system_flags & flag::ac) == 0 || (cpu.cr0 & cr0::am) == 0 || cpu.cpl() != 3) return true;
  const unsigned natural = size >= 16 ? 16 : std::bit_floor(size);
  return (linear & (natural - 1)) == 0 || cpu.raise(Exception::ac, 0);
}

bool locate(Cpu& cpu, const Op& op, unsigned size, bool write, unsigned alignment,
            uint64_t& linear) noexcept {
  // In 64-bit mode alignment is judged first: an odd address that is not canonical, off RSP or RBP, gives
  // #GP.
  if (alignment != 0 && cpu.mode() == Mode::bits64) {
    const uint64_t base = op.segment >= seg_fs ? cpu.segment[op.segment].base : 0;
    if (((base + cpu.effective_address(op)) & (alignment - 1)) != 0) return cpu.raise(Exception::gp, 0);
  }
  if (!cpu.linear(op, size, write, linear)) return false;
  if (alignment != 0 && (linear & (alignment - 1)) != 0) return cpu.raise(Exception::gp, 0);
  return check_ac(cpu, linear, size);
}

bool load(Cpu& cpu, const Op& op, const Form& form, Bounce& bounce) noexcept {
  if (partly_masked(cpu, form)) {
    if (!check_masked_alignment(cpu, op, form, false)) return false;
    bounce.memory.fill(0);
    return for_runs(cpu, op, form, false, [&](uint64_t linear, unsigned offset, unsigned size) {
      return cpu.read_bytes(linear, &bounce.memory[offset], size);
    });
  }
  uint64_t linear = 0;
  return locate(cpu, op, form.memory_size, false, required_alignment(cpu, form), linear) &&
         cpu.read_bytes(linear, bounce.memory.data(), form.memory_size);
}

bool prepare_store(Cpu& cpu, const Op& op, const Form& form) noexcept {
  if (partly_masked(cpu, form) && !form.whole) {
    if (!check_masked_alignment(cpu, op, form, true)) return false;
    return for_runs(cpu, op, form, true,
                    [&](uint64_t linear, unsigned, unsigned size) { return cpu.probe_write(linear, size); });
  }
  uint64_t linear = 0;
  return locate(cpu, op, form.memory_size, true, required_alignment(cpu, form), linear) &&
         cpu.probe_write(linear, form.memory_size);
}

bool store(Cpu& cpu, const Op& op, const Form& form, const Bounce& bounce) noexcept {
  if (partly_masked(cpu, form)) {
    // All runs may be written before the first one is.
    return prepare_store(cpu, op, form) &&
           for_runs(cpu, op, form, true, [&](uint64_t linear, unsigned offset, unsigned size) {
             return cpu.write_bytes(linear, &bounce.memory[offset], size);
           });
  }
  uint64_t linear = 0;
  return locate(cpu, op, form.memory_size, true, required_alignment(cpu, form), linear) &&
         cpu.write_bytes(linear, bounce.memory.data(), form.memory_size);
}

}  // namespace lodge::kvm::soft::simd
