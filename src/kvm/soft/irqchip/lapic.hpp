// The local APIC of one vCPU. See lapic.cpp for what is modelled.
//
// Threads: deliver(), poke_extint(), local_interrupt() and the timer come from any thread. Register accesses,
// acknowledge() and resets are meant for the vCPU's thread (or any other while the vCPU does not run), and
// are safe from others. maybe_pending() and pending_vector() take no lock for the LAPIC's own interrupts.
#pragma once

#include <linux/kvm.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>

#include "base/clock.hpp"
#include "kvm/soft/irqchip/apic_message.hpp"
#include "kvm/soft/irqchip/vcpu_port.hpp"

namespace lodge::kvm::soft {

class Lapic;

// What a LAPIC sees of the rest of the interrupt hardware; the Irqchip implements it. No LAPIC lock is held.
class ApicFabric {
 public:
  virtual ~ApicFabric() = default;
  // Delivers an IPI to the LAPICs that it addresses.
  virtual void send_ipi(const ApicMessage& message) noexcept = 0;
  enum class Shorthand : uint8_t { self_only = 1, all = 2, others = 3 };
  virtual void send_ipi(const ApicMessage& message, Lapic& source, Shorthand shorthand) noexcept = 0;
  // An interrupt was completed. `broadcast` is false for edge-triggered ones and under EOI suppression: then
  // only listeners learn of it, not the IOAPIC's remote IRR. True: the VMM's IOAPIC must be told (split
  // irqchip).
  virtual bool end_of_interrupt(Lapic& source, uint8_t vector, bool broadcast) noexcept = 0;
  // Whether somebody waits for the completion of `vector`, so that it must be told at once. Takes no lock.
  virtual bool watches_eoi(uint8_t vector) const noexcept = 0;
  // The 8259 pair: its INTR output, the vector it would give now, and the INTA cycle (-1 without one).
  virtual bool extint_asserted() const noexcept = 0;
  virtual int extint_peek() noexcept = 0;
  virtual int extint_acknowledge() noexcept = 0;
};

class Lapic {
 public:
  static constexpr uint64_t default_base = 0xfee00000;
  static constexpr uint64_t base_bsp = 1u << 8;
  static constexpr uint64_t base_x2apic = 1u << 10;
  static constexpr uint64_t base_enable = 1u << 11;
  static constexpr uint64_t default_bus_period_ns = 1;  // 1 GHz timer clock, as KVM's

  struct Options {
    bool eoi_suppression = false;  // SVR bit 12 exists (the IOAPIC has an EOI register: split irqchip)
    bool boot = false;             // of the processor that starts by itself
    uint64_t bus_period_ns = default_bus_period_ns;
  };

  Lapic(uint32_t id, VcpuPort& port, ApicFabric& fabric, Clock& clock, Options options);
  ~Lapic();
  Lapic(const Lapic&) = delete;
  Lapic& operator=(const Lapic&) = delete;

  uint32_t id() const noexcept { return id_; }  // the vCPU's (x2)APIC ID, which the guest cannot change

  // --- Register page (xAPIC mode) ---
  // True when `gpa` lies in the page that IA32_APIC_BASE enables.
  bool handles_gpa(uint64_t gpa) const noexcept {
    const uint64_t base = base_.load(std::memory_order_relaxed);
    return (base & base_enable) != 0 && gpa - (base & ~uint64_t{0xfff}) < 0x1000;
  }
  // One 32-bit register; `offset` 0 to 0xfff, its low 4 bits ignored. In x2APIC mode reads give ~0, writes
  // nothing.
  uint32_t mmio_read(uint32_t offset) noexcept;
  void mmio_write(uint32_t offset, uint32_t value) noexcept;
  // An access as the guest made it, size 1 to 8 and any alignment (SDM 11.4.1: only aligned 32-bit accesses
  // are defined; others read the bytes of the register and write nothing).
  void mmio(uint32_t offset, bool write, void* data, unsigned size) noexcept;

