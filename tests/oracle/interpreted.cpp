#include "interpreted.hpp"

#include <linux/kvm.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <system_error>

#include "kvm/soft/cpu/cpu.hpp"
#include "kvm/soft/cpu/cpuid.hpp"
#include "kvm/soft/cpu/quiet_platform.hpp"
#include "kvm/soft/decode/decoder.hpp"
#include "kvm/soft/interpret/vector/exchange.hpp"
#include "kvm/soft/mmu/memory_map.hpp"

namespace lodge::oracle {

using namespace kvm::soft;

namespace {

// Guest-physical memory: page tables, the code page, the window.
constexpr uint64_t pml4 = 0, pdpt = page, directory = 2 * page, window_table = 3 * page,
                   code_table = 4 * page, code_page = 5 * page, window_pages = 6 * page, ram_size = 16 * page;
constexpr uint64_t present = 1, writable = 2, user = 4, marked = 0x60;

}  // namespace

struct Interpreted::Machine {
  Machine() {
    void* const at =
        mmap(nullptr, ram_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (at == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "guest memory");
    ram = static_cast<uint8_t*>(at);
    build_tables();
    kvm_userspace_memory_region region = {};
    region.memory_size = ram_size;
    region.userspace_addr = reinterpret_cast<uint64_t>(ram);
    map.insert(std::make_shared<Slot>(region, code_epoch));
    cpu.memory = &map;
    set_up_cpu();
  }
  ~Machine() { munmap(ram, ram_size); }

  void entry(uint64_t table, uint64_t index, uint64_t value) {
    std::memcpy(ram + table + 8 * index, &value, 8);
  }

  void build_tables() {
    const uint64_t all = present | writable | user | marked;
    entry(pml4, 0, pdpt | all);
    entry(pdpt, window_base >> 30, directory | all);
    static_assert(window_base >> 30 == code_base >> 30 && window_base >> 21 != code_base >> 21);
    entry(directory, window_base >> 21 & 511, window_table | all);
    entry(directory, code_base >> 21 & 511, code_table | all);
    entry(code_table, code_base >> 12 & 511, code_page | present | user | marked);
    for (uint64_t i = 0; i < window_size / page; ++i)
      entry(
          window_table, (window_base >> 12 & 511) + i,
          (window_pages + i * page) | present | user | marked | (i * page < window_writable ? writable : 0));
  }

  void set_up_cpu() {
    cpu.cr0 = cr0::pe | cr0::mp | cr0::et | cr0::ne | cr0::wp | cr0::am | cr0::pg;
    cpu.cr3 = pml4;
    cpu.cr4 = cr4::pae | cr4::osfxsr | cr4::osxmmexcpt | cr4::osxsave | cr4::fsgsbase | cr4::umip | cr4::de;
    cpu.efer = efer::lme | efer::lma | efer::nxe | efer::sce;
    cpu.xcr0 = supported_xcr0();
    const auto flat = [](uint16_t selector, uint16_t attributes) {
      return Segment{.base = 0, .limit = 0xffff'ffff, .selector = selector, .attributes = attributes};
    };
    cpu.segment[seg_cs] = flat(0x33, 0xa0fb);
    for (const auto data : {seg_ss, seg_ds, seg_es}) cpu.segment[data] = flat(0x2b, 0xc0f3);
    cpu.set_cpl(3);
    cpu.features = Features(host_cpuid());
    cpu.features.xcr0_valid = supported_xcr0();
    decoder.configure(cpu.features);
  }

  uint8_t* ram = nullptr;
  QuietPlatform platform;  // nothing that the oracle runs asks it anything
  CodeWatch code_epoch;
  MemoryMap map;
  Cpu cpu{platform, 0};
  Decoder decoder;
};

Interpreted::Interpreted() : machine_(std::make_unique<Machine>()) {}
Interpreted::~Interpreted() = default;

void Interpreted::run(const Case& c, std::span<const uint8_t> memory, Outcome& outcome) {
  Cpu& cpu = machine_->cpu;
  uint8_t* const window = machine_->ram + window_pages;
  std::memcpy(window, memory.data(), window_size);
  std::memset(machine_->ram + code_page, 0xcc, page);
  std::memcpy(machine_->ram + code_page + (code_rip - code_base), c.code.data(), c.length);
  std::copy(c.state.gpr.begin(), c.state.gpr.end(), cpu.gpr.begin());
  cpu.rip = c.state.rip;
  constexpr uint16_t code64 = 0xa0fb, code32 = 0xc0fb;
  cpu.segment[seg_cs].attributes = c.bits32 ? code32 : code64;
  cpu.segment[seg_cs].selector = c.bits32 ? selector_code32 : selector_code64;
  cpu.state_changed();
  constexpr uint64_t trap_flag = 0x100;
  cpu.set_rflags(c.whole ? c.state.rflags : c.state.rflags | trap_flag);
  auto area = c.state.xsave;
  const uint64_t components = supported_xcr0();
  std::memset(&area[512], 0, 64);
  std::memcpy(&area[512], &components, 8);
  set_xsave(cpu.vector, area, components);
  cpu.pending = {};
  cpu.wants_exit = false;

  // A block of this instruction, as the run loop would make it.
  std::array<Op, 2> ops{};
  machine_->decoder.decode(cpu, cpu.rip, c.code.data(), c.length, ops[0]);
  ops[1] = Decoder::end_of_block(ops[0].length);
  cpu.gpr[gpr_rip] = cpu.rip;
  cpu.alone = true;
  // Long strings stop now and then to look at interrupts, and go on.
  constexpr unsigned many = 4096;
  for (unsigned i = 0; i < many; ++i) {
    ops[0].handler(cpu, ops.data());
    if (!c.whole || cpu.pending.valid || cpu.rip != c.state.rip) break;
  }

  outcome.exception = cpu.pending.valid ? static_cast<int32_t>(cpu.pending.vector) : -1;
  outcome.error = cpu.pending.valid && cpu.pending.has_error ? cpu.pending.error : 0;
  outcome.cr2 = cpu.pending.valid && cpu.pending.vector == Exception::pf ? cpu.pending.payload : 0;
  std::copy_n(cpu.gpr.begin(), 16, outcome.state.gpr.begin());
  outcome.state.rip = cpu.rip;
  outcome.state.rflags = cpu.rflags();
  get_xsave(cpu.vector, outcome.state.xsave);
  std::memcpy(outcome.memory.data(), window, window_size);
}

}  // namespace lodge::oracle
