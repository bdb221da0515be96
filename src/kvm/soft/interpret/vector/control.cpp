// SSE and AVX instructions that are control rather than computing: MXCSR, zeroing, EMMS, byte-masked stores.
#include <algorithm>
#include <bit>

#include "kvm/soft/interpret/vector/access.hpp"
#include "kvm/soft/interpret/vector/host.hpp"
#include "kvm/soft/interpret/vector/run.hpp"
#include "kvm/soft/interpret/vector/x87.hpp"

namespace lodge::kvm::soft::simd {
namespace {

Need by_encoding(const Op& op) {
  return op.src != 0 ? Need::avx : Need::sse;
}

}  // namespace

Step run_ldmxcsr(Cpu& cpu, const Op& op) noexcept {
  uint64_t linear = 0;
  uint32_t value = 0;
  if (!available(cpu, by_encoding(op)) || !locate(cpu, op, 4, false, 0, linear) || !cpu.read(linear, value))
    return Step::fault;
  if ((value & ~host().mxcsr_mask) != 0) {
    cpu.raise(Exception::gp, 0);
    return Step::fault;
  }
  set_mxcsr(cpu.vector, value);
  cpu.fp_control_changed();
  return Step::next;
}

Step run_stmxcsr(Cpu& cpu, const Op& op) noexcept {
  uint64_t linear = 0;
  if (!available(cpu, by_encoding(op)) || !locate(cpu, op, 4, true, 0, linear) ||
      !cpu.write(linear, mxcsr(cpu.vector)))
    return Step::fault;
  return Step::next;
}

Step run_vzeroupper(Cpu& cpu, const Op& op) noexcept {
  if (!available(cpu, Need::avx)) return Step::fault;
  const unsigned count = cpu.mode() == Mode::bits64 ? 16 : 8;
  for (unsigned i = 0; i < count; ++i)
    std::fill(cpu.vector.zmm[i].begin() + op.dst, cpu.vector.zmm[i].end(), uint8_t{0});
  return Step::next;
}

Step run_emms(Cpu& cpu, const Op&) noexcept {
  if (!available(cpu, Need::mmx)) return Step::fault;
  enter_mmx(cpu.vector);
  cpu.vector.fx[image::ftw] = 0;
  return Step::next;
}

namespace {

// Stores the bytes of `data` whose mask byte has its sign set, at DS:rDI. Op::size bytes at most.
Step byte_masked_store(Cpu& cpu, const Op& op, const uint8_t* data, const uint8_t* mask) {
  uint32_t bits = 0;
  for (unsigned i = 0; i < op.size; ++i) bits |= static_cast<uint32_t>(mask[i] >> 7) << i;
  // Two passes: nothing is written when a byte cannot be.
  for (const bool write : {false, true}) {
    for (uint32_t rest = bits; rest != 0;) {
      const auto first = static_cast<unsigned>(std::countr_zero(rest));
      const auto count = static_cast<unsigned>(std::countr_one(rest >> first));
      uint64_t linear = 0;
      const uint64_t offset =
          (cpu.effective_address(op) + first) & (op.address_size == 8   ? ~uint64_t{0}
                                                 : op.address_size == 4 ? uint64_t{0xffff'ffff}
                                                                        : uint64_t{0xffff});
      if (!cpu.linear(static_cast<SegmentName>(op.segment), offset, count, true, linear)) return Step::fault;
      if (!write && !cpu.probe_write(linear, count)) return Step::fault;
      // In bytes when alignment is checked: a byte is never misaligned.
      const unsigned piece = cpu.alignment_checks ? 1 : count;
      for (unsigned done = 0; write && done < count; done += piece)
        if (!cpu.write_bytes(linear + done, data + first + done, piece)) return Step::fault;
      rest &= ~uint32_t{0} << (first + count);
    }
  }
  return Step::next;
}

}  // namespace

Step run_maskmov(Cpu& cpu, const Op& op) noexcept {
  if (!available(cpu, Need::sse)) return Step::fault;
  return byte_masked_store(cpu, op, cpu.vector.zmm[op.dst].data(), cpu.vector.zmm[op.src].data());
}

Step run_vmaskmov(Cpu& cpu, const Op& op) noexcept {
  if (!available(cpu, Need::avx)) return Step::fault;
  return byte_masked_store(cpu, op, cpu.vector.zmm[op.dst].data(), cpu.vector.zmm[op.src].data());
}

Step run_maskmovq(Cpu& cpu, const Op& op) noexcept {
  if (!available(cpu, Need::mmx)) return Step::fault;
  VectorState after = cpu.vector;
  enter_mmx(after);
  const Step step =
      byte_masked_store(cpu, op, &after.fx[image::st + 16u * op.dst], &after.fx[image::st + 16u * op.src]);
  if (step == Step::next) cpu.vector.fx = after.fx;
  return step;
}

}  // namespace lodge::kvm::soft::simd
