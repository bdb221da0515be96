// The contract: KVM's own, as the kernel documents it (Documentation/virt/kvm/api.rst), in the types of
// <linux/kvm.h>. Two accelerators fulfil it: kvm/host (the host's /dev/kvm) and kvm/soft (user space).
// Machine and device code knows only this header.
//
// Errors. Calls that set something up throw std::system_error with the errno that the ioctl would give
// (EINVAL, EEXIST, ENXIO...). Calls marked noexcept are for the run-time path and return 0 or a negative
// errno.
//
// Threads. System and Vm: any thread. Vcpu: the thread that runs it, save for kick(); set-up and state calls
// may come from another thread while run() is not executing.
#pragma once

#include <linux/kvm.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/fd.hpp"

namespace lodge::kvm {

// Why run() returned: a typed view of the vCPU's kvm_run. Valid until the next run().
class Exit {
 public:
  struct Io {
    bool out;      // true: the guest writes
    uint8_t size;  // bytes of one item: 1, 2 or 4
    uint16_t port;
    uint32_t count;           // items; more than one for string I/O
    std::span<uint8_t> data;  // size * count bytes; for an input the caller fills them before the next run()
  };
  struct Mmio {
    bool write;
    uint64_t gpa;
    std::span<uint8_t> data;  // 1 to 8 bytes; for a read the caller fills them before the next run()
  };

  // `status` is 0 or the negative errno that run() ended with (-EINTR after a kick or a signal, -EAGAIN while
  // the vCPU waits for its SIPI in a machine without in-accelerator irqchip).
  Exit(kvm_run& run, int status) noexcept : run_(&run), status_(status) {}

  int status() const noexcept { return status_; }
  bool interrupted() const noexcept;
  uint32_t reason() const noexcept { return run_->exit_reason; }  // KVM_EXIT_*
  Io io() const noexcept;
  Mmio mmio() const noexcept;
  kvm_run& raw() const noexcept { return *run_; }
  // "io out 0x3f8 size 1", "internal error: suberror 1": for logs and messages.
  std::string describe() const;

 private:
  kvm_run* run_;
  int status_;
};

// "KVM_EXIT_HLT" and so on; "KVM_EXIT_?" for numbers this build does not know.
std::string_view exit_name(uint32_t reason) noexcept;

// Something that an accelerator has counted: for people and tools, in no fixed set.
struct Statistic {
  std::string group, name;
  uint64_t value;
};

// One virtual processor (KVM_CREATE_VCPU). Runs on one thread. Must be destroyed before its Vm.
class Vcpu {
 public:
  virtual ~Vcpu() = default;

  virtual unsigned id() const noexcept = 0;  // APIC ID
  // Runs the guest until it needs the VMM (KVM_RUN). Completes the I/O or MMIO read of the previous exit
  // first.
  virtual Exit run() noexcept = 0;
  // Makes the present run(), or else the next one, return with status -EINTR. Any thread; async-signal-safe.
  virtual void kick() noexcept = 0;
  // The shared structure: immediate_exit, request_interrupt_window, cr8, apic_base, if_flag... (api.rst
  // section 5).
  virtual kvm_run& shared() noexcept = 0;
  // A descriptor of the Vcpu's whose shared mapping from offset 0, System::shared_size() bytes, is that
  // structure once more.
  virtual int shared_fd() const noexcept = 0;

