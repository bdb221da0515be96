#include "kvm/soft/translate/unit.hpp"

#include <algorithm>

#include "kvm/soft/decode/decoder.hpp"
#include "kvm/soft/mmu/host_access.hpp"

namespace lodge::kvm::soft {
namespace {

constexpr size_t room_for_one = 512;  // host code of one guest instruction
constexpr size_t room_for_stub = 40;

}  // namespace

UnitEmitter::UnitEmitter(Translator& translator, Translation& translation, uint8_t* begin,
                         uint8_t* end) noexcept
    : translator_(translator),
      t_(translation),
      block_(translation.code()),
      o_(translator.stubs_.offsets),
      e_(begin, end),
      wide_(translator.cpu_.mode() == Mode::bits64),
      word_(wide_ ? 8 : 4),
      counts_(translator.counts_),
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
  emit_entry();
  t_.body = e_.at();
  for (unsigned n = 0; n < code_.size() && !failed_; ++n) {
    if (!e_.room(room_for_one + stubs_.size() * room_for_stub)) return false;
    if (n == counted_) count_straight(n);
    emit_one(n);
  }
  if (!ended_) exit_to(start_ + block_.bytes);
  if (failed_) return false;
  emit_stubs();
  // The next translation begins at its own cache line half.
  while ((reinterpret_cast<uintptr_t>(e_.at()) & 15) != 0) e_.u8(0xcc);
  t_.end = e_.at();
  return !failed_;
}

bool UnitEmitter::analyse_block() noexcept {
  ZydisDecoder decoder;
  if (!translator_decoder(cpu(), decoder)) return false;
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
    analyse(cpu(), decoder, bytes.data(), op.length, op, code_[n]);
  }
  for (unsigned n = 0; n < code_.size(); ++n) {
    if (!leads_on(n)) return false;
    // Does it branch back? Indirect branches look at the request word themselves.
    if (code_[n].is_direct() && static_cast<int64_t>(code_[n].op->imm) <= code_[n].op->offset)
      wants_check_ = true;
    // Nothing may come between STI and what follows: no look at the request word, no other block's either.
    if (code_[n].kind == Kind::set_if && (n + 1 == code_.size() || !follows(n))) {
      code_[n].kind = Kind::complex;
      code_[n].reads = all_flags;
    }
  }
  return block_.fresh();
}

// Whether the instruction behind n in memory is also the next one here.
bool UnitEmitter::follows(unsigned n) const noexcept {
  return n + 1 == code_.size() || code_[n + 1].op->offset == code_[n].op->offset + code_[n].op->length;
}

// Whether n leads to the next instruction of a path.
bool UnitEmitter::leads_on(unsigned n) const noexcept {
  const Instruction& i = code_[n];
  if (n + 1 == code_.size()) return true;
  const bool to_target = static_cast<int64_t>(i.op->imm) == code_[n + 1].op->offset;
  switch (i.kind) {
    case Kind::branch: return to_target || follows(n);
    case Kind::jump:
    case Kind::call: return to_target;
    case Kind::loop:
    case Kind::jump_indirect:
    case Kind::call_indirect:
    case Kind::ret: return false;
    default: return follows(n);
  }
}

void UnitEmitter::find_live_flags() noexcept {
  live_.assign(code_.size() + 1, all_flags);
  for (size_t n = code_.size(); n-- > 0;)
    // Who leaves a path at a branch may want all of them.
    live_[n] = code_[n].kind == Kind::branch
                   ? all_flags
                   : static_cast<Flags>((live_[n + 1] & ~code_[n].replaces) | code_[n].reads);
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
  if (i.kind != Kind::complex) note_flags(i);
  if (int32_t amount = 0; run_.active && run_.base != rsp && moves(run_.base, i, amount))
    run_.moved += amount;
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
    case Kind::string: emit_string(i, n); break;
    case Kind::load_control: emit_load_control(i, n); break;
    case Kind::swap_gs:
    case Kind::clear_if:
    case Kind::set_if:
    case Kind::read_tsc:
    case Kind::read_segment:
    case Kind::set_df:
    case Kind::pause:
    case Kind::serialize: emit_system(i, n); break;
    case Kind::push_flags: emit_push_flags(i, n); break;
    case Kind::pop_flags: emit_pop_flags(i, n); break;
    case Kind::pop: emit_pop(i, n); break;
    case Kind::leave: emit_leave(i, n); break;
    case Kind::call: emit_call(i, n); break;
    case Kind::call_indirect: emit_call_indirect(i, n); break;
    case Kind::ret: emit_ret(i, n); break;
    case Kind::jump: emit_jump(i, n); break;
    case Kind::jump_indirect: emit_jump_indirect(i, n); break;
    case Kind::branch: emit_branch(i, n); break;
    case Kind::loop: emit_loop(i); break;
    case Kind::complex: emit_complex(n); break;
  }
}

