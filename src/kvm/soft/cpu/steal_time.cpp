#include "kvm/soft/cpu/steal_time.hpp"

#include <cstddef>
#include <utility>

#include "kvm/soft/cpu/cpuid_bits.hpp"
#include "kvm/soft/cpu/platform.hpp"
#include "kvm/soft/mmu/host_access.hpp"
#include "kvm/soft/mmu/memory_map.hpp"

namespace lodge::kvm::soft {
namespace {

struct Area {
  uint64_t steal;
  uint32_t version, flags;
  uint8_t preempted, pad8[3];
  uint32_t pad[11];
};
static_assert(sizeof(Area) == 64);

constexpr uint64_t msr_enabled = 1;
constexpr uint8_t preempted = 1, flush_tlb = 2;  // KVM_VCPU_PREEMPTED, KVM_VCPU_FLUSH_TLB

}  // namespace

bool StealTime::enabled() const noexcept {
  return (cpu_.msr.kvm_steal_time & msr_enabled) != 0;
}
uint64_t StealTime::area() const noexcept {
  return cpu_.msr.kvm_steal_time & ~uint64_t{sizeof(Area) - 1};
}

void StealTime::start() noexcept {
  delay_.take();
  enter();
}

void StealTime::enter() noexcept {
  if (!enabled()) return;
  // One exchange: a vCPU that sees "preempted" and adds its wish does so with a compare-and-exchange, so the
  // wish either arrives here or is refused, and then an IPI is sent.
  uint8_t wishes = 0;
  if (!cpu_.paravirt_memory->exchange(area() + offsetof(Area, preempted), wishes)) return;
  if ((wishes & flush_tlb) != 0 && (cpu_.features.kvm_features & kvm_feature::pv_tlb_flush) != 0)
    cpu_.flush_tlb(false);
}

void StealTime::leave() noexcept {
  if (enabled())
    cpu_.paravirt_memory->write(area() + offsetof(Area, preempted), &preempted, sizeof preempted);
}

void StealTime::left() noexcept {
  if (enabled()) left_ = __builtin_ia32_rdtsc();
}

void StealTime::update() noexcept {
  if (!enabled()) return;
  const uint64_t now = __builtin_ia32_rdtsc();
  const uint64_t left = std::exchange(left_, 0);
  // A twentieth of a millisecond elsewhere: next to that, asking costs little.
  const bool was_away = left != 0 && now - left > cpu_.platform().tsc_khz() / 20;
  if (now < next_update_ && !was_away) return;
  next_update_ = now + cpu_.platform().tsc_khz();
  const uint64_t taken = delay_.take();
  if (taken == 0) return;
  uint64_t steal = 0;
  uint32_t version = 0;
  if (!cpu_.paravirt_memory->read(area() + offsetof(Area, steal), &steal, sizeof steal) ||
      !cpu_.paravirt_memory->read(area() + offsetof(Area, version), &version, sizeof version))
    return;
  // An odd version tells readers to try again.
  version |= 1;
  cpu_.paravirt_memory->write(area() + offsetof(Area, version), &version, sizeof version);
  host_store_fence();
  steal += taken;
  cpu_.paravirt_memory->write(area() + offsetof(Area, steal), &steal, sizeof steal);
  host_store_fence();
  ++version;
  cpu_.paravirt_memory->write(area() + offsetof(Area, version), &version, sizeof version);
}

}  // namespace lodge::kvm::soft