  // --- MSRs: 0x800 to 0x83f in x2APIC mode. False: #GP. ---
  bool msr_read(uint32_t index, uint64_t& value) noexcept;
  bool msr_write(uint32_t index, uint64_t value) noexcept;
  // IA32_TSC_DEADLINE (0x6e0). Writes are ignored and reads give 0 outside of that timer mode.
  uint64_t tsc_deadline() noexcept;
  void set_tsc_deadline(uint64_t guest_tsc) noexcept;
  // The guest's TSC changed (offset, frequency): a TSC deadline is computed anew.
  void tsc_changed() noexcept;
  // IA32_APIC_BASE (0x1b). set returns false for #GP (reserved bits, a forbidden transition); `host`
  // (KVM_SET_SREGS, KVM_SET_MSRS) may make any transition.
  uint64_t apic_base() const noexcept { return base_.load(std::memory_order_relaxed); }
  bool set_apic_base(uint64_t value, bool host = false) noexcept;
  // The same check of a value that is to follow `old`, also for a vCPU without LAPIC; `reserved`:
  // reserved_base().
  static bool valid_base(uint64_t old, uint64_t value, uint64_t reserved, bool host) noexcept;
  static uint64_t reserved_base(bool x2apic, unsigned physical_bits) noexcept;
  // Whether the guest's CPUID shows x2APIC (default) and how many address bits it has (default 52).
  void set_cpuid(bool x2apic, unsigned physical_bits) noexcept;

  // CR8 and the TPR's upper half are the same.
  uint8_t cr8() const noexcept { return cr8_.load(std::memory_order_relaxed); }
  void set_cr8(uint8_t value) noexcept;

  // --- Interrupts to the vCPU ---
  // One or two loads: false when pending_vector() would certainly be -1.
  bool maybe_pending() const noexcept;
  // The vector that acknowledge() would give now (8259 first, as the CPU's INTR pin knows no priority), or
  // -1.
  int pending_vector() noexcept;
  // Takes it: INTA at the 8259, or IRR to ISR. -1 when it has gone meanwhile.
  int acknowledge() noexcept;
  // Paravirtual EOI (MSR_KVM_PV_EOI_EN), for the vCPU's thread. defer_eoi(): true when the guest may complete
  // the one interrupt in service without telling, because nothing waits for its completion. Until
  // settle_eoi(), which says whether the guest has done so, every further interrupt calls
  // interrupt_changed(), whatever its priority.
  bool defer_eoi() noexcept;
  void settle_eoi(bool completed) noexcept;
  // Split irqchip: the VMM's 8259 (KVM_INTERRUPT). False: one is pending already (EEXIST).
  bool inject_extint(uint8_t vector) noexcept;
  // LINT0 is open for the 8259 (or the LAPIC is off, when INTR goes straight to the CPU). For
  // ready_for_interrupt_injection.
  bool accepts_extint() const noexcept { return accepts_extint_.load(std::memory_order_relaxed); }
  // Vector given with inject_extint() and not yet taken, or -1.
  int injected_extint() const noexcept { return injected_.load(std::memory_order_relaxed); }
  // Vector whose EOI must be told to the VMM's IOAPIC (KVM_EXIT_IOAPIC_EOI), or -1; taken by the call. To be
  // asked after a register write.
  int take_eoi_exit() noexcept {
    return eoi_exit_.load(std::memory_order_relaxed) < 0 ? -1 : eoi_exit_.exchange(-1);
  }

  enum class Local : uint8_t { cmci = 0x2f, thermal = 0x33, performance = 0x34, lint0 = 0x35, lint1 = 0x36 };
  // The LVT entry of corrected machine checks exists from now on, masked, or does not
  // (IA32_MCG_CAP.MCG_CMCI_P).
  void offer_cmci(bool offered) noexcept;
  // A local interrupt source fired. A performance interrupt masks its own LVT entry.
  void local_interrupt(Local source) noexcept;

  // --- State ---
  void reset() noexcept;       // power-up: base address, ID and registers
  void init_reset() noexcept;  // INIT: keeps IA32_APIC_BASE and the IDs
  // KVM_GET/SET_LAPIC. `x2apic_ids`: KVM_X2APIC_API_USE_32BIT_IDS, else the ID register of an x2APIC holds id
  // << 24.
  kvm_lapic_state state(bool x2apic_ids) noexcept;
  bool set_state(const kvm_lapic_state& state,
                 bool x2apic_ids) noexcept;  // false: the ID does not fit (EINVAL)

