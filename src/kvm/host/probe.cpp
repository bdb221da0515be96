#include "kvm/host/probe.hpp"

#include <algorithm>
#include <array>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <ctime>
#include <mutex>
#include <optional>
#include <span>
#include <system_error>
#include <thread>

#include "base/error.hpp"
#include "base/mapping.hpp"
#include "kvm/host/host.hpp"

// Every snippet starts at ring 0 in 64-bit mode with RAX = RCX = RDX = 0, RBX -> 4 KiB of zeroes and
// interrupts off. It must leave 1 in RSI only if what it tried had the right effect, and ends with HLT.
// Vectors 3 and 0x80 lead to a handler that increments RDI and returns; all others stop the guest at an OUT
// to port 0xee.
#define SNIPPET(name, text)                                                                                  \
  asm(".pushsection .rodata.lodge_probe, \"a\", @progbits\n.globl lodge_probe_" #name ", lodge_probe_" #name \
      "_end\nlodge_probe_" #name ":\n" text "\nhlt\nlodge_probe_" #name "_end:\n.popsection\n");             \
  extern "C" const uint8_t lodge_probe_##name[], lodge_probe_##name##_end[]

#define BYTES(name) std::span(lodge_probe_##name, lodge_probe_##name##_end)

SNIPPET(int3, "int3; mov %edi, %esi");
SNIPPET(int_n, "int $0x80; mov %edi, %esi");
SNIPPET(exception, "lea 1f(%rip), %r8; mov %r8, 0x800(%rbx); ud2; 1: mov %edi, %esi");
SNIPPET(cmpxchg16b,
        "push %rbx; mov %rbx, %r8; mov $7, %ebx; mov $9, %ecx; lock cmpxchg16b (%r8); pop %rbx; setz %sil;"
        "cmpq $9, 8(%rbx); sete %al; and %eax, %esi");
SNIPPET(locked,
        "mov $5, %eax; lock xadd %rax, (%rbx); mov $5, %eax; mov $1, %edx; lock cmpxchg %rdx, (%rbx); mov "
        "(%rbx), %esi");
SNIPPET(stac_clac, "stac; pushf; pop %rsi; clac; pushf; pop %rax; xor %eax, %esi; shr $18, %esi");
SNIPPET(
    xsave,
    "mov %cr4, %rax; or $0x40000, %eax; mov %rax, %cr4; xor %ecx, %ecx; xgetbv; xsetbv; mov $-1, %eax; mov "
    "$-1, %edx;"
    "movl $0x1f80, 24(%rbx); xsave (%rbx); xrstor (%rbx); mov 24(%rbx), %eax; cmp $0x1f80, %eax; sete %sil");
SNIPPET(fxsave, "fxsave (%rbx); fxrstor (%rbx); cmpl $0x1f80, 24(%rbx); sete %sil");
SNIPPET(popcnt, "mov $0x8001, %eax; popcnt %rax, %rax; cmp $2, %rax; sete %sil");
SNIPPET(sse2,
        "movl $3, (%rbx); movd (%rbx), %xmm0; paddd %xmm0, %xmm0; movd %xmm0, %eax; cmp $6, %eax; sete %sil");
SNIPPET(x87,
        "fninit; fnstsw (%rbx); fnstcw 2(%rbx); fld1; fistpl 4(%rbx); cmpw $0x37f, 2(%rbx); sete %sil; and "
        "4(%rbx), %esi");
SNIPPET(
    wrmsr,
    "mov $0xc0000102, %ecx; mov $0x1234, %eax; wrmsr; xor %eax, %eax; rdmsr; cmp $0x1234, %eax; sete %sil");
SNIPPET(swapgs,
        "mov $0xc0000102, %ecx; mov %ebx, %eax; wrmsr; movl $1, 64(%rbx); swapgs; mov %gs:64, %esi; swapgs");
SNIPPET(cpuid, "xor %eax, %eax; push %rbx; cpuid; pop %rbx; test %eax, %eax; setnz %sil");
SNIPPET(rdtsc, "rdtsc; mov %eax, %r8d; rdtsc; cmp %eax, %r8d; setne %sil");
SNIPPET(rdtscp, "rdtscp; mov %eax, %r8d; rdtscp; cmp %eax, %r8d; setne %sil");
SNIPPET(control,
        "mov %cr3, %rax; mov %rax, %cr3; invlpg (%rbx); mov %cr4, %rax; or $0x80, %eax; mov %rax, %cr4;"
        "mov %cr4, %rax; bt $7, %eax; setc %sil");
SNIPPET(tables,
        "sgdt (%rbx); lgdt (%rbx); sidt 16(%rbx); lidt 16(%rbx); mov 2(%rbx), %rax; cmp $0x1000, %rax; sete "
        "%sil");
SNIPPET(debug, "mov %rbx, %dr0; mov %dr0, %rax; cmp %rbx, %rax; sete %sil");
SNIPPET(strings,
        "mov $0x55, %eax; mov %rbx, %rdi; mov $64, %ecx; rep stosb; mov %rbx, %rsi; lea 512(%rbx), %rdi;"
        "mov $8, %ecx; rep movsq; cmpb $0x55, 575(%rbx); sete %sil; movzbl %sil, %esi");
SNIPPET(
    fsgsbase,
    "mov %cr4, %rax; bts $16, %rax; mov %rax, %cr4; wrgsbase %rbx; rdgsbase %rax; cmp %rbx, %rax; sete %sil");
SNIPPET(invpcid, "mov $2, %eax; invpcid (%rbx), %rax; mov $1, %esi");
SNIPPET(syscall,
        "mov $0xc0000080, %ecx; rdmsr; or $1, %eax; wrmsr; mov $0xc0000081, %ecx; xor %eax, %eax; mov "
        "$0x00130008, %edx;"
        "wrmsr; lea 2f(%rip), %rax; xor %edx, %edx; inc %ecx; wrmsr; lea 1f(%rip), %rcx; mov $2, %r11d; mov "
        "%rsp, %r12;"
        "sysretq; 1: mov $1, %esi; syscall; 2: mov %r12, %rsp");
SNIPPET(kernel_loop, "1: dec %rcx; jnz 1b");
SNIPPET(user_loop,
        "pushq $0x1b; push %rsp; pushq $2; pushq $0x23; lea 1f(%rip), %rax; push %rax; iretq; 1: dec %rcx; "
        "jnz 1b");

namespace lodge::kvm::host {
namespace {

using std::chrono::steady_clock;

constexpr auto snippet_time = std::chrono::milliseconds(20);
constexpr auto patient_time = std::chrono::milliseconds(100);
constexpr auto loop_time = std::chrono::milliseconds(15);
constexpr auto whole_time = std::chrono::milliseconds(650);

// Where the pieces lie in the guest's RAM.
constexpr uint64_t gdt = 0x1000, idt = 0x2000, scratch = 0x6000, stack = 0x8000, code = 0x9000,
                   handlers = 0xa000, pml4 = 0x10000, pdpt = 0x11000, pd = 0x12000, ram_size = 0x200000;

struct Snippet {
  std::string_view name;
  std::string_view need;
  bool required;
  std::span<const uint8_t> bytes;
  // The CPUID bit that offers it; function 0 when every x86-64 processor has it.
  uint32_t function = 0;
  unsigned bit = 0;
  uint32_t kvm_cpuid_entry2::*reg = nullptr;
};

const std::array snippets{
    Snippet{"INT3", "kernel code patching (text_poke) and kprobes", true, BYTES(int3)},
    Snippet{"INT n", "software interrupts from the kernel", false, BYTES(int_n)},
    Snippet{"exceptions", "every kernel's own fault handling", true, BYTES(exception)},
    Snippet{"LOCK instructions", "every lock of the kernel", true, BYTES(locked)},
    Snippet{"CMPXCHG16B", "the kernel's memory allocator", true, BYTES(cmpxchg16b), 1, 13,
            &kvm_cpuid_entry2::ecx},
    Snippet{"STAC/CLAC", "the kernel's access to user memory", true, BYTES(stac_clac), 7, 20,
            &kvm_cpuid_entry2::ebx},
    Snippet{"XSAVE", "switching between tasks", true, BYTES(xsave), 1, 26, &kvm_cpuid_entry2::ecx},
    Snippet{"FXSAVE", "switching between tasks", true, BYTES(fxsave)},
    Snippet{"POPCNT", "counting bits in the kernel", true, BYTES(popcnt), 1, 23, &kvm_cpuid_entry2::ecx},
    Snippet{"SSE2 arithmetic", "checksums, RAID and cryptography in the kernel", true, BYTES(sse2)},
    Snippet{"x87 at ring 0", "the kernel's test of its FPU", true, BYTES(x87)},
    Snippet{"WRMSR", "the kernel's own set-up", true, BYTES(wrmsr)},
    Snippet{"SWAPGS", "entering and leaving the kernel", true, BYTES(swapgs)},
    Snippet{"CPUID", "recognising the processor", true, BYTES(cpuid)},
    Snippet{"RDTSC", "the kernel's clock", true, BYTES(rdtsc)},
    Snippet{"RDTSCP", "the kernel's clock", false, BYTES(rdtscp), 0x80000001, 27, &kvm_cpuid_entry2::edx},
    Snippet{"control registers", "paging", true, BYTES(control)},
    Snippet{"LGDT/LIDT", "the kernel's own set-up", true, BYTES(tables)},
    Snippet{"debug registers", "task switches and hardware breakpoints", true, BYTES(debug)},
    Snippet{"REP STOS/MOVS", "clearing and copying memory", true, BYTES(strings)},
    Snippet{"WRGSBASE", "entering and leaving the kernel", true, BYTES(fsgsbase), 7, 0,
            &kvm_cpuid_entry2::ebx},
    Snippet{"INVPCID", "flushing address translations", true, BYTES(invpcid), 7, 10, &kvm_cpuid_entry2::ebx},
    Snippet{"SYSCALL/SYSRET", "user programs", true, BYTES(syscall)},
};

// One throw-away VM: what one guest breaks cannot disturb the next.
class Trial {
 public:
  Trial(System& system, std::span<const kvm_cpuid_entry2> cpuid, std::span<const uint8_t> guest);

  // Runs to an exit, for `limit` at most.
  Exit run(steady_clock::duration limit);
  kvm_regs regs() { return vcpu_->regs(); }
  // Processor time of the last run.
  double seconds() const noexcept { return seconds_; }

 private:
  void write(uint64_t gpa, uint64_t value) { std::memcpy(ram_.data() + gpa, &value, sizeof value); }
  void build_tables();
  void enter_long_mode();

  Mapping ram_ = Mapping::anonymous(ram_size);  // outlives the VM that maps it
  std::unique_ptr<Vm> vm_;
  std::unique_ptr<Vcpu> vcpu_;
  double seconds_ = 0;
};

Trial::Trial(System& system, std::span<const kvm_cpuid_entry2> cpuid, std::span<const uint8_t> guest)
    : vm_(system.create_vm()) {
  vm_->set_tss_addr(0xfffbd000);
  vm_->set_user_memory_region({.slot = 0,
                               .flags = 0,
                               .guest_phys_addr = 0,
                               .memory_size = ram_size,
                               .userspace_addr = reinterpret_cast<uint64_t>(ram_.data())});
  vcpu_ = vm_->create_vcpu(0);
  vcpu_->set_cpuid2(cpuid);
  build_tables();
  std::ranges::copy(guest, ram_.data() + code);
  enter_long_mode();
}

void Trial::build_tables() {
  write(pml4, pdpt | 7);
  write(pdpt, pd | 7);
  write(pd, 0x87);
  // Null, kernel code and data, user data and code (in the order that SYSRET wants).
  constexpr uint64_t descriptors[] = {0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cff3000000ffff,
                                      0x00affb000000ffff};
  std::memcpy(ram_.data() + gdt, descriptors, sizeof descriptors);
  // One handler a kind: count and return (3, 0x80); skip to where the snippet says (6, #UD); stop.
  constexpr uint8_t count[] = {0xff, 0xc7, 0x48, 0xcf};  // inc %edi; iretq
  constexpr uint8_t skip[] = {0xff, 0xc7, 0x4c, 0x89,
                              0x04, 0x24, 0x48, 0xcf};  // inc %edi; mov %r8, (%rsp); iretq
  constexpr uint8_t stop[] = {0xe6, 0xee, 0xf4};        // out %al, $0xee; hlt
  std::ranges::copy(count, ram_.data() + handlers);
  std::ranges::copy(skip, ram_.data() + handlers + 0x20);
  std::ranges::copy(stop, ram_.data() + handlers + 0x40);
  for (uint64_t vector = 0; vector < 256; ++vector) {
    const uint64_t handler = handlers + (vector == 3 || vector == 0x80 ? 0 : vector == 6 ? 0x20 : 0x40);
    write(idt + vector * 16, handler | 8u << 16 | uint64_t{0x8e} << 40);
  }
}

void Trial::enter_long_mode() {
  kvm_sregs sregs = vcpu_->sregs();
  kvm_segment segment{};
  segment.limit = 0xffffffff;
  segment.present = segment.s = segment.g = 1;
  segment.selector = 0x10;
  segment.type = 3;
  segment.db = 1;
  sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = segment;
  segment.selector = 8;
  segment.type = 11;
  segment.db = 0;
  segment.l = 1;
  sregs.cs = segment;
  sregs.gdt = {.base = gdt, .limit = 0xfff};
  sregs.idt = {.base = idt, .limit = 0xfff};
  sregs.cr0 = 0x80010033;  // PG, WP, NE, ET, MP, PE
  sregs.cr3 = pml4;
  sregs.cr4 = 0x620;   // PAE, OSFXSR, OSXMMEXCPT
  sregs.efer = 0xd00;  // LME, LMA, NXE
  vcpu_->set_sregs(sregs);
  kvm_regs regs{};
  regs.rip = code;
  regs.rsp = stack;
  regs.rbx = scratch;
  regs.rflags = 2;
  vcpu_->set_regs(regs);
}

// Processor time of this thread, which includes the guest's: other load of the host does not count.
double cpu_seconds() {
  timespec time{};
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_nsec) * 1e-9;
}

Exit Trial::run(steady_clock::duration limit) {
  std::mutex mutex;
  std::condition_variable_any wake;
  const auto start = steady_clock::now();
  const double before = cpu_seconds();
  const std::jthread timer([&](const std::stop_token& stop) {
    std::unique_lock lock(mutex);
    wake.wait_until(lock, stop, start + limit, [] { return false; });
    if (!stop.stop_requested()) vcpu_->kick();
  });
  for (;;) {
    const Exit exit = vcpu_->run();
    seconds_ = cpu_seconds() - before;
    // Any other signal of the process interrupts as well; only the timer's end counts.
    if (exit.interrupted() && steady_clock::now() - start < limit) continue;
    return exit;
  }
}

bool offered(const Snippet& snippet, std::span<const kvm_cpuid_entry2> cpuid) {
  if (snippet.function == 0) return true;
  return std::ranges::any_of(cpuid, [&](const kvm_cpuid_entry2& leaf) {
    return leaf.function == snippet.function && leaf.index == 0 &&
           (leaf.*snippet.reg >> snippet.bit & 1) != 0;
  });
}

// How a snippet's run went wrong; nothing when it went well.
std::optional<std::string> failure(Trial& trial, const Exit& exit) {
  if (exit.interrupted()) return "did not end within its time";
  if (exit.status() == 0 && exit.reason() == KVM_EXIT_HLT) {
    if (trial.regs().rsi == 1) return std::nullopt;
    return "wrong result";
  }
  if (exit.status() == 0 && exit.reason() == KVM_EXIT_IO) return "raised an exception";
  return exit.describe();
}

Ability try_snippet(System& system, std::span<const kvm_cpuid_entry2> cpuid, const Snippet& snippet) {
  Ability ability{snippet.name, snippet.need, snippet.required, Ability::Result::works, {}};
  if (!offered(snippet, cpuid)) {
    ability.result = Ability::Result::not_offered;
    return ability;
  }
  // On a busy host this thread may simply not have run: one longer try before that is held against the
  // device.
  for (const auto limit : {snippet_time, patient_time}) {
    Trial trial(system, cpuid, snippet.bytes);
    const Exit exit = trial.run(limit);
    auto wrong = failure(trial, exit);
    ability.result = wrong ? Ability::Result::fails : Ability::Result::works;
    ability.detail = wrong.value_or("");
    if (!exit.interrupted()) break;
  }
  return ability;
}

// Both loops count RCX down from 0 by two instructions a round, until the timer stops them.
double loop_mips(System& system, std::span<const kvm_cpuid_entry2> cpuid, std::span<const uint8_t> loop) {
  // The same mercy for a busy host: a guest that has not come as far as its loop says nothing.
  for (const auto limit : {loop_time, patient_time}) {
    Trial trial(system, cpuid, loop);
    const Exit exit = trial.run(limit);
    if (!exit.interrupted()) return 0;
    const uint64_t rounds = 0 - trial.regs().rcx;
    if (rounds != 0 && trial.seconds() > 0) return static_cast<double>(rounds) * 2 / trial.seconds() / 1e6;
  }
  return 0;
}

void judge(Probe& result) {
  if (result.kernel_mips < needed_mips)
    result.reasons.push_back(
        fmt::format("kernel code runs at {:.1f} million instructions a second, {:.0f} are needed",
                    result.kernel_mips, needed_mips));
  for (const Ability& ability : result.abilities) {
    if (!ability.required) continue;
    if (ability.result == Ability::Result::fails)
      result.reasons.push_back(
          fmt::format("{} fails ({}), needed for {}", ability.name, ability.detail, ability.need));
    if (ability.result == Ability::Result::not_tried)
      result.reasons.push_back(fmt::format("{} could not be tried: the device was too slow", ability.name));
  }
  result.can_boot_stock_kernel = result.reasons.empty();
}

}  // namespace

Probe probe(System& system) {
  Probe result;
  try {
    const auto start = steady_clock::now();
    const auto cpuid = system.supported_cpuid();
    result.kernel_mips = loop_mips(system, cpuid, BYTES(kernel_loop));
    result.user_mips = loop_mips(system, cpuid, BYTES(user_loop));
    for (const Snippet& snippet : snippets) {
      if (steady_clock::now() - start < whole_time) {
        result.abilities.push_back(try_snippet(system, cpuid, snippet));
      } else {
        result.abilities.push_back(
            {snippet.name, snippet.need, snippet.required, Ability::Result::not_tried, {}});
      }
    }
    result.available = true;
  } catch (const std::system_error& error) {
    result.error = error.what();
    result.reasons.push_back(result.error);
    return result;
  }
  judge(result);
  return result;
}

Probe probe(const std::string& path) {
  try {
    return probe(*open(path));
  } catch (const std::system_error& error) {
    Probe result;
    result.error = error.what();
    result.reasons.push_back(result.error);
    return result;
  }
}

}  // namespace lodge::kvm::host
