// The machine of the client's tests, those of descriptors and ioctls, and which there are.
#include "client.h"

#include <liburing.h>
#include <poll.h>
#include <sys/wait.h>

int dev, vm, vcpu;
uint8_t* ram;
struct kvm_run* run;

void begin(int fd) {
  struct kvm_sregs sregs;
  CHECK(ioctl(fd, KVM_GET_SREGS, &sregs) == 0);
  sregs.cs.base = 0;
  sregs.cs.selector = 0;
  CHECK(ioctl(fd, KVM_SET_SREGS, &sregs) == 0);
  struct kvm_regs regs = {.rip = code, .rflags = 2};
  CHECK(ioctl(fd, KVM_SET_REGS, &regs) == 0);
}

void make_vm(const void* program, size_t size) {
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
void make_vcpu(void) {
  vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
  CHECK(vcpu >= 0);
  const int mapped = ioctl(dev, KVM_GET_VCPU_MMAP_SIZE, 0);
  CHECK(mapped >= (int)sizeof *run);
  run = mmap(NULL, (size_t)mapped, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
  CHECK(run != MAP_FAILED);
  begin(vcpu);
}

void make_machine(const void* program, size_t size) {
  make_vm(program, size);
  make_vcpu();
}

uint8_t next_out(void) {
  CHECK(ioctl(vcpu, KVM_RUN, 0) == 0);
  CHECK(run->exit_reason == KVM_EXIT_IO && run->io.direction == KVM_EXIT_IO_OUT);
  return ((uint8_t*)run)[run->io.data_offset];
}

const uint8_t counts[6] = {0xb0, 1, 0xe6, 0x10, 0xeb, 0xfa};
const uint8_t spins[2] = {0xeb, 0xfe};

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

// io_uring would fill guest memory behind the library's back: a client is told to take another way.
static void test_uring(void) {
  struct io_uring ring;
  struct io_uring_params parameters = {0};
  CHECK(io_uring_queue_init(8, &ring, 0) == -EPERM);
  CHECK(io_uring_queue_init_params(8, &ring, &parameters) == -EPERM);
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