  // --- For the Irqchip ---
  bool present() const noexcept;  // has a vCPU and is enabled by IA32_APIC_BASE: takes part in delivery
  // SVR bit 8: takes fixed interrupts.
  bool software_enabled() const noexcept { return enabled_.load(std::memory_order_relaxed); }
  bool matches(const ApicMessage& message, bool broadcast_quirk) const noexcept;
  // The physical destination that addresses it in its present mode.
  uint32_t physical_id() const noexcept { return x2apic() ? id_ : xapic_id_.load(std::memory_order_relaxed); }
  void unhalt() noexcept;
  // True: taken (also when the vector is pending already). False: refused, as by a LAPIC that software has
  // disabled.
  bool deliver(const ApicMessage& message) noexcept;
  // The 8259 output rose, or LINT0 is driven by the 8254 as an NMI source (watchdog).
  void poke_extint() noexcept;
  void pit_tick() noexcept;
  // True while `vector` is in service or requested.
  bool in_flight(uint8_t vector) noexcept;
  // The vCPU is going away: no call to its port starts after this returns.
  void detach() noexcept;
  bool detached() const noexcept { return detached_.load(std::memory_order_relaxed); }

 private:
  using Registers = std::array<uint32_t, 64>;  // one for each 16 bytes of the page

  struct Effects;  // what a register write asks for once the lock is released
  uint32_t read_register(unsigned reg) noexcept;
  void write_register(unsigned reg, uint32_t value, Effects& effects) noexcept;
  void write_icr(Effects& effects) noexcept;
  void write_lvt(unsigned reg, uint32_t value) noexcept;
  void write_svr(uint32_t value) noexcept;
  void end_of_interrupt(Effects& effects) noexcept;
  void finish(const Effects& effects) noexcept;

  bool x2apic() const noexcept {
    return (base_.load(std::memory_order_relaxed) & (base_x2apic | base_enable)) ==
           (base_x2apic | base_enable);
  }
  bool request(uint8_t vector, bool level) noexcept;
  bool readable(unsigned reg, bool in_x2apic) const noexcept;
  bool fire_lvt(unsigned reg) noexcept;
  void error(uint32_t bit) noexcept;
  uint32_t ppr() const noexcept;
  void update() noexcept;
  void publish_ids() noexcept;
  void reset_registers() noexcept;

  unsigned timer_mode() const noexcept;
  uint64_t timer_tick() const noexcept;
  uint32_t current_count() noexcept;
  void start_timer(uint32_t count) noexcept;
  void start_deadline() noexcept;
  void stop_timer() noexcept;
  void timer_expired() noexcept;
  bool check_timer() noexcept;  // true: it was due

  const uint32_t id_;
  const Options options_;
  ApicFabric& fabric_;
  Clock& clock_;

  mutable std::mutex mutex_;
  VcpuPort* port_;  // null once detached
  Registers regs_{};
  uint32_t error_pending_ = 0;  // becomes visible by a write of ESR
  bool eoi_deferred_ = false;   // see defer_eoi()
  bool x2apic_offered_ = true;
  bool cmci_ = false;  // the LVT entry exists
  uint64_t base_reserved_;

  // The timer, guarded by mutex_. Deadline in nanoseconds of the clock, 0: not armed.
  uint64_t deadline_ = 0;
  uint64_t period_ = 0;        // nanoseconds; 0: not periodic
  uint64_t tsc_deadline_ = 0;  // guest TSC, as written

  // Published for lock-free readers.
  std::atomic<uint64_t> base_;
  std::atomic<uint32_t> xapic_id_{0};
  std::atomic<uint32_t> ldr_{0};
  std::atomic<uint32_t> dfr_{0xffffffff};
  std::atomic<bool> enabled_{false};
  std::atomic<bool> detached_{false};
  std::atomic<bool> accepts_extint_{false};
  std::atomic<int> own_vector_{-1};  // deliverable from IRR, or -1
  std::atomic<int> injected_{-1};
  std::atomic<int> eoi_exit_{-1};
  std::atomic<uint8_t> cr8_{0};

  std::unique_ptr<Timer> timer_;  // last: its destructor waits for a callback that uses the members above
};

}  // namespace lodge::kvm::soft
