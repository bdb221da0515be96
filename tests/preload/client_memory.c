// Guest memory that the client changes, maps anew and gives back, and what machines leave behind.
#include <limits.h>
#include <malloc.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "client.h"

// The VMM changes code that has run: by a store, and by a system call that reads into it.
void test_writes(void) {
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
void test_vectors(void) {
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
void test_protection(void) {
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
void test_mappings(void) {
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
void test_leaks(void) {
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