  virtual kvm_regs regs() = 0;
  virtual void set_regs(const kvm_regs& regs) = 0;
  virtual kvm_sregs sregs() = 0;
  virtual void set_sregs(const kvm_sregs& sregs) = 0;
  virtual kvm_sregs2 sregs2() = 0;
  virtual void set_sregs2(const kvm_sregs2& sregs) = 0;
  virtual kvm_fpu fpu() = 0;
  virtual void set_fpu(const kvm_fpu& fpu) = 0;
  virtual kvm_xsave xsave() = 0;
  virtual void set_xsave(const kvm_xsave& xsave) = 0;
  virtual kvm_xcrs xcrs() = 0;
  virtual void set_xcrs(const kvm_xcrs& xcrs) = 0;
  virtual kvm_debugregs debugregs() = 0;
  virtual void set_debugregs(const kvm_debugregs& debugregs) = 0;
  // Reads or writes MSRs in order, stopping at the first that is refused; returns how many succeeded.
  virtual unsigned msrs(std::span<kvm_msr_entry> entries) = 0;
  virtual unsigned set_msrs(std::span<const kvm_msr_entry> entries) = 0;
  virtual std::vector<kvm_cpuid_entry2> cpuid2() = 0;
  virtual void set_cpuid2(std::span<const kvm_cpuid_entry2> entries) = 0;
  virtual kvm_lapic_state lapic() = 0;  // EINVAL without in-accelerator LAPIC
  virtual void set_lapic(const kvm_lapic_state& lapic) = 0;
  virtual kvm_vcpu_events vcpu_events() = 0;
  virtual void set_vcpu_events(const kvm_vcpu_events& events) = 0;
  virtual kvm_mp_state mp_state() = 0;
  virtual void set_mp_state(const kvm_mp_state& state) = 0;
  virtual uint32_t tsc_khz() = 0;
  virtual void set_tsc_khz(uint32_t khz) = 0;
  // What the guest's TSC is ahead of the host's, scaled to tsc_khz() (KVM_VCPU_TSC_OFFSET).
  virtual uint64_t tsc_offset() = 0;
  virtual void set_tsc_offset(uint64_t offset) = 0;
  // Makes guest memory present as a guest's reads would, page by page; `gpa` and `size`, of whole pages,
  // become what is left (KVM_PRE_FAULT_MEMORY). 0, also when only a part was done, or a negative errno:
  // -ENOENT where no slot is.
  virtual int pre_fault_memory(uint64_t& gpa, uint64_t& size) noexcept = 0;
  virtual void set_guest_debug(const kvm_guest_debug& debug) = 0;
  virtual void set_tpr_access_reporting(bool on) = 0;  // KVM_TPR_ACCESS_REPORTING
  virtual void set_vapic_addr(uint64_t gpa) = 0;       // KVM_SET_VAPIC_ADDR; 0: none
  // KVM_INTERRUPT: injects an external interrupt (no in-accelerator LAPIC). 0 or a negative errno.
  virtual int interrupt(uint32_t vector) noexcept = 0;
  virtual int nmi() noexcept = 0;
  virtual int smi() noexcept = 0;  // KVM_SMI; a host without KVM_CAP_X86_SMM answers -EINVAL or -ENOTTY
  // KVM_TRANSLATE: guest-virtual to guest-physical with the present paging.
  virtual kvm_translation translate(uint64_t linear) = 0;
  virtual void enable_cap(const kvm_enable_cap& cap) = 0;
  // Machine-check banks (KVM_X86_SETUP_MCE), and an error in one of them (KVM_X86_SET_MCE).
  virtual void setup_mce(uint64_t capabilities) = 0;
  virtual void set_mce(const kvm_x86_mce& event) = 0;
  // As Vm::statistics_fd(), of this vCPU.
  virtual Fd statistics_fd() = 0;
  // What was counted on this vCPU since its creation; nothing by an accelerator that does not count.
  virtual std::vector<Statistic> statistics() { return {}; }
};

// One virtual machine (KVM_CREATE_VM).
class Vm {
 public:
  virtual ~Vm() = default;

  virtual int check_extension(uint32_t capability) const noexcept = 0;
  virtual void enable_cap(const kvm_enable_cap& cap) = 0;
  // Whether an exit of run() costs about as much as a function call: then what a guest asks for by a write is
  // better done on the vCPU's own thread, while an ioeventfd has to wake another one.
  virtual bool cheap_exits() const noexcept { return false; }

  // Creates, moves, re-flags or (memory_size 0) removes a memory slot; also while vCPUs run: when the call
  // returns no vCPU uses the old slot any more. The caller owns the memory and keeps it mapped while the slot
  // exists. Flags: KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY (guest writes become MMIO exits). Bits 16 and up
  // of the slot's number name the address space (KVM_CAP_MULTI_ADDRESS_SPACE): 1 is what is seen in
  // system-management mode.
  virtual void set_user_memory_region(const kvm_userspace_memory_region& region) = 0;
  // Pages written by the guest since the last call; one bit a page, bit 0 the slot's first. Clears the log
  // unless KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 is enabled.
  virtual void get_dirty_log(uint32_t slot, std::span<uint64_t> bitmap) = 0;
  virtual void clear_dirty_log(uint32_t slot, uint64_t first_page, uint32_t num_pages,
                               std::span<const uint64_t> bitmap) = 0;
  // To be called by the VMM after it has written guest memory itself (a device's DMA, a loader) and before
  // the guest can see the result announced: the soft accelerator drops what it has decoded there. Any thread.
  virtual void note_write(uint64_t gpa, uint64_t size) noexcept = 0;

