#include "translated.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>
#include <utility>

#include "base/mapping.hpp"
#include "kvm/soft/interpret/vector/exchange.hpp"
#include "kvm/soft/soft.hpp"

namespace lodge::oracle {
namespace {

// Guest-physical memory: page tables, what the kernel needs, the program.
constexpr uint64_t pml4 = 0, user_pdpt = 1 * page, user_directory = 2 * page, window_table = 3 * page,
                   code_table = 4 * page, kernel_pdpt = 5 * page, kernel_directory = 6 * page, gdt = 7 * page,
                   idt = 8 * page, tss = 9 * page, kernel_text = 10 * page, kernel_stack = 12 * page,
                   code_pages = 16 * page, window_pages = 32 * page, ram_size = 2 << 20;
constexpr uint64_t kernel = 0xffff'8000'0000'0000;  // where the kernel sees it all
constexpr uint64_t present = 1, writable = 2, user = 4, marked = 0x60, large = 0x80, no_execute = 1ull << 63;
constexpr uint64_t stack_top = kernel_stack + page - 64;
constexpr uint16_t kernel_code = 8, tss_selector = 0x40;
constexpr uint64_t iretq_at = kernel_text + 0xff0, handler_size = 16;
constexpr unsigned vectors = 32;

constexpr bool has_error_code(unsigned vector) {
  return vector == 8 || (vector >= 10 && vector <= 14) || vector == 17;
}

kvm_segment flat(uint16_t selector, uint8_t type, uint8_t dpl, bool wide) {
  kvm_segment s{};
  s.limit = 0xffff'ffff;
  s.selector = selector;
  s.type = type;
  s.present = s.s = s.g = 1;
  s.dpl = dpl;
  s.l = wide ? 1 : 0;
  s.db = wide ? 0 : 1;
  return s;
}

}  // namespace

struct Translated::Machine {
  explicit Machine(kvm::soft::Engine engine)
      : system(kvm::soft::open({.engine = engine,
                                .translate_after = 0,
                                .superblock_after = 2,
                                // Small, so that it fills up now and then.
                                .code_cache = size_t{2} << 20})),
        ram(Mapping::anonymous(ram_size)),
        vm(system->create_vm()) {
    build_tables();
    vm->set_user_memory_region({.slot = 0,
                                .flags = 0,
                                .guest_phys_addr = 0,
                                .memory_size = ram_size,
                                .userspace_addr = reinterpret_cast<uint64_t>(ram.data())});
    vcpu = vm->create_vcpu(0);
    vcpu->set_cpuid2(system->supported_cpuid());
    set_up_vcpu();
    watchdog = std::jthread([this](const std::stop_token& stop) { watch(stop); });
  }

  void put(uint64_t gpa, uint64_t value) { std::memcpy(ram.data() + gpa, &value, 8); }
  uint64_t get(uint64_t gpa) const {
    uint64_t value = 0;
    std::memcpy(&value, ram.data() + gpa, 8);
    return value;
  }

