#include "kvm/soft/translate/unit.hpp"

#include <algorithm>

#include "kvm/soft/decode/decoder.hpp"
#include "kvm/soft/mmu/host_access.hpp"

namespace lodge::kvm::soft {
namespace {

constexpr unsigned largest_run = 256;  // bytes
constexpr size_t room_for_one = 512;   // host code of one guest instruction
constexpr size_t room_for_stub = 40;
constexpr uint16_t homeless_mask = 1u << rsp | 1u << scratch0 | 1u << scratch1;

uint16_t bit(unsigned reg) {
  return static_cast<uint16_t>(1u << reg);
}

// ADD or SUB of a small immediate to all of RSP (of ESP in 32-bit code), or LEA within it: what it adds.
bool adds_to_rsp(const Instruction& i, bool wide, int32_t& amount) noexcept {
  const unsigned word = wide ? 8 : 4;
  if (i.op->size != word) return false;
  if (i.kind == Kind::address) {
    amount = static_cast<int32_t>(i.op->disp);
    return amount == static_cast<int16_t>(amount) && i.op->dst == rsp * 8 && i.op->base == rsp &&
           i.op->index == gpr_zero && i.op->address_size == word;
  }
  if (i.kind != Kind::copy ||
      (i.insn.mnemonic != ZYDIS_MNEMONIC_ADD && i.insn.mnemonic != ZYDIS_MNEMONIC_SUB))
    return false;
  if (i.operands[1].type != ZYDIS_OPERAND_TYPE_IMMEDIATE || i.operand_registers != bit(rsp)) return false;
  const auto value = static_cast<int64_t>(i.op->imm);
  if (value != static_cast<int16_t>(value)) return false;
  amount = static_cast<int32_t>(i.insn.mnemonic == ZYDIS_MNEMONIC_ADD ? value : -value);
  return true;
}

}  // namespace

UnitEmitter::UnitEmitter(Translator& translator, Translation& translation, uint8_t* begin,
                         uint8_t* end) noexcept
    : translator_(translator),
      t_(translation),
      block_(translation.block),
      o_(translator.stubs_.offsets),
      e_(begin, end),
      wide_(translator.cpu_.mode() == Mode::bits64),
      start_(static_cast<int64_t>(block_.host & page_mask)),
      flow_{.native_flags = translation.boundary.native_flags,
            .stored_flags = !translation.boundary.native_flags,
            .level = translation.boundary.level,
            .rsp = 0},
      code_(translator.analysed_) {}

bool UnitEmitter::emit() noexcept {
  if (!analyse_block()) return false;
  find_live_flags();
  t_.begin = e_.at();
  if (translator_.counts_) count(o_.instructions, code_.size());
  for (unsigned n = 0; n < code_.size() && !failed_; ++n) {
    if (!e_.room(room_for_one + stubs_.size() * room_for_stub)) return false;
    emit_one(n);
  }
  if (failed_) return false;
  if (!ended_) exit_to(start_ + block_.bytes);
  emit_stubs();
  // The next translation begins at its own cache line half.
  while ((reinterpret_cast<uintptr_t>(e_.at()) & 15) != 0) e_.u8(0xcc);
  t_.end = e_.at();
  return !failed_;
}

bool UnitEmitter::analyse_block() noexcept {
  ZydisDecoder decoder;
  if (!translator_decoder(translator_.cpu_, decoder)) return false;
  code_.resize(block_.instructions);
  for (unsigned n = 0; n < block_.instructions; ++n) {
    const Op& op = block_.ops[n];
    std::array<uint8_t, 15> bytes{};
    const uint64_t at = block_.host + op.offset;
    const auto in_page = static_cast<unsigned>(page_size - (at & page_mask));
    // The last one may reach into the next page.
    const unsigned first = std::min<unsigned>(op.length, in_page);
    host_read(at, bytes.data(), first);
    if (first < op.length) host_read(block_.host_page[1], bytes.data() + first, op.length - first);
    analyse(translator_.cpu_, decoder, bytes.data(), op.length, op, code_[n]);
  }
  // Does it branch back? Indirect branches look at the request word themselves.
  const Instruction& last = code_.back();
  if (last.kind == Kind::branch || last.kind == Kind::jump || last.kind == Kind::call)
    wants_check_ = static_cast<int64_t>(last.op->imm) <= last.op->offset;
  // Nothing may come between STI and what follows: no look at the request word, no other block's either.
  for (size_t n = 0; n < code_.size(); ++n)
    if (code_[n].kind == Kind::set_if && n + 2 >= code_.size()) {
      code_[n].kind = Kind::complex;
      code_[n].reads = all_flags;
    }
  return block_.fresh();
}

void UnitEmitter::find_live_flags() noexcept {
  live_.assign(code_.size() + 1, all_flags);
  for (size_t n = code_.size(); n-- > 0;)
    live_[n] = static_cast<Flags>((live_[n + 1] & ~code_[n].replaces) | code_[n].reads);
}

Boundary UnitEmitter::boundary() const noexcept {
  return {.native_flags = flow_.native_flags, .level = flow_.level};
}

void UnitEmitter::emit_one(unsigned n) noexcept {
  const Instruction& i = code_[n];
  if (wants_check_) check_requests(n);
  if (i.kind == Kind::nothing) return finish_run(n);
  if (i.level > flow_.level) raise_level(i.level);
  emit_kind(i, n);
  if (i.writes != no_flags && i.kind != Kind::complex) {
    flow_.native_flags = true;
    flow_.stored_flags = false;
  }
  finish_run(n);
}

void UnitEmitter::emit_kind(const Instruction& i, unsigned n) noexcept {
  switch (i.kind) {
    case Kind::nothing: break;
    case Kind::copy: emit_copy(i, n); break;
    case Kind::memory: emit_memory(i, n); break;
    case Kind::address: emit_address(i); break;
    case Kind::push: emit_push(i, n); break;
    case Kind::push_memory: emit_push_memory(i, n); break;
    case Kind::bit_test: emit_bit_test(i, n); break;
    case Kind::swap_gs:
    case Kind::clear_if:
    case Kind::set_if:
    case Kind::read_tsc:
    case Kind::read_segment: emit_system(i, n); break;
    case Kind::pop: emit_pop(i, n); break;
    case Kind::leave: emit_leave(i, n); break;
    case Kind::call: emit_call(i, n); break;
    case Kind::call_indirect: emit_call_indirect(i, n); break;
    case Kind::ret: emit_ret(i, n); break;
    case Kind::jump: exit_to(start_ + static_cast<int64_t>(i.op->imm)); break;
    case Kind::jump_indirect: emit_jump_indirect(i, n); break;
    case Kind::branch: emit_branch(i); break;
    case Kind::complex: emit_complex(n); break;
  }
}

// --- flags

void UnitEmitter::store_flags() noexcept {
  if (flow_.stored_flags || !flow_.native_flags) return;
  e_.save_flags(o_.arith, scratch1);
  flow_.stored_flags = true;
}

// Before an instruction that reads flags, or leaves some of those that are still wanted.
void UnitEmitter::need_native_flags(const Instruction& i, unsigned n) noexcept {
  const auto kept = static_cast<Flags>(live_[n + 1] & ~i.replaces);
  const bool needs = i.reads != no_flags || (i.writes != no_flags && kept != no_flags);
  if (!needs || flow_.native_flags) return;
  e_.load_flags(o_.arith, scratch1);
  flow_.native_flags = true;
}

// At the first place where the flags are dead or stored.
void UnitEmitter::check_requests(unsigned n) noexcept {
  const bool last = n + 1 == code_.size();
  if (live_[n] != no_flags && !flow_.stored_flags && !last) return;
  if (n > 0 && code_[n - 1].kind == Kind::set_if) return;
  if (live_[n] != no_flags) store_flags();
  wants_check_ = false;
  e_.state(0x83, 7, o_.request, false);  // cmp dword [request], 0
  e_.u8(0);
  uint8_t* const jump = e_.jump_if(5);
  flow_.native_flags = false;
  Site& site = new_site(n, n);
  add_stub(jump, Stubs::request, &site, {.native_flags = false, .level = flow_.level});
}

// --- registers that live in memory

void UnitEmitter::load_guest(unsigned scratch, unsigned guest) noexcept {
  if (lives_in_memory(guest))
    e_.load(scratch, o_.of_gpr(guest));
  else
    e_.move(scratch, guest);
}

void UnitEmitter::commit_rsp() noexcept {
  if (flow_.rsp == 0) return;
  e_.load(scratch1, o_.of_gpr(rsp));
  e_.lea(scratch1, scratch1, 16, 0, flow_.rsp, wide_);
  e_.store(o_.of_gpr(rsp), scratch1);
  flow_.rsp = 0;
}

// Gives the operands that live in memory a scratch register and loads them. A run keeps scratch0.
bool UnitEmitter::bind(const Instruction& i, Standins& standins) noexcept {
  unsigned next = run_.active || i.kind == Kind::memory ? scratch1 : scratch0;
  for (const unsigned guest : {unsigned{rsp}, unsigned{scratch0}, unsigned{scratch1}}) {
    if ((i.operand_registers & bit(guest)) == 0) continue;
    if (next > scratch1) return false;
    (guest == rsp        ? standins.for_rsp
     : guest == scratch0 ? standins.for_r10
                         : standins.for_r11) = static_cast<uint8_t>(next);
    e_.load(next, o_.of_gpr(guest));
    ++next;
  }
  return true;
}

void UnitEmitter::write_back(const Instruction& i, const Standins& standins) noexcept {
  for (const unsigned guest : {unsigned{rsp}, unsigned{scratch0}, unsigned{scratch1}})
    if ((i.operand_registers & i.written_registers & bit(guest)) != 0)
      e_.store(o_.of_gpr(guest), standins.host(guest));
}

void UnitEmitter::raise_level(uint8_t level) noexcept {
  // lea r11, [rip + rest]; mov [resume], r11; jmp raise
  e_.u8(0x4c), e_.u8(0x8d), e_.u8(0x1d);
  uint8_t* const rest = e_.at();
  e_.u32(0);
  e_.store(o_.resume, scratch1);
  e_.jump_to(translator_.stubs_.raise[flow_.level][level]);
  Emitter::patch(rest, e_.at());
  flow_.level = level;
}

// Adds to a counter of the area, without touching flags; takes scratch1.
void UnitEmitter::count(int64_t counter, size_t amount) noexcept {
  e_.load(scratch1, counter);
  e_.lea(scratch1, scratch1, 16, 0, static_cast<int64_t>(amount), true);
  e_.store(counter, scratch1);
}

// --- instructions without memory operand

void UnitEmitter::emit_copy(const Instruction& i, unsigned n) noexcept {
  if (int32_t amount = 0; live_[n + 1] == no_flags && adds_to_rsp(i, wide_, amount)) {
    flow_.rsp += amount;
    return;
  }
  if ((i.operand_registers & bit(rsp)) != 0) commit_rsp();
  need_native_flags(i, n);
  Standins standins;
  if (!bind(i, standins)) {
    failed_ = true;
    return;
  }
  if (i.may_fault) {
    Site& site = new_site(n, n);
    t_.faults.push_back({.at = e_.at(), .stub = nullptr});
    add_stub(nullptr, Stubs::slow_access, &site, boundary());
    copy_registers(e_, i, standins);
    site.next = e_.at();  // reached only if the interpreter does not fault; RDX and RAX are written then
    site.after = boundary();
    site.rsp_after = flow_.rsp;
    if ((i.operand_registers & i.written_registers & homeless_mask) != 0) failed_ = true;
    return;
  }
  copy_registers(e_, i, standins);
  write_back(i, standins);
}

void UnitEmitter::emit_address(const Instruction& i) noexcept {
  if (int32_t amount = 0; adds_to_rsp(i, wide_, amount)) {
    flow_.rsp += amount;
    return;
  }
  const Op& op = *i.op;
  const unsigned dst = op.dst / 8;
  const unsigned temp0 = run_.active ? scratch1 : scratch0;
  unsigned base = op.base < 16 ? op.base : 16;
  unsigned index = op.index < 16 ? op.index : 16;
  int64_t disp = op.disp;
  if (dst == rsp) commit_rsp();
  if (op.base == gpr_rip) {
    e_.load(temp0, o_.page);
    base = temp0;
    disp += start_;
  } else if (base < 16 && lives_in_memory(base)) {
    if (base == rsp) disp += flow_.rsp;
    e_.load(temp0, o_.of_gpr(base));
    base = temp0;
  }
  if (index < 16 && lives_in_memory(index)) {
    e_.load(scratch1, o_.of_gpr(index));
    index = scratch1;
  }
  const bool address64 = op.address_size == 8;
  const unsigned to = lives_in_memory(dst) ? temp0 : dst;
  if (base >= 16 && index >= 16)
    e_.move_immediate(to,
                      address64 && op.size == 8 ? static_cast<uint64_t>(disp) : static_cast<uint32_t>(disp));
  else
    e_.lea(to, base, index, op.scale, static_cast<int32_t>(disp), address64 && op.size == 8);
  if (lives_in_memory(dst)) e_.store(o_.of_gpr(dst), to);
}

// --- memory

bool UnitEmitter::access_of(const Instruction& i, Access& a, int32_t rsp_part) const noexcept {
  const int word = wide_ ? 8 : 4;
  a = {};
  a.narrow = !wide_;
  a.size = static_cast<unsigned>(word);
  switch (i.kind) {
    case Kind::memory:
      a.base = i.op->base;
      a.index = i.op->index;
      a.scale = i.op->scale;
      a.disp = i.op->disp;
      a.size = i.memory_size;
      a.write = i.memory_write;
      a.narrow = i.narrow_address;
      a.segment = wide_ ? i.op->flat_segment : uint8_t{seg_none};
      if (a.base == rsp) a.disp += rsp_part;
      return true;
    case Kind::push:
    case Kind::call:
    case Kind::call_indirect:
      a.base = rsp;
      a.disp = rsp_part - word;
      a.write = true;
      return true;
    case Kind::pop:
    case Kind::ret:
      a.base = rsp;
      a.disp = rsp_part;
      return true;
    case Kind::leave: a.base = rbp; return true;
    default: return false;
  }
}

// How far accesses off the same base go, from instruction n on.
void UnitEmitter::plan_run(const Access& first, unsigned n) noexcept {
  run_ = {};
  if (block_.runs_are_poor || first.index != gpr_zero || first.segment != seg_none || first.base >= 16)
    return;
  const int word = wide_ ? 8 : 4;
  int64_t low = first.disp;
  int64_t high = first.disp + first.size;
  bool write = first.write;
  unsigned last = n;
  int32_t stack = flow_.rsp;
  for (unsigned k = n; k < code_.size(); ++k) {
    const Instruction& i = code_[k];
    Access a;
    if (i.kind >= Kind::bit_test || i.kind == Kind::push_memory) break;
    if (i.kind == Kind::complex || i.kind == Kind::branch || i.kind == Kind::jump ||
        i.kind == Kind::jump_indirect)
      break;
    if (i.kind == Kind::call_indirect && i.has_memory()) break;
    // RSP as data has to be stored first, which moves what accesses are relative to.
    if (i.kind == Kind::memory && k != n && stack != 0 && (i.operand_registers & bit(rsp)) != 0) break;
    if (access_of(i, a, stack)) {
      if (a.base != first.base || a.index != gpr_zero || a.segment != seg_none || a.narrow != first.narrow)
        break;
      if (i.kind == Kind::leave && k != n) break;
      const int64_t new_low = std::min(low, a.disp);
      const int64_t new_high = std::max(high, a.disp + static_cast<int64_t>(a.size));
      if (new_high - new_low > static_cast<int64_t>(largest_run)) break;
      low = new_low;
      high = new_high;
      write = write || a.write;
      last = k;
      if (i.kind == Kind::push || i.kind == Kind::call || i.kind == Kind::call_indirect) stack -= word;
      if (i.kind == Kind::pop) stack += word;
      if (i.kind == Kind::pop && i.op->dst == rsp * 8) break;
      if (i.kind == Kind::leave || i.kind == Kind::ret || i.kind == Kind::call ||
          i.kind == Kind::call_indirect)
        break;
    } else if (int32_t amount = 0;
               adds_to_rsp(i, wide_, amount) && (i.kind == Kind::address || live_[k + 1] == no_flags)) {
      stack += amount;
      continue;
    } else {
      // One scratch register is left: for an operand, or for one part of an address.
      const unsigned operands =
          static_cast<unsigned>(__builtin_popcount(i.operand_registers & homeless_mask));
      const unsigned parts =
          i.kind == Kind::address
              ? static_cast<unsigned>(__builtin_popcount(i.address_registers & homeless_mask)) +
                    (i.op->base == gpr_rip ? 1 : 0)
              : 0;
      if (operands > 1 || parts > 1) break;
      if ((i.operand_registers & bit(rsp)) != 0 && (first.base == rsp || stack != 0)) break;
    }
    if (first.base != rsp && (i.written_registers & bit(first.base)) != 0) break;
    if (i.kind == Kind::memory && (i.operand_registers & i.written_registers & bit(rsp)) != 0) break;
  }
  if (last == n) return;
  run_.active = true;
  run_.last = last;
  run_.base = first.base;
  run_.disp = low;
  Access whole = first;
  whole.disp = low;
  whole.size = static_cast<unsigned>(high - low);
  whole.write = write;
  look_up(whole, n, last);
}

// Makes the host address of an access: scratch0 plus the result.
int64_t UnitEmitter::reach(const Access& access, unsigned n) noexcept {
  if (run_.active) return access.disp - run_.disp;
  plan_run(access, n);
  if (run_.active) return access.disp - run_.disp;
  look_up(access, n, n);
  return 0;
}

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
  if (a.segment != seg_none)
    e_.state(0x03, scratch0, o_.segment_base + static_cast<int64_t>(sizeof(Segment)) * a.segment);
  if (a.bit_register != gpr_zero) {
    load_guest(scratch1, a.bit_register);
    if (a.size == 4) e_.u8(0x4d), e_.u8(0x63), e_.u8(0xdb);             // movsxd r11, r11d
    e_.u8(0x49), e_.u8(0xc1), e_.u8(0xfb), e_.u8(a.size == 8 ? 6 : 5);  // sar r11
    e_.lea(scratch0, scratch0, scratch1, a.size == 8 ? 3 : 2, 0, true);
  }
}

