#include "kvm/soft/cpu/smm.hpp"

#include <algorithm>

#include "kvm/soft/cpu/control.hpp"
#include "kvm/soft/cpu/cpuid_bits.hpp"
#include "kvm/soft/cpu/exchange.hpp"

namespace lodge::kvm::soft {
namespace {

constexpr uint64_t handler_offset = 0x8000, save_area_offset = 0xfe00;
constexpr unsigned save_area_size = 0x200;
constexpr uint32_t revision_32 = 0x2'0000, revision_64 = 0x2'0064;  // bit 17: SMBASE can be moved
constexpr uint16_t real_mode_data = 0x8093, real_mode_code = 0x809b, attribute_bits = 0xf0ff;

// What the save area holds of the processor.
struct SavedState {
  std::array<uint64_t, 16> gpr{};
  uint64_t rip = 0, rflags = 0;
  uint64_t cr0 = 0, cr3 = 0, cr4 = 0, efer = 0, dr6 = 0, dr7 = 0;
  std::array<Segment, 6> segment{};
  Segment ldtr, tr;
  DescriptorTable gdtr, idtr;
  uint64_t smbase = 0;
  bool halted = false;
};

SavedState state_of(Cpu& cpu) noexcept {
  SavedState s;
  std::copy_n(cpu.gpr.begin(), s.gpr.size(), s.gpr.begin());
  s.rip = cpu.rip;
  s.rflags = cpu.rflags();
  s.cr0 = cpu.cr0;
  s.cr3 = cpu.cr3;
  s.cr4 = cpu.cr4;
  s.efer = cpu.efer;
  s.dr6 = cpu.dr6;
  s.dr7 = cpu.dr7;
  std::copy_n(cpu.segment.begin(), s.segment.size(), s.segment.begin());
  s.ldtr = cpu.ldtr;
  s.tr = cpu.tr;
  s.gdtr = cpu.gdtr;
  s.idtr = cpu.idtr;
  s.smbase = cpu.msr.smbase;
  s.halted = cpu.halted;
  return s;
}

// The save area by the offsets of the manuals, which count from SMBASE. Both layouts are described once, for
// reading and for writing.
class SaveArea {
 public:
  std::array<uint8_t, save_area_size> bytes{};

