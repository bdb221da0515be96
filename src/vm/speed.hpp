// How fast an accelerator runs kernel code.
#pragma once

#include <chrono>

#include "kvm/kvm.hpp"

namespace lodge::vm {

// Million guest instructions a second of a 64-bit ring-0 loop of loads, stores, arithmetic and a branch,
// measured over about `budget`. 0 when the accelerator cannot run it. Throws std::system_error when it cannot
// make the VM.
double measure_mips(kvm::System& system, std::chrono::milliseconds budget);

}  // namespace lodge::vm