// The inline soft TLB; one compare covers tag, validity and page crossing.
void UnitEmitter::look_up(const Access& a, unsigned n, unsigned last) noexcept {
  if (live_[n] != no_flags) store_flags();
  if (translator_.counts_) count(o_.lookups, 1);
  Site& site = new_site(n, last);
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
  e_.move(scratch1, scratch0, false);
  e_.u8(0x41), e_.u8(0xc1), e_.u8(0xeb), e_.u8(page_shift - 5);               // shr r11d, 7
  e_.u8(0x41), e_.u8(0x81), e_.u8(0xe3), e_.u32((TlbSet::entries - 1) * 32);  // and r11d
  e_.indexed(0x2b, scratch0, scratch1, 0, tag);                               // sub r10, [tag]
  e_.u8(0x49), e_.u8(0x81), e_.u8(0xfa), e_.u32(page_size - a.size);          // cmp r10
  uint8_t* const miss = e_.jump_if(7);                                        // ja
  e_.indexed(0x03, scratch0, scratch1, 0, host);                              // add r10, [host]
  flow_.native_flags = false;
  add_stub(miss, Stubs::slow_access, &site, site.before);
}

Site& UnitEmitter::new_site(unsigned n, unsigned last) noexcept {
  Site& site = t_.sites.emplace_back();
  site.owner = &t_;
  site.first = static_cast<uint16_t>(n);
  site.last = static_cast<uint16_t>(last);
  site.before = boundary();
  site.rsp_before = flow_.rsp;
  return site;
}

