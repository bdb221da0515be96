// The contract suite's ground: tiny bare-metal guests, run against every accelerator.
//
// A guest is assembled at build time (GUEST_CODE) and loaded at 0x8000. It ends with OUT to port 0xe0
// ("done") or with an exception: the harness fills the IDT (and the real-mode vector table) with stubs that
// OUT to port 0xee, from which Guest::trap() reads vector, error code and frame. Everything else (ports,
// MMIO, HLT...) is the test's own.
//
// Every test has a time limit: a watchdog kicks the vCPUs and the test fails. What /dev/kvm cannot run
// (KVM_EXIT_INTERNAL_ERROR, suberror 1: KVM's own instruction emulation gave up) skips the test visibly,
// naming the instruction: a measured inability, not a list. On soft it is a failure.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "base/mapping.hpp"
#include "kvm/kvm.hpp"

namespace lodge::contract {

struct Accelerator {
  const char* name;
  std::unique_ptr<kvm::System> (*open)();

  friend void PrintTo(const Accelerator& accelerator, std::ostream* out) { *out << accelerator.name; }
};
// The accelerators under test: one line each.
std::vector<Accelerator> accelerators();

// Whether it is Lodge's own, of which nothing is excused: the soft accelerator, or a /dev/kvm that `lodge
// kvm` presents to this process.
bool is_soft(std::string_view accelerator);

// The accelerator has shown that it cannot run this guest: skips the test.
class Unable : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Guest-physical addresses of what the harness puts into the first 128 KiB.
constexpr uint64_t gdt_gpa = 0x1000, idt_gpa = 0x2000, tss_gpa = 0x3000, stubs_gpa = 0x4000;
constexpr uint64_t user_stack = 0x6800, stack = 0x7800;  // tops; both grow down
constexpr uint64_t code_gpa = 0x8000;
constexpr uint64_t tables_gpa = 0x20000;  // PML4 (or PD of 32-bit paging), PDPT, then 4 page directories
constexpr uint64_t pml4_gpa = tables_gpa, pdpt_gpa = tables_gpa + 0x1000, pd_gpa = tables_gpa + 0x2000;
constexpr uint64_t free_gpa = 0x30000;  // from here the tests' own

constexpr uint16_t done_port = 0xe0, trap_port = 0xee;

// Selectors of the harness's GDT; free_selector is the first that is empty.
constexpr uint16_t code64 = 0x08, data = 0x10, code32 = 0x18, user_data = 0x23, user_code64 = 0x2b,
                   code16 = 0x30, data16 = 0x38, task = 0x40, user_code32 = 0x53, free_selector = 0x60;

enum class Mode {
  real,     // 16-bit, segments at 0
  prot16,   // protected, 16-bit segments with 64 KiB limits, no paging
  prot32,   // flat 32-bit, no paging
  paged32,  // flat 32-bit with 32-bit paging, 4 MiB identity pages
  pae32,    // flat 32-bit with PAE, 2 MiB identity pages
  long64,   // 64-bit, low 4 GiB identity-mapped with 2 MiB pages, user-accessible
};

enum class Irqchip { none, full, split };

struct Trap {
  unsigned vector = 0;
  uint64_t error = 0;  // 0 where the exception pushes none
  uint64_t rip = 0, cs = 0, rflags = 0;
  uint64_t rsp = 0, ss = 0;  // 64-bit mode only
};

struct GuestConfig {
  uint64_t ram = 4 << 20;
  unsigned vcpus = 1;
  Irqchip irqchip = Irqchip::none;
  unsigned seconds = 30;  // of wall time for the whole guest: many times what a busy host needs
};

// One VM with RAM at 0 and its vCPUs, CPUID set to what the accelerator supports.
class Guest {
 public:
  Guest(kvm::System& system, const std::string& accelerator, const GuestConfig& config = {});
  ~Guest();
  Guest(const Guest&) = delete;
  Guest& operator=(const Guest&) = delete;

  kvm::Vm& vm() noexcept { return *vm_; }
  kvm::Vcpu& vcpu(unsigned index = 0) { return *vcpus_.at(index); }
  bool soft() const noexcept { return soft_; }

  // Guest memory in slot 0.
  uint8_t* memory(uint64_t gpa) { return ram_.bytes().subspan(gpa).data(); }
  template <class T>
  T& at(uint64_t gpa) {
    return *reinterpret_cast<T*>(ram_.bytes().subspan(gpa, sizeof(T)).data());
  }
  void load(std::span<const uint8_t> code, uint64_t gpa = code_gpa);
  // GDT descriptor `selector` (a system one of 64-bit mode takes two); `type`: access byte, `flags`: G D L
  // AVL << 4.
  void set_descriptor(uint16_t selector, uint64_t base, uint32_t limit, uint8_t access, uint8_t flags);
  // IDT gate of the present mode.
  void set_gate(unsigned vector, uint16_t selector, uint64_t offset, uint8_t access = 0x8e);
  // Puts the vCPU into `mode` at `ip` with the harness's tables, interrupts off.
  void enter(Mode mode, unsigned index = 0, uint64_t ip = code_gpa);
  // Only says which mode the vCPU is in, for a state that came from elsewhere.
  void enter_as(Mode mode) noexcept { mode_ = mode; }
  // CPL 3 in 64-bit mode (or 32-bit, as the mode of the last enter() is).
  void to_user(unsigned index = 0);

