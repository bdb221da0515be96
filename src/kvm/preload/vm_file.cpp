// A VM (api.rst: "VM ioctls"): each ioctl is one call of the contract.
#include "kvm/preload/vm_file.hpp"

#include <fcntl.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <vector>

#include "kvm/preload/argument.hpp"
#include "kvm/preload/signals.hpp"
#include "kvm/preload/table.hpp"

namespace lodge::kvm::preload {
namespace {

constexpr uint64_t page_size = 4096;
constexpr unsigned long min_mmu_pages = 64;  // the least that KVM takes

// Linux 6.8; older headers lack them. Without the flag for private memory, which is refused as unknown, it is
// kvm_userspace_memory_region with reserved words behind it.
struct MemoryRegion2 {
  kvm_userspace_memory_region region;
  uint64_t reserved[16];
};
static_assert(sizeof(MemoryRegion2) == 160);
constexpr unsigned long set_user_memory_region2 = _IOW(KVMIO, 0x49, MemoryRegion2);
constexpr unsigned long cap_user_memory2 = 231;

class VmFile final : public File {
 public:
  explicit VmFile(std::shared_ptr<Vm> vm) : vm_(std::move(vm)) {}

 private:
  const char* name() const noexcept override { return "a VM"; }
  int answer(unsigned long number, unsigned long argument) override {
    switch (number) {
      case KVM_CHECK_EXTENSION:
        return check_extension(vm_->check_extension(static_cast<uint32_t>(argument)), argument);
      case KVM_ENABLE_CAP: return enable_cap(pointed<kvm_enable_cap>(argument));
      case KVM_CREATE_VCPU:
        return argument > UINT32_MAX ? -EINVAL : make_vcpu(static_cast<unsigned>(argument));
      case KVM_GET_TSC_KHZ: return static_cast<int>(vm_->default_tsc_khz());
      case KVM_SET_TSC_KHZ: return set_tsc_khz(static_cast<uint32_t>(argument));
      case KVM_SET_TSS_ADDR: return vm_->set_tss_addr(argument), 0;
      case KVM_SET_IDENTITY_MAP_ADDR: return vm_->set_identity_map_addr(pointed<uint64_t>(argument)), 0;
      case KVM_SET_BOOT_CPU_ID:
        return argument > UINT32_MAX ? -EINVAL : (vm_->set_boot_cpu_id(static_cast<uint32_t>(argument)), 0);
      case KVM_GET_CLOCK: return pointed<kvm_clock_data>(argument) = vm_->clock(), 0;
      case KVM_X86_SET_MSR_FILTER: return vm_->set_msr_filter(pointed<kvm_msr_filter>(argument)), 0;
      case KVM_GET_STATS_FD: return vm_->statistics_fd().release();
      case KVM_SET_CLOCK: return vm_->set_clock(pointed<kvm_clock_data>(argument)), 0;
      default: break;
    }
    if (const int result = memory(number, argument); result != -ENOTTY) return result;
    return interrupts(number, argument);
  }

  int make_vcpu(unsigned id) { return create_vcpu(vm_, vm_->create_vcpu(id)); }

  int set_tsc_khz(uint32_t khz) {
    if (khz > INT32_MAX) return -EINVAL;
    return vm_->set_default_tsc_khz(khz), 0;
  }

  int enable_cap(const kvm_enable_cap& cap) {
    if (cap.flags != 0) return -EINVAL;
    vm_->enable_cap(cap);
    return 0;
  }

  int memory(unsigned long number, unsigned long argument) {
    switch (number) {
      case KVM_SET_USER_MEMORY_REGION: return set_region(pointed<kvm_userspace_memory_region>(argument));
      case set_user_memory_region2: return set_region(pointed<MemoryRegion2>(argument).region);
      case KVM_GET_DIRTY_LOG: return get_dirty_log(pointed<kvm_dirty_log>(argument));
      case KVM_CLEAR_DIRTY_LOG: return clear_dirty_log(pointed<kvm_clear_dirty_log>(argument));
      // A limit for shadow page tables, of which there are none: kept as any number of them would keep it.
      case KVM_SET_NR_MMU_PAGES: return argument < min_mmu_pages ? -EINVAL : 0;
      default: return -ENOTTY;
    }
  }

  int set_region(const kvm_userspace_memory_region& region) {
    const std::lock_guard lock(mutex_);
    vm_->set_user_memory_region(region);
    slot_pages_[region.slot] = region.memory_size / page_size;
    return 0;
  }

