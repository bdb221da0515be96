// An idle vCPU gives the memory for its decoded and translated code back to the host. It drops all of it:
// what the guest still runs now and then is decoded anew, and that is little. Only its own thread does this,
// at a halt, when nobody waits for it.
#include <malloc.h>
#include <time.h>

#include "kvm/soft/vcpu.hpp"
#include "kvm/soft/vm.hpp"

namespace lodge::kvm::soft {
namespace {

// Less is what an idle Linux guest's timers keep in use.
constexpr size_t worth_giving_back = size_t{1} << 20;

uint64_t nanoseconds(clockid_t clock) noexcept {
  timespec time{};
  ::clock_gettime(clock, &time);
  return static_cast<uint64_t>(time.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(time.tv_nsec);
}

}  // namespace

uint64_t SoftVcpu::give_back_when_idle() noexcept {
  const size_t held = blocks_.ops() * sizeof(Op) + (translator_ ? translator_->code_bytes() : 0);
  if (held < worth_giving_back) return VcpuTimer::forever;
  const uint64_t now = nanoseconds(CLOCK_MONOTONIC);
  if (!idle_.idle(now, [] { return nanoseconds(CLOCK_THREAD_CPUTIME_ID); })) return idle_.left(now);
  blocks_.clear();
  single_.reset();
  ++cpu_.flushes;  // the jump table points there
  if (translator_) translator_->release();
  // Blocks and what belongs to translations are many small pieces.
  ::malloc_trim(0);
  ++counts_.given_back;
  return VcpuTimer::forever;
}

}  // namespace lodge::kvm::soft