  template <class T>
  void put(unsigned offset, uint64_t value) noexcept {
    const T narrow = static_cast<T>(value);
    std::memcpy(&bytes[offset - save_area_offset], &narrow, sizeof narrow);
  }
  template <class T>
  T get(unsigned offset) const noexcept {
    T value;
    std::memcpy(&value, &bytes[offset - save_area_offset], sizeof value);
    return value;
  }
};

struct Writer {
  SaveArea& area;
  template <class T, class Field>
  void field(unsigned offset, Field& value) const noexcept {
    area.put<T>(offset, value);
  }
};
struct Reader {
  SaveArea& area;
  template <class T, class Field>
  void field(unsigned offset, Field& value) const noexcept {
    value = static_cast<Field>(area.get<T>(offset));
  }
};

// AMD APM volume 2, table 10-1. RAX lies highest, R15 lowest.
template <class Area>
void layout_64(const Area& area, SavedState& s) noexcept {
  const auto segment = [&](unsigned at, Segment& x) {
    area.template field<uint16_t>(at, x.selector);
    area.template field<uint16_t>(at + 2, x.attributes);
    area.template field<uint32_t>(at + 4, x.limit);
    area.template field<uint64_t>(at + 8, x.base);
  };
  const auto table = [&](unsigned at, DescriptorTable& x) {
    area.template field<uint16_t>(at + 4, x.limit);
    area.template field<uint64_t>(at + 8, x.base);
  };
  constexpr SegmentName order[] = {seg_es, seg_cs, seg_ss, seg_ds, seg_fs, seg_gs};
  for (unsigned i = 0; i < 6; ++i) segment(0xfe00 + 0x10 * i, s.segment[order[i]]);
  table(0xfe60, s.gdtr);
  segment(0xfe70, s.ldtr);
  table(0xfe80, s.idtr);
  segment(0xfe90, s.tr);
  area.template field<uint8_t>(0xfec9, s.halted);
  area.template field<uint64_t>(0xfed0, s.efer);
  area.template field<uint32_t>(0xff00, s.smbase);
  area.template field<uint64_t>(0xff48, s.cr4);
  area.template field<uint64_t>(0xff50, s.cr3);
  area.template field<uint64_t>(0xff58, s.cr0);
  area.template field<uint64_t>(0xff60, s.dr7);
  area.template field<uint64_t>(0xff68, s.dr6);
  area.template field<uint64_t>(0xff70, s.rflags);
  area.template field<uint64_t>(0xff78, s.rip);
  for (unsigned i = 8; i < 16; ++i) area.template field<uint64_t>(0xffb8 - 8 * (i - 8), s.gpr[i]);
  constexpr GprName legacy[] = {rdi, rsi, rbp, rsp, rbx, rdx, rcx, rax};
  for (unsigned i = 0; i < 8; ++i) area.template field<uint64_t>(0xffc0 + 8 * i, s.gpr[legacy[i]]);
}

// SDM volume 3, table 32-1, and the hidden parts of the segments where processors of that time had them.
template <class Area>
void layout_32(const Area& area, SavedState& s) noexcept {
  const auto hidden = [&](unsigned at, Segment& x) {
    uint32_t access = uint32_t{x.attributes} << 8;
    area.template field<uint32_t>(at, access);
    x.attributes = static_cast<uint16_t>(access >> 8 & attribute_bits);
    area.template field<uint32_t>(at + 4, x.limit);
    area.template field<uint32_t>(at + 8, x.base);
  };
  const auto table = [&](unsigned at, DescriptorTable& x) {
    area.template field<uint16_t>(at, x.limit);
    area.template field<uint32_t>(at + 4, x.base);
  };
  area.template field<uint32_t>(0xfffc, s.cr0);
  area.template field<uint32_t>(0xfff8, s.cr3);
  area.template field<uint32_t>(0xfff4, s.rflags);
  area.template field<uint32_t>(0xfff0, s.rip);
  constexpr GprName legacy[] = {rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi};
  for (unsigned i = 0; i < 8; ++i) area.template field<uint32_t>(0xffd0 + 4 * i, s.gpr[legacy[i]]);
  area.template field<uint32_t>(0xffcc, s.dr6);
  area.template field<uint32_t>(0xffc8, s.dr7);
  area.template field<uint16_t>(0xffc4, s.tr.selector);
  area.template field<uint16_t>(0xffc0, s.ldtr.selector);
  constexpr SegmentName order[] = {seg_es, seg_cs, seg_ss, seg_ds, seg_fs, seg_gs};
  constexpr unsigned places[] = {0xff84, 0xff90, 0xff9c, 0xff2c, 0xff38, 0xff44};
  for (unsigned i = 0; i < 6; ++i) {
    area.template field<uint16_t>(0xffa8 + 4 * i, s.segment[order[i]].selector);
    hidden(places[i], s.segment[order[i]]);
  }
  hidden(0xff78, s.ldtr);
  hidden(0xff5c, s.tr);
  table(0xff70, s.gdtr);
  table(0xff54, s.idtr);
  area.template field<uint32_t>(0xff14, s.cr4);
  area.template field<uint16_t>(0xff02, s.halted);
  area.template field<uint32_t>(0xfef8, s.smbase);
}

bool has_long_mode(const Cpu& cpu) noexcept {
  return (cpu.features.ext1_edx & cpuid_ext_edx::lm) != 0;
}

// SDM table 32-4. Segments are those of real mode with limits of 4 GiB.
void start_handler(Cpu& cpu) noexcept {
  const Segment data{.base = 0, .limit = 0xffff'ffff, .selector = 0, .attributes = real_mode_data};
  for (const SegmentName name : {seg_es, seg_ss, seg_ds, seg_fs, seg_gs}) cpu.segment[name] = data;
  cpu.segment[seg_cs] = {.base = cpu.msr.smbase,
                         .limit = 0xffff'ffff,
                         .selector = static_cast<uint16_t>(cpu.msr.smbase >> 4),
                         .attributes = real_mode_code};
  cpu.idtr = {};  // no interrupt or exception before the handler has a table
  cpu.rip = handler_offset;
  cpu.set_rflags(flag::fixed);
  cpu.cr0 &= ~(cr0::pe | cr0::em | cr0::ts | cr0::pg);
  cpu.cr4 = 0;
  if (has_long_mode(cpu)) cpu.efer = 0;
  cpu.dr7 = 0x400;
  cpu.halted = false;
}

// Everything but the address space, which is switched already. False: the state cannot be.
bool restore(Cpu& cpu, const SavedState& s) noexcept {
  if (!valid_control(cpu, {.cr0 = s.cr0,
                           .cr3 = s.cr3,
                           .cr4 = s.cr4,
                           .efer = s.efer,
                           .long_code = s.segment[seg_cs].is_long()}))
    return false;
  std::copy(s.gpr.begin(), s.gpr.end(), cpu.gpr.begin());
  cpu.rip = s.rip;
  cpu.cr0 = s.cr0 | cr0::et;
  cpu.cr3 = s.cr3;
  cpu.cr4 = s.cr4;
  cpu.efer = s.efer;
  write_dr(cpu, 6, static_cast<uint32_t>(s.dr6));
  write_dr(cpu, 7, static_cast<uint32_t>(s.dr7));
  std::copy(s.segment.begin(), s.segment.end(), cpu.segment.begin());
  for (unsigned i = 0; i < s.segment.size(); ++i) cpu.segment[i].attributes &= attribute_bits;
  cpu.ldtr = s.ldtr;
  cpu.tr = s.tr;
  cpu.gdtr = s.gdtr;
  cpu.idtr = s.idtr;
  cpu.msr.smbase = s.smbase;
  cpu.halted = s.halted;
  // Virtual-8086 mode is one of protected mode outside long mode.
  const bool may_be_v86 = cpu.protected_mode() && !cpu.long_mode();
  cpu.set_rflags((s.rflags & flag::valid & ~(may_be_v86 ? 0 : flag::vm)) | flag::fixed);
  cpu.flush_tlb(false);
  cpu.set_cpl(!cpu.protected_mode() ? 0 : cpu.v86() ? 3 : cpu.segment[seg_ss].dpl());
  const bool pae = (cpu.cr0 & cr0::pg) != 0 && (cpu.cr4 & cr4::pae) != 0 && !cpu.long_mode();
  if (!pae || cpu.load_pdptrs(cpu.cr3)) return true;
  cpu.pending = {};
  return false;
}

}  // namespace

bool enter_smm(Cpu& cpu) noexcept {
  SavedState state = state_of(cpu);
  SaveArea area;
  if (has_long_mode(cpu))
    layout_64(Writer{area}, state);
  else
    layout_32(Writer{area}, state);
  area.put<uint32_t>(0xfefc, has_long_mode(cpu) ? revision_64 : revision_32);
  cpu.set_smm(true);
  if (!cpu.write_physical(cpu.msr.smbase + save_area_offset, area.bytes.data(), save_area_size)) return false;
  ++cpu.msr.smi_count;
  cpu.nmi_blocked_before_smm = cpu.nmi_blocked;
  cpu.nmi_blocked = true;
  start_handler(cpu);
  cpu.flush_tlb(false);
  cpu.set_cpl(0);
  return true;
}

bool leave_smm(Cpu& cpu) noexcept {
  SaveArea area;
  if (!cpu.read_physical(cpu.msr.smbase + save_area_offset, area.bytes.data(), save_area_size)) return false;
  SavedState state = state_of(cpu);  // what the layout leaves out stays
  if (has_long_mode(cpu))
    layout_64(Reader{area}, state);
  else
    layout_32(Reader{area}, state);
  cpu.set_smm(false);
  cpu.nmi_blocked = cpu.nmi_blocked_before_smm;
  return restore(cpu, state);
}

}  // namespace lodge::kvm::soft
