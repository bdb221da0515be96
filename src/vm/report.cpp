#include "vm/report.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <exception>

namespace lodge::vm {
namespace {

constexpr uint64_t code_bytes = 16;

std::string code_at(kvm::Vcpu& vcpu, machine::GuestMemory& memory, uint64_t linear) {
  const kvm_translation where = vcpu.translate(linear);
  if (!where.valid) return "not mapped";
  std::array<uint8_t, code_bytes> code{};
  const uint64_t size = std::min<uint64_t>(code_bytes, 4096 - (where.physical_address & 4095));
  if (!memory.read(where.physical_address, {code.data(), size})) return "not in RAM";
  return fmt::format("{:02x}", fmt::join(code.begin(), code.begin() + static_cast<ptrdiff_t>(size), " "));
}

}  // namespace

std::string describe_failure(kvm::Vcpu& vcpu, const kvm::Exit& exit, machine::GuestMemory& memory,
                             std::string_view accelerator) noexcept {
  std::string text;
  try {
    text = fmt::format("CPU {} cannot go on under the {} accelerator: {}\n", vcpu.id(), accelerator,
                       exit.describe());
    const kvm_regs r = vcpu.regs();
    const kvm_sregs s = vcpu.sregs();
    text += fmt::format("  rax {:016x} rbx {:016x} rcx {:016x} rdx {:016x}\n", r.rax, r.rbx, r.rcx, r.rdx);
    text += fmt::format("  rsi {:016x} rdi {:016x} rsp {:016x} rbp {:016x}\n", r.rsi, r.rdi, r.rsp, r.rbp);
    text += fmt::format("  r8  {:016x} r9  {:016x} r10 {:016x} r11 {:016x}\n", r.r8, r.r9, r.r10, r.r11);
    text += fmt::format("  r12 {:016x} r13 {:016x} r14 {:016x} r15 {:016x}\n", r.r12, r.r13, r.r14, r.r15);
    text += fmt::format(
        "  rip {:016x} rflags {:08x} cs {:04x} base {:x} cr0 {:x} cr2 {:x} cr3 {:x} cr4 {:x} efer {:x}\n",
        r.rip, r.rflags, s.cs.selector, s.cs.base, s.cr0, s.cr2, s.cr3, s.cr4, s.efer);
    text += fmt::format("  code {}", code_at(vcpu, memory, s.cs.base + r.rip));
    if (accelerator == "kvm" && exit.status() == 0 && exit.reason() == KVM_EXIT_INTERNAL_ERROR) {
      text += "\n  This host's /dev/kvm cannot run the instruction (see `lodge doctor`); --accel soft can.";
    }
  } catch (const std::exception& error) {
    // The registers could not be had: the reason alone still helps.
    text += error.what();
  }
  return text;
}

}  // namespace lodge::vm
