// A client of /dev/kvm as others write them: plain C, <linux/kvm.h> and system calls. Each test is one word
// on the command line; exit status 0 when it holds, else what did not is on stderr.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <limits.h>
#include <linux/kvm.h>
#include <malloc.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CHECK(condition)                                                                             \
  do {                                                                                               \
    if (!(condition)) {                                                                              \
      fprintf(stderr, "line %d: %s (errno %d: %s)\n", __LINE__, #condition, errno, strerror(errno)); \
      exit(1);                                                                                       \
    }                                                                                                \
  } while (0)

enum { ram_size = 1 << 20, code = 0x8000 };

// Sanitizers that run beside the client, which is not built for them.
extern void __asan_init(void) __attribute__((weak));
extern void __tsan_init(void) __attribute__((weak));

static int dev, vm, vcpu;
static uint8_t* ram;
static struct kvm_run* run;

// Puts a vCPU into real mode at `code`.
static void begin(int fd) {
  struct kvm_sregs sregs;
  CHECK(ioctl(fd, KVM_GET_SREGS, &sregs) == 0);
  sregs.cs.base = 0;
  sregs.cs.selector = 0;
  CHECK(ioctl(fd, KVM_SET_SREGS, &sregs) == 0);
  struct kvm_regs regs = {.rip = code, .rflags = 2};
  CHECK(ioctl(fd, KVM_SET_REGS, &regs) == 0);
}

static void make_vm(const void* program, size_t size) {
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
}
static void make_vcpu(void) {
  vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
  CHECK(vcpu >= 0);
  const int mapped = ioctl(dev, KVM_GET_VCPU_MMAP_SIZE, 0);
  CHECK(mapped >= (int)sizeof *run);
  run = mmap(NULL, (size_t)mapped, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
  CHECK(run != MAP_FAILED);
  begin(vcpu);
}

// A machine in real mode that begins at `code`.
static void make_machine(const void* program, size_t size) {
  make_vm(program, size);
  make_vcpu();
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
  // What the kernel refuses changes nothing.
  CHECK(dup2(60, 51) == -1 && errno == EBADF && dup3(60, 51, 0) == -1 && errno == EBADF);
  CHECK(dup3(0, 51, -1) == -1 && errno == EINVAL);
  CHECK(close_range(51, 51, 1 << 30) == -1 && errno == EINVAL);
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
    // /dev/kvm is no process's, and a machine of its own it may have.
    CHECK(ioctl(dev, KVM_GET_API_VERSION, 0) == KVM_API_VERSION);
    const int another = ioctl(dev, KVM_CREATE_VM, 0);
    CHECK(another >= 0 && ioctl(another, KVM_CREATE_VCPU, 0) >= 0);
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

// The same by calls that take a list of buffers; one that is too long is the kernel's to refuse.
static void test_vectors(void) {
  make_machine(counts, sizeof counts);
  CHECK(next_out() == 1);
  const long page = sysconf(_SC_PAGESIZE);
  char* pages = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  CHECK(pages != MAP_FAILED && mprotect(pages + page, page, PROT_NONE) == 0);
  struct iovec* last = (struct iovec*)(pages + page) - 1;
  *last = (struct iovec){ram + code + 1, 1};
  int sockets[2];
  CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) == 0 && write(sockets[1], "\2\3", 2) == 2);
  CHECK(readv(sockets[0], last, IOV_MAX + 1) == -1 && errno == EINVAL);
  CHECK(readv(sockets[0], last, 1) == 1);
  CHECK(next_out() == 2);
  struct msghdr message = {.msg_iov = last, .msg_iovlen = IOV_MAX + 1};
  CHECK(recvmsg(sockets[0], &message, 0) == -1 && errno == EMSGSIZE);
  message.msg_iovlen = 1;
  CHECK(recvmsg(sockets[0], &message, 0) == 1);
  CHECK(next_out() == 3);
  CHECK(munmap(pages, 2 * page) == 0 && close(sockets[0]) == 0 && close(sockets[1]) == 0);
}

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
static void test_unblocked(void) {
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

// A guard of ours does not outlive the memory that it was for, and is not put on the client's own protection.
static const char* protection_of(const void* address) {
  static char line[512];
  FILE* maps = fopen("/proc/self/maps", "r");
  CHECK(maps != NULL);
  unsigned long first, last;
  char* found = NULL;
  while (found == NULL && fgets(line, sizeof line, maps) != NULL)
    if (sscanf(line, "%lx-%lx", &first, &last) == 2 && (uintptr_t)address >= first &&
        (uintptr_t)address < last)
      found = strchr(line, ' ') + 1;
  CHECK(found != NULL && fclose(maps) == 0);
  found[4] = 0;
  return found;
}
static void remove_slot(void) {
  struct kvm_userspace_memory_region region = {.userspace_addr = (uintptr_t)ram};
  CHECK(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) == 0);
}
static void test_protection(void) {
  uint8_t* const page = (make_machine(counts, sizeof counts), ram + code);
  // The client's own, before the guest runs from it and after.
  CHECK(mprotect(page, 4096, PROT_READ) == 0 && next_out() == 1);
  CHECK(strcmp(protection_of(page), "r--p") == 0);
  CHECK(mprotect(page, 4096, PROT_READ | PROT_WRITE) == 0);
  page[1] = 2;
  CHECK(next_out() == 2);
  CHECK(mprotect(page, 4096, PROT_READ) == 0 && next_out() == 2);
  remove_slot();
  CHECK(strcmp(protection_of(page), "r--p") == 0);
  // Something else lies there when the slot goes.
  make_machine(counts, sizeof counts);
  CHECK(next_out() == 1 && munmap(ram, ram_size) == 0);
  void* const other =
      mmap(ram, ram_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
  CHECK(other == ram);
  remove_slot();
  CHECK(strcmp(protection_of(ram + code), "---p") == 0);
}

// What the guest has run is not run again when its memory is another.
static void test_mappings(void) {
  make_machine(counts, sizeof counts);
  uint8_t* const page = ram + code;
  const int anonymous = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
  static uint8_t twos[4096] = {0xb0, 2, 0xe6, 0x10, 0xeb, 0xfa};
  const int file = memfd_create("twos", 0);
  CHECK(file >= 0 && write(file, twos, sizeof twos) == (ssize_t)sizeof twos);
  CHECK(next_out() == 1);
  CHECK(mmap(page, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, file, 0) == page);
  CHECK(next_out() == 2);
  page[1] = 3;
  CHECK(next_out() == 3 && madvise(page, 4096, MADV_DONTNEED) == 0);
  CHECK(next_out() == 2);
  CHECK(mmap(page, 4096, PROT_READ | PROT_WRITE, anonymous, -1, 0) == page);
  memcpy(page, counts, sizeof counts);
  CHECK(next_out() == 1);
  void* const spare = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
  CHECK(spare != MAP_FAILED && mremap(spare, 4096, 4096, MREMAP_MAYMOVE | MREMAP_FIXED, page) == page);
  CHECK(next_out() == 2);
  FILE* const stream = tmpfile();
  CHECK(stream != NULL && fwrite("\xb0\4", 1, 2, stream) == 2);
  rewind(stream);
  CHECK(setvbuf(stream, NULL, _IONBF, 0) == 0 && fread(page, 1, 2, stream) == 2);
  CHECK(next_out() == 4 && fclose(stream) == 0);
  CHECK(getrandom(page + 2048, 16, 0) == 16);
}

// A descriptor of ours as the kernel's.
static void test_generic(void) {
  make_machine(counts, sizeof counts);
  char byte;
  struct pollfd both = {.fd = vm, .events = POLLIN | POLLOUT};
  CHECK(read(vm, &byte, 1) <= 0);  // at once
  CHECK(ioctl(vm, FIONCLEX) == 0 && (fcntl(vm, F_GETFD) & FD_CLOEXEC) == 0);
  CHECK(ioctl(vm, FIOCLEX) == 0 && (fcntl(vm, F_GETFD) & FD_CLOEXEC) != 0);
  CHECK(poll(&both, 1, 0) == 1 && both.revents == (POLLIN | POLLOUT));
  CHECK(mmap(NULL, 4096, PROT_READ, MAP_SHARED, dev, 0) == MAP_FAILED && errno == ENODEV);
  CHECK(open("/dev/kvm", O_RDWR | O_CREAT | O_EXCL, 0600) == -1 && errno == EEXIST);
  CHECK(open("/dev/kvm", O_RDWR | O_DIRECTORY) == -1 && errno == ENOTDIR);
  FILE* const stream = fdopen(dup(vm), "r");
  const int number = fileno(stream);
  CHECK(fclose(stream) == 0 && open("/dev/zero", O_RDONLY) == number);
  CHECK(ioctl(number, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY) == -1 && errno == ENOTTY);
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
static void test_handler(void) {
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
static void test_cancel(void) {
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
static void test_cancel_later(void) {
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

// Arguments that are longer than the numbers they hold, and a limit that changes nothing.
static void test_arguments(void) {
  make_machine(spins, sizeof spins);
  const unsigned long high = 1ul << 32;
  CHECK(ioctl(vm, KVM_CREATE_VCPU, high | 1) == -1 && errno == EINVAL);
  CHECK(ioctl(vm, KVM_SET_BOOT_CPU_ID, high) == -1 && errno == EINVAL);
  CHECK(ioctl(vm, KVM_SET_NR_MMU_PAGES, 64ul) == 0);
  CHECK(ioctl(vm, KVM_SET_NR_MMU_PAGES, 1ul) == -1 && errno == EINVAL);
}

// The first forms of what has got a second one since: the timer's channels without flags, CPUID without
// index.
static void test_first_forms(void) {
  // xor %eax, %eax; cpuid; mov %bl, %al; outb %al, $0x10
  static const uint8_t identifies[] = {0x66, 0x31, 0xc0, 0x0f, 0xa2, 0x88, 0xd8, 0xe6, 0x10};
  make_vm(identifies, sizeof identifies);
  struct kvm_pit_state pit;
  CHECK(ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_PIT) == 1);
  CHECK(ioctl(vm, KVM_CREATE_IRQCHIP, 0) == 0);
  CHECK(ioctl(vm, KVM_GET_PIT, &pit) == -1 && errno == ENXIO);
  struct kvm_pit_config config = {.flags = 0};
  CHECK(ioctl(vm, KVM_CREATE_PIT2, &config) == 0);
  struct kvm_pit_state2 all;
  CHECK(ioctl(vm, KVM_GET_PIT2, &all) == 0);
  all.flags |= KVM_PIT_FLAGS_HPET_LEGACY;
  all.channels[2].count = 0x1234;
  CHECK(ioctl(vm, KVM_SET_PIT2, &all) == 0);
  memset(&pit, 0xff, sizeof pit);
  CHECK(ioctl(vm, KVM_GET_PIT, &pit) == 0 && pit.channels[2].count == 0x1234);
  pit.channels[2].count = 0x4321;
  CHECK(ioctl(vm, KVM_SET_PIT, &pit) == 0);
  CHECK(ioctl(vm, KVM_GET_PIT2, &all) == 0 && all.channels[2].count == 0x4321);
  CHECK((all.flags & KVM_PIT_FLAGS_HPET_LEGACY) != 0);
  CHECK(ioctl(vm, KVM_GET_PIT, NULL) == -1 && errno == EFAULT);

  make_vcpu();
  enum { most = 256 };
  struct kvm_cpuid* old = calloc(1, sizeof *old + (most + 1) * sizeof *old->entries);
  struct kvm_cpuid2* new = calloc(1, sizeof *new + most * sizeof *new->entries);
  CHECK(old != NULL && new != NULL);
  old->nent = most + 1;
  CHECK(ioctl(vcpu, KVM_SET_CPUID, old) == -1 && errno == E2BIG);
  old->nent = 2;
  old->entries[0] = (struct kvm_cpuid_entry){.function = 0, .eax = 1, .ebx = 0x42, .ecx = 3, .edx = 4};
  old->entries[1] = (struct kvm_cpuid_entry){.function = 1, .eax = 5};
  CHECK(ioctl(vcpu, KVM_SET_CPUID, old) == 0);
  new->nent = most;
  CHECK(ioctl(vcpu, KVM_GET_CPUID2, new) == 0 && new->nent >= 2);
  CHECK(new->entries[0].index == 0 && new->entries[0].flags == 0 && new->entries[1].function == 1);
  CHECK(new->entries[0].eax == 1 && new->entries[0].ebx == 0x42 && new->entries[0].ecx == 3 &&
        new->entries[0].edx == 4 && new->entries[1].eax == 5);
  CHECK(next_out() == 0x42);
  free(old);
  free(new);
  CHECK(close(vcpu) == 0 && close(vm) == 0);  // AddressSanitizer does not see what a living vCPU holds
}

// A dirty log that has nowhere to go; what else is wrong is said first.
static void test_no_bitmap(void) {
  make_vm(spins, sizeof spins);
  struct kvm_enable_cap manual = {.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
                                  .args = {KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE}};
  CHECK(ioctl(vm, KVM_ENABLE_CAP, &manual) == 0);
  struct kvm_userspace_memory_region region = {
      .memory_size = ram_size, .flags = KVM_MEM_LOG_DIRTY_PAGES, .userspace_addr = (uintptr_t)ram};
  CHECK(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) == 0);
  struct kvm_dirty_log log = {.slot = 0};
  CHECK(ioctl(vm, KVM_GET_DIRTY_LOG, &log) == -1 && errno == EFAULT);
  log.slot = 1;
  CHECK(ioctl(vm, KVM_GET_DIRTY_LOG, &log) == -1 && errno == ENOENT);
  struct kvm_clear_dirty_log clear = {.slot = 0, .num_pages = 64};
  CHECK(ioctl(vm, KVM_CLEAR_DIRTY_LOG, &clear) == -1 && errno == EFAULT);
  clear.num_pages = ~0u;
  CHECK(ioctl(vm, KVM_CLEAR_DIRTY_LOG, &clear) == -1 && errno == EINVAL);
  clear.num_pages = 0;
  CHECK(ioctl(vm, KVM_CLEAR_DIRTY_LOG, &clear) == 0);
}

// Two vCPUs of a machine write to the one ring, which each mapping shows, also one made by itself.
static void test_coalesced(void) {
  // mov $0xb8000 >> 4, %ax; mov %ax, %ds; movb $7, 0; outb %al, $0x10
  static const uint8_t writes[] = {0xb8, 0x00, 0xb8, 0x8e, 0xd8, 0xc6, 0x06, 0, 0, 7, 0xe6, 0x10, 0xeb, 0xf2};
  make_machine(writes, sizeof writes);
  const int page = ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_COALESCED_MMIO);
  CHECK(page > 0 && ioctl(vm, KVM_CHECK_EXTENSION, KVM_CAP_COALESCED_PIO) == 1);
  struct kvm_userspace_memory_region low = {.memory_size = 0xa0000, .userspace_addr = (uintptr_t)ram},
                                     none = {0};
  CHECK(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &none) == 0 &&
        ioctl(vm, KVM_SET_USER_MEMORY_REGION, &low) == 0);
  struct kvm_coalesced_mmio_zone zone = {.addr = 0xb8000, .size = 0x8000};
  CHECK(ioctl(vm, KVM_REGISTER_COALESCED_MMIO, &zone) == 0);
  struct kvm_coalesced_mmio_ring* ring = (void*)((uint8_t*)run + page * 4096);
  CHECK(next_out() == 0 && ring->first == 0 && ring->last == 1);
  CHECK(ring->coalesced_mmio[0].phys_addr == 0xb8000 && ring->coalesced_mmio[0].data[0] == 7);
  const int second = ioctl(vm, KVM_CREATE_VCPU, 1);
  CHECK(second >= 0);
  struct kvm_coalesced_mmio_ring* same =
      mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, second, page * 4096);
  CHECK(same != MAP_FAILED && same->last == 1);
  same->first = 1;
  CHECK(ring->first == 1);
  CHECK(ioctl(vm, KVM_UNREGISTER_COALESCED_MMIO, &zone) == 0);
  CHECK(ioctl(vcpu, KVM_RUN, 0) == 0 && run->exit_reason == KVM_EXIT_MMIO && ring->last == 1);
}

static int count_descriptors(void) {
  int count = 0;
  for (int fd = 0; fd < 1024; ++fd) count += fcntl(fd, F_GETFD) >= 0;
  return count;
}

static int count_lines(const char* path) {
  FILE* const file = fopen(path, "r");
  CHECK(file != NULL);
  int count = 0;
  for (int character; (character = fgetc(file)) != EOF;) count += character == '\n';
  fclose(file);
  return count;
}

static long resident_pages(void) {
  FILE* const file = fopen("/proc/self/statm", "r");
  long size = 0, resident = 0;
  CHECK(file != NULL && fscanf(file, "%ld %ld", &size, &resident) == 2);
  fclose(file);
  return resident;
}

struct held {
  int descriptors, mappings;
  long resident;
  size_t heap;
};
static struct held held_now(void) {
  const struct held held = {count_descriptors(), count_lines("/proc/self/maps"), resident_pages(),
                            mallinfo2().uordblks};
  return held;
}

static void* run_second(void* descriptor) {
  CHECK(ioctl(*(int*)descriptor, KVM_RUN, 0) == 0);
  return NULL;
}

// A machine with two vCPUs, of which each has a thread, interrupt controllers, a timer, a dirty log and both
// kinds of eventfd: everything that could keep something.
static void live_and_die(void) {
  dev = open("/dev/kvm", O_RDWR | O_CLOEXEC);
  CHECK(dev >= 0);
  const int mapped = ioctl(dev, KVM_GET_VCPU_MMAP_SIZE, 0);
  ram = mmap(NULL, ram_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  CHECK(ram != MAP_FAILED);
  vm = ioctl(dev, KVM_CREATE_VM, 0);
  CHECK(vm >= 0 && ioctl(vm, KVM_CREATE_IRQCHIP, 0) == 0);
  struct kvm_pit_config pit = {.flags = 0};
  CHECK(ioctl(vm, KVM_CREATE_PIT2, &pit) == 0);
  struct kvm_userspace_memory_region region = {.memory_size = ram_size / 2, .userspace_addr = (uintptr_t)ram};
  CHECK(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) == 0);
  region = (struct kvm_userspace_memory_region){.slot = 1,
                                                .flags = KVM_MEM_LOG_DIRTY_PAGES,
                                                .guest_phys_addr = 1 << 20,
                                                .memory_size = ram_size / 2,
                                                .userspace_addr = (uintptr_t)ram + ram_size / 2};
  CHECK(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region) == 0);
  const int event = eventfd(0, EFD_CLOEXEC);
  struct kvm_irqfd irqfd = {.fd = (uint32_t)event, .gsi = 5};
  struct kvm_ioeventfd ioeventfd = {.addr = 0x30, .len = 1, .fd = event, .flags = KVM_IOEVENTFD_FLAG_PIO};
  CHECK(event >= 0 && ioctl(vm, KVM_IRQFD, &irqfd) == 0 && ioctl(vm, KVM_IOEVENTFD, &ioeventfd) == 0);
  // Both write to the eventfd's port, and then to another, which is an exit.
  static const uint8_t program[] = {0xb0, 1, 0xe6, 0x30, 0xe6, 0x10, 0xeb, 0xf8};
  memcpy(ram + code, program, sizeof program);
  int vcpus[2];
  struct kvm_run* runs[2];
  for (int i = 0; i < 2; ++i) {
    vcpus[i] = ioctl(vm, KVM_CREATE_VCPU, i);
    CHECK(vcpus[i] >= 0);
    runs[i] = mmap(NULL, (size_t)mapped, PROT_READ | PROT_WRITE, MAP_SHARED, vcpus[i], 0);
    CHECK(runs[i] != MAP_FAILED);
    struct kvm_mp_state state = {KVM_MP_STATE_RUNNABLE};
    CHECK(ioctl(vcpus[i], KVM_SET_MP_STATE, &state) == 0);
    begin(vcpus[i]);
  }
  pthread_t other;
  CHECK(pthread_create(&other, NULL, run_second, &vcpus[1]) == 0);
  CHECK(ioctl(vcpus[0], KVM_RUN, 0) == 0 && pthread_join(other, NULL) == 0);
  CHECK(runs[0]->exit_reason == KVM_EXIT_IO && runs[1]->exit_reason == KVM_EXIT_IO);
  ram[code] = 0xb1;  // the page is guarded
  // In the order of somebody who forgets that a vCPU holds its VM.
  CHECK(close(vm) == 0 && close(dev) == 0 && close(event) == 0);
  for (int i = 0; i < 2; ++i) CHECK(close(vcpus[i]) == 0 && munmap(runs[i], (size_t)mapped) == 0);
  CHECK(munmap(ram, ram_size) == 0);
}

