// Vector state as the contract exchanges it, and as XSAVE lays it out. Sizes in bytes. What comes from the
// VMM or from guest memory is untrusted: reserved bits are refused, the rest cannot harm.
#pragma once

#include <linux/kvm.h>

#include <cstdint>
#include <span>

#include "kvm/soft/cpu/cpu.hpp"

namespace lodge::kvm::soft {

// XCR0 bits that this host and this program support together.
uint64_t supported_xcr0() noexcept;
// MXCSR bits that may be set.
uint32_t mxcsr_mask() noexcept;

// Components of `state` that are not in their initial configuration (XGETBV with ECX = 1 shows these and
// XCR0).
uint64_t xinuse(const VectorState& state) noexcept;
inline uint64_t xinuse(const Cpu& cpu) noexcept {
  return xinuse(cpu.vector);
}

// Size of an XSAVE area with these components: CPUID leaf 0xD, EBX of subleaf 0 (standard format) or 1
// (compacted).
uint32_t xsave_size(uint64_t components, bool compacted) noexcept;
// Size and offset of a component in the standard format; {0, 0} when not supported.
struct XsaveComponent {
  uint32_t size = 0, offset = 0;
  bool aligned = false;
};
XsaveComponent xsave_component(unsigned component) noexcept;

// RESET (and power-up) or INIT, which keeps the SSE, AVX and x87 state.
void reset_vector(VectorState& state, bool init) noexcept;

void get_fpu(const VectorState& state, kvm_fpu& out) noexcept;
// False, with nothing changed, when MXCSR has reserved bits.
bool set_fpu(VectorState& state, const kvm_fpu& in) noexcept;

// KVM_GET_XSAVE, KVM_GET_XSAVE2: standard format, components beyond the area are left out. At least 576
// bytes.
void get_xsave(const VectorState& state, std::span<uint8_t> area) noexcept;
// KVM_SET_XSAVE. False, with nothing changed, for reserved MXCSR bits, components outside `allowed` (the
// guest's possible XCR0) or a compacted image. Components absent from XSTATE_BV get their initial state.
bool set_xsave(VectorState& state, std::span<const uint8_t> area, uint64_t allowed) noexcept;

}  // namespace lodge::kvm::soft
