#include "kvm/soft/cpu/kvmclock.hpp"

#include <cstring>

#include "kvm/soft/cpu/platform.hpp"
#include "kvm/soft/mmu/host_access.hpp"
#include "kvm/soft/mmu/memory_map.hpp"

namespace lodge::kvm::soft {
namespace {

constexpr uint64_t enabled = 1;
constexpr uint8_t flag_tsc_stable = 1;

struct TimeInfo {
  uint32_t version;
  uint32_t pad0;
  uint64_t tsc_timestamp;
  uint64_t system_time;
  uint32_t tsc_to_system_mul;
  int8_t tsc_shift;
  uint8_t flags;
  uint8_t pad[2];
};
static_assert(sizeof(TimeInfo) == 32);

struct WallClock {
  uint32_t version;
  uint32_t sec;
  uint32_t nsec;
};
static_assert(sizeof(WallClock) == 12);

// An odd version tells readers to try again.
uint32_t begin_version(const MemoryMap& memory, uint64_t gpa) noexcept {
  uint32_t version = 0;
  if (!memory.read(gpa, &version, sizeof version)) return 0;
  version = (version | 1) + ((version & 1) != 0 ? 2 : 0);
  memory.write(gpa, &version, sizeof version);
  host_store_fence();
  return version;
}

}  // namespace

ClockScale clock_scale(uint32_t tsc_khz) noexcept {
  if (tsc_khz == 0) return {};
  // mul / 2^32 * 2^shift = 10^6 / khz, with mul in [2^31, 2^32) for the most precision.
  ClockScale out;
  uint64_t ticks = tsc_khz, ns = 1'000'000;
  while (ns >= ticks) {
    ticks <<= 1;
    ++out.shift;
  }
  while (ns * 2 < ticks) {
    ns <<= 1;
    --out.shift;
  }
  out.mul = static_cast<uint32_t>((ns << 32) / ticks);
  return out;
}

uint64_t ClockScale::nanoseconds(uint64_t ticks) const noexcept {
  __extension__ using u128 = unsigned __int128;
  const u128 wide = shift < 0 ? u128{ticks} >> -shift : u128{ticks} << shift;
  // The product can pass 128 bits for no TSC of this century: 64 bits, a shift of a few and a factor of 32.
  return static_cast<uint64_t>(wide * mul >> 32);
}

void update_kvmclock(Cpu& cpu) noexcept {
  write_clock_page(*cpu.paravirt_memory, cpu.msr.kvm_system_time, cpu.platform());
}

void write_clock_page(const MemoryMap& memory, uint64_t msr, Platform& platform) noexcept {
  if ((msr & enabled) == 0) return;
  const uint64_t gpa = msr & ~enabled;
  const auto lock = platform.lock_clock_pages();
  const ClockScale scale = clock_scale(platform.tsc_khz());
  TimeInfo info{};
  info.version = begin_version(memory, gpa);
  const Platform::ClockPair now = platform.clock_pair();
  info.tsc_timestamp = now.tsc;
  info.system_time = now.ns;
  info.tsc_to_system_mul = scale.mul;
  info.tsc_shift = scale.shift;
  info.flags = flag_tsc_stable;
  memory.write(gpa, &info, sizeof info);
  host_store_fence();
  ++info.version;
  memory.write(gpa, &info.version, sizeof info.version);
}

void write_wall_clock(Cpu& cpu, uint64_t gpa) noexcept {
  const uint64_t boot = cpu.platform().wall_ns() - cpu.platform().kvmclock_ns();
  WallClock clock{};
  clock.version = begin_version(*cpu.paravirt_memory, gpa);
  clock.sec = static_cast<uint32_t>(boot / 1'000'000'000);
  clock.nsec = static_cast<uint32_t>(boot % 1'000'000'000);
  cpu.paravirt_memory->write(gpa, &clock, sizeof clock);
  host_store_fence();
  ++clock.version;
  cpu.paravirt_memory->write(gpa, &clock.version, sizeof clock.version);
}

}  // namespace lodge::kvm::soft
