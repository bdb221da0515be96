// What event delivery and the far transfers share inside the processor room.
#pragma once

#include <cstdint>

#include "kvm/soft/cpu/events.hpp"
#include "kvm/soft/cpu/segments.hpp"

namespace lodge::kvm::soft {

// Everything that delivery or a far transfer may change before it meets a fault, to take it all back.
class Rollback {
 public:
  explicit Rollback(const Cpu& cpu) noexcept;
  void undo(Cpu& cpu) const noexcept;

 private:
  std::array<Segment, 7> segment_;
  uint64_t rsp_, rip_, system_flags_;
  unsigned cpl_;
};

enum class EventKind : uint8_t {
  external,     // interrupt from the APIC or the PIC
  nmi,          //
  exception,    // raised by the processor
  instruction,  // INT n
  trap,         // INT3, INTO
  privileged,   // INT1: no check of the gate's DPL
};

// INT n, INT3, INTO and INT1: enters the handler, with `return_rip` as its return address. False: a fault is
// pending and nothing has changed.
bool software_interrupt(Cpu& cpu, uint8_t vector, EventKind kind, uint64_t return_rip) noexcept;

enum class TaskSwitch : uint8_t { jump, call, gate, iret };
// Hardware task switch to the TSS `selector`. Faults of the old task's context: false, nothing has changed.
// Faults in the new task's context and the debug trap of its T bit: true, with cpu.pending set; the state is
// the new task's. `error` is pushed on the new stack when not null.
// `saved_flags` is added to the flags in the old TSS (RF, for faults through a task gate).
bool switch_task(Cpu& cpu, uint16_t selector, TaskSwitch why, uint64_t return_rip, const uint32_t* error,
                 uint64_t saved_flags = 0) noexcept;

}  // namespace lodge::kvm::soft
