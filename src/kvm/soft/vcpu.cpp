// The run loop: blocks until something asks for attention - a request of another thread, an exception, an
// access for the VMM - then one instruction at a time while that is needed.
#include "kvm/soft/vcpu.hpp"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "base/error.hpp"
#include "kvm/soft/cpu/kvmclock.hpp"
#include "kvm/soft/cpu/smm.hpp"
#include "kvm/soft/irqchip/lapic.hpp"
#include "kvm/soft/vm.hpp"

namespace lodge::kvm::soft {
namespace {

constexpr uint32_t internal_delivery_event = 3;
constexpr uint64_t dr6_general_detect = 1u << 13;  // BD: the debug registers were touched under DR7.GD

// A file, so that somebody else may map the structure as well; it keeps its size, or such a mapping could
// fault.
Fd make_shared_file(unsigned id) {
  Fd file(::memfd_create(fmt::format("kvm-vcpu:{}", id).c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!file || ::ftruncate(file.get(), SoftVcpu::shared_size) != 0 ||
      ::fcntl(file.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0)
    throw_errno("cannot make a vCPU's shared structure");
  return file;
}

void futex_wake(std::atomic<uint32_t>& word) noexcept {
  ::syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
}

// How much of a block that began at `start` is behind `rip`, where it has stopped.
uint64_t not_run(const Block& block, uint64_t start, uint64_t rip) noexcept {
  if (rip - start >= block.bytes) return 0;
  return static_cast<uint64_t>(std::count_if(block.ops.begin(), block.ops.end() - 1,
                                             [&](const Op& op) { return op.offset >= rip - start; }));
}

}  // namespace

SoftVcpu::SoftVcpu(SoftVm& vm, unsigned id)
    : vm_(vm),
      id_(id),
      port_(*this),
      shared_file_(make_shared_file(id)),
      shared_(shared_size, PROT_READ | PROT_WRITE, MAP_SHARED, shared_file_.get(), 0,
              "cannot map a vCPU's shared structure"),
      apic_base_(Lapic::default_base | Lapic::base_enable |
                 (id == vm.interrupts().boot_id() ? Lapic::base_bsp : 0)),
      run_(reinterpret_cast<kvm_run*>(shared_.data())),
      home_(*this, id),
      cpu_(home_.cpu()),
      engine_(vm.options().engine),
      jumps_(std::make_unique<std::array<Block::Link, jump_entries>>()),
      map_(vm.memory()),
      idle_(uint64_t{vm.options().idle_ms} * 1'000'000),
      timer_(std::make_shared<VcpuTimer>(vm.timers(), vm.tsc_khz(), [this] { post(request::timer); })),
      mp_state_(KVM_MP_STATE_RUNNABLE),
      tsc_khz_(vm.default_tsc_khz()) {
  // The VM's ring in place of the file's own last page.
  if (::mmap(shared_.data() + CoalescedIo::page_offset * page_size, page_size, PROT_READ | PROT_WRITE,
             MAP_SHARED | MAP_FIXED, vm.coalesced().fd(), 0) == MAP_FAILED)
    throw_errno("cannot map the ring of coalesced I/O");
  place_tsc(TscLines::Cause::creation, 0);
  cpu_.tsc_is_direct = tsc_khz_ == vm.tsc_khz();
  choose_memory();
  decoder_.configure(cpu_.features);
  if (engine_ != Engine::interpret)
    translator_ = std::make_unique<Translator>(cpu_, home_.area(), static_cast<BlockSource&>(*this),
                                               vm.options(), vm.code_cache());
  // The last that can fail: the interrupt controllers know the vCPU from here on.
  if (vm.interrupts().mode() != Irqchip::Mode::none) {
    lapic_ = &vm.interrupts().add_vcpu(id, port_);
    if (id != vm.interrupts().boot_id()) mp_state_ = KVM_MP_STATE_UNINITIALIZED;
  }
  reset_cpu(cpu_, false);
}

SoftVcpu::~SoftVcpu() {
  vm_.remove_vcpu(*this);
  if (lapic_ != nullptr) vm_.interrupts().remove_vcpu(*lapic_);
  timer_->detach();
}

// --- requests of other threads
// --------------------------------------------------------------------------------------

void SoftVcpu::post(uint32_t bits) noexcept {
  // A sleeper is not in the guest: these are done when it wakes for another reason.
  constexpr uint32_t can_wait = request::memory | request::code;
  cpu_.request.fetch_or(bits);
  if ((bits & ~can_wait) != 0 && sleeping_.load()) futex_wake(cpu_.request);
}

void SoftVcpu::post_flush() noexcept {
  {
    const std::lock_guard lock(mail_mutex_);
    flush_wanted_ = true;
    mail_posted_.fetch_add(1);
  }
  post(request::memory);
}

void SoftVcpu::post_code_page(uint64_t host) noexcept {
  {
    const std::lock_guard lock(mail_mutex_);
    code_pages_.push_back(host);
    mail_posted_.fetch_add(1);
  }
  post(request::memory);
}

bool SoftVcpu::flush_acknowledged() noexcept {
  return !in_guest_.load() || mail_done_.load() == mail_posted_.load();
}

void SoftVcpu::acknowledge_memory() noexcept {
  if (mail_done_.load() == mail_posted_.load()) return;
  const std::lock_guard lock(mail_mutex_);
  if (flush_wanted_) {
    cpu_.flush_tlb(false);
    // Not when it was the dirty log's: the slots are the same.
    if (auto map = vm_.memory(); map != map_) {
      map_ = std::move(map);
      choose_memory();
      blocks_.clear();
      single_.reset();
    }
    flush_wanted_ = false;
  }
  for (const uint64_t page : code_pages_) drop_write_tags(page);
  code_pages_.clear();
  mail_done_.store(mail_posted_.load());
}

void SoftVcpu::drop_write_tags(uint64_t host_page) noexcept {
  for (TlbSet& set : cpu_.tlb_sets)
    for (unsigned word = 0; word < set.valid.size(); ++word)
      for (uint64_t left = set.valid[word]; left != 0; left &= left - 1) {
        const unsigned i = word * 64 + static_cast<unsigned>(__builtin_ctzll(left));
        if (set.entry[i].host == host_page) set.entry[i].write = TlbSet::empty(i);
      }
}

bool SoftVcpu::event_waits() noexcept {
  return recheck_ && (timer_->near() || nmi_pending_ || smi_waits() || interrupts_open());
}

bool SoftVcpu::wants_attention() noexcept {
  return cpu_.request.load(std::memory_order_relaxed) != 0 ||
         vm_.code_epoch().load(std::memory_order_acquire) != seen_code_epoch_;
}

// --- run
// --------------------------------------------------------------------------------------------------------------

Exit SoftVcpu::run() noexcept {
  const VcpuTimer::OnThread timer_on_thread(*timer_);
  if ((run_->kvm_dirty_regs | run_->kvm_valid_regs) != 0)
    if (const int refused = take_shared_registers(); refused != 0) return Exit(*run_, refused);
  has_run_ = true;
  finish_exit();
  enter_guest();
  int status = 0;
  if (mp_state_ != KVM_MP_STATE_RUNNABLE && mp_state_ != KVM_MP_STATE_HALTED && lapic_ == nullptr) {
    status = -EAGAIN;
  } else if (run_->immediate_exit != 0) {
    // An answered access is completed first, so that the state can be saved.
    const Outcome outcome = alone_next_ ? run_alone() : go_on;
    status = outcome.leave ? outcome.status : -EINTR;
  } else {
    status = loop();
    if (status == -EINTR) run_->exit_reason = KVM_EXIT_INTR;  // immediate_exit leaves the reason as it was
  }
  leave_guest();
  publish();
  count_exit(status);
  return Exit(*run_, status);
}

void SoftVcpu::count_exit(int status) noexcept {
  events_.count(exits);
  if (status != 0)
    events_.count(signal_exits);
  else if (run_->exit_reason == KVM_EXIT_IO)
    events_.count(io_exits);
  else if (run_->exit_reason == KVM_EXIT_MMIO)
    events_.count(mmio_exits);
}

// Takes over what the VMM has answered to the previous exit.
void SoftVcpu::finish_exit() noexcept {
  if (lapic_ == nullptr) cpu_.cr8 = run_->cr8 & 0xf;  // the VMM's LAPIC has the TPR
  if (mmio_asked_ && answered_ < answers_.size()) {
    auto& answer = answers_[answered_++];
    std::memcpy(answer.data(), run_->mmio.data, answer.size());
    alone_next_ = true;
  }
  mmio_asked_ = false;
  for (PortIo* const access : {&port_io_, &msr_}) {
    if (*access != PortIo::asked) continue;
    *access = PortIo::answered;
    alone_next_ = true;
  }
}

void SoftVcpu::publish() noexcept {
  if (run_->kvm_valid_regs != 0) give_shared_registers();
  run_->flags = cpu_.smm ? KVM_RUN_X86_SMM : 0;
  run_->if_flag = (cpu_.system_flags & flag::if_) != 0 ? 1 : 0;
  run_->cr8 = tpr();
  run_->apic_base = lapic_ != nullptr ? lapic_->apic_base() : apic_base_;
  run_->ready_for_interrupt_injection = vm_.interrupts().mode() == Irqchip::Mode::full || takes_injection();
}

// Some event waits until the guest can take it.
bool SoftVcpu::something_waits() noexcept {
  return interrupt_waiting_ || nmi_pending_ || smi_waits() || external_ >= 0 ||
         run_->request_interrupt_window != 0 || timer_->near();
}

int SoftVcpu::loop() noexcept {
  if (std::exchange(shutdown_, false)) return exit_with(KVM_EXIT_SHUTDOWN).status;
  // An exception that KVM_SET_VCPU_EVENTS gave. Not a debugger's affair: it may be what the debugger hands
  // back.
  if (cpu_.pending.valid && !alone_next_)
    if (const Outcome outcome = deliver(deliver_exception(cpu_)); outcome.leave) return outcome.status;
  for (;;) {
    recheck_ = something_waits();
    if (cpu_.request.load(std::memory_order_relaxed) != 0 || recheck_) {
      if (const Outcome outcome = service(); outcome.leave) return outcome.status;
      recheck_ = something_waits();  // what came just now and cannot be taken yet
    }
    Outcome outcome;
    if (cpu_.halted || mp_state_ != KVM_MP_STATE_RUNNABLE)
      outcome = wait_while_halted();
    else if (alone_next_ || cpu_.slow || cpu_.interrupt_shadow)
      outcome = run_alone();
    else
      outcome = run_blocks();
    if (outcome.leave) return outcome.status;
  }
}

Outcome SoftVcpu::service() noexcept {
  if (timer_->near()) timer_->expire_if_due();  // which requests an interrupt
  const uint32_t bits = cpu_.request.exchange(0);
  if ((bits & request::timer) != 0) {
    timer_->approach();
  }
  if ((bits & request::memory) != 0) acknowledge_memory();
  settle_pv_eoi();
  if ((bits & (request::init | request::sipi)) != 0)
    if (const Outcome outcome = take_init_and_sipi(bits); outcome.leave) return outcome;
  if ((bits & request::nmi) != 0) nmi_pending_ = true;
  if ((bits & request::smi) != 0) smi_pending_ = true;
  if ((bits & request::clock) != 0) update_kvmclock(cpu_);
  if ((bits & request::interrupt) != 0) interrupt_waiting_ = true;
  if ((bits & request::unhalt) != 0) unhalted_ = true;
  if ((bits & request::kick) != 0) return leave_with(-EINTR);
  // An instruction whose access has been answered comes before any event.
  if (alone_next_ && (answered_ > 0 || port_io_ == PortIo::answered || msr_ == PortIo::answered))
    return go_on;
  return inject();
}

Outcome SoftVcpu::take_init_and_sipi(uint32_t bits) noexcept {
  if (cpu_.smm) {  // INIT waits for RSM; a SIPI has nothing to start
    init_latched_ |= (bits & request::init) != 0;
    return go_on;
  }
  if ((bits & request::init) != 0) {
    reset_cpu(cpu_, true);
    drop_answers();
    if (lapic_ != nullptr) lapic_->init_reset();
    cpu_.halted = false;
    nmi_pending_ = smi_pending_ = interrupt_waiting_ = unhalted_ = false;
    const bool bsp = lapic_ == nullptr || (lapic_->apic_base() & Lapic::base_bsp) != 0;
    mp_state_ = bsp ? KVM_MP_STATE_RUNNABLE : KVM_MP_STATE_INIT_RECEIVED;
  }
  if ((bits & request::sipi) != 0 && mp_state_ == KVM_MP_STATE_INIT_RECEIVED) {
    start_at_sipi(cpu_, sipi_vector_);
    mp_state_ = KVM_MP_STATE_RUNNABLE;
  }
  return go_on;
}

bool SoftVcpu::interrupts_open() noexcept {
  return (cpu_.system_flags & flag::if_) != 0 && !cpu_.interrupt_shadow && !cpu_.pending.valid;
}

// Whether an interrupt of the VMM's 8259 would be delivered at once.
bool SoftVcpu::takes_injection() noexcept {
  if (!interrupts_open()) return false;
  return lapic_ == nullptr ? external_ < 0 : lapic_->accepts_extint() && lapic_->injected_extint() < 0;
}

Outcome SoftVcpu::inject() noexcept {
  if (events_blocked_ || (mp_state_ != KVM_MP_STATE_RUNNABLE && mp_state_ != KVM_MP_STATE_HALTED))
    return go_on;
  if (smi_waits() && !cpu_.interrupt_shadow) {
    smi_pending_ = false;
    if (!map_->space[1].empty()) return take_smi();
    // Nobody has given the mode memory, so there is no handler: the guest cannot end itself by sending one.
  }
  if (nmi_pending_ && !cpu_.nmi_blocked && !cpu_.interrupt_shadow) {
    nmi_pending_ = false;
    end_halt();
    events_.count(nmis);
    return deliver(deliver_nmi(cpu_));
  }
  if (!interrupts_open()) return go_on;
  int vector = -1;
  if (external_ >= 0) {
    vector = std::exchange(external_, -1);
  } else if (interrupt_waiting_ && lapic_ != nullptr) {
    vector = lapic_->acknowledge();
    interrupt_waiting_ = lapic_->maybe_pending();
    if (vector < 0) interrupt_waiting_ = false;
  }
  if (vector >= 0) {
    end_halt();
    steal_.update();
    offer_pv_eoi();
    events_.count(interrupts);
    return deliver(deliver_external_interrupt(cpu_, static_cast<uint8_t>(vector)));
  }
  const bool own_pic = vm_.interrupts().mode() == Irqchip::Mode::full;
  if (run_->request_interrupt_window != 0 && !own_pic && takes_injection())
    return exit_with(KVM_EXIT_IRQ_WINDOW_OPEN);
  return go_on;
}

Outcome SoftVcpu::take_smi() noexcept {
  mp_state_ = KVM_MP_STATE_RUNNABLE;
  return enter_smm(cpu_) ? go_on : exit_with(KVM_EXIT_SHUTDOWN);
}

// What RSM makes possible again is looked at before the next instruction.
void SoftVcpu::smm_changed() noexcept {
  choose_memory();
  if (!cpu_.smm) post(std::exchange(init_latched_, false) ? request::init : request::code);
}

void SoftVcpu::end_halt() noexcept {
  if (cpu_.halted) unhalted_ = false;
  cpu_.halted = false;
  mp_state_ = KVM_MP_STATE_RUNNABLE;
}

// Whether something ends the halt now.
bool SoftVcpu::wakes() noexcept {
  if (cpu_.request.load() != 0) return true;
  if (timer_->near()) return true;
  if (events_blocked_ || (mp_state_ != KVM_MP_STATE_RUNNABLE && mp_state_ != KVM_MP_STATE_HALTED))
    return false;
  if ((nmi_pending_ && !cpu_.nmi_blocked) || smi_waits()) return true;
  return interrupt_waiting_ && interrupts_open() && lapic_ != nullptr && lapic_->pending_vector() >= 0;
}

Outcome SoftVcpu::wait_while_halted() noexcept {
  if (lapic_ == nullptr && mp_state_ == KVM_MP_STATE_RUNNABLE && !vm_.halt_in_guest()) {
    cpu_.halted = false;
    return exit_with(KVM_EXIT_HLT);
  }
  if (wakes()) return go_on;
  if (unhalted_ && (mp_state_ == KVM_MP_STATE_RUNNABLE || mp_state_ == KVM_MP_STATE_HALTED)) {
    end_halt();
    return go_on;
  }
  events_.count(halts);
  leave_guest();
  const uint64_t patience = give_back_when_idle();
  sleeping_.store(true);
  if (cpu_.request.load() == 0) timer_->wait(cpu_.request, patience);
  sleeping_.store(false);
  enter_guest();
  // A signal, for a VMM that kicks by signals.
  if (cpu_.request.load() == 0 && run_->immediate_exit != 0) return leave_with(-EINTR);
  return go_on;
}

Outcome SoftVcpu::run_blocks() noexcept {
  home_.area().event_waits = recheck_ ? 1 : 0;
  const Segment& cs = cpu_.segment[seg_cs];
  Block* block = nullptr;
  do {
    // A page of code was written to: what the jump table says has to be looked up anew.
    if (const uint32_t epoch = vm_.code_epoch().load(std::memory_order_acquire); epoch != seen_code_epoch_) {
      seen_code_epoch_ = epoch;
      ++cpu_.flushes;
      if (translator_) translator_->drop_stale();
    }
    const bool wide = cpu_.mode() == Mode::bits64;
    const uint64_t linear = wide ? cpu_.rip : static_cast<uint32_t>(cs.base + cpu_.rip);
    const auto matches = [&](const Block::Link& link) {
      return link.linear == linear && link.flushes == cpu_.flushes && link.key == cpu_.decode_key;
    };
    from_flushes_ = cpu_.flushes;
    if (block != nullptr && matches(block->links[0]))
      block = block->links[0].block;
    else if (block != nullptr && matches(block->links[1]))
      block = block->links[1].block;
    else
      block = lookup(linear, block);
    if (block == nullptr) return after_stop();
    if (!wide && cpu_.rip + block->bytes - 1 > cs.limit) {
      block = lookup_slowly(linear, cpu_.decode_key);
      if (block == nullptr) return after_stop();
    }
    if (engine_ == Engine::lockstep) {
      if (!run_both(*block)) return internal_error(KVM_INTERNAL_ERROR_EMULATION);
      if (cpu_.stops != 0 || cpu_.pending.valid || fetch_failed_) return after_stop();
      block = nullptr;
      continue;
    }
    // A deadline that is near is looked at between blocks, which host code has not.
    if (translator_ && cpu_.mode() != Mode::bits16 && !timer_->near() &&
        !(translator_->records() && translator_->record(*block)) && translator_->run(*block)) {
      if (cpu_.stops != 0 || cpu_.pending.valid || fetch_failed_) return after_stop();
      block = nullptr;
      continue;
    }
    ++block->runs;
    cpu_.gpr[gpr_rip] = cpu_.rip;
    cpu_.block = block;
    const Op* first = block->ops.data();
    first->handler(cpu_, first);
    instructions_ += block->instructions;
    if (__builtin_expect(cpu_.stops != 0 || cpu_.pending.valid, 0)) {
      instructions_ -= not_run(*block, cpu_.gpr[gpr_rip], cpu_.rip);
      cpu_.block = nullptr;
      return after_stop();
    }
  } while (cpu_.request.load(std::memory_order_relaxed) == 0 && !recheck_);
  cpu_.block = nullptr;
  return go_on;
}

// One instruction under observation: interrupt shadow, TF, breakpoints, an answered access.
Outcome SoftVcpu::run_alone() noexcept {
  const bool resumes = (cpu_.system_flags & flag::rf) != 0;
  const bool traps = (cpu_.system_flags & flag::tf) != 0;
  const bool shadowed = cpu_.interrupt_shadow;
  const bool debug_step = cpu_.debug_step;
  if (cpu_.code_breakpoints && !resumes && !alone_next_) {
    uint64_t hits = 0;
    const uint64_t linear = cpu_.mode() == Mode::bits64 ? cpu_.rip : cpu_.segment[seg_cs].base + cpu_.rip;
    for (unsigned i = 0; i < 4; ++i)
      if ((cpu_.active_dr7() >> 2 * i & 3) != 0 && (cpu_.active_dr7() >> (16 + 4 * i) & 3) == 0 &&
          cpu_.active_dr(i) == linear)
        hits |= uint64_t{1} << i;
    if (hits != 0) {
      if (cpu_.debug_registers) return debug_exit(hits, Exception::db);
      cpu_.raise_debug(hits);
      return deliver_pending();
    }
  }
  const uint64_t linear =
      cpu_.mode() == Mode::bits64 ? cpu_.rip : static_cast<uint32_t>(cpu_.segment[seg_cs].base + cpu_.rip);
  single_ = decode(linear, cpu_.decode_key, 1);
  if (!single_) {
    drop_answers();
    return after_stop();
  }
  cpu_.gpr[gpr_rip] = cpu_.rip;
  cpu_.block = single_.get();
  cpu_.alone = true;
  cpu_.debug_hits = 0;
  answers_used_ = 0;
  const Op* first = single_->ops.data();
  first->handler(cpu_, first);
  cpu_.alone = false;
  cpu_.block = nullptr;
  ++instructions_;
  if (cpu_.wants_exit) {  // once more when the VMM has answered this access too
    cpu_.wants_exit = false;
    return leave_with(0);
  }
  drop_answers();
  if (cpu_.interrupted_access()) return after_stop();

  if (resumes && (cpu_.system_flags & flag::rf) != 0) cpu_.system_flags &= ~flag::rf;
  if (shadowed) cpu_.interrupt_shadow = false;
  uint64_t trap = cpu_.debug_hits;
  if (traps && !(cpu_.interrupt_shadow && cpu_.shadow_is_mov_ss)) trap |= 0x4000;  // BS
  if (debug_step && trap == 0) trap |= 0x4000;
  if (trap != 0) {
    if ((debug_step && !traps) || (cpu_.debug_registers && cpu_.debug_hits != 0))
      return debug_exit(trap, Exception::db);
    cpu_.raise_debug(trap);
    return deliver_pending();
  }
  if (cpu_.leave_run) return after_stop();
  return go_on;
}

void SoftVcpu::drop_answers() noexcept {
  alone_next_ = false;
  answered_ = 0;
  port_io_ = msr_ = PortIo::none;
}

// A block or an instruction ended with more than a new RIP (or only with a halt or an interrupt shadow: the
// loop sees those itself).
Outcome SoftVcpu::after_stop() noexcept {
  if (fetch_failed_) {
    fetch_failed_ = false;
    return internal_error(KVM_INTERNAL_ERROR_EMULATION);
  }
  if (cpu_.leave_run) {
    cpu_.leave_run = false;
    // A later instruction of the block may want the VMM too. There is one kvm_run: its access is asked for
    // again when the instruction runs again.
    if (std::exchange(cpu_.wants_exit, false)) {
      port_io_ = msr_ = PortIo::none;
      mmio_asked_ = false;
    }
    if (eoi_exit_ >= 0) {
      run_->eoi.vector = static_cast<uint8_t>(std::exchange(eoi_exit_, -1));
      return exit_with(KVM_EXIT_IOAPIC_EOI);
    }
    if (std::exchange(tpr_lowered_, false)) return exit_with(KVM_EXIT_SET_TPR);
    return leave_with(0);
  }
  if (cpu_.run_alone) {
    cpu_.run_alone = false;
    alone_next_ = true;
    return go_on;
  }
  if (cpu_.wants_exit) {
    cpu_.wants_exit = false;
    return leave_with(0);
  }
  return cpu_.pending.valid ? deliver_pending() : go_on;
}

Outcome SoftVcpu::deliver_pending() noexcept {
  const Exception which = cpu_.pending.vector;
  if ((debug_.control & KVM_GUESTDBG_ENABLE) != 0) {
    const bool breakpoint = which == Exception::bp && (debug_.control & KVM_GUESTDBG_USE_SW_BP) != 0;
    if (breakpoint) {
      cpu_.rip -= 1;  // INT3 is a trap for the guest, but the debugger wants the breakpoint's address
      cpu_.pending.valid = false;
      return debug_exit(0, which);
    }
    if (which == Exception::db && cpu_.debug_registers && (cpu_.pending.payload & dr6_general_detect) != 0) {
      cpu_.pending.valid = false;
      return debug_exit(dr6_general_detect, which);
    }
  }
  events_.count(exceptions);
  return deliver(deliver_exception(cpu_));
}

Outcome SoftVcpu::deliver(Delivery delivery) noexcept {
  cpu_.run_alone = false;
  switch (delivery) {
    case Delivery::done: cpu_.interrupt_shadow = false; return go_on;
    case Delivery::shutdown: return exit_with(KVM_EXIT_SHUTDOWN);
    default: cpu_.wants_exit = false; return internal_error(internal_delivery_event);
  }
}

Outcome SoftVcpu::debug_exit(uint64_t dr6, Exception which) noexcept {
  auto& arch = run_->debug.arch;
  arch = {};
  arch.exception = static_cast<uint32_t>(which);
  arch.pc = cpu_.rip + (cpu_.mode() == Mode::bits64 ? 0 : cpu_.segment[seg_cs].base);
  arch.dr6 = dr6 | 0xffff0ff0;
  arch.dr7 = cpu_.active_dr7();
  return exit_with(KVM_EXIT_DEBUG);
}

Outcome SoftVcpu::exit_with(uint32_t reason) noexcept {
  run_->exit_reason = reason;
  return leave_with(0);
}

Outcome SoftVcpu::internal_error(uint32_t suberror) noexcept {
  run_->internal.suberror = suberror;
  run_->internal.ndata = 0;
  return exit_with(KVM_EXIT_INTERNAL_ERROR);
}

}  // namespace lodge::kvm::soft
