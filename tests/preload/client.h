// A client of /dev/kvm as others write them: plain C, <linux/kvm.h> and system calls. Each test is one word
// on the command line; exit status 0 when it holds, else what did not is on stderr.
#pragma once

#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define CHECK(condition)                                                                                     \
  do {                                                                                                       \
    if (!(condition)) {                                                                                      \
      fprintf(stderr, "%s:%d: %s (errno %d: %s)\n", __FILE__, __LINE__, #condition, errno, strerror(errno)); \
      exit(1);                                                                                               \
    }                                                                                                        \
  } while (0)

// Sanitizers that run beside the client, which is not built for them.
extern void __asan_init(void) __attribute__((weak));
extern void __tsan_init(void) __attribute__((weak));

enum { ram_size = 1 << 20, code = 0x8000 };

// The machine of a test.
extern int dev, vm, vcpu;
extern uint8_t* ram;
extern struct kvm_run* run;

// mov $1, %al; out %al, $0x10; jmp to the start.
extern const uint8_t counts[6];
extern const uint8_t spins[2];

// Puts a vCPU into real mode at `code`.
void begin(int fd);
// A machine in real mode that begins at `code`; or its two halves.
void make_machine(const void* program, size_t size);
void make_vm(const void* program, size_t size);
void make_vcpu(void);
// Runs to the next output to a port, and gives the byte.
uint8_t next_out(void);

// client_memory.c
void test_writes(void);
void test_vectors(void);
void test_protection(void);
void test_mappings(void);
void test_leaks(void);

// client_signals.c
void test_signal(void);
void test_mask(void);
void test_immediate(void);
void test_kick(void);
void test_unblocked(void);
void test_handler(void);
void test_cancel(void);
void test_cancel_later(void);
void test_alarm(void);
void test_blocked(void);
