// /proc/thread-self/schedstat (kernel Documentation/scheduler/sched-stats.rst): time on the processor, time
// waiting on a run queue, both in nanoseconds, and a count.
#include "kvm/soft/cpu/run_delay.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <array>
#include <charconv>

namespace lodge::kvm::soft {
namespace {

Fd open_schedstat() noexcept {
  return Fd(::open("/proc/thread-self/schedstat", O_RDONLY | O_CLOEXEC));
}

bool read_delay(const Fd& file, uint64_t& delay) noexcept {
  std::array<char, 96> text;  // three numbers of at most 20 digits
  const ssize_t size = file ? ::pread(file.get(), text.data(), text.size(), 0) : -1;
  if (size <= 0) return false;
  const char* const end = text.data() + size;
  uint64_t on_processor = 0;
  const auto first = std::from_chars(text.data(), end, on_processor);
  if (first.ec != std::errc{} || first.ptr == end || *first.ptr != ' ') return false;
  return std::from_chars(first.ptr + 1, end, delay).ec == std::errc{};
}

}  // namespace

bool RunDelay::available() noexcept {
  uint64_t delay = 0;
  return read_delay(open_schedstat(), delay);
}

uint64_t RunDelay::take() noexcept {
  uint64_t total = 0;
  // A vCPU may be run by another thread than before; reading the file of one that has ended fails.
  if (!file_ || ::pthread_equal(thread_, ::pthread_self()) == 0 || !read_delay(file_, total)) {
    file_ = open_schedstat();
    thread_ = ::pthread_self();
    last_ = read_delay(file_, total) ? total : 0;
    return 0;
  }
  const uint64_t delay = total - last_;
  last_ = total;
  return delay;
}

}  // namespace lodge::kvm::soft
