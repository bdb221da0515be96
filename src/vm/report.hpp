// What a person is told when a processor cannot go on.
#pragma once

#include <string>
#include <string_view>

#include "kvm/kvm.hpp"
#include "machine/memory.hpp"

namespace lodge::vm {

// Several lines: the exit, the registers and the bytes at the instruction pointer. From the vCPU's thread.
std::string describe_failure(kvm::Vcpu& vcpu, const kvm::Exit& exit, machine::GuestMemory& memory,
                             std::string_view accelerator) noexcept;

}  // namespace lodge::vm