// --- flags

void UnitEmitter::store_flags() noexcept {
  if (flow_.stored_flags || !flow_.native_flags) return;
  e_.save_flags(o_.arith, scratch1);
  flow_.stored_flags = true;
}

// An instruction that reads flags, or leaves some of those that are still wanted.
bool UnitEmitter::wants_native_flags(const Instruction& i, unsigned n) const noexcept {
  const auto kept = static_cast<Flags>(live_[n + 1] & ~i.replaces);
  return i.reads != no_flags || (i.writes != no_flags && kept != no_flags);
}

// Takes scratch1.
void UnitEmitter::need_native_flags(const Instruction& i, unsigned n) noexcept {
  if (!wants_native_flags(i, n) || flow_.native_flags) return;
  e_.load_flags(o_.arith, scratch1);
  flow_.native_flags = true;
}

void UnitEmitter::note_flags(const Instruction& i) noexcept {
  if (i.writes == no_flags) return;
  flow_.native_flags = true;
  flow_.stored_flags = false;
}

// At the first place where the flags are dead or stored, but not behind an STI.
void UnitEmitter::check_requests(unsigned n) noexcept {
  if (n > 0 && code_[n - 1].kind == Kind::set_if) return;
  // Nobody leaves without.
  bool last = true;
  for (size_t k = n; k + 1 < code_.size() && !code_[k].is_direct(); ++k)
    last = last && code_[k].kind == Kind::set_if;
  if (live_[n] != no_flags && !flow_.stored_flags && !last) return;
  if (live_[n] != no_flags) store_flags();
  wants_check_ = false;
  uint8_t* const jump = e_.jump_if_set(o_.request);
  flow_.native_flags = false;
  Site& site = new_site(n, n);
  const Boundary at{.native_flags = false, .level = flow_.level};
  add_stub(jump, Stubs::request, &site, at);
  if (t_.hints.settled || translator_.heat_ == 0 || block_.host_page[1] != 0) return;
  e_.state(0x81, 0, o_.heat + 4 * int64_t{Translator::heat_index(t_.block)}, false);  // add dword [heat]
  e_.u32(translator_.heat_);
  add_stub(e_.jump_if(8), Stubs::hot, &site, at);  // js
}

// --- registers that live in memory

void UnitEmitter::load_guest(unsigned scratch, unsigned guest) noexcept {
  if (lives_in_memory(guest))
    e_.load(scratch, o_.of_gpr(guest));
  else
    e_.move(scratch, guest);
}

// ADD or SUB of a small immediate to all of RSP (of ESP in 32-bit code), or LEA within it: what it adds.
bool UnitEmitter::moves_rsp(const Instruction& i, int32_t& amount) const noexcept {
  return moves(rsp, i, amount);
}

// Whether all that the instruction does to registers is to add a small constant to `reg`.
bool UnitEmitter::moves(unsigned reg, const Instruction& i, int32_t& amount) const noexcept {
  if (i.op->size != word_) return false;
  if (i.kind == Kind::address) {
    amount = static_cast<int32_t>(i.op->disp);
    return amount == static_cast<int16_t>(amount) && i.op->dst == reg * 8 && i.op->base == reg &&
           i.op->index == gpr_zero && i.op->address_size == word_;
  }
  if (i.kind != Kind::copy || i.operand_registers != register_bit(reg)) return false;
  switch (i.insn.mnemonic) {
    case ZYDIS_MNEMONIC_INC: amount = 1; return reg != rsp;
    case ZYDIS_MNEMONIC_DEC: amount = -1; return reg != rsp;
    case ZYDIS_MNEMONIC_ADD:
    case ZYDIS_MNEMONIC_SUB: break;
    default: return false;
  }
  if (i.operands[1].type != ZYDIS_OPERAND_TYPE_IMMEDIATE) return false;
  const auto value = static_cast<int64_t>(i.op->imm);
  if (value != static_cast<int16_t>(value)) return false;
  amount = static_cast<int32_t>(i.insn.mnemonic == ZYDIS_MNEMONIC_ADD ? value : -value);
  return true;
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
    if ((i.operand_registers & register_bit(guest)) == 0) continue;
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
    if ((i.operand_registers & i.written_registers & register_bit(guest)) != 0)
      e_.store(o_.of_gpr(guest), standins.host(guest));
}

void UnitEmitter::raise_level(uint8_t level) noexcept {
  // lea r11, [rip + rest]; mov [resume], r11; jmp raise
  e_.u8(0x4c), e_.u8(0x8d), e_.u8(0x1d);
  uint8_t* const rest = e_.at();
  e_.u32(0);
  e_.store(o_.resume, scratch1);
  e_.jump_to(common_stubs().raise[flow_.level][level]);
  Emitter::patch(rest, e_.at());
  flow_.level = level;
}

