#include "kvm/soft/thread_alarm.hpp"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "kvm/soft/signal_chain.hpp"

namespace lodge::kvm::soft {
namespace {

// Signal handlers have no other way to their context; both are this thread's only.
thread_local const std::function<void()>* volatile receiver = nullptr;
thread_local volatile uint32_t missed_alarms = 0;

// Timers carry its address: a process may hold more than one copy of this code, and uses of its own for the
// signal.
constexpr char mark = 0;

struct sigaction previous;

void on_alarm(int number, siginfo_t* info, void* context) noexcept {
  const int saved_errno = errno;
  if (info->si_code != SI_TIMER || info->si_value.sival_ptr != &mark)
    call_previous(previous, number, info, context);
  else if (const std::function<void()>* ring = receiver; ring != nullptr)
    (*ring)();
  else
    missed_alarms = missed_alarms + 1;
  errno = saved_errno;
}

bool install_handler() noexcept {
  struct sigaction action {};
  action.sa_sigaction = on_alarm;
  action.sa_flags = SA_SIGINFO | SA_RESTART | SA_ONSTACK;
  ::sigemptyset(&action.sa_mask);
  return ::sigaction(ThreadAlarm::signal(), &action, &previous) == 0;
}

}  // namespace

// ThreadSanitizer holds signals back until the thread calls something that it intercepts, which translated
// code does not.
#ifdef __SANITIZE_THREAD__
constexpr bool signals_arrive = false;
#else
constexpr bool signals_arrive = true;
#endif

int ThreadAlarm::signal() noexcept {
  return SIGRTMIN + 6;
}

std::unique_ptr<ThreadAlarm> ThreadAlarm::create() noexcept {
  if (!signals_arrive) return nullptr;
  static const bool installed = install_handler();
  if (!installed) return nullptr;
  sigevent event{};
  event.sigev_notify = SIGEV_THREAD_ID;
  event.sigev_signo = signal();
  event.sigev_value.sival_ptr = const_cast<char*>(&mark);
  event._sigev_un._tid = static_cast<pid_t>(::syscall(SYS_gettid));
  timer_t timer{};
  if (::timer_create(CLOCK_MONOTONIC, &event, &timer) != 0) return nullptr;
  sigset_t set;
  ::sigemptyset(&set);
  ::sigaddset(&set, signal());
  ::pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
  return std::unique_ptr<ThreadAlarm>(new ThreadAlarm(timer));
}

ThreadAlarm::~ThreadAlarm() {
  ::timer_delete(timer_);
}

void ThreadAlarm::arm(uint64_t deadline) noexcept {
  const uint64_t at = std::max<uint64_t>(deadline, 1);  // 0 would disarm
  itimerspec time{};
  time.it_value = {.tv_sec = static_cast<time_t>(at / 1'000'000'000),
                   .tv_nsec = static_cast<long>(at % 1'000'000'000)};
  ::timer_settime(timer_, TIMER_ABSTIME, &time, nullptr);
}

void ThreadAlarm::cancel() noexcept {
  constexpr itimerspec never{};
  ::timer_settime(timer_, 0, &never, nullptr);
}

ThreadAlarm::Receiver::Receiver(const std::function<void()>& ring) noexcept : outer_(receiver) {
  receiver = &ring;
}

ThreadAlarm::Receiver::~Receiver() {
  receiver = outer_;
}

uint32_t ThreadAlarm::missed() noexcept {
  return missed_alarms;
}

}  // namespace lodge::kvm::soft
