// An idle vCPU gives the memory for its decoded code back to the host, and when all vCPUs are idle, the code
// cache, too. It drops all of it:
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
  if (!idle_.idle(now, [] { return nanoseconds(CLOCK_THREAD_CPUTIME_ID); })) {
    if (translator_ && !idle_.was_idle()) translator_->set_idle(false);
    return idle_.left(now);
  }
  const size_t own = blocks_.ops() * sizeof(Op);
  if (own >= worth_giving_back) {
    blocks_.clear();
    single_.reset();
    ++cpu_.flushes;  // the jump table points there
    ++counts_.given_back;
  }
  // Which stays said until a window was busy.
  const bool all = translator_ && translator_->set_idle(true);
  // Blocks and what belongs to translations are many small pieces.
  if (all || own >= worth_giving_back) ::malloc_trim(0);
  if (translator_ && !all) return idle_.left(now);  // others may be idle then
  return VcpuTimer::forever;
}

}  // namespace lodge::kvm::soft
