// Signals, kicks and cancellation while a vCPU runs.
#include <setjmp.h>
#include <signal.h>
#include <sys/time.h>
#include <time.h>

#include "client.h"

static volatile sig_atomic_t handled;
static volatile uintptr_t handler_stack;
static void on_signal(int number) {
  (void)number;
  int here;
  handler_stack = (uintptr_t)&here;
  handled = handled + 1;
  if (__tsan_init == NULL) errno = 0;  // ThreadSanitizer takes it for a mistake
}

static void set_alarm(void) {
  const struct itimerval soon = {.it_value = {.tv_usec = 20000}};
  CHECK(setitimer(ITIMER_REAL, &soon, NULL) == 0);
}

// A handler runs when KVM_RUN has returned, on the stack that it was promised.
void test_signal(void) {
  make_machine(spins, sizeof spins);
  struct sigaction action = {.sa_handler = on_signal}, old;
  CHECK(sigaction(SIGALRM, &action, NULL) == 0);
  CHECK(sigaction(SIGALRM, NULL, &old) == 0 && old.sa_handler == on_signal);
  int here;
  for (int round = 1; round <= 3; ++round) {
    set_alarm();
    CHECK(ioctl(vcpu, KVM_RUN, 0) == -1 && errno == EINTR);
    CHECK(handled == round);
    CHECK(run->exit_reason == KVM_EXIT_INTR);
    const intptr_t distance = (intptr_t)(handler_stack - (uintptr_t)&here);
    CHECK(distance < 65536 && distance > -65536);
  }
  CHECK(signal(SIGALRM, SIG_DFL) == on_signal);
}

// KVM_SET_SIGNAL_MASK: the signal ends KVM_RUN and stays pending, because the thread blocks it.
void test_mask(void) {
  make_machine(spins, sizeof spins);
  struct sigaction action = {.sa_handler = on_signal};
  CHECK(sigaction(SIGALRM, &action, NULL) == 0);
  sigset_t blocked, pending;
  sigemptyset(&blocked);
  sigaddset(&blocked, SIGALRM);
  CHECK(pthread_sigmask(SIG_BLOCK, &blocked, NULL) == 0);
  struct {
    uint32_t length;
    uint8_t set[8];
  } __attribute__((packed)) mask = {.length = 8};
  CHECK(ioctl(vcpu, KVM_SET_SIGNAL_MASK, &mask) == 0);
  for (int round = 0; round < 2; ++round) {
    set_alarm();
    CHECK(ioctl(vcpu, KVM_RUN, 0) == -1 && errno == EINTR);
    CHECK(handled == 0 && sigpending(&pending) == 0 && sigismember(&pending, SIGALRM) == 1);
    // As long as it is pending the vCPU does not run.
    CHECK(ioctl(vcpu, KVM_RUN, 0) == -1 && errno == EINTR);
    const struct timespec at_once = {0, 0};
    CHECK(sigtimedwait(&blocked, NULL, &at_once) == SIGALRM);
  }
  CHECK(ioctl(vcpu, KVM_SET_SIGNAL_MASK, NULL) == 0);
}

void test_immediate(void) {
  make_machine(spins, sizeof spins);
  CHECK(ioctl(dev, KVM_CHECK_EXTENSION, KVM_CAP_IMMEDIATE_EXIT) == 1);
  run->immediate_exit = 1;
  CHECK(ioctl(vcpu, KVM_RUN, 0) == -1 && errno == EINTR);
}

// A thread's alarm ends a run of its own, not one of another thread.
static void* kick(void* thread) {
  usleep(20000);
  CHECK(pthread_kill(*(pthread_t*)thread, SIGUSR1) == 0);
  return NULL;
}
void test_kick(void) {
  make_machine(spins, sizeof spins);
  struct sigaction action = {.sa_handler = on_signal};
  CHECK(sigaction(SIGUSR1, &action, NULL) == 0);
  pthread_t self = pthread_self(), other;
  for (int round = 1; round <= 20; ++round) {
    CHECK(pthread_create(&other, NULL, kick, &self) == 0);
    CHECK(ioctl(vcpu, KVM_RUN, 0) == -1 && errno == EINTR);
    CHECK(handled == round && pthread_join(other, NULL) == 0);
  }
}

