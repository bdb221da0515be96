// One soft vCPU as instructions see it: state, guest memory through the soft TLB, exceptions, and the wishes
// that end a block. Instruction handlers take a Cpu; the run loop (vcpu.cpp) owns it. Only the vCPU's thread
// touches a Cpu, but for `request`.
//
// Conventions for handlers. Memory functions return false when the access raised an exception or needs the
// VMM: the handler then returns Step::fault at once, having changed no architectural state. Nothing throws.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_set>
#include <vector>

#include "kvm/soft/cpu/features.hpp"
#include "kvm/soft/cpu/state.hpp"
#include "kvm/soft/mmu/tlb.hpp"

namespace lodge::kvm::soft {

class MemoryMap;
class Platform;
class Slot;
struct DecodedBlock;
struct Op;

enum class Exception : uint8_t {
  de = 0,
  db = 1,
  nmi = 2,
  bp = 3,
  of = 4,
  br = 5,
  ud = 6,
  nm = 7,
  df = 8,
  ts = 10,
  np = 11,
  ss = 12,
  gp = 13,
  pf = 14,
  mf = 16,
  ac = 17,
  mc = 18,
  xm = 19
};

// What a handler did.
enum class Step : uint8_t {
  next,    // done; RIP goes to the next instruction of the block
  branch,  // done; Cpu::rip holds the next RIP. Also after any change of mode, segments, paging, privilege or
           // interruptibility (set rip = next_rip(op)): the block ends here. After a task switch `pending`
           // may hold a fault or debug trap of the new task, to be delivered at Cpu::rip
  fault,   // not done: an exception is pending, or the VMM must answer an access first (wants_exit)
  exit,    // done, Cpu::rip set; then leave to the VMM (the exit is filled in)
};

// Width of code: default operand and address size.
enum class Mode : uint8_t { bits16, bits32, bits64 };

// Bits of Cpu::request: set by any thread (and the vCPU itself), taken by the run loop between blocks.
namespace request {
inline constexpr uint32_t interrupt = 1;  // look at the interrupt controllers
inline constexpr uint32_t nmi = 2, smi = 4, init = 8, sipi = 0x10;
inline constexpr uint32_t kick = 0x20;  // leave run() with -EINTR
inline constexpr uint32_t memory =
    0x40;  // the slot table changed or a page became code: flush and acknowledge
inline constexpr uint32_t clock = 0x80;    // update the kvmclock page
inline constexpr uint32_t timer = 0x200;   // the LAPIC timer's deadline is near
inline constexpr uint32_t unhalt = 0x100;  // end the HLT (KVM_HC_KICK_CPU)
inline constexpr uint32_t code = 0x400;    // a page of code was written to
}  // namespace request

// Writes to RAM of one run of a block, so that they can be undone (the lockstep engine).
struct WriteJournal {
  struct Entry {
    uint64_t host;
    unsigned size;  // at most 64
    std::array<uint8_t, 64> before, after;
  };
  std::vector<Entry> entries;
  bool lost = false;  // something was written that is not here
  void note(uint64_t host, unsigned size) noexcept;
};

class Cpu : public CpuState {
 public:
  Cpu(Platform& platform, unsigned id);
  virtual ~Cpu() = default;
  Cpu(const Cpu&) = delete;
  Cpu& operator=(const Cpu&) = delete;

  // --- registers ---
  template <class T>
  T& reg(
      uint8_t byte_offset) noexcept {  // by Op::dst, Op::src; writing 4 bytes does NOT clear the upper half
    return *reinterpret_cast<T*>(reinterpret_cast<uint8_t*>(gpr.data()) + byte_offset);
  }
  // A general register of `size` bytes; writing 4 bytes clears the upper half, as the architecture says.
  void set_reg(uint8_t byte_offset, unsigned size, uint64_t value) noexcept;
  uint64_t get_reg(uint8_t byte_offset, unsigned size) noexcept;

  uint64_t rflags() const noexcept;
  // Sets all flags; the caller has checked privileges. Calls state_changed() when TF, VM or AC changed.
  void set_rflags(uint64_t value) noexcept;
  bool cf() const noexcept { return (arith & 0x100) != 0; }
  bool zf() const noexcept { return (arith & 0x4000) != 0; }
  void set_cf(bool on) noexcept { arith = static_cast<uint16_t>((arith & ~0x100) | (on ? 0x100 : 0)); }
  void set_zf(bool on) noexcept { arith = static_cast<uint16_t>((arith & ~0x4000) | (on ? 0x4000 : 0)); }
  // Replaces the six arithmetic flags by those of an RFLAGS value.
  void set_arith(uint64_t rflags) noexcept {
    arith = static_cast<uint16_t>((rflags & 0xd5) << 8 | 0x200 | (rflags >> 11 & 1));
  }

