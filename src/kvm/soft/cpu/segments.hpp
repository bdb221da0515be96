// Segment descriptors: reading, checking and loading them. SDM volume 3, sections 3.4, 3.5 and 5.3 to 5.8.
//
// Functions that return bool raise the right exception in `cpu` and return false; nothing has changed then
// (save accessed bits in memory). Error codes carry no EXT bit: event delivery adds it.
#pragma once

#include <cstdint>

#include "kvm/soft/cpu/cpu.hpp"

namespace lodge::kvm::soft {

// Attributes of the flat segments that SYSCALL and its relatives load.
inline constexpr uint16_t flat_code64 = 0xa09b, flat_code32 = 0xc09b, flat_data = 0xc093;

// Types of system descriptors and gates.
namespace system_type {
inline constexpr unsigned tss16 = 1, ldt = 2, tss16_busy = 3, call16 = 4, task_gate = 5, interrupt16 = 6,
                          trap16 = 7, tss32 = 9, tss32_busy = 11, call32 = 12, interrupt32 = 14, trap32 = 15;
}

struct Descriptor {
  uint64_t raw = 0;
  uint64_t address = 0;  // linear, of its first byte
  Segment segment;       // decoded; selector as given
};

Segment decode_descriptor(uint64_t raw, uint16_t selector) noexcept;
inline bool null_selector(uint16_t selector) noexcept {
  return (selector & 0xfffc) == 0;
}
inline bool selector_fault(Cpu& cpu, Exception vector, uint16_t selector) noexcept {
  return cpu.raise(vector, selector & 0xfffcu);
}

// Reads the descriptor of a selector that is not null; raises `fault` with the selector when the selector
// lies outside its table.
bool read_descriptor(Cpu& cpu, uint16_t selector, Exception fault, Descriptor& out) noexcept;
// Where the descriptor lies; false when outside its table (nothing raised).
bool locate_descriptor(const Cpu& cpu, uint16_t selector, unsigned size, uint64_t& address) noexcept;
// Sets the accessed bit in memory when it is clear.
bool mark_accessed(Cpu& cpu, Descriptor& descriptor) noexcept;
// Second half of a 16-byte system descriptor in long mode: the upper base; raises #GP(selector) when it is
// outside the table or its type field is not 0.
bool read_upper_half(Cpu& cpu, const Descriptor& descriptor, uint32_t& upper) noexcept;

// MOV, POP, LDS...: any segment register but CS, in every mode. Calls state_changed().
bool load_data_segment(Cpu& cpu, SegmentName name, uint16_t selector) noexcept;
// Real and virtual-8086 mode: base from the selector.
void load_real_segment(Cpu& cpu, SegmentName name, uint16_t selector) noexcept;
// The hidden part of every segment register in virtual-8086 mode.
Segment v86_segment(uint16_t selector) noexcept;
// ES, DS, FS and GS that the (new) CPL may not use become null.
void drop_inaccessible_segments(Cpu& cpu) noexcept;

// An SS for the privilege level `cpl`, from a far return (fault #GP), an inner stack of a TSS or a new task
// (#TS). A null selector is refused.
bool check_stack_segment(Cpu& cpu, uint16_t selector, unsigned cpl, Exception fault,
                         Descriptor& out) noexcept;
// A flat null SS as long mode has it.
Segment null_stack_segment(unsigned cpl) noexcept;
// Target of a far transfer: offset within CS or canonical, else #GP(0).
bool check_target(Cpu& cpu, const Segment& cs, uint64_t rip) noexcept;

bool load_ldtr(Cpu& cpu, uint16_t selector) noexcept;           // LLDT
bool load_task_register(Cpu& cpu, uint16_t selector) noexcept;  // LTR

bool within_limit(const Segment& segment, uint64_t offset, unsigned size) noexcept;

// Inner or same-level stack under construction: SS and RSP of the processor do not change until commit.
class StackBuilder {
 public:
  // `selector_error`: what #SS carries. Accesses have supervisor rights unless `user`.
  StackBuilder(Cpu& cpu, const Segment& ss, uint64_t sp, bool flat64, bool user,
               uint16_t selector_error) noexcept;
  bool push(uint64_t value, unsigned size) noexcept;
  uint64_t sp() const noexcept { return sp_; }

 private:
  Cpu& cpu_;
  const Segment& ss_;
  uint64_t sp_, mask_;
  bool flat64_, user_;
  uint16_t selector_error_;
};

// SS and (E/R)SP for an inner privilege level, from the TSS.
struct InnerStack {
  Segment ss;
  uint64_t sp = 0;
};
bool read_inner_stack(Cpu& cpu, unsigned cpl, InnerStack& out) noexcept;               // 16- and 32-bit TSS
bool read_inner_stack64(Cpu& cpu, unsigned cpl, unsigned ist, uint64_t& sp) noexcept;  // 64-bit TSS

}  // namespace lodge::kvm::soft
