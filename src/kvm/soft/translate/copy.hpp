// Copies guest instructions with their registers and memory operand replaced.
#pragma once

#include "kvm/soft/translate/emitter.hpp"
#include "kvm/soft/translate/instruction.hpp"

namespace lodge::kvm::soft {

// Which host register stands in for each guest register that lives in memory; `none` elsewhere.
struct Standins {
  static constexpr uint8_t none = 0xff;
  uint8_t for_rsp = none, for_r10 = none, for_r11 = none;

  uint8_t host(unsigned guest) const noexcept {
    if (guest == 4) return for_rsp;
    if (guest == scratch0) return for_r10;
    if (guest == scratch1) return for_r11;
    return static_cast<uint8_t>(guest);
  }
};

// An instruction without memory operand. At most 20 bytes.
void copy_registers(Emitter& e, const Instruction& i, const Standins& standins) noexcept;
// One with a memory operand, which becomes [scratch0 + disp]. At most 24 bytes.
void copy_memory(Emitter& e, const Instruction& i, const Standins& standins, int64_t disp) noexcept;

}  // namespace lodge::kvm::soft
