// The soft accelerator: KVM's contract in user space, for hosts whose /dev/kvm is missing or poor.
#pragma once

#include <memory>

#include "kvm/kvm.hpp"
#include "kvm/soft/options.hpp"

namespace lodge::kvm::soft {

// Never fails for lack of host features beyond x86-64 itself; throws std::system_error when memory is short.
std::unique_ptr<System> open(const Options& options = {});

}  // namespace lodge::kvm::soft