// What the interpreter's way out of a look-up has to agree with, once the code behind it is reached.
void UnitEmitter::finish_run(unsigned n) noexcept {
  if (!run_.active || n != run_.last) return;
  if (!ended_)
    for (Site* site : run_.sites) {
      site->next = e_.at();
      site->after = boundary();
      site->rsp_after = flow_.rsp;
    }
  run_ = {};
}

void UnitEmitter::emit_memory(const Instruction& i, unsigned n) noexcept {
  if ((i.operand_registers & bit(rsp)) != 0) commit_rsp();
  Access access;
  access_of(i, access, flow_.rsp);
  const int64_t disp = reach(access, n);
  std::array<Site*, 2> ours{};
  if (!run_.active) ours[0] = &t_.sites.back();
  need_native_flags(i, n);
  Standins standins;
  if (!bind(i, standins)) {
    failed_ = true;
    return;
  }
  if (i.may_fault) {
    Site& site = new_site(n, run_.active ? run_.last : n);
    if (run_.active) run_.sites.push_back(&site);
    t_.faults.push_back({.at = e_.at(), .stub = nullptr});
    add_stub(nullptr, Stubs::slow_access, &site, boundary());
    if (!run_.active) ours[1] = &site;
  }
  copy_memory(e_, i, standins, scratch0, disp);
  write_back(i, standins);
  for (Site* site : ours)
    if (site != nullptr) {
      site->next = e_.at();
      // As emit_one() will say.
      site->after = {.native_flags = i.writes != no_flags || flow_.native_flags, .level = flow_.level};
      site->rsp_after = flow_.rsp;
    }
}

