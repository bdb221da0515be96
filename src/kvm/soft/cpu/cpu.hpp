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

#include "kvm/soft/cpu/features.hpp"
#include "kvm/soft/cpu/state.hpp"
#include "kvm/soft/mmu/tlb.hpp"

namespace lodge::kvm::soft {

class SoftVm;
class Platform;
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
           // interruptibility (set rip = next_rip(op)): the block ends here
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
inline constexpr uint32_t clock = 0x80;  // update the kvmclock page
}  // namespace request

class Cpu : public CpuState {
 public:
  Cpu(SoftVm& vm, Platform& platform, unsigned id);
  virtual ~Cpu() = default;
  Cpu(const Cpu&) = delete;
  Cpu& operator=(const Cpu&) = delete;

  // --- registers
  // ---------------------------------------------------------------------------------------------------
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

  // RIP of the instruction `op` and of the one behind it (truncated to the mode's width). Valid in handlers.
  uint64_t this_rip(const Op& op) const noexcept;
  uint64_t next_rip(const Op& op) const noexcept;

  // --- exceptions
  // --------------------------------------------------------------------------------------------------
  struct PendingException {
    bool valid = false;
    Exception vector{};
    bool has_error = false;
    uint32_t error = 0;
    uint64_t payload = 0;  // #PF: CR2; #DB: DR6 bits
  };
  // Records an exception of the running instruction; always returns false, so that memory functions can
  // return it.
  bool raise(Exception vector) noexcept;
  bool raise(Exception vector, uint32_t error) noexcept;
  bool raise_page_fault(uint64_t linear, uint32_t error) noexcept;
  bool raise_debug(uint64_t dr6_bits) noexcept;
  PendingException pending;

  // --- guest memory, by linear address
  // ----------------------------------------------------------------------------- With the rights of the
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

  // --- guest memory, by guest-physical address
  // --------------------------------------------------------------------- RAM only; false when it is not
  // (nothing is raised). Writes mark the dirty log and drop decoded code.
  bool read_physical(uint64_t gpa, void* out, unsigned size) noexcept;
  bool write_physical(uint64_t gpa, const void* data, unsigned size) noexcept;

  // --- translation
  // -------------------------------------------------------------------------------------------------
  void flush_tlb(bool keep_global) noexcept;
  void flush_page(uint64_t linear) noexcept;
  // Loads the four PDPTEs of 32-bit PAE paging; false, with #GP(0) raised, when reserved bits are set.
  bool load_pdptrs(uint64_t new_cr3) noexcept;
  // Walks without side effects (KVM_TRANSLATE); false when not mapped.
  bool translate_debug(uint64_t linear, uint64_t& gpa, bool& writable, bool& user) noexcept;
  std::array<uint64_t, 4> pdptr{};

  // --- interruptibility and requests
  // -------------------------------------------------------------------------------
  std::atomic<uint32_t> request{0};
  bool interrupt_shadow =
      false;  // after STI or MOV SS: the run loop runs one more instruction, then clears it
  bool shadow_is_mov_ss = false;  // which of both
  bool nmi_blocked = false;       // until IRET
  bool halted = false;            // HLT or MWAIT: the run loop waits for an interrupt
  bool wants_exit = false;  // Step::fault means "the VMM must act": the exit is filled in, nothing is pending

  // --- identity
  // ----------------------------------------------------------------------------------------------------
  unsigned id() const noexcept { return id_; }
  SoftVm& vm() noexcept { return vm_; }
  Platform& platform() noexcept { return platform_; }
  Features features;  // what the guest's CPUID offers (KVM_SET_CPUID2)

  // The TLB set of the present privilege, and all of them: user; supervisor (SMAP enforced when on);
  // supervisor with AC=1. For the interpreter's fast paths.
  TlbSet* tlb;
  std::array<TlbSet, 3> tlb_sets;

  bool flat = false;  // DS, ES and SS need neither base nor limit nor type checks
  bool slow = false;  // one instruction at a time: TF, guest debugging, code breakpoints

 protected:
  bool access_system(uint64_t linear, void* data, unsigned size, bool write) noexcept;

  SoftVm& vm_;
  Platform& platform_;
  unsigned id_;
  unsigned cpl_ = 0;
  Mode mode_ = Mode::bits16;
};

}  // namespace lodge::kvm::soft
