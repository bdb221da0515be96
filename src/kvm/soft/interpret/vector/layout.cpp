#include "kvm/soft/interpret/vector/layout.hpp"

#include <algorithm>
#include <bit>

#include "kvm/soft/interpret/vector/x87.hpp"

namespace lodge::kvm::soft::simd {

uint32_t offset_of(unsigned wanted, uint64_t components, bool compacted) noexcept {
  const Host& h = host();
  if (wanted < 2) return wanted == component::sse ? 160 : 0;
  if (!compacted) return h.offset[wanted];
  uint32_t at = header_end;
  for (unsigned i = 2; i <= wanted; ++i) {
    if ((components >> i & 1) == 0) continue;
    if (h.aligned[i]) at = (at + 63) & ~63u;
    if (i == wanted) return at;
    at += h.size[i];
  }
  return at;
}

uint32_t area_size(uint64_t components, bool compacted) noexcept {
  const Host& h = host();
  uint32_t size = header_end;
  for (unsigned i = 2; i < component::count; ++i)
    if ((components >> i & 1) != 0) size = std::max(size, offset_of(i, components, compacted) + h.size[i]);
  return size;
}

void save_component(const VectorState& v, unsigned which, unsigned registers, uint8_t* out) noexcept {
  switch (which) {
    case component::avx:
      for (unsigned i = 0; i < registers; ++i) std::memcpy(out + 16 * i, &v.zmm[i][16], 16);
      break;
    case component::opmask: std::memcpy(out, v.k.data(), 64); break;
    case component::zmm_hi256:
      for (unsigned i = 0; i < registers; ++i) std::memcpy(out + 32 * i, &v.zmm[i][32], 32);
      break;
    case component::hi16_zmm:
      if (registers == 16) std::memcpy(out, v.zmm[16].data(), 1024);
      break;
    case component::pkru:
      std::memcpy(out, &v.pkru, 4);
      std::memset(out + 4, 0, 4);
      break;
    default: break;
  }
}

void load_component(VectorState& v, unsigned which, unsigned registers, const uint8_t* in) noexcept {
  switch (which) {
    case component::avx:
      for (unsigned i = 0; i < registers; ++i) std::memcpy(&v.zmm[i][16], in + 16 * i, 16);
      break;
    case component::opmask: std::memcpy(v.k.data(), in, 64); break;
    case component::zmm_hi256:
      for (unsigned i = 0; i < registers; ++i) std::memcpy(&v.zmm[i][32], in + 32 * i, 32);
      break;
    case component::hi16_zmm:
      if (registers == 16) std::memcpy(v.zmm[16].data(), in, 1024);
      break;
    case component::pkru: std::memcpy(&v.pkru, in, 4); break;
    default: break;
  }
}

void init_component(VectorState& v, unsigned which, unsigned registers) noexcept {
  static constexpr std::array<uint8_t, 1024> zeros{};
  if (which == component::x87) {
    init_x87(v);
  } else if (which == component::sse) {
    for (unsigned i = 0; i < registers; ++i) std::fill_n(v.zmm[i].begin(), 16, uint8_t{0});
  } else {
    load_component(v, which, registers, zeros.data());
  }
}

namespace {

// Clears what FIP and FDP do not have in this format.
void trim(Pointers pointers, uint8_t* region) {
  const unsigned kept = pointers == Pointers::wide ? 8 : pointers == Pointers::selectors ? 6 : 4;
  for (const unsigned at : {image::fip, image::fdp}) std::memset(region + at + kept, 0, 8 - kept);
}

}  // namespace

void save_x87(const VectorState& v, Pointers pointers, uint8_t* region) noexcept {
  std::memcpy(region, v.fx.data(), 24);
  const bool pending = (v.fx[image::fsw] & 0x80) != 0;
  if (host().hides_x87_pointers && !pending) std::memset(region + image::fop, 0, 18);
  trim(pointers, region);
  std::memcpy(region + 32, &v.fx[32], 128);
  region[5] = 0;
}

void load_x87(VectorState& v, Pointers pointers, const uint8_t* region) noexcept {
  const auto word = [&](unsigned at) {
    uint16_t value = 0;
    std::memcpy(&value, region + at, 2);
    return value;
  };
  std::memcpy(v.fx.data(), region, 24);
  std::memcpy(&v.fx[32], region + 32, 128);
  for (unsigned i = 0; i < 8; ++i) std::memset(&v.fx[image::st + 16 * i + 10], 0, 6);
  load_fcw(v, word(0));
  load_fsw(v, word(2));
  v.fx[5] = 0;
  put(v, image::fop, static_cast<uint16_t>(word(6) & 0x7ff));
  trim(pointers, v.fx.data());
}

void save_xmm(const VectorState& v, unsigned registers, uint8_t* region) noexcept {
  for (unsigned i = 0; i < registers; ++i) std::memcpy(region + 160 + 16 * i, v.zmm[i].data(), 16);
}

void load_xmm(VectorState& v, unsigned registers, const uint8_t* region) noexcept {
  for (unsigned i = 0; i < registers; ++i) std::memcpy(v.zmm[i].data(), region + 160 + 16 * i, 16);
}

}  // namespace lodge::kvm::soft::simd