void UnitEmitter::emit_push(const Instruction& i, unsigned n) noexcept {
  Access access;
  access_of(i, access, flow_.rsp);
  const int64_t disp = reach(access, n);
  if (i.operands[0].type == ZYDIS_OPERAND_TYPE_IMMEDIATE) {
    e_.u8(wide_ ? 0x49 : 0x41), e_.u8(0xc7);
    e_.scratch_operand(0, scratch0, disp, false);
    e_.u32(i.op->imm);
  } else {
    unsigned reg = i.op->dst / 8;
    if (lives_in_memory(reg)) {
      e_.load(scratch1, o_.of_gpr(reg));
      reg = scratch1;
    }
    e_.u8((wide_ ? 0x49u : 0x41u) | (reg >> 3 & 1) << 2), e_.u8(0x89);
    e_.scratch_operand(reg, scratch0, disp, false);
  }
  flow_.rsp -= wide_ ? 8 : 4;
  if (!run_.active) {
    Site& site = t_.sites.back();
    site.next = e_.at();
    site.after = boundary();
    site.rsp_after = flow_.rsp;
  }
}

void UnitEmitter::emit_push_memory(const Instruction& i, unsigned n) noexcept {
  const int32_t word = wide_ ? 8 : 4;
  Access value{.base = i.op->base,
               .index = i.op->index,
               .scale = i.op->scale,
               .segment = wide_ ? i.op->flat_segment : uint8_t{seg_none},
               .disp = i.op->disp,
               .size = static_cast<unsigned>(word),
               .write = false,
               .narrow = i.narrow_address};
  if (value.base == rsp) value.disp += flow_.rsp;
  run_ = {};
  look_up(value, n, n);
  Site& first = t_.sites.back();
  e_.u8(wide_ ? 0x4d : 0x45), e_.u8(0x8b);  // mov r11, [r10]
  e_.scratch_operand(scratch1, scratch0, 0, false);
  e_.store(o_.target, scratch1);
  look_up({.base = rsp,
           .disp = flow_.rsp - word,
           .size = static_cast<unsigned>(word),
           .write = true,
           .narrow = !wide_},
          n, n);
  Site& second = t_.sites.back();
  e_.load(scratch1, o_.target);
  e_.u8(wide_ ? 0x4d : 0x45), e_.u8(0x89);  // mov [r10], r11
  e_.scratch_operand(scratch1, scratch0, 0, false);
  flow_.rsp -= word;
  for (Site* site : {&first, &second}) {
    site->next = e_.at();
    site->after = boundary();
    site->rsp_after = flow_.rsp;
  }
}

