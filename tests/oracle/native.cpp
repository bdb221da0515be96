#include "native.hpp"

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstring>
#include <system_error>

namespace lodge::oracle {

struct Native::Shared {
  alignas(page) std::array<uint8_t, window_size> window;
  alignas(page) std::array<uint8_t, code_size> code;
  alignas(page) std::array<uint32_t, page / 4> counters;
  alignas(page) std::array<uint8_t, window_size> memory;
  uint32_t count = 0;
  volatile uint32_t current = 0;
  std::array<Case, batch> cases;
  std::array<Outcome, batch> outcomes;
};

namespace {

// Everything below runs in the child. A signal handler has no argument of its own, hence these; the parent
// never looks at them.
struct ChildContext {
  Native::Shared* shared;
  int in, out;
  bool running;
};
ChildContext* child_context = nullptr;

constexpr uint64_t trap_flag = 0x100, resume_flag = 0x10000;
// Of the signal frame's FP state: what the kernel keeps there for itself, and the XSAVE header.
constexpr unsigned software_bytes = 464, header_offset = 512, extended = 576;

constexpr int gpr_of_frame[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

uint32_t word_at(const uint8_t* bytes) {
  uint32_t value = 0;
  std::memcpy(&value, bytes, 4);
  return value;
}

// Size of the XSAVE area in the frame, as the kernel says in its software bytes.
unsigned frame_area(const uint8_t* frame) {
  return std::min(word_at(frame + software_bytes + 16), xsave_size);
}

void capture(const ucontext_t& context, const uint8_t* window, Outcome& out, bool whole) {
  const auto& g = context.uc_mcontext.gregs;
  for (unsigned i = 0; i < 16; ++i) out.state.gpr[i] = static_cast<uint64_t>(g[gpr_of_frame[i]]);
  out.state.rip = static_cast<uint64_t>(g[REG_RIP]);
  out.state.rflags = static_cast<uint64_t>(g[REG_EFL]) & ~resume_flag;
  const auto* frame = reinterpret_cast<const uint8_t*>(context.uc_mcontext.fpregs);
  out.state.xsave = {};
  std::memcpy(out.state.xsave.data(), frame, frame_area(frame));
  const auto vector = static_cast<int32_t>(g[REG_TRAPNO]);
  const bool stopped = whole ? vector == 3 : vector == 1;
  if (whole && stopped) out.state.rip -= 1;
  out.exception = stopped ? -1 : vector;
  out.error = stopped ? 0 : static_cast<uint64_t>(g[REG_ERR]);
  out.cr2 = vector == 14 ? static_cast<uint64_t>(g[REG_CR2]) : 0;
  std::memcpy(out.memory.data(), window, window_size);
}

void prepare(ucontext_t& context, const Case& c) {
  auto& g = context.uc_mcontext.gregs;
  for (unsigned i = 0; i < 16; ++i) g[gpr_of_frame[i]] = static_cast<greg_t>(c.state.gpr[i]);
  g[REG_RIP] = static_cast<greg_t>(c.state.rip);
  constexpr uint64_t selector_mask = 0xffff;
  g[REG_CSGSFS] = static_cast<greg_t>((static_cast<uint64_t>(g[REG_CSGSFS]) & ~selector_mask) |
                                      (c.bits32 ? selector_code32 : selector_code64));
  g[REG_EFL] = static_cast<greg_t>(c.whole ? c.state.rflags : c.state.rflags | trap_flag);
  auto* frame = reinterpret_cast<uint8_t*>(context.uc_mcontext.fpregs);
  uint64_t features = 0;
  std::memcpy(&features, frame + software_bytes + 8, 8);
  std::memcpy(frame, c.state.xsave.data(), software_bytes);
  std::memset(frame + header_offset, 0, 64);
  std::memcpy(frame + header_offset, &features, 8);
  std::memcpy(frame + extended, &c.state.xsave[extended], frame_area(frame) - extended);
}

void next_batch(ChildContext& child) {
  char token = 1;
  if (child.running && write(child.out, &token, 1) != 1) _exit(1);
  if (read(child.in, &token, 1) != 1) _exit(0);
  child.running = true;
  child.shared->current = 0;
}

void on_signal(int, siginfo_t*, void* raw) {
  // AC: this code is not careful about alignment. ID and NT: the kernel would carry them over into the next
  // case.
  asm volatile("pushfq; andl $~0x244000, (%%rsp); popfq" ::: "cc", "memory");
  // Signal frames leave the data segments alone.
  asm volatile("mov %0, %%ds; mov %0, %%es" ::"r"(uint32_t{selector_data}));
  auto& context = *static_cast<ucontext_t*>(raw);
  ChildContext& child = *child_context;
  Native::Shared& shared = *child.shared;
  if (child.running) {
    const uint32_t i = shared.current;
    capture(context, shared.window.data(), shared.outcomes[i], shared.cases[i].whole);
    shared.current = i + 1;
  }
  if (!child.running || shared.current >= shared.count) next_batch(child);
  const Case& c = shared.cases[shared.current];
  std::memcpy(shared.window.data(), shared.memory.data(), window_size);
  std::memset(shared.code.data(), 0xcc, code_size);
  std::memcpy(&shared.code[c.state.rip - code_base], c.code.data(), c.length);
  if (c.whole) shared.counters.fill(loop_count);
  prepare(context, c);
}

void confine() {
  sock_filter filter[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_rt_sigreturn, 4, 0),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_read, 3, 0),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_write, 2, 0),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_exit_group, 1, 0),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog program = {static_cast<unsigned short>(std::size(filter)), filter};
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 ||
      prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0)
    _exit(3);
}