// Counts the instructions up to the next branch.
void UnitEmitter::count_straight(unsigned n) noexcept {
  counted_ = n + 1;
  while (counted_ < code_.size() && !code_[counted_ - 1].is_direct()) ++counted_;
  if (counts_) count(o_.instructions, int64_t{counted_} - n);
}

// Adds to a counter of the area, without touching flags; takes scratch1.
void UnitEmitter::count(int64_t counter, int64_t amount) noexcept {
  e_.load(scratch1, counter);
  e_.lea(scratch1, scratch1, 16, 0, amount, true);
  e_.store(counter, scratch1);
}

// --- instructions without memory operand

void UnitEmitter::emit_copy(const Instruction& i, unsigned n) noexcept {
  if (int32_t amount = 0; live_[n + 1] == no_flags && moves_rsp(i, amount)) {
    flow_.rsp += amount;
    return;
  }
  if ((i.operand_registers & register_bit(rsp)) != 0) commit_rsp();
  need_native_flags(i, n);
  Standins standins;
  if (!bind(i, standins)) {
    failed_ = true;
    return;
  }
  if (i.may_fault) {
    Site& site = new_fault(n, n);
    copy_registers(e_, i, standins);
    close(site);  // reached only if the interpreter does not fault; RDX and RAX are written then
    if ((i.operand_registers & i.written_registers & homeless_registers) != 0) failed_ = true;
    return;
  }
  copy_registers(e_, i, standins);
  write_back(i, standins);
}

void UnitEmitter::emit_address(const Instruction& i) noexcept {
  if (int32_t amount = 0; moves_rsp(i, amount)) {
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

// --- ways out

void UnitEmitter::emit_complex(unsigned n) noexcept {
  commit_rsp();
  Site& site = new_site(n, n);
  site.mnemonic = static_cast<uint16_t>(code_[n].insn.mnemonic);
  const Boundary at{.native_flags = flow_.native_flags && !flow_.stored_flags, .level = flow_.level};
  e_.move_address(scratch0, reinterpret_cast<uint64_t>(&site));
  e_.jump_to(common_stubs().call[Stubs::complex_op][at.index()]);
  flow_.native_flags = false;
  flow_.stored_flags = true;
  flow_.level = 0;
  close(site);
}

Site& UnitEmitter::new_site(unsigned n, unsigned last) noexcept {
  Site& site = t_.sites.emplace_back();
  site.owner = &t_;
  site.first = static_cast<uint16_t>(n);
  site.last = static_cast<uint16_t>(last);
  site.before = boundary();
  site.rsp_before = flow_.rsp;
  site.counted = static_cast<uint16_t>(counted_);
  return site;
}

// Of the host instruction that comes next and may raise a signal.
Site& UnitEmitter::new_fault(unsigned n, unsigned last) noexcept {
  Site& site = new_site(n, last);
  t_.faults.push_back({.at = e_.at(), .stub = nullptr});
  add_stub(nullptr, Stubs::slow_access, &site, boundary());
  return site;
}

// Leaves an instruction to the interpreter when the jump is taken. The flags are stored or dead.
Site& UnitEmitter::interpret_if(uint8_t* jump, unsigned n) noexcept {
  flow_.native_flags = false;
  Site& site = new_site(n, n);
  static_assert(ZYDIS_MNEMONIC_MAX_VALUE <= UINT16_MAX);
  site.mnemonic = static_cast<uint16_t>(code_[n].insn.mnemonic);
  add_stub(jump, Stubs::complex_op, &site, site.before);
  return site;
}

void UnitEmitter::close(Site& site) noexcept {
  site.next = e_.at();
  site.after = boundary();
  site.rsp_after = flow_.rsp;
}

UnitEmitter::Stub& UnitEmitter::add_stub(uint8_t* displacement, Stubs::Call call, void* argument,
                                         Boundary at) noexcept {
  return stubs_.emplace_back(
      Stub{.displacement = displacement, .call = call, .argument = argument, .boundary = at});
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
      place_exit(*static_cast<DirectExit*>(stub.argument), here);
    } else if (stub.call == Stubs::slow_access && stub.displacement == nullptr) {
      t_.faults[next_fault++].stub = here;
    }
    if (stub.call == Stubs::indirect) e_.store(o_.target, scratch0);
    e_.move_address(scratch0, reinterpret_cast<uint64_t>(stub.argument));
    e_.jump_to(common_stubs().call[stub.call][stub.boundary.index()]);
  }
}

}  // namespace lodge::kvm::soft
