// The compiled form of one vector or x87 instruction, and the buffer its stub works on.
#pragma once

#include <array>
#include <cstdint>

#include "kvm/soft/cpu/state.hpp"

namespace lodge::kvm::soft::simd {

// What stands in for guest memory while a stub runs.
struct alignas(64) Bounce {
  std::array<uint8_t, 64> memory;           // the memory operand
  alignas(64) std::array<uint8_t, 512> fx;  // the FXSAVE64 image of x87 stubs
  uint32_t mxcsr_in = 0, mxcsr_out = 0;     // of stubs with Form::uses_mxcsr
};

using Stub = void (*)(CpuState* state, Bounce* bounce);

// What must be switched on for the instruction to exist.
enum class Need : uint8_t { nothing, x87, mmx, sse, sse_mmx, avx, avx512 };

enum class Direction : uint8_t { none, read, write };

// Which bytes of the memory operand are touched.
enum class Masking : uint8_t {
  none,      // all
  mask,      // those whose bit in opmask register `mask` is set
  vector,    // those whose sign bit in vector register `mask` is set (VMASKMOV)
  compress,  // as many elements, from the start, as the opmask has bits (VCOMPRESS, VEXPAND)
};

struct Form {
  Stub stub = nullptr;
  Need need = Need::nothing;
  Direction direction = Direction::none;
  Masking masking = Masking::none;
  uint8_t memory_size = 0;     // bytes, at most 64
  uint8_t element_size = 0;    // bytes, of the memory operand
  uint8_t elements = 0;        // of the memory operand
  uint8_t mask = 0;            // register number
  uint8_t mask_elements = 0;   // how many mask bits count
  uint8_t alignment = 0;       // #GP when not aligned so; 0: any address
  bool relaxed_by_mm = false;  // no alignment check when MXCSR.MM is set (AMD's misaligned SSE mode)
  bool whole = false;          // a masked store that needs all of its operand writable all the same
  bool never_tiny = false;     // VREDUCE reports no underflow, whatever its results
  bool silent = false;         // embedded rounding or {sae}: all exceptions masked, no flags
  bool uses_mxcsr = false;
};

}  // namespace lodge::kvm::soft::simd