void UnitEmitter::emit_bit_test(const Instruction& i, unsigned n) noexcept {
  const bool wide = i.op->size == 8;
  Access access{.base = i.op->base,
                .index = i.op->index,
                .scale = i.op->scale,
                .segment = i.op->flat_segment,
                .disp = i.op->disp,
                .size = i.op->size,
                .write = false,
                .narrow = false,
                .bit_register = static_cast<uint8_t>(i.op->src / 8)};
  if (access.base == rsp) access.disp += flow_.rsp;
  run_ = {};
  look_up(access, n, n);
  Site& site = t_.sites.back();
  need_native_flags(i, n);
  e_.u8(wide ? 0x4d : 0x45), e_.u8(0x8b);  // mov r11, [r10]
  e_.scratch_operand(scratch1, scratch0, 0, false);
  unsigned offset = access.bit_register;
  if (lives_in_memory(offset)) {
    e_.load(scratch0, o_.of_gpr(offset));
    offset = scratch0;
  }
  e_.u8(0x41u | (wide ? 8u : 0u) | (offset >> 3 & 1) << 2), e_.u8(0x0f), e_.u8(0xa3);  // bt r11, offset
  e_.u8(0xc0 | (offset & 7) << 3 | (scratch1 & 7));
  site.next = e_.at();
  site.after = {.native_flags = true, .level = flow_.level};
  site.rsp_after = flow_.rsp;
}

