// Fields of the FXSAVE64 image in VectorState::fx, and what several files do with it.
#pragma once

#include <cstring>

#include "kvm/soft/cpu/state.hpp"

namespace lodge::kvm::soft::simd {

// Offsets in the image.
namespace image {
inline constexpr unsigned fcw = 0, fsw = 2, ftw = 4, fop = 6, fip = 8, fdp = 16, mxcsr = 24, mxcsr_mask = 28,
                          st = 32, x87_size = 160;
}

template <class T>
T get(const VectorState& v, unsigned offset) noexcept {
  T value;
  std::memcpy(&value, &v.fx[offset], sizeof(T));
  return value;
}
template <class T>
void put(VectorState& v, unsigned offset, T value) noexcept {
  std::memcpy(&v.fx[offset], &value, sizeof(T));
}

inline uint32_t mxcsr(const VectorState& v) noexcept {
  return get<uint32_t>(v, image::mxcsr);
}
inline void set_mxcsr(VectorState& v, uint32_t value) noexcept {
  put(v, image::mxcsr, value);
}

// The x87 part in its initial state (FNINIT, all of it: registers zero).
void init_x87(VectorState& v) noexcept;
// Sets the control word, or the status word, as a load from memory does: reserved bits, and ES and B follow
// from flags and masks.
void load_fcw(VectorState& v, uint16_t value) noexcept;
void load_fsw(VectorState& v, uint16_t value) noexcept;
// What every MMX instruction but EMMS does: TOP = 0, all registers valid. ST(i) then is MMi.
void enter_mmx(VectorState& v) noexcept;
// The two-bit tags of FNSTENV from the abridged ones, and back.
uint16_t full_tags(const VectorState& v) noexcept;
uint8_t abridged_tags(uint16_t full) noexcept;

}  // namespace lodge::kvm::soft::simd
