#include "kvm/soft/soft.hpp"

#include <cpuid.h>
#include <time.h>

#include <algorithm>

#include "kvm/list.hpp"
#include "kvm/soft/cpu/cpuid.hpp"
#include "kvm/soft/cpu/msr.hpp"
#include "kvm/soft/vcpu.hpp"
#include "kvm/soft/vm.hpp"

namespace lodge::kvm::soft {
namespace {

uint64_t raw_ns() noexcept {
  timespec now{};
  ::clock_gettime(CLOCK_MONOTONIC_RAW, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(now.tv_nsec);
}

// TSC and time of one moment: of several pairs the one that was read with the least delay.
struct ClockReading {
  uint64_t tsc = 0, ns = 0;
};

ClockReading read_clocks() noexcept {
  ClockReading best;
  uint64_t least = UINT64_MAX;
  for (int round = 0; round < 8; ++round) {
    const uint64_t before = raw_ns();
    const uint64_t tsc = __builtin_ia32_rdtsc();
    const uint64_t delay = raw_ns() - before;
    if (delay >= least) continue;
    least = delay;
    best = {.tsc = tsc, .ns = before + delay / 2};
  }
  return best;
}

// The host's TSC frequency: from the hypervisor (leaf 0x40000010), from the processor (0x15), else measured.
uint32_t host_tsc_khz() {
  uint32_t a = 0;
  uint32_t b = 0;
  uint32_t c = 0;
  uint32_t d = 0;
  __cpuid(1, a, b, c, d);
  if ((c & 1u << 31) != 0) {
    __cpuid(0x40000000, a, b, c, d);
    if (a >= 0x40000010) {
      __cpuid(0x40000010, a, b, c, d);
      if (a != 0) return a;
    }
  }
  if (__get_cpuid_max(0, nullptr) >= 0x15) {
    __cpuid(0x15, a, b, c, d);
    if (a != 0 && b != 0 && c != 0) return static_cast<uint32_t>(uint64_t{c} * b / a / 1000);
  }
  const ClockReading start = read_clocks();
  const timespec pause{.tv_sec = 0, .tv_nsec = 20'000'000};
  ::nanosleep(&pause, nullptr);
  const ClockReading end = read_clocks();
  return static_cast<uint32_t>((end.tsc - start.tsc) * 1'000'000 / (end.ns - start.ns));
}

class SoftSystem final : public System {
 public:
  explicit SoftSystem(const Options& options) : tsc_khz_(host_tsc_khz()), options_(options) {}

  std::string_view name() const noexcept override { return "soft"; }
  int check_extension(uint32_t capability) const noexcept override { return soft_extension(capability); }
  std::vector<kvm_cpuid_entry2> supported_cpuid() const override { return host_cpuid(); }
  std::vector<uint32_t> msr_index_list() const override {
    const auto list = kvm::soft::msr_index_list();
    return {list.begin(), list.end()};
  }
  std::vector<uint32_t> msr_feature_index_list() const override {
    const auto list = kvm::soft::msr_feature_index_list();
    return {list.begin(), list.end()};
  }
  unsigned feature_msrs(std::span<kvm_msr_entry> entries) const override {
    unsigned done = 0;
    for (kvm_msr_entry& entry : entries) {
      uint64_t value = 0;
      if (!read_feature_msr(entry.index, value)) break;
      entry.data = value;
      ++done;
    }
    return done;
  }
  uint64_t mce_capabilities() const noexcept override { return MachineCheck::supported; }
  size_t shared_size() const noexcept override { return SoftVcpu::shared_size; }
  std::unique_ptr<Vm> create_vm() override { return std::make_unique<SoftVm>(tsc_khz_, options_); }

 private:
  uint32_t tsc_khz_;
  Options options_;
};

}  // namespace

int soft_extension(uint32_t capability) noexcept {
  switch (capability) {
    case KVM_CAP_IRQCHIP:
    case KVM_CAP_HLT:
    case KVM_CAP_USER_MEMORY:
    case KVM_CAP_SET_TSS_ADDR:
    case KVM_CAP_EXT_CPUID:
    case KVM_CAP_MP_STATE:
    case KVM_CAP_SYNC_MMU:
    case KVM_CAP_PIT:
    case KVM_CAP_NOP_IO_DELAY:
    case KVM_CAP_DESTROY_MEMORY_REGION_WORKS:
    case KVM_CAP_USER_NMI:
    case KVM_CAP_SET_GUEST_DEBUG:
    case KVM_CAP_REINJECT_CONTROL:
    case KVM_CAP_IRQ_INJECT_STATUS:
    case KVM_CAP_JOIN_MEMORY_REGIONS_WORKS:
    case KVM_CAP_IRQFD:
    case KVM_CAP_IRQFD_RESAMPLE:
    case KVM_CAP_PIT2:
    case KVM_CAP_PIT_STATE2:
    case KVM_CAP_IOEVENTFD:
    case KVM_CAP_IOEVENTFD_ANY_LENGTH:
    case KVM_CAP_SET_IDENTITY_MAP_ADDR:
    case KVM_CAP_VCPU_EVENTS:
    case KVM_CAP_DEBUGREGS:
    case KVM_CAP_XSAVE:
    case KVM_CAP_XCRS:
    case KVM_CAP_GET_TSC_KHZ:
    case KVM_CAP_TSC_CONTROL:
    case KVM_CAP_VM_TSC_CONTROL:
    case KVM_CAP_TSC_DEADLINE_TIMER:
    case KVM_CAP_READONLY_MEM:
    case KVM_CAP_SIGNAL_MSI:
    case KVM_CAP_SPLIT_IRQCHIP:
    case KVM_CAP_IMMEDIATE_EXIT:
    case KVM_CAP_SREGS2:
    case KVM_CAP_INTR_SHADOW:
    case KVM_CAP_GET_MSR_FEATURES:
    case KVM_CAP_ENABLE_CAP_VM:
    case KVM_CAP_CHECK_EXTENSION_VM:
    case KVM_CAP_IOEVENTFD_NO_LENGTH:
    case KVM_CAP_SET_BOOT_CPU_ID:
    case KVM_CAP_ENFORCE_PV_FEATURE_CPUID:
    case KVM_CAP_VCPU_ATTRIBUTES:
    case KVM_CAP_X86_USER_SPACE_MSR:
    case KVM_CAP_X86_MSR_FILTER:
    case KVM_CAP_MSR_PLATFORM_INFO:
    case KVM_CAP_BINARY_STATS_FD:
    case KVM_CAP_X86_SMM:
    case cap_pre_fault_memory: return 1;
    case KVM_CAP_DISABLE_QUIRKS2: return VmSettings::quirks;
    case cap_apic_bus_cycles_ns: return Lapic::default_bus_period_ns;
    case KVM_CAP_COALESCED_MMIO: return CoalescedIo::page_offset;
    case KVM_CAP_COALESCED_PIO: return 1;
    case KVM_CAP_IRQ_ROUTING: return GsiRouting::max_gsis;
    case KVM_CAP_ADJUST_CLOCK: return KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC;
    case KVM_CAP_SYNC_REGS: return KVM_SYNC_X86_VALID_FIELDS;
    case KVM_CAP_MCE: return MachineCheck::max_banks;
    case KVM_CAP_SET_GUEST_DEBUG2: return static_cast<int>(SoftVcpu::guest_debug_controls);
    case KVM_CAP_X86_DISABLE_EXITS: return SoftVm::disableable_exits;
    case KVM_CAP_X2APIC_API: return KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
    case KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: return KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE;
    case KVM_CAP_NR_VCPUS:
    case KVM_CAP_MAX_VCPUS:
    case KVM_CAP_MAX_VCPU_ID: return Irqchip::max_vcpus;
    case KVM_CAP_NR_MEMSLOTS: return 32764;
    case KVM_CAP_MULTI_ADDRESS_SPACE: return AddressSpaces::count;
    default: return 0;
  }
}

std::unique_ptr<System> open(const Options& options) {
  return std::make_unique<SoftSystem>(options);
}

}  // namespace lodge::kvm::soft