  void build_tables() {
    const uint64_t all = present | writable | user | marked;
    put(pml4, user_pdpt | all);
    put(user_pdpt + 8 * (window_base >> 30), user_directory | all);
    put(user_directory + 8 * (window_base >> 21 & 511), window_table | all);
    put(user_directory + 8 * (code_base >> 21 & 511), code_table | all);
    for (uint64_t i = 0; i < code_size / page; ++i)
      put(code_table + 8 * ((code_base >> 12 & 511) + i), (code_pages + i * page) | all);
    put(code_table + 8 * (counter_base >> 12 & 511), (code_pages + code_size) | all | no_execute);
    for (uint64_t i = 0; i < window_size / page; ++i)
      put(window_table + 8 * ((window_base >> 12 & 511) + i),
          (window_pages + i * page) | present | user | marked | no_execute |
              (i * page < window_writable ? writable : 0));
    put(pml4 + 8 * 256, kernel_pdpt | present | writable | marked);
    put(kernel_pdpt, kernel_directory | present | writable | marked);
    put(kernel_directory, large | present | writable | marked);

    put(gdt + kernel_code, 0x00af'9b00'0000'ffff);
    put(gdt + (selector_code32 & ~7), 0x00cf'fb00'0000'ffff);
    put(gdt + (selector_data & ~7), 0x00cf'f300'0000'ffff);
    put(gdt + (selector_code64 & ~7), 0x00af'fb00'0000'ffff);
    put(tss + 4, kernel + stack_top);
    put(tss + 0x60, uint64_t{0x68} << 48);  // no I/O permission map
    for (uint64_t vector = 0; vector < vectors; ++vector) {
      const uint64_t handler = kernel + kernel_text + vector * handler_size;
      constexpr uint64_t gate = 0xee00;  // DPL 3, for INT3
      put(idt + 16 * vector,
          (handler & 0xffff) | uint64_t{kernel_code} << 16 | gate << 32 | (handler >> 16 & 0xffff) << 48);
      put(idt + 16 * vector + 8, handler >> 32);
      ram.data()[kernel_text + vector * handler_size] = 0xf4;  // hlt
    }
    ram.data()[iretq_at] = 0x48;
    ram.data()[iretq_at + 1] = 0xcf;
  }

  void set_up_vcpu() {
    kvm_sregs s = vcpu->sregs();
    s.cs = flat(kernel_code, 11, 0, true);
    s.ss = flat(selector_data, 3, 0, false);
    s.ds = s.es = flat(selector_data, 3, 3, false);
    s.gdt = {.base = kernel + gdt, .limit = 0x3f, .padding = {}};
    s.idt = {.base = kernel + idt, .limit = 16 * vectors - 1, .padding = {}};
    s.tr = flat(tss_selector, 11, 0, false);
    s.tr.s = s.tr.g = s.tr.db = 0;
    s.tr.base = kernel + tss;
    s.tr.limit = 0x67;
    s.cr0 = 0x8005'0033;  // PG, AM, WP, NE, ET, MP, PE
    s.cr3 = pml4;
    s.cr4 = 0x5'0e28;  // OSXSAVE, FSGSBASE, UMIP, OSXMMEXCPT, OSFXSR, PAE, DE
    s.efer = 0xd01;    // NXE, LMA, LME, SCE
    vcpu->set_sregs(s);
    xcr0 = kvm::soft::supported_xcr0();
    vcpu->set_xcrs(
        {.nr_xcrs = 1, .flags = 0, .xcrs = {{.xcr = 0, .reserved = 0, .value = xcr0}}, .padding = {}});
  }

  // A block that runs for seconds will not end.
  void watch(const std::stop_token& stop) {
    uint64_t last = 0;
    std::mutex mutex;
    std::condition_variable_any wake;
    std::unique_lock lock(mutex);
    while (!wake.wait_for(lock, stop, std::chrono::seconds(3), [] { return false; }) &&
           !stop.stop_requested()) {
      const uint64_t now = runs.load();
      if (now == last && running.load()) vcpu->kick();
      last = now;
    }
  }

  std::unique_ptr<kvm::System> system;
  Mapping ram;
  std::unique_ptr<kvm::Vm> vm;
  std::unique_ptr<kvm::Vcpu> vcpu;
  uint64_t xcr0 = 0;
  std::array<uint8_t, code_size> code{};
  bool code_changed = false;  // by itself
  std::atomic<uint64_t> runs{0};
  std::atomic<bool> running{false};
  std::jthread watchdog;
};

Translated::Translated(kvm::soft::Engine engine) : machine_(std::make_unique<Machine>(engine)) {}
Translated::~Translated() = default;

uint64_t Translated::superblocks() const {
  for (const kvm::Statistic& s : machine_->vcpu->statistics())
    if (std::string_view(s.name) == "superblocks") return s.value;
  return 0;
}

void Translated::run(const Case& c, bool fresh_code, std::span<const uint8_t> memory, Outcome& out) {
  Machine& m = *machine_;
  // Code that nobody has chosen may load a segment register.
  if (c.bits32) {
    kvm_sregs s = m.vcpu->sregs();
    if (s.ds.selector != selector_data || s.es.selector != selector_data) {
      s.ds = s.es = flat(selector_data, 3, 3, false);
      m.vcpu->set_sregs(s);
    }
  }
  uint8_t* const ram = m.ram.data();
  std::copy(memory.begin(), memory.end(), ram + window_pages);
  if (fresh_code || std::exchange(m.code_changed, false)) {
    m.code.fill(0xcc);
    std::memcpy(&m.code[c.state.rip - code_base], c.code.data(), c.length);
    std::memcpy(ram + code_pages, m.code.data(), code_size);
    m.vm->note_write(code_pages, code_size);
  }
  std::array<uint32_t, page / 4> counters;
  counters.fill(loop_count);
  std::memcpy(ram + code_pages + code_size, counters.data(), sizeof counters);

  constexpr uint64_t frame = stack_top - 512;  // apart from what the exception pushes
  m.put(frame, c.state.rip);
  m.put(frame + 8, c.bits32 ? selector_code32 : selector_code64);
  m.put(frame + 16, c.state.rflags);
  m.put(frame + 24, c.state.gpr[4]);
  m.put(frame + 32, selector_data);
  const auto& g = c.state.gpr;
  m.vcpu->set_regs({.rax = g[0],
                    .rbx = g[3],
                    .rcx = g[1],
                    .rdx = g[2],
                    .rsi = g[6],
                    .rdi = g[7],
                    .rsp = kernel + frame,
                    .rbp = g[5],
                    .r8 = g[8],
                    .r9 = g[9],
                    .r10 = g[10],
                    .r11 = g[11],
                    .r12 = g[12],
                    .r13 = g[13],
                    .r14 = g[14],
                    .r15 = g[15],
                    .rip = kernel + iretq_at,
                    .rflags = 2});
  kvm_xsave image{};
  auto* const bytes = reinterpret_cast<uint8_t*>(image.region);
  std::copy(c.state.xsave.begin(), c.state.xsave.end(), bytes);
  std::memset(bytes + 512, 0, 64);
  std::memcpy(bytes + 512, &m.xcr0, 8);
  m.vcpu->set_xsave(image);

  m.runs.fetch_add(1);
  m.running.store(true);
  const kvm::Exit exit = m.vcpu->run();
  m.running.store(false);
  out.exception = exit.interrupted() ? hung : lost;
  out.error = out.cr2 = 0;
  const kvm_regs r = m.vcpu->regs();
  out.state.gpr = {r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi,
                   r.r8,  r.r9,  r.r10, r.r11, r.r12, r.r13, r.r14, r.r15};
  out.state.rip = r.rip;
  out.state.rflags = r.rflags;
  const uint64_t vector = (r.rip - 1 - kernel - kernel_text) / handler_size;
  if (!exit.interrupted() && exit.reason() == KVM_EXIT_HLT && vector < vectors) {
    out.exception = static_cast<int32_t>(vector);
    uint64_t at = r.rsp - kernel;
    if (has_error_code(static_cast<unsigned>(vector))) {
      out.error = m.get(at);
      at += 8;
    }
    out.state.rip = m.get(at);
    out.state.rflags = m.get(at + 16);
    out.state.gpr[4] = m.get(at + 24);
    if (vector == 14) out.cr2 = m.vcpu->sregs().cr2;
    if (vector == 3) {
      out.exception = -1;
      out.state.rip -= 1;
    }
  }
  const kvm_xsave left = m.vcpu->xsave();
  std::memcpy(out.state.xsave.data(), left.region, xsave_size);
  std::memcpy(out.memory.data(), ram + window_pages, window_size);
  m.code_changed = std::memcmp(ram + code_pages, m.code.data(), code_size) != 0;
}

}  // namespace lodge::oracle
