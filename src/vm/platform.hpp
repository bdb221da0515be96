// Messages and doorbells of the machine, by the accelerator's contract.
#pragma once

#include "kvm/kvm.hpp"
#include "machine/io.hpp"

namespace lodge::vm {

// KVM_SIGNAL_MSI and KVM_IOEVENTFD. `vm` outlives this object.
class Platform final : public machine::MsiTarget, public machine::Doorbells {
 public:
  explicit Platform(kvm::Vm& vm) noexcept : vm_(vm) {}
  void signal(uint64_t address, uint32_t data) noexcept override;
  bool add(const machine::Doorbell& doorbell) noexcept override;
  void remove(const machine::Doorbell& doorbell) noexcept override;
  bool windows_are_cheaper() const noexcept override { return vm_.cheap_exits(); }

 private:
  kvm::Vm& vm_;
};

}  // namespace lodge::vm