void UnitEmitter::emit_system(const Instruction& i, unsigned n) noexcept {
  if (i.kind == Kind::swap_gs) {
    const int64_t gs = o_.segment_base + int64_t{sizeof(Segment)} * seg_gs;
    e_.load(scratch0, gs);
    e_.load(scratch1, o_.kernel_gs_base);
    e_.store(gs, scratch1);
    e_.store(o_.kernel_gs_base, scratch0);
    return;
  }
  if (i.kind == Kind::read_segment) {
    const unsigned guest = i.op->dst / 8;
    const unsigned reg = lives_in_memory(guest) ? scratch0 : guest;
    e_.state(0x0fb7, reg, o_.selector + int64_t{sizeof(Segment)} * i.op->src, false);
    if (guest == rsp) flow_.rsp = 0;
    if (lives_in_memory(guest)) e_.store(o_.of_gpr(guest), reg);
    return;
  }
  if (live_[n] != no_flags) store_flags();
  flow_.native_flags = false;
  if (i.kind == Kind::clear_if) {
    e_.state(0x81, 4, o_.system_flags);  // and qword [system_flags]
    e_.u32(~flag::if_);
  } else if (i.kind == Kind::set_if) {
    Site& site = new_site(n, n);
    e_.state(0x83, 7, o_.event_waits, false);  // cmp dword [event_waits], 0
    e_.u8(0);
    add_stub(e_.jump_if(5), Stubs::complex_op, &site, {.native_flags = false, .level = flow_.level});
    e_.state(0x81, 1, o_.system_flags);  // or qword [system_flags]
    e_.u32(flag::if_);
    site.next = e_.at();
    site.after = boundary();
    site.rsp_after = flow_.rsp;
  } else {
    // RDTSCP waits for what comes before, and so does this.
    if (i.insn.mnemonic == ZYDIS_MNEMONIC_RDTSCP) e_.u8(0x0f), e_.u8(0xae), e_.u8(0xe8);  // lfence
    e_.u8(0x0f), e_.u8(0x31);                                                             // rdtsc
    e_.u8(0x48), e_.u8(0xc1), e_.u8(0xe2), e_.u8(32);                                     // shl rdx, 32
    e_.u8(0x48), e_.u8(0x09), e_.u8(0xd0);                                                // or rax, rdx
    e_.state(0x03, 0, o_.tsc_offset);  // add rax, [tsc_offset]
    e_.move(2, 0);
    e_.u8(0x48), e_.u8(0xc1), e_.u8(0xea), e_.u8(32);  // shr rdx, 32
    e_.move(0, 0, false);
    if (i.insn.mnemonic == ZYDIS_MNEMONIC_RDTSCP) e_.load32(1, o_.tsc_aux);
  }
}

void UnitEmitter::emit_pop(const Instruction& i, unsigned n) noexcept {
  Access access;
  access_of(i, access, flow_.rsp);
  const int64_t disp = reach(access, n);
  const unsigned guest = i.op->dst / 8;
  const unsigned reg = lives_in_memory(guest) ? scratch1 : guest;
  e_.u8((wide_ ? 0x49u : 0x41u) | (reg >> 3 & 1) << 2), e_.u8(0x8b);
  e_.scratch_operand(reg, scratch0, disp, false);
  if (lives_in_memory(guest)) e_.store(o_.of_gpr(guest), reg);
  flow_.rsp = guest == rsp ? 0 : flow_.rsp + (wide_ ? 8 : 4);
  if (!run_.active) {
    Site& site = t_.sites.back();
    site.next = e_.at();
    site.after = boundary();
    site.rsp_after = flow_.rsp;
  }
}

void UnitEmitter::emit_leave(const Instruction& i, unsigned n) noexcept {
  Access access;
  access_of(i, access, flow_.rsp);
  run_ = {};
  look_up(access, n, n);
  Site& site = t_.sites.back();
  e_.u8(wide_ ? 0x4d : 0x45), e_.u8(0x8b);  // mov r11, [r10]
  e_.scratch_operand(scratch1, scratch0, 0, false);
  e_.lea(scratch0, rbp, 16, 0, wide_ ? 8 : 4, wide_);
  e_.store(o_.of_gpr(rsp), scratch0);
  e_.move(rbp, scratch1);
  flow_.rsp = 0;
  site.next = e_.at();
  site.after = boundary();
  site.rsp_after = 0;
}

// --- branches

void UnitEmitter::push_return_address(const Instruction& i, int64_t disp) noexcept {
  e_.load(scratch1, o_.page);
  e_.lea(scratch1, scratch1, 16, 0, start_ + i.op->offset + i.op->length, wide_);
  e_.u8(wide_ ? 0x4d : 0x45), e_.u8(0x89);  // mov [r10 + disp], r11
  e_.scratch_operand(scratch1, scratch0, disp, false);
  flow_.rsp -= wide_ ? 8 : 4;
}

void UnitEmitter::emit_call(const Instruction& i, unsigned n) noexcept {
  Access access;
  access_of(i, access, flow_.rsp);
  push_return_address(i, reach(access, n));
  exit_to(start_ + static_cast<int64_t>(i.op->imm));
}

