// Says in words how two outcomes of a case differ, leaving out what the manuals leave undefined.
#pragma once

#include <string>

#include "case.hpp"
#include "generator.hpp"

namespace lodge::oracle {

// Empty when the outcomes agree.
std::string differences(const Case& c, const Instruction& instruction, const Outcome& native,
                        const Outcome& interpreted);

// Left to the implementation: whether PE accompanies an unmasked overflow or underflow, and whether an MMX
// conversion that raises #XM has already switched to MMX. And what the translator does not keep up.
struct Freedom {
  uint32_t mxcsr = 0;
  bool x87 = false;
  bool x87_pointers = false;  // FOP, FIP, FDP
};
// Adds what differs in the XSAVE areas.
void compare_vectors(std::string& out, const Outcome& native, const Outcome& other, Freedom freedom,
                     bool bits32);
void compare_registers(std::string& out, const Outcome& native, const Outcome& other, bool bits32);
void compare_memory(std::string& out, const Outcome& native, const Outcome& other);
// Which end of the operand is touched first is the processor's own business.
bool has_large_area(ZydisMnemonic mnemonic);
// GPRs, flags and control words.
std::string describe_state(const State& state);
[[gnu::format(printf, 1, 2)]] std::string format(const char* text, ...);

// Bytes, mnemonic and the state that matters.
std::string describe(const Case& c, const Instruction& instruction);

}  // namespace lodge::oracle
