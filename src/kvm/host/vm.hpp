// Inside the host accelerator: how a System makes its Vm and a Vm its Vcpu.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string_view>

#include "base/fd.hpp"
#include "kvm/kvm.hpp"

namespace lodge::kvm::host {

// `fd` is a VM descriptor; `mmap_size` the size of its vCPUs' shared structure.
std::unique_ptr<kvm::Vm> make_vm(Fd fd, size_t mmap_size);

// `fd` is a vCPU descriptor; `xsave_size` the bytes KVM_CAP_XSAVE2 told for the VM (0 when absent).
std::unique_ptr<kvm::Vcpu> make_vcpu(Fd fd, unsigned id, size_t mmap_size, size_t xsave_size);

// KVM_GET_MSRS or KVM_SET_MSRS in batches: `in` is sent, what the kernel gave back goes to `out` unless it is
// empty. Returns how many succeeded before the first refusal.
unsigned transfer_msrs(int fd, unsigned long number, std::string_view name, std::span<const kvm_msr_entry> in,
                       std::span<kvm_msr_entry> out);

}  // namespace lodge::kvm::host