// Machines come and go without leaving anything.
static void test_leaks(void) {
  enum { first = 100 };
  const int rounds = __tsan_init == NULL ? 1000 : 200;  // it is slow, and looks for something else
  struct held before = {0};
  for (int round = 0; round < rounds; ++round) {
    live_and_die();
    if (round == first) before = held_now();
  }
  const struct held after = held_now();
  fprintf(stderr, "descriptors %d, %d; mappings %d, %d; resident pages %ld, %ld; heap %zu, %zu\n",
          before.descriptors, after.descriptors, before.mappings, after.mappings, before.resident,
          after.resident, before.heap, after.heap);
  CHECK(after.descriptors == before.descriptors);
  // Sanitizers keep memory for their own purposes; AddressSanitizer finds leaks itself.
  if (__asan_init != NULL || __tsan_init != NULL) return;
  // Not one byte, mapping or page a machine.
  CHECK(after.heap < before.heap + (rounds - first));
  CHECK(after.mappings < before.mappings + (rounds - first) / 10);
  CHECK(after.resident < before.resident + (rounds - first));
}

// io_uring would fill guest memory behind the library's back: a client is told to take another way.
static void test_uring(void) {
  struct io_uring ring;
  struct io_uring_params parameters = {0};
  CHECK(io_uring_queue_init(8, &ring, 0) == -EPERM);
  CHECK(io_uring_queue_init_params(8, &ring, &parameters) == -EPERM);
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
static void test_alarm(void) {
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
static void test_blocked(void) {
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

static const struct {
  const char* name;
  void (*test)(void);
} tests[] = {{"run", test_run},
             {"descriptors", test_descriptors},
             {"fork", test_fork},
             {"writes", test_writes},
             {"vectors", test_vectors},
             {"protection", test_protection},
             {"mappings", test_mappings},
             {"generic", test_generic},
             {"handler", test_handler},
             {"signal", test_signal},
             {"mask", test_mask},
             {"alarm", test_alarm},
             {"blocked", test_blocked},
             {"immediate", test_immediate},
             {"kick", test_kick},
             {"unblocked", test_unblocked},
             {"cancel", test_cancel},
             {"cancel_later", test_cancel_later},
             {"arguments", test_arguments},
             {"first_forms", test_first_forms},
             {"no_bitmap", test_no_bitmap},
             {"leaks", test_leaks},
             {"coalesced", test_coalesced},
             {"uring", test_uring}};

int main(int argc, char** argv) {
  for (size_t i = 0; i < sizeof tests / sizeof *tests; ++i)
    if (argc == 2 && strcmp(argv[1], tests[i].name) == 0) {
      tests[i].test();
      return 0;
    }
  fprintf(stderr, "usage: client TEST\n");
  return 2;
}
