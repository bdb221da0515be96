#include "kvm/soft/interpret/vector/exchange.hpp"

#include <algorithm>

#include "kvm/soft/interpret/vector/host.hpp"
#include "kvm/soft/interpret/vector/layout.hpp"
#include "kvm/soft/interpret/vector/x87.hpp"

namespace lodge::kvm::soft {

using namespace simd;

namespace {

// True when registers [first, last) are zero in bytes [from, to).
bool zero(const VectorState& v, unsigned first, unsigned last, unsigned from, unsigned to) {
  for (unsigned i = first; i < last; ++i)
    for (unsigned at = from; at < to; at += 8) {
      uint64_t word = 0;
      std::memcpy(&word, &v.zmm[i][at], 8);
      if (word != 0) return false;
    }
  return true;
}

bool x87_initial(const VectorState& v) {
  VectorState fresh;
  init_x87(fresh);
  return std::memcmp(fresh.fx.data(), v.fx.data(), image::mxcsr) == 0 &&
         std::memcmp(&fresh.fx[image::st], &v.fx[image::st], 128) == 0;
}

}  // namespace

uint64_t supported_xcr0() noexcept {
  return host().components;
}
uint32_t mxcsr_mask() noexcept {
  return host().mxcsr_mask;
}

uint64_t xinuse(const VectorState& v) noexcept {
  uint64_t used = x87_initial(v) ? 0 : 1;
  if (!zero(v, 0, 16, 0, 16)) used |= 1u << component::sse;
  if (!zero(v, 0, 16, 16, 32)) used |= 1u << component::avx;
  if (std::ranges::any_of(v.k, [](uint64_t k) { return k != 0; })) used |= 1u << component::opmask;
  if (!zero(v, 0, 16, 32, 64)) used |= 1u << component::zmm_hi256;
  if (!zero(v, 16, 32, 0, 64)) used |= 1u << component::hi16_zmm;
  if (v.pkru != 0) used |= 1u << component::pkru;
  return used & host().components;
}

uint32_t xsave_size(uint64_t components, bool compacted) noexcept {
  return area_size(components & host().components, compacted);
}

XsaveComponent xsave_component(unsigned which) noexcept {
  if (which < 2 || which >= component::count) return {};
  return {host().size[which], host().offset[which], host().aligned[which]};
}

void reset_vector(VectorState& v, bool init) noexcept {
  if (init) return;
  v = VectorState{};
  // Power-up differs from FNINIT: control word 0x40, tags "zero" (SDM volume 3, table 9-1).
  put<uint16_t>(v, image::fcw, 0x40);
  v.fx[image::ftw] = 0xff;
  set_mxcsr(v, 0x1f80);
}

void get_fpu(const VectorState& v, kvm_fpu& out) noexcept {
  out = {};
  for (unsigned i = 0; i < 8; ++i) std::memcpy(out.fpr[i], &v.fx[image::st + 16 * i], 16);
  out.fcw = get<uint16_t>(v, image::fcw);
  out.fsw = get<uint16_t>(v, image::fsw);
  out.ftwx = v.fx[image::ftw];
  out.last_opcode = get<uint16_t>(v, image::fop);
  out.last_ip = get<uint64_t>(v, image::fip);
  out.last_dp = get<uint64_t>(v, image::fdp);
  for (unsigned i = 0; i < 16; ++i) std::memcpy(out.xmm[i], v.zmm[i].data(), 16);
  out.mxcsr = mxcsr(v);
}

bool set_fpu(VectorState& v, const kvm_fpu& in) noexcept {
  if ((in.mxcsr & ~host().mxcsr_mask) != 0) return false;
  for (unsigned i = 0; i < 8; ++i) {
    std::memcpy(&v.fx[image::st + 16 * i], in.fpr[i], 10);
    std::memset(&v.fx[image::st + 16 * i + 10], 0, 6);
  }
  load_fcw(v, in.fcw);
  load_fsw(v, in.fsw);
  v.fx[image::ftw] = in.ftwx;
  put(v, image::fop, static_cast<uint16_t>(in.last_opcode & 0x7ff));
  put<uint64_t>(v, image::fip, in.last_ip);
  put<uint64_t>(v, image::fdp, in.last_dp);
  for (unsigned i = 0; i < 16; ++i) std::memcpy(v.zmm[i].data(), in.xmm[i], 16);
  set_mxcsr(v, in.mxcsr);
  return true;
}

void get_xsave(const VectorState& v, std::span<uint8_t> area) noexcept {
  std::ranges::fill(area, uint8_t{0});
  if (area.size() < header_end) return;
  save_x87(v, Pointers::wide, area.data());
  save_xmm(v, 16, area.data());
  const std::array<uint32_t, 2> control = {mxcsr(v), host().mxcsr_mask};
  std::memcpy(&area[image::mxcsr], control.data(), 8);
  uint64_t present = 3;
  for (unsigned i = 2; i < component::count; ++i) {
    if ((host().components >> i & 1) == 0 || host().offset[i] + host().size[i] > area.size()) continue;
    save_component(v, i, 16, &area[host().offset[i]]);
    present |= uint64_t{1} << i;
  }
  // KVM tells components in use; those in their initial state are zero in the image anyway, but for FCW.
  present &= xinuse(v) | 3;
  std::memcpy(&area[legacy_size], &present, 8);
}

bool set_xsave(VectorState& v, std::span<const uint8_t> area, uint64_t allowed) noexcept {
  if (area.size() < header_end) return false;
  std::array<uint64_t, 8> header;
  std::memcpy(header.data(), &area[legacy_size], sizeof(header));
  uint32_t new_mxcsr = 0;
  std::memcpy(&new_mxcsr, &area[image::mxcsr], 4);
  const uint64_t present = header[0];
  if ((present & ~(allowed & host().components)) != 0 || header[1] != 0 || header[2] != 0) return false;
  if ((new_mxcsr & ~host().mxcsr_mask) != 0) return false;
  for (unsigned i = 2; i < component::count; ++i)
    if ((present >> i & 1) != 0 && host().offset[i] + host().size[i] > area.size()) return false;

  set_mxcsr(v, new_mxcsr);
  for (unsigned i = 0; i < component::count; ++i) {
    if ((host().components >> i & 1) == 0) continue;
    if ((present >> i & 1) == 0) {
      init_component(v, i, 16);
    } else if (i == component::x87) {
      load_x87(v, Pointers::wide, area.data());
    } else if (i == component::sse) {
      load_xmm(v, 16, area.data());
    } else {
      load_component(v, i, 16, &area[host().offset[i]]);
    }
  }
  return true;
}

}  // namespace lodge::kvm::soft