  unsigned cpl() const noexcept { return cpl_; }
  void set_cpl(unsigned cpl) noexcept;  // calls state_changed()
  Mode mode() const noexcept { return mode_; }
  bool long_mode() const noexcept { return (efer & efer::lma) != 0; }  // also in compatibility mode
  bool protected_mode() const noexcept { return (cr0 & cr0::pe) != 0; }
  bool v86() const noexcept { return (system_flags & flag::vm) != 0; }
  // To be called after CS, SS/DS/ES, CR0, CR4, EFER, RFLAGS.VM/AC/TF or DR7 changed: derives mode, TLB set,
  // flatness and slow stepping. Does not flush the TLB.
  void state_changed() noexcept;
  // The part of it for changes of the x87 control word and MXCSR.
  void fp_control_changed() noexcept;

  // RIP of the instruction `op` and of the one behind it (truncated to the mode's width). Valid in handlers.
  uint64_t this_rip(const Op& op) const noexcept;
  uint64_t next_rip(const Op& op) const noexcept;

  // --- exceptions ---
  struct PendingException {
    bool valid = false;
    Exception vector{};
    bool has_error = false;
    uint32_t error = 0;
    uint64_t payload = 0;  // #PF: CR2; #DB: DR6 bits
  };
  // Records an exception of the running instruction; always returns false, so that memory functions can
  // return it.
  bool raise(Exception which) noexcept;
  bool raise(Exception which, uint32_t error) noexcept;
  bool raise_page_fault(uint64_t linear, uint32_t error) noexcept;
  bool raise_debug(uint64_t dr6_bits) noexcept;
  PendingException pending;

  // --- guest memory, by linear address ---
  // With the rights of the
  // present CPL (and AC). A page-crossing access faults before it changes anything. A non-canonical address
  // raises #GP(0).
  template <class T>
  bool read(uint64_t linear, T& value) noexcept {
    return read_bytes(linear, &value, sizeof(T));
  }
  template <class T>
  bool write(uint64_t linear, const T& value) noexcept {
    return write_bytes(linear, &value, sizeof(T));
  }
  bool read_bytes(uint64_t linear, void* out, unsigned size) noexcept;
  bool write_bytes(uint64_t linear, const void* data, unsigned size) noexcept;
  // True when [linear, linear + size) (at most 4096 bytes) may be read / written; raises #PF otherwise.
  bool probe_read(uint64_t linear, unsigned size) noexcept;
  bool probe_write(uint64_t linear, unsigned size) noexcept;
  // Implicit supervisor accesses (descriptor tables, TSS, stacks of inner rings): the rights of CPL 0, SMAP
  // enforced.
  template <class T>
  bool read_system(uint64_t linear, T& value) noexcept {
    return access_system(linear, &value, sizeof(T), false);
  }
  template <class T>
  bool write_system(uint64_t linear, T value) noexcept {
    return access_system(linear, &value, sizeof(T), true);
  }
  bool probe_write_system(uint64_t linear, unsigned size) noexcept;

  // The memory operand of `op`: its offset within the segment (address size applied), and its linear address
  // after segment checks (limit, type, canonical form), which raise #GP(0), or #SS(0) for SS.
  uint64_t effective_address(const Op& op) const noexcept;
  bool linear(const Op& op, unsigned size, bool write, uint64_t& out) noexcept;
  bool linear(SegmentName segment, uint64_t offset, unsigned size, bool write, uint64_t& out) noexcept;
  bool canonical(uint64_t linear) const noexcept;

  // Stack, with the present SS and its width; `size` 2, 4 or 8. RSP moves only when the access succeeded.
  bool push(uint64_t value, unsigned size) noexcept;
  bool pop(uint64_t& value, unsigned size) noexcept;
  uint64_t stack_mask() const noexcept;             // 0xffff, 0xffffffff or all ones
  void set_stack_pointer(uint64_t value) noexcept;  // within the stack's width; 32 bits clear the upper half

  // --- guest memory, by guest-physical address ---
  // RAM only; false when it is not
  // (nothing is raised). Writes mark the dirty log and drop decoded code.
  bool read_physical(uint64_t gpa, void* out, unsigned size) noexcept;
  bool write_physical(uint64_t gpa, const void* data, unsigned size) noexcept;