// Signals that cannot be blocked while the vCPU runs end it like any other: the accelerator's own alarm, and
// what is otherwise a fault.
struct sent {
  pthread_t thread;
  int number;
};
static void* send_number(void* what) {
  const struct sent* const sent = what;
  usleep(20000);
  CHECK(pthread_kill(sent->thread, sent->number) == 0);
  return NULL;
}
void test_unblocked(void) {
  make_machine(spins, sizeof spins);
  const int numbers[] = {SIGRTMIN + 6, SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS};
  const struct sigaction action = {.sa_handler = on_signal};
  int round = 0;
  for (size_t i = 0; i < sizeof numbers / sizeof *numbers; ++i) {
    CHECK(sigaction(numbers[i], &action, NULL) == 0);
    for (int again = 0; again < 2; ++again) {
      struct sent sent = {pthread_self(), numbers[i]};
      pthread_t other;
      CHECK(pthread_create(&other, NULL, send_number, &sent) == 0);
      CHECK(ioctl(vcpu, KVM_RUN, 0) == -1 && errno == EINTR);
      CHECK(handled == ++round && pthread_join(other, NULL) == 0);
    }
  }
}

static volatile sig_atomic_t refused, value;
static sigjmp_buf back;
static void use_vcpu(int number, siginfo_t* info, void* context) {
  (void)number, (void)context;
  struct kvm_regs regs;
  if (ioctl(vcpu, KVM_GET_REGS, &regs) != 0) refused = refused + 1;
  value = info->si_value.sival_int;
  handled = handled + 1;
}
static void jump_back(int number) {
  (void)number;
  handled = handled + 1;
  siglongjmp(back, 1);
}
static void* send_value(void* what) {
  const struct sent* const sent = what;
  usleep(20000);
  CHECK(pthread_sigqueue(sent->thread, sent->number, (union sigval){.sival_int = 77}) == 0);
  return NULL;
}
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"  // System V's names
// A handler may use the vCPU whose run it ended, or not return at all.
void test_handler(void) {
  make_machine(spins, sizeof spins);
  const int numbers[] = {SIGUSR1, SIGSEGV, SIGTRAP};
  struct sigaction action = {.sa_sigaction = use_vcpu, .sa_flags = SA_SIGINFO};
  struct sent sent = {pthread_self(), 0};
  pthread_t other;
  for (int i = 0; i < 3; ++i) {
    sent.number = numbers[i];
    value = 0;
    CHECK(sigaction(numbers[i], &action, NULL) == 0);
    CHECK(pthread_create(&other, NULL, send_value, &sent) == 0);
    CHECK(ioctl(vcpu, KVM_RUN, 0) == -1 && errno == EINTR && pthread_join(other, NULL) == 0);
    CHECK(handled == i + 1 && refused == 0 && value == 77);
  }
  handled = 0;
  CHECK(signal(SIGALRM, jump_back) == SIG_DFL);
  for (volatile int round = 1; round <= 3; ++round) {
    set_alarm();
    if (sigsetjmp(back, 1) == 0) {
      ioctl(vcpu, KVM_RUN, 0);
      CHECK(!"left by force");
    }
    struct kvm_regs regs;
    CHECK(handled == round && ioctl(vcpu, KVM_GET_REGS, &regs) == 0);
  }
  handled = 0;
  CHECK(sigset(SIGUSR2, on_signal) == SIG_DFL);
  sent.number = SIGUSR2;
  CHECK(pthread_create(&other, NULL, send_number, &sent) == 0);
  CHECK(ioctl(vcpu, KVM_RUN, 0) == -1 && errno == EINTR && handled == 1 && pthread_join(other, NULL) == 0);
  CHECK(sigset(SIGUSR2, SIG_HOLD) == on_signal && sigset(SIGUSR2, SIG_DFL) == SIG_HOLD);
  CHECK(sigignore(SIGUSR2) == 0 && sigset(SIGUSR2, SIG_DFL) == SIG_IGN);
}
#pragma GCC diagnostic pop

// A thread that may be cancelled anywhere is cancelled in the middle of the guest, and its vCPU can be used
// again.
static void* run_and_wait(void* unused) {
  (void)unused;
  CHECK(pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, NULL) == 0);
  ioctl(vcpu, KVM_RUN, 0);
  return NULL;
}
void test_cancel(void) {
  make_machine(spins, sizeof spins);
  for (int round = 0; round < 20; ++round) {
    pthread_t other;
    void* result = NULL;
    CHECK(pthread_create(&other, NULL, run_and_wait, NULL) == 0);
    if (round % 2 == 0) usleep(5000);
    CHECK(pthread_cancel(other) == 0);
    CHECK(pthread_join(other, &result) == 0 && result == PTHREAD_CANCELED);
  }
  struct kvm_regs regs;
  CHECK(ioctl(vcpu, KVM_GET_REGS, &regs) == 0 && regs.rip >= code && regs.rip < code + sizeof spins);
}

