// What instructions ask of the vCPU's surroundings (cpu/platform.hpp).
#include <algorithm>
#include <cerrno>

#include "kvm/soft/cpu/kvmclock.hpp"
#include "kvm/soft/irqchip/lapic.hpp"
#include "kvm/soft/vcpu.hpp"
#include "kvm/soft/vm.hpp"

namespace lodge::kvm::soft {
namespace {

constexpr uint32_t msr_apic_base = 0x1b, msr_tsc_deadline = 0x6e0;

__extension__ typedef unsigned __int128 u128;

// Before the VMM has given CPUID nothing is reserved that it may still offer, as in a LAPIC.
uint64_t reserved_apic_base(const Features& features) noexcept {
  constexpr uint32_t x2apic = 1u << 21;
  if (features.entries().empty()) return Lapic::reserved_base(true, 52);
  return Lapic::reserved_base((features.leaf1_ecx & x2apic) != 0, features.physical_bits);
}

}  // namespace

bool SoftVcpu::read_apic_msr(uint32_t index, uint64_t& value) noexcept {
  if (lapic_ == nullptr) {
    // As in KVM the deadline is there and does nothing: the VMM's LAPIC has the timer.
    value = index == msr_apic_base ? apic_base_ : 0;
    return index == msr_apic_base || index == msr_tsc_deadline;
  }
  if (index != msr_tsc_deadline) settle_pv_eoi();
  switch (index) {
    case msr_apic_base: value = lapic_->apic_base(); return true;
    case msr_tsc_deadline: value = lapic_->tsc_deadline(); return true;
    default: return lapic_->msr_read(index, value);
  }
}

bool SoftVcpu::write_apic_msr(uint32_t index, uint64_t value, bool host_initiated) noexcept {
  if (lapic_ == nullptr) {
    if (index != msr_apic_base) return index == msr_tsc_deadline;
    if (!Lapic::valid_base(apic_base_, value, reserved_apic_base(cpu_.features), host_initiated))
      return false;
    apic_base_ = value;
    return true;
  }
  if (index != msr_tsc_deadline) settle_pv_eoi();
  bool done = true;
  switch (index) {
    case msr_apic_base: done = lapic_->set_apic_base(value, host_initiated); break;
    case msr_tsc_deadline: lapic_->set_tsc_deadline(value); break;
    default: done = lapic_->msr_write(index, value); break;
  }
  if (const int vector = lapic_->take_eoi_exit(); vector >= 0) {
    eoi_exit_ = vector;
    cpu_.leave_run = true;
  }
  return done;
}

uint8_t SoftVcpu::tpr() noexcept {
  return lapic_ != nullptr ? lapic_->cr8() : cpu_.cr8;
}

void SoftVcpu::set_tpr(uint8_t value) noexcept {
  settle_pv_eoi();
  if (lapic_ != nullptr) lapic_->set_cr8(value);
  // The VMM's own interrupt controller may now have something to deliver.
  else if (value < cpu_.cr8)
    cpu_.leave_run = tpr_lowered_ = true;
}

bool SoftVcpu::apic_enabled() noexcept {
  return ((lapic_ != nullptr ? lapic_->apic_base() : apic_base_) & Lapic::base_enable) != 0;
}
bool SoftVcpu::x2apic_enabled() noexcept {
  return lapic_ != nullptr && (lapic_->apic_base() & Lapic::base_x2apic) != 0;
}

uint64_t SoftVcpu::guest_tsc() const noexcept {
  return guest_tsc(__builtin_ia32_rdtsc());
}
uint64_t SoftVcpu::guest_tsc(uint64_t host) const noexcept {
  if (tsc_khz_ != vm_.tsc_khz())
    host = static_cast<uint64_t>(static_cast<u128>(host) * tsc_khz_ / vm_.tsc_khz());
  return host + tsc_offset_.load(std::memory_order_relaxed);
}

void SoftVcpu::store_tsc_offset(uint64_t offset) noexcept {
  tsc_offset_ = offset;
  home_.area().tsc_offset = offset;
}

void SoftVcpu::set_tsc(uint64_t value) noexcept {
  store_tsc_offset(tsc_offset_ + value - guest_tsc());
  if (lapic_ != nullptr) lapic_->tsc_changed();
}

void SoftVcpu::synchronize_tsc(uint64_t value) noexcept {
  place_tsc(TscLines::Cause::write, value);
  if (lapic_ != nullptr) lapic_->tsc_changed();
}

void SoftVcpu::place_tsc(TscLines::Cause cause, uint64_t value) noexcept {
  const uint64_t scaled = guest_tsc() - tsc_offset_;
  store_tsc_offset(vm_.tsc_lines().place(cause, tsc_khz_, value, scaled));
}

uint64_t SoftVcpu::tsc_to_clock(uint64_t deadline) const noexcept {
  const uint64_t now = guest_tsc();
  if (deadline <= now) return 0;
  const u128 nanoseconds = static_cast<u128>(deadline - now) * 1'000'000 / tsc_khz_;
  constexpr uint64_t century = uint64_t{1} << 62;
  return vm_.timers().now() + (nanoseconds > century ? century : static_cast<uint64_t>(nanoseconds));
}

Platform::ClockPair SoftVcpu::clock_pair() noexcept {
  const uint64_t host = __builtin_ia32_rdtsc();
  return {.tsc = guest_tsc(host), .ns = vm_.kvmclock_at(host)};
}
uint64_t SoftVcpu::kvmclock_ns() noexcept {
  return vm_.kvmclock_ns();
}
uint64_t SoftVcpu::wall_ns() noexcept {
  return vm_.timers().wall();
}
std::unique_lock<std::mutex> SoftVcpu::lock_clock_pages() noexcept {
  return std::unique_lock(vm_.clock_pages_mutex());
}
void SoftVcpu::write_clock_page(const MemoryMap& memory) noexcept {
  const uint64_t msr = std::atomic_ref(cpu_.msr.kvm_system_time).load(std::memory_order_relaxed);
  soft::write_clock_page(memory, msr, *this);
}
std::mutex& SoftVcpu::split_lock() noexcept {
  return vm_.split_lock();
}

const VmSettings& SoftVcpu::settings() const noexcept {
  return vm_.settings();
}

bool SoftVcpu::exit_for_msr(uint32_t index, bool write, uint64_t value, uint32_t reason) noexcept {
  if ((vm_.settings().msr_exits & reason) == 0) return false;
  run_->exit_reason = write ? KVM_EXIT_X86_WRMSR : KVM_EXIT_X86_RDMSR;
  run_->msr = {};
  run_->msr.reason = reason;
  run_->msr.index = index;
  run_->msr.data = value;
  msr_ = PortIo::asked;
  return true;
}

std::optional<Platform::MsrAnswer> SoftVcpu::msr_answer() noexcept {
  if (msr_ != PortIo::answered) return std::nullopt;
  return MsrAnswer{.refused = run_->msr.error != 0, .value = run_->msr.data};
}

// When a later access of the instruction leaves the guest, it runs again from its beginning. So the write is
// done when it runs alone, where it counts as an access that the VMM has answered.
SoftVcpu::Coalesced SoftVcpu::coalesce(uint64_t gpa, const void* data, unsigned size) noexcept {
  CoalescedIo& ring = vm_.coalesced();
  if (!ring.any()) return Coalesced::no;
  if (!cpu_.alone) {
    // The delivery of an event, which is no instruction, cannot run again.
    if (cpu_.block == nullptr || !ring.covers(false, gpa, size)) return Coalesced::no;
    cpu_.run_alone = true;
    return Coalesced::alone;
  }
  if (!ring.put(false, gpa, data, size)) return Coalesced::no;
  answers_used_ = ++answered_;
  return Coalesced::done;
}

bool SoftVcpu::mmio(uint64_t gpa, void* data, unsigned size, bool write) noexcept {
  auto* bytes = static_cast<uint8_t*>(data);
  if (lapic_ != nullptr && size <= 8 && lapic_->handles_gpa(gpa)) {
    settle_pv_eoi();
    lapic_->mmio(static_cast<uint32_t>(gpa & page_mask), write, data, size);
    if (const int vector = lapic_->take_eoi_exit(); vector >= 0) {
      eoi_exit_ = vector;
      cpu_.leave_run = true;
    }
    return true;
  }
  Irqchip& irqchip = vm_.interrupts();
  if (size <= 8 && irqchip.handles_gpa(gpa)) {
    write ? irqchip.mmio_write(gpa, data, size) : irqchip.mmio_read(gpa, data, size);
    return true;
  }
  if (write && size <= 8) {
    uint64_t value = 0;
    std::memcpy(&value, data, size);
    if (vm_.ioeventfds().signal(false, gpa, size, value)) return true;
  }
  while (size > 0) {
    const unsigned part = std::min(size, 8u);
    if (answers_used_ < answered_) {
      const auto& answer = answers_[answers_used_++];
      if (!write) std::memcpy(bytes, answer.data(), part);
    } else {
      if (answered_ == answers_.size())
        return cpu_.raise(Exception::gp, 0);  // more fragments than any instruction has
      const Coalesced coalesced = write ? coalesce(gpa, bytes, part) : Coalesced::no;
      if (coalesced == Coalesced::alone) return false;
      if (coalesced == Coalesced::done) {
        bytes += part, gpa += part, size -= part;
        continue;
      }
      run_->exit_reason = KVM_EXIT_MMIO;
      run_->mmio.phys_addr = gpa;
      run_->mmio.len = part;
      run_->mmio.is_write = write ? 1 : 0;
      if (write) std::memcpy(run_->mmio.data, bytes, part);
      mmio_asked_ = true;
      cpu_.wants_exit = true;
      return false;
    }
    bytes += part, gpa += part, size -= part;
  }
  return true;
}

bool SoftVcpu::io(uint16_t port, void* data, unsigned size, uint32_t count, bool out) noexcept {
  auto* bytes = static_cast<uint8_t*>(data);
  Irqchip& irqchip = vm_.interrupts();
  if (irqchip.handles_port(port)) {
    for (uint32_t i = 0; i < count; ++i, bytes += size)
      out ? irqchip.port_write(port, bytes, size) : irqchip.port_read(port, bytes, size);
    return true;
  }
  const uint32_t total = size * count;
  uint8_t* page = shared_.data() + page_size;
  if (port_io_ == PortIo::answered) {
    if (!out) std::memcpy(data, page, total);
    return true;
  }
  if (out && count == 1) {
    uint64_t value = 0;
    std::memcpy(&value, data, size);
    if (vm_.ioeventfds().signal(true, port, size, value)) return true;
    if (vm_.coalesced().put(true, port, data, size)) return true;
  }
  run_->exit_reason = KVM_EXIT_IO;
  run_->io.direction = out ? KVM_EXIT_IO_OUT : KVM_EXIT_IO_IN;
  run_->io.size = static_cast<uint8_t>(size);
  run_->io.port = port;
  run_->io.count = count;
  run_->io.data_offset = page_size;
  if (out) std::memcpy(page, data, total);
  port_io_ = PortIo::asked;
  cpu_.wants_exit = true;
  return false;
}

}  // namespace lodge::kvm::soft