  // Runs to the next exit that is not a stray interruption. Throws Unable, or std::runtime_error at the time
  // limit.
  kvm::Exit run(unsigned index = 0);
  // Runs to "done"; any other exit fails the test (exception with a description).
  void finish(unsigned index = 0);
  // Runs to an exception; any other exit fails the test.
  Trap trap(unsigned index = 0);
  // Runs `first` here and `second` on a thread of its own; what one throws stops the other and is thrown.
  void together(const std::function<void()>& first, const std::function<void()>& second);
  // load, enter, finish, registers.
  kvm_regs result(Mode mode, std::span<const uint8_t> code);
  // load, enter, trap.
  Trap fault(Mode mode, std::span<const uint8_t> code);

  static bool is_out(const kvm::Exit& exit, uint16_t port) {
    return exit.status() == 0 && exit.reason() == KVM_EXIT_IO && exit.io().out && exit.io().port == port;
  }
  // What went wrong, for messages: exit, RIP and bytes there.
  std::string describe(const kvm::Exit& exit, unsigned index = 0);

 private:
  void build_tables(Mode mode);
  void build_stubs();
  void abort() noexcept;

  bool soft_;
  Mapping ram_;  // outlives the VM
  std::unique_ptr<kvm::Vm> vm_;
  std::vector<std::unique_ptr<kvm::Vcpu>> vcpus_;
  Mode mode_ = Mode::real;

  std::mutex mutex_;
  std::condition_variable_any wake_;
  bool expired_ = false;   // the time is over
  bool aborted_ = false;   // the other side of together() has failed
  std::jthread watchdog_;  // last: stops before what it kicks is gone
};

class Contract : public ::testing::TestWithParam<Accelerator> {
 public:
  kvm::System& system() { return *system_; }
  bool soft() const { return is_soft(GetParam().name); }
  std::unique_ptr<Guest> guest(const GuestConfig& config = {}) {
    return std::make_unique<Guest>(*system_, GetParam().name, config);
  }
  // Measures that the accelerator runs a lone OUT in `mode`; throws Unable when /dev/kvm does not (some
  // vendor modules have no paging but that of 64-bit mode and end the guest at its first instruction).
  void needs(Mode mode);
  // For a result that contradicts the manuals: fails the test, or throws Unable with `what` on a /dev/kvm
  // that the probe has measured to emulate kernel code, whose emulator then is what deviates.
  void deviates(const std::string& what);
  // Throws Unable where the accelerator does not have the capability (KVM_CHECK_EXTENSION says 0).
  void needs_capability(uint32_t capability, const char* name);
  // Throws Unable where the accelerator's CPUID does not offer the feature.
  void needs_cpuid(uint32_t function, uint32_t kvm_cpuid_entry2::*reg, unsigned bit, const char* name);

 protected:
  void SetUp() override;

 private:
  std::unique_ptr<kvm::System> system_;
};

// The errno that `call` throws, or 0.
int refusal(const std::function<void()>& call);

inline std::string accelerator_name(const ::testing::TestParamInfo<Accelerator>& info) {
  return info.param.name;
}

}  // namespace lodge::contract

#define CONTRACT_SUITE(suite)                                                                       \
  class suite : public ::lodge::contract::Contract {};                                              \
  INSTANTIATE_TEST_SUITE_P(Contract, suite, ::testing::ValuesIn(::lodge::contract::accelerators()), \
                           accelerator_name)

// A test whose body sees `test` (the Contract) and may throw Unable.
#define CONTRACT_TEST(suite, name)                               \
  static void suite##_##name(::lodge::contract::Contract& test); \
  TEST_P(suite, name) {                                          \
    try {                                                        \
      suite##_##name(*this);                                     \
    } catch (const ::lodge::contract::Unable& unable) {          \
      GTEST_SKIP() << unable.what();                             \
    }                                                            \
  }                                                              \
  static void suite##_##name([[maybe_unused]] ::lodge::contract::Contract& test)

// Assembles `text` (GNU as, AT&T syntax, `bits` 16, 32 or 64) to be loaded at 0x8000 into the span `name`.
// The address of a label L at run time is `L - name + 0x8000`, which AT(L) in the text means.
#define GUEST_CODE(name, bits, text)                                                                    \
  extern "C" const uint8_t guest_##name[], guest_##name##_end[];                                        \
  asm(".pushsection .rodata.guests, \"a\", @progbits\n.balign 16\n.globl guest_" #name ", guest_" #name \
      "_end\nguest_" #name ":\n.set start, guest_" #name "\n.code" #bits "\n" text "\nguest_" #name     \
      "_end:\n.code64\n.popsection\n");                                                                 \
  static const std::span<const uint8_t> name(guest_##name, guest_##name##_end)

#define AT(label) "(" #label " - start + 0x8000)"
