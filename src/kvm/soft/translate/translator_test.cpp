// What the block oracle (tests/oracle) cannot come upon: mappings that change, and addresses made to fit the
// translator's tables. A kernel-mode guest of a few instructions, translated before its first run.
#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <initializer_list>
#include <thread>
#include <vector>

#include "base/mapping.hpp"
#include "kvm/soft/soft.hpp"

namespace lodge::kvm::soft {
namespace {

constexpr uint64_t ram_size = 1 << 20, pml4 = 0x1000, pdpt = 0x2000, directory = 0x3000, table = 0x4000,
                   gdt = 0x5000, idt = 0x6000, handlers = 0x7000, stack_top = 0x9000, tss = 0xb000,
                   code = 0x10000;

kvm_segment segment(uint16_t selector, uint8_t type, bool wide) {
  kvm_segment s{};
  s.limit = 0xffff'ffff;
  s.selector = selector;
  s.type = type;
  s.present = s.s = s.g = 1;
  s.l = wide ? 1 : 0;
  s.db = wide ? 0 : 1;
  return s;
}

class TranslatorGuest : public testing::Test {
 protected:
  TranslatorGuest()
      : system_(open({.engine = Engine::translate, .translate_after = 0})),
        ram_(Mapping::anonymous(ram_size)),
        vm_(system_->create_vm()) {
    put(pml4, pdpt | 3);
    put(pdpt, directory | 3);
    put(directory, table | 3);
    for (uint64_t page = 0; page < ram_size / 4096; ++page) put(table + 8 * page, page << 12 | 3);
    put(gdt + 8, 0x00af'9b00'0000'ffff);
    for (uint64_t vector = 0; vector < 32; ++vector) {
      const uint64_t handler = handlers + 16 * vector;
      put(idt + 16 * vector, handler | uint64_t{8} << 16 | uint64_t{0x8e00} << 32);
      ram_.data()[handler] = 0xf4;
    }
    vm_->set_user_memory_region({.slot = 0,
                                 .flags = 0,
                                 .guest_phys_addr = 0,
                                 .memory_size = ram_size,
                                 .userspace_addr = reinterpret_cast<uint64_t>(ram_.data())});
    vcpu_ = vm_->create_vcpu(0);
    vcpu_->set_cpuid2(system_->supported_cpuid());
    kvm_sregs s = vcpu_->sregs();
    s.cs = segment(8, 11, true);
    s.ds = s.es = s.ss = segment(16, 3, false);
    s.gdt = {.base = gdt, .limit = 0x1f, .padding = {}};
    s.idt = {.base = idt, .limit = 0x1ff, .padding = {}};
    s.cr0 = 0x8001'0033;
    s.cr3 = pml4;
    s.cr4 = 0x20;
    s.efer = 0x500;
    vcpu_->set_sregs(s);
  }

  void put(uint64_t gpa, uint64_t value) { std::memcpy(ram_.data() + gpa, &value, 8); }
  void place(uint64_t gpa, std::initializer_list<uint8_t> bytes) {
    std::copy(bytes.begin(), bytes.end(), ram_.data() + gpa);
  }
  // Runs to the next HLT.
  kvm_regs run(kvm_regs regs) {
    regs.rflags = 2;
    vcpu_->set_regs(regs);
    const Exit exit = vcpu_->run();
    EXPECT_EQ(exit.reason(), static_cast<uint32_t>(KVM_EXIT_HLT)) << exit.describe();
    return vcpu_->regs();
  }
  uint64_t counted(std::string_view name) {
    for (const Statistic& s : vcpu_->statistics())
      if (name == s.name) return s.value;
    return 0;
  }
  static constexpr uint64_t halted_in_handler(unsigned vector) { return handlers + 16 * vector + 1; }

  std::unique_ptr<System> system_;
  Mapping ram_;
  std::unique_ptr<Vm> vm_;
  std::unique_ptr<Vcpu> vcpu_;
};

TEST_F(TranslatorGuest, AnInstructionAcrossPagesFollowsTheMappingOfTheSecond) {
  constexpr uint64_t first = code + 0x1000, other = 0x40000;
  place(code, {0x0f, 0x01, 0x3b, 0xe9, 0xf8, 0x0f, 0, 0});     // invlpg [rbx]; jmp first
  place(first, {0xe9, 0xf9, 0x0f, 0, 0});                      // jmp to the last two bytes of its page
  place(first + 0xffe, {0xb8, 0x11, 0x22, 0x33, 0x44, 0xf4});  // mov eax, 44332211; hlt
  place(other, {0x66, 0x77, 0x88, 0xf4});                      // ... 88776611
  const kvm_regs start{.rbx = first + 0x1000, .rsp = stack_top, .rip = code};
  for (int i = 0; i < 3; ++i) EXPECT_EQ(run(start).rax, 0x44332211u);
  put(table + 8 * ((first >> 12) + 1), other | 3);
  EXPECT_EQ(run(start).rax, 0x88776611u);
}

// One look-up for accesses off a register that constants are added to meanwhile; then one that cannot be
// shared, because the bytes lie in two pages.
TEST_F(TranslatorGuest, ARunGoesOnWhenItsBaseMoves) {
  // mov rax, [rsi]; add rsi, 8; mov rbx, [rsi]; lea rsi, [rsi - 16]; mov rcx, [rsi + 4]; inc rsi; mov rdx,
  // [rsi]; hlt
  place(code, {0x48, 0x8b, 0x06, 0x48, 0x83, 0xc6, 0x08, 0x48, 0x8b, 0x1e, 0x48, 0x8d, 0x76,
               0xf0, 0x48, 0x8b, 0x4e, 0x04, 0x48, 0xff, 0xc6, 0x48, 0x8b, 0x16, 0xf4});
  const auto at = [&](uint64_t gpa) {
    uint64_t value = 0;
    std::memcpy(&value, ram_.data() + gpa, 8);
    return value;
  };
  for (uint64_t i = 0; i < 0x2000; ++i) ram_.data()[0x20000 + i] = static_cast<uint8_t>(i * 37 >> 2);
  for (const uint64_t middle : {0x20100, 0x20100, 0x21004, 0x20ffd, 0x20ff4, 0x21100}) {
    const kvm_regs after = run({.rsi = middle, .rsp = stack_top, .rip = code});
    EXPECT_EQ(after.rax, at(middle)) << std::hex << middle;
    EXPECT_EQ(after.rbx, at(middle + 8)) << std::hex << middle;
    EXPECT_EQ(after.rcx, at(middle - 4)) << std::hex << middle;
    EXPECT_EQ(after.rdx, at(middle - 7)) << std::hex << middle;
    EXPECT_EQ(after.rsi, middle - 7);
  }
}

// The tables of indirect branches know addresses by all their bits.
TEST_F(TranslatorGuest, NoAddressReachesCodeThroughTheEntryOfAnother) {
  place(code, {0xff, 0xe0});          // jmp rax
  place(code + 0x100, {0x90, 0xf4});  // nop; hlt
  const kvm_regs good{.rax = code + 0x100, .rsp = stack_top, .rip = code};
  for (int i = 0; i < 3; ++i) EXPECT_EQ(run(good).rip, code + 0x102);
  for (uint64_t high = 1; high < 0x40; ++high)
    for (const uint64_t target : {code + 0x100, uint64_t{0}, uint64_t{16}}) {
      const kvm_regs odd{.rax = target ^ high << 48, .rsp = stack_top, .rip = code};
      const kvm_regs after = run(odd);
      EXPECT_EQ(after.rip, halted_in_handler(13)) << std::hex << odd.rax;
      // The frame: error code, then the address of the branch itself.
      uint64_t rip = 0;
      std::memcpy(&rip, ram_.data() + after.rsp + 8, 8);
      EXPECT_EQ(rip, code);
    }
}

// Zero is what an entry that was never used has for an address.
TEST_F(TranslatorGuest, AnIndirectBranchReachesAddressZero) {
  place(0, {0xf4});                                  // hlt
  place(16, {0x90, 0xf4});                           // nop; hlt
  place(code, {0xff, 0xe0});                         // jmp rax
  place(code + 16, {0xc3});                          // ret
  place(code + 32, {0xdb, 0xe3, 0xff, 0xe0});        // fninit; jmp rax
  place(code + 48, {0x0f, 0x57, 0xc0, 0xff, 0xe0});  // xorps xmm0, xmm0; jmp rax
  put(stack_top, 0);
  kvm_sregs vectors = vcpu_->sregs();
  vectors.cr4 |= 0x200;
  vcpu_->set_sregs(vectors);
  for (const uint64_t rip : {code, code + 16, code + 32, code + 48})
    for (int i = 0; i < 3; ++i) {
      EXPECT_EQ(run({.rsp = stack_top, .rip = rip}).rip, 1u);
      EXPECT_EQ(run({.rax = 16, .rsp = stack_top, .rip = code}).rip, 18u);
    }
}

// Targets whose entries are the same, in turn.
TEST_F(TranslatorGuest, ABranchWithManyTargetsFindsEach) {
  place(code, {0xff, 0xe0});  // jmp rax
  for (uint64_t target = code + 0x100; target < ram_size; target += 0x10000)
    place(target, {0xb9, static_cast<uint8_t>(target >> 16), 0, 0, 0, 0xf4});  // mov ecx, ...; hlt
  for (int i = 0; i < 3; ++i)
    for (uint64_t target = code + 0x100; target < ram_size; target += 0x10000)
      EXPECT_EQ(run({.rax = target, .rsp = stack_top, .rip = code}).rcx, target >> 16);
}

TEST_F(TranslatorGuest, AnIndirectBranchFollowsTheMappingOfItsTarget) {
  constexpr uint64_t target = 0x20000, other = 0x40000;
  place(code, {0x0f, 0x01, 0x3b, 0xff, 0xe0});  // invlpg [rbx]; jmp rax
  place(code + 16, {0xff, 0xe0});               // jmp rax
  place(target, {0xb9, 1, 0, 0, 0, 0xf4});      // mov ecx, 1; hlt
  place(other, {0xb9, 2, 0, 0, 0, 0xf4});       // mov ecx, 2; hlt
  const kvm_regs jump{.rax = target, .rsp = stack_top, .rip = code + 16};
  for (int i = 0; i < 3; ++i) EXPECT_EQ(run(jump).rcx, 1u);
  for (int i = 0; i < 3; ++i) {
    const uint64_t expected = 1u + (i + 1) % 2;
    put(table + 8 * (target >> 12), (expected == 1 ? target : other) | 3);
    EXPECT_EQ(run({.rax = target, .rbx = target, .rsp = stack_top, .rip = code}).rcx, expected);
    EXPECT_EQ(run(jump).rcx, expected);
  }
}

TEST_F(TranslatorGuest, AnIndirectBranchFollowsItsTargetsBytes) {
  constexpr uint64_t target = 0x20000;
  place(code, {0xc6, 0x40, 1, 7, 0xff, 0xe0});  // mov byte [rax + 1], 7; jmp rax
  place(code + 16, {0xff, 0xe0});               // jmp rax
  place(target, {0xb9, 1, 0, 0, 0, 0xf4});      // mov ecx, 1; hlt
  const kvm_regs jump{.rax = target, .rsp = stack_top, .rip = code + 16};
  for (int i = 0; i < 3; ++i) EXPECT_EQ(run(jump).rcx, 1u);
  EXPECT_EQ(run({.rax = target, .rsp = stack_top, .rip = code}).rcx, 7u);
  EXPECT_EQ(run(jump).rcx, 7u);
}

TEST_F(TranslatorGuest, ReturnsGoWhereTheStackSays) {
  // call +11; inc ecx (back here); loops while --edx; hlt
  place(code, {0xe8, 0x1b, 0, 0, 0, 0xff, 0xc1, 0xff, 0xca, 0x75, 0xf5, 0xf4});
  place(code + 0x20, {0x48, 0x01, 0x04, 0x24, 0xc3});  // add [rsp], rax; ret
  EXPECT_EQ(run({.rdx = 100, .rsp = stack_top, .rip = code}).rcx, 100u);
  // Past the increment, from the same call.
  EXPECT_EQ(run({.rax = 2, .rdx = 100, .rsp = stack_top, .rip = code}).rcx, 0u);
  EXPECT_EQ(run({.rdx = 100, .rsp = stack_top, .rip = code}).rcx, 100u);
}

TEST_F(TranslatorGuest, DeepRecursionReturnsThroughEveryCall) {
  // f: dec edx; jz out; call f; inc ecx; out: ret
  place(code + 0x20, {0xff, 0xca, 0x74, 7, 0xe8, 0xf7, 0xff, 0xff, 0xff, 0xff, 0xc1, 0xc3});
  place(code, {0xe8, 0x1b, 0, 0, 0, 0xf4});  // call f; hlt
  for (int i = 0; i < 3; ++i) {
    const kvm_regs after = run({.rdx = 2000, .rsp = 0x80000, .rip = code});
    EXPECT_EQ(after.rcx, 1999u);
    EXPECT_EQ(after.rsp, 0x80000u);
  }
  // Out of the middle of it: out: mov rsp, rbx; jmp rsi.
  place(code + 0x40,
        {0xff, 0xca, 0x74, 7, 0xe8, 0xf7, 0xff, 0xff, 0xff, 0xff, 0xc1, 0x48, 0x89, 0xdc, 0xff, 0xe6});
  place(code + 16, {0xe8, 0x2b, 0, 0, 0, 0xf4});  // call f; hlt
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(run({.rbx = 0x80000, .rdx = 50, .rsi = code + 5, .rsp = 0x70000, .rip = code + 16}).rip,
              code + 6);
    EXPECT_EQ(run({.rdx = 50, .rsp = 0x70000, .rip = code}).rcx, 49u);
  }
}

// The same code at the same address, in kernel mode and in user mode, where it may not read what it reads.
TEST_F(TranslatorGuest, AnIndirectBranchStaysInItsPrivilege) {
  constexpr uint64_t secret = 0x30000;
  for (const uint64_t page : {uint64_t{0x10000}, uint64_t{0x20000}}) put(table + 8 * (page >> 12), page | 7);
  for (const uint64_t entry : {pml4, pdpt, directory}) ram_.data()[entry] |= 4;
  put(tss + 4, 0x90000);  // the kernel's stack
  put(secret, 42);
  place(code, {0x50, 0xc3});                 // push rax; ret
  place(code + 16, {0xff, 0xe0});            // jmp rax
  place(0x20000, {0x48, 0x8b, 0x0b, 0xf4});  // mov rcx, [rbx]; hlt
  const kvm_sregs kernel = vcpu_->sregs();
  kvm_sregs user = kernel;
  user.cs = segment(0x1b, 11, true);
  user.ds = user.es = user.ss = segment(0x23, 3, false);
  user.cs.dpl = user.ds.dpl = user.es.dpl = user.ss.dpl = 3;
  user.tr = segment(0x28, 11, false);
  user.tr.base = tss;
  user.tr.limit = 0x67;
  user.tr.s = user.tr.g = user.tr.db = 0;
  for (int i = 0; i < 3; ++i)
    for (const uint64_t rip : {code, code + 16}) {
      kvm_regs start{.rax = 0x20000, .rbx = secret, .rsp = code + 0x800, .rip = rip};
      vcpu_->set_sregs(kernel);
      EXPECT_EQ(run(start).rcx, 42u);
      vcpu_->set_sregs(user);
      const kvm_regs after = run(start);
      EXPECT_EQ(after.rip, halted_in_handler(14));
      EXPECT_EQ(after.rcx, 0u);
    }
}

// Bytes that mean something else in 32-bit code, at the same address.
TEST_F(TranslatorGuest, AnIndirectBranchStaysInItsMode) {
  place(code, {0xff, 0xe0});                             // jmp rax
  place(code + 16, {0xc3});                              // ret
  place(0x20000, {0x48, 0xff, 0xc1, 0x90, 0x48, 0xf4});  // inc rcx; hlt - dec eax; inc ecx; nop; dec eax; hlt
  put(stack_top, 0x20000);
  const kvm_sregs wide = vcpu_->sregs();
  kvm_sregs narrow = wide;
  narrow.cs = segment(8, 11, false);
  for (int i = 0; i < 3; ++i)
    for (const uint64_t rip : {code, code + 16}) {
      const kvm_regs start{.rax = 0x20000, .rcx = 5, .rsp = stack_top, .rip = rip};
      vcpu_->set_sregs(wide);
      EXPECT_EQ(run(start).rax, 0x20000u);
      vcpu_->set_sregs(narrow);
      const kvm_regs after = run(start);
      EXPECT_EQ(after.rax, 0x1fffeu);
      EXPECT_EQ(after.rcx, 6u);
    }
}

TEST_F(TranslatorGuest, AdditionsToEspClearItsUpperHalf) {
  // add esp, 8; lea esp, [rsp + 8]; xor eax, eax; hlt
  place(code, {0x83, 0xc4, 8, 0x8d, 0x64, 0x24, 8, 0x31, 0xc0, 0xf4});
  EXPECT_EQ(run({.rsp = 0x1'0000'9000, .rip = code}).rsp, 0x9010u);
}

TEST_F(TranslatorGuest, ACallToANonCanonicalAddressPushesNothing) {
  place(code, {0xff, 0xd0});       // call rax
  place(code + 16, {0xff, 0x13});  // call [rbx]
  put(0xa000, uint64_t{1} << 60);
  for (const uint64_t rip : {code, code + 16}) {
    // The exception's frame begins at a multiple of 16, below what the call would have written.
    put(stack_top, 0x1234);
    const kvm_regs after = run({.rax = uint64_t{1} << 60, .rbx = 0xa000, .rsp = stack_top + 8, .rip = rip});
    EXPECT_EQ(after.rip, halted_in_handler(13));
    uint64_t untouched = 0;
    std::memcpy(&untouched, ram_.data() + stack_top, 8);
    EXPECT_EQ(untouched, 0x1234u);
  }
}

// Also those that steer what is outside the block (IF, AC, IOPL), behind which it ends.
TEST_F(TranslatorGuest, PopfAndPushfMoveAllFlagsOfTheKernel) {
  // push rax; popfq; lea ebx, [rbx + 1]; pushfq; pop rcx; hlt
  place(code, {0x50, 0x9d, 0x8d, 0x5b, 1, 0x9c, 0x59, 0xf4});
  for (const uint64_t flags : {0UL, 0x200UL, 0x400UL, 0x800UL, 0xd5UL, 0x8d5UL, 0x3000UL, 0x4000UL,
                               0x4'0000UL, 0x20'0000UL, 0x20'4ed5UL})
    for (int i = 0; i < 3; ++i) {
      const kvm_regs after = run({.rax = flags, .rsp = stack_top, .rip = code});
      EXPECT_EQ(after.rcx, flags | 2) << std::hex << flags;
      EXPECT_EQ(after.rflags, flags | 2) << std::hex << flags;
      EXPECT_EQ(after.rbx, 1u) << std::hex << flags;
      EXPECT_EQ(after.rsp, stack_top);
    }
  // VIP, VIF, VM and RF are not POPF's.
  EXPECT_EQ(run({.rax = 0x1b'0002, .rsp = stack_top, .rip = code}).rcx, 2u);
  // With TF the next instruction is the last before the trap.
  const kvm_regs trapped = run({.rax = 0x100, .rsp = stack_top, .rip = code});
  EXPECT_EQ(trapped.rip, halted_in_handler(1));
  EXPECT_EQ(trapped.rbx, 1u);
}

// Nothing else looks between POPF or the instruction behind STI and what comes then.
TEST_F(TranslatorGuest, AnEventThatWaitsIsTakenWherePopfOrStiOpensTheWindow) {
  place(code, {0x68, 2, 2, 0, 0, 0x9d, 0x8d, 0x5b, 1, 0xf4});    // push 0x202; popfq; lea ebx, [rbx + 1]; hlt
  place(code + 32, {0x90, 0xfb, 0xeb, 0, 0x8d, 0x5b, 1, 0xf4});  // nop; sti; jmp to lea ebx, [rbx + 1]; hlt
  for (const uint64_t rip : {code, code + 32})
    for (int i = 0; i < 3; ++i) {
      EXPECT_EQ(run({.rsp = stack_top, .rip = rip}).rbx, 1u);
      vcpu_->set_regs({.rsp = stack_top, .rip = rip, .rflags = 2});
      vcpu_->shared().request_interrupt_window = 1;
      const Exit exit = vcpu_->run();
      EXPECT_EQ(exit.reason(), static_cast<uint32_t>(KVM_EXIT_IRQ_WINDOW_OPEN)) << exit.describe();
      EXPECT_EQ(vcpu_->regs().rbx, 0u);
      EXPECT_EQ(vcpu_->regs().rip, rip == code ? code + 6 : code + 36);
      vcpu_->shared().request_interrupt_window = 0;
    }
}

// The instruction behind STI is no place to look at requests, and here the only other one is STI itself.
TEST_F(TranslatorGuest, ALoopThatStiIsPartOfCanBeEndedFromOutside) {
  place(code, {0xfb, 0xfb, 0xeb, 0xfc});  // again: sti; sti; jmp again
  vcpu_->set_regs({.rsp = stack_top, .rip = code, .rflags = 2});
  std::thread other([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    vcpu_->kick();
  });
  EXPECT_TRUE(vcpu_->run().interrupted());
  other.join();
}

// Whether the host's copy of RCX or that of ECX counts.
TEST_F(TranslatorGuest, LoopCountsTheRegisterOfItsAddressSize) {
  place(code, {0x8d, 0x5b, 1, 0xe2, 0xfb, 0xf4});             // again: lea ebx, [rbx + 1]; loop again; hlt
  place(code + 16, {0x8d, 0x5b, 1, 0x67, 0xe2, 0xfa, 0xf4});  // by ECX
  kvm_regs after = run({.rcx = 5, .rsp = stack_top, .rip = code});
  EXPECT_EQ(after.rbx, 5u);
  EXPECT_EQ(after.rcx, 0u);
  after = run({.rcx = 0x7'0000'0003, .rsp = stack_top, .rip = code + 16});
  EXPECT_EQ(after.rbx, 3u);
  EXPECT_EQ(after.rcx, 0u);  // the upper half is cleared
}

// --- 32-bit code: both engines are asked

struct FarAccess {
  std::array<uint8_t, 7> code{};  // behind XOR EAX,EAX; padded with HLT
  uint64_t rbx = 0;
  kvm_segment fs{};
};

// What is left of a run without paging or an IDT: 0 and the registers, or the reason of its end.
std::array<uint64_t, 5> outcome(Engine engine, const FarAccess& access) {
  const auto system = open({.engine = engine, .translate_after = 0});
  Mapping ram = Mapping::anonymous(ram_size);
  for (uint64_t i = 0; i < ram_size; ++i) ram.data()[i] = static_cast<uint8_t>(i * 7 + (i >> 8));
  const auto vm = system->create_vm();
  vm->set_user_memory_region({.slot = 0,
                              .flags = 0,
                              .guest_phys_addr = 0,
                              .memory_size = ram_size,
                              .userspace_addr = reinterpret_cast<uint64_t>(ram.data())});
  const auto vcpu = vm->create_vcpu(0);
  vcpu->set_cpuid2(system->supported_cpuid());
  kvm_sregs s = vcpu->sregs();
  s.cs = segment(8, 11, false);
  s.ds = s.es = s.ss = s.gs = segment(16, 3, false);
  s.fs = access.fs;
  s.cr0 = 0x11;
  s.idt = {.base = 0, .limit = 0, .padding = {}};
  vcpu->set_sregs(s);
  uint8_t* at = ram.data() + code;
  *at++ = 0x31, *at++ = 0xc0;
  at = std::copy(access.code.begin(), access.code.end(), at);
  *at = 0xf4;
  vcpu->set_regs(
      {.rax = 1, .rbx = access.rbx, .rcx = 0x5a5a'1234, .rsp = stack_top, .rip = code, .rflags = 2});
  const Exit exit = vcpu->run();
  const kvm_regs r = vcpu->regs();
  uint64_t sum = 0;
  for (uint64_t i = 0; i < ram_size; ++i) sum = sum * 31 + ram.data()[i];
  // Flags that a faulting ADD would have replaced are not kept (docs/soft.md).
  return {exit.reason(), r.rax, r.rip, exit.reason() == KVM_EXIT_HLT ? r.rflags : 0, sum};
}

TEST(TranslatorOf32BitCode, LimitsAndTypesOfFsAreHeeded) {
  constexpr uint8_t hlt = 0xf4;
  const std::array<uint8_t, 7> codes[] = {{0x64, 0x8b, 0x03, hlt, hlt, hlt, hlt},     // mov eax, fs:[ebx]
                                          {0x64, 0x89, 0x0b, hlt, hlt, hlt, hlt},     // mov fs:[ebx], ecx
                                          {0x64, 0x8b, 0x43, 0xfc, hlt, hlt, hlt},    // mov eax, fs:[ebx - 4]
                                          {0x64, 0x01, 0x0b, hlt, hlt, hlt, hlt},     // add fs:[ebx], ecx
                                          {0x64, 0xa1, 0xf8, 0xff, 0xff, 0xff, hlt},  // mov eax, fs:[-8]
                                          {0x64, 0xa3, 0x00, 0x02, 0x00, 0x00, hlt}};  // mov fs:[0x200], eax
  kvm_segment usual = segment(24, 3, false);
  usual.base = 0x2'0100;
  std::vector<kvm_segment> segments(6, usual);
  segments[1].base = 0xffff'f900;  // linear addresses wrap
  segments[2].limit = 0x1fff;
  segments[3].type = 1;                             // read-only
  segments[4].type = 7, segments[4].limit = 0xfff;  // expand-down
  segments[5] = {};
  segments[5].unusable = 1;
  unsigned halts = 0, shutdowns = 0;
  for (const auto& bytes : codes)
    for (const kvm_segment& fs : segments)
      for (const uint64_t rbx : {0x100UL, 0x1000UL, 0x1ffdUL, 0x3'0000UL, 0xffff'fffcUL, 0xffff'fffdUL}) {
        const FarAccess access{.code = bytes, .rbx = rbx, .fs = fs};
        const auto wanted = outcome(Engine::interpret, access);
        EXPECT_EQ(outcome(Engine::translate, access), wanted)
            << std::hex << unsigned{bytes[1]} << " base " << fs.base << " limit " << fs.limit << " rbx "
            << rbx;
        ++(wanted[0] == KVM_EXIT_HLT ? halts : shutdowns);
      }
  EXPECT_GT(halts, 50u);
  EXPECT_GT(shutdowns, 50u);
}

// FLDCW by the interpreter, because its operand reaches into the next page: what follows was made for masked
// exceptions.
TEST_F(TranslatorGuest, AnExceptionUnmaskedByTheInterpreterIsTheGuests) {
  // fldcw (%rsi); fld1; fldz; fdivp; fld1; hlt
  place(code, {0xd9, 0x2e, 0xd9, 0xe8, 0xd9, 0xee, 0xde, 0xf9, 0xd9, 0xe8, 0xf4});
  constexpr uint64_t across = 0x21000 - 1;
  put(across, 0x037f);
  EXPECT_EQ(run({.rsi = across, .rsp = stack_top, .rip = code}).rip, code + 11);  // and links the blocks
  put(across, 0x037b);                                                            // ZM clear
  EXPECT_EQ(run({.rsi = across, .rsp = stack_top, .rip = code}).rip, halted_in_handler(16));
}

// A path along the taken branch, with one look-up for the accesses before and behind it. Where that look-up
// cannot be used, the interpreter runs the instructions, and the branch may go the other way.
TEST_F(TranslatorGuest, APathIsLeftByTheInterpreterToo) {
  // 1: mov (%rsi),%eax; test %edi,%edi; jne 2f; inc %ebx; 2: add 8(%rsi),%ebx; dec %ecx; jne 1b; hlt
  place(code,
        {0x8b, 0x06, 0x85, 0xff, 0x75, 0x02, 0xff, 0xc3, 0x03, 0x5e, 0x08, 0xff, 0xc9, 0x75, 0xf1, 0xf4});
  constexpr uint64_t data = 0x20000, across = data + 4096 - 8;
  put(data + 8, 3);
  put(across + 8, 3);
  EXPECT_EQ(run({.rbx = 0, .rcx = 5000, .rsi = data, .rdi = 1, .rip = code}).rbx, 15'000u);
  EXPECT_EQ(counted("superblocks"), 1u);
  EXPECT_EQ(run({.rbx = 0, .rcx = 1, .rsi = across, .rdi = 1, .rip = code}).rbx, 3u);
  EXPECT_EQ(run({.rbx = 0, .rcx = 1, .rsi = across, .rdi = 0, .rip = code}).rbx, 4u);
  EXPECT_EQ(run({.rbx = 0, .rcx = 7, .rsi = data, .rdi = 0, .rip = code}).rbx, 28u);
}

}  // namespace
}  // namespace lodge::kvm::soft
