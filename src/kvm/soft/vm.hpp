// One virtual machine of the soft accelerator: slots, vCPUs, irqchip and clock.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include "base/clock.hpp"
#include "kvm/kvm.hpp"
#include "kvm/soft/binary_statistics.hpp"
#include "kvm/soft/coalesced.hpp"
#include "kvm/soft/cpu/kvmclock.hpp"
#include "kvm/soft/cpu/vm_settings.hpp"
#include "kvm/soft/irqchip/irqchip.hpp"
#include "kvm/soft/mmu/memory_map.hpp"
#include "kvm/soft/mmu/write_guard.hpp"
#include "kvm/soft/options.hpp"
#include "kvm/soft/translate/code_cache.hpp"
#include "kvm/soft/tsc_lines.hpp"

namespace lodge::kvm::soft {

class SoftVcpu;

class SoftVm final : public Vm, private CodeWatch, private GuardedMemory {
 public:
  // `tsc_khz`: of the host.
  SoftVm(uint32_t tsc_khz, const Options& options);
  ~SoftVm() override;

  int check_extension(uint32_t capability) const noexcept override;
  void enable_cap(const kvm_enable_cap& cap) override;
  void set_user_memory_region(const kvm_userspace_memory_region& region) override;
  void get_dirty_log(uint32_t slot, std::span<uint64_t> bitmap) override;
  void clear_dirty_log(uint32_t slot, uint64_t first_page, uint32_t num_pages,
                       std::span<const uint64_t> bitmap) override;
  void note_write(uint64_t gpa, uint64_t size) noexcept override;
  std::unique_ptr<Vcpu> create_vcpu(unsigned id) override;
  void set_tss_addr(uint64_t gpa) override;
  void set_identity_map_addr(uint64_t gpa) override;
  void create_irqchip() override;
  void create_pit2(const kvm_pit_config& config) override { irqchip_.create_pit(config); }
  kvm_irqchip irqchip(uint32_t chip_id) override { return irqchip_.chip(chip_id); }
  void set_irqchip(const kvm_irqchip& chip) override { irqchip_.set_chip(chip); }
  kvm_pit_state2 pit2() override { return irqchip_.pit2(); }
  void set_pit2(const kvm_pit_state2& state) override { irqchip_.set_pit2(state); }
  int irq_line(uint32_t gsi, bool level) noexcept override { return irqchip_.irq_line(gsi, level); }
  int signal_msi(const kvm_msi& msi) noexcept override { return irqchip_.signal_msi(msi); }
  void set_gsi_routing(std::span<const kvm_irq_routing_entry> entries) override {
    irqchip_.set_gsi_routing(entries);
  }
  void irqfd(const kvm_irqfd& irqfd) override { irqchip_.irqfd(irqfd); }
  void ioeventfd(const kvm_ioeventfd& ioeventfd) override { ioeventfds_.set(ioeventfd); }
  void register_coalesced(const kvm_coalesced_mmio_zone& zone) override { coalesced_.add(zone); }
  void unregister_coalesced(const kvm_coalesced_mmio_zone& zone) override { coalesced_.remove(zone); }
  int coalesced_fd() const noexcept override { return coalesced_.fd(); }
  bool cheap_exits() const noexcept override { return true; }
  void reinject_control(const kvm_reinject_control& control) override { irqchip_.set_reinject(control); }
  void set_boot_cpu_id(uint32_t id) override;
  void set_msr_filter(const kvm_msr_filter& filter) override {
    settings_.set_filter(std::make_shared<const MsrFilter>(filter));
  }
  Fd statistics_fd() override;
  uint32_t default_tsc_khz() override { return default_tsc_khz_; }
  void set_default_tsc_khz(uint32_t khz) override { default_tsc_khz_ = valid_tsc_khz(khz); }
  kvm_clock_data clock() override;
  void set_clock(const kvm_clock_data& clock) override;

