// The host accelerator: the contract (kvm/kvm.hpp) over the host kernel's /dev/kvm.
//
// It assumes nothing of the vendor module behind the device (Intel, AMD or another): what is optional in the
// kernel's API is asked for with KVM_CHECK_EXTENSION first, and a call whose capability is absent throws
// std::system_error with ENOTSUP and a sentence that names the capability. note_write() has no effect:
// hardware keeps code and data coherent.
#pragma once

#include <memory>
#include <string>

#include "kvm/kvm.hpp"

namespace lodge::kvm::host {

// Opens the accelerator. Throws std::system_error with the errno of the failure (ENOENT: no such device;
// EACCES: no permission; EBUSY: the processor's virtualization is used by another hypervisor; ENOTSUP: a KVM
// that is too old) and a sentence that says what to do about it.
std::unique_ptr<kvm::System> open(const std::string& path = "/dev/kvm");

// The sentence for a failure to open `path` with `error` (a positive errno); for `lodge doctor` and messages.
std::string explain_open_error(const std::string& path, int error);

}  // namespace lodge::kvm::host
