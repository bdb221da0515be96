// The argument of an ioctl as what it points to. A null pointer is EFAULT; another one that leads nowhere
// faults in the client, where the kernel would have answered EFAULT.
#pragma once

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <span>

#include "base/error.hpp"
#include "kvm/list.hpp"

namespace lodge::kvm::preload {

template <class T>
T& pointed(unsigned long argument) {
  if (argument == 0) throw_errno(EFAULT, "null argument");
  return *reinterpret_cast<T*>(argument);
}

// kvm_msrs and its like (kvm/list.hpp): a header with the count, then the entries.
template <class Header, class Entry>
class CountedList {
 public:
  explicit CountedList(unsigned long argument) : header_(pointed<Header>(argument)) {}
  uint32_t count() const noexcept { return header_.count; }
  void set_count(size_t count) noexcept { header_.count = static_cast<uint32_t>(count); }
  std::span<Entry> entries() const noexcept {
    return {reinterpret_cast<Entry*>(reinterpret_cast<uint8_t*>(&header_) + sizeof(Header)), count()};
  }

 private:
  Header& header_;
};
using MsrEntries = CountedList<CountHeader, kvm_msr_entry>;
using MsrIndices = CountedList<ShortHeader, uint32_t>;
using OldCpuidEntries = CountedList<CountHeader, kvm_cpuid_entry>;
using CpuidEntries = CountedList<CountHeader, kvm_cpuid_entry2>;
using RoutingEntries = CountedList<CountHeader, kvm_irq_routing_entry>;

}  // namespace lodge::kvm::preload