  // --- for the vCPUs ---
  Irqchip& interrupts() noexcept { return irqchip_; }
  IoEventfds& ioeventfds() noexcept { return ioeventfds_; }
  CoalescedIo& coalesced() noexcept { return coalesced_; }
  const VmSettings& settings() const noexcept { return settings_; }
  Clock& timers() noexcept { return clock_; }
  std::mutex& split_lock() noexcept { return split_lock_; }
  std::mutex& clock_pages_mutex() noexcept { return clock_pages_mutex_; }
  uint32_t tsc_khz() const noexcept { return tsc_khz_; }  // of the host
  // The frequency that KVM_SET_TSC_KHZ asks for with `khz`. EINVAL for what guests are not given.
  uint32_t valid_tsc_khz(uint32_t khz) const;
  TscLines& tsc_lines() noexcept { return tsc_lines_; }
  const Options& options() const noexcept { return options_; }
  // HLT ends no run(), whoever has the LAPIC (KVM_CAP_X86_DISABLE_EXITS).
  bool halt_in_guest() const noexcept { return halt_in_guest_.load(std::memory_order_relaxed); }
  static constexpr uint64_t disableable_exits = KVM_X86_DISABLE_EXITS_HLT | KVM_X86_DISABLE_EXITS_PAUSE;
  CodeCache& code_cache() noexcept { return code_cache_; }
  // kvmclock follows the host's TSC, as the pages that guests read do: one line for all vCPUs.
  uint64_t kvmclock_at(uint64_t host_tsc) const noexcept {
    return clock_scale_.nanoseconds(host_tsc) + clock_offset_.load(std::memory_order_relaxed);
  }
  uint64_t kvmclock_ns() const noexcept { return kvmclock_at(__builtin_ia32_rdtsc()); }
  std::shared_ptr<const AddressSpaces> memory() noexcept;
  const std::atomic<uint32_t>& code_epoch() const noexcept { return epoch; }
  // A page becomes code: when this returns, no other vCPU writes to it without taking the slow path. `self`
  // keeps acknowledging what others ask of it meanwhile.
  void shoot_down(SoftVcpu& self, uint64_t host_page) noexcept;
  void remove_vcpu(SoftVcpu& vcpu) noexcept;
  // As many pages of code are guarded as may be: makes all code stale. False: there was none.
  bool forget_code() noexcept;

 private:
  void code_changed(uint64_t host_page) noexcept override;
  std::shared_ptr<const AddressSpaces> guarded_memory() noexcept override { return memory(); }
  void before_fork() noexcept override { map_mutex_.lock(); }
  void after_fork() noexcept override { map_mutex_.unlock(); }
  void install(std::shared_ptr<const AddressSpaces> map) noexcept;
  void flush_all_vcpus() noexcept;
  Slot& slot_by_id(uint32_t id, const char* what);
  void limit_vcpu_ids(uint64_t limit);
  void create_split_irqchip(uint64_t pins);

  const uint32_t tsc_khz_;
  std::atomic<uint32_t> default_tsc_khz_{tsc_khz_};
  const Options options_;
  const std::unique_ptr<PerfMap> perf_map_;  // or null
  CodeCache code_cache_;
  const ClockScale clock_scale_;
  TscLines tsc_lines_;
  RealClock clock_;
  std::atomic<uint64_t> clock_offset_;
  Irqchip irqchip_;
  IoEventfds ioeventfds_;
  CoalescedIo coalesced_;
  VmSettings settings_;
  std::mutex split_lock_;
  std::mutex clock_pages_mutex_;

  std::mutex slots_mutex_;                                     // one slot change at a time
  std::unordered_map<uint32_t, std::shared_ptr<Slot>> slots_;  // by number
  std::mutex map_mutex_;                                       // guards map_ itself
  std::shared_ptr<const AddressSpaces> map_;
  bool manual_dirty_protect_ = false;
  std::atomic<bool> halt_in_guest_{false};
  std::optional<GuardRegistration> guard_;

  enum Event : unsigned { tlb_flushes };
  std::mutex vcpus_mutex_;
  Counters<1> events_;  // under vcpus_mutex_
  std::vector<SoftVcpu*> vcpus_;
  uint32_t vcpu_ids_ = Irqchip::max_vcpus;  // no vCPU's ID is as high
  std::mutex peers_mutex_;                  // never held while waiting for a vCPU
  std::vector<SoftVcpu*> peers_;
};

}  // namespace lodge::kvm::soft
