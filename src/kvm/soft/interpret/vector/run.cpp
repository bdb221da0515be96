// Runs stubs. SIMD floating-point exceptions: a stub always runs with all exceptions masked and the sticky
// flags clear; the flags it leaves are then judged against the guest's masks. When one is unmasked the
// registers are rolled back, so no host signal is ever needed. Two traits of unmasked exceptions are rebuilt:
// unmasked invalid, denormal and divide-by-zero suppress the flags of the later stage (SDM volume 1, section
// 11.5.3), and underflow with UM clear means "tiny", exact or not, which a second run with flush-to-zero
// shows.
#include "kvm/soft/interpret/vector/run.hpp"

#include "kvm/soft/interpret/vector/access.hpp"
#include "kvm/soft/interpret/vector/x87.hpp"

namespace lodge::kvm::soft::simd {
namespace {

constexpr uint32_t mxcsr_flags = 0x3f, mxcsr_masks = 0x1f80, mxcsr_ftz = 0x8000, before_computing = 7,
                   underflow = 0x10;

const Form& form_of(const Op& op) {
  return *static_cast<const Form*>(op.aux);
}

// What a stub can change, to roll back.
struct Registers {
  std::array<std::array<uint8_t, 64>, 32> zmm;
  std::array<uint64_t, 8> k;
  std::array<uint64_t, 18> gpr;
  uint16_t arith;
  std::array<uint8_t, 512> fx;

  explicit Registers(const Cpu& cpu)
      : zmm(cpu.vector.zmm), k(cpu.vector.k), gpr(cpu.gpr), arith(cpu.arith), fx(cpu.vector.fx) {}
  void restore(Cpu& cpu) const {
    cpu.vector.zmm = zmm;
    cpu.vector.k = k;
    cpu.gpr = gpr;
    cpu.arith = arith;
    cpu.vector.fx = fx;
  }
};

// False when an unmasked exception was raised; the registers are then as before.
bool run_with_exceptions(Cpu& cpu, const Form& form, Bounce& bounce) {
  const uint32_t guest = mxcsr(cpu.vector);
  const uint32_t unmasked = form.silent ? 0 : ~(guest >> 7) & mxcsr_flags;
  bounce.mxcsr_in = (guest | mxcsr_masks) & ~mxcsr_flags;
  if (unmasked == 0) {
    form.stub(&cpu, &bounce);
    return true;
  }
  // Flush-to-zero has no effect while underflow is unmasked.
  if ((unmasked & underflow) != 0) bounce.mxcsr_in &= ~mxcsr_ftz;
  const uint32_t in = bounce.mxcsr_in;
  const Registers before(cpu);
  form.stub(&cpu, &bounce);
  uint32_t raised = bounce.mxcsr_out & mxcsr_flags;
  if ((unmasked & underflow) != 0 && (raised & underflow) == 0 && !form.never_tiny) {
    const Registers after(cpu);
    Bounce second = bounce;
    second.mxcsr_in = in | mxcsr_ftz;
    before.restore(cpu);
    form.stub(&cpu, &second);
    raised |= second.mxcsr_out & underflow;
    after.restore(cpu);
  }
  if ((raised & unmasked) == 0) return true;
  before.restore(cpu);
  if ((raised & unmasked & before_computing) != 0) raised &= before_computing;
  set_mxcsr(cpu.vector, guest | raised);
  cpu.raise((cpu.cr4 & cr4::osxmmexcpt) != 0 ? Exception::xm : Exception::ud);
  return false;
}

void commit_mxcsr(Cpu& cpu, const Bounce& bounce) {
  set_mxcsr(cpu.vector, mxcsr(cpu.vector) | (bounce.mxcsr_out & mxcsr_flags));
}

}  // namespace

Step run_vector(Cpu& cpu, const Op& op) noexcept {
  const Form& form = form_of(op);
  if (!available(cpu, form.need)) return Step::fault;
  Bounce bounce;
  if (form.direction == Direction::read && !load(cpu, op, form, bounce)) return Step::fault;
  form.stub(&cpu, &bounce);
  if (form.direction == Direction::write && !store(cpu, op, form, bounce)) return Step::fault;
  return Step::next;
}

Step run_vector_fp(Cpu& cpu, const Op& op) noexcept {
  const Form& form = form_of(op);
  if (!available(cpu, form.need)) return Step::fault;
  Bounce bounce;
  if (form.direction == Direction::read && !load(cpu, op, form, bounce)) return Step::fault;
  if (form.direction == Direction::write && !prepare_store(cpu, op, form)) return Step::fault;
  if (!run_with_exceptions(cpu, form, bounce)) return Step::fault;
  if (form.direction == Direction::write && !store(cpu, op, form, bounce)) return Step::fault;
  commit_mxcsr(cpu, bounce);
  return Step::next;
}

Step run_mmx(Cpu& cpu, const Op& op) noexcept {
  const Form& form = form_of(op);
  if (!available(cpu, form.need)) return Step::fault;
  Bounce bounce;
  if (form.direction == Direction::read && !load(cpu, op, form, bounce)) return Step::fault;
  if (form.direction == Direction::write && !prepare_store(cpu, op, form)) return Step::fault;
  const auto before = cpu.vector.fx;
  enter_mmx(cpu.vector);
  if (!form.uses_mxcsr) {
    form.stub(&cpu, &bounce);
  } else if (!run_with_exceptions(cpu, form, bounce)) {
    const uint32_t flags = mxcsr(cpu.vector);
    cpu.vector.fx = before;
    set_mxcsr(cpu.vector, flags);
    return Step::fault;
  } else {
    commit_mxcsr(cpu, bounce);
  }
  // Only a device register can still refuse: then the instruction runs again.
  if (form.direction == Direction::write && !store(cpu, op, form, bounce)) {
    cpu.vector.fx = before;
    return Step::fault;
  }
  return Step::next;
}

Step run_fence(Cpu&, const Op&) noexcept {
  // The instruction itself: ThreadSanitizer does not know std::atomic_thread_fence.
  asm volatile("mfence" : : : "memory");
  return Step::next;
}

}  // namespace lodge::kvm::soft::simd
