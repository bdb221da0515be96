#include "kvm/soft/cpu/cpuid.hpp"
#include "kvm/soft/cpu/platform.hpp"
#include "kvm/soft/interpret/system.hpp"

namespace lodge::kvm::soft::system {
namespace {

bool time_allowed(Cpu& cpu) noexcept {
  return (cpu.cr4 & cr4::tsd) == 0 || cpu.cpl() == 0 || cpu.raise(Exception::gp, 0);
}

// The host's own generators. CPUID offers them only where the host has them. Underflow is passed on: CF = 0
// and a destination of 0, as the manual says.
struct Random {
  uint64_t value = 0;
  bool valid = false;
};

Random native_rdrand() noexcept {
  Random out;
  __asm__ volatile("rdrand %0; setc %1" : "=r"(out.value), "=qm"(out.valid) : : "cc");
  return out;
}

Random native_rdseed() noexcept {
  Random out;
  __asm__ volatile("rdseed %0; setc %1" : "=r"(out.value), "=qm"(out.valid) : : "cc");
  return out;
}

Step store_random(Cpu& cpu, const Op& op, const Random& random) noexcept {
  cpu.set_reg(op.dst, op.size, random.valid ? random.value : 0);
  cpu.set_arith(random.valid ? flag::cf : 0);
  return Step::next;
}

}  // namespace

Step cpuid_instruction(Cpu& cpu, const Op&) noexcept {
  if ((cpu.msr.misc_features & MsrState::cpuid_fault) != 0 && cpu.cpl() != 0) return general_protection(cpu);
  const Features::Result out =
      cpuid(cpu, static_cast<uint32_t>(cpu.gpr[rax]), static_cast<uint32_t>(cpu.gpr[rcx]));
  cpu.gpr[rax] = out.eax;
  cpu.gpr[rbx] = out.ebx;
  cpu.gpr[rcx] = out.ecx;
  cpu.gpr[rdx] = out.edx;
  return Step::next;
}

Step rdtsc(Cpu& cpu, const Op&) noexcept {
  if (!time_allowed(cpu)) return Step::fault;
  set_edx_eax(cpu, cpu.platform().tsc());
  return Step::next;
}

Step rdtscp(Cpu& cpu, const Op& op) noexcept {
  const Step done = rdtsc(cpu, op);
  if (done == Step::next) cpu.gpr[rcx] = cpu.msr.tsc_aux & 0xffff'ffff;
  return done;
}

// There are no counters, so every index is out of range.
Step rdpmc(Cpu& cpu, const Op&) noexcept {
  return general_protection(cpu);
}

Step rdpid(Cpu& cpu, const Op& op) noexcept {
  cpu.set_reg(op.dst, cpu.mode() == Mode::bits64 ? 8 : 4, cpu.msr.tsc_aux & 0xffff'ffff);
  return Step::next;
}

Step rdrand(Cpu& cpu, const Op& op) noexcept {
  return store_random(cpu, op, native_rdrand());
}
Step rdseed(Cpu& cpu, const Op& op) noexcept {
  return store_random(cpu, op, native_rdseed());
}

Step nop(Cpu&, const Op&) noexcept {
  return Step::next;
}

// A spinning vCPU gives the host's other threads a chance only through the host's own PAUSE.
Step pause(Cpu&, const Op&) noexcept {
  __builtin_ia32_pause();
  return Step::next;
}

Step mfence(Cpu&, const Op&) noexcept {
  asm volatile("mfence" : : : "memory");  // ThreadSanitizer does not know std::atomic_thread_fence
  return Step::next;
}

// Guest memory is the host's cacheable memory: nothing to write back, but the address is checked as a read's.
Step clflush(Cpu& cpu, const Op& op) noexcept {
  uint64_t address = 0;
  return cpu.linear(op, 1, false, address) && cpu.probe_read(address, 1) ? Step::next : Step::fault;
}

Step clzero(Cpu& cpu, const Op& op) noexcept {
  constexpr std::array<uint8_t, 64> zeros{};
  uint64_t address = 0, offset = cpu.gpr[rax];
  if (op.address_size < 8) offset &= op.address_size == 4 ? 0xffff'ffff : 0xffff;
  const auto name = op.segment < seg_none ? static_cast<SegmentName>(op.segment) : seg_ds;
  if (!cpu.linear(name, offset & ~uint64_t{63}, 64, true, address)) return Step::fault;
  return cpu.write_bytes(address, zeros.data(), 64) ? Step::next : Step::fault;
}

Step serialize(Cpu& cpu, const Op& op) noexcept {
  return end_block(cpu, op);
}

}  // namespace lodge::kvm::soft::system
