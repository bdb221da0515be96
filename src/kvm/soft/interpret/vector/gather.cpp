// Gathers and scatters, element by element, lowest first. A fault leaves the elements before it done and
// their mask bits clear, so the instruction goes on where it stopped (SDM volume 2, VPGATHERDD).
#include "kvm/soft/interpret/vector/gather.hpp"

#include <algorithm>

#include "kvm/soft/interpret/vector/access.hpp"
#include "kvm/soft/interpret/vector/run.hpp"

namespace lodge::kvm::soft::simd {
namespace {

class Elements {
 public:
  Elements(Cpu& cpu, const Op& op) : cpu_(cpu), op_(op), g_(std::bit_cast<Gather>(op.imm)) {}

  const Gather& shape() const { return g_; }
  unsigned size() const { return 1u << g_.element_log; }
  uint8_t* data(unsigned i) { return &cpu_.vector.zmm[g_.data][i << g_.element_log]; }

  bool active(unsigned i) const {
    if (g_.evex != 0) return (cpu_.vector.k[g_.mask] >> i & 1) != 0;
    return (cpu_.vector.zmm[g_.mask][((i + 1u) << g_.element_log) - 1u] & 0x80) != 0;
  }
  void done(unsigned i) {
    if (g_.evex != 0) {
      cpu_.vector.k[g_.mask] &= ~(uint64_t{1} << i);
    } else {
      std::fill_n(&cpu_.vector.zmm[g_.mask][i << g_.element_log], size(), uint8_t{0});
    }
  }

  bool locate(unsigned i, bool write, uint64_t& linear) {
    int64_t index = 0;
    const uint8_t* const at = &cpu_.vector.zmm[g_.index][i << g_.index_log];
    if (g_.index_log == 2) {
      int32_t narrow = 0;
      std::memcpy(&narrow, at, 4);
      index = narrow;
    } else {
      std::memcpy(&index, at, 8);
    }
    // Op::index is none here: the frame knows general registers only.
    uint64_t offset = cpu_.effective_address(op_) + (static_cast<uint64_t>(index) << op_.scale);
    if (op_.address_size == 4) offset &= 0xffff'ffff;
    return cpu_.linear(static_cast<SegmentName>(op_.segment), offset, size(), write, linear) &&
           check_ac(cpu_, linear, size());
  }

  // All mask bits above the elements go, too.
  void finish(bool gather) {
    const auto clear_above = [](auto& reg, unsigned from) {
      std::fill(reg.begin() + from, reg.end(), uint8_t{0});
    };
    if (g_.evex != 0) {
      cpu_.vector.k[g_.mask] = 0;
    } else {
      cpu_.vector.zmm[g_.mask].fill(0);
    }
    if (gather) clear_above(cpu_.vector.zmm[g_.data], static_cast<unsigned>(g_.count) << g_.element_log);
  }

 private:
  Cpu& cpu_;
  const Op& op_;
  Gather g_;
};

}  // namespace

Step run_gather(Cpu& cpu, const Op& op) noexcept {
  Elements e(cpu, op);
  if (!available(cpu, e.shape().evex != 0 ? Need::avx512 : Need::avx)) return Step::fault;
  for (unsigned i = 0; i < e.shape().count; ++i) {
    if (!e.active(i)) {
      e.done(i);  // as far as the instruction comes, mask elements of VEX forms are cleared entirely
      continue;
    }
    uint64_t linear = 0, value = 0;
    if (!e.locate(i, false, linear) || !cpu.read_bytes(linear, &value, e.size())) return Step::fault;
    std::memcpy(e.data(i), &value, e.size());
    e.done(i);
  }
  e.finish(true);
  return Step::next;
}

Step run_scatter(Cpu& cpu, const Op& op) noexcept {
  Elements e(cpu, op);
  if (!available(cpu, Need::avx512)) return Step::fault;
  for (unsigned i = 0; i < e.shape().count; ++i) {
    if (!e.active(i)) continue;
    uint64_t linear = 0;
    if (!e.locate(i, true, linear) || !cpu.write_bytes(linear, e.data(i), e.size())) return Step::fault;
    e.done(i);
  }
  e.finish(false);
  return Step::next;
}

}  // namespace lodge::kvm::soft::simd
