#include "kvm/preload/signals.hpp"

#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <bit>
#include <cerrno>
#include <cstring>

#include "base/error.hpp"
#include "kvm/preload/real.hpp"
#include "kvm/soft/thread_alarm.hpp"

namespace lodge::kvm::preload {
namespace {

constexpr int signals = 65;  // 1 to 64

constexpr uint64_t bit(int number) noexcept {
  return uint64_t{1} << (number - 1);
}
// A fault of the thread itself: never waits, never blocked.
constexpr uint64_t faults =
    bit(SIGSEGV) | bit(SIGBUS) | bit(SIGFPE) | bit(SIGILL) | bit(SIGTRAP) | bit(SIGSYS);
// The soft accelerator answers these itself and hands what is not its own to the wrapper, whoever comes
// first.
bool accelerators_own(int number) noexcept {
  return number == SIGSEGV || number == SIGBUS || number == SIGFPE || number == soft::ThreadAlarm::signal();
}
// And those of the threads library.
constexpr uint64_t never_blocked = faults | bit(32) | bit(33);

bool is_fault(int number, const siginfo_t& info) noexcept {
  return (faults & bit(number)) != 0 && info.si_code > 0;
}

// The kernel's mask of this thread, past our own front. Answers with what it was.
uint64_t change_mask(int how, uint64_t mask) noexcept {
  uint64_t before = 0;
  ::syscall(SYS_rt_sigprocmask, how, &mask, &before, sizeof mask);
  return before;
}

// Sends the calling thread a signal as somebody else has sent it.
bool queue(int number, const siginfo_t& info) noexcept {
  return ::syscall(SYS_rt_tgsigqueueinfo, ::getpid(), ::syscall(SYS_gettid), number, &info) == 0;
}

// What the client has asked for. Handlers read it, so there are no locks: a reader looks whether a writer was
// there meanwhile, and a writer holds back its own thread's signals.
class ClientAction {
  static_assert(sizeof(struct sigaction) % sizeof(uint64_t) == 0);
  using Words = std::array<uint64_t, sizeof(struct sigaction) / sizeof(uint64_t)>;

 public:
  struct sigaction get() const noexcept {
    for (;;) {
      const uint32_t before = version_.load(std::memory_order_acquire);
      Words copy;
      for (size_t i = 0; i < copy.size(); ++i) copy[i] = words_[i].load(std::memory_order_acquire);
      if (before % 2 == 0 && version_.load(std::memory_order_relaxed) == before)
        return std::bit_cast<struct sigaction>(copy);
    }
  }
  void set(const struct sigaction& action) noexcept {
    const uint64_t mask = change_mask(SIG_SETMASK, ~uint64_t{0});
    uint32_t before = version_.load();
    while (before % 2 != 0 || !version_.compare_exchange_weak(before, before + 1)) before = version_.load();
    const auto words = std::bit_cast<Words>(action);
    for (size_t i = 0; i < words.size(); ++i) words_[i].store(words[i], std::memory_order_release);
    version_.store(before + 2, std::memory_order_release);
    change_mask(SIG_SETMASK, mask);
  }

