// A vCPU (api.rst: "vcpu ioctls"): each ioctl is one call of the contract.
#include <fcntl.h>
#include <sys/mman.h>

#include <algorithm>
#include <mutex>
#include <optional>
#include <vector>

#include "kvm/preload/argument.hpp"
#include "kvm/preload/cancellation.hpp"
#include "kvm/preload/signals.hpp"
#include "kvm/preload/table.hpp"
#include "kvm/preload/vm_file.hpp"

namespace lodge::kvm::preload {
namespace {

constexpr uint64_t page_size = 4096;
constexpr uint32_t max_io_msrs = 256, max_cpuid_entries = 256;

class VcpuFile final : public File {
 public:
  VcpuFile(std::shared_ptr<Vm> vm, std::unique_ptr<Vcpu> vcpu)
      : vm_(std::move(vm)),
        vcpu_(std::move(vcpu)),
        coalesced_page_(static_cast<uint64_t>(vm_->check_extension(KVM_CAP_COALESCED_MMIO))) {}

  // The ring of coalesced I/O is the VM's, in a file of its own.
  bool mapped(void* start, size_t size, uint64_t offset) noexcept override {
    const uint64_t ring = coalesced_page_ * page_size;
    if (vm_->coalesced_fd() < 0 || offset > ring || size < ring + page_size - offset) return true;
    return ::mmap(static_cast<uint8_t*>(start) + (ring - offset), page_size, PROT_READ | PROT_WRITE,
                  MAP_SHARED | MAP_FIXED, vm_->coalesced_fd(), 0) != MAP_FAILED;
  }

 private:
  const char* name() const noexcept override { return "a vCPU"; }
  int answer(unsigned long number, unsigned long argument) override {
    if (number == KVM_RUN) return argument == 0 ? run() : -EINVAL;
    // As in the kernel, whoever comes while the vCPU runs waits until it has left the guest.
    const std::lock_guard lock(mutex_);
    if (const int result = registers(number, argument); result != -ENOTTY) return result;
    if (const int result = lists(number, argument); result != -ENOTTY) return result;
    return control(number, argument);
  }

  int run() {
    const CancellableRun cancellable(*vcpu_);
    // The client's handlers run when this goes, without the lock: they may use the vCPU, or not return.
    SignalsWhileRunning signals(*vcpu_, signal_mask());
    const std::lock_guard lock(mutex_);
    if (signals.postponed()) vcpu_->kick();  // the first kick may have ended another thread's run
    return vcpu_->run().status();
  }

  std::optional<uint64_t> signal_mask() {
    const std::lock_guard lock(mutex_);
    return signal_mask_;
  }

  int registers(unsigned long number, unsigned long argument) {
    switch (number) {
      case KVM_GET_REGS: return pointed<kvm_regs>(argument) = vcpu_->regs(), 0;
      case KVM_SET_REGS: return vcpu_->set_regs(pointed<kvm_regs>(argument)), 0;
      case KVM_GET_SREGS: return pointed<kvm_sregs>(argument) = vcpu_->sregs(), 0;
      case KVM_SET_SREGS: return vcpu_->set_sregs(pointed<kvm_sregs>(argument)), 0;
      case KVM_GET_SREGS2: return pointed<kvm_sregs2>(argument) = vcpu_->sregs2(), 0;
      case KVM_SET_SREGS2: return vcpu_->set_sregs2(pointed<kvm_sregs2>(argument)), 0;
      case KVM_GET_FPU: return pointed<kvm_fpu>(argument) = vcpu_->fpu(), 0;
      case KVM_SET_FPU: return vcpu_->set_fpu(pointed<kvm_fpu>(argument)), 0;
      case request::get_xsave: return get_xsave(argument);
      case request::set_xsave: return set_xsave(argument);
      case KVM_GET_XCRS: return pointed<kvm_xcrs>(argument) = vcpu_->xcrs(), 0;
      case KVM_SET_XCRS: return vcpu_->set_xcrs(pointed<kvm_xcrs>(argument)), 0;
      case KVM_GET_DEBUGREGS: return pointed<kvm_debugregs>(argument) = vcpu_->debugregs(), 0;
      case KVM_SET_DEBUGREGS: return vcpu_->set_debugregs(pointed<kvm_debugregs>(argument)), 0;
      case KVM_GET_LAPIC: return pointed<kvm_lapic_state>(argument) = vcpu_->lapic(), 0;
      case KVM_SET_LAPIC: return vcpu_->set_lapic(pointed<kvm_lapic_state>(argument)), 0;
      case KVM_GET_VCPU_EVENTS: return pointed<kvm_vcpu_events>(argument) = vcpu_->vcpu_events(), 0;
      case KVM_SET_VCPU_EVENTS: return vcpu_->set_vcpu_events(pointed<kvm_vcpu_events>(argument)), 0;
      case KVM_GET_MP_STATE: return pointed<kvm_mp_state>(argument) = vcpu_->mp_state(), 0;
      case KVM_SET_MP_STATE: return vcpu_->set_mp_state(pointed<kvm_mp_state>(argument)), 0;
      default: return -ENOTTY;
    }
  }

  int get_xsave(unsigned long argument) {
    const kvm_xsave state = vcpu_->xsave();
    std::memcpy(pointed<XsaveRegion>(argument).words, state.region, sizeof state.region);
    return 0;
  }
  int set_xsave(unsigned long argument) {
    kvm_xsave state{};
    std::memcpy(state.region, pointed<XsaveRegion>(argument).words, sizeof state.region);
    vcpu_->set_xsave(state);
    return 0;
  }

