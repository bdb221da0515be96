#include "kvm/kvm.hpp"

#include <fmt/format.h>

#include <array>
#include <cerrno>
#include <cstring>

namespace lodge::kvm {
namespace {

// Indexed by KVM_EXIT_* (linux/kvm.h).
constexpr std::array<std::string_view, 37> exit_names = {"KVM_EXIT_UNKNOWN",
                                                         "KVM_EXIT_EXCEPTION",
                                                         "KVM_EXIT_IO",
                                                         "KVM_EXIT_HYPERCALL",
                                                         "KVM_EXIT_DEBUG",
                                                         "KVM_EXIT_HLT",
                                                         "KVM_EXIT_MMIO",
                                                         "KVM_EXIT_IRQ_WINDOW_OPEN",
                                                         "KVM_EXIT_SHUTDOWN",
                                                         "KVM_EXIT_FAIL_ENTRY",
                                                         "KVM_EXIT_INTR",
                                                         "KVM_EXIT_SET_TPR",
                                                         "KVM_EXIT_TPR_ACCESS",
                                                         "KVM_EXIT_S390_SIEIC",
                                                         "KVM_EXIT_S390_RESET",
                                                         "KVM_EXIT_DCR",
                                                         "KVM_EXIT_NMI",
                                                         "KVM_EXIT_INTERNAL_ERROR",
                                                         "KVM_EXIT_OSI",
                                                         "KVM_EXIT_PAPR_HCALL",
                                                         "KVM_EXIT_S390_UCONTROL",
                                                         "KVM_EXIT_WATCHDOG",
                                                         "KVM_EXIT_S390_TSCH",
                                                         "KVM_EXIT_EPR",
                                                         "KVM_EXIT_SYSTEM_EVENT",
                                                         "KVM_EXIT_S390_STSI",
                                                         "KVM_EXIT_IOAPIC_EOI",
                                                         "KVM_EXIT_HYPERV",
                                                         "KVM_EXIT_ARM_NISV",
                                                         "KVM_EXIT_X86_RDMSR",
                                                         "KVM_EXIT_X86_WRMSR",
                                                         "KVM_EXIT_DIRTY_RING_FULL",
                                                         "KVM_EXIT_AP_RESET_HOLD",
                                                         "KVM_EXIT_X86_BUS_LOCK",
                                                         "KVM_EXIT_XEN",
                                                         "KVM_EXIT_RISCV_SBI",
                                                         "KVM_EXIT_RISCV_CSR"};

}  // namespace

std::string_view exit_name(uint32_t reason) noexcept {
  return reason < exit_names.size() ? exit_names[reason] : "KVM_EXIT_?";
}

bool Exit::interrupted() const noexcept {
  return status_ == -EINTR || (status_ == 0 && reason() == KVM_EXIT_INTR);
}

Exit::Io Exit::io() const noexcept {
  const auto& io = run_->io;
  auto* data = reinterpret_cast<uint8_t*>(run_) + io.data_offset;
  return {io.direction == KVM_EXIT_IO_OUT, io.size, io.port, io.count, {data, size_t{io.size} * io.count}};
}

Exit::Mmio Exit::mmio() const noexcept {
  auto& mmio = run_->mmio;
  return {mmio.is_write != 0, mmio.phys_addr, {mmio.data, mmio.len}};
}

std::string Exit::describe() const {
  if (status_ < 0) return fmt::format("run failed: {}", std::strerror(-status_));
  switch (reason()) {
    case KVM_EXIT_IO: {
      const Io access = io();
      return fmt::format("io {} {:#x} size {} count {}", access.out ? "out" : "in", access.port, access.size,
                         access.count);
    }
    case KVM_EXIT_MMIO: {
      const Mmio access = mmio();
      return fmt::format("mmio {} {:#x} size {}", access.write ? "write" : "read", access.gpa,
                         access.data.size());
    }
    case KVM_EXIT_INTERNAL_ERROR: return fmt::format("internal error: suberror {}", run_->internal.suberror);
    case KVM_EXIT_FAIL_ENTRY:
      return fmt::format("entry failed: hardware reason {:#x}",
                         run_->fail_entry.hardware_entry_failure_reason);
    case KVM_EXIT_SYSTEM_EVENT: return fmt::format("system event {}", run_->system_event.type);
    default: return std::string(exit_name(reason()));
  }
}

}  // namespace lodge::kvm
