#include "harness.hpp"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <system_error>

#include "base/error.hpp"
#include "kvm/host/host.hpp"
#include "kvm/host/probe.hpp"
#include "kvm/soft/soft.hpp"

namespace lodge::contract {
namespace {

constexpr uint64_t cr0_pe = 1, cr0_et = 0x10, cr0_ne = 0x20, cr0_wp = 0x10000, cr0_pg = 0x80000000;
constexpr uint64_t cr0_mp = 2;
constexpr uint64_t cr4_pse = 0x10, cr4_pae = 0x20, cr4_osfxsr = 0x200, cr4_osxmmexcpt = 0x400;
constexpr uint64_t efer_lme = 0x100, efer_lma = 0x400, efer_nxe = 0x800;

// Exceptions that push an error code (SDM volume 3, table 6-1).
bool has_error_code(unsigned vector) {
  return vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21;
}

kvm_segment segment(uint16_t selector, uint8_t type, uint8_t dpl, bool db, bool l, uint32_t limit,
                    bool system = false) {
  kvm_segment s{};
  s.selector = selector;
  s.limit = limit;
  s.type = type;
  s.present = 1;
  s.dpl = dpl;
  s.db = db;
  s.l = l;
  s.g = limit > 0xfffff;
  s.s = !system;
  return s;
}

std::unique_ptr<kvm::System> open_host() {
  return kvm::host::open();
}

template <kvm::soft::Engine E>
std::unique_ptr<kvm::System> open_soft() {
  return kvm::soft::open({.engine = E});
}

}  // namespace

std::vector<Accelerator> accelerators() {
  return {
      {"kvm", open_host},
      {"soft", open_soft<kvm::soft::Engine::translate>},
      {"interpret", open_soft<kvm::soft::Engine::interpret>},
      {"lockstep", open_soft<kvm::soft::Engine::lockstep>},
  };
}

bool is_soft(std::string_view accelerator) {
  return accelerator != "kvm" || std::getenv("LODGE_KVM_ENGINE") != nullptr;
}

void Contract::SetUp() {
  try {
    system_ = GetParam().open();
  } catch (const std::system_error& error) {
    GTEST_SKIP() << error.what();
  }
}

void Contract::needs(Mode mode) {
  if (soft()) return;
  static constexpr uint8_t out[] = {0xe6, done_port};
  auto trial = guest();
  trial->load(out);
  trial->enter(mode);
  const kvm::Exit exit = trial->run();
  if (!Guest::is_out(exit, done_port))
    throw Unable("this /dev/kvm does not run even a lone OUT in the mode of this test: " +
                 trial->describe(exit));
}

void Contract::deviates(const std::string& what) {
  static const kvm::host::Probe measured = kvm::host::probe();
  if (!soft() && measured.kernel_mips < kvm::host::needed_mips)
    throw Unable(fmt::format("this /dev/kvm emulates kernel code ({:.1f} MIPS) and deviates: {}",
                             measured.kernel_mips, what));
  throw std::runtime_error(what);
}

void Contract::needs_capability(uint32_t capability, const char* name) {
  if (system_->check_extension(capability) == 0) throw Unable(std::string("no ") + name);
}

void Contract::needs_cpuid(uint32_t function, uint32_t kvm_cpuid_entry2::*reg, unsigned bit,
                           const char* name) {
  for (const auto& leaf : system_->supported_cpuid())
    if (leaf.function == function && leaf.index == 0 && (leaf.*reg >> bit & 1) != 0) return;
  throw Unable(std::string("this accelerator's CPUID offers no ") + name);
}

int refusal(const std::function<void()>& call) {
  try {
    call();
  } catch (const std::system_error& error) {
    return error.code().value();
  }
  return 0;
}

Guest::Guest(kvm::System& system, const std::string& accelerator, const GuestConfig& config)
    : soft_(is_soft(accelerator)), ram_(Mapping::anonymous(config.ram)), vm_(system.create_vm()) {
  vm_->set_tss_addr(0xfffbd000);
  vm_->set_user_memory_region({.slot = 0,
                               .flags = 0,
                               .guest_phys_addr = 0,
                               .memory_size = config.ram,
                               .userspace_addr = reinterpret_cast<uint64_t>(ram_.data())});
  if (config.irqchip == Irqchip::full) vm_->create_irqchip();
  if (config.irqchip == Irqchip::split) {
    kvm_enable_cap cap{};
    cap.cap = KVM_CAP_SPLIT_IRQCHIP;
    cap.args[0] = 24;
    vm_->enable_cap(cap);
  }
  if (accelerator == "lockstep" && config.vcpus > 1)
    throw Unable("lockstep compares the runs of one vCPU only");
  for (unsigned id = 0; id < config.vcpus; ++id) {
    vcpus_.push_back(vm_->create_vcpu(id));
    auto cpuid = system.supported_cpuid();
    for (auto& leaf : cpuid) {
      if (leaf.function == 1) leaf.ebx = (leaf.ebx & 0x00ffffff) | id << 24;
      if (leaf.function == 0xb || leaf.function == 0x1f) leaf.edx = id;
    }
    vcpus_.back()->set_cpuid2(cpuid);
  }
  build_stubs();
  watchdog_ = std::jthread([this, seconds = config.seconds](const std::stop_token& stop) {
    std::unique_lock lock(mutex_);
    auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
    while (!stop.stop_requested()) {
      // Kick again and again: the test's thread may run another vCPU after the first one was stopped.
      if (wake_.wait_until(lock, stop, limit, [] { return false; }) || stop.stop_requested()) return;
      expired_ = true;
      for (auto& vcpu : vcpus_) vcpu->kick();
      limit = std::chrono::steady_clock::now() + std::chrono::milliseconds(100);
    }
  });
}

Guest::~Guest() {
  watchdog_.request_stop();
  watchdog_.join();
}

void Guest::load(std::span<const uint8_t> code, uint64_t gpa) {
  std::memcpy(ram_.bytes().subspan(gpa, code.size()).data(), code.data(), code.size());
  vm_->note_write(gpa, code.size());
}

// One stub a vector, 16 bytes apart: out %al, $0xee; hlt; jmp to the hlt. The vector is RIP's offset, so
// nothing of the guest's state is touched.
void Guest::build_stubs() {
  static constexpr uint8_t stub[] = {0xe6, trap_port, 0xf4, 0xeb, 0xfd};
  for (unsigned vector = 0; vector < 256; ++vector) {
    load(stub, stubs_gpa + vector * 16);
    at<uint32_t>(vector * 4) = static_cast<uint32_t>(stubs_gpa + vector * 16);  // real-mode table: segment 0
  }
  vm_->note_write(0, 0x400);
}

void Guest::set_descriptor(uint16_t selector, uint64_t base, uint32_t limit, uint8_t access, uint8_t flags) {
  uint64_t low = (limit & 0xffff) | (base & 0xffffff) << 16 | uint64_t{access} << 40;
  low |= uint64_t{limit & 0xf0000} << 32 | uint64_t{flags} << 52 | (base & 0xff000000) << 32;
  at<uint64_t>(gdt_gpa + (selector & ~7u)) = low;
}

void Guest::set_gate(unsigned vector, uint16_t selector, uint64_t offset, uint8_t access) {
  const uint64_t low =
      (offset & 0xffff) | uint64_t{selector} << 16 | uint64_t{access} << 40 | (offset & 0xffff0000) << 32;
  if (mode_ == Mode::long64) {
    at<uint64_t>(idt_gpa + vector * 16) = low;
    at<uint64_t>(idt_gpa + vector * 16 + 8) = offset >> 32;
  } else {
    at<uint64_t>(idt_gpa + vector * 8) = low;
  }
}

void Guest::build_tables(Mode mode) {
  at<uint64_t>(gdt_gpa) = 0;
  set_descriptor(code64, 0, 0xfffff, 0x9b, 0xa);
  set_descriptor(data, 0, 0xfffff, 0x93, 0xc);
  set_descriptor(code32, 0, 0xfffff, 0x9b, 0xc);
  set_descriptor(user_data, 0, 0xfffff, 0xf3, 0xc);
  set_descriptor(user_code64, 0, 0xfffff, 0xfb, 0xa);
  set_descriptor(code16, 0, 0xffff, 0x9b, 0);
  set_descriptor(data16, 0, 0xffff, 0x93, 0);
  set_descriptor(task, tss_gpa, 0x67, 0x8b, 0);
  at<uint64_t>(gdt_gpa + task + 8) = 0;
  set_descriptor(user_code32, 0, 0xfffff, 0xfb, 0xc);

  const uint16_t selector = mode == Mode::long64 ? code64 : mode == Mode::prot16 ? code16 : code32;
  const uint8_t gate = mode == Mode::prot16 ? 0x86 : 0x8e;
  std::memset(memory(idt_gpa), 0, 0x1000);
  for (unsigned vector = 0; vector < 256; ++vector) set_gate(vector, selector, stubs_gpa + vector * 16, gate);

  std::memset(memory(tss_gpa), 0, 0x68);
  if (mode == Mode::long64) {
    at<uint64_t>(tss_gpa + 4) = stack;  // RSP0
  } else {
    at<uint32_t>(tss_gpa + 4) = stack;  // ESP0, SS0
    at<uint32_t>(tss_gpa + 8) = data;
  }
  at<uint16_t>(tss_gpa + 0x66) = 0x68;  // I/O map beyond the limit: no ports at CPL 3

  if (mode == Mode::paged32) {
    for (unsigned i = 0; i < 1024; ++i) at<uint32_t>(pml4_gpa + i * 4) = i << 22 | 0x87;
  } else {
    std::memset(memory(tables_gpa), 0, 0x2000);
    at<uint64_t>(pml4_gpa) = pdpt_gpa | 7;
    // PAE's four page-directory pointers allow present only: all other bits are reserved.
    for (unsigned i = 0; i < 4; ++i)
      at<uint64_t>(pdpt_gpa + i * 8) = (pd_gpa + i * 0x1000) | (mode == Mode::pae32 ? 1 : 7);
    for (uint64_t i = 0; i < 2048; ++i) at<uint64_t>(pd_gpa + i * 8) = i << 21 | 0x87;
  }
  vm_->note_write(0, free_gpa);
}

void Guest::enter(Mode mode, unsigned index, uint64_t ip) {
  mode_ = mode;
  if (mode != Mode::real && index == 0) build_tables(mode);
  kvm_sregs sregs = vcpu(index).sregs();
  sregs.cr0 = cr0_et | cr0_ne | cr0_mp;
  sregs.cr3 = 0;
  sregs.cr4 = cr4_osfxsr | cr4_osxmmexcpt;
  sregs.efer = 0;
  sregs.idt = {.base = idt_gpa, .limit = 0xfff};
  sregs.gdt = {.base = gdt_gpa, .limit = 0xfff};
  kvm_segment code{}, rest{};
  switch (mode) {
    case Mode::real:
      sregs.idt = {.base = 0, .limit = 0x3ff};
      code = segment(0, 11, 0, false, false, 0xffff);
      rest = segment(0, 3, 0, false, false, 0xffff);
      break;
    case Mode::prot16:
      code = segment(code16, 11, 0, false, false, 0xffff);
      rest = segment(data16, 3, 0, false, false, 0xffff);
      break;
    case Mode::prot32:
    case Mode::paged32:
    case Mode::pae32:
      code = segment(code32, 11, 0, true, false, 0xffffffff);
      rest = segment(data, 3, 0, true, false, 0xffffffff);
      break;
    case Mode::long64:
      code = segment(code64, 11, 0, false, true, 0xffffffff);
      rest = segment(data, 3, 0, true, false, 0xffffffff);
      break;
  }
  sregs.cs = code;
  sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = rest;
  sregs.tr = segment(task, 11, 0, false, false, 0x67, true);
  sregs.tr.base = tss_gpa;
  sregs.ldt = {};
  sregs.ldt.unusable = 1;
  sregs.ldt.type = 2;
  if (mode != Mode::real) sregs.cr0 |= cr0_pe;
  if (mode == Mode::paged32) {
    sregs.cr0 |= cr0_pg | cr0_wp;
    sregs.cr4 |= cr4_pse;
    sregs.cr3 = pml4_gpa;
  }
  if (mode == Mode::pae32) {
    sregs.cr0 |= cr0_pg | cr0_wp;
    sregs.cr4 |= cr4_pae;
    sregs.cr3 = pdpt_gpa;
    sregs.efer = efer_nxe;
  }
  if (mode == Mode::long64) {
    sregs.cr0 |= cr0_pg | cr0_wp;
    sregs.cr4 |= cr4_pae;
    sregs.cr3 = pml4_gpa;
    sregs.efer = efer_lme | efer_lma | efer_nxe;
  }
  vcpu(index).set_sregs(sregs);
  kvm_regs regs{};
  regs.rip = ip;
  regs.rsp = stack - index * 0x400;
  regs.rflags = 2;
  vcpu(index).set_regs(regs);
}

void Guest::to_user(unsigned index) {
  kvm_sregs sregs = vcpu(index).sregs();
  const bool wide = mode_ == Mode::long64;
  sregs.cs = segment(wide ? user_code64 : user_code32, 11, 3, !wide, wide, 0xffffffff);
  sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = segment(user_data, 3, 3, true, false, 0xffffffff);
  vcpu(index).set_sregs(sregs);
  kvm_regs regs = vcpu(index).regs();
  regs.rsp = user_stack;
  vcpu(index).set_regs(regs);
}

kvm::Exit Guest::run(unsigned index) {
  for (;;) {
    const kvm::Exit exit = vcpu(index).run();
    {
      const std::lock_guard lock(mutex_);
      if (expired_)
        throw std::runtime_error("the guest did not stop within its time: " + describe(exit, index));
      if (aborted_) throw std::runtime_error("the other side has failed");
    }
    // KVM also says EAGAIN, when a vCPU that waited for INIT or SIPI has got one.
    if (exit.interrupted() || exit.status() == -EAGAIN) continue;
    if (!soft_ && exit.status() == 0 && exit.reason() == KVM_EXIT_INTERNAL_ERROR &&
        exit.raw().internal.suberror == KVM_INTERNAL_ERROR_EMULATION)
      throw Unable("this /dev/kvm cannot run the guest: " + describe(exit, index));
    return exit;
  }
}

void Guest::finish(unsigned index) {
  const kvm::Exit exit = run(index);
  if (!is_out(exit, done_port))
    throw std::runtime_error("the guest did not finish: " + describe(exit, index));
}

Trap Guest::trap(unsigned index) {
  const kvm::Exit exit = run(index);
  if (!is_out(exit, trap_port))
    throw std::runtime_error("the guest met no exception: " + describe(exit, index));
  const kvm_regs regs = vcpu(index).regs();
  Trap trap;
  trap.vector = static_cast<unsigned>((regs.rip - stubs_gpa) / 16);
  uint64_t frame = regs.rsp;
  const unsigned word = mode_ == Mode::long64 ? 8 : mode_ == Mode::real || mode_ == Mode::prot16 ? 2 : 4;
  const auto pop = [&] {
    uint64_t value = 0;
    std::memcpy(&value, ram_.bytes().subspan(frame, word).data(), word);
    frame += word;
    return value;
  };
  if (mode_ != Mode::real && has_error_code(trap.vector)) trap.error = pop();
  trap.rip = pop();
  trap.cs = pop();
  trap.rflags = pop();
  if (mode_ == Mode::long64) {
    trap.rsp = pop();
    trap.ss = pop();
  }
  return trap;
}

kvm_regs Guest::result(Mode mode, std::span<const uint8_t> code) {
  load(code);
  enter(mode);
  finish();
  return vcpu().regs();
}

Trap Guest::fault(Mode mode, std::span<const uint8_t> code) {
  load(code);
  enter(mode);
  return trap();
}

std::string Guest::describe(const kvm::Exit& exit, unsigned index) {
  const kvm_regs regs = vcpu(index).regs();
  const kvm_sregs sregs = vcpu(index).sregs();
  std::string text = fmt::format("{}; vcpu {} rip {:#x} rsp {:#x} rflags {:#x} cr2 {:#x}, bytes",
                                 exit.describe(), index, regs.rip, regs.rsp, regs.rflags, sregs.cr2);
  const uint64_t gpa = sregs.cs.base + regs.rip;  // the harness maps its guests one to one
  for (uint64_t i = 0; i < 12 && gpa + i < ram_.size(); ++i) text += fmt::format(" {:02x}", *memory(gpa + i));
  return text;
}

void Guest::abort() noexcept {
  const std::lock_guard lock(mutex_);
  aborted_ = true;
  // Until its thread has seen it: a vCPU may be between two runs.
  for (auto& vcpu : vcpus_) vcpu->kick();
}

void Guest::together(const std::function<void()>& first, const std::function<void()>& second) {
  std::exception_ptr error;
  std::mutex mutex;
  const auto guarded = [&](const std::function<void()>& body) {
    try {
      body();
    } catch (...) {
      const std::lock_guard lock(mutex);
      if (!error) error = std::current_exception();
      abort();
    }
  };
  std::thread thread([&] { guarded(second); });
  guarded(first);
  thread.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace lodge::contract