  int lists(unsigned long number, unsigned long argument) {
    switch (number) {
      case request::get_msrs:
      case request::set_msrs: {
        const MsrEntries list(argument);
        if (list.count() >= max_io_msrs) return -E2BIG;
        return static_cast<int>(number == request::get_msrs ? vcpu_->msrs(list.entries())
                                                            : vcpu_->set_msrs(list.entries()));
      }
      case request::set_cpuid2: {
        const CpuidEntries list(argument);
        if (list.count() > max_cpuid_entries) return -E2BIG;
        return vcpu_->set_cpuid2(list.entries()), 0;
      }
      case request::set_cpuid: return set_cpuid(OldCpuidEntries(argument));
      case request::get_cpuid2: {
        CpuidEntries list(argument);
        const auto entries = vcpu_->cpuid2();
        if (list.count() < entries.size()) return -E2BIG;
        std::ranges::copy(entries, list.entries().begin());
        list.set_count(entries.size());
        return 0;
      }
      default: return -ENOTTY;
    }
  }

  // KVM_SET_CPUID: entries that know no index.
  int set_cpuid(const OldCpuidEntries& list) {
    if (list.count() > max_cpuid_entries) return -E2BIG;
    std::vector<kvm_cpuid_entry2> entries(list.count());
    std::ranges::transform(list.entries(), entries.begin(), [](const kvm_cpuid_entry& entry) {
      kvm_cpuid_entry2 out{};
      out.function = entry.function;
      out.eax = entry.eax, out.ebx = entry.ebx, out.ecx = entry.ecx, out.edx = entry.edx;
      return out;
    });
    return vcpu_->set_cpuid2(entries), 0;
  }

  int control(unsigned long number, unsigned long argument) {
    switch (number) {
      case request::set_signal_mask: return set_signal_mask(argument);
      case KVM_INTERRUPT: return vcpu_->interrupt(pointed<kvm_interrupt>(argument).irq);
      case KVM_NMI: return vcpu_->nmi();
      case KVM_SMI: return vcpu_->smi();
      case KVM_GET_TSC_KHZ: return static_cast<int>(vcpu_->tsc_khz());
      case KVM_SET_TSC_KHZ: return vcpu_->set_tsc_khz(static_cast<uint32_t>(argument)), 0;
      case KVM_SET_GUEST_DEBUG: return vcpu_->set_guest_debug(pointed<kvm_guest_debug>(argument)), 0;
      case KVM_TPR_ACCESS_REPORTING:
        return vcpu_->set_tpr_access_reporting(pointed<kvm_tpr_access_ctl>(argument).enabled != 0), 0;
      case KVM_SET_VAPIC_ADDR: return vcpu_->set_vapic_addr(pointed<kvm_vapic_addr>(argument).vapic_addr), 0;
      case KVM_TRANSLATE: {
        auto& translation = pointed<kvm_translation>(argument);
        return translation = vcpu_->translate(translation.linear_address), 0;
      }
      case KVM_HAS_DEVICE_ATTR:
      case KVM_GET_DEVICE_ATTR:
      case KVM_SET_DEVICE_ATTR: return device_attribute(number, pointed<kvm_device_attr>(argument));
      case request::pre_fault_memory: return pre_fault_memory(pointed<PreFaultMemory>(argument));
      case KVM_GET_STATS_FD: return vcpu_->statistics_fd().release();
      case KVM_X86_SETUP_MCE: return vcpu_->setup_mce(pointed<uint64_t>(argument)), 0;
      case KVM_X86_SET_MCE: return vcpu_->set_mce(pointed<kvm_x86_mce>(argument)), 0;
      case KVM_ENABLE_CAP: {
        const auto& cap = pointed<kvm_enable_cap>(argument);
        return cap.flags != 0 ? -EINVAL : (vcpu_->enable_cap(cap), 0);
      }
      default: return -EINVAL;
    }
  }

  int device_attribute(unsigned long number, const kvm_device_attr& attribute) {
    if (attribute.group != KVM_VCPU_TSC_CTRL || attribute.attr != KVM_VCPU_TSC_OFFSET) return -ENXIO;
    switch (number) {
      case KVM_GET_DEVICE_ATTR: return pointed<uint64_t>(attribute.addr) = vcpu_->tsc_offset(), 0;
      case KVM_SET_DEVICE_ATTR: return vcpu_->set_tsc_offset(pointed<uint64_t>(attribute.addr)), 0;
      default: return 0;
    }
  }

  int pre_fault_memory(PreFaultMemory& range) {
    if (range.flags != 0) return -EINVAL;
    return vcpu_->pre_fault_memory(range.gpa, range.size);
  }

  int set_signal_mask(unsigned long argument) {
    if (argument == 0) {
      signal_mask_.reset();
      return 0;
    }
    const auto& given = pointed<ShortHeader>(argument);
    uint64_t mask = 0;
    if (given.count != sizeof mask) return -EINVAL;
    std::memcpy(&mask, &given + 1, sizeof mask);
    signal_mask_ = mask;
    return 0;
  }

  const std::shared_ptr<Vm> vm_;
  const std::unique_ptr<Vcpu> vcpu_;  // gone before its VM
  const uint64_t coalesced_page_;     // of the client's mapping
  std::mutex mutex_;
  std::optional<uint64_t> signal_mask_;  // KVM_SET_SIGNAL_MASK
};

}  // namespace

int create_vcpu(std::shared_ptr<Vm> vm, std::unique_ptr<Vcpu> vcpu) {
  // The structure's own file: the client's mmap of the descriptor maps kvm_run.
  Fd fd = Fd::duplicate(vcpu->shared_fd());
  return table().add({std::move(fd), std::make_shared<VcpuFile>(std::move(vm), std::move(vcpu))});
}

}  // namespace lodge::kvm::preload