 private:
  std::atomic<uint32_t> version_{0};
  std::array<std::atomic<uint64_t>, std::tuple_size_v<Words>> words_{};  // all zero: SIG_DFL
};

// Signal handlers have no other way to their context.
constinit std::array<ClientAction, signals> client_actions;
constinit std::atomic<bool> adopted{false};
constinit thread_local SignalsWhileRunning* volatile running = nullptr;
constinit thread_local bool runs_vcpus = false;  // this thread does, or did

uint64_t& mask_of(void* context) noexcept {
  // The kernel's mask is 8 bytes; the C library's type is larger than what the kernel has put there.
  return *reinterpret_cast<uint64_t*>(&static_cast<ucontext_t*>(context)->uc_sigmask);
}

bool is_handler(const struct sigaction& action) noexcept {
  return (action.sa_flags & SA_SIGINFO) != 0 ||
         (action.sa_handler != SIG_DFL && action.sa_handler != SIG_IGN);
}

void take_default(int number, const struct sigaction& action) noexcept {
  if (action.sa_handler == SIG_IGN && (faults & bit(number)) == 0) return;
  struct sigaction fresh {};
  fresh.sa_handler = SIG_DFL;
  real::sigaction(number, &fresh, nullptr);
  // A fault happens again at once; what was sent has to be sent again.
  ::raise(number);
}

void call_client(int number, siginfo_t* info, void* context) noexcept {
  const struct sigaction action = client_actions[static_cast<size_t>(number)].get();
  if (!is_handler(action)) return take_default(number, action);
  if ((action.sa_flags & SA_RESETHAND) != 0) {
    struct sigaction fresh {};
    fresh.sa_handler = SIG_DFL;
    client_sigaction(number, &fresh, nullptr);
  }
  if ((action.sa_flags & SA_NODEFER) != 0) change_mask(SIG_UNBLOCK, bit(number));
  if ((action.sa_flags & SA_SIGINFO) != 0)
    action.sa_sigaction(number, info, context);
  else
    action.sa_handler(number);
}

void on_signal(int number, siginfo_t* info, void* context) noexcept {
  const int saved_errno = errno;
  SignalsWhileRunning* const run = running;
  const bool waits = run != nullptr && !is_fault(number, *info) &&
                     is_handler(client_actions[static_cast<size_t>(number)].get()) &&
                     run->postpone(number, info, mask_of(context));
  errno = saved_errno;
  if (!waits) call_client(number, info, context);
}

struct sigaction wrapper(const struct sigaction& client) noexcept {
  struct sigaction action = client;
  action.sa_sigaction = on_signal;
  action.sa_flags = (client.sa_flags | SA_SIGINFO) & ~static_cast<int>(SA_RESETHAND | SA_NODEFER);
  return action;
}

bool adopt_all() {
  for (int number = 1; number < signals; ++number) {
    struct sigaction action {};
    if (real::sigaction(number, nullptr, &action) != 0) continue;  // of the threads library
    client_actions[static_cast<size_t>(number)].set(action);
    const bool own = accelerators_own(number);
    if (!own && !is_handler(action)) continue;
    struct sigaction wrapped = wrapper(action);
    if (own) wrapped.sa_flags |= SA_ONSTACK;
    if (real::sigaction(number, &wrapped, nullptr) != 0) throw_errno("cannot wrap a signal handler");
  }
  adopted.store(true);
  return true;
}

}  // namespace

void adopt_signal_handlers() {
  static const bool done = adopt_all();
  static_cast<void>(done);
}

int client_sigaction(int number, const struct sigaction* action, struct sigaction* old) noexcept {
  if (!adopted.load() || number < 1 || number >= signals || number == 32 || number == 33)
    return real::sigaction(number, action, old);
  ClientAction& client = client_actions[static_cast<size_t>(number)];
  const struct sigaction before = client.get();
  if (action != nullptr && !accelerators_own(number)) {
    const struct sigaction wanted = is_handler(*action) ? wrapper(*action) : *action;
    // Known before it is in force: the wrapper may be called at once.
    client.set(*action);
    if (real::sigaction(number, &wanted, nullptr) != 0) {
      const int error = errno;
      client.set(before);
      errno = error;
      return -1;
    }
  } else if (action != nullptr) {
    client.set(*action);
  }
  if (old != nullptr) *old = before;
  return 0;
}

const sigset_t* without_alarm(int how, const sigset_t* set, sigset_t& room) noexcept {
  if (!runs_vcpus || set == nullptr || how == SIG_UNBLOCK) return set;
  room = *set;
  ::sigdelset(&room, soft::ThreadAlarm::signal());
  return &room;
}

SignalsWhileRunning::SignalsWhileRunning(Vcpu& vcpu, const std::optional<uint64_t>& mask) noexcept
    : vcpu_(vcpu), outer_(running) {
  running = this;
  runs_vcpus = true;
  if (!mask) return;
  // From here on a signal may come that the thread's own mask holds back: it is postponed to that mask.
  const uint64_t wanted = *mask & ~(never_blocked | bit(soft::ThreadAlarm::signal()));
  before_ = change_mask(SIG_BLOCK, 0);
  restore_ = true;
  change_mask(SIG_SETMASK, wanted);
}

SignalsWhileRunning::~SignalsWhileRunning() {
  running = outer_;
  if (restore_) change_mask(SIG_SETMASK, before_);
  for (uint64_t held = held_; held != 0; held &= held - 1) {
    const int number = std::countr_zero(held) + 1;
    queue(number, sent_with_[static_cast<size_t>(number)]);
  }
}

bool SignalsWhileRunning::postpone(int number, siginfo_t* info, uint64_t& mask_on_return) noexcept {
  postponed_ = true;
  vcpu_.kick();
  if ((faults & bit(number)) != 0) {
    sent_with_[static_cast<size_t>(number)] = *info;
    held_ = held_ | bit(number);
    return true;
  }
  // The signal is blocked while its handler runs, so it stays in the queue.
  if (!queue(number, *info)) return false;
  if (!restore_) {
    before_ = mask_on_return;
    restore_ = true;
  }
  mask_on_return = ~never_blocked;
  return true;
}

}  // namespace lodge::kvm::preload
