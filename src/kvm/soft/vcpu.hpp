// One vCPU of the soft accelerator: the run loop around a Cpu, its exits, and its side of the contract.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "base/mapping.hpp"
#include "kvm/kvm.hpp"
#include "kvm/soft/binary_statistics.hpp"
#include "kvm/soft/cpu/cpu.hpp"
#include "kvm/soft/cpu/events.hpp"
#include "kvm/soft/cpu/platform.hpp"
#include "kvm/soft/cpu/steal_time.hpp"
#include "kvm/soft/decode/decoder.hpp"
#include "kvm/soft/idle_watch.hpp"
#include "kvm/soft/interpret/block.hpp"
#include "kvm/soft/irqchip/vcpu_port.hpp"
#include "kvm/soft/mmu/memory_map.hpp"
#include "kvm/soft/options.hpp"
#include "kvm/soft/translate/translator.hpp"
#include "kvm/soft/tsc_lines.hpp"
#include "kvm/soft/vcpu_timer.hpp"

namespace lodge::kvm::soft {

class Lapic;
class SoftVm;

// KVM_CHECK_EXTENSION of the soft accelerator.
int soft_extension(uint32_t capability) noexcept;

// What a step of the run loop decided: go on, or return from run() with this status.
struct Outcome {
  bool leave = false;
  int status = 0;
};
inline constexpr Outcome go_on{};
constexpr Outcome leave_with(int status) {
  return {true, status};
}

class SoftVcpu final : public Vcpu, private Platform, private BlockSource {
 public:
  SoftVcpu(SoftVm& vm, unsigned id);
  ~SoftVcpu() override;

  unsigned id() const noexcept override { return id_; }
  Exit run() noexcept override;
  void kick() noexcept override { post(request::kick); }
  kvm_run& shared() noexcept override { return *run_; }
  int shared_fd() const noexcept override { return shared_file_.get(); }
  // What set_guest_debug() takes (KVM_CAP_SET_GUEST_DEBUG2).
  static constexpr uint32_t guest_debug_controls = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP |
                                                   KVM_GUESTDBG_USE_SW_BP | KVM_GUESTDBG_USE_HW_BP |
                                                   KVM_GUESTDBG_BLOCKIRQ;
  static constexpr size_t shared_size = 3 * page_size;  // kvm_run, port data, coalesced accesses

  kvm_regs regs() override;
  void set_regs(const kvm_regs& regs) override;
  kvm_sregs sregs() override;
  void set_sregs(const kvm_sregs& sregs) override;
  kvm_sregs2 sregs2() override;
  void set_sregs2(const kvm_sregs2& sregs) override;
  kvm_fpu fpu() override;
  void set_fpu(const kvm_fpu& fpu) override;
  kvm_xsave xsave() override;
  void set_xsave(const kvm_xsave& xsave) override;
  kvm_xcrs xcrs() override;
  void set_xcrs(const kvm_xcrs& xcrs) override;
  kvm_debugregs debugregs() override;
  void set_debugregs(const kvm_debugregs& debugregs) override;
  unsigned msrs(std::span<kvm_msr_entry> entries) override;
  unsigned set_msrs(std::span<const kvm_msr_entry> entries) override;
  std::vector<kvm_cpuid_entry2> cpuid2() override;
  void set_cpuid2(std::span<const kvm_cpuid_entry2> entries) override;
  kvm_lapic_state lapic() override;
  void set_lapic(const kvm_lapic_state& lapic) override;
  kvm_vcpu_events vcpu_events() override;
  void set_vcpu_events(const kvm_vcpu_events& events) override;
  kvm_mp_state mp_state() override;
  void set_mp_state(const kvm_mp_state& state) override;
  uint32_t tsc_khz() noexcept override { return tsc_khz_; }
  void set_tsc_khz(uint32_t khz) override;
  uint64_t tsc_offset() override { return tsc_offset_; }
  void set_tsc_offset(uint64_t offset) override;
  int pre_fault_memory(uint64_t& gpa, uint64_t& size) noexcept override;
  void set_guest_debug(const kvm_guest_debug& debug) override;
  void set_tpr_access_reporting(bool on) override;
  void set_vapic_addr(uint64_t gpa) override;
  int interrupt(uint32_t vector) noexcept override;
  int nmi() noexcept override;
  int smi() noexcept override;
  kvm_translation translate(uint64_t linear) override;
  void enable_cap(const kvm_enable_cap& cap) override;
  void setup_mce(uint64_t capabilities) override;
  void set_mce(const kvm_x86_mce& event) override;
  std::vector<Statistic> statistics() override;
  Fd statistics_fd() override;

