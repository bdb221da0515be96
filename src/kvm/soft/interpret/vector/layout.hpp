// Moves single XSAVE components between VectorState and memory images. Shared by the instructions and by the
// exchange with the VMM. SDM volume 1, sections 13.4 and 13.5.
#pragma once

#include <array>
#include <cstdint>

#include "kvm/soft/cpu/state.hpp"
#include "kvm/soft/interpret/vector/host.hpp"

namespace lodge::kvm::soft::simd {

inline constexpr unsigned legacy_size = 512, header_size = 64, header_end = 576;
inline constexpr uint64_t compacted_bit = uint64_t{1} << 63;

// Byte offset of a component in an area: standard, or compacted with these components (XCOMP_BV).
uint32_t offset_of(unsigned component, uint64_t compacted_components, bool compacted) noexcept;
uint32_t area_size(uint64_t components, bool compacted) noexcept;

// Components from AVX up: their bytes in an XSAVE area. `registers` is 16 in 64-bit mode, else 8: the others
// are neither stored nor loaded.
void save_component(const VectorState& v, unsigned component, unsigned registers, uint8_t* out) noexcept;
void load_component(VectorState& v, unsigned component, unsigned registers, const uint8_t* in) noexcept;
// Any component, SSE without MXCSR.
void init_component(VectorState& v, unsigned component, unsigned registers) noexcept;

// The legacy region: x87 (bytes 0-23, 32-159), XMM registers (160-415). In 64-bit mode without REX.W the
// selectors' place is zero: VectorState has only the upper halves of 64-bit pointers there.
// `pointers` says what the instruction pointers are: 64-bit (REX.W), or 32-bit with selectors.
enum class Pointers : uint8_t { wide, narrow, selectors };
void save_x87(const VectorState& v, Pointers pointers, uint8_t* region) noexcept;
void load_x87(VectorState& v, Pointers pointers, const uint8_t* region) noexcept;
void save_xmm(const VectorState& v, unsigned registers, uint8_t* region) noexcept;
void load_xmm(VectorState& v, unsigned registers, const uint8_t* region) noexcept;

}  // namespace lodge::kvm::soft::simd
