// Memory operands and the stack, by look-ups in the soft TLB that accesses off one register share.
#include <algorithm>

#include "kvm/soft/decode/decoder.hpp"
#include "kvm/soft/interpret/vector/host.hpp"
#include "kvm/soft/translate/unit.hpp"

namespace lodge::kvm::soft {
namespace {

constexpr unsigned largest_run = 256;  // bytes

bool is_call(const Instruction& i) noexcept {
  return i.kind == Kind::call || i.kind == Kind::call_indirect;
}

// Whether a run of accesses ends before this instruction, whatever its operands are.
bool ends_run(const Instruction& i) noexcept {
  switch (i.kind) {
    case Kind::nothing:
    case Kind::copy:
    case Kind::memory:
    case Kind::address:
    case Kind::push:
    case Kind::push_flags:
    case Kind::pop:
    case Kind::leave:
    case Kind::call:
    case Kind::ret: return false;
    case Kind::call_indirect: return i.has_memory();
    default: return true;
  }
}

}  // namespace

// --- what is accessed

UnitEmitter::Access UnitEmitter::operand(const Instruction& i, unsigned size,
                                         int32_t rsp_part) const noexcept {
  const uint8_t checked =
      i.op->segment == seg_fs || i.op->segment == seg_gs ? i.op->segment : uint8_t{seg_none};
  return {.base = i.op->base,
          .index = i.op->index,
          .scale = i.op->scale,
          .segment = wide_ ? i.op->flat_segment : checked,
          .disp = static_cast<int64_t>(i.op->disp) + (i.op->base == rsp ? rsp_part : 0),
          .size = size,
          .write = i.memory_write,
          .narrow = i.narrow_address};
}

UnitEmitter::Access UnitEmitter::stack_access(int64_t disp, bool write) const noexcept {
  return {.base = rsp, .disp = disp, .size = static_cast<unsigned>(word_), .write = write, .narrow = !wide_};
}

std::optional<UnitEmitter::Access> UnitEmitter::access_of(const Instruction& i,
                                                          int32_t rsp_part) const noexcept {
  switch (i.kind) {
    case Kind::memory: return operand(i, i.memory_size, rsp_part);
    case Kind::push:
    case Kind::push_flags:
    case Kind::call:
    case Kind::call_indirect: return stack_access(rsp_part - word_, true);
    case Kind::pop:
    case Kind::ret: return stack_access(rsp_part, false);
    case Kind::leave: {
      Access access = stack_access(0, false);
      access.base = rbp;
      return access;
    }
    default: return std::nullopt;
  }
}

// --- runs

// Whether an instruction without an access of its own leaves alone what a run off `base` depends on.
bool UnitEmitter::spares_run(const Instruction& i, uint8_t base, int32_t stack) const noexcept {
  // One scratch register is left: for an operand, or for one part of an address.
  const unsigned parts =
      i.kind == Kind::address ? count_homeless(i.address_registers) + (i.op->base == gpr_rip ? 1 : 0) : 0;
  if (count_homeless(i.operand_registers) > 1 || parts > 1) return false;
  return (i.operand_registers & register_bit(rsp)) == 0 || (base != rsp && stack == 0);
}

// How far accesses off the same base go, from instruction n on.
void UnitEmitter::plan_run(const Access& first, unsigned n) noexcept {
  run_ = {};
  if (t_.hints.no_runs || first.index != gpr_zero || first.segment != seg_none || first.base >= 16) return;
  int64_t low = first.disp;
  int64_t high = first.disp + first.size;
  bool write = first.write;
  unsigned last = n;
  int32_t stack = flow_.rsp;
  int64_t moved = 0;
  for (unsigned k = n; k < code_.size(); ++k) {
    const Instruction& i = code_[k];
    // Within a path: the access that is looked up before a branch may not come, but that costs a miss at
    // most.
    if (k + 1 < code_.size() && (i.kind == Kind::jump || i.kind == Kind::branch)) {
      if (i.kind == Kind::jump) continue;
      if (first.base == rsp && stack != 0) break;
      stack = 0;  // it is stored there
      continue;
    }
    if (ends_run(i)) break;
    // RSP as data has to be stored first, which moves what accesses are relative to.
    if (i.kind == Kind::memory && k != n && stack != 0 && (i.operand_registers & register_bit(rsp)) != 0)
      break;
    if (auto a = access_of(i, stack); a.has_value()) {
      a->disp += moved;
      if (a->base != first.base || a->index != gpr_zero || a->segment != seg_none ||
          a->narrow != first.narrow)
        break;
      if (i.kind == Kind::leave && k != n) break;
      const int64_t new_low = std::min(low, a->disp);
      const int64_t new_high = std::max(high, a->disp + static_cast<int64_t>(a->size));
      if (new_high - new_low > static_cast<int64_t>(largest_run)) break;
      low = new_low;
      high = new_high;
      write = write || a->write;
      last = k;
      if (i.kind == Kind::push || i.kind == Kind::push_flags) stack -= word_;
      if (i.kind == Kind::pop) stack += word_;
      if (i.kind == Kind::pop && i.op->dst == rsp * 8) break;
      if (i.kind == Kind::leave || i.kind == Kind::ret || is_call(i)) break;
    } else if (int32_t amount = 0;
               moves_rsp(i, amount) && (i.kind == Kind::address || live_[k + 1] == no_flags)) {
      stack += amount;
      continue;
    } else if (!spares_run(i, first.base, stack)) {
      break;
    }
    if (first.base != rsp && (i.written_registers & register_bit(first.base)) != 0) {
      int32_t amount = 0;
      if (!moves(first.base, i, amount)) break;
      moved += amount;
    }
    if (i.kind == Kind::memory && (i.operand_registers & i.written_registers & register_bit(rsp)) != 0) break;
  }
  if (last == n) return;
  run_.active = true;
  run_.base = first.base;
  run_.last = last;
  run_.disp = low;
  Access whole = first;
  whole.disp = low;
  whole.size = static_cast<unsigned>(high - low);
  whole.write = write;
  look_up(whole, n, last);
}

// For an instruction with access_of().
UnitEmitter::Place UnitEmitter::reach(const Instruction& i, unsigned n) noexcept {
  const Access access = access_of(i, flow_.rsp).value_or(Access{});
  if (!run_.active) plan_run(access, n);
  if (run_.active) return {.disp = access.disp + run_.moved - run_.disp, .site = nullptr};
  return {.disp = 0, .site = &look_up(access, n, n)};
}

// What the interpreter's way out of a look-up has to agree with, once the code behind it is reached.
void UnitEmitter::finish_run(unsigned n) noexcept {
  if (!run_.active || n != run_.last) return;
  if (!ended_)
    for (Site* site : run_.sites) close(*site);
  run_ = {};
}

// --- look-ups

// All of it but the segment's base.
void UnitEmitter::effective_address(const Access& a) noexcept {
  unsigned base = a.base < 16 ? a.base : 16;
  unsigned index = a.index < 16 ? a.index : 16;
  int64_t disp = a.disp;
  if (a.base == gpr_rip) {
    e_.load(scratch0, o_.page);
    base = scratch0;
    disp += start_;
  } else if (base < 16 && lives_in_memory(base)) {
    e_.load(scratch0, o_.of_gpr(base));
    base = scratch0;
  }
  if (index < 16 && lives_in_memory(index)) {
    e_.load(scratch1, o_.of_gpr(index));
    index = scratch1;
  }
  if (base >= 16 && index >= 16)
    e_.move_immediate(scratch0, a.narrow ? static_cast<uint32_t>(disp) : static_cast<uint64_t>(disp));
  else if (base != scratch0 || index < 16 || disp != 0 || a.narrow)
    e_.lea(scratch0, base, index, a.scale, disp, !a.narrow);
  if (a.bit_register != gpr_zero) {
    load_guest(scratch1, a.bit_register);
    if (a.size == 4) e_.u8(0x4d), e_.u8(0x63), e_.u8(0xdb);             // movsxd r11, r11d
    e_.u8(0x49), e_.u8(0xc1), e_.u8(0xfb), e_.u8(a.size == 8 ? 6 : 5);  // sar r11
    e_.lea(scratch0, scratch0, scratch1, a.size == 8 ? 3 : 2, 0, wide_);
  }
}

// From the offset in scratch0 to the linear address. Outside 64-bit mode FS and GS have limits and types:
// accesses beyond 4 GiB are the interpreter's, and all to what is not writable data of that size. Linear
// addresses wrap there.
void UnitEmitter::add_segment(const Access& a, Site& site) noexcept {
  if (a.segment == seg_none) return;
  const int64_t segment = o_.segment_base + static_cast<int64_t>(sizeof(Segment)) * a.segment;
  static_assert(offsetof(Segment, base) == 0);
  if (!wide_) {
    constexpr unsigned mask = Segment::present_bit | Segment::non_system | 0xe, writable_data = 0x92;
    const auto interpret_if_not = [&](unsigned condition) {
      add_stub(e_.jump_if(condition ^ 1), Stubs::complex_op, &site, site.before);
    };
    e_.u8(0x41), e_.u8(0x83), e_.u8(0xfa), e_.u8(-a.size);                               // cmp r10d, -size
    interpret_if_not(6);                                                                 // below or equal
    e_.state(0x83, 7, segment + static_cast<int64_t>(offsetof(Segment, limit)), false);  // cmp dword, -1
    e_.u8(0xff);
    interpret_if_not(4);
    e_.state(0x0fb7, scratch1, segment + static_cast<int64_t>(offsetof(Segment, attributes)), false);
    e_.u8(0x41), e_.u8(0x81), e_.u8(0xe3), e_.u32(mask);           // and r11d
    e_.u8(0x41), e_.u8(0x81), e_.u8(0xfb), e_.u32(writable_data);  // cmp r11d
    interpret_if_not(4);
  }
  e_.state(0x03, scratch0, segment, wide_);  // add r10, [base]
}

// The inline soft TLB; one compare covers tag, validity and page crossing.
Site& UnitEmitter::look_up(const Access& a, unsigned n, unsigned last) noexcept {
  if (live_[n] != no_flags) store_flags();
  if (counts_) count(o_.lookups, 1);
  Site& site = new_site(n, last);
  site.mnemonic = static_cast<uint16_t>(code_[n].insn.mnemonic);
  site.retry = e_.at();
  site.before = {.native_flags = false, .level = flow_.level};
  site.base = a.base;
  site.index = a.index;
  site.scale = a.scale;
  site.segment = a.segment;
  site.disp = a.disp;
  if (a.base == rsp) site.disp -= flow_.rsp;  // the translator adds that part first
  site.span = static_cast<uint16_t>(a.size);
  site.write = a.write;
  site.narrow = a.narrow;
  site.bit_register = a.bit_register;
  site.run = last != n;
  if (run_.active) run_.sites.push_back(&site);

  const auto set = static_cast<int64_t>(block_.key >> key::tlb_shift & 3);
  const int64_t entry = o_.tlb + set * static_cast<int64_t>(sizeof(TlbSet));
  const int64_t tag =
      entry + static_cast<int64_t>(a.write ? offsetof(TlbEntry, write) : offsetof(TlbEntry, read));
  const int64_t host = entry + static_cast<int64_t>(offsetof(TlbEntry, host));
  static_assert(sizeof(TlbEntry) == 32 && offsetof(TlbSet, entry) == 0);
  effective_address(a);
  add_segment(a, site);
  constexpr unsigned to_entry = page_shift - 5;
  if (simd::host().bmi2) {
    e_.u8(0xc4), e_.u8(0x43), e_.u8(0x7b), e_.u8(0xf0), e_.u8(0xda), e_.u8(to_entry);  // rorx r11d, r10d
  } else {
    e_.move(scratch1, scratch0, false);
    e_.u8(0x41), e_.u8(0xc1), e_.u8(0xeb), e_.u8(to_entry);  // shr r11d
  }
  e_.u8(0x41), e_.u8(0x81), e_.u8(0xe3), e_.u32((TlbSet::entries - 1) * 32);  // and r11d
  e_.indexed(0x2b, scratch0, scratch1, 0, tag);                               // sub r10, [tag]
  e_.u8(0x49), e_.u8(0x81), e_.u8(0xfa), e_.u32(page_size - a.size);          // cmp r10
  uint8_t* const miss = e_.jump_if(7);                                        // ja
  e_.indexed(0x03, scratch0, scratch1, 0, host);                              // add r10, [host]
  flow_.native_flags = false;
  add_stub(miss, Stubs::slow_access, &site, site.before);
  return site;
}

Site& UnitEmitter::look_up_alone(const Access& access, unsigned n) noexcept {
  run_ = {};
  return look_up(access, n, n);
}

// --- instructions

void UnitEmitter::emit_memory(const Instruction& i, unsigned n) noexcept {
  if ((i.operand_registers & register_bit(rsp)) != 0) commit_rsp();
  const Place place = reach(i, n);
  need_native_flags(i, n);
  Standins standins;
  if (!bind(i, standins)) {
    failed_ = true;
    return;
  }
  Site* fault = nullptr;
  if (i.may_fault) {
    fault = &new_fault(n, run_.active ? run_.last : n);
    if (run_.active) run_.sites.push_back(fault);
  }
  copy_memory(e_, i, standins, place.disp);
  write_back(i, standins);
  note_flags(i);
  if (place.site == nullptr) return;
  close(*place.site);
  if (fault != nullptr) close(*fault);
}

void UnitEmitter::emit_push(const Instruction& i, unsigned n) noexcept {
  const Place place = reach(i, n);
  if (i.operands[0].type == ZYDIS_OPERAND_TYPE_IMMEDIATE) {
    e_.u8(wide_ ? 0x49 : 0x41), e_.u8(0xc7);
    e_.scratch_operand(0, scratch0, place.disp, false);
    e_.u32(i.op->imm);
  } else {
    unsigned reg = i.op->dst / 8;
    if (lives_in_memory(reg)) {
      e_.load(scratch1, o_.of_gpr(reg));
      reg = scratch1;
    }
    e_.store_at_scratch(place.disp, reg, word_);
  }
  flow_.rsp -= word_;
  if (place.site != nullptr) close(*place.site);
}

void UnitEmitter::emit_push_memory(const Instruction& i, unsigned n) noexcept {
  Site& first = look_up_alone(operand(i, static_cast<unsigned>(word_), flow_.rsp), n);
  e_.load_at_scratch(scratch1, 0, word_);
  e_.store(o_.target, scratch1);
  Site& second = look_up_alone(stack_access(flow_.rsp - word_, true), n);
  e_.load(scratch1, o_.target);
  e_.store_at_scratch(0, scratch1, word_);
  flow_.rsp -= word_;
  close(first);
  close(second);
}

void UnitEmitter::emit_pop(const Instruction& i, unsigned n) noexcept {
  const Place place = reach(i, n);
  const unsigned guest = i.op->dst / 8;
  const unsigned reg = lives_in_memory(guest) ? scratch1 : guest;
  e_.load_at_scratch(reg, place.disp, word_);
  if (lives_in_memory(guest)) e_.store(o_.of_gpr(guest), reg);
  flow_.rsp = guest == rsp ? 0 : flow_.rsp + word_;
  if (place.site != nullptr) close(*place.site);
}

void UnitEmitter::emit_leave(const Instruction& i, unsigned n) noexcept {
  Site& site = look_up_alone(access_of(i, flow_.rsp).value_or(Access{}), n);
  e_.load_at_scratch(scratch1, 0, word_);
  e_.lea(scratch0, rbp, 16, 0, word_, wide_);
  e_.store(o_.of_gpr(rsp), scratch0);
  e_.move(rbp, scratch1);
  flow_.rsp = 0;
  close(site);
}

void UnitEmitter::emit_bit_test(const Instruction& i, unsigned n) noexcept {
  const bool wide = i.op->size == 8;
  Access access = operand(i, i.op->size, flow_.rsp);
  access.bit_register = static_cast<uint8_t>(i.op->src / 8);
  Site& site = look_up_alone(access, n);
  // The part of the offset that the look-up has not taken for the address.
  load_guest(scratch1, access.bit_register);
  e_.u8(0x41), e_.u8(0x83), e_.u8(0xe3), e_.u8(wide ? 63 : 31);  // and r11d
  if (wants_native_flags(i, n)) {
    e_.store(o_.target, scratch1);
    need_native_flags(i, n);
    e_.load(scratch1, o_.target);
  }
  // The guest's own BT, BTS, BTR or BTC of [r10] and r11
  if ((i.op->flags & Op::lock) != 0) e_.u8(0xf0);
  e_.u8(wide ? 0x4d : 0x45), e_.u8(0x0f), e_.u8(i.insn.opcode);
  e_.scratch_operand(scratch1, scratch0, 0, false);
  note_flags(i);
  close(site);
}

// What unmasks an exception, or sets a reserved bit, is the interpreter's. The value is read once: another
// processor may be writing it.
void UnitEmitter::emit_load_control(const Instruction& i, unsigned n) noexcept {
  const bool x87 = i.insn.mnemonic == ZYDIS_MNEMONIC_FLDCW;
  const uint32_t masks = x87 ? 0x3f : 0x1f80;
  Site& site = look_up_alone(operand(i, i.memory_size, flow_.rsp), n);
  e_.load_at_scratch(scratch1, 0, x87 ? 2 : 4);
  e_.store(o_.target, scratch1);
  e_.u8(0x41), e_.u8(0x81), e_.u8(0xe3), e_.u32(x87 ? masks : masks | ~simd::host().mxcsr_mask);  // and r11d
  e_.u8(0x41), e_.u8(0x81), e_.u8(0xfb), e_.u32(masks);                                           // cmp r11d
  add_stub(e_.jump_if(5), Stubs::complex_op, &site, site.before);
  x87 ? e_.state(0xd9, 5, o_.target, false) : e_.state(0x0fae, 2, o_.target, false);
  close(site);
}

// Upwards; with DF it is the interpreter's.
void UnitEmitter::emit_string(const Instruction& i, unsigned n) noexcept {
  enum : unsigned { movs = 0xa4, cmps = 0xa6, stos = 0xaa, lods = 0xac, scas = 0xae };
  const unsigned which = i.insn.opcode & 0xfe;
  const int size = i.op->size;
  const auto access = [&](uint8_t base, bool write) {
    return Access{.base = base, .size = i.op->size, .write = write, .narrow = !wide_};
  };
  if (live_[n] != no_flags) store_flags();
  Site& down = interpret_if(e_.jump_if_any(o_.system_flags, flag::df), n);
  Site* source = nullptr;
  Site* destination = nullptr;
  if (which == movs || which == cmps || which == lods) {
    source = &look_up_alone(access(rsi, false), n);
    e_.load_at_scratch(which == lods ? unsigned{rax} : scratch1, 0, size);
    if (which != lods) e_.store(o_.target, scratch1);
  }
  if (which != lods) {
    destination = &look_up_alone(access(rdi, which == movs || which == stos), n);
    if (source != nullptr) e_.load(scratch1, o_.target);
    const unsigned reg = source != nullptr ? scratch1 : unsigned{rax};
    if (which == movs || which == stos)
      e_.store_at_scratch(0, reg, size);
    else
      e_.at_scratch(0x3b, reg, 0, size);  // cmp reg, [r10]
  }
  if (source != nullptr) e_.lea(rsi, rsi, 16, 0, size, wide_);
  if (destination != nullptr) e_.lea(rdi, rdi, 16, 0, size, wide_);
  note_flags(i);
  for (Site* site : {&down, source, destination})
    if (site != nullptr) close(*site);
}

}  // namespace lodge::kvm::soft