  // --- for the VM, any thread ---
  void post(uint32_t bits) noexcept;
  void post_flush() noexcept;                               // the slot table or the dirty log changed
  void post_code_page(uint64_t host) noexcept;              // drop write tags of this page
  void write_clock_page(const MemoryMap& memory) noexcept;  // while slots stay as they are
  bool flush_acknowledged() noexcept;                       // or the vCPU is not in the guest
  // Does what was posted; own thread.
  void acknowledge_memory() noexcept;

 private:
  // Platform
  bool read_apic_msr(uint32_t index, uint64_t& value) noexcept override;
  bool write_apic_msr(uint32_t index, uint64_t value, bool host_initiated) noexcept override;
  uint8_t tpr() noexcept override;
  void set_tpr(uint8_t tpr) noexcept override;
  bool apic_enabled() noexcept override;
  bool x2apic_enabled() noexcept override;
  uint64_t tsc() noexcept override { return guest_tsc(); }
  void set_tsc(uint64_t value) noexcept override;
  void synchronize_tsc(uint64_t value) noexcept override;
  uint64_t kvmclock_ns() noexcept override;
  ClockPair clock_pair() noexcept override;
  uint64_t wall_ns() noexcept override;
  const VmSettings& settings() const noexcept override;
  bool exit_for_msr(uint32_t index, bool write, uint64_t value, uint32_t reason) noexcept override;
  std::optional<MsrAnswer> msr_answer() noexcept override;
  void paravirt_changing() noexcept override { settle_pv_eoi(); }
  void paravirt_changed() noexcept override {
    if (in_guest_.load()) steal_.start();
  }
  void smm_changed() noexcept override;
  void shutdown() noexcept override { run_->exit_reason = KVM_EXIT_SHUTDOWN; }
  uint64_t hypercall(uint64_t number, const uint64_t (&arguments)[4]) noexcept override;
  bool mmio(uint64_t gpa, void* data, unsigned size, bool write) noexcept override;
  // Whether one more access of the instruction is for the VMM's ring; done only where it cannot happen twice.
  enum class Coalesced : uint8_t { no, done, alone };
  Coalesced coalesce(uint64_t gpa, const void* data, unsigned size) noexcept;
  bool io(uint16_t port, void* data, unsigned size, uint32_t count, bool out) noexcept override;
  std::mutex& split_lock() noexcept override;
  std::unique_lock<std::mutex> lock_clock_pages() noexcept override;

  // BlockSource
  Block* block_at(uint64_t linear) noexcept override { return lookup_slowly(linear, cpu_.decode_key); }
  bool wants_attention() noexcept override;
  bool event_waits() noexcept override;
  void interrupt() noexcept override { post(request::code); }
  std::shared_ptr<const DecodedBlock> decode_pieces(const DecodedBlock& head, uint64_t linear,
                                                    std::span<const Piece> pieces) noexcept override;

