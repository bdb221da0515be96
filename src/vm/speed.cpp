#include "vm/speed.hpp"

#include <array>
#include <cstring>

#include "base/mapping.hpp"

namespace lodge::vm {
namespace {

// One MiB of RAM: page tables, code and a word of data.
constexpr uint64_t ram_size = 1 << 20, pml4 = 0x1000, pdpt = 0x2000, directory = 0x3000, code = 0x8000,
                   data = 0xa000;
constexpr uint64_t present_write = 3, large_page = 0x80;

// rcx: rounds. Seven instructions a round; then an exit to the VMM.
constexpr std::array<uint8_t, 24> loop = {0x48, 0x8b, 0x06,        // 1: mov (%rsi),%rax
                                          0x48, 0x01, 0xc8,        //    add %rcx,%rax
                                          0x48, 0x89, 0x06,        //    mov %rax,(%rsi)
                                          0x48, 0x6b, 0xd0, 0x03,  //    imul $3,%rax,%rdx
                                          0x48, 0x31, 0xd3,        //    xor %rdx,%rbx
                                          0x48, 0xff, 0xc9,        //    dec %rcx
                                          0x75, 0xeb,              //    jnz 1b
                                          0xe6, 0x80,              //    out %al,$0x80
                                          0xf4};                   //    hlt
constexpr double round_instructions = 7;
constexpr uint64_t first_rounds = 2000, growth = 4;

void put(Mapping& ram, uint64_t at, uint64_t value) {
  std::memcpy(ram.data() + at, &value, sizeof value);
}

void enter_long_mode(kvm::Vcpu& vcpu) {
  kvm_sregs sregs = vcpu.sregs();
  kvm_segment segment{};
  segment.limit = 0xffffffff;
  segment.present = 1, segment.s = 1, segment.g = 1;
  segment.type = 3, segment.db = 1, segment.selector = 0x10;
  sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = segment;
  segment.type = 11, segment.db = 0, segment.l = 1, segment.selector = 0x8;
  sregs.cs = segment;
  sregs.cr3 = pml4;
  sregs.cr4 = 1 << 5;             // PAE
  sregs.cr0 = 0x80000011;         // PG, ET, PE
  sregs.efer = 1 << 10 | 1 << 8;  // LMA, LME
  vcpu.set_sregs(sregs);
}

// Seconds for so many rounds; 0 when the guest did not get through.
double run_rounds(kvm::Vcpu& vcpu, uint64_t rounds) {
  kvm_regs regs{};
  regs.rip = code, regs.rsi = data, regs.rcx = rounds, regs.rflags = 2;
  vcpu.set_regs(regs);
  const auto start = std::chrono::steady_clock::now();
  for (;;) {
    const kvm::Exit exit = vcpu.run();
    if (exit.interrupted()) continue;
    if (exit.status() < 0 || exit.reason() != KVM_EXIT_IO || exit.io().port != 0x80) return 0;
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
}

}  // namespace

double measure_mips(kvm::System& system, std::chrono::milliseconds budget) {
  Mapping ram = Mapping::anonymous(ram_size);
  put(ram, pml4, pdpt | present_write);
  put(ram, pdpt, directory | present_write);
  put(ram, directory, 0 | present_write | large_page);
  std::memcpy(ram.data() + code, loop.data(), loop.size());

  const auto vm = system.create_vm();
  kvm_userspace_memory_region region{};
  region.memory_size = ram_size;
  region.userspace_addr = reinterpret_cast<uint64_t>(ram.data());
  vm->set_user_memory_region(region);
  const auto vcpu = vm->create_vcpu(0);
  vcpu->set_cpuid2(system.supported_cpuid());
  enter_long_mode(*vcpu);

  // Grow until a run fills a good part of the budget: the last, longest one counts.
  const double enough = std::chrono::duration<double>(budget).count() / (growth + 1);
  for (uint64_t rounds = first_rounds;; rounds *= growth) {
    const double seconds = run_rounds(*vcpu, rounds);
    if (seconds == 0) return 0;
    if (seconds >= enough) return static_cast<double>(rounds) * round_instructions / seconds / 1e6;
  }
}

}  // namespace lodge::vm