  // --- translation ---
  void flush_tlb(bool keep_global) noexcept;
  void flush_page(uint64_t linear) noexcept;
  // Loads the four PDPTEs of 32-bit PAE paging; false, with #GP(0) raised, when reserved bits are set.
  bool load_pdptrs(uint64_t new_cr3) noexcept;
  // Walks without side effects (KVM_TRANSLATE); false when not mapped.
  bool translate_debug(uint64_t linear, uint64_t& gpa, bool& writable, bool& user) noexcept;
  std::array<uint64_t, 4> pdptr{};

  // --- interruptibility and requests ---
  std::atomic<uint32_t> request{0};
  // What ends the run of blocks, asked all at once through `stops`.
  __extension__ union {
    struct {
      bool interrupt_shadow;  // after STI or MOV SS: the run loop runs one more instruction, then clears it
      bool halted;            // HLT or MWAIT: the run loop waits for an interrupt
      bool wants_exit;  // Step::fault means "the VMM must act": the exit is filled in, nothing is pending
      bool leave_run;   // Step::exit was returned
      bool run_alone;   // Step::fault means: run the instruction again, alone
      bool slow;        // one instruction at a time: TF, code breakpoints, guest debugging
    };
    uint64_t stops = 0;
  };
  bool shadow_is_mov_ss = false;  // which of both
  bool nmi_blocked = false;       // until IRET

  // --- system-management mode (smm.hpp) ---
  bool smm = false;
  bool nmi_blocked_before_smm = false;  // what RSM restores
  // Enters or leaves the mode's address space; nothing else changes.
  void set_smm(bool on) noexcept;

  // True when an access failed: an exception, the VMM or a run alone is wanted.
  bool interrupted_access() const noexcept { return pending.valid || wants_exit || run_alone; }

  // --- identity ---
  unsigned id() const noexcept { return id_; }
  Platform& platform() noexcept { return platform_; }
  Features features;  // what the guest's CPUID offers (KVM_SET_CPUID2)

  // The slots that translations use; set by the run loop, never null while instructions run.
  const MemoryMap* memory = nullptr;
  // Where KVM's paravirtual areas lie: the slots outside of system-management mode, as the guest's kernel,
  // which has chosen the addresses, must not reach SMRAM by them.
  const MemoryMap* paravirt_memory = nullptr;
  // The running block, so that a store into it is noticed; null outside blocks.
  const DecodedBlock* block = nullptr;
  WriteJournal* journal = nullptr;  // of what is written now, if anybody wants to know
  // Counts TLB flushes; what was looked up by linear address under another number is stale.
  uint32_t flushes = 1;
  uint32_t decode_key = 0;  // the modes that decoding depends on; see decoder.hpp
  // Which mappings of code were flushed since the translator looked: those of user code, those of supervisor
  // code. The sets are the linear pages whose code it has entered since, so that INVLPG of others is free.
  bool user_code_flushed = true, supervisor_code_flushed = true;
  bool supervisor_code_is_local = false;  // some of it was not in global pages
  std::unordered_set<uint64_t> user_code_pages, supervisor_code_pages;

  // The TLB set of the present privilege, and all of them: user; supervisor with SMAP enforced; supervisor
  // with AC=1 or without SMAP; and one that is never filled, so that every access takes the slow path
  // (watchpoints, alignment checks). For the interpreter's fast paths.
  TlbSet* tlb = nullptr;
  // Which one the state asks for; lockstep points `tlb` at the empty one for a while.
  unsigned tlb_set() const noexcept { return watchpoints || alignment_checks ? 3 : view(); }
  std::array<TlbSet, 4> tlb_sets;

  // The guest's TSC is the host's plus an offset, without scaling. state_changed() follows a change.
  bool tsc_is_direct = true;

  // --- derived by state_changed() ---
  bool flat = false;  // DS, ES and SS need neither base nor limit nor type checks, CS no limit check
  bool alignment_checks = false;
  bool code_breakpoints = false, watchpoints = false;

  // --- guest debugging (KVM_SET_GUEST_DEBUG) ---
  bool debug_step = false;             // exit after every instruction
  bool debug_registers = false;        // debug_dr in place of the guest's DR0-3 and DR7
  std::array<uint64_t, 5> debug_dr{};  // DR0-3, DR7
  uint64_t active_dr7() const noexcept { return debug_registers ? debug_dr[4] : dr7; }
  uint64_t active_dr(unsigned i) const noexcept { return debug_registers ? debug_dr[i] : dr[i]; }