// No ioctl is a cancellation point: a thread of the default type, also one that was of the other before, and
// one that has cancellation off, does what it does in between.
static void* ask_on(void* later) {
  int result = 0;
  CHECK(pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, NULL) == 0);
  if (later == NULL)
    CHECK(pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, NULL) == 0);
  else
    CHECK(pthread_setcanceltype(PTHREAD_CANCEL_DEFERRED, NULL) == 0);
  CHECK(pthread_cancel(pthread_self()) == 0);
  for (int i = 0; i < 10; ++i) result += ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_IMMEDIATE_EXIT);
  CHECK(ioctl(vcpu, KVM_RUN, 0) == 0 && run->exit_reason == KVM_EXIT_HLT);
  CHECK(result == 10);
  CHECK(pthread_setcancelstate(PTHREAD_CANCEL_ENABLE, NULL) == 0);
  pthread_testcancel();
  return NULL;
}
static void* cancel_myself(void* unused) {
  (void)unused;
  CHECK(pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, NULL) == 0);
  CHECK(pthread_cancel(pthread_self()) == 0);
  CHECK(0);
  return NULL;
}
void test_cancel_later(void) {
  static const uint8_t halts[] = {0xf4, 0xf4};
  make_machine(halts, sizeof halts);
  pthread_t other;
  void* result = NULL;
  CHECK(pthread_create(&other, NULL, ask_on, NULL) == 0);
  CHECK(pthread_join(other, NULL) == 0);
  CHECK(pthread_create(&other, NULL, ask_on, "later") == 0);
  CHECK(pthread_join(other, &result) == 0 && result == PTHREAD_CANCELED);
  CHECK(pthread_create(&other, NULL, cancel_myself, NULL) == 0);
  CHECK(pthread_join(other, &result) == 0 && result == PTHREAD_CANCELED);
}

// A machine whose guest spins, and leaves by a port when its LAPIC's timer expires, which it does without
// exits before.
enum { tick_vector = 0x40, tick_port = 0x10 };
static void make_ticking_machine(void) {
  static const uint8_t program[] = {0xfb, 0xeb, 0xfe, 0xe6,
                                    tick_port};  // sti; jmp itself; out %al, $tick_port
  make_vm(program, sizeof program);
  CHECK(ioctl(vm, KVM_CREATE_IRQCHIP, 0) == 0);
  make_vcpu();
  const uint16_t handler[2] = {code + 3, 0};
  memcpy(ram + tick_vector * 4, handler, sizeof handler);
}
// In 20 ms.
static void expect_a_tick(void) {
  begin(vcpu);
  struct kvm_lapic_state lapic;
  CHECK(ioctl(vcpu, KVM_GET_LAPIC, &lapic) == 0);
  const struct {
    unsigned offset;
    uint32_t value;
  } registers[] = {{0xf0, 0x1ff}, {0x3e0, 0xb}, {0x320, tick_vector}, {0x380, 20000000}, {0x390, 20000000}};
  memset(lapic.regs + 0x100, 0, 0x80);  // nothing in service
  for (size_t i = 0; i < sizeof registers / sizeof *registers; ++i)
    memcpy(lapic.regs + registers[i].offset, &registers[i].value, 4);
  CHECK(ioctl(vcpu, KVM_SET_LAPIC, &lapic) == 0);
  CHECK(ioctl(vcpu, KVM_RUN, 0) == 0);
  CHECK(run->exit_reason == KVM_EXIT_IO && run->io.port == tick_port);
}

// The client's use of each signal, also one that the library uses, does not keep the guest's timer from it,
// nor the other way round.
void test_alarm(void) {
  make_ticking_machine();
  expect_a_tick();
  for (int number = SIGRTMIN; number <= SIGRTMAX; ++number) {
    struct sigaction action = {.sa_handler = on_signal}, old;
    CHECK(sigaction(number, NULL, &old) == 0 && old.sa_handler == SIG_DFL && old.sa_flags == 0);
    CHECK(sigaction(number, &action, NULL) == 0);
    handled = 0;
    expect_a_tick();
    CHECK(handled == 0);
    // Again and again: the first may come before the guest runs.
    const struct itimerspec often = {.it_value = {.tv_nsec = 5000000}, .it_interval = {.tv_nsec = 5000000}};
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = number};
    timer_t timer;
    CHECK(timer_create(CLOCK_MONOTONIC, &event, &timer) == 0 && timer_settime(timer, 0, &often, NULL) == 0);
    begin(vcpu);
    CHECK(ioctl(vcpu, KVM_RUN, 0) == -1 && errno == EINTR && handled > 0);
    CHECK(timer_delete(timer) == 0);
    handled = 0;
    expect_a_tick();
    CHECK(handled == 0);
  }
}

// Nor does a client that wants no signal at all.
void test_blocked(void) {
  make_ticking_machine();
  sigset_t all;
  sigfillset(&all);
  CHECK(sigprocmask(SIG_BLOCK, &all, NULL) == 0);
  expect_a_tick();
  CHECK(pthread_sigmask(SIG_SETMASK, &all, NULL) == 0);
  expect_a_tick();
  CHECK(sigprocmask(SIG_BLOCK, &all, NULL) == 0);
  expect_a_tick();
}