// Leaves a call to the interpreter when its target, in scratch1, is not canonical: such a call pushes
// nothing. The flags are stored or dead.
void UnitEmitter::refuse_odd_target(unsigned n) noexcept {
  if (!wide_) return;
  Site& site = new_site(n, n);
  uint8_t* const odd = jump_if_odd();
  flow_.native_flags = false;
  site.before = {.native_flags = false, .level = flow_.level};
  add_stub(odd, Stubs::complex_op, &site, site.before);
}

// Jumps when the address in scratch1, which is lost, is not canonical.
uint8_t* UnitEmitter::jump_if_odd() noexcept {
  e_.u8(0x49), e_.u8(0xc1), e_.u8(0xfb), e_.u8(47);  // sar r11, 47
  e_.u8(0x41), e_.u8(0x83), e_.u8(0xc3), e_.u8(1);   // add r11d, 1
  e_.u8(0x41), e_.u8(0x83), e_.u8(0xfb), e_.u8(1);   // cmp r11d, 1
  return e_.jump_if(7);                              // ja
}

void UnitEmitter::emit_call_indirect(const Instruction& i, unsigned n) noexcept {
  const int32_t word = wide_ ? 8 : 4;
  Access push;
  if (!i.has_memory()) {
    access_of(i, push, flow_.rsp);
    const int64_t disp = reach(push, n);
    store_flags();
    load_guest(scratch1, i.op->dst / 8);
    refuse_odd_target(n);
    push_return_address(i, disp);
    load_guest(scratch0, i.op->dst / 8);
    if (!wide_) e_.move(scratch0, scratch0, false);
    exit_indirect(n, -word);
    return;
  }
  Access target{.base = i.op->base,
                .index = i.op->index,
                .scale = i.op->scale,
                .segment = wide_ ? i.op->flat_segment : uint8_t{seg_none},
                .disp = i.op->disp,
                .size = static_cast<unsigned>(word),
                .write = false,
                .narrow = i.narrow_address};
  if (target.base == rsp) target.disp += flow_.rsp;
  run_ = {};
  look_up(target, n, n);
  e_.u8(wide_ ? 0x4d : 0x45), e_.u8(0x8b);  // mov r11, [r10]
  e_.scratch_operand(scratch1, scratch0, 0, false);
  e_.store(o_.target, scratch1);
  refuse_odd_target(n);
  access_of(i, push, flow_.rsp);
  look_up(push, n, n);
  push_return_address(i, 0);
  e_.load(scratch0, o_.target);
  exit_indirect(n, -word);
}

void UnitEmitter::emit_ret(const Instruction& i, unsigned n) noexcept {
  const int32_t word = wide_ ? 8 : 4;
  Access access;
  access_of(i, access, flow_.rsp);
  const int64_t disp = reach(access, n);
  e_.u8(wide_ ? 0x4d : 0x45), e_.u8(0x8b);  // mov r10, [r10 + disp]
  e_.scratch_operand(scratch0, scratch0, disp, false);
  const int32_t change = word + static_cast<int32_t>(i.op->imm & 0xffff);
  flow_.rsp += change;
  exit_indirect(n, change);
}

void UnitEmitter::emit_jump_indirect(const Instruction& i, unsigned n) noexcept {
  if (!i.has_memory()) {
    load_guest(scratch0, i.op->dst / 8);
    if (!wide_) e_.move(scratch0, scratch0, false);
    exit_indirect(n, 0);
    return;
  }
  Access target{.base = i.op->base,
                .index = i.op->index,
                .scale = i.op->scale,
                .segment = wide_ ? i.op->flat_segment : uint8_t{seg_none},
                .disp = i.op->disp,
                .size = wide_ ? 8u : 4u,
                .write = false,
                .narrow = i.narrow_address};
  if (target.base == rsp) target.disp += flow_.rsp;
  run_ = {};
  look_up(target, n, n);
  e_.u8(wide_ ? 0x4d : 0x45), e_.u8(0x8b);  // mov r10, [r10]
  e_.scratch_operand(scratch0, scratch0, 0, false);
  exit_indirect(n, 0);
}

void UnitEmitter::emit_branch(const Instruction& i) noexcept {
  if (!flow_.native_flags) {
    e_.load_flags(o_.arith, scratch1);
    flow_.native_flags = true;
  }
  commit_rsp();
  const int64_t taken = start_ + static_cast<int64_t>(i.op->imm);
  const int64_t behind = start_ + i.op->offset + i.op->length;
  const unsigned condition = i.insn.opcode & 15;
  if (taken >= 0 && taken < static_cast<int64_t>(page_size)) {
    DirectExit& exit = new_exit(taken);
    exit.displacement = e_.jump_if(condition);
    exit_to(behind);
  } else {
    uint8_t* const skip = e_.jump_if(condition ^ 1);
    exit_to(taken);
    Emitter::patch(skip, e_.at());
    exit_to(behind);
  }
}

DirectExit& UnitEmitter::new_exit(int64_t offset) noexcept {
  DirectExit& exit = t_.exits.emplace_back();
  exit.owner = &t_;
  exit.offset = static_cast<int32_t>(offset);
  exit.boundary = boundary();
  add_stub(nullptr, Stubs::exit, &exit, exit.boundary);
  return exit;
}