  // What the LAPIC sees of this vCPU.
  class Port final : public VcpuPort {
   public:
    explicit Port(SoftVcpu& vcpu) : vcpu_(vcpu) {}
    void interrupt_changed() noexcept override { vcpu_.post(request::interrupt); }
    void nmi() noexcept override { vcpu_.post(request::nmi); }
    void smi() noexcept override { vcpu_.post(request::smi); }
    void init() noexcept override { vcpu_.post(request::init); }
    void sipi(uint8_t vector) noexcept override {
      vcpu_.sipi_vector_ = vector;
      vcpu_.post(request::sipi);
    }
    void unhalt() noexcept override { vcpu_.post(request::unhalt); }
    std::unique_ptr<Timer> make_timer(Clock&, std::function<void()> expired) override {
      return VcpuTimer::make_timer(vcpu_.timer_, std::move(expired));
    }
    uint64_t guest_tsc() const noexcept override { return vcpu_.guest_tsc(); }
    uint64_t tsc_deadline_to_clock_ns(uint64_t guest_tsc) const noexcept override {
      return vcpu_.tsc_to_clock(guest_tsc);
    }

   private:
    SoftVcpu& vcpu_;
  };
  void store_tsc_offset(uint64_t offset) noexcept;
  void place_tsc(TscLines::Cause cause, uint64_t value) noexcept;
  uint64_t guest_tsc() const noexcept;
  uint64_t guest_tsc(uint64_t host_tsc) const noexcept;
  uint64_t tsc_to_clock(uint64_t guest_tsc) const noexcept;

  std::vector<kvm_cpuid_entry2> present(const Features& features);

  // The run loop (vcpu.cpp)
  int loop() noexcept;
  Outcome service() noexcept;
  Outcome take_init_and_sipi(uint32_t bits) noexcept;
  Outcome inject() noexcept;
  Outcome take_smi() noexcept;
  void choose_memory() noexcept {
    cpu_.memory = &map_->space[cpu_.smm ? 1 : 0];
    cpu_.paravirt_memory = &map_->space[0];
  }
  Outcome wait_while_halted() noexcept;
  // Before a halt; how long to sleep at most, in nanoseconds.
  uint64_t give_back_when_idle() noexcept;
  void end_halt() noexcept;
  bool wakes() noexcept;
  bool something_waits() noexcept;
  Outcome run_blocks() noexcept;
  Outcome run_alone() noexcept;
  // The instruction that the VMM's answers are for has run, or will not.
  void drop_answers() noexcept;
  Outcome after_stop() noexcept;
  Outcome deliver(Delivery delivery) noexcept;
  Outcome deliver_pending() noexcept;
  Outcome debug_exit(uint64_t dr6, Exception vector) noexcept;
  Outcome exit_with(uint32_t reason) noexcept;
  Outcome internal_error(uint32_t suberror) noexcept;
  bool interrupts_open() noexcept;
  bool takes_injection() noexcept;
  bool smi_waits() const noexcept { return smi_pending_ && !cpu_.smm; }
  void enter_guest() noexcept;
  void leave_guest() noexcept;
  void finish_exit() noexcept;
  void publish() noexcept;
  void count_exit(int status) noexcept;
  // KVM_CAP_SYNC_REGS: takes what the VMM marked in kvm_dirty_regs, 0 or -EINVAL; gives what kvm_valid_regs
  // asks for.
  int take_shared_registers() noexcept;
  void give_shared_registers() noexcept;

  // Paravirtual EOI (vcpu_paravirt.cpp): offers it for the interrupt that was just taken; finds out whether
  // the guest has made use of it. The latter comes before anything that depends on what is in service.
  void offer_pv_eoi() noexcept;
  void settle_pv_eoi() noexcept;

  // The lockstep engine (vcpu_lockstep.cpp)
  struct Outcomes;
  bool run_both(Block& block, bool again = false) noexcept;
  std::string difference(const Outcomes& wanted, const WriteJournal& journal) const;

