#include "kvm/preload/cancellation.hpp"

#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstddef>
#include <mutex>
#include <new>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#include "kvm/preload/next.hpp"

namespace lodge::kvm::preload {
namespace {

// A thread that has asked for the asynchronous type at some time, until it ends.
struct Cancellable {
  const pthread_t thread = ::pthread_self();
  bool asynchronous = false, held_back = false;  // the thread's own
  Vcpu* running = nullptr;                       // these two under the registry's lock
  bool cancelled = false;
};

class Registry {
 public:
  void add(Cancellable& one) {
    const std::lock_guard lock(mutex_);
    all_.push_back(&one);
  }
  void remove(Cancellable& one) noexcept {
    const std::lock_guard lock(mutex_);
    std::erase(all_, &one);
  }
  void run(Cancellable& one, Vcpu* vcpu) noexcept {
    const std::lock_guard lock(mutex_);
    one.running = vcpu;
    if (vcpu != nullptr && one.cancelled) vcpu->kick();
  }
  // Switches this thread's cancellation off. Under the lock: who has found it on before has sent the signal
  // by now, which glibc 2.36 obeys even if it arrives when cancellation is off. Whether it was on.
  [[gnu::noinline]] bool disable() noexcept {
    const std::lock_guard lock(mutex_);
    int before = PTHREAD_CANCEL_DISABLE;
    ::pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &before);
    return before == PTHREAD_CANCEL_ENABLE;
  }
  // Under the lock, so that the thread cannot end meanwhile and another have its ID. First asked, then
  // kicked: it leaves its ioctl once, and has to find the wish then.
  int cancel(pthread_t thread, int (*ask)(pthread_t)) {
    const std::lock_guard lock(mutex_);
    const int result = ask(thread);
    if (result != 0) return result;
    for (Cancellable* one : all_) {
      if (::pthread_equal(one->thread, thread) == 0) continue;
      one->cancelled = true;
      if (one->running != nullptr) one->running->kick();
    }
    return 0;
  }

 private:
  std::mutex mutex_;
  std::vector<Cancellable*> all_;
};

// Never destroyed: threads end after the process's own objects.
Registry& registry() {
  alignas(Registry) static std::byte home[sizeof(Registry)];
  static Registry* const one = new (home) Registry;
  return *one;
}

constinit thread_local Cancellable* mine = nullptr;

// AddressSanitizer does not see frames being left by force, and takes them for live ones.
void unwinding_begins() {
#ifdef __SANITIZE_ADDRESS__
  __asan_handle_no_return();
#endif
}

struct Registered : Cancellable {
  Registered() { registry().add(*this); }
  ~Registered() {
    // The thread may have returned with the asynchronous type, and here it holds a lock.
    int ignored = 0;
    ::pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &ignored);
    mine = nullptr;
    registry().remove(*this);
  }
  Registered(const Registered&) = delete;
  Registered& operator=(const Registered&) = delete;
};

void register_thread() {
  static thread_local Registered one;
  mine = &one;
}

int real_setcanceltype(int type, int* old) {
  static constinit Next<int (*)(int, int*)> next("pthread_setcanceltype");
  return next.get()(type, old);
}

}  // namespace

// Until its last call this may be left by force at any instruction, so nothing here has a destructor.
bool hold_back_cancellation() {
  if (mine == nullptr || !mine->asynchronous) return false;
  constexpr uint64_t cancelling = uint64_t{1} << 31;  // of signal 32, the threads library's
  uint64_t mask = 0;
  ::syscall(SYS_rt_sigprocmask, SIG_BLOCK, &cancelling, &mask, sizeof mask);
  mine->held_back = registry().disable();
  unwinding_begins();
  ::syscall(SYS_rt_sigprocmask, SIG_SETMASK, &mask, nullptr, sizeof mask);  // the signal that was under way
  return mine->held_back;
}

void admit_cancellation() {
  mine->held_back = false;
  int ignored = 0;
  // By pthread_testcancel: where pthread_setcancelstate ends the thread, glibc 2.36 gives it no result.
  real_setcanceltype(PTHREAD_CANCEL_DEFERRED, &ignored);
  ::pthread_setcancelstate(PTHREAD_CANCEL_ENABLE, &ignored);
  unwinding_begins();
  ::pthread_testcancel();
  real_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, &ignored);
}

CancellableRun::CancellableRun(Vcpu& vcpu) noexcept : cancellable_(mine != nullptr && mine->held_back) {
  if (cancellable_) registry().run(*mine, &vcpu);
}

CancellableRun::~CancellableRun() {
  if (cancellable_) registry().run(*mine, nullptr);
}

}  // namespace lodge::kvm::preload

using namespace lodge::kvm::preload;

LODGE_EXPORT int pthread_setcanceltype(int type, int* old) {
  // Ours before the type is in force, and until it no longer is.
  if (type == PTHREAD_CANCEL_ASYNCHRONOUS) {
    register_thread();
    mine->asynchronous = true;
  }
  const int result = real_setcanceltype(type, old);
  if (result == 0 && type == PTHREAD_CANCEL_DEFERRED && mine != nullptr) mine->asynchronous = false;
  return result;
}

LODGE_EXPORT int pthread_cancel(pthread_t thread) {
  static constinit Next<int (*)(pthread_t)> next("pthread_cancel");
  const bool held_back = hold_back_cancellation();  // nobody ends with the registry's lock
  const int result = registry().cancel(thread, next.get());
  if (held_back) admit_cancellation();
  return result;
}
