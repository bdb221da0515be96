// What the machine below can execute and how it lays out XSAVE areas: vector instructions run natively, so a
// guest gets at most this, and the same layout (SDM volume 1, chapter 13; CPUID leaves 1, 7, 0xD,
// 0x80000001).
#pragma once

#include <Zydis/Zydis.h>

#include <array>
#include <bitset>
#include <cstdint>

namespace lodge::kvm::soft::simd {

// XSAVE state components (bits of XCR0).
namespace component {
inline constexpr unsigned x87 = 0, sse = 1, avx = 2, opmask = 5, zmm_hi256 = 6, hi16_zmm = 7, pkru = 9,
                          count = 10;
inline constexpr uint64_t avx_bits = 6, avx512_bits = 0xe6;
}  // namespace component

struct Host {
  Host();

  bool bmi2 = false;
  bool avx = false;     // VEX instructions and YMM registers
  bool avx512 = false;  // F, BW, DQ and VL together: what the stubs use to load and store registers
  uint32_t mxcsr_mask = 0xffff;
  bool sha_unaligned = false;  // AMD's SHA instructions take any address
  // FXSAVE and XSAVE store zeros for FOP, FIP and FDP unless an x87 exception is pending (AMD).
  bool hides_x87_pointers = false;
  std::bitset<ZYDIS_ISA_SET_MAX_VALUE + 1> runs;            // instruction sets this processor executes
  std::array<uint32_t, component::count> offset{}, size{};  // of components in the standard format
  std::array<bool, component::count> aligned{};             // to 64 bytes in the compacted format
  uint64_t components = 3;                                  // that exist and that this program can handle
};

// The same for every caller; found once.
const Host& host() noexcept;

}  // namespace lodge::kvm::soft::simd