// To `offset` from the start of the block's page.
void UnitEmitter::exit_to(int64_t offset) noexcept {
  ended_ = true;
  commit_rsp();
  if (offset != static_cast<int32_t>(offset)) {
    failed_ = true;
    return;
  }
  DirectExit& exit = new_exit(offset);
  if (offset >= 0 && offset < static_cast<int64_t>(page_size)) {
    exit.displacement = e_.jump();
    return;
  }
  exit.slot = translator_.new_slot(exit);
  if (exit.slot == TranslatorArea::slot_count) {
    failed_ = true;
    return;
  }
  exit.has_slot = true;
  e_.load(scratch1, o_.page);
  e_.lea(scratch1, scratch1, 16, 0, offset & ~static_cast<int64_t>(page_mask), wide_);
  e_.store(o_.page, scratch1);
  e_.jump_through_state(o_.slot + 8 * int64_t{exit.slot});
}

// To the linear address in scratch0.
void UnitEmitter::exit_indirect(unsigned n, int32_t rsp_change) noexcept {
  ended_ = true;
  commit_rsp();
  store_flags();
  Site& site = new_site(n, n);
  site.rsp_before = 0;
  site.rsp_after = rsp_change;
  site.before = {.native_flags = false, .level = flow_.level};
  const auto table = static_cast<int64_t>(flow_.level) * TranslatorArea::jump_entries * 8;
  e_.state(0x83, 7, o_.request, false);  // cmp dword [request], 0
  e_.u8(0);
  uint8_t* const requested = e_.jump_if(5);
  // Only canonical addresses differ from each other under every tag.
  uint8_t* odd = nullptr;
  if (wide_) {
    e_.move(scratch1, scratch0);
    odd = jump_if_odd();
  }
  e_.state(0x33, scratch0, o_.tag);                                              // xor r10, [tag]
  e_.u8(0x45), e_.u8(0x69), e_.u8(0xda), e_.u32(Translator::jump_multiplier);    // imul r11d, r10d
  e_.u8(0x41), e_.u8(0xc1), e_.u8(0xeb), e_.u8(32 - TranslatorArea::jump_bits);  // shr r11d, 20
  // cmp [jump_tag + r11 * 8], r10
  e_.indexed(0x39, scratch0, scratch1, 3, o_.jump_tag + table);
  uint8_t* const miss = e_.jump_if(5);
  e_.state(0x33, scratch0, o_.tag);
  e_.u8(0x49), e_.u8(0x81), e_.u8(0xe2), e_.u32(~page_mask);  // and r10, -4096
  e_.store(o_.page, scratch0);
  // jmp [jump_code + r11 * 8]
  e_.u8(0x42), e_.u8(0xff), e_.u8(0xa4), e_.u8(0xdc), e_.u32(static_cast<uint64_t>(o_.jump_code + table));
  flow_.native_flags = false;
  add_stub(requested, Stubs::indirect, &site, site.before);
  if (odd != nullptr) add_stub(odd, Stubs::indirect, &site, site.before);
  add_stub(miss, Stubs::indirect, &site, site.before).untag = true;
}

void UnitEmitter::emit_complex(unsigned n) noexcept {
  commit_rsp();
  Site& site = new_site(n, n);
  static_assert(ZYDIS_MNEMONIC_MAX_VALUE <= UINT16_MAX);
  site.mnemonic = static_cast<uint16_t>(code_[n].insn.mnemonic);
  const Boundary at{.native_flags = flow_.native_flags && !flow_.stored_flags, .level = flow_.level};
  e_.move_address(scratch0, reinterpret_cast<uint64_t>(&site));
  e_.jump_to(translator_.stubs_.call[Stubs::complex_op][at.index()]);
  flow_.native_flags = false;
  flow_.stored_flags = true;
  flow_.level = 0;
  site.next = e_.at();
  site.after = {};
}

// --- out of line

UnitEmitter::Stub& UnitEmitter::add_stub(uint8_t* displacement, Stubs::Call call, void* argument,
                                         Boundary at) noexcept {
  return stubs_.emplace_back(
      Stub{.displacement = displacement, .call = call, .argument = argument, .boundary = at, .untag = false});
}

void UnitEmitter::emit_stubs() noexcept {
  size_t next_fault = 0;
  for (const Stub& stub : stubs_) {
    if (!e_.room(room_for_stub + 32)) {
      failed_ = true;
      return;
    }
    const uint8_t* const here = e_.at();
    if (stub.displacement != nullptr) Emitter::patch(stub.displacement, here);
    if (stub.call == Stubs::exit) {
      DirectExit& exit = *static_cast<DirectExit*>(stub.argument);
      exit.stub = here;
      if (exit.displacement != nullptr)
        Emitter::patch(exit.displacement, here);
      else
        translator_.area_.slot[exit.slot] = here;
    } else if (stub.call == Stubs::slow_access && stub.displacement == nullptr) {
      t_.faults[next_fault++].stub = here;
    }
    if (stub.call == Stubs::indirect) {
      if (stub.untag) e_.state(0x33, scratch0, o_.tag);
      e_.store(o_.target, scratch0);
    }
    e_.move_address(scratch0, reinterpret_cast<uint64_t>(stub.argument));
    e_.jump_to(translator_.stubs_.call[stub.call][stub.boundary.index()]);
  }
}

}  // namespace lodge::kvm::soft
