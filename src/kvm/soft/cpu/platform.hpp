// What instructions ask of the machine around the processor: its local APIC, its clock, its exits.
// Implemented by SoftVcpu; unit tests bring their own.
#pragma once

#include <cstdint>
#include <mutex>
#include <optional>

#include "kvm/soft/cpu/vm_settings.hpp"

namespace lodge::kvm::soft {

class Platform {
 public:
  virtual ~Platform() = default;

  // IA32_APIC_BASE, IA32_TSC_DEADLINE and the x2APIC range 0x800-0x8ff. False: #GP(0). The VMM
  // (`host_initiated`) may go from any mode of the LAPIC to any other.
  virtual bool read_apic_msr(uint32_t index, uint64_t& value) noexcept = 0;
  virtual bool write_apic_msr(uint32_t index, uint64_t value, bool host_initiated) noexcept = 0;
  // The task priority as CR8 shows it (0-15). set_tpr() is called by MOV to CR8.
  virtual uint8_t tpr() noexcept = 0;
  virtual void set_tpr(uint8_t tpr) noexcept = 0;
  virtual bool apic_enabled() noexcept = 0;  // CPUID.1:EDX.APIC follows it
  virtual bool x2apic_enabled() noexcept = 0;

  // The guest's TSC: host TSC scaled, plus offset.
  virtual uint64_t tsc() noexcept = 0;
  virtual void set_tsc(uint64_t value) noexcept = 0;  // WRMSR to IA32_TSC
  // KVM_SET_MSRS of IA32_TSC: the same TSC as other vCPUs' when it is nearly the same.
  virtual void synchronize_tsc(uint64_t value) noexcept { set_tsc(value); }
  virtual uint32_t tsc_khz() noexcept = 0;  // of the guest's TSC
  // Nanoseconds of the VM's kvmclock (KVM_GET_CLOCK), and wall-clock nanoseconds since 1970.
  virtual uint64_t kvmclock_ns() noexcept = 0;
  virtual uint64_t wall_ns() noexcept = 0;
  // TSC and kvmclock of one and the same moment. All vCPUs' pairs lie on one line whose slope is
  // clock_scale(tsc_khz()): what their kvmclock pages say must not differ.
  struct ClockPair {
    uint64_t tsc = 0, ns = 0;
  };
  virtual ClockPair clock_pair() noexcept { return {.tsc = tsc(), .ns = kvmclock_ns()}; }

  // Held by whoever writes such a page, the vCPU's own thread or another.
  virtual std::unique_lock<std::mutex> lock_clock_pages() noexcept { return {}; }

  // What the VMM has settled for the VM.
  virtual const VmSettings& settings() const noexcept = 0;
  // An MSR access that would be #GP. True: it goes to the VMM instead (KVM_CAP_X86_USER_SPACE_MSR, for one of
  // the KVM_MSR_EXIT_REASON_*), the exit is filled in and the cpu's wants_exit is to be set; when the VMM has
  // answered, the instruction runs again from its beginning, alone, and takes the answer.
  virtual bool exit_for_msr(uint32_t index, bool write, uint64_t value, uint32_t reason) noexcept = 0;
  struct MsrAnswer {
    bool refused = false;  // #GP after all
    uint64_t value = 0;
  };
  virtual std::optional<MsrAnswer> msr_answer() noexcept { return std::nullopt; }
  // An access to guest-physical memory that is not RAM, within a page, 1 to 64 bytes: answered by the
  // accelerator's own devices or, in pieces of 8 bytes, by the VMM. False: the exit is filled in and the
  // cpu's wants_exit set; when the VMM has answered, the instruction runs again from its beginning and gets
  // the answers in the same order.
  virtual bool mmio(uint64_t gpa, void* data, unsigned size, bool write) noexcept = 0;
  // Port I/O, `count` items of `size` (1, 2 or 4) bytes, at most 1024 bytes in all; permission is checked
  // already. As mmio(): answered, or false and the instruction runs again when the VMM has answered.
  virtual bool io(uint16_t port, void* data, unsigned size, uint32_t count, bool out) noexcept = 0;
  // Held around locked accesses that are not one host instruction; one for the whole VM.
  virtual std::mutex& split_lock() noexcept = 0;
  // MSR_KVM_STEAL_TIME or MSR_KVM_PV_EOI_EN is about to change, has changed.
  virtual void paravirt_changing() noexcept {}
  virtual void paravirt_changed() noexcept {}
  // Cpu::smm has changed: `memory` is now to be that of the other address space.
  virtual void smm_changed() noexcept {}
  // The instruction has shut the processor down: fills in the exit, to be left with by Step::exit.
  virtual void shutdown() noexcept {}
  // VMCALL/VMMCALL. The result for RAX (negative KVM_E* error numbers).
  virtual uint64_t hypercall(uint64_t number, const uint64_t (&arguments)[4]) noexcept = 0;
};

}  // namespace lodge::kvm::soft
