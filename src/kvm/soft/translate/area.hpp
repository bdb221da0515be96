// The memory that translated code reaches through one register: the vCPU's state with the tables of the
// translator behind it and a small stack below. While translated code runs, the host's RSP points at the Cpu:
// everything is [rsp + disp32], and a signal that arrives then finds room below.
#pragma once

#include <array>
#include <cstdint>
#include <memory>

#include "base/mapping.hpp"
#include "kvm/soft/cpu/cpu.hpp"

namespace lodge::kvm::soft {

class Translator;

// What the translated code of a vCPU knows of flags and vector registers at a block's boundary. Part of a
// translation's identity: code for another state is another translation of the block.
struct Boundary {
  // Arithmetic flags: in the host's RFLAGS, or in Cpu::arith.
  bool native_flags = false;
  // Vector registers that the host's registers hold: 0 none; 1 ZMM0-15 (as wide as the host has them) and
  // MXCSR; 2 also ZMM16-31 and the opmasks; 3 also x87.
  uint8_t level = 0;

  static constexpr unsigned count = 8;
  unsigned index() const noexcept { return (native_flags ? 1u : 0u) | level * 2u; }
  static Boundary from(unsigned index) noexcept {
    return {.native_flags = (index & 1) != 0, .level = static_cast<uint8_t>(index >> 1)};
  }
  bool operator==(const Boundary&) const = default;
};

struct TranslatorArea {
  static constexpr unsigned levels = 4, jump_bits = 14, jump_entries = 1u << jump_bits, slot_count = 1u << 18;

  uint64_t host_rsp = 0;  // of the function that entered translated code
  uint64_t resume = 0;    // where a restore stub goes on
  uint64_t page = 0;      // linear address of the running code's page
  uint64_t tag = 0;       // what a linear address is XORed with to be found in `jump_tag`
  uint64_t target = 0;    // of a near branch through memory, across the look-up of its push
  // Of translated code, when it counts: guest instructions, look-ups in the soft TLB.
  uint64_t instructions = 0, lookups = 0;
  Translator* translator = nullptr;
  uint32_t default_mxcsr = 0x1f80;
  uint64_t tsc_offset = 0;
  uint32_t event_waits = 0;           // some event waits until the guest can take it
  uint32_t force_interpretation = 0;  // a host signal says that the instruction faults natively

  // Indirect branches: host code by linear address, one table for each vector level.
  std::array<std::array<uint64_t, jump_entries>, levels> jump_tag{};
  std::array<std::array<const void*, jump_entries>, levels> jump_code{};
  // Where direct branches to other pages go.
  std::array<const void*, slot_count> slot{};
};

// Owns a Cpu with its area.
class CpuHome {
 public:
  CpuHome(Platform& platform, unsigned id);
  ~CpuHome();
  CpuHome(const CpuHome&) = delete;
  CpuHome& operator=(const CpuHome&) = delete;

  Cpu& cpu() noexcept { return *cpu_; }
  TranslatorArea& area() noexcept { return *area_; }

 private:
  Mapping memory_;
  Cpu* cpu_;              // within memory_
  TranslatorArea* area_;  // within memory_
};

}  // namespace lodge::kvm::soft