void map_at(uint64_t address, size_t size, int protection, int fd, off_t offset) {
  if (mmap(reinterpret_cast<void*>(address), size, protection,
           MAP_SHARED | MAP_FIXED_NOREPLACE | MAP_POPULATE, fd, offset) == MAP_FAILED)
    _exit(4);
}

[[noreturn]] void child_main(ChildContext& child, int memory_fd, bool writable_code) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  child_context = &child;
  map_at(window_base, window_writable, PROT_READ | PROT_WRITE, memory_fd, offsetof(Native::Shared, window));
  map_at(window_base + window_writable, window_size - window_writable, PROT_READ, memory_fd,
         offsetof(Native::Shared, window) + static_cast<off_t>(window_writable));
  map_at(code_base, code_size, PROT_READ | PROT_EXEC | (writable_code ? PROT_WRITE : 0), memory_fd,
         offsetof(Native::Shared, code));
  map_at(counter_base, page, PROT_READ | PROT_WRITE, memory_fd, offsetof(Native::Shared, counters));

  constexpr size_t stack_size = 1 << 16;
  stack_t stack = {};
  stack.ss_sp =
      mmap(nullptr, stack_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  stack.ss_size = stack_size;
  struct sigaction action = {};
  action.sa_sigaction = on_signal;
  // Not masked while handled: a second fault inside the handler then kills instead of hanging.
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaltstack(&stack, nullptr);
  for (const int signal : {SIGTRAP, SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigaction(signal, &action, nullptr);
  // Compatibility mode looks at them; 64-bit processes start with null selectors.
  asm volatile("mov %0, %%ds; mov %0, %%es" ::"r"(uint32_t{selector_data}));
  confine();
  asm volatile("int3");
  _exit(5);
}

}  // namespace

Native::Native(bool writable_code) : writable_code_(writable_code) {
  memory_fd_ = memfd_create("lodge-oracle", MFD_CLOEXEC);
  if (memory_fd_ < 0 || ftruncate(memory_fd_, sizeof(Shared)) != 0)
    throw std::system_error(errno, std::generic_category(), "memory for the oracle");
  void* const at = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, memory_fd_, 0);
  if (at == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "memory for the oracle");
  shared_ = static_cast<Shared*>(at);
}

Native::~Native() {
  stop();
  munmap(shared_, sizeof(Shared));
  close(memory_fd_);
}

void Native::start() {
  int down[2], up[2];
  if (pipe(down) != 0 || pipe(up) != 0) throw std::system_error(errno, std::generic_category(), "pipe");
  child_ = fork();
  if (child_ < 0) throw std::system_error(errno, std::generic_category(), "fork");
  if (child_ == 0) {
    close(down[1]);
    close(up[0]);
    ChildContext context{shared_, down[0], up[1], false};
    child_main(context, memory_fd_, writable_code_);
  }
  close(down[0]);
  close(up[1]);
  to_child_ = down[1];
  from_child_ = up[0];
}

void Native::stop() {
  if (child_ < 0) return;
  kill(child_, SIGKILL);
  waitpid(child_, nullptr, 0);
  close(to_child_);
  close(from_child_);
  child_ = -1;
}

bool Native::run(std::span<const Case> cases, std::span<const uint8_t> memory, std::span<Outcome> outcomes,
                 unsigned& culprit) {
  if (child_ < 0) start();
  std::copy(cases.begin(), cases.end(), shared_->cases.begin());
  std::copy(memory.begin(), memory.end(), shared_->memory.begin());
  shared_->count = static_cast<uint32_t>(cases.size());
  shared_->current = 0;
  char token = 1;
  // A batch takes less than a millisecond.
  constexpr int patience_ms = 2'000;
  pollfd ready = {from_child_, POLLIN, 0};
  if (write(to_child_, &token, 1) != 1 || poll(&ready, 1, patience_ms) != 1 ||
      read(from_child_, &token, 1) != 1) {
    culprit = shared_->current;
    stop();
    return false;
  }
  std::copy_n(shared_->outcomes.begin(), cases.size(), outcomes.begin());
  return true;
}

}  // namespace lodge::oracle
