// Says in words how two outcomes of a case differ, leaving out what the manuals leave undefined.
#pragma once

#include <string>

#include "case.hpp"
#include "generator.hpp"

namespace lodge::oracle {

// Empty when the outcomes agree.
std::string differences(const Case& c, const Instruction& instruction, const Outcome& native,
                        const Outcome& interpreted);

// Bytes, mnemonic and the state that matters.
std::string describe(const Case& c, const Instruction& instruction);

}  // namespace lodge::oracle
