// The in-accelerator interrupt hardware of one VM, as a whole: KVM's irqchip. Owned by the soft Vm.
//
// Life: constructed empty (mode none); create_full() or create_split() once, before the first vCPU; then
// add_vcpu() for each vCPU. Outlives the vCPUs' use of their LAPICs.
//
// Threads: the create functions and add_vcpu() from set-up code (one at a time); everything else from any
// thread. Functions that throw give the errno of the ioctl that is named with them.
#pragma once

#include <linux/kvm.h>

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "base/clock.hpp"
#include "kvm/soft/irqchip/ioapic.hpp"
#include "kvm/soft/irqchip/ioeventfd.hpp"
#include "kvm/soft/irqchip/irqfd.hpp"
#include "kvm/soft/irqchip/lapic.hpp"
#include "kvm/soft/irqchip/pic.hpp"
#include "kvm/soft/irqchip/pit.hpp"
#include "kvm/soft/irqchip/routing.hpp"
#include "kvm/soft/irqchip/vcpu_port.hpp"

namespace lodge::kvm::soft {

class Irqchip final : public ApicFabric,
                      private Pic::Client,
                      private Ioapic::Client,
                      private Pit::Client,
                      private Irqfds::Client {
 public:
  enum class Mode : uint8_t { none, full, split };
  static constexpr unsigned max_vcpus = 1024;

  explicit Irqchip(Clock& clock);
  ~Irqchip() override;

  Mode mode() const noexcept { return mode_.load(std::memory_order_acquire); }
  void create_full();                // KVM_CREATE_IRQCHIP: EEXIST
  void create_split(uint64_t pins);  // KVM_CAP_SPLIT_IRQCHIP: EEXIST, EINVAL
  void create_pit(
      const kvm_pit_config& config);  // KVM_CREATE_PIT2: EEXIST, ENOENT without the full irqchip, EINVAL
  void set_reinject(const kvm_reinject_control& control);  // KVM_REINJECT_CONTROL: ENXIO
  void set_x2apic_api(uint64_t flags);                     // KVM_CAP_X2APIC_API: EINVAL
  // What the LAPICs' timers count by (KVM_CAP_X86_APIC_BUS_CYCLES_NS): ENXIO without LAPICs, EINVAL (zero, so
  // long that a count does not fit into 64 bits, or there is a vCPU already).
  void set_bus_period(uint64_t nanoseconds);
  bool x2apic_ids() const noexcept { return (x2apic_api_.load() & KVM_X2APIC_API_USE_32BIT_IDS) != 0; }

  // The LAPIC of a new vCPU with this APIC ID (mode full or split). It belongs to the Irqchip; the vCPU calls
  // remove_vcpu() when it goes, after which its port is not called any more. EEXIST, EINVAL (too many), ENXIO
  // (none).
  Lapic& add_vcpu(uint32_t id, VcpuPort& port);
  // The ID of the vCPU that starts by itself (0 unless said so); before the first one.
  void set_boot_id(uint32_t id) noexcept { boot_id_ = id; }
  uint32_t boot_id() const noexcept { return boot_id_; }
  void remove_vcpu(Lapic& lapic) noexcept { lapic.detach(); }

  // --- Guest accesses (the LAPIC page and MSRs go to the vCPU's own Lapic) ---
  bool handles_port(uint16_t port) const noexcept;
  void port_read(uint16_t port, void* data, unsigned size) noexcept;
  void port_write(uint16_t port, const void* data, unsigned size) noexcept;
  bool handles_gpa(uint64_t gpa) const noexcept { return mode() == Mode::full && ioapic_->handles_gpa(gpa); }
  void mmio_read(uint64_t gpa, void* data, unsigned size) noexcept;
  void mmio_write(uint64_t gpa, const void* data, unsigned size) noexcept;

  // --- Interrupts in ---
  int irq_line(uint32_t gsi, bool level) noexcept;  // KVM_IRQ_LINE_STATUS: > 0, 0, -1 or a negative errno
  int signal_msi(const kvm_msi& msi) noexcept;      // KVM_SIGNAL_MSI
  void set_gsi_routing(std::span<const kvm_irq_routing_entry> entries);  // EINVAL
  void irqfd(const kvm_irqfd& request);  // KVM_IRQFD: see Irqfds::set; EINVAL without irqchip
  // Split: an EOI of `vector`, level triggered, must reach the VMM's IOAPIC (KVM_EXIT_IOAPIC_EOI). Lapic asks
  // this itself; see Lapic::take_eoi_exit().
  bool eoi_needs_exit(uint8_t vector) noexcept;

  // --- Paravirtual requests of a vCPU ---
  // Delivers the IPI `icr` to the physical IDs first + n for each bit n of `targets` (KVM_HC_SEND_IPI).
  // Returns how many took it, or a negative errno.
  int send_ipis(std::span<const uint64_t> targets, uint64_t first, uint64_t icr) noexcept;
  // Ends the HLT of the vCPU with this physical ID (KVM_HC_KICK_CPU).
  void unhalt(uint32_t apic_id) noexcept;
  bool has_lapic(uint32_t apic_id) const noexcept;

  // --- State ---
  kvm_irqchip chip(uint32_t chip_id);          // KVM_GET_IRQCHIP: ENXIO, EINVAL
  void set_chip(const kvm_irqchip& chip);      // KVM_SET_IRQCHIP
  kvm_pit_state2 pit2();                       // KVM_GET_PIT2: ENXIO
  void set_pit2(const kvm_pit_state2& state);  // KVM_SET_PIT2

  // --- ApicFabric ---
  void send_ipi(const ApicMessage& message) noexcept override;
  void send_ipi(const ApicMessage& message, Lapic& source, Shorthand shorthand) noexcept override;
  bool end_of_interrupt(Lapic& source, uint8_t vector, bool broadcast) noexcept override;
  bool watches_eoi(uint8_t vector) const noexcept override {
    return mode() == Mode::full && ioapic_->handles_vector(vector);
  }
  bool extint_asserted() const noexcept override { return mode() == Mode::full && pic_->output(); }
  int extint_peek() noexcept override { return mode() == Mode::full ? pic_->peek() : -1; }
  int extint_acknowledge() noexcept override { return mode() == Mode::full ? pic_->acknowledge() : -1; }

 private:
  static constexpr unsigned source_pit = 2;  // after those of Irqfds

  void pic_output() noexcept override;
  void pic_acked(unsigned irq) noexcept override;
  int deliver(const ApicMessage& message) noexcept override;
  void ioapic_acked(unsigned pin) noexcept override;
  int pit_interrupt() noexcept override;
  int set_irq(uint32_t gsi, unsigned source, bool level) noexcept override;

  void acked(int gsi) noexcept;
  std::shared_ptr<const GsiRouting> routing() noexcept;
  std::span<const std::atomic<Lapic*>> lapics() const noexcept {
    return std::span(lapics_).first(lapic_count_.load(std::memory_order_acquire));
  }

  Clock& clock_;
  std::atomic<Mode> mode_{Mode::none};
  std::atomic<uint64_t> x2apic_api_{0};
  unsigned split_pins_ = 0;
  uint32_t boot_id_ = 0;
  uint64_t bus_period_ns_ = Lapic::default_bus_period_ns;

  std::mutex setup_;
  std::vector<std::unique_ptr<Lapic>> owned_;
  // Written once each and published by the count: readers take no lock. A LAPIC whose vCPU has gone stays,
  // detached.
  std::array<std::atomic<Lapic*>, max_vcpus> lapics_{};
  std::atomic<unsigned> lapic_count_{0};

  std::mutex routing_mutex_;
  std::shared_ptr<const GsiRouting> routing_;

  std::unique_ptr<Pic> pic_;
  std::unique_ptr<Ioapic> ioapic_;
  std::unique_ptr<Pit> pit_;
  std::atomic<Pit*> pit_published_{nullptr};
  Irqfds irqfds_;
};

}  // namespace lodge::kvm::soft
