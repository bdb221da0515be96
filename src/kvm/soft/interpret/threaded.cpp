#include "kvm/soft/interpret/threaded.hpp"

#include "kvm/soft/interpret/integer.hpp"

namespace lodge::kvm::soft {
namespace {

// #SS instead of #GP for a non-canonical address off SS; the segment checks themselves were done by
// address().
bool check_canonical(Cpu& cpu, uint64_t linear, unsigned size, bool stack) noexcept {
  if (cpu.mode() != Mode::bits64 || (cpu.canonical(linear) && cpu.canonical(linear + size - 1))) return true;
  return cpu.raise(stack ? Exception::ss : Exception::gp, 0);
}

bool finish(Cpu& cpu, const Op* op, bool done) noexcept {
  if (!done) leave(cpu, op);
  return done;
}

}  // namespace

Ea ea_kind(const Cpu& cpu, const Op& op) noexcept {
  if (cpu.mode() == Mode::bits64) return op.address_size == 8 ? Ea::flat64 : Ea::general;
  const bool data = op.segment == seg_ds || op.segment == seg_es || op.segment == seg_ss;
  return cpu.mode() == Mode::bits32 && cpu.flat && op.address_size == 4 && data ? Ea::flat32 : Ea::general;
}

bool slow_load(Cpu& cpu, const Op* op, uint64_t linear, unsigned size) noexcept {
  const bool stack = op->segment == seg_ss;
  return finish(cpu, op, check_canonical(cpu, linear, size, stack) && cpu.load_slow(linear, size));
}

bool slow_load_for_write(Cpu& cpu, const Op* op, uint64_t linear, unsigned size) noexcept {
  const bool stack = op->segment == seg_ss;
  return finish(cpu, op,
                check_canonical(cpu, linear, size, stack) && integer::check_alignment(cpu, linear, size) &&
                    cpu.probe_write(linear, size) && cpu.load_slow(linear, size));
}

bool slow_store(Cpu& cpu, const Op* op, uint64_t linear, unsigned size, uint64_t value) noexcept {
  const bool stack = op->segment == seg_ss;
  return finish(cpu, op, check_canonical(cpu, linear, size, stack) && cpu.store_slow(linear, size, value));
}

bool slow_stack_load(Cpu& cpu, const Op* op, uint64_t linear, unsigned size) noexcept {
  return finish(cpu, op, check_canonical(cpu, linear, size, true) && cpu.load_slow(linear, size));
}

bool slow_stack_store(Cpu& cpu, const Op* op, uint64_t linear, unsigned size, uint64_t value) noexcept {
  return finish(cpu, op, check_canonical(cpu, linear, size, true) && cpu.store_slow(linear, size, value));
}

Step undefined_opcode(Cpu& cpu, const Op&) noexcept {
  cpu.raise(Exception::ud);
  return Step::fault;
}

void run_complex(Cpu& cpu, const Op* op) noexcept {
  switch (op->complex(cpu, *op)) {
    case Step::next: LODGE_NEXT;
    case Step::fault: cpu.rip = cpu.this_rip(*op); return;
    case Step::exit: cpu.leave_run = true; return;
    case Step::branch: return;
  }
}

}  // namespace lodge::kvm::soft