  // --- one instruction under observation ---
  // An access that must not
  // happen in the middle of a block (it would make the running block stale, hits a watchpoint, or replays
  // what the VMM has answered) asks for the instruction to be run again alone.
  bool alone = false;       // the instruction runs alone now
  uint64_t debug_hits = 0;  // DR6 bits of watchpoints that the instruction has met

  // Values of the slow memory paths, kept out of local variables so that handlers can end in tail calls.
  uint64_t scratch = 0;
  // As read_bytes and write_bytes for 1, 2, 4 or 8 bytes, through scratch.
  bool load_slow(uint64_t linear, unsigned size) noexcept;
  bool store_slow(uint64_t linear, unsigned size, uint64_t value) noexcept;
  // Makes the TLB answer for accesses to this page, if it can. False: the access is for the slow paths, or
  // faults; nothing is raised.
  bool fill_tlb(uint64_t linear, bool write) noexcept;
  // Whether the code at `linear`, just fetched, lies in a global page.
  bool in_global_page(uint64_t linear) const noexcept;
  // The host address of [linear, linear + size) for an atomic read-modify-write; null when there is none
  // (page crossing, MMIO: then `pending`, `wants_exit` and `run_alone` are unset and the caller does it in
  // two steps) or when the access failed (one of them is set).
  uint8_t* host_for_write(uint64_t linear, unsigned size) noexcept;
  // RIP after a near branch of this operand size (2 bytes: 16 bits of it).
  uint64_t truncate_branch(uint64_t value, unsigned operand_size) const noexcept {
    return operand_size == 2       ? static_cast<uint16_t>(value)
           : mode_ == Mode::bits64 ? value
                                   : static_cast<uint32_t>(value);
  }
  std::mutex& platform_split_lock() noexcept;  // see integer.hpp, modify_at
  // 16-bit code does not wrap at 64 KiB: it goes on if the segment does, which system-management handlers
  // use.
  uint64_t truncate_rip(uint64_t value) const noexcept {
    return mode_ == Mode::bits64 ? value : static_cast<uint32_t>(value);
  }

 private:
  friend class SoftVcpu;
  enum class Access : uint8_t { read, write, fetch };
  // Privilege views: 0 user, 1 supervisor under SMAP, 2 supervisor.
  unsigned view() const noexcept;
  unsigned system_view() const noexcept { return (cr4 & cr4::smap) != 0 ? 1 : 2; }
  struct Translation {
    uint64_t gpa = 0;
    bool writable = false;  // and already dirty: a write needs no further walk
    bool executable = false;
    bool global = false;
    bool large = false;
  };
  bool translate(uint64_t linear, Access access, unsigned view, Translation& out) noexcept;
  bool walk_long(uint64_t linear, Access access, unsigned view, Translation& out) noexcept;
  bool walk_legacy(uint64_t linear, Access access, unsigned view, Translation& out) noexcept;
  struct Leaf;
  bool check_leaf(uint64_t linear, Access access, unsigned view, const Leaf& leaf) noexcept;
  bool page_fault(uint64_t linear, Access access, unsigned view, uint32_t flags) noexcept;
  bool read_entry(uint64_t gpa, unsigned size, uint64_t& entry) noexcept;
  // Sets accessed (and dirty) bits; false when the entry has changed meanwhile: walk again.
  bool update_entry(uint64_t gpa, unsigned size, uint64_t old_entry, uint64_t bits) noexcept;
  // Host address of `linear` for this access, within its page; fills the TLB. Null: MMIO (gpa set, failed
  // false) or failed.
  uint8_t* resolve(uint64_t linear, Access access, unsigned view, uint64_t& gpa, bool& failed) noexcept;
  bool prepare_write(Slot& slot, uint64_t gpa) noexcept;
  bool access_bytes(uint64_t linear, void* data, unsigned size, Access access, unsigned view) noexcept;
  bool access_part(uint64_t linear, void* data, unsigned size, Access access, unsigned view) noexcept;
  bool probe(uint64_t linear, unsigned size, Access access, unsigned view) noexcept;
  bool check_explicit(uint64_t linear, unsigned size, bool write) noexcept;
  bool access_system(uint64_t linear, void* data, unsigned size, bool write) noexcept;

  Platform& platform_;
  unsigned id_;
  unsigned cpl_ = 0;
  Mode mode_ = Mode::bits16;
};

}  // namespace lodge::kvm::soft
