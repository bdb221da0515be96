// The kernel's structures that end in a flexible array, as one owned, zeroed buffer.
//
// In C++ the headers of <linux/kvm.h> are not what the kernel means: __DECLARE_FLEX_ARRAY holds an empty
// struct, which has no size in C but one byte in C++, so that sizeof(kvm_msrs) is 16 instead of 8 and
// sizeof(kvm_xsave) 4100. Both the layout and the request numbers (which contain the size) are therefore
// spelled out here.
#pragma once

#include <linux/kvm.h>
#include <sys/ioctl.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace lodge::kvm {

// kvm_cpuid and kvm_cpuid2 (nent), kvm_msrs (nmsrs) and kvm_irq_routing (nr): a count and a word that is
// zero.
struct CountHeader {
  uint32_t count;
  uint32_t zero;
};
// kvm_msr_list (nmsrs) and kvm_signal_mask (len).
struct ShortHeader {
  uint32_t count;
};
constexpr size_t xsave_bytes = sizeof(kvm_xsave::region);
struct XsaveRegion {
  uint32_t words[xsave_bytes / 4];
};
static_assert(sizeof(CountHeader) == 8 && sizeof(ShortHeader) == 4 && sizeof(XsaveRegion) == 4096);

// Linux 6.11; older headers lack it.
struct PreFaultMemory {
  uint64_t gpa = 0, size = 0, flags = 0, padding[5] = {};
};
constexpr uint32_t cap_pre_fault_memory = 236, cap_apic_bus_cycles_ns = 237;

namespace request {
constexpr unsigned long get_msr_index_list = _IOWR(KVMIO, 0x02, ShortHeader);
constexpr unsigned long get_supported_cpuid = _IOWR(KVMIO, 0x05, CountHeader);
constexpr unsigned long get_msr_feature_index_list = _IOWR(KVMIO, 0x0a, ShortHeader);
constexpr unsigned long set_gsi_routing = _IOW(KVMIO, 0x6a, CountHeader);
constexpr unsigned long get_msrs = _IOWR(KVMIO, 0x88, CountHeader);
constexpr unsigned long set_msrs = _IOW(KVMIO, 0x89, CountHeader);
constexpr unsigned long set_cpuid = _IOW(KVMIO, 0x8a, CountHeader);
constexpr unsigned long set_cpuid2 = _IOW(KVMIO, 0x90, CountHeader);
constexpr unsigned long set_signal_mask = _IOW(KVMIO, 0x8b, ShortHeader);
constexpr unsigned long get_cpuid2 = _IOWR(KVMIO, 0x91, CountHeader);
constexpr unsigned long get_xsave = _IOR(KVMIO, 0xa4, XsaveRegion);
constexpr unsigned long set_xsave = _IOW(KVMIO, 0xa5, XsaveRegion);
constexpr unsigned long get_xsave2 = _IOR(KVMIO, 0xcf, XsaveRegion);
constexpr unsigned long pre_fault_memory = _IOWR(KVMIO, 0xd5, PreFaultMemory);
}  // namespace request

// Memory from new[] of bytes is aligned for all of them, and bytes may hold any of them.
template <class Header, class Entry>
class List {
 public:
  explicit List(size_t capacity)
      : bytes_(std::make_unique<std::byte[]>(sizeof(Header) + capacity * sizeof(Entry))),
        capacity_(capacity) {}

  Header* header() noexcept { return reinterpret_cast<Header*>(bytes_.get()); }
  std::span<Entry> entries() noexcept {
    return {reinterpret_cast<Entry*>(bytes_.get() + sizeof(Header)), capacity_};
  }

 private:
  std::unique_ptr<std::byte[]> bytes_;
  size_t capacity_;
};

}  // namespace lodge::kvm