  // Without a bitmap, as in the kernel: what is wrong besides is said first, and the log is cleared.
  int get_dirty_log(const kvm_dirty_log& log) {
    const size_t count = words(log.slot);
    if (auto* const bitmap = static_cast<uint64_t*>(log.dirty_bitmap); bitmap != nullptr)
      return vm_->get_dirty_log(log.slot, {bitmap, count}), 0;
    std::vector<uint64_t> lost(count);
    vm_->get_dirty_log(log.slot, lost);
    return -EFAULT;
  }
  int clear_dirty_log(const kvm_clear_dirty_log& log) {
    const size_t count = (size_t{log.num_pages} + 63) / 64;
    const auto* const bitmap = static_cast<const uint64_t*>(log.dirty_bitmap);
    if (bitmap != nullptr || count == 0)
      return vm_->clear_dirty_log(log.slot, log.first_page, log.num_pages, {bitmap, count}), 0;
    const std::vector<uint64_t> nothing(std::min(count, words(log.slot)));
    vm_->clear_dirty_log(log.slot, log.first_page, log.num_pages, nothing);
    return -EFAULT;
  }

  // The client's bitmap has one bit for each page of the slot, in whole words.
  size_t words(uint32_t slot) {
    const std::lock_guard lock(mutex_);
    const auto found = slot_pages_.find(slot);
    return found == slot_pages_.end() ? 0 : (found->second + 63) / 64;
  }

  int interrupts(unsigned long number, unsigned long argument) {
    switch (number) {
      case KVM_CREATE_IRQCHIP: return vm_->create_irqchip(), 0;
      case KVM_GET_IRQCHIP: {
        auto& chip = pointed<kvm_irqchip>(argument);
        return chip = vm_->irqchip(chip.chip_id), 0;
      }
      case KVM_SET_IRQCHIP: return vm_->set_irqchip(pointed<kvm_irqchip>(argument)), 0;
      case KVM_CREATE_PIT: return vm_->create_pit2({}), 0;
      case KVM_CREATE_PIT2: return vm_->create_pit2(pointed<kvm_pit_config>(argument)), 0;
      case KVM_GET_PIT: return get_pit(pointed<kvm_pit_state>(argument));
      case KVM_SET_PIT: return set_pit(pointed<kvm_pit_state>(argument));
      case KVM_GET_PIT2: return pointed<kvm_pit_state2>(argument) = vm_->pit2(), 0;
      case KVM_SET_PIT2: return vm_->set_pit2(pointed<kvm_pit_state2>(argument)), 0;
      case KVM_REINJECT_CONTROL: return vm_->reinject_control(pointed<kvm_reinject_control>(argument)), 0;
      case KVM_IRQ_LINE:
      case KVM_IRQ_LINE_STATUS: {
        auto& line = pointed<kvm_irq_level>(argument);
        const int result = vm_->irq_line(line.irq, line.level != 0);
        if (result < -1) return result;  // -1: masked
        if (number == KVM_IRQ_LINE_STATUS) line.status = static_cast<uint32_t>(result);
        return 0;
      }
      case KVM_SIGNAL_MSI: return vm_->signal_msi(pointed<kvm_msi>(argument));
      case request::set_gsi_routing: return set_routing(argument);
      case KVM_IRQFD: return vm_->irqfd(pointed<kvm_irqfd>(argument)), 0;
      case KVM_REGISTER_COALESCED_MMIO:
        return vm_->register_coalesced(pointed<kvm_coalesced_mmio_zone>(argument)), 0;
      case KVM_UNREGISTER_COALESCED_MMIO:
        return vm_->unregister_coalesced(pointed<kvm_coalesced_mmio_zone>(argument)), 0;
      case KVM_IOEVENTFD: return vm_->ioeventfd(pointed<kvm_ioeventfd>(argument)), 0;
      default: return -ENOTTY;
    }
  }

  // The channels alone, without the flags that came later.
  int get_pit(kvm_pit_state& state) {
    const kvm_pit_state2 now = vm_->pit2();
    return std::ranges::copy(now.channels, state.channels), 0;
  }
  int set_pit(const kvm_pit_state& state) {
    kvm_pit_state2 next = vm_->pit2();
    std::ranges::copy(state.channels, next.channels);
    return vm_->set_pit2(next), 0;
  }

  int set_routing(unsigned long argument) {
    if (pointed<CountHeader>(argument).zero != 0) return -EINVAL;
    const RoutingEntries list(argument);
    vm_->set_gsi_routing(list.entries());
    return 0;
  }

  const std::shared_ptr<Vm> vm_;
  std::mutex mutex_;
  std::map<uint32_t, uint64_t> slot_pages_;
};

}  // namespace

int check_extension(int accelerator, unsigned long capability) noexcept {
  return capability == cap_user_memory2 ? 1 : accelerator;
}

int create_vm(const std::shared_ptr<System>& system) {
  adopt_signal_handlers();
  Fd fd = placeholder(O_RDWR | O_CLOEXEC);
  if (!fd) throw_errno("cannot make a VM's descriptor");
  return table().add({std::move(fd), std::make_shared<VmFile>(system->create_vm())});
}

}  // namespace lodge::kvm::preload
