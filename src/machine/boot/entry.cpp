#include "machine/boot/entry.hpp"

#include <array>
#include <vector>

namespace lodge::machine::boot {

namespace {

constexpr uint16_t code_selector = 0x10, data_selector = 0x18, task_selector = 0x20;
constexpr uint64_t code32_descriptor = 0x00cf'9b00'0000'ffff;
constexpr uint64_t code64_descriptor = 0x00af'9b00'0000'ffff;
constexpr uint64_t data_descriptor = 0x00cf'9300'0000'ffff;
// A task register must be loaded in protected mode on Intel hosts; nobody uses the task it names.
constexpr uint64_t task_descriptor = 0x0000'8b00'0000'0067;

constexpr uint64_t cr0_pe = 1, cr0_et = 1 << 4, cr0_pg = 1ull << 31;
constexpr uint64_t cr4_pae = 1 << 5;
constexpr uint64_t efer_lme = 1 << 8, efer_lma = 1 << 10;
constexpr uint64_t rflags_reserved = 2;  // bit 1 is always set
constexpr uint64_t page = 4096;

kvm_segment flat_segment(uint16_t selector, uint8_t type, bool long_code) {
  kvm_segment segment{};
  segment.limit = 0xffff'ffff;
  segment.selector = selector;
  segment.type = type;
  segment.present = 1;
  segment.db = long_code ? 0 : 1;
  segment.s = 1;
  segment.l = long_code ? 1 : 0;
  segment.g = 1;
  return segment;
}

uint64_t place_gdt(Placement& placement, bool is64) {
  const std::array<uint64_t, 6> gdt{
      0, 0, is64 ? code64_descriptor : code32_descriptor, data_descriptor, task_descriptor, 0};
  const uint64_t gpa = placement.allocate(sizeof gdt, 16, "descriptor table");
  placement.store(gpa, {reinterpret_cast<const uint8_t*>(gdt.data()), sizeof gdt}, "the descriptor table");
  return gpa;
}

// One PML4, one page directory pointer table, four page directories of 2 MiB pages.
uint64_t place_page_tables(Placement& placement) {
  constexpr uint64_t present_writable = 3, large = 0x80, entries = 512;
  const uint64_t gpa = placement.allocate(6 * page, page, "initial page tables");
  std::vector<uint64_t> tables(6 * entries);
  tables[0] = (gpa + page) | present_writable;
  for (uint64_t directory = 0; directory < 4; ++directory) {
    tables[entries + directory] = (gpa + (2 + directory) * page) | present_writable;
  }
  for (uint64_t index = 0; index < 4 * entries; ++index) {
    tables[2 * entries + index] = (index << 21) | large | present_writable;
  }
  placement.store(gpa, {reinterpret_cast<const uint8_t*>(tables.data()), 6 * page},
                  "the initial page tables");
  return gpa;
}

BootState enter(Placement& placement, BootState::Mode mode, uint64_t entry, std::string protocol) {
  BootState state;
  state.protocol = std::move(protocol);
  state.mode = mode;
  state.regs.rip = entry;
  state.regs.rflags = rflags_reserved;
  state.gdt_base = place_gdt(placement, mode == BootState::Mode::long64);
  state.gdt_limit = 6 * 8 - 1;
  return state;
}

}  // namespace

void BootState::apply(kvm_sregs& sregs) const noexcept {
  const bool is64 = mode == Mode::long64;
  sregs.cs = flat_segment(code_selector, 0xb, is64);
  sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = flat_segment(data_selector, 0x3, false);
  sregs.tr = kvm_segment{};
  sregs.tr.limit = 0x67;
  sregs.tr.selector = task_selector;
  sregs.tr.type = 0xb;
  sregs.tr.present = 1;
  sregs.ldt = kvm_segment{};
  sregs.ldt.unusable = 1;
  sregs.gdt = {.base = gdt_base, .limit = gdt_limit};
  sregs.idt = {};  // the kernel brings its own; an exception before that ends the guest, as on hardware
  sregs.cr0 = cr0_pe | cr0_et | (is64 ? cr0_pg : 0);
  sregs.cr2 = 0;
  sregs.cr3 = cr3;
  sregs.cr4 = is64 ? cr4_pae : 0;
  sregs.efer = is64 ? efer_lme | efer_lma : 0;
}

void BootState::apply(kvm::Vcpu& vcpu) const {
  kvm_sregs sregs = vcpu.sregs();
  apply(sregs);
  vcpu.set_sregs(sregs);
  vcpu.set_regs(regs);
}

BootState enter_protected(Placement& placement, uint64_t entry, std::string protocol) {
  return enter(placement, BootState::Mode::protected32, entry, std::move(protocol));
}

BootState enter_long(Placement& placement, uint64_t entry, std::string protocol) {
  BootState state = enter(placement, BootState::Mode::long64, entry, std::move(protocol));
  state.cr3 = place_page_tables(placement);
  return state;
}

}  // namespace lodge::machine::boot