  virtual std::unique_ptr<Vcpu> create_vcpu(unsigned id) = 0;
  virtual void set_tss_addr(uint64_t gpa) = 0;
  virtual void set_identity_map_addr(uint64_t gpa) = 0;

  // The full irqchip: two 8259, IOAPIC, a LAPIC for each vCPU created later. For the split irqchip (LAPICs
  // only) enable KVM_CAP_SPLIT_IRQCHIP instead.
  virtual void create_irqchip() = 0;
  virtual void create_pit2(const kvm_pit_config& config) = 0;
  virtual kvm_irqchip irqchip(uint32_t chip_id) = 0;
  virtual void set_irqchip(const kvm_irqchip& chip) = 0;
  virtual kvm_pit_state2 pit2() = 0;
  virtual void set_pit2(const kvm_pit_state2& state) = 0;

  // Sets the level of an interrupt line (KVM_IRQ_LINE), routed by the GSI routing table.
  // > 0: delivered; 0: coalesced; < 0: masked or a negative errno.
  virtual int irq_line(uint32_t gsi, bool level) noexcept = 0;
  // > 0: delivered; 0: the guest has blocked the MSI; < 0: negative errno.
  virtual int signal_msi(const kvm_msi& msi) noexcept = 0;
  virtual void set_gsi_routing(std::span<const kvm_irq_routing_entry> entries) = 0;
  virtual void irqfd(const kvm_irqfd& irqfd) = 0;
  virtual void ioeventfd(const kvm_ioeventfd& ioeventfd) = 0;
  // Guest writes to a zone go into the ring behind the vCPUs' shared structures (KVM_CAP_COALESCED_MMIO pages
  // from its start) instead of leaving run(); the caller empties it before it looks at an exit
  // (KVM_REGISTER_COALESCED_MMIO, KVM_UNREGISTER_COALESCED_MMIO).
  virtual void register_coalesced(const kvm_coalesced_mmio_zone& zone) = 0;
  virtual void unregister_coalesced(const kvm_coalesced_mmio_zone& zone) = 0;
  // A descriptor of the Vm's whose one page is that ring, where Vcpu::shared_fd() does not hold it; else -1.
  virtual int coalesced_fd() const noexcept { return -1; }
  // Whether ticks of the 8254 that the guest has missed are made up for (KVM_REINJECT_CONTROL).
  virtual void reinject_control(const kvm_reinject_control& control) = 0;
  // Which MSRs RDMSR and WRMSR may touch; what happens to the others follows from KVM_CAP_X86_USER_SPACE_MSR
  // (KVM_X86_SET_MSR_FILTER). The bitmaps are copied.
  virtual void set_msr_filter(const kvm_msr_filter& filter) = 0;
  // A new descriptor of counters in the kernel's binary form (KVM_GET_STATS_FD), readable also after the Vm.
  virtual Fd statistics_fd() = 0;
  // The vCPU that starts by itself; 0 unless said so before the first is created.
  virtual void set_boot_cpu_id(uint32_t id) = 0;

  // The frequency that vCPUs begin with, in kHz; setting 0 means the host's (KVM_SET_TSC_KHZ of a VM).
  virtual uint32_t default_tsc_khz() = 0;
  virtual void set_default_tsc_khz(uint32_t khz) = 0;
  // kvmclock. With KVM_CLOCK_REALTIME what set_clock() is given is advanced by the time since `realtime`.
  virtual kvm_clock_data clock() = 0;
  virtual void set_clock(const kvm_clock_data& clock) = 0;
};

// An accelerator (what /dev/kvm is to a process).
class System {
 public:
  virtual ~System() = default;

  virtual std::string_view name() const noexcept = 0;  // "kvm" or "soft"
  virtual int check_extension(uint32_t capability) const noexcept = 0;
  virtual std::vector<kvm_cpuid_entry2> supported_cpuid() const = 0;
  virtual std::vector<uint32_t> msr_index_list() const = 0;
  virtual std::vector<uint32_t> msr_feature_index_list() const = 0;
  // Reads feature MSRs; returns how many succeeded.
  virtual unsigned feature_msrs(std::span<kvm_msr_entry> entries) const = 0;
  // The bits that setup_mce() takes beside the number of banks; 0 without KVM_CAP_MCE.
  virtual uint64_t mce_capabilities() const noexcept = 0;
  // Bytes of a vCPU's shared structure (KVM_GET_VCPU_MMAP_SIZE): kvm_run and what its offsets lead to.
  virtual size_t shared_size() const noexcept = 0;
  virtual std::unique_ptr<Vm> create_vm() = 0;
};

}  // namespace lodge::kvm
