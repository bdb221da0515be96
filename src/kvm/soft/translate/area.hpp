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

// Where indirect branches go: host code by linear address, at the place that `offset` says.
struct JumpTable {
  struct Entry {
    uint64_t linear;
    const void* code;  // null: never used, or emptied
  };
  static constexpr unsigned bits = 14, shift = 4, size = 1u << bits;
  static_assert(sizeof(Entry) == 1u << shift);
  static constexpr uint32_t multiplier = 0x9e37'79b1, mask = (size - 1) << shift;
  // Of an address's entry, from the start of the table. The bits of the product that count depend on the low
  // 18 of the address and tell all functions within 256 KiB from each other, for they begin at multiples
  // of 16.
  static constexpr uint32_t offset(uint64_t linear) noexcept {
    return static_cast<uint32_t>(linear) * multiplier & mask;
  }
  // What an empty entry has for its address: zero, as fresh memory has, but for the one where zero belongs.
  static constexpr uint64_t nobody(uint32_t index) noexcept { return index == 0 ? 16 : 0; }

  std::array<Entry, size> entry;
};
static_assert(JumpTable::offset(0) == 0 && JumpTable::offset(JumpTable::nobody(0)) != 0);

struct TranslatorArea {
  static constexpr unsigned levels = 4, slot_count = 1u << 18;
  // Jump tables: for each set of the soft TLB, in 64-bit code and in 32-bit code.
  static constexpr unsigned views = 8;

  uint64_t host_rsp = 0;  // of the function that entered translated code
  uint64_t resume = 0;    // where a restore stub goes on
  uint64_t page = 0;      // linear address of the running code's page
  uint64_t target = 0;    // of a near branch through memory, across the look-up of its push
  // Of translated code, when it counts: guest instructions, look-ups in the soft TLB.
  uint64_t instructions = 0, lookups = 0;
  Translator* translator = nullptr;
  uint32_t default_mxcsr = 0x1f80;
  uint64_t tsc_offset = 0;
  uint32_t event_waits = 0;           // some event waits until the guest can take it
  uint32_t force_interpretation = 0;  // a host signal says that the instruction faults natively

  // How often loops have run: heat_limit / superblock_after is added each time, and the sign bit says "hot".
  // By a hash of the block's place.
  static constexpr unsigned heat_bits = 12;
  static constexpr uint32_t heat_limit = 1u << 31;
  std::array<uint32_t, 1u << heat_bits> heat{};
  // Indirect branches: a table for each view and vector level.
  std::array<std::array<JumpTable, levels>, views> jump{};
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
