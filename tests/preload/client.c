// A client of /dev/kvm as others write them: plain C, <linux/kvm.h> and system calls. Each test is one word on the
// command line; exit status 0 when it holds, else what did not is on stderr.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(condition)                                                                   \
  do {                                                                                     \
    if (!(condition)) {                                                                    \
      fprintf(stderr, "line %d: %s (errno %d: %s)\n", __LINE__, #condition, errno, strerror(errno)); \
      exit(1);                                                                             \
    }                                                                                      \
  } while (0)

enum { ram_size = 1 << 20, code = 0x8000 };

static int dev, vm, vcpu;
static uint8_t* ram;
static struct kvm_run* run;

// A machine in real mode that begins at `code`.
static void make_machine(const void* program, size_t size) {
  dev = open("/dev/kvm", O_RDWR | O_CLOEXEC);
  CHECK(dev >= 0);
  CHECK(ioctl(dev, KVM_GET_API_VERSION, 0) == KVM_API_VERSION);
  vm = ioctl(dev, KVM_CREATE_VM, 0);
  CHECK(vm >= 0);
  ram = mmap(NULL, ram_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  CHECK(ram != MAP_FAILED);
  memcpy(ram + code, program, size);
  struct kvm_userspace_memory_region region = {.memory_size = ram_size, .userspace_addr = (uintptr_t)ram};
  CHECK(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) == 0);
  vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
  CHECK(vcpu >= 0);
  const int mapped = ioctl(dev, KVM_GET_VCPU_MMAP_SIZE, 0);
  CHECK(mapped >= (int)sizeof *run);
  run = mmap(NULL, (size_t)mapped, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
  CHECK(run != MAP_FAILED);
  struct kvm_sregs sregs;
  CHECK(ioctl(vcpu, KVM_GET_SREGS, &sregs) == 0);
  sregs.cs.base = 0;
  sregs.cs.selector = 0;
  CHECK(ioctl(vcpu, KVM_SET_SREGS, &sregs) == 0);
  struct kvm_regs regs = {.rip = code, .rflags = 2};
  CHECK(ioctl(vcpu, KVM_SET_REGS, &regs) == 0);
}

static uint8_t next_out(void) {
  CHECK(ioctl(vcpu, KVM_RUN, 0) == 0);
  CHECK(run->exit_reason == KVM_EXIT_IO && run->io.direction == KVM_EXIT_IO_OUT);
  return ((uint8_t*)run)[run->io.data_offset];
}

// mov $1, %al; out %al, $0x10; jmp to the start.
static const uint8_t counts[] = {0xb0, 1, 0xe6, 0x10, 0xeb, 0xfa};
static const uint8_t spins[] = {0xeb, 0xfe};

static void test_run(void) {
  make_machine(counts, sizeof counts);
  for (int i = 0; i < 3; ++i) CHECK(next_out() == 1);
  CHECK(ioctl(vcpu, KVM_RUN, 1) == -1 && errno == EINVAL);
  CHECK(ioctl(vm, KVM_RUN, 0) == -1 && errno == ENOTTY);
  CHECK(ioctl(dev, KVM_CREATE_VM, 77) == -1 && errno == EINVAL);
}

// Whichever descriptor is the last one keeps the object.
static void test_descriptors(void) {
  make_machine(counts, sizeof counts);
  CHECK((fcntl(vm, F_GETFD) & FD_CLOEXEC) != 0 && (fcntl(vcpu, F_GETFD) & FD_CLOEXEC) != 0);
  const int second = dup(vcpu);
  CHECK(second >= 0 && close(vcpu) == 0 && close(vm) == 0 && close(dev) == 0);
  CHECK(ioctl(vcpu, KVM_RUN, 0) == -1 && errno == EBADF);
  vcpu = second;
  CHECK(next_out() == 1);
  const int third = fcntl(vcpu, F_DUPFD_CLOEXEC, 100);
  CHECK(third >= 100 && dup2(third, 50) == 50 && dup3(50, 51, O_CLOEXEC) == 51);
  CHECK(close_range((unsigned)vcpu, (unsigned)vcpu, 0) == 0 && close(third) == 0 && close(50) == 0);
  vcpu = 51;
  CHECK(next_out() == 1);
  // Another file takes the number.
  const int null = open("/dev/null", O_RDWR);
  CHECK(null >= 0 && dup2(null, 51) == 51);
  CHECK(ioctl(51, KVM_RUN, 0) == -1 && errno == ENOTTY);
}

static void test_fork(void) {
  make_machine(counts, sizeof counts);
  const pid_t child = fork();
  CHECK(child >= 0);
  if (child == 0) {
    const int refused = ioctl(vcpu, KVM_RUN, 0) == -1 && errno == EIO;
    close(vcpu);
    close(vm);
    // A machine of its own.
    make_machine(counts, sizeof counts);
    _exit(refused && next_out() == 1 ? 0 : 1);
  }
  int status = 0;
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
  CHECK(next_out() == 1);
}

// The VMM changes code that has run: by a store, and by a system call that reads into it.
static void test_writes(void) {
  make_machine(counts, sizeof counts);
  for (int round = 0; round < 200; ++round) {
    CHECK(next_out() == 1);
    ram[code + 1] = 2;
    CHECK(next_out() == 2);
    int pipes[2];
    CHECK(pipe(pipes) == 0 && write(pipes[1], "\3", 1) == 1);
    CHECK(read(pipes[0], ram + code + 1, 1) == 1);
    CHECK(next_out() == 3);
    CHECK(close(pipes[0]) == 0 && close(pipes[1]) == 0);
    ram[code + 1] = 1;
  }
}

static volatile sig_atomic_t handled;
static volatile uintptr_t handler_stack;
static void on_signal(int number) {
  (void)number;
  int here;
  handler_stack = (uintptr_t)&here;
  handled = handled + 1;
  errno = 0;
}

static void set_alarm(void) {
  const struct itimerval soon = {.it_value = {.tv_usec = 20000}};
  CHECK(setitimer(ITIMER_REAL, &soon, NULL) == 0);
}

// A handler runs when KVM_RUN has returned, on the stack that it was promised.
static void test_signal(void) {
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
static void test_mask(void) {
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

static void test_immediate(void) {
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
static void test_kick(void) {
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

static int count_descriptors(void) {
  int count = 0;
  for (int fd = 0; fd < 1024; ++fd) count += fcntl(fd, F_GETFD) >= 0;
  return count;
}

// Machines come and go without leaving anything.
static void test_leaks(void) {
  int before = 0;
  for (int round = 0; round < 200; ++round) {
    make_machine(counts, sizeof counts);
    CHECK(next_out() == 1);
    CHECK(munmap(run, (size_t)ioctl(dev, KVM_GET_VCPU_MMAP_SIZE, 0)) == 0);
    CHECK(close(vcpu) == 0 && close(vm) == 0 && close(dev) == 0 && munmap(ram, ram_size) == 0);
    if (round == 10) before = count_descriptors();
  }
  CHECK(count_descriptors() == before);
}

static const struct {
  const char* name;
  void (*test)(void);
} tests[] = {{"run", test_run},   {"descriptors", test_descriptors}, {"fork", test_fork},
             {"writes", test_writes}, {"signal", test_signal},       {"mask", test_mask},
             {"immediate", test_immediate}, {"kick", test_kick},     {"leaks", test_leaks}};

int main(int argc, char** argv) {
  for (size_t i = 0; i < sizeof tests / sizeof *tests; ++i)
    if (argc == 2 && strcmp(argv[1], tests[i].name) == 0) {
      tests[i].test();
      return 0;
    }
  fprintf(stderr, "usage: client TEST\n");
  return 2;
}