  // Decoding (vcpu_fetch.cpp)
  static unsigned jump_hash(uint64_t linear) noexcept {
    return static_cast<unsigned>(linear ^ linear >> 12) % jump_entries;
  }
  // The block at `linear`, by the links of the block that ran before (or null), the jump table, or slowly.
  Block* lookup(uint64_t linear, Block* from) noexcept;
  Block* lookup_slowly(uint64_t linear, uint32_t key) noexcept;
  std::unique_ptr<Block> decode(uint64_t linear, uint32_t key, unsigned limit) noexcept;
  // Host address of the code at `linear`; marks its page as code. 0: an exception is pending, or stop_ is
  // set.
  uint64_t fetch_page(uint64_t linear, Block& block, unsigned which) noexcept;
  void drop_write_tags(uint64_t host_page) noexcept;

  SoftVm& vm_;
  const unsigned id_;
  Port port_;
  const Fd shared_file_;
  Mapping shared_;
  uint64_t apic_base_;  // without LAPIC
  kvm_run* run_;
  CpuHome home_;
  Cpu& cpu_;
  Decoder decoder_;
  std::unique_ptr<Translator> translator_;
  BlockCache blocks_;
  const Engine engine_;
  std::unique_ptr<Block> single_;
  static constexpr unsigned jump_entries = 16384;
  std::unique_ptr<std::array<Block::Link, jump_entries>> jumps_;
  std::shared_ptr<const AddressSpaces> map_;
  Lapic* lapic_ = nullptr;
  uint64_t instructions_ = 0;
  struct Counts {
    uint64_t decoded = 0, given_back = 0;
  } counts_;
  enum Event : unsigned {
    exits,
    io_exits,
    mmio_exits,
    signal_exits,
    halts,
    exceptions,
    interrupts,
    nmis,
    hypercalls
  };
  Counters<9> events_;         // also KVM_GET_STATS_FD's
  bool fetch_failed_ = false;  // code is not in RAM

  // Memory requests of other threads.
  std::mutex mail_mutex_;
  std::vector<uint64_t> code_pages_;
  bool flush_wanted_ = false;
  std::atomic<uint32_t> mail_posted_{0}, mail_done_{0};
  std::atomic<bool> in_guest_{false};
  std::atomic<bool> sleeping_{false};

  StealTime steal_{cpu_};
  IdleWatch idle_;
  const std::shared_ptr<VcpuTimer> timer_;  // the LAPIC may outlive the vCPU

  // Events.
  bool recheck_ = false;  // some event below waits until the guest can take it
  uint32_t seen_code_epoch_ = 0;
  uint32_t from_flushes_ = 0;       // flush count when the previous block ended
  bool interrupt_waiting_ = false;  // the irqchip may have a vector for us
  bool nmi_pending_ = false;
  bool smi_pending_ = false;
  bool init_latched_ = false;    // an INIT that came in system-management mode
  bool unhalted_ = false;        // by KVM_HC_KICK_CPU: the present or next HLT ends at once
  bool pv_eoi_offered_ = false;  // the guest's word says so; settle_pv_eoi() takes it back
  int external_ = -1;            // vector of KVM_INTERRUPT, without LAPIC
  std::atomic<uint8_t> sipi_vector_{0};
  std::atomic<uint32_t> mp_state_;

  // Accesses that the VMM has answered, for the instruction that runs again.
  std::array<std::array<uint8_t, 8>, 16> answers_;  // what was read; nothing of a write
  unsigned answered_ = 0, answers_used_ = 0;
  bool alone_next_ = false;
  enum class PortIo : uint8_t { none, asked, answered } port_io_ = PortIo::none, msr_ = PortIo::none;
  bool mmio_asked_ = false;
  int eoi_exit_ = -1;
  bool shutdown_ = false;     // by a machine check, to be told by the next run()
  bool tpr_lowered_ = false;  // to be told by KVM_EXIT_SET_TPR

  bool has_run_ = false;  // what CPUID offers is fixed

  uint32_t tsc_khz_;
  std::atomic<uint64_t> tsc_offset_{0};
  kvm_guest_debug debug_{};
  bool events_blocked_ = false;  // KVM_GUESTDBG_BLOCKIRQ: neither interrupts nor NMIs come through
};

}  // namespace lodge::kvm::soft
