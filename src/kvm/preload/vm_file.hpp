// A VM's descriptor.
#pragma once

#include <memory>

#include "kvm/kvm.hpp"
#include "kvm/preload/file.hpp"

namespace lodge::kvm::preload {

// KVM_CHECK_EXTENSION: what the accelerator has, and what this library makes of it.
int check_extension(int accelerator, unsigned long capability) noexcept;

// KVM_CREATE_VM: a new descriptor. Throws std::system_error.
int create_vm(const std::shared_ptr<System>& system);

// KVM_CREATE_VCPU: a new descriptor; `vm` lives as long as it does. Throws std::system_error.
int create_vcpu(std::shared_ptr<Vm> vm, std::unique_ptr<Vcpu> vcpu);

}  // namespace lodge::kvm::preload
