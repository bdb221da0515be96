// Writes of a VMM that does not tell of them (Options::guard_code): finds the guarded page that a host
// address belongs to and opens it.
//
// Two ways lead here. A store of the VMM's own faults, and the process's SIGSEGV handler asks admit_fault().
// A system call that is to fill guest memory (read(2) and its like) would end with EFAULT instead: whoever
// passes such calls on asks admit_write() before.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace lodge::kvm::soft {

struct AddressSpaces;

// A VM whose code is guarded.
class GuardedMemory {
 public:
  virtual ~GuardedMemory() = default;
  // Any thread.
  virtual std::shared_ptr<const AddressSpaces> guarded_memory() noexcept = 0;
  // Around fork(): holds the lock that guarded_memory() takes.
  virtual void before_fork() noexcept {}
  virtual void after_fork() noexcept {}
};

// Makes a VM known to the functions below while it lives.
class GuardRegistration {
 public:
  explicit GuardRegistration(GuardedMemory& memory);
  ~GuardRegistration();
  GuardRegistration(const GuardRegistration&) = delete;
  GuardRegistration& operator=(const GuardRegistration&) = delete;

 private:
  GuardedMemory& memory_;
};

// Any thread, also in a handler of a synchronous signal. True: a store to `address` may succeed now.
bool admit_fault(uint64_t address) noexcept;
// Opens all guarded pages of the range. Costs one load while no VM guards anything. True: there were some.
bool admit_write(uint64_t address, size_t size) noexcept;

}  // namespace lodge::kvm::soft
