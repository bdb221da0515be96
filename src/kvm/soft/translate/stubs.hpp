// The hand-written code around translated code: entering, leaving, calling the translator, and moving vector
// registers between the host's and their home.
#pragma once

#include <array>
#include <cstdint>

#include "kvm/soft/translate/area.hpp"

namespace lodge::kvm::soft {

// Offsets from the Cpu.
struct StateOffsets {
  StateOffsets(const Cpu& cpu, const TranslatorArea& area) noexcept;
  int64_t gpr, arith, rip, request, zmm, k, fx, segment_base, tlb, area;
  int64_t host_rsp, resume, page, target, instructions, lookups, default_mxcsr, jump, slot;
  int64_t system_flags, selector, kernel_gs_base, tsc_offset, event_waits, tsc_aux, heat;

  int64_t of_gpr(unsigned reg) const noexcept { return gpr + 8 * int64_t{reg}; }
};

class Stubs {
 public:
  // Writes them to `code`, at most `max_size` bytes.
  static constexpr size_t max_size = 32 << 10;
  Stubs(uint8_t* code, const StateOffsets& offsets);

  const StateOffsets offsets;
  const uint8_t* end = nullptr;

  enum Call : uint8_t { slow_access, complex_op, request, exit, indirect, hot };
  static constexpr unsigned calls = 6;
  // Keep the state as `boundary` says it is, then call the translator with R10.
  std::array<std::array<const uint8_t*, Boundary::count>, calls> call{};
  // Load the state for `boundary` and go on at TranslatorArea::resume.
  std::array<const uint8_t*, Boundary::count> restore{};
  // From one vector level to a higher one, then to resume. [from][to]
  std::array<std::array<const uint8_t*, 4>, 4> raise{};
  const uint8_t* leave = nullptr;
  // Enters by a restore stub; returns when translated code leaves.
  void (*enter)(Cpu* cpu, const void* restore) = nullptr;
};

}  // namespace lodge::kvm::soft
